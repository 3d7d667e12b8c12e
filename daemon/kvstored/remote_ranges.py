"""Which ranges of which objects are read for a chain, and how many at a time."""

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvproto.limits import MIB
from kvstore.tier.remote_format import HEADER_BYTES, ObjectHeader, is_encoded
from kvstore.tier.remote_index import Stretch

PIECE_BYTES: Final = 8 * MIB  # a request; a larger block is one of its own
BATCH_BYTES: Final = 16 * MIB  # of a request for several objects
BATCH_OBJECTS: Final = 64


class Opening:
    """An object's header on its way: whoever reads the object's first part brings it, others wait for that one.

    Parts are begun in order, so whoever waits, waits for one that runs, has ended, or was called off, which is said.
    """

    def __init__(self) -> None:
        self._header: Future[ObjectHeader] = Future()
        self._blamed = False

    def set(self, header: ObjectHeader) -> None:
        """Here it is."""
        with suppress(InvalidStateError):
            self._header.set_result(header)

    def blame(self) -> bool:
        """The object is gone, or not what it should be: is this the first to find out?"""
        first, self._blamed = not self._blamed, True
        self.fail(CancelledError())
        return first

    def fail(self, error: BaseException) -> None:
        """It does not come, if it has not."""
        with suppress(InvalidStateError):
            self._header.set_exception(error)

    def wait(self) -> ObjectHeader:
        """Raises what `fail` was told; CancelledError where that is told already."""
        return self._header.result()


@dataclass(frozen=True, slots=True)
class Ask:
    """One range of one object, or (`stretches` of several) as many objects whole, each of one block."""

    stretches: tuple[Stretch, ...]
    first: int  # of the blocks of the only object
    stop: int
    opening: Opening
    leads: bool  # it is the object's first part that is read
    header: ObjectHeader | None  # of an object whose blocks are encoded: it says where they lie
    taken_bytes: int  # of memory, until its blocks are in DRAM

    @property
    def stretch(self) -> Stretch:
        """The only one."""
        return self.stretches[0]

    @property
    def at(self) -> int:
        """Its first block in the chain."""
        return self.stretch.at + self.first - self.stretch.skip

    @property
    def blocks(self) -> int:
        """So many it is for."""
        return self.stop - self.first if len(self.stretches) == 1 else len(self.stretches)

    def range(self, block_bytes: int) -> tuple[int, int]:
        """What is read of the only object: the header too with its first block, if nobody has read it."""
        if self.header is not None:
            return self.header.ends[self.first], self.header.ends[self.stop]
        return self.first and HEADER_BYTES + self.first * block_bytes, HEADER_BYTES + self.stop * block_bytes


def asks_of(stretch: Stretch, block_bytes: int, header: ObjectHeader | None = None) -> list[Ask]:
    """Parts of one object, in order. `header`: of an object whose blocks are encoded."""
    assert is_encoded(stretch.name) is (header is not None), "otherwise nobody knows where its blocks lie"
    most = max(1, PIECE_BYTES // block_bytes)
    begin, end = stretch.skip, stretch.skip + stretch.count
    opening = Opening()
    asks = []
    for first in range(begin, end, most):
        stop = min(first + most, end)
        taken_bytes = (stop - first) * block_bytes + (0 if header is None else header.ends[stop] - header.ends[first])
        asks.append(Ask((stretch,), first, stop, opening, first == begin, header, taken_bytes + HEADER_BYTES))
    return asks


def batches_of(stretches: Sequence[Stretch], block_bytes: int) -> list[Ask]:
    """Objects of one block each, so many at a time."""
    object_bytes = HEADER_BYTES + block_bytes
    most = max(1, min(BATCH_OBJECTS, BATCH_BYTES // object_bytes))
    asks = []
    for at in range(0, len(stretches), most):
        some = tuple(stretches[at : at + most])
        asks.append(Ask(some, 0, 1, Opening(), leads=True, header=None, taken_bytes=len(some) * object_bytes))
    return asks
