"""What this host has written to the far side, and what must not come back from there: in a file, over restarts.

    + BYTES NAME    written, or used  x PREFIX DIGEST    a key that was deleted; r PREFIX DIGEST: and removed over there
    - NAME          removed           o PREFIX           a namespace of which more was deleted than can be noted: closed
    c BELOW         is being cleared: a namespace (PREFIX), a tenant (its prefix and *) or all (v1/*)
    d BELOW         that is done, so nothing below it is closed any more

An object is noted before it is written, so that none is left over there that nobody knows of; noted once more, since it
was used, it comes behind all others. Lines are appended, and the whole is written anew when most of them are over. It
is a note, not a truth: without it the objects stay where they are until the bucket's own rule removes them. What was
deleted and not removed is owed: where a key of that must be forgotten for others, its namespace is `overflowed`, and
the user closes it. One thread at a time (its user locks).
"""

import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from kvstore.tier.remote_format import ALL_PREFIX, FORMAT_VERSION
from kvstored.remote_port import NAME_BYTES

log = logging.getLogger(__name__)

FILE: Final = "remote-ledger"
OBJECTS: Final = 1 << 20  # remembered at most; about 700 bytes each
DELETED: Final = 1 << 16  # keys, of all tenants together
LINE_BYTES: Final = NAME_BYTES + 64
LINES: Final = 3 * (OBJECTS + DELETED)  # of a file: more than it is ever let have
SLACK: Final = 4096  # lines that are over, at the least, before the file is written anew
READ_AT_A_TIME: Final = 256  # lines, 1 ms, between two looks at what is to be noted meanwhile
USED_AGAIN_S: Final = 600  # a use within this time after the last one that was noted is not noted
WHOLE: Final = "*"  # behind what is no namespace's prefix: a line that was cut off never means more than it did

_NAMESPACE_SLASHES: Final = 3  # in the prefix of one
_PREFIX: Final = f"v{FORMAT_VERSION}/[0-9a-f]{{32}}/[0-9a-f]{{32}}/"
_NAME: Final = f"{_PREFIX}[0-9a-f]{{40}}/[0-9]{{1,2}}z?[.][A-Za-z0-9_-]{{0,256}}"
# Whatever a flipped bit makes of a line, it is one of these or none.
_LINE: Final = re.compile(
    f"(?P<add>[+]) (?P<bytes>[0-9]{{1,15}}) (?P<added>{_NAME})|(?P<take>-) (?P<taken>{_NAME})"
    f"|(?P<note>[xr]) (?P<of>{_PREFIX}) (?P<digest>[0-9a-f]{{2,64}})|(?P<close>o) (?P<closed>{_PREFIX})"
    f"|(?P<mark>[cd]) (?P<prefix>{_PREFIX}|v{FORMAT_VERSION}/([0-9a-f]{{32}}/)?[*])"
)


