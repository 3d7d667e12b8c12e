"""Events of blocks as consumers of vLLM's KV events read them: msgpack, of the classes of vllm.distributed.kv_events.

    maps      vLLM since 0.20 or so: an event is a map with its name under "type"
    arrays    before that: an event is an array that begins with its name

A batch is an array either way: [seconds since 1970, events, rank]. Our keys are vLLM's block hashes. What only an
engine knows is left as vLLM's own offloading leaves it: no parent, no tokens, and 0 of them a block. Consumers take
that for another place of blocks that an engine's own events have told them of; with the true number of tokens and none
of them some would read beyond the end. One event for each block that is stored: several hashes in one are a chain.

Any thread. Needs the packages of [events].
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from kvstore.announcing import IN_DRAM, IN_REMOTE, ON_DISK, Changes, Place

# vLLM's words, and for what lies beyond this host, which vLLM has none for, Dynamo's.
MEDIA: Final = ((int(IN_DRAM), "CPU"), (int(ON_DISK), "STORAGE"), (int(IN_REMOTE), "EXTERNAL"))

Hash = int | bytes


class BlockStored(msgspec.Struct, omit_defaults=True, gc=False, tag=True):  # type: ignore[call-arg, unused-ignore]
    """A block came into a medium."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, omit_defaults=True, gc=False, tag=True):  # type: ignore[call-arg, unused-ignore]
    """Blocks left a medium."""

    block_hashes: list[Hash]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, omit_defaults=True, gc=False, tag=True):  # type: ignore[call-arg, unused-ignore]
    """Nothing is there any more."""


class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):  # type: ignore[call-arg, unused-ignore]
    """What one message carries."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class Encoder:
    """One way to write events."""

    def __init__(self, form: str, hashes: str, *, apart: bool = False) -> None:
        """`apart`: each namespace's blocks are told by themselves; else what all ranks have (`kvstore/usable.py`)."""
        self._was, self._now = ("was", "now") if apart else ("usable_was", "usable_now")
        self._arrays = form == "arrays"
        self._numbers = hashes == "int"
        self._pack = msgspec.msgpack.Encoder()

    def encode(self, changes: Changes, place: Place) -> bytes:
        """Changes of one namespace, in order, all of them as of now."""
        return self._batch(list(self._events(changes, place)))

    def cleared(self) -> bytes:
        """All blocks of whoever publishes are gone."""
        return self._batch([AllBlocksCleared()])

    def _batch(self, events: list[msgspec.Struct]) -> bytes:
        plain: Sequence[Any] = [_as_array(one) for one in events] if self._arrays else events
        return self._pack.encode(Batch(time.time(), list(plain), 0))

    def _events(self, changes: Changes, place: Place) -> Iterator[msgspec.Struct]:
        """What came into a medium before what left another: whoever looks on sees a block move, not vanish. Nothing of
        what changes for one rank alone.
        """
        keys = self._hashes(changes)
        rows = list(zip(keys, changes[self._was].tolist(), changes[self._now].tolist(), strict=True))
        at = 0
        while at < len(rows):
            key, was, now = rows[at]
            for bit, medium in MEDIA:
                if now & ~was & bit:
                    yield BlockStored([key], None, [], 0, None, medium, place.adapter or None)
            stop = at + 1
            if now & ~was == 0:  # several that only left go into one event
                while stop < len(rows) and rows[stop][1:] == (was, now):
                    stop += 1
            for bit, medium in MEDIA:
                if was & ~now & bit:
                    yield BlockRemoved([row[0] for row in rows[at:stop]], medium)
            at = stop

    def _hashes(self, changes: Changes) -> list[Hash]:
        if self._numbers:  # the last eight bytes, as vLLM does
            numbers: list[Hash] = np.ascontiguousarray(changes["key"][:, 3]).byteswap().tolist()
            return numbers
        return [key.tobytes() for key in changes["key"]]


def _as_array(event: msgspec.Struct) -> list[Any]:
    """Fields in order, and the name before them."""
    return [type(event).__name__, *(getattr(event, name) for name in event.__struct_fields__)]
