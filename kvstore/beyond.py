"""Blocks that are known to lie beyond this host, as far as others are told of them. Owner thread.

    written over there, found there, come from there --> `note` --\\
    deleted, or its object is gone --> `withdraw`, `gone` --------> `take`: what is to be told now, a few at a time

What is over there outlives the rows of the table, so it has a table of its own. Nobody looks whether it is still true:
a host tells of what it has seen, and takes that back when it hears otherwise. Names of objects have digests of keys and
no keys (`tier/remote_format.py`), so when an object goes, what is taken back are the blocks whose marks it has: one in
262,144 wrongly, which costs a router a hit and nobody a byte. Of more than `BLOCKS` the oldest of the namespace that
has most are taken back. That it is gone may be heard before that it came there, so whoever brings the latter says since
when it may be so (`moment`).
"""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from kvstore.sessions import Namespace
from kvstore.tier.remote_format import Place, key_digest, mark_of, marks_of

BLOCKS: Final = 1 << 15  # about 500 bytes each
PART: Final = 512  # of those that were told: a slice is found without looking at all of them
MARKS: Final = 1024  # that were taken back lately, of one place
PLACES: Final = 64  # of which those are remembered


@dataclass(slots=True)
class _There:
    """One block."""

    mark: str
    serial: int = 0  # of when it was told; 0: it was not

    @property
    def told(self) -> bool:
        return self.serial > 0


@dataclass(slots=True, eq=False)
class _Space:
    """Of one namespace."""

    number: int
    place: Place
    there: OrderedDict[bytes, _There] = field(default_factory=OrderedDict)  # in the order in which they came
    wrong: set[bytes] = field(default_factory=set)  # that was told, and is so no more
    by_mark: dict[str, list[bytes]] = field(default_factory=dict)
    silent: bool = False  # one word has said that nothing of it is there
    again: int | None = None  # what was there at this moment is told anew


@dataclass(slots=True)
class _Past:
    """What was taken back of one place lately, and when."""

    before: int = 0  # whatever is older may have been taken back
    marks: OrderedDict[str, int] = field(default_factory=OrderedDict)


