"""What this host has written to the far side, and what must not come back from there: in a file, over restarts.

    + BYTES NAME    written           x PREFIX DIGEST    a key that was deleted
    - NAME          removed           c PREFIX           a namespace that is being cleared; d PREFIX: that is done

An object is noted before it is written, so that none is left over there that nobody knows of. Lines are appended,
and the whole is written anew when most of them are over. It is a note, not a truth: without it the objects stay where
they are until the bucket's own rule removes them. One thread at a time (its user locks).
"""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvstore.tier.remote_format import FORMAT_VERSION
from kvstored.remote_port import NAME_BYTES

log = logging.getLogger(__name__)

FILE: Final = "remote-ledger"
OBJECTS: Final = 1 << 20  # remembered at most; about 600 bytes each
DELETED: Final = 1 << 16  # keys, of all tenants together
LINE_BYTES: Final = NAME_BYTES + 64
LINES: Final = 3 * (OBJECTS + DELETED)  # of a file: more than it is ever let have
SLACK: Final = 4096  # lines that are over, at the least, before the file is written anew

_PREFIX: Final = f"v{FORMAT_VERSION}/[0-9a-f]{{32}}/[0-9a-f]{{32}}/"
_NAME: Final = f"{_PREFIX}[0-9a-f]{{40}}/[0-9]{{1,2}}z?[.][A-Za-z0-9_-]{{0,256}}"
# Whatever a flipped bit makes of a line, it is one of these or none.
_LINE: Final = re.compile(
    f"(?P<add>[+]) (?P<bytes>[0-9]{{1,15}}) (?P<added>{_NAME})|(?P<take>-) (?P<taken>{_NAME})"
    f"|(?P<note>x) (?P<of>{_PREFIX}) (?P<digest>[0-9a-f]{{2,64}})|(?P<mark>[cd]) (?P<prefix>{_PREFIX})"
)


