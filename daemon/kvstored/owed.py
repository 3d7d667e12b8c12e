"""What is to be erased on a drive should it be seen again: a note beside it, in the folder of state.

    DELETE, and its drive refuses or is gone   -> noted here, synced -> answered
    a start that finds the segment again       -> header erased, or file removed, synced -> the note forgets it

By store, segment and slot (or `orders.WHOLE`). Of more slots than there is room for, segments with the most of them are
noted as a whole: what else lies there goes with them, all of one tenant, since what was deleted must not come back. Of
directories that a start could not look into nobody knows all that lies there: what is deleted then is noted by tenant,
with the numbers of segments that were seen (`Sight`). A start removes all of theirs that was hidden, wherever it lies,
and forgets a directory once it has looked into all of it and has found something there that was hidden: an empty one
is another drive. One that never returns stays noted, which costs no more than its line.

Nothing is written to a place before the note has forgotten it, and a number that is noted, or lower than one of a
tenant, is given to no segment. The file is written anew each time, sealed, and whole or not at all. With one that is
damaged nothing is taken over from disk, since nobody knows then what was deleted. One thread at a time notes, and the
index child (`index_owed.py`) before that.
"""

import errno
import json
import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Final

from kvstore.tier.orders import EVERY, WHOLE
from kvstored.index_marks import DamagedError, unseal, write_sealed

VERSION: Final = 1
STORES: Final = 16  # remembered; of more the ones that were noted first are forgotten
PLACES: Final = 1 << 18  # of a store
TENANTS: Final = 1024  # of more: all
RUNS: Final = 1 << 18  # of numbers that were seen, of all tenants; of more, what the oldest have seen is not known
FILE_BYTES: Final = 256 << 20  # above what that comes to: 20 bytes a place or a run

Places = set[tuple[int, int]]
Runs = tuple[tuple[int, int], ...]  # of numbers: the first one, and the one after the last; in order


def runs_of(numbers: Iterable[int], more: Runs = ()) -> Runs:
    """The same numbers, and those of `more`."""
    runs: list[tuple[int, int]] = []
    for first, stop in sorted([*more, *((number, number + 1) for number in numbers)]):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((first, stop))
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a life has seen at its start. By number, which no two segments share: a drive may be mounted elsewhere when
    it returns.
    """

    seen: Runs = ()  # segments
    hidden: frozenset[str] = frozenset()  # directories that could not be looked into, or not into all of it
    before: int | None = None  # segments from here on are of that life or later; None: nobody knows the number

    def hides(self, segment: int) -> bool:
        """May a segment have been there that this life did not see?"""
        if self.before is not None and segment >= self.before:
            return False
        at = bisect_right(self.seen, segment, key=lambda run: run[0])
        return not at or segment >= self.seen[at - 1][1]

    def after(self, former: "Sight") -> "Sight":
        """Something is deleted now, and was in a former life: what of both is still hidden. What that one did not see
        and this one does has been removed by the start of this one.
        """
        numbers = (self.before, former.before)
        before = None if None in numbers else max(number for number in numbers if number is not None)
        return Sight(self.seen, self.hidden | former.hidden, before)

    def less(self, found: Mapping[str, Sequence[int]], whole: Collection[int]) -> "Sight":
        """A later start has looked into all of these directories, and has found these segments there, in order. Those
        that stay, not being in `whole`, count once: the drive may lie in the place of another one that was hidden, too.
        """
        held = [path for path in self.hidden if self._hides_any(found.get(path, ()))]
        if not held:
            return self
        numbers = [number for path in held for number in found[path] if number not in whole]
        return replace(self, seen=runs_of(numbers, self.seen), hidden=self.hidden.difference(held))

    def _hides_any(self, segments: Sequence[int]) -> bool:
        stop = len(segments) if self.before is None else bisect_left(segments, self.before)
        return any(map(self.hides, segments[:stop]))  # a thousand tenants ask, and most that lie there are later ones


BLIND: Final = Sight()


@dataclass(slots=True)
class Owed:
    """All that is noted."""

    stores: dict[str, Places] = field(default_factory=dict)  # by store, in hexadecimal
    tenants: dict[str, Sight] = field(default_factory=dict)  # all that was hidden of these; an empty name: of everybody

    def of(self, store: bytes | None) -> Places:
        """What is noted of a store."""
        return self.stores.get((store or b"").hex(), set())

    def beyond(self, store: bytes | None) -> int:
        """The first number above all that are noted of a store, or of tenants."""
        hidden = max((sight.before or 0 for sight in self.tenants.values()), default=0)
        return max([hidden, *(segment + 1 for segment, _ in self.of(store))])

    def is_whole(self, tenant: str, segment: int) -> bool:
        """Is all of a tenant's segment to go?"""
        return any(self.tenants[name].hides(segment) for name in (tenant, "") if name in self.tenants)