class Beyond:
    """All of one host."""

    def __init__(self, most: int = BLOCKS) -> None:
        self.blocks = 0  # that are there, as far as is known
        self.moment = 0  # grows with what is taken back
        self._most = most
        self._wrong = 0
        self._told = 0
        self._serial = 0
        self._spaces: dict[int, _Space] = {}
        self._by_prefix: dict[str, _Space] = {}
        self._leaving: deque[_Space] = deque()
        self._changed: OrderedDict[tuple[_Space, bytes], None] = OrderedDict()
        self._past: OrderedDict[str, _Past] = OrderedDict()  # by prefix
        self._order: dict[int, dict[int, tuple[_Space, bytes]]] = {}  # what was told, by serial, `PART` serials each
        self._until = 0  # what was told later is left out for who asks what is there
        self._before = 0  # as of a place, for those that nobody remembers

    # -- what is found out ---------------------------------------------------------------------------------------

    def note(self, namespace: Namespace, place: Place, keys: Iterable[bytes], since: int | None = None) -> None:
        """These are over there. Of what nobody can be told for long, some is left out.

        `since`: the moment at which whoever has seen them began to look; what was taken back later is left out.
        """
        self._see(namespace.number, place, keys, self.moment if since is None else since)

    def _see(self, number: int, place: Place, keys: Iterable[bytes], since: int) -> None:
        past = self._past.get(place.prefix, _Past())
        if max(past.before, self._before) > since:
            return
        space = self._spaces.get(number)
        if space is None or space.place != place:
            if space is not None:
                self.forget(number)
            space = self._spaces[number] = self._by_prefix[place.prefix] = _Space(number, place)
        for key in keys:
            if key in space.there or self._wrong >= self._most:
                continue
            mark = mark_of(key_digest(place, key))
            if past.marks.get(mark, 0) > since:
                continue
            one = space.there[key] = _There(mark)
            space.by_mark.setdefault(one.mark, []).append(key)
            self.blocks += 1
            if key in space.wrong:
                self._tell(space, key, one)
                self._put_right(space, key)
            else:
                self._changed[space, key] = None
        while self.blocks > self._most:
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
            space, marks = self._by_prefix.get(prefix), marks_of(name)
            if not marks:
                continue
            past = self._past_of(prefix)
            for mark in marks:
                past.marks[mark] = self.moment
                past.marks.move_to_end(mark)
                if space is not None:
                    for key in tuple(space.by_mark.get(mark, ())):
                        self._take_back(space, key)
            while len(past.marks) > MARKS:
                _, past.before = past.marks.popitem(last=False)

    def dropped(self, place: Place) -> None:
        """Some of a place was dropped: who began to look before does not know what is there."""
        past = self._past_of(place.prefix)
        past.before = self.moment

    def forget(self, number: int, *, said: bool = False) -> None:
        """All of a namespace is taken back, or (`said`) that has been said in one word already."""
        space = self._spaces.get(number)
        if space is not None:
            self._let_go(space)
        for one in self._leaving:
            if one.number == number:
                one.again, one.silent = None, one.silent or said

    def expel(self, number: int) -> list[bytes]:
        """All of a namespace is taken back, and its number goes to another one: what must be told of it now."""
        self.forget(number)
        spaces = [one for one in self._leaving if one.number == number and not one.silent]
        told = [key for one in spaces for key in (*one.wrong, *(key for key, two in one.there.items() if two.told))]
        self.forget(number, said=True)
        return told

    def tell_again(self, number: int) -> None:
        """One word has said that nothing of a namespace is there any more; what is there is told anew, by and by."""
        space = self._spaces.get(number)
        if space is not None:
            self._let_go(space)
            space.again = self.moment
        for one in self._leaving:
            one.silent |= one.number == number

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
                (space, key), _ = self._changed.popitem(last=False)
                if key in space.wrong:
                    self._put_right(space, key)
                    self._told -= 1
                    yield space.number, key, False
                elif key in space.there:
                    self._tell(space, key, space.there[key])
                    self._told += 1
                    yield space.number, key, True
            else:
                return

    def there(self, numbers: Collection[int], start: int, most: int) -> tuple[list[tuple[int, bytes]], int]:
        """What was told of these namespaces, as seen at the first of these questions (`start` 0 or 1), of at most so
        many blocks from `start` on, and where to go on; 0: that was all. What is told meanwhile is left out.
        """
        if start <= 1 or not self._until:
            self._until = self._serial + 1
        found: list[tuple[int, bytes]] = []
        wanted = set(numbers)
        for serial, space, key in islice(self._told_from(start), most):
            if serial >= self._until:
                break
            if space.number in wanted and self._spaces.get(space.number) is space:
                found.append((space.number, key))
            start = serial + 1
        following = next(self._told_from(start), None)
        if following is not None and following[0] < self._until:
            return found, start
        self._until = 0
        return found, 0

    # -- below ---------------------------------------------------------------------------------------------------

    def _told_from(self, start: int) -> Iterator[tuple[int, _Space, bytes]]:
        """What was told and not taken back, in the order in which it was told, from a serial on."""
        parts = list(self._order)
        for part in parts[bisect_left(parts, start // PART) :]:
            for serial, (space, key) in self._order[part].items():
                if serial >= start:
                    yield serial, space, key

    def _tell(self, space: _Space, key: bytes, one: _There) -> None:
        self._serial += 1
        one.serial = self._serial
        self._order.setdefault(one.serial // PART, {})[one.serial] = space, key

    def _untell(self, one: _There) -> None:
        if one.told:
            part = self._order[one.serial // PART]
            del part[one.serial]
            if not part:
                del self._order[one.serial // PART]

    def _take_back(self, space: _Space, key: bytes) -> None:
        one = space.there.pop(key, None)
        if one is None:
            return
        self.blocks -= 1
        self._untell(one)
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
        for key in tuple(islice(space.there, self.blocks - self._most)):
            self._take_back(space, key)

    def _let_go(self, space: _Space) -> None:
        del self._spaces[space.number]
        if self._by_prefix.get(space.place.prefix) is space:  # or it has another number by now
            del self._by_prefix[space.place.prefix]
        self.blocks -= len(space.there)
        self._leaving.append(space)

    def _past_of(self, prefix: str) -> _Past:
        """For what is taken back now."""
        self.moment += 1
        past = self._past.setdefault(prefix, _Past())
        self._past.move_to_end(prefix)
        if len(self._past) > PLACES:
            self._past.popitem(last=False)
            self._before = self.moment
        return past

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
            key, one = space.there.popitem(last=False)
            self._untell(one)
            if space.again is not None:
                self._see(space.number, space.place, [key], space.again)
            if not one.told:
                self._changed.pop((space, key), None)
                return None
        else:
            self._leaving.popleft()
            return None
        self._changed.pop((space, key), None)
        self._told -= 1
        return key