class Ledger:
    """Objects by name, the oldest first, with their bytes; and deleted keys."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: where its file lies; None: it is kept nowhere. Knows nothing before it is told to `read`."""
        self.total_bytes = 0
        self.faults = 0  # lines that could not be read, and writes that failed
        self._path = folder / FILE if folder is not None else None
        self._objects: OrderedDict[str, int] = OrderedDict()
        self._names: dict[str, dict[str, None]] = {}  # by the prefix of their namespace
        self._deleted: dict[str, OrderedDict[tuple[str, str], None]] = {}  # by tenant
        self._clearing: dict[str, int] = {}  # which clear is the last one
        self._clears = 0
        self._count = 0  # of deleted keys
        self._lines = 0
        self._torn = False  # the last line has no end: the next one must not go on with it

    def __len__(self) -> int:
        return len(self._objects)

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def wrote(self, name: str, object_bytes: int) -> None:
        """An object is there now, or is about to be."""
        self._add(name, object_bytes)
        self._append(f"+ {object_bytes} {name}")

    def removed(self, name: str) -> None:
        """An object is there no more."""
        if self._take(name):
            self._append(f"- {name}")

    def oldest(self) -> str | None:
        """What was written first."""
        return next(iter(self._objects), None)

    def below(self, prefix: str) -> list[str]:
        """Names of all objects of a namespace."""
        return list(self._names.get(prefix, ()))

    def delete_keys(self, prefix: str, digests: Sequence[bytes]) -> None:
        """Keys of a namespace: nothing of them is to come back."""
        for digest in digests:
            self._note(prefix, digest.hex())
        if digests:
            self._append(*(f"x {prefix} {digest.hex()}" for digest in digests))

    def is_deleted(self, prefix: str, digest: bytes) -> bool:
        """Was this key deleted?"""
        return (prefix, digest.hex()) in self._deleted.get(_tenant(prefix), ())

    def has_deleted(self, prefix: str) -> bool:
        """Is any key of the tenant whose namespace this is remembered as deleted?"""
        return bool(self._deleted.get(_tenant(prefix)))

    def _note(self, prefix: str, digest: str) -> None:
        """One above the bound costs the tenant who has most of them its oldest one."""
        of_tenant = self._deleted.setdefault(_tenant(prefix), OrderedDict())
        self._count -= len(of_tenant)
        of_tenant[prefix, digest] = None
        self._count += len(of_tenant)
        if self._count > DELETED:
            max(self._deleted.values(), key=len).popitem(last=False)
            self._count -= 1

    def begin_clear(self, prefix: str) -> None:
        """All of a namespace was dropped: nothing of it is to come back."""
        self._mark(prefix)
        self._append(f"c {prefix}")

    def _mark(self, prefix: str) -> None:
        self._clears += 1
        self._clearing[prefix] = self._clears

    def last_clear(self, prefix: str) -> int:
        """For `end_clear`, once all that is there now is gone."""
        return self._clearing.get(prefix, 0)

    def end_clear(self, prefix: str, clear: int) -> None:
        """Nothing of it is over there any more; if it was cleared once more meanwhile that one is still to be done."""
        if clear and self._clearing.get(prefix) == clear:
            del self._clearing[prefix]
            self._append(f"d {prefix}")

    def is_clearing(self, prefix: str) -> bool:
        """Is there still to be removed what lies there?"""
        return prefix in self._clearing

    def clearing(self) -> list[str]:
        """Namespaces that are being cleared."""
        return list(self._clearing)

    @property
    def deleted(self) -> int:
        """How many keys are remembered as deleted."""
        return self._count

    def _add(self, name: str, object_bytes: int) -> None:
        self._take(name)
        self._objects[name] = object_bytes
        self._names.setdefault(_namespace(name), {})[name] = None
        self.total_bytes += object_bytes
        if len(self._objects) > OBJECTS:  # left to the bucket's own rule
            self._take(next(iter(self._objects)))

    def _take(self, name: str) -> bool:
        object_bytes = self._objects.pop(name, None)
        if object_bytes is None:
            return False
        self.total_bytes -= object_bytes
        prefix = _namespace(name)
        del self._names[prefix][name]
        if not self._names[prefix]:
            del self._names[prefix]
        return True

    # -- the file ------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """What former lives have noted; 0.5 s for 200,000 lines. Never raises: what cannot be read is not known."""
        if self._path is None:
            return
        try:
            with self._path.open(encoding="ascii", errors="replace", newline="\n") as file:
                while (line := file.readline(LINE_BYTES)) and self._lines < LINES:
                    self._torn = not line.endswith("\n")
                    if line != "\n":
                        self._lines += 1
                        self.faults += not self._take_line(line.removesuffix("\n"))
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("remote: what was written before is not known: %s", error.strerror)
            self.faults += 1
            return
        if self.faults:
            log.warning("remote: lines=%d of the ledger could not be read", self.faults)
        self._renew_if_due()

    def _take_line(self, line: str) -> bool:
        found = _LINE.fullmatch(line)
        if found is None:
            return False
        if found["add"]:
            self._add(found["added"], int(found["bytes"]))
        elif found["take"]:
            self._take(found["taken"])
        elif found["note"]:
            self._note(found["of"], found["digest"])
        elif found["mark"] == "c":
            self._mark(found["prefix"])
        else:
            self._clearing.pop(found["prefix"], None)
        return True

    def _append(self, *lines: str) -> None:
        if self._path is None:
            return
        content = "".join(f"{line}\n" for line in lines).encode("ascii")
        if self._torn:
            content = b"\n" + content
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._torn = os.write(descriptor, content) < len(content)
            finally:
                os.close(descriptor)
        except OSError:
            self.faults += 1
            return
        self.faults += self._torn
        self._lines += len(lines)
        self._renew_if_due()

    def _renew_if_due(self) -> None:
        alive = len(self._objects) + self._count
        if self._path is None or self._lines <= 2 * alive + SLACK:
            return
        beside = self._path.with_suffix(".new")
        lines = [f"+ {object_bytes} {name}" for name, object_bytes in self._objects.items()]
        lines += [f"c {prefix}" for prefix in self._clearing]
        lines += [f"x {prefix} {digest}" for one in self._deleted.values() for prefix, digest in one]
        try:
            with open(beside, "w", encoding="ascii", opener=_for_us_alone) as file:
                file.writelines(f"{line}\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
            self._torn = False
        except (OSError, ValueError):
            self.faults += 1
        self._lines = alive


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _namespace(name: str) -> str:
    """What names of all objects of its namespace begin with."""
    return name[: name.rfind("/", 0, name.rfind("/")) + 1]


def _tenant(prefix: str) -> str:
    """What prefixes of all namespaces of a tenant begin with."""
    return prefix.rsplit("/", 2)[0]
