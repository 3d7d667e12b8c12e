"""What is to be deleted over there, until that has worked: in turn, a pause after each failure, and bounded.

Removal   what was dropped: goes on where its last try has ended
Doubt     a write that may have landed, or may still, though nobody wants it any more: looked at once it is over

Clears, each for a while, and doubts, for which they wait, come first; then keys, a namespace at a time, those that came
meanwhile together.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

from kvstore.tier.remote_format import MARKS, mark_numbers, mark_of

DIGESTS: Final = 1 << 16  # that wait, 60 bytes each
TRY_AGAIN_S: Final = 2.0
LANDS_S: Final = 60.0  # after it has failed without an answer a write may still land
EPOCHS: Final = 4096  # namespaces; beyond, all count as dropped once
DROPPED: Final = 1 << 16  # keys that are remembered as dropped, 70 bytes each; beyond, all count as dropped once
LOOKED_AT: Final = 1024  # names at a time, 2 ms
RESTS: Final = 4  # times as long as that took, before the next ones: others want to compute, too
MARK_LETTERS: Final = len(mark_of(bytes(3)))
_LETTERS: Final = np.zeros(128, dtype=np.uint32)
_LETTERS[np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", dtype=np.uint8)] = range(64)

Epoch: TypeAlias = tuple[int, int]


@dataclass(slots=True)
class Removal:
    """Objects below a prefix that hold keys of these digests; none: all of them."""

    prefix: str
    digests: tuple[bytes, ...] = ()
    when: int = field(default=0, compare=False)  # for `Ledger.settle`; 0: nothing is owed
    done: int = field(default=0, compare=False)  # of the digests: nothing begins with them any more
    mine: deque[tuple[str, bool]] | None = field(default=None, compare=False)  # `holding`; None: nobody has looked


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
        self.dropped = 0  # keys that found no room
        self._pause_s = pause_s
        self._lands_s = lands_s
        self._first: deque[Removal | Doubt] = deque()  # clears and doubts
        self._later: deque[tuple[float, Doubt]] = deque()  # in order of time
        self._keys: OrderedDict[str, deque[Removal]] = OrderedDict()  # by namespace, in turn
        self._digests = 0  # of those
        self._until_s = 0.0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._keys.values()))

    def add(self, order: Removal | Doubt) -> bool:
        """One more; False: too many keys wait, and nobody will remove what holds these.

        Clearing comes once a namespace, and always in: nothing of it is read before it is done. So do doubts, whose
        number is bounded by who has them.
        """
        with self._changed:
            if isinstance(order, Removal) and self._digests + len(order.digests) > DIGESTS and order.digests:
                self.dropped += len(order.digests)
                return False
            self._put(order)
            return True

    def _put(self, order: Removal | Doubt) -> None:
        if isinstance(order, Removal) and order.digests:
            self._digests += len(order.digests)
            self._keys.setdefault(order.prefix, deque()).append(order)
        elif isinstance(order, Doubt) or order not in self._first:
            self._first.append(order)
        self._changed.notify_all()

    def add_later(self, doubt: Doubt) -> None:
        """One that is of use only when the write can land no more."""
        with self._changed:
            self._later.append((time.monotonic() + self._lands_s, doubt))
            self._changed.notify_all()

    def again(self, order: Removal | Doubt) -> None:
        """The far side did not do it: behind the others, and none of them for a while."""
        with self._changed:
            self._until_s = time.monotonic() + self._pause_s
            self._put(order)

    def goes_on(self, order: Removal) -> None:
        """Its turn is over, and it is not."""
        with self._changed:
            self._put(order)

    def forget(self, prefix: str, when: int) -> None:
        """Keys of a namespace that were deleted until then need not wait: all of it is cleared, or was."""
        with self._changed:
            for one in [one for one in self._keys if one.startswith(prefix)]:
                left = deque(order for order in self._keys[one] if order.when > when)
                self._digests -= sum(len(order.digests) for order in self._keys[one])
                self._digests += sum(len(order.digests) for order in left)
                if left:
                    self._keys[one] = left
                else:
                    del self._keys[one]

    def next(self) -> Removal | Doubt | None:
        """Wait for one; None: it is over."""
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                while self._later and self._later[0][0] <= now_s:
                    self._first.append(self._later.popleft()[1])
                waits = bool(self._first or self._keys)
                if waits and self._until_s <= now_s:
                    return self._first.popleft() if self._first else self._turn()
                due_s = self._until_s if waits else self._later[0][0] if self._later else None
                self._changed.wait(None if due_s is None else max(0.0, due_s - now_s))
            return None

    def _turn(self) -> Removal:
        prefix, waiting = self._keys.popitem(last=False)
        order = waiting.popleft()
        if order.mine is None and not order.done:  # who looks through all that this host has written looks for all
            fresh = [order, *(one for one in waiting if one.mine is None and not one.done)]
            waiting = deque(one for one in waiting if one.mine is not None or one.done)
            order = _joined(fresh) if len(fresh) > 1 else order
            self._digests -= sum(len(one.digests) for one in fresh)
        else:
            self._digests -= len(order.digests)
        if waiting:
            self._keys[prefix] = waiting  # last: others have their turn before
        return order

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
            self.all_dropped()

    def all_dropped(self) -> None:
        """All that is being written counts as dropped. Owner thread; waits for nobody."""
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


def _joined(orders: Sequence[Removal]) -> Removal:
    digests = dict.fromkeys(digest for order in orders for digest in order.digests)
    return Removal(orders[0].prefix, tuple(digests), max(order.when for order in orders))


def holding(names: Sequence[str], prefix: str, digests: Sequence[bytes]) -> list[tuple[str, bool]]:
    """Objects that may hold a key of these digests, as far as names tell, by name, and whether they are sure to.

    One pass, however many they are: 1 us a name, and pauses, so that it takes a fifth of a core.
    """
    firsts = {digest.hex() for digest in digests}
    wanted = np.zeros(MARKS, dtype=np.bool_)
    wanted[mark_numbers([mark_of(digest) for digest in digests])] = True
    found: list[tuple[str, bool]] = []
    for at in range(0, len(names), LOOKED_AT):
        began_s = time.monotonic()
        some = names[at : at + LOOKED_AT]
        sure = {name for name in some if name[len(prefix) : name.rfind("/")] in firsts}
        found += ((name, name in sure) for name in sure.union(some[row] for row in _marked(some, wanted)))
        if at + LOOKED_AT < len(names):
            time.sleep(RESTS * (time.monotonic() - began_s))
    return sorted(found)


def _marked(names: Sequence[str], wanted: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[int]:
    """Which of them have a mark that is wanted, behind their first block's."""
    tails = [name[name.rfind(".") + 1 :] for name in names]
    marks = [len(tail) // MARK_LETTERS for tail in tails]
    whole = "".join(tail[: MARK_LETTERS * count] for tail, count in zip(tails, marks, strict=True))
    letters = _LETTERS[np.frombuffer(whole.encode("ascii"), dtype=np.uint8)].reshape(-1, MARK_LETTERS)
    rows = np.repeat(np.arange(len(names)), marks)
    hits = wanted[letters[:, 0] << 12 | letters[:, 1] << 6 | letters[:, 2]]
    found: list[int] = np.unique(rows[hits]).tolist()
    return found
