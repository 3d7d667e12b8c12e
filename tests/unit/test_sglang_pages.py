"""Where pages lie: pools that answer as SGLang's do, and what is asked of them. Real ones: tests/integration."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvclient.integrations.sglang_pages import Pages, pages_of
from kvproto.errors import UsageError

TOKENS, PAGES, LAYERS, TOKEN_BYTES = 4, 8, 3, 16
HALF = LAYERS * TOKENS * PAGES * TOKEN_BYTES  # all of K, or all of V


class Whole:
    """A tensor at some address."""

    def __init__(self, size: int) -> None:
        self._size = size

    def data_ptr(self) -> int:
        return 1 << 20

    def numel(self) -> int:
        return self._size

    def element_size(self) -> int:
        return 1


class MHATokenToKVPoolHost(SimpleNamespace):
    """Layer first: K and V of a layer are told one after the other, and lie far apart."""

    def get_page_buffer_meta(self, indices: Any) -> tuple[Sequence[int], Sequence[int]]:
        base = 1 << 20
        addresses = [
            base + half * HALF + (layer * TOKENS * PAGES + start) * TOKEN_BYTES
            for start in indices.tolist()[::TOKENS]
            for layer in range(LAYERS)
            for half in (0, 1)
        ]
        return addresses, [TOKENS * TOKEN_BYTES] * len(addresses)


def pool(**more: Any) -> MHATokenToKVPoolHost:
    """One of `PAGES` pages."""
    plain = {
        "layout": "layer_first", "page_size": TOKENS, "size": TOKENS * PAGES, "layer_num": LAYERS, "dcp_size": 1,
        "target_layer_num": LAYERS, "device": "cpu", "dtype": "torch.uint8", "kv_buffer": Whole(2 * HALF),
    }  # fmt: skip
    return MHATokenToKVPoolHost(**(plain | more))


def starting_at(*tokens: int) -> Any:
    """Indices of the pages that begin there."""
    return np.concatenate([np.arange(token, token + TOKENS) for token in tokens])


def test_a_block_is_a_page_as_sglang_flattens_it() -> None:
    pages = pages_of(pool())
    assert (pages.tokens, pages.page_bytes) == (TOKENS, 2 * LAYERS * TOKENS * TOKEN_BYTES)
    rows = pages.scattered(starting_at(8, 0), 2).addresses
    assert [list(row) for row in rows] == [sorted(row) for row in rows]
    assert rows[0][0] - rows[1][0] == 8 * TOKEN_BYTES
    assert rows[1][LAYERS] - rows[1][0] == HALF
    assert len(pages.scattered(starting_at(8, 0, 4), 2)) == 2, "no more pages than were asked for"


def test_two_tensors_are_taken_in_the_order_in_which_they_are_told() -> None:
    in_one, in_two = pages_of(pool()), pages_of(pool(kv_buffer=(Whole(HALF), Whole(HALF))))
    assert in_two.order == tuple(range(2 * LAYERS))
    assert in_one.order != in_two.order
    assert in_one.words != in_two.words


@pytest.mark.parametrize("indices", [starting_at(2), starting_at(32), starting_at(-4), starting_at(0)[:3]])
def test_tokens_that_are_no_pages_of_the_pool_are_never_touched(indices: Any) -> None:
    with pytest.raises(UsageError):
        pages_of(pool()).scattered(indices, 1)


def test_a_pool_that_has_changed_is_not_written_to() -> None:
    pages: Pages = pages_of(pool())
    pages.pool.get_page_buffer_meta = lambda _: ([1 << 20], [TOKEN_BYTES])
    with pytest.raises(UsageError, match="other pieces"):
        pages.scattered(starting_at(0), 1)


def test_what_a_pool_is_like_is_in_its_words() -> None:
    plain = pages_of(pool())
    assert pages_of(pool()).words == plain.words
    for name, value in (("layout", "page_head"), ("head_num", 4), ("start_layer", 8), ("storage_format_tag", "x")):
        assert pages_of(pool(**{name: value})).words != plain.words, name


def test_flat_pages_must_be_as_large_as_pages() -> None:
    pages = pages_of(pool())
    fitting = [np.zeros(pages.page_bytes, dtype=np.uint8) for _ in range(2)]
    assert pages.of_tensors(fitting, 2).lengths == (pages.page_bytes,)
    for flat, count in ((fitting, 3), ([fitting[0][1:]], 1)):
        with pytest.raises(UsageError):
            pages.of_tensors(flat, count)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"device": "cuda:0"}, "only memory of the CPU"),
        ({"dcp_size": 2}, "share out"),
        ({"_layer_shard_enabled": True}, "share out"),
        ({"target_layer_num": LAYERS - 1}, "draft model"),
    ],
)
def test_pools_whose_pages_cannot_be_kept_are_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pages_of(pool(**more))


def test_kinds_of_memory_that_nobody_has_looked_at_are_refused() -> None:
    with pytest.raises(UsageError, match="kind SimpleNamespace is not supported"):
        pages_of(SimpleNamespace(**vars(pool())))