def read_owed(path: Path) -> Owed:
    """Nothing if there is no such file. Raises DamagedError, OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return Owed()
    with os.fdopen(fd, "rb") as file:
        content = file.read(FILE_BYTES)
    try:
        said = json.loads(unseal(content))
        stores = said[f"version {VERSION}"].items()
        places = {str(store): {(int(segment), int(slot)) for segment, slot in its} for store, its in stores}
        return Owed(places, _tenants(said.get("tenants", {}), said.get("seen", [])))
    except (DamagedError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not what was written ({error}): nobody knows what was deleted") from error


def _tenants(said: Any, seen: Sequence[Any]) -> dict[str, Sight]:
    if isinstance(said, list):  # of a version that noted nothing else: all that there is of these
        return {str(tenant): Sight(hidden=frozenset({""})) for tenant in said}
    runs = [tuple((int(first), int(stop)) for first, stop in its) for its in seen]
    return {
        str(tenant): Sight(
            runs[its["seen"]] if "seen" in its else (),  # a version that went by directory did not say
            frozenset(map(str, its["hidden"])),
            None if its["before"] is None else int(its["before"]),
        )
        for tenant, its in said.items()
    }


def note_owed(
    path: Path, store: bytes, places: Iterable[tuple[int, int]], tenant: str = "", sight: Sight = BLIND
) -> list[int]:
    """Durable when this returns. Where `EVERY` is among them: all of `tenant` that is hidden from this life.

    Returns segments that are noted as a whole from now on, since there is no room for all of their slots. Raises
    DamagedError, OSError: more than `PLACES` segments among others.
    """
    owed = read_owed(path)
    places = set(places)
    merged: list[int] = []
    if EVERY in places:
        places.remove(EVERY)
        if len(owed.tenants) >= TENANTS and tenant not in owed.tenants:
            tenant, sight = "", reduce(Sight.after, owed.tenants.values(), sight)
            owed.tenants.clear()
        former = owed.tenants.get(tenant)
        owed.tenants[tenant] = sight if former is None else sight.after(former)
    if places:
        owed.stores[store.hex()], merged = _fitted(owed.stores.pop(store.hex(), set()) | places)
    while len(owed.stores) > STORES:
        del owed.stores[next(iter(owed.stores))]
    write_owed(path, owed)
    return merged


def _fitted(places: Places) -> tuple[Places, list[int]]:
    """No more than there is room for, and segments of which that takes all. Raises OSError."""
    whole = {segment for segment, slot in places if slot == WHOLE}
    places = {(segment, slot) for segment, slot in places if slot == WHOLE or segment not in whole}
    excess = len(places) - PLACES
    merged: list[int] = []
    if excess > 0:  # those with the most: the fewest blocks are left there that nobody deleted
        for segment, slots in Counter(segment for segment, slot in places if slot != WHOLE).most_common():
            merged.append(segment)
            excess -= slots - 1
            if excess <= 0:
                break
        else:
            raise OSError(errno.ENOSPC, f"more than {PLACES} segments")
        gone = set(merged)
        places = {place for place in places if place[0] not in gone} | {(segment, WHOLE) for segment in merged}
    return places, merged


def write_owed(path: Path, owed: Owed) -> None:
    """All of it, durable when this returns. Raises OSError."""
    listed = {name: sorted(its) for name, its in owed.stores.items() if its}
    hiding = {name: sight for name, sight in owed.tenants.items() if sight.hidden}
    shared = {id(its.seen): its for its in hiding.values()}  # by most tenants, and it may be long
    seen = _kept(shared.values())
    at = {identity: seen.get(its.seen, 0) for identity, its in shared.items()}
    tenants = {
        # A version that goes by directory takes none for one that was looked into, and removes too much.
        name: {"looked": [], "hidden": sorted(its.hidden), "before": its.before, "seen": at[id(its.seen)]}
        for name, its in hiding.items()
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = {f"version {VERSION}": listed, "tenants": tenants, "seen": list(seen)}
    write_sealed(path, json.dumps(content).encode())


def _kept(sights: Iterable[Sight]) -> dict[Runs, int]:
    """What was seen, numbered, as far as there is room for the latest; 0 is nothing."""
    kept: dict[Runs, int] = {(): 0}
    room = RUNS
    for sight in sorted(sights, key=lambda sight: -(sight.before or 0)):
        if sight.seen not in kept and len(sight.seen) <= room:
            room -= len(sight.seen)
            kept[sight.seen] = len(kept)
    return kept


def note_life(path: Path, next_segment: int) -> None:
    """A life begins whose segments have numbers from `next_segment` on: they are hidden from nobody who deleted
    something before. Durable when this returns. Raises DamagedError, OSError.
    """
    owed = read_owed(path)
    if any(sight.before is None for sight in owed.tenants.values()):
        owed.tenants = {
            name: replace(sight, before=next_segment) if sight.before is None else sight
            for name, sight in owed.tenants.items()
        }
        write_owed(path, owed)
