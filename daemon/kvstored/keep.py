"""Who holds the daemon's memory while the daemon is away: systemd's descriptor store, our fd-keeper, or nobody.

    start:  notifier_of(environ)  ->  kept_descriptors(...)  ->  HostMemory.adopt  ...  notifier.notify("READY=1")

A keeper never blocks and never fails: what cannot be told right now waits in order (`pending`) for the next `flush`,
and what goes wrong for good becomes a line of `faults` and a colder restart. Owner thread throughout.
"""

import logging
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from kvstored import fd_keeper
from kvstored.lock import AlreadyRunningError
from kvstored.notify import BUSY, RETRY_S, Message, Notifier, Queue, SystemdKeeper, inherited, notifier_of

__all__ = [
    "FdKeeper", "Keeper", "NoKeeper", "Notifier", "SystemdKeeper", "RETRY_S",
    "arena_name", "arena_of", "kept_descriptors", "notifier_of", "table_name",
]  # fmt: skip

log = logging.getLogger(__name__)

TABLE_PREFIX: Final = "table-"
ARENA_PREFIX: Final = "arena-"
START_S: Final = 10.0  # a keeper process starts within 0.1 s on an idle host
ANSWER_S: Final = 5.0
EXIT_S: Final = 2.0  # a daemon that dies lets go of its lock a moment before it has exited
RESTART_S: Final = 1.0  # between two attempts to have a new keeper process, doubled with each that fails
RESTART_S_MAX: Final = 60.0
ALL: Final = fd_keeper.HELD_MAX  # as START of TAKE: asks whether anybody is there, and for no name
WITHOUT: Final = "memory does not survive a restart: no fd-keeper"

