"""What is to be erased on a drive should it be seen again: a note beside it, in the folder of state.

    DELETE, and its drive refuses or is gone   -> noted here, synced -> answered
    a start that finds the segment again       -> header erased, or file removed, synced -> the note forgets it

By store, segment and slot (or `orders.WHOLE`). Of directories that a start could not look into nobody knows all that
lies there: what is deleted then is noted by tenant, and a start that sees more removes all of theirs that was hidden
(`Sight`), and forgets it of the directories that it has looked into. Nothing is written to a place before the note has
forgotten it, and a number that is noted is given to no segment. The file is written anew each time, sealed, and whole
or not at all. With one that is damaged nothing is taken over from disk, since nobody knows then what was deleted. One
thread at a time notes, and the index child (`index_owed.py`) before that.
"""

import errno
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Final

from kvstore.tier.orders import EVERY
from kvstored.index_marks import DamagedError, unseal, write_sealed

VERSION: Final = 1
STORES: Final = 16  # remembered; of more the ones that were noted first are forgotten
PLACES: Final = 1 << 18  # of a store
TENANTS: Final = 1024  # of more: all
FILE_BYTES: Final = 64 << 20  # far above what that comes to

Places = set[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Sight:
    """What a start has seen. Segments from `before` on are of that life or later; None: nobody knows the number."""

    looked: frozenset[str] = frozenset()  # directories that were looked into
    hidden: frozenset[str] = frozenset()  # those that were not, or not all of it
    before: int | None = None

    def hides(self, segment: int, directory: Path) -> bool:
        """Was a segment there that this start did not see?"""
        return str(directory) not in self.looked and (self.before is None or segment < self.before)

    def after(self, former: "Sight") -> "Sight":
        """Something is deleted now, and was in a former life: what of both is still hidden."""
        numbers = (self.before, former.before)
        before = None if None in numbers else max(number for number in numbers if number is not None)
        return Sight(self.looked, self.hidden | (former.hidden - self.looked), before)

    def seen(self, looked: Collection[Path], before: int) -> "Sight":
        """A later start has looked into these, and all that it sees of what was hidden there is gone."""
        paths = frozenset(map(str, looked))
        return Sight(self.looked | paths, self.hidden - paths, before if self.before is None else self.before)


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
        """The first number above all that are noted of a store."""
        return max((segment + 1 for segment, _ in self.of(store)), default=0)

    def is_whole(self, tenant: str, segment: int, directory: Path) -> bool:
        """Is all of a tenant's segment to go?"""
        sights = [self.tenants[name] for name in (tenant, "") if name in self.tenants]
        return any(sight.hides(segment, directory) for sight in sights)


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
        return Owed(places, {str(tenant): _sight(its) for tenant, its in said.get("tenants", {}).items()})
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not what was written ({error}): nobody knows what was deleted") from error


def _sight(said: Mapping[str, Any]) -> Sight:
    before = said["before"]
    looked, hidden = (frozenset(map(str, said[name])) for name in ("looked", "hidden"))
    return Sight(looked, hidden, None if before is None else int(before))


def note_owed(
    path: Path, store: bytes, places: Iterable[tuple[int, int]], tenant: str = "", sight: Sight = BLIND
) -> None:
    """Durable when this returns. Where `EVERY` is among them: all of `tenant` that is hidden from this life.

    Raises DamagedError, OSError.
    """
    owed = read_owed(path)
    places = set(places)
    if EVERY in places:
        places.remove(EVERY)
        if len(owed.tenants) >= TENANTS and tenant not in owed.tenants:
            tenant, sight = "", reduce(Sight.after, owed.tenants.values(), sight)
            owed.tenants.clear()
        former = owed.tenants.get(tenant)
        owed.tenants[tenant] = sight if former is None else sight.after(former)
    if places:
        owed.stores[store.hex()] = owed.stores.pop(store.hex(), set()) | places
        if len(owed.of(store)) > PLACES:
            raise OSError(errno.ENOSPC, f"more than {PLACES} places")
    while len(owed.stores) > STORES:
        del owed.stores[next(iter(owed.stores))]
    write_owed(path, owed)


def write_owed(path: Path, owed: Owed) -> None:
    """All of it, durable when this returns. Raises OSError."""
    listed = {name: sorted(its) for name, its in owed.stores.items() if its}
    tenants = {
        name: {"looked": sorted(its.looked), "hidden": sorted(its.hidden), "before": its.before}
        for name, its in owed.tenants.items()
        if its.hidden
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_sealed(path, json.dumps({f"version {VERSION}": listed, "tenants": tenants}).encode())


def note_seen(path: Path, looked: Collection[Path], next_segment: int) -> None:
    """A start has looked into these directories, and removed all that was noted there of tenants. Numbers of segments
    that are made from now on begin at `next_segment`. Durable when this returns. Raises DamagedError, OSError.
    """
    owed = read_owed(path)
    if owed.tenants:
        owed.tenants = {name: its.seen(looked, next_segment) for name, its in owed.tenants.items()}
        write_owed(path, owed)
