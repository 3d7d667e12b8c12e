"""What is to be deleted over there, until that has worked: in turn, a pause after each failure, and bounded."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.tier.remote_format import mark_of, marks_in

DIGESTS: Final = 1 << 16  # that wait, 60 bytes each
TRY_AGAIN_S: Final = 2.0
EPOCHS: Final = 4096  # namespaces; beyond, all count as dropped once


@dataclass(frozen=True, slots=True)
class Removal:
    """Objects below a prefix that hold keys of these digests; none: all of them."""

    prefix: str
    digests: tuple[bytes, ...] = ()


class Removals:
    """The queue of them. Any thread."""

    def __init__(self, pause_s: float = TRY_AGAIN_S) -> None:
        self.dropped = 0  # keys whose objects stay until their bucket's own rule removes them
        self._pause_s = pause_s
        self._queue: deque[Removal] = deque()
        self._digests = 0
        self._until_s = 0.0
        self._closed = False
        self._changed = threading.Condition()

    def add(self, removal: Removal) -> bool:
        """One more; False: too many wait. What was dropped is not read any more: that its objects stay is untidy.

        Clearing comes once a namespace, and always in: nothing of it is read before it is done.
        """
        with self._changed:
            if removal.digests:
                if self._digests + len(removal.digests) > DIGESTS:
                    self.dropped += len(removal.digests)
                    return False
            elif removal in self._queue:
                return True
            self._digests += len(removal.digests)
            self._queue.append(removal)
            self._changed.notify_all()
            return True

    def again(self, removal: Removal) -> None:
        """The far side did not do it: behind the others, and none of them for a while."""
        with self._changed:
            self._until_s = time.monotonic() + self._pause_s
        self.add(removal)

    def next(self) -> Removal | None:
        """Wait for one; None: it is over."""
        with self._changed:
            while not self._closed:
                wait_s = self._until_s - time.monotonic()
                if self._queue and wait_s <= 0:
                    removal = self._queue.popleft()
                    self._digests -= len(removal.digests)
                    return removal
                self._changed.wait(wait_s if self._queue else None)
            return None

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Epochs:
    """How often something of a namespace was dropped: whoever writes some of it looks before and after."""

    def __init__(self) -> None:
        self._dropped: dict[str, int] = {}
        self._age = 0  # how often that was forgotten

    def __len__(self) -> int:
        return len(self._dropped)

    def dropped(self, prefix: str) -> None:
        """Once more. Owner thread; waits for nobody."""
        self._dropped[prefix] = self._dropped.get(prefix, 0) + 1
        if len(self._dropped) > EPOCHS:
            self._age += 1  # before they are gone: see `of`
            self._dropped.clear()

    def of(self, prefix: str) -> tuple[int, int]:
        """Another one than before: something was dropped meanwhile. Any thread."""
        return self._dropped.get(prefix, 0), self._age  # in this order: who finds nothing finds a new age


def holding(names: Iterable[str], prefix: str, digests: Sequence[bytes]) -> list[str]:
    """Objects that hold a key of these digests, as far as names tell: one pass, however many they are."""
    firsts, wanted = {digest.hex() for digest in digests}, {mark_of(digest) for digest in digests}
    found = []
    for name in names:
        folder = name[: name.rfind("/") + 1]
        marks = marks_in(name, folder) or ()
        if folder[len(prefix) : -1] in firsts or not wanted.isdisjoint(marks):
            found.append(name)
    return found
