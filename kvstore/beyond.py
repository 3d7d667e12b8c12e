"""Blocks that are known to lie beyond this host, as far as others are told of them. Owner thread.

    written over there, found there, come from there --> `note` --\\
    deleted, or its object is gone --> `withdraw`, `gone` --------> `take`: what is to be told now, a few at a time

What is over there outlives the rows of the table, so it has a table of its own. Nobody looks whether it is still true:
a host tells of what it has seen, and takes that back when it hears otherwise. Names of objects have digests of keys and
no keys (`tier/remote_format.py`), so when an object goes, what is taken back are the blocks whose marks it has: one in
262,144 wrongly, which costs a router a hit and nobody a byte. Of more than `BLOCKS` the oldest of the namespace that
has most are taken back.
"""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Final

from kvstore.sessions import Namespace
from kvstore.tier.remote_format import Place, key_digest, mark_of, marks_in

BLOCKS: Final = 1 << 15  # about 500 bytes each
_DIGEST: Final = re.compile(r"(?:[0-9a-f]{2})+")


@dataclass(slots=True)
class _There:
    """One block."""

    serial: int
    mark: str
    told: bool = False


@dataclass(slots=True, eq=False)
class _Space:
    """Of one namespace."""

    number: int
    place: Place
    there: dict[bytes, _There] = field(default_factory=dict)  # in the order in which they came
    wrong: set[bytes] = field(default_factory=set)  # that was told, and is so no more
    by_mark: dict[str, list[bytes]] = field(default_factory=dict)
    silent: bool = False  # one word has said that nothing of it is there


