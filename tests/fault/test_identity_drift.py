"""Fault 18: engines that agree in all but one thing share nothing, whichever it is; those that agree share all."""

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvproto.identity import NamespaceIdentity

BLOCK_BYTES = 8192
TOKENS = list(range(64))  # four blocks of 16
BASE: dict[str, object] = {
    "model": "m", "engine": "vllm 0.32", "layout": "NHD", "dtype": "bfloat16", "block_tokens": 16,
    "block_bytes": BLOCK_BYTES, "revision": "main", "adapter": "lora-1", "tp": (0, 2), "pp": (0, 2),
}  # fmt: skip
# Field of the identity -> what to change; what goes into keys instead of the identity comes after.
DRIFT: dict[str, dict[str, object]] = {
    "model": {"model": "m2"}, "engine": {"engine": "vllm 0.33"}, "layout": {"layout": "HND"},
    "dtype": {"dtype": "float16"}, "block_tokens": {"block_tokens": 32}, "block_bytes": {"block_bytes": 4096},
    "revision": {"revision": "main2"}, "adapter": {"adapter": "lora-2"},
    "tp_rank": {"tp": (1, 2)}, "tp_size": {"tp": (0, 4)}, "pp_rank": {"pp": (1, 2)}, "pp_size": {"pp": (0, 4)},
    "codec": {"codec": "int8/1 4096 bfloat16 rows of 128"},
}  # fmt: skip


@pytest.fixture(scope="module")
def client(shared_daemon: DaemonProcess) -> Iterator[kvclient.Client]:
    with kvclient.connect(shared_daemon.runtime_dir, timeout_s=20.0) as connected:
        assert connected.wait_connected(20.0)
        ns = namespace(connected)
        keys = ns.keys(TOKENS, extra=b"salt")
        blocks = [np.full(BLOCK_BYTES, 1 + number, dtype=np.uint8) for number in range(len(keys))]
        assert ns.store(keys, blocks, wait=True).accepted == len(keys) == 4
        yield connected


def namespace(client: kvclient.Client, **changes: object) -> kvclient.Namespace:
    """That of an engine."""
    return client.namespace(**(BASE | changes))  # type: ignore[arg-type]


def fetched(client: kvclient.Client, tokens: list[int], extra: bytes, **changes: object) -> int:
    """Blocks that an engine finds."""
    ns = namespace(client, **changes)
    with ns.fetch(ns.keys(tokens, extra=extra)) as lease:
        return lease.blocks


def test_who_agrees_in_everything_finds_all(client: kvclient.Client) -> None:
    assert fetched(client, TOKENS, b"salt") == 4
    assert fetched(client, [*TOKENS, 1, 2, 3], b"salt") == 4


def test_every_field_of_the_identity_is_drifted_below() -> None:
    assert DRIFT.keys() == {field.name for field in fields(NamespaceIdentity)}


@pytest.mark.parametrize("field", DRIFT)
def test_one_other_field_is_a_miss(client: kvclient.Client, field: str) -> None:
    base = namespace(client).identity
    changed = namespace(client, **DRIFT[field]).identity
    assert [one.name for one in fields(base) if getattr(base, one.name) != getattr(changed, one.name)] == [field]
    assert fetched(client, TOKENS, b"salt", **DRIFT[field]) == 0


def test_another_salt_or_none_is_a_miss(client: kvclient.Client) -> None:
    for extra in (b"", b"salt2", b"sal", b"salt\0"):
        assert fetched(client, TOKENS, extra) == 0


@pytest.mark.parametrize("at", [0, 15, 16, 63])
def test_another_token_is_a_miss_from_its_block_on(client: kvclient.Client, at: int) -> None:
    tokens = list(TOKENS)
    tokens[at] += 1
    assert fetched(client, tokens, b"salt") == at // 16