class Ledger:
    """Objects by name, that which was written or used the longest ago first, with their bytes; and deleted keys."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: where its file lies; None: it is kept nowhere. Knows nothing before it is told to `read`."""
        self.total_bytes = 0
        self.oldest_s = 0  # when the first of all objects was used; 0: in another life. Any thread
        self.uncounted = 0  # objects that are too many to remember: they lie there, and are not in the total
        self.faults = 0  # lines that could not be read, and writes that failed
        self._path = folder / FILE if folder is not None else None
        self._objects: OrderedDict[str, int] = OrderedDict()
        self._used_s: dict[str, int] = {}  # when they were written or used, in this life
        self._names: dict[str, dict[str, None]] = {}  # by the prefix of their namespace
        self._deleted: dict[str, OrderedDict[tuple[str, str], int]] = {}  # by tenant: when; 0: removed over there
        self._clearing: dict[str, int] = {}  # what lies below these: when the last clear was asked for
        self._closed: dict[str, int] = {}  # namespaces: when they were last closed
        self.when = 0  # number of the last thing that was dropped
        self._count = 0  # of deleted keys
        self.owed = 0  # of those: not removed yet
        self.unnoted = 0  # were owed, and are forgotten: their namespaces have overflowed
        self.overflowed: set[str] = set()  # and nobody has taken notice yet
        self._lines = 0
        self._torn = False  # the last line has no end: the next one must not go on with it

    def __len__(self) -> int:
        return len(self._objects)

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def wrote(self, name: str, object_bytes: int) -> None:
        """An object is there now, or is about to be."""
        self._add(name, object_bytes)
        self._use(name)
        self._append(f"+ {object_bytes} {name}")

    def used(self, names: Sequence[str], *, last: bool = False) -> None:
        """Those of these that are noted go behind all others, unless they did not long ago; `last`: even then."""
        now_s, lines = _now_s(), list[str]()
        for name in names:
            used_s = self._used_s.get(name)
            if name in self._objects and (last or used_s is None or now_s - used_s >= USED_AGAIN_S):
                self._use(name)
                lines.append(f"+ {self._objects[name]} {name}")
        if lines:
            self._append(*lines)

    def _use(self, name: str) -> None:
        self._objects.move_to_end(name)
        self._used_s[name] = _now_s()
        self._first()

    def _first(self) -> None:
        self.oldest_s = self._used_s.get(next(iter(self._objects), ""), 0)

    def removed(self, name: str) -> None:
        """An object is there no more."""
        if self._take(name):
            self._append(f"- {name}")

    def oldest(self) -> str | None:
        """What was written or used the longest ago."""
        return next(iter(self._objects), None)

    def below(self, prefix: str) -> list[str]:
        """Names of all objects of a namespace, or of whatever a prefix has."""
        if prefix in self._names or prefix.count("/") == _NAMESPACE_SLASHES:
            return list(self._names.get(prefix, ()))
        return [name for one, names in self._names.items() if one.startswith(prefix) for name in names]

    def namespaces(self) -> list[str]:
        """Prefixes of namespaces of which there are objects, or that are closed. Any thread."""
        return list(dict.fromkeys((*list(self._names), *list(self._closed))))

    def noted(self, prefixes: Sequence[str]) -> int:
        """Objects of so many namespaces, as far as the file is read. Any thread."""
        return sum(len(self._names.get(prefix, ())) for prefix in prefixes)

    def delete_keys(self, prefix: str, digests: Sequence[bytes]) -> int:
        """Keys of a namespace: nothing of them is to come back, and what there is of them is owed. Says when."""
        self.when += 1
        for digest in digests:
            self._note(prefix, digest.hex(), self.when)
        if digests:
            self._append(*_deletes(prefix, digests))
        return self.when

    def note_ahead(self, prefix: str, digests: Sequence[bytes]) -> None:
        """In the file alone, while that is being read, as `meanwhile` of that: what was dropped (no keys: all of it).

        It comes behind all that is there, where it will be read, and is noted as ever once it has been.
        """
        self._write("", *(_deletes(prefix, digests) if digests else [f"c {_below(prefix)}"]))

    def settle(self, prefix: str, digests: Sequence[bytes], when: int) -> None:
        """What was there of these keys is gone; those that were deleted once more since `when` are still owed."""
        done = [digest.hex() for digest in digests if self._settle(prefix, digest.hex(), when)]
        if done:
            self._append(*(f"r {prefix} {digest}" for digest in done))

    def _settle(self, prefix: str, digest: str, when: int) -> bool:
        of_tenant = self._deleted.get(_tenant(prefix), OrderedDict())
        if not 0 < of_tenant.get((prefix, digest), 0) <= when:
            return False
        of_tenant[prefix, digest] = 0
        self.owed -= 1
        return True

    def debts(self) -> dict[str, list[bytes]]:
        """Digests of keys that are owed, by namespace."""
        found: dict[str, list[bytes]] = {}
        for of_tenant in self._deleted.values():
            for (prefix, digest), when in of_tenant.items():
                if when:
                    found.setdefault(prefix, []).append(bytes.fromhex(digest))
        return found

    def is_deleted(self, prefix: str, digest: bytes) -> bool:
        """Was this key deleted?"""
        return (prefix, digest.hex()) in self._deleted.get(_tenant(prefix), ())

    def has_deleted(self, prefix: str) -> bool:
        """Is any key of the tenant whose namespace this is remembered as deleted?"""
        return bool(self._deleted.get(_tenant(prefix)))

    def _note(self, prefix: str, digest: str, when: int) -> None:
        """One above the bound costs the tenant who has most of them its oldest one."""
        of_tenant = self._deleted.setdefault(_tenant(prefix), OrderedDict())
        self._count -= len(of_tenant)
        self.owed += bool(when) - bool(of_tenant.get((prefix, digest), 0))
        of_tenant[prefix, digest] = when
        self._count += len(of_tenant)
        if self._count > DELETED:
            (gone, _), owed = max(self._deleted.values(), key=len).popitem(last=False)
            self._count -= 1
            if owed:
                self.owed -= 1
                self.unnoted += 1
                self.overflowed.add(gone)

    def close(self, prefix: str) -> bool:
        """Nobody knows all that was deleted of it: a namespace is closed until it is cleared. True: that is new."""
        self.when += 1
        new = prefix not in self._closed
        self._closed[prefix] = self.when
        if new:
            self._append(f"o {prefix}")
        return new

    def closed_namespaces(self) -> list[str]:
        """Those that are: prefixes."""
        return list(self._closed)

    @property
    def closed(self) -> int:
        """How many namespaces are."""
        return len(self._closed)

    def begin_clear(self, prefix: str) -> None:
        """All that lies below a prefix was dropped: nothing of it is to come back."""
        new = prefix not in self._clearing
        self._mark(prefix)
        if new:
            self._append(f"c {_below(prefix)}")

    def _mark(self, prefix: str) -> None:
        self.when += 1
        self._clearing[prefix] = self.when

    def last_clear(self, prefix: str) -> int:
        """For `end_clear`, once all that is there now is gone; 0: it is not being cleared."""
        return self._clearing.get(prefix, 0)

    def end_clear(self, prefix: str, clear: int, *, all_gone: bool = True) -> bool:
        """Nothing of it is over there any more; if it was cleared once more meanwhile that one is still to be done.

        `all_gone`: whoever wrote it, so that of keys that were deleted before nothing is owed. False: it is not over.
        """
        if not clear or self._clearing.get(prefix) != clear:
            return False
        for marks in (self._clearing, self._closed):
            for one in [one for one, when in marks.items() if when <= clear and one.startswith(prefix)]:
                del marks[one]
        left = [f"c {_below(one)}" for one in self._clearing if one.startswith(prefix)]
        left += [f"o {one}" for one in self._closed if one.startswith(prefix)]
        settled = [
            f"r {one} {digest}"
            for of_tenant in self._deleted.values()
            for one, digest in list(of_tenant)
            if all_gone and one.startswith(prefix) and self._settle(one, digest, clear)
        ]
        self._append(f"d {_below(prefix)}", *left, *settled)
        return True

    def is_clearing(self, prefix: str) -> bool:
        """Is a namespace closed, or is there still to be removed what lies there, or all of its tenant?"""
        if not (self._clearing or self._closed):
            return False
        return prefix in self._closed or any(one in self._clearing for one in _above(prefix))

    def clearing(self) -> list[str]:
        """What is being cleared: prefixes."""
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
            self.uncounted += 1

    def _take(self, name: str) -> bool:
        object_bytes = self._objects.pop(name, None)
        if object_bytes is None:
            return False
        self.total_bytes -= object_bytes
        self._used_s.pop(name, None)
        self._first()
        prefix = _namespace(name)
        del self._names[prefix][name]
        if not self._names[prefix]:
            del self._names[prefix]
        return True

    # -- the file ------------------------------------------------------------------------------------------------

    def read(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """What former lives have noted; 0.5 s for 200,000 lines. Never raises: what cannot be read is not known.

        `meanwhile` is called each millisecond, and may `note_ahead`.
        """
        if self._path is None:
            return
        try:
            with self._path.open(encoding="ascii", errors="replace", newline="\n") as file:
                while (line := file.readline(LINE_BYTES)) and self._lines < LINES:
                    if self._lines % READ_AT_A_TIME == 0:
                        meanwhile()
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
            self.when += 1
            self._note(found["of"], found["digest"], self.when if found["note"] == "x" else 0)
        elif found["close"]:
            self.when += 1
            self._closed[found["closed"]] = self.when
        else:
            self._take_mark(found["mark"], found["prefix"].removesuffix(WHOLE))
        return True

    def _take_mark(self, mark: str, prefix: str) -> None:
        if mark == "c":
            self._mark(prefix)
            return
        for marks in (self._clearing, self._closed):
            for one in [one for one in marks if one.startswith(prefix)]:
                del marks[one]

    def _append(self, *lines: str) -> None:
        if self._write(*lines):
            self.faults += self._torn
            self._lines += len(lines)
            self._renew_if_due()

    def _write(self, *lines: str) -> bool:
        if self._path is None:
            return False
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
            return False
        return True

    def _renew_if_due(self) -> None:
        alive = len(self._objects) + self._count
        if self._path is None or self._lines <= 2 * alive + SLACK:
            return
        beside = self._path.with_suffix(".new")
        lines = [f"+ {object_bytes} {name}" for name, object_bytes in self._objects.items()]
        lines += [f"c {_below(prefix)}" for prefix in self._clearing]
        lines += [f"o {prefix}" for prefix in self._closed]
        deleted = [one for of_tenant in self._deleted.values() for one in of_tenant.items()]
        lines += [f"{'x' if owed else 'r'} {prefix} {digest}" for (prefix, digest), owed in deleted]
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


def _now_s() -> int:
    return int(time.monotonic())


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _namespace(name: str) -> str:
    """What names of all objects of its namespace begin with."""
    return name[: name.rfind("/", 0, name.rfind("/")) + 1]


def _tenant(prefix: str) -> str:
    """What prefixes of all namespaces of a tenant begin with."""
    return prefix.rsplit("/", 2)[0]


def _above(prefix: str) -> Iterator[str]:
    """A namespace's prefix, its tenant's, and what all begin with."""
    yield from (prefix, f"{_tenant(prefix)}/", ALL_PREFIX)


def _below(prefix: str) -> str:
    """What stands for all below a prefix in the file."""
    return prefix if prefix.count("/") == _NAMESPACE_SLASHES else f"{prefix}{WHOLE}"


def _deletes(prefix: str, digests: Sequence[bytes]) -> list[str]:
    return [f"x {prefix} {digest.hex()}" for digest in digests]
