"""The index child: `python -m kvstored.index_child JSON`. It owns the index file for the whole life of the daemon.

    daemon -- Index thread -- socketpair -- child -- fork -- reader: scan, read or rebuild, LOADED, exit
                                              |
                                              +-- then: COMMIT -> one transaction -> DONE or REFUSED

LMDB kills a process whose file is damaged, so the daemon never opens it. The reader is a process of its own so that
what reading needs of memory, NumPy among it, ends with it; this one opens the index for a commit and closes it again.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import stat
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import lmdb

from kvstored import index_wire
from kvstored.index_file import DAMAGE, open_index
from kvstored.index_marks import FOLDER, DamagedError, mark_doubtful, write_next
from kvstored.index_wire import EXIT_DAMAGED, Change, Kind, Message

PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """The exit code says how it ended; 128 and more: the signal that killed the reader."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the daemon decides when it ends
    request: dict[str, Any] = json.loads(sys.argv[1])
    if not _die_with(request["parent"]):
        return 0
    link = socket.socket(fileno=request["fd"])
    directories = [Path(directory) for directory in request["directories"]]
    lock = -1
    try:
        lock = _lock(directories[0])
    except OSError as error:
        index_wire.send(link, Message(Kind.FAILED, error.errno or 0, text=str(error)))
        return 0
    code = _read(link, directories, request)
    if code == 0 and not request["look"]:
        code = _serve(link, directories[0], lock, request["map_bytes"])
    os.close(lock)
    return code


def _die_with(parent: int) -> bool:
    """Have the kernel end this process with the thread that made it; False if that is gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def _lock(directory: Path) -> int:
    """Wait for a child of a former daemon that hangs in its last commit. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _read(link: socket.socket, directories: list[Path], request: dict[str, Any]) -> int:
    me = os.getpid()
    reader = os.fork()
    if reader == 0:
        code = 1
        try:
            if _die_with(me):
                os.environ["OPENBLAS_NUM_THREADS"] = "1"
                from kvstored.index_reader import load  # noqa: PLC0415  NumPy stays out of this process

                owed = Path(request["owed"]) if request["owed"] else None
                absent = {Path(directory): why for directory, why in request["absent"].items()}
                load(link, directories, absent, request["rebuild"], request["map_bytes"], owed, look=request["look"])
                code = 0
        except BaseException:  # noqa: BLE001  whatever it was: it must not return into the parent's stack
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(reader, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _serve(link: socket.socket, directory: Path, directory_fd: int, map_bytes: int) -> int:
    highest = noted = 0  # number beyond all segments that came, and what the file beside the index says
    while (message := index_wire.receive(link)) is not None:
        assert message.kind is Kind.COMMIT
        try:
            _look_at_folder(directory, directory_fd)
            highest = max(highest, _commit(message, directory / FOLDER, map_bytes))
            noted = _note_next(directory, highest, noted)
            code, answer = 0, Message(Kind.DONE, message.first)
        except DAMAGE as error:
            mark_doubtful(directory)
            code, answer = EXIT_DAMAGED, Message(Kind.REFUSED, message.first, text=f"the index is damaged: {error}")
        except (lmdb.Error, OSError) as error:
            code, answer = 0, Message(Kind.REFUSED, message.first, text=str(error))
        finally:
            os.close(message.fd)
        try:
            index_wire.send(link, answer)
        except OSError:
            return 0  # nobody is left to hear it
        if code:
            return code
    return 0


def _note_next(directory: Path, highest: int, noted: int) -> int:
    """For a start that has lost the index. Returns what is noted now."""
    if highest > noted:
        with suppress(DamagedError, OSError):  # there is no room for the file: the index knows as long as it lives
            write_next(directory, highest, first=True)
            return highest
    return noted


def _look_at_folder(directory: Path, directory_fd: int) -> None:
    """Raises DamagedError if the index was taken away; OSError if all of the directory was: that may come back."""
    try:
        there = stat.S_ISDIR((directory / FOLDER).stat().st_mode)
    except FileNotFoundError:
        there = False
    if not there and os.path.samestat(directory.stat(), os.fstat(directory_fd)):
        raise DamagedError("its folder is gone")


def _commit(message: Message, folder: Path, map_bytes: int) -> int:
    """Returns a number beyond all segments that it brings."""
    change = Change.from_memfd(message.fd, message.second)
    # Opened each time: little beside a sync, and none of its pages stay in memory in between.
    with open_index(folder, map_bytes) as index:
        index.write(change)
        index.reserve()
    return change.next_segment


if __name__ == "__main__":
    sys.exit(main())
