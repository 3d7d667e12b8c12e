"""Where a page of SGLang's host memory lies, and what its bytes depend on.

SGLang keeps KV in pages of some tokens, in one of several layouts; in most of them a page lies in pieces. The host pool
says where (`get_page_buffer_meta`), and is asked anew in each call. A block of ours is the pieces of a page in the
order of SGLang's own flat page, so that what one of its interfaces has stored the other reads.

    layer_first         a piece for K and one for V in every layer
    page_first          one of K, one of V, each [tokens, layers, heads, dim]
    page_first_direct   the same, each [layers, tokens, heads, dim]
    page_head           the same, each [heads, tokens, layers, dim]
    latent KV (MLA)     no V: one piece, or in layer_first one a layer
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Final

import numpy as np

from kvclient.buffers import Scattered, readable
from kvproto.errors import UsageError

KINDS: Final = frozenset({"MHATokenToKVPoolHost", "AsymmetricMHATokenToKVPoolHost", "MLATokenToKVPoolHost"})
# What tells one pool's pages from another's, of what pools have by the same name.
TRAITS: Final = (
    "layout", "page_size", "layer_num", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim",
    "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "storage_format_tag",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pages:
    """All pages of a host pool."""

    pool: Any
    tokens: int  # of a page
    given: tuple[int, ...]  # bytes of its pieces, as the pool tells them
    order: tuple[int, ...]  # in which order they make a block
    lengths: tuple[int, ...]  # their bytes, in that order
    latent: bool  # every tensor-parallel rank has the same bytes
    dtype: str
    words: str  # for the namespace
    row: int  # values that lie side by side of one token and head

    @property
    def page_bytes(self) -> int:
        """Of one page of all layers."""
        return sum(self.lengths)

    def scattered(self, host_indices: Any, pages: int) -> Scattered:
        """The first `pages` of those that hold these tokens, `tokens` indices a page. Raises UsageError for others."""
        if len(host_indices) < pages * self.tokens:
            raise UsageError(f"{len(host_indices)} tokens for {pages} pages of {self.tokens}")
        host_indices = host_indices[: pages * self.tokens]
        starts = host_indices[:: self.tokens].tolist()
        if any(start % self.tokens or not 0 <= start < self.pool.size for start in starts):
            raise UsageError(f"tokens that begin no page of the {self.pool.size} in the host pool")
        addresses, lengths = self.pool.get_page_buffer_meta(host_indices)
        each = len(self.given)
        if tuple(lengths) != self.given * pages or len(addresses) != len(lengths):
            raise UsageError("the host pool has changed: its pages lie in other pieces")
        rows = [addresses[first : first + each] for first in range(0, each * pages, each)]
        return Scattered([[row[piece] for piece in self.order] for row in rows], self.lengths, self.pool)

    def of_tensors(self, flat: Sequence[Any], pages: int) -> Scattered:
        """Flat pages, a tensor each. Raises UsageError unless there are `pages` of them, of the right size."""
        if len(flat) != pages:
            raise UsageError(f"{len(flat)} tensors for {pages} pages")
        memory = readable(flat, pages, self.page_bytes)
        return Scattered([[address] for address in memory.addresses], (self.page_bytes,), memory.owners)

    def flat(self) -> Any:
        """A flat page of nothing, as SGLang makes them."""
        return self.pool.get_dummy_flat_data_page()


def pages_of(pool: Any) -> Pages:
    """Of the host pool that SGLang has registered. Raises UsageError for one whose pages cannot be kept."""
    if trouble := _trouble(pool):
        raise UsageError(trouble)
    tokens = int(pool.page_size)
    try:
        addresses, lengths = pool.get_page_buffer_meta(np.arange(tokens))
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"host memory of the layout {pool.layout!r} is not supported: {error}") from error
    order = _order(pool, addresses)
    said = [f"{name} {getattr(pool, name, None)}" for name in TRAITS]
    kind = type(pool).__name__
    digest = hashlib.sha256(f"{said} {lengths} {order}".encode()).hexdigest()[:32]
    return Pages(
        pool=pool,
        tokens=tokens,
        given=tuple(lengths),
        order=order,
        lengths=tuple(lengths[piece] for piece in order),
        latent=kind.startswith("MLA"),
        dtype=str(pool.dtype).removeprefix("torch."),
        words=f"{kind} {pool.layout}, {pool.layer_num} layers, {len(lengths)} pieces {digest}",
        row=_row(pool),
    )


def _row(pool: Any) -> int:
    """Of keys and of values, or what divides both; of latent KV all that a token has in a layer; 0 if not known."""
    latent = getattr(pool, "kv_cache_dim", 0)
    sizes = [latent] if latent else [getattr(pool, name, 0) or 0 for name in ("head_dim", "v_head_dim")]
    return gcd(*(int(size) for size in sizes))


def _trouble(pool: Any) -> str:
    """Why pages of this pool cannot be kept, or nothing."""
    kind = type(pool).__name__
    if kind not in KINDS:
        return f"host memory of the kind {kind} is not supported yet: only {', '.join(sorted(KINDS))} are"
    if str(pool.device) != "cpu":
        return f"host memory on {pool.device}: only memory of the CPU is supported"
    if pool.dcp_size != 1 or getattr(pool, "_layer_shard_enabled", False):
        return "KV memory that ranks share out by tokens or layers is not supported yet"
    if pool.layer_num != pool.target_layer_num:
        return "layers of a draft model in the same host memory (speculative decoding) are not supported yet"
    return ""


def _order(pool: Any, addresses: Sequence[int]) -> tuple[int, ...]:
    """Of the pieces of page 0: by address where one tensor holds them all, as its flat page has them; else as given.

    Where two tensors hold them, which lies first differs from process to process.
    """
    whole = pool.kv_buffer
    pieces = range(len(addresses))
    if hasattr(whole, "data_ptr"):
        first = int(whole.data_ptr())
        if all(first <= address < first + whole.numel() * whole.element_size() for address in addresses):
            return tuple(sorted(pieces, key=lambda piece: addresses[piece]))
    return tuple(pieces)
