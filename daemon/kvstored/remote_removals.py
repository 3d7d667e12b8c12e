"""What is to be deleted over there, until that has worked: in turn, a pause after each failure, and bounded.

Removal   what was dropped: goes on where its last try has ended
Doubt     a write that may have landed, or may still, though nobody wants it any more: looked at once it is over
"""

import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kvstore.tier.remote_format import mark_of

DIGESTS: Final = 1 << 16  # that wait, 60 bytes each
TRY_AGAIN_S: Final = 2.0
LANDS_S: Final = 60.0  # after it has failed without an answer a write may still land
EPOCHS: Final = 4096  # namespaces; beyond, all count as dropped once
DROPPED: Final = 1 << 16  # keys that are remembered as dropped, 70 bytes each; beyond, all count as dropped once
FEW: Final = 16  # marks that are looked for in names as they are
MARK_LETTERS: Final = len(mark_of(bytes(3)))

Epoch: TypeAlias = tuple[int, int]


@dataclass(slots=True)
class Removal:
    """Objects below a prefix that hold keys of these digests; none: all of them."""

    prefix: str
    digests: tuple[bytes, ...] = ()
    done: int = field(default=0, compare=False)  # of the digests: nothing begins with them any more
    after: str = field(default="", compare=False)  # of this host's objects, by name: looked at up to this one


@dataclass(frozen=True, slots=True, eq=False)
class Doubt:
    """An object that a write has left in doubt, and since when what was dropped counts."""

    prefix: str
    name: str
    object_bytes: int
    keys: tuple[bytes, ...]
    epoch: Epoch


class Removals:
    """The queue of them. Any thread."""

    def __init__(self, pause_s: float = TRY_AGAIN_S, lands_s: float = LANDS_S) -> None:
        self.dropped = 0  # keys whose objects stay until their bucket's own rule removes them
        self._pause_s = pause_s
        self._lands_s = lands_s
        self._queue: deque[Removal | Doubt] = deque()
        self._later: deque[tuple[float, Doubt]] = deque()  # in order of time
        self._digests = 0
        self._until_s = 0.0
        self._closed = False
        self._changed = threading.Condition()

    def add(self, order: Removal | Doubt) -> bool:
        """One more; False: too many wait. What was dropped is not read any more: that its objects stay is untidy.

        Clearing comes once a namespace, and always in: nothing of it is read before it is done. So do doubts, whose
        number is bounded by who has them.
        """
        with self._changed:
            if isinstance(order, Removal) and order.digests:
                if self._digests + len(order.digests) > DIGESTS:
                    self.dropped += len(order.digests)
                    return False
                self._digests += len(order.digests)
            elif isinstance(order, Removal) and order in self._queue:
                return True
            self._queue.append(order)
            self._changed.notify_all()
            return True

    def add_later(self, doubt: Doubt) -> None:
        """One that is of use only when the write can land no more."""
        with self._changed:
            self._later.append((time.monotonic() + self._lands_s, doubt))
            self._changed.notify_all()

    def again(self, order: Removal | Doubt) -> None:
        """The far side did not do it: behind the others, and none of them for a while."""
        with self._changed:
            self._until_s = time.monotonic() + self._pause_s
        self.add(order)

    def next(self) -> Removal | Doubt | None:
        """Wait for one; None: it is over."""
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                while self._later and self._later[0][0] <= now_s:
                    self._queue.append(self._later.popleft()[1])
                if self._queue and self._until_s <= now_s:
                    order = self._queue.popleft()
                    self._digests -= len(order.digests) if isinstance(order, Removal) else 0
                    return order
                due_s = self._until_s if self._queue else self._later[0][0] if self._later else None
                self._changed.wait(None if due_s is None else max(0.0, due_s - now_s))
            return None

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Epochs:
    """What of each namespace was dropped, in order: whoever writes some of it looks before and after."""

    def __init__(self) -> None:
        self._dropped: dict[str, list[tuple[bytes, ...]]] = {}  # keys of each time; none: all of it
        self._keys = 0
        self._age = 0  # how often all of that was forgotten

    def __len__(self) -> int:
        return len(self._dropped)

    def dropped(self, prefix: str, keys: tuple[bytes, ...]) -> None:
        """Once more. Owner thread; waits for nobody."""
        self._dropped.setdefault(prefix, []).append(keys)
        self._keys += 1 + len(keys)
        if len(self._dropped) > EPOCHS or self._keys > DROPPED:
            self._age += 1  # before they are gone: see `meet`
            self._dropped = {}
            self._keys = 0

    def of(self, prefix: str) -> Epoch:
        """What is dropped from now on is dropped since then. Owner thread."""
        return len(self._dropped.get(prefix, ())), self._age

    def meet(self, prefix: str, epoch: Epoch, keys: Sequence[bytes]) -> bool:
        """Was some of these dropped since? Any thread."""
        dropped = self._dropped.get(prefix, [])[epoch[0] :]
        if self._age != epoch[1]:  # looked at last: who finds nothing because all is forgotten finds a new age
            return True
        mine = frozenset(keys) if dropped else frozenset()
        return any(not one or not mine.isdisjoint(one) for one in dropped)


def holding(names: Iterable[str], prefix: str, digests: Sequence[bytes]) -> list[tuple[str, bool]]:
    """Objects that may hold a key of these digests, as far as names tell, by name, and whether they are sure to.

    One pass, however many they are.
    """
    firsts, wanted = {digest.hex() for digest in digests}, {mark_of(digest) for digest in digests}
    anywhere = re.compile("|".join(wanted if len(wanted) <= FEW else ())).search  # quicker than to take names apart
    found = []
    for name in names:
        sure = name[len(prefix) : name.rfind("/")] in firsts
        if sure or (anywhere(name) and not wanted.isdisjoint(_marks(name))):
            found.append((name, sure))
    return sorted(found)


def _marks(name: str) -> Iterator[str]:
    """Of one of our own."""
    return (name[at : at + MARK_LETTERS] for at in range(name.rfind(".") + 1, len(name), MARK_LETTERS))