_ARENA: Final = re.compile(r"arena-([1-9][0-9]{0,9})", re.ASCII)
_TABLE: Final = re.compile(r"table-[A-Za-z0-9._-]{1,200}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)


def table_name(table: str) -> str:
    """Under which a table is kept."""
    return f"{TABLE_PREFIX}{table}"


def arena_name(arena: int) -> str:
    """Under which an arena is kept."""
    return f"{ARENA_PREFIX}{arena}"


def arena_of(name: str) -> int | None:
    """The arena that is kept under a name; None if it is not one of an arena."""
    match = _ARENA.fullmatch(name)
    return int(match[1]) if match else None


def is_ours(name: str) -> bool:
    """Is this a name that `HostMemory` gives?"""
    return _ARENA.fullmatch(name) is not None or _TABLE.fullmatch(name) is not None


class Keeper(Protocol):
    """Holds duplicates of descriptors for a successor."""

    faults: list[str]  # what status warns of

    @property
    def pending(self) -> int:
        """Messages that are still to be told. While there are any, `flush` wants to be called every RETRY_S."""

    def keep(self, name: str, fd: int) -> None:
        """Hold this descriptor; it replaces another one under that name. It stays open until `forget` or the end."""

    def forget(self, name: str) -> None:
        """Let go of what is held under that name, if anything is. The descriptor may be closed afterwards."""

    def flush(self, wait_s: float = 0.0) -> None:
        """Tell what is pending, for at most that long."""


class NoKeeper:
    """Nothing outlives this daemon."""

    pending = 0

    def __init__(self, fault: str = "") -> None:
        self.faults = [fault] if fault else []

    def keep(self, name: str, fd: int) -> None:
        """See `Keeper`."""

    def forget(self, name: str) -> None:
        """See `Keeper`."""

    def flush(self, wait_s: float = 0.0) -> None:
        """See `Keeper`."""


def kept_descriptors(
    runtime_dir: Path,
    environ: MutableMapping[str, str],
    notifier: Notifier,
    *,
    keep: bool,
    patience_s: float,
    passed: Sequence[tuple[str, int]] | None = None,
) -> tuple[dict[str, int], Keeper]:
    """What a predecessor left, the caller's now; and who keeps it for a successor. At start; may wait some seconds.

    The caller is the only daemon of `runtime_dir` and has raised its limit of descriptors. Never raises for want of a
    keeper: the daemon then serves without until there is one, and `faults` says so. `passed`: what the service manager
    kept, the callee's now; None: it is still to be taken out of `environ`, LISTEN_* and all.

    Raises AlreadyRunningError if the fd-keeper knows of a daemon that still lives.
    """
    passed = inherited(environ, os.getpid()) if passed is None else passed
    fdstore = environ.get("FDSTORE", "")  # systemd 254 and later: how many it would keep
    fds_max = int(fdstore) if _NUMBER.fullmatch(fdstore) else 0
    if notifier.present and (fds_max or passed or (keep and not fdstore)):
        _dismiss(runtime_dir)
        systemd = SystemdKeeper(notifier, [name for name, _ in passed], fds_max or fd_keeper.HELD_MAX)
        return _sorted_out(passed, systemd), systemd
    _close(fd for _, fd in passed)
    if not keep:
        _dismiss(runtime_dir)
        return {}, NoKeeper()
    process = FdKeeper(runtime_dir, patience_s)
    error: Exception | None = None
    for _ in range(2):
        try:
            return _sorted_out(process.take().items(), process), process
        except (OSError, subprocess.SubprocessError) as caught:
            log.warning("the fd-keeper gives nothing back: %s", caught)
            error = error or caught
            if not process.quit():  # or it would hold memory for us that we do not know of
                break  # it stands still: nor would it answer the second time
    process.go_without(f"{WITHOUT} ({error})")
    return {}, process


def _sorted_out(found: Iterable[tuple[str, int]], keeper: Keeper) -> dict[str, int]:
    """Those under our names. What is doubtful or nobody's is let go of, here and there."""
    ours: dict[str, int] = {}
    doubtful = set()
    for name, fd in found:
        if fd < 0 or name in ours or not is_ours(name):
            doubtful.add(name)
            _close([fd])
        else:
            ours[name] = fd
    for name in doubtful:
        _close([ours.pop(name, -1)])
        keeper.forget(name)
    if doubtful:
        log.warning("%d kept descriptors are of no use, such as %r", len(doubtful), min(doubtful))
    return ours


def _dismiss(runtime_dir: Path) -> None:
    """End a fd-keeper of an earlier configuration: what it holds would count twice."""
    keeper = FdKeeper(runtime_dir, 1.0)
    try:
        keeper.connect()
    except OSError:
        return  # there is none
    log.info("ending a fd-keeper that is not wanted any more")
    keeper.quit()


class FdKeeper:
    """The process of `kvstored.fd_keeper`. Should it die, a new one is started and told everything again.

    AWAY  --take----------------------------------------->  TOLD    the start
    AWAY  --a process listens-->  ASKED  --it answers---->  TOLD    ever less often, if that fails
    AWAY  <--it hangs up-------   ASKED, TOLD

    One that stands still leaves it at ASKED: whatever was said to it before it stood still, QUIT above all, it hears
    first, and then it hangs up.
    """

    def __init__(self, runtime_dir: Path, patience_s: float) -> None:
        self._path = runtime_dir / fd_keeper.SOCKET_NAME
        self._patience_s = patience_s
        self._connection: socket.socket | None = None
        self._starting: subprocess.Popen[bytes] | None = None
        self._told = False  # or: it is to be told everything, once it answers
        self._restart = 0.0  # when to try next, by the monotonic clock
        self._pause_s = RESTART_S  # and when after that
        self._eager = 0.0  # until when that may succeed at any moment
        self._kept: dict[str, int] = {}
        self._queue = Queue(self._send)
        self.faults = self._queue.faults

    @property
    def pending(self) -> int:
        """See `Keeper`."""
        return len(self._queue) if self._told else self._starting is not None or time.monotonic() < self._eager

    def connect(self) -> None:
        """To a process that is there. Raises OSError."""
        self._connection = _dial(self._path)

    def take(self) -> dict[str, int]:
        """Everything that is held, the caller's; starts the process if nobody answers. At start; may wait.

        Raises OSError or subprocess.SubprocessError if there is no keeper to be had, AlreadyRunningError if what it
        holds is a living daemon's.
        """
        deadline = time.monotonic() + EXIT_S
        while True:
            try:
                held = self._ask()
            except AlreadyRunningError:
                self.close()
                if time.monotonic() >= deadline:
                    raise
                select.select([], [], [], RETRY_S)
            else:
                break
        self._kept = dict(held)
        self._told = True
        self._tell(Message(f"PATIENCE {self._patience_s:f}"))
        return held

    def go_without(self, fault: str) -> None:
        """`take` has failed, and the daemon has nothing from before: `flush` tries to have a process from now on."""
        self._queue.fault(fault)
        self._try_again()

    def _ask(self) -> dict[str, int]:
        """`take`, once."""
        try:
            self.connect()
        except (FileNotFoundError, ConnectionRefusedError):
            self._start()
            self.connect()
        assert self._connection is not None
        self._connection.settimeout(ANSWER_S)
        held = _take(self._connection)
        self._connection.settimeout(0)
        return held

    def keep(self, name: str, fd: int) -> None:
        """See `Keeper`."""
        assert fd_keeper.NAME.fullmatch(name), f"not a name to keep anything under: {name!r}"
        self._queue.cancel(lambda message: message.name == name)
        self._kept[name] = fd
        self._tell(Message(f"KEEP {name}", name, fd))

    def forget(self, name: str) -> None:
        """See `Keeper`."""
        if self._kept.pop(name, None) is not None:
            self._queue.cancel(lambda message: message.name == name)
            self._tell(Message(f"FORGET {name}"))

    def _tell(self, message: Message) -> None:
        """Unless it will be told everything anyhow."""
        if self._told:
            self._queue.put(message)

    def flush(self, wait_s: float = 0.0) -> None:
        """See `Keeper`. Call it now and then with nothing pending too: it notices that the process has died."""
        deadline = time.monotonic() + wait_s
        while True:
            self._hear()
            if self._connection is None:
                self._reconnect()
            self._queue.flush()
            if not self.pending or time.monotonic() >= deadline:
                return
            select.select([], [], [], RETRY_S)

    def quit(self) -> bool:
        """Have the process let go of everything and exit: no successor shall find anything. May wait some seconds.

        False if it has not done so yet; it will once it goes on.
        """
        self._kept.clear()
        if self._connection is not None:
            self._connection.settimeout(ANSWER_S)
            try:
                self._connection.send(b"QUIT")
                while self._connection.recv(fd_keeper.RECORD_BYTES):
                    pass
            except TimeoutError:
                log.warning("the fd-keeper stands still")
                self.close()
                return False
            except OSError as error:
                log.info("the fd-keeper may be gone: %s", error)
        self.close()
        return True

    def close(self) -> None:
        """Hang up. The process goes on."""
        self._told = False
        self._queue.cancel(lambda _: True)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, message: Message) -> bool:
        if self._connection is None:
            return False
        try:
            fd_keeper.send(self._connection, message.text.encode(), [message.fd] if message.fd >= 0 else [])
        except OSError as error:
            if error.errno not in BUSY:
                self._lost(error)
            return False
        return True

    def _hear(self) -> None:
        """What the process says: that it is there; that it refuses; or that it is gone."""
        while self._connection is not None:
            try:
                record, fds, _ = fd_keeper.receive(self._connection, 1, wait=False)
            except BlockingIOError:
                return
            except OSError as error:
                self._lost(error)
                return
            _close(fds)
            if not record:
                self._lost(ConnectionResetError("it has gone"))
            elif record.startswith(b"REFUSED "):
                self._queue.fault("the fd-keeper has no room for more descriptors: raise `ulimit -n`")
            elif record.startswith(b"HELD ") and not self._told:
                self._tell_all()

    def _lost(self, error: OSError) -> None:
        if self._told:
            self._queue.fault(f"lost the fd-keeper, starting another: {error}")
        self.close()
        self._eager = time.monotonic() + RESTART_S

    def _reconnect(self) -> None:
        """One step towards a process that knows it all, without waiting for any."""
        if self._starting is not None and self._starting.poll() is None:
            return
        spawned, self._starting = self._starting is not None, None
        if not spawned:
            if time.monotonic() < self._restart:
                return
            self._try_again()
        try:
            self.connect()
        except OSError:
            if not spawned:
                self._try_spawn()
        else:
            self._queue.put(Message(f"TAKE {ALL}"))

    def _try_again(self) -> None:
        """But not at once."""
        now = time.monotonic()
        self._restart, self._eager = now + self._pause_s, now + RESTART_S
        self._pause_s = min(2 * self._pause_s, RESTART_S_MAX)

    def _tell_all(self) -> None:
        """It answers."""
        self._told = True
        self._pause_s = RESTART_S
        self.faults[:] = [fault for fault in self.faults if not fault.startswith(WITHOUT)]
        self._tell(Message("CLEAR"))
        self._tell(Message(f"PATIENCE {self._patience_s:f}"))
        for name, fd in self._kept.items():
            self._tell(Message(f"KEEP {name}", name, fd))

    def _try_spawn(self) -> None:
        try:
            self._starting = self._spawn()
        except OSError as error:
            self._queue.fault(f"cannot start an fd-keeper: {error}")

    def _start(self) -> None:
        """Have a process, and wait until it listens. Raises OSError, subprocess.SubprocessError."""
        process = self._spawn()
        try:
            code = process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        if code:
            raise ChildProcessError(f"it does not start: exit code {code}")

    def _spawn(self) -> "subprocess.Popen[bytes]":
        """By path and without site-packages: it starts in 20 ms and stays small. It exits when the keeper listens."""
        module = str(Path(fd_keeper.__file__).absolute())
        command = [sys.executable, "-I", "-S", module, str(self._path.parent), "--patience", f"{self._patience_s:f}"]
        nothing = subprocess.DEVNULL
        return subprocess.Popen(  # noqa: S603
            command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True
        )


