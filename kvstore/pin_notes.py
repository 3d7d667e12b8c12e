"""What is written down of pins for a successor (`pin_book.py`): at once when one begins or changes, and a while later
that it was used. Owner thread.

Uses come with every LEASE, so they are written in batches: each second, and while there are more of them, every 10 ms.
That is 3 % of a core at most, and 6,400 pins a second.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from kvproto.policy_frames import Tier
from kvstore.blocks import Tables
from kvstore.pin_book import PinBook, Saved
from kvstore.pins import Held

NOTED: Final = 64  # at a time: 0.3 ms
NOTE_NS: Final = 10**9  # between the end of one round and the next
GO_ON_NS: Final = 10 * 10**6


class Notes:
    """Those of one store."""

    def __init__(
        self, tables: Tables, book: PinBook, pins: Mapping[int, Held], ending_at: Callable[[int], Iterable[Held]],
        expires_ns: Callable[[Held], int],
    ) -> None:  # fmt: skip
        """`pins` are those that are not over, by number; `ending_at` gives those whose deepest block is in a row."""
        self._tables = tables
        self._book = book
        self._pins = pins
        self._ending_at = ending_at
        self._expires_ns = expires_ns
        self._used: dict[int, None] = {}  # deepest rows of pins that were used since
        self._to_write: deque[Held] = deque()
        self._next_ns = 0

    def write(self, pin: Held) -> None:
        """What it covers, and until when."""
        key = self._tables.blocks["key"][pin.rows[-1]].tobytes()
        self._book.write(
            pin.place,
            Saved(
                pin.place, pin.number, self._expires_ns(pin), pin.ttl_ns, key, pin.namespace.number, pin.rows.size,
                pin.refresh, pin.owner, pin.wanted is not Tier.DISK,
            ),
        )  # fmt: skip

    def used(self, rows: Iterable[int]) -> None:
        """Pins that end in these rows were used: it is written down soon."""
        self._used.update(dict.fromkeys(rows))

    def tick(self, now_ns: int) -> None:
        """A batch, if it is time."""
        if self.waiting and now_ns >= self._next_ns:
            self._write_some(NOTED)
            self._next_ns = now_ns + (GO_ON_NS if self.waiting else NOTE_NS)

    def finish(self) -> None:
        """All of them, now: this life ends."""
        while self.waiting:
            self._write_some(NOTED)

    @property
    def waiting(self) -> bool:
        """Is anything to be written?"""
        return bool(self._used or self._to_write)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None: nothing."""
        return self._next_ns if self.waiting else None

    def _write_some(self, most: int) -> None:
        while self._used and len(self._to_write) < most:
            row = next(iter(self._used))
            del self._used[row]
            self._to_write.extend(pin for pin in self._ending_at(row) if pin.refresh)
        for _ in range(min(most, len(self._to_write))):
            pin = self._to_write.popleft()
            if pin.number in self._pins:  # else its place may be another's by now
                self.write(pin)
