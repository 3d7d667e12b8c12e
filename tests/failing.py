"""Daemons in which one system call fails, on whatever lies in their disk directory, whoever makes it: a drive's thread,
the index child, LMDB in there.

    test: a page of memory in a file    failing.c, preloaded into the daemon and its children: counts calls, fails one
          (which call, which errno)     and notes what it hit

They are forked off a prepared process, as those of `tests/prepared.py` are.
"""

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.harness import ROOT
from tests.prepared import Prepared, _become, _load, next_daemon

FAILS = "DAEMON_FAILS"  # the file with the page; failing.c knows the name
CALLS = (
    "open", "close", "read", "pread", "write", "pwrite", "fallocate", "truncate", "sync", "rename", "unlink", "mkdir",
    "stat", "statvfs", "list",
)  # fmt: skip
PAGE = struct.Struct(f"=5i{len(CALLS)}i2q256s256s")  # of failing.c
WIPE = 1  # 0: what was not synced is there all the same
SOON_NS = 2 * 10**8  # what was given up is tried again


@dataclass(frozen=True, slots=True)
class Fault:
    """The `nth` call of a kind in the life of a daemon fails."""

    call: str
    nth: int
    number: int

    def __str__(self) -> str:
        return f"{self.call}/{self.nth} of {os.strerror(self.number)}"


@dataclass(frozen=True, slots=True)
class Hit:
    """The call that failed, on what."""

    path: Path
    offset: int
    end: int


class Page:
    """What a daemon and its children share with the test. Planted anew for each life."""

    def __init__(self, file: Path, folder: Path) -> None:
        self._file, self._folder = file, folder

    def plant(self, fault: Fault | None) -> None:
        """For the life that begins."""
        first = (CALLS.index(fault.call), fault.nth, fault.number) if fault else (-1, 0, 0)
        folder = str(self._folder).encode()
        new = self._file.with_suffix(".new")  # who dies slowly has the former one
        new.write_bytes(PAGE.pack(*first, WIPE, 0, *[0] * len(CALLS), 0, 0, folder, b""))
        new.replace(self._file)

    def counts(self) -> dict[str, int]:
        """Calls in this life."""
        return dict(zip(CALLS, self._fields()[5:], strict=False))

    def hit(self) -> Hit | None:
        """What failed in this life."""
        words = PAGE.unpack(self._file.read_bytes())
        if not words[4]:
            return None
        offset, size = words[5 + len(CALLS) : 7 + len(CALLS)]
        return Hit(Path(words[-1].rstrip(b"\0").decode()), offset, offset + size)

    def _fields(self) -> list[int]:
        return [int(word) for word in PAGE.unpack(self._file.read_bytes())[: 5 + len(CALLS)]]


def has_compiler() -> bool:
    """Can failing.c be used here?"""
    return shutil.which("gcc") is not None


class Failing(Prepared):
    """The prepared process of such daemons. Without `FAILS` in the environment one lives as ever."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where the library may lie. Raises CalledProcessError."""
        super().__init__()
        self.library = folder / "failing.so"
        source = str(ROOT / "tests" / "failing.c")
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(self.library), source], check=True
        )

    def _begin(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                line = [sys.executable, "-m", "tests.failing", str(theirs.fileno())]
                environ = {name: value for name, value in os.environ.items() if name != FAILS}
                environ["LD_PRELOAD"] = str(self.library)
                self._process = subprocess.Popen(line, cwd=ROOT, pass_fds=(theirs.fileno(),), env=environ)
        return self._channel


# -- in the daemon -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Prepare, then be a daemon in every fork, in which a call may fail."""
    library = os.environ["LD_PRELOAD"]
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        _load()
        wanted = next_daemon(channel)
    _become(wanted)
    if FAILS in os.environ:
        from kvstore.tier import segments
        from kvstored import drive_health

        drive_health.PROBE_NS = segments.REFUSED_NS = SOON_NS  # type: ignore[misc]
        os.environ["LD_PRELOAD"] = library  # for the index child, which is executed
        ctypes.CDLL(library).failing_begin(os.environ[FAILS].encode())
    from kvstored.entry import main as run  # as the console script does

    return run()


if __name__ == "__main__":
    sys.exit(main())
