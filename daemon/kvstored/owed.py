"""What is to be erased on a drive should it be seen again: a note beside it, in the folder of state.

    DELETE, and its drive refuses or is gone   -> noted here, synced -> answered
    a start that finds the segment again       -> header erased, or file removed, synced -> the note forgets it

By store, segment and slot (or `orders.WHOLE`). Where nobody knows which segments there are, by tenant: all that a start
finds of that tenant is removed, and the note forgets it once no directory is missing. Nothing is written to a place
before the note has forgotten it, and a number that is noted is given to no segment. The file is written anew each time,
sealed, and whole or not at all. With one that is damaged nothing is taken over from disk, since nobody knows then what
was deleted. One thread at a time notes, and the index child (`index_owed.py`) before that.
"""

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstore.tier.orders import EVERY
from kvstored.index_marks import DamagedError, unseal, write_sealed

VERSION: Final = 1
STORES: Final = 16  # remembered; of more the ones that were noted first are forgotten
PLACES: Final = 1 << 18  # of a store
TENANTS: Final = 1024  # of more: all
FILE_BYTES: Final = 64 << 20  # far above what that comes to

Places = set[tuple[int, int]]


@dataclass(slots=True)
class Owed:
    """All that is noted."""

    stores: dict[str, Places] = field(default_factory=dict)  # by store, in hexadecimal
    tenants: set[str] = field(default_factory=set)  # all of these, wherever it lies; an empty name: of everybody

    def of(self, store: bytes | None) -> Places:
        """What is noted of a store."""
        return self.stores.get((store or b"").hex(), set())

    def beyond(self, store: bytes | None) -> int:
        """The first number above all that are noted of a store."""
        return max((segment + 1 for segment, _ in self.of(store)), default=0)

    def is_whole(self, tenant: str) -> bool:
        """Is all of a tenant to go?"""
        return not self.tenants.isdisjoint({tenant, ""})


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
        return Owed(places, {str(tenant) for tenant in said.get("tenants", [])})
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not what was written ({error}): nobody knows what was deleted") from error


def note_owed(path: Path, store: bytes, places: Iterable[tuple[int, int]], tenant: str = "") -> None:
    """Durable when this returns. `tenant`: whose `EVERY` is, if that is among them. Raises DamagedError, OSError."""
    owed = read_owed(path)
    places = set(places)
    if EVERY in places:
        places.remove(EVERY)
        owed.tenants = {*owed.tenants, tenant} if len(owed.tenants) < TENANTS else {""}
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
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_sealed(path, json.dumps({f"version {VERSION}": listed, "tenants": sorted(owed.tenants)}).encode())
