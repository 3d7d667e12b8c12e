"""Batches cut into pieces, and the queues that threads take pieces from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import TypeVar

from kvproto.limits import slot_bytes_for
from kvstore.tier.format import HEADER_BYTES, stored_slot_bytes
from kvstore.tier.orders import Load, Order, Outcome, Pack, Save, Verify
from kvstored import drive_files
from kvstored.drive_segments import Segment
from kvstored.drive_work import Arenas, is_packed

Kind = TypeVar("Kind", Load, Save, Verify | Pack)


@dataclass(slots=True, eq=False)
class Batch:
    """A batch and how many of its pieces are not finished."""

    orders: Sequence[Order]
    pieces: int


@dataclass(slots=True, eq=False)
class Piece:
    """What one thread does in one go."""

    batch: Batch
    orders: Sequence[Order]
    segment: Segment | None
    arenas: Arenas
    verdict: Outcome = Outcome.OPEN  # decided already, if not OPEN: nothing is read or written


class Lanes:
    """A queue with a fast lane."""

    def __init__(self) -> None:
        """Empty."""
        self._fast: SimpleQueue[Piece | None] = SimpleQueue()
        self._slow: SimpleQueue[Piece | None] = SimpleQueue()
        self._waiting: SimpleQueue[None] = SimpleQueue()  # as many as in both

    def put(self, piece: Piece | None, *, fast: bool = False) -> None:
        """Any thread. None: the end, for one thread."""
        (self._fast if fast else self._slow).put(piece)
        self._waiting.put(None)

    def get(self) -> Piece | None:
        """Wait for the next."""
        self._waiting.get()
        with suppress(Empty):
            return self._fast.get_nowait()
        return self._slow.get()

    def drain(self) -> Iterator[Piece]:
        """What nobody has taken yet."""
        while True:
            try:
                self._waiting.get_nowait()
            except Empty:
                return
            with suppress(Empty):
                piece = self._fast.get_nowait()
                if piece:
                    yield piece
                continue
            piece = self._slow.get()
            if piece:
                yield piece


def cut_loads(orders: Sequence[Load]) -> list[Sequence[Load]]:
    """Runs of slots that one call can read."""
    return list(_cut(orders, lambda order: order.slot_bytes - HEADER_BYTES, _is_read_with))


def cut_saves(orders: Sequence[Save]) -> list[Sequence[Save]]:
    """Runs of slots that one call can write."""
    return list(_cut(orders, lambda order: order.slot_bytes - HEADER_BYTES, _is_written_with))


def cut_evenly(orders: Sequence[Verify | Pack]) -> list[Sequence[Verify | Pack]]:
    """As much as is worth a turn."""
    return list(_cut(orders, lambda order: slot_bytes_for(order.block_bytes), lambda _, __: True))


def _cut(
    orders: Sequence[Kind], size_of: Callable[[Kind], int], goes_with: Callable[[Kind, Kind], bool]
) -> Iterator[list[Kind]]:
    piece, piece_bytes = [orders[0]], size_of(orders[0])
    for previous, order in pairwise(orders):
        piece_bytes += size_of(order)
        if piece_bytes > drive_files.RUN_BYTES or len(piece) == drive_files.RUN_SLOTS or not goes_with(previous, order):
            yield piece
            piece, piece_bytes = [], size_of(order)
        piece.append(order)
    yield piece


def _is_read_with(previous: Load, order: Load) -> bool:
    if order.slot != previous.slot + 1 or order.slot_bytes != previous.slot_bytes:
        return False
    if is_packed(previous):
        return is_packed(order)
    wanted_bytes = stored_slot_bytes(order.namespace.identity.block_bytes)
    return previous.slot_bytes == stored_slot_bytes(previous.namespace.identity.block_bytes) == wanted_bytes


def _is_written_with(previous: Save, order: Save) -> bool:
    return (
        order.header.slot == previous.header.slot + 1
        and order.slot_bytes == previous.slot_bytes == stored_slot_bytes(previous.header.stored_bytes)
    )
