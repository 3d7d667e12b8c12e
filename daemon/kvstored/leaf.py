"""Leaf threads: copy a span into its slot, hash it, say so. They know no state but the bytes they are given.

What a client in mode direct has put into its slot itself is only hashed. It can still change that afterwards: the hash
is of what was there, and a scrub finds the rest.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import xxhash

from kvkernels.copyhash import Bytes, copy_and_hash
from kvstore.sessions import Ticket
from kvstore.tier.orders import Outcome, Verify
from kvstored.niceness import be_nice


@dataclass(frozen=True, slots=True)
class Move:
    """One block on its way: `source` in a ring, `target` in an arena. None: it is there already."""

    ticket: Ticket
    source: Bytes | None
    target: Bytes


@dataclass(frozen=True, slots=True)
class Check:
    """One block of a former life, to be hashed."""

    order: Verify
    content: Bytes


Batch = list[Move] | list[Check]

# Whoever stores goes first: on two cores a client's own copy ran at 0.2-0.5 of memcpy beside leaf threads of its
# priority, at 0.6-0.7 beside nicer ones. Not the nicest: a leaf thread holds the GIL between two blocks.
NICE = 10


class LeafThreads:
    """A few threads that run batches of moves. `submit` and `take_done` on the owner thread."""

    def __init__(self, threads: int, wake: Callable[[], None]) -> None:
        """`wake` is called on a leaf thread whenever something is done."""
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        self._done: deque[list[tuple[Ticket, int]]] = deque()
        self._checked: deque[list[Verify]] = deque()
        self._wake = wake
        self._threads = [
            threading.Thread(target=self._run, name=f"leaf-{number}", daemon=True) for number in range(threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish what was submitted, then end."""
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def submit(self, batch: Batch) -> None:
        """Have these blocks copied, in order, by one thread."""
        self._batches.put(batch)

    def check(self, batch: list[Check]) -> None:
        """Have these blocks hashed and compared, by one thread."""
        self._batches.put(batch)

    def take_checked(self) -> list[list[Verify]]:
        """Batches of `check`, with their outcomes."""
        checked: list[list[Verify]] = []
        while self._checked:
            checked.append(self._checked.popleft())
        return checked

    def take_done(self) -> list[tuple[Ticket, int]]:
        """Finished tickets with the checksum of what lies in their slots."""
        if not self._done:
            return []
        finished: list[tuple[Ticket, int]] = []
        while self._done:
            finished += self._done.popleft()
        return finished

    def _run(self) -> None:
        be_nice(NICE)
        while (batch := self._batches.get()) is not None:
            self._do(batch)
            self._wake()
            del batch  # its views would keep a ring that is to be unmapped in use

    def _do(self, batch: Batch) -> None:
        moved: list[tuple[Ticket, int]] = []
        checked: list[Verify] = []
        for one in batch:
            if isinstance(one, Move):
                moved.append((one.ticket, _checksum(one)))
            else:
                good = xxhash.xxh3_64_intdigest(one.content) == one.order.checksum  # type: ignore[arg-type]
                one.order.outcome = Outcome.DONE if good else Outcome.DAMAGED
                checked.append(one.order)
        if moved:
            self._done.append(moved)
        if checked:
            self._checked.append(checked)


def _checksum(move: Move) -> int:
    """Of what lies in the slot afterwards."""
    if move.source is not None:
        return copy_and_hash(move.source, move.target)
    return xxhash.xxh3_64_intdigest(move.target)  # type: ignore[arg-type]  # ndarray has the buffer protocol