class Beyond:
    """All of one host."""

    def __init__(self, most: int = BLOCKS) -> None:
        self.blocks = 0  # that are there, as far as is known
        self._most = most
        self._wrong = 0
        self._told = 0
        self._serial = 0
        self._spaces: dict[int, _Space] = {}
        self._by_prefix: dict[str, _Space] = {}
        self._leaving: deque[_Space] = deque()
        self._changed: dict[tuple[_Space, bytes], None] = {}

    # -- what is found out ---------------------------------------------------------------------------------------

    def note(self, namespace: Namespace, place: Place, keys: Iterable[bytes]) -> None:
        """These are over there. Of what nobody can be told for long, some is left out."""
        space = self._spaces.get(namespace.number)
        if space is None or space.place != place:
            self.forget(namespace.number)
            space = self._spaces[namespace.number] = self._by_prefix[place.prefix] = _Space(namespace.number, place)
        for key in keys:
            if key in space.there or self._wrong >= self._most:
                continue
            self._serial += 1
            one = space.there[key] = _There(self._serial, mark_of(key_digest(place, key)), key in space.wrong)
            space.by_mark.setdefault(one.mark, []).append(key)
            self.blocks += 1
            if one.told:
                self._put_right(space, key)
            else:
                self._changed[space, key] = None
            if self.blocks > self._most:
                self._take_back_oldest()

    def withdraw(self, number: int, keys: Sequence[bytes]) -> None:
        """These are there no more, or are not read from there any more; no keys: all of a namespace."""
        space = self._spaces.get(number)
        if space is None:
            return
        if not keys:
            self.forget(number)
        for key in keys:
            self._take_back(space, key)

    def gone(self, names: Sequence[str]) -> None:
        """These objects are there no more."""
        for name in names:
            folder = name[: name.rfind("/") + 1]
            prefix = folder[: folder.rfind("/", 0, -1) + 1]
            space, marks = self._by_prefix.get(prefix), marks_in(name, folder)
            first = folder[len(prefix) : -1]
            if space is None or marks is None or _DIGEST.fullmatch(first) is None:  # some names the far side has said
                continue
            for mark in (mark_of(bytes.fromhex(first)), *marks):
                for key in tuple(space.by_mark.get(mark, ())):
                    self._take_back(space, key)

    def forget(self, number: int, *, said: bool = False) -> None:
        """All of a namespace is taken back, or (`said`) that has been said in one word already."""
        space = self._spaces.pop(number, None)
        if space is not None:
            self._by_prefix.pop(space.place.prefix, None)
            self.blocks -= len(space.there)
            self._leaving.append(space)
        if said:
            for one in self._leaving:
                one.silent |= one.number == number

    def expel(self, number: int) -> list[bytes]:
        """All of a namespace is taken back, and its number goes to another one: what must be told of it now."""
        self.forget(number)
        spaces = [one for one in self._leaving if one.number == number and not one.silent]
        told = [key for one in spaces for key in (*one.wrong, *(key for key, two in one.there.items() if two.told))]
        self.forget(number, said=True)
        return told

    def told_of(self, number: int) -> int:
        """At most so many blocks of a namespace are told."""
        left = [one for one in self._leaving if one.number == number and not one.silent]
        return sum(len(one.there) + len(one.wrong) for one in (*left, *filter(None, [self._spaces.get(number)])))

    # -- what is to be told --------------------------------------------------------------------------------------

    @property
    def told(self) -> bool:
        """Was anything told that was not taken back?"""
        return self._told > 0

    def is_told(self, number: int, key: bytes) -> bool:
        """Was it told that this block is over there, and not taken back yet?"""
        spaces = [one for one in self._leaving if one.number == number and not one.silent]
        if number in self._spaces:
            spaces.append(self._spaces[number])
        return any(key in one.wrong or (key in one.there and one.there[key].told) for one in spaces)

    def take(self, most: int) -> Iterator[tuple[int, bytes, bool]]:
        """What is to be told next, of at most so many: namespace, key, and whether it is over there now."""
        for _ in range(most):
            if self._leaving:
                space = self._leaving[0]
                told = self._leave(space)
                if told is not None and not space.silent:
                    yield space.number, told, False
            elif self._changed:
                space, key = next(iter(self._changed))
                del self._changed[space, key]
                if key in space.wrong:
                    self._put_right(space, key)
                    self._told -= 1
                    yield space.number, key, False
                elif key in space.there:
                    space.there[key].told = True
                    self._told += 1
                    yield space.number, key, True
            else:
                return

    def there(self, numbers: Collection[int], start: int, most: int) -> tuple[list[tuple[int, bytes]], int]:
        """What was told of these namespaces, at most so many from `start` on (at first 0), and where to go on; 0: that
        was all. What is told meanwhile comes later in this order.
        """
        found = (
            (one.serial, number, key)
            for number in numbers
            if number in self._spaces
            for key, one in self._spaces[number].there.items()
            if one.told and one.serial >= start
        )
        first = nsmallest(most, found)
        return [(number, key) for _, number, key in first], first[-1][0] + 1 if len(first) == most else 0

    # -- below ---------------------------------------------------------------------------------------------------

    def _take_back(self, space: _Space, key: bytes) -> None:
        one = space.there.pop(key, None)
        if one is None:
            return
        self.blocks -= 1
        same = space.by_mark[one.mark]
        same.remove(key)
        if not same:
            del space.by_mark[one.mark]
        if one.told:
            space.wrong.add(key)
            self._wrong += 1
            self._changed[space, key] = None
        else:
            self._changed.pop((space, key), None)

    def _take_back_oldest(self) -> None:
        space = max(self._spaces.values(), key=lambda one: len(one.there))
        self._take_back(space, next(iter(space.there)))

    def _put_right(self, space: _Space, key: bytes) -> None:
        space.wrong.discard(key)
        self._wrong -= 1
        self._changed.pop((space, key), None)

    def _leave(self, space: _Space) -> bytes | None:
        """Let go of one more block of a namespace that is taken back; its key if it was told."""
        if space.wrong:
            key = space.wrong.pop()
            self._wrong -= 1
        elif space.there:
            key, one = space.there.popitem()
            if not one.told:
                self._changed.pop((space, key), None)
                return None
        else:
            self._leaving.popleft()
            return None
        self._changed.pop((space, key), None)
        self._told -= 1
        return key
