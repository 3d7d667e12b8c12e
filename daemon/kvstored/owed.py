"""What is to be erased on a drive should it be seen again: a note beside it, in the folder of state.

    DELETE, and its drive refuses or is gone   -> noted here, synced -> answered
    a start that finds the segment again       -> header erased, or file removed, synced -> the note forgets it

By store, segment and slot (or `orders.WHOLE`). Nothing is written to such a place before the note has forgotten it, and
a number that is noted is given to no segment. The file is written anew each time, sealed, and whole or not at all. With
one that is damaged nothing is taken over from disk, since nobody knows then what was deleted. One thread at a time
notes, and the index child (`index_owed.py`) before that.
"""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from kvstored.index_marks import DamagedError, unseal, write_sealed

VERSION: Final = 1
STORES: Final = 16  # remembered; of more the ones that were noted first are forgotten
PLACES: Final = 1 << 18  # of a store
FILE_BYTES: Final = 64 << 20  # far above what that comes to

Places = set[tuple[int, int]]


def read_owed(path: Path) -> dict[str, Places]:
    """By store, in hexadecimal; nothing if there is no such file. Raises DamagedError, OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with os.fdopen(fd, "rb") as file:
        content = file.read(FILE_BYTES)
    try:
        said = json.loads(unseal(content))[f"version {VERSION}"]
        return {str(store): {(int(segment), int(slot)) for segment, slot in its} for store, its in said.items()}
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not what was written ({error}): nobody knows what was deleted") from error


def beyond(stores: Mapping[str, Places], store: bytes | None) -> int:
    """The first number above all that are noted of a store."""
    return max((segment + 1 for segment, _ in stores.get((store or b"").hex(), ())), default=0)


def note_owed(path: Path, store: bytes, places: Iterable[tuple[int, int]]) -> None:
    """Durable when this returns. Raises DamagedError, OSError."""
    stores = read_owed(path)
    stores[store.hex()] = stores.pop(store.hex(), set()).union(places)
    if len(stores[store.hex()]) > PLACES:
        raise OSError(errno.ENOSPC, f"more than {PLACES} places")
    while len(stores) > STORES:
        del stores[next(iter(stores))]
    write_owed(path, stores)


def write_owed(path: Path, stores: Mapping[str, Places]) -> None:
    """All of it, durable when this returns. Raises OSError."""
    listed = {name: sorted(its) for name, its in stores.items() if its}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_sealed(path, json.dumps({f"version {VERSION}": listed}).encode())