def _dial(path: Path) -> socket.socket:
    """A connection to a keeper of our own user. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        connection.connect(str(path))
        _, uid = fd_keeper.credentials(connection)
        if uid != os.geteuid():
            raise PermissionError(f"{path} is served by uid {uid}")
    except OSError:
        connection.close()
        raise
    return connection


def _take(connection: socket.socket) -> dict[str, int]:
    """All that the keeper holds. Raises OSError, AlreadyRunningError, and then has closed what came."""
    held: dict[str, int] = {}
    total = 1
    try:
        while len(held) < total:
            connection.send(b"TAKE %d" % len(held))
            record, fds, truncated = fd_keeper.receive(connection, fd_keeper.FDS_PER_RECORD, wait=True)
            words = record.decode("ascii", errors="replace").split(" ")
            if not fds:
                _check_unused(words)
            names = dict(zip(words[3:], fds, strict=False))
            if truncated or len(names) != len(fds) or len(words) != 3 + len(fds) or words[:1] != ["HELD"]:
                _close(fds)
                raise ConnectionError(f"{len(fds)} of {max(0, len(words) - 3)} descriptors came: `ulimit -n`?")
            total_word, start = words[1:3]
            progress = names or total_word == start == "0"
            if start != str(len(held)) or not _NUMBER.fullmatch(total_word) or names.keys() & held or not progress:
                _close(fds)
                raise ConnectionError("it does not answer what it was asked")
            held |= names
            total = int(total_word)
    except (OSError, AlreadyRunningError):
        _close(held.values())
        raise
    return held


def _check_unused(words: list[str]) -> None:
    """Raises AlreadyRunningError."""
    if words[0] == "SERVED" and len(words) == 2 and _NUMBER.fullmatch(words[1]):
        raise AlreadyRunningError(f"process {words[1]} still uses the memory that its fd-keeper holds")


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
