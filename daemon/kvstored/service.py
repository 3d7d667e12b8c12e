"""The daemon as a service: what its manager gave it at start, what the manager hears while it serves, and its end.

    given   NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS: the hot socket (FDNAME hot) beside what the store kept
    start   STATUS=...                              READY=1
    serve   STATUS=..., WATCHDOG=1 by the owner's loop; a loop that hangs says nothing, and is killed and restarted
    stop    STOPPING=1 EXTEND_TIMEOUT_USEC=n        nothing new begins, what has begun is finished, for a while

Owner thread, or before there is one; light, since it is asked before anything is loaded.
"""

import os
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstored.notify import NUMBER, Notifier, inherited, notifier_of
from kvstored.units import ConfigError

HOT_SOCKET: Final = "hot.sock"  # in the runtime directory
HOT_NAMES: Final = ("hot", "kvstored.socket")  # FileDescriptorName= of kvstored.socket, and its default
BACKLOG: Final = 128  # connections that wait to be accepted
BEATS: Final = 3  # in the time after which a manager that hears none kills us
STATUS_NS: Final = 10 * 10**9
LINGER_S: Final = 60.0  # from the end of a drain to the exit: a commit that hangs is waited for, 40 s (workers.py)


@dataclass(slots=True)
class Service:
    """What the manager gave us. Without one: nothing, and nobody hears anything."""

    notifier: Notifier = field(default_factory=lambda: Notifier(""))
    kept: list[tuple[str, int]] = field(default_factory=list)  # of its descriptor store; the caller's
    listener: socket.socket | None = None  # the hot socket, which outlives us
    watchdog_ns: int = 0  # 0: there is none


def service_of(environ: MutableMapping[str, str], pid: int, hot_path: Path) -> Service:
    """Take what a manager has left for this process. Raises ConfigError for a socket that is of no use."""
    kept = inherited(environ, pid)
    service = Service(notifier_of(environ), kept, watchdog_ns=_watchdog_ns(environ, pid))
    for name, fd in [one for one in kept if one[0] in HOT_NAMES and one[1] >= 0]:
        kept.remove((name, fd))
        if service.listener is not None:
            raise ConfigError(f"two sockets are called {' or '.join(HOT_NAMES)}: one unit only")
        service.listener = _hot_socket(name, fd, hot_path)
    return service


def _hot_socket(name: str, fd: int, path: Path) -> socket.socket:
    """The passed socket, if it listens where clients will look. Raises ConfigError."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"the descriptor called {name} is not a socket: {error.strerror}") from None
    unfit = _why_unfit(listener, path)
    if unfit:
        listener.close()
        raise ConfigError(f"the socket called {name} {unfit}")
    listener.setblocking(False)
    return listener


def _why_unfit(listener: socket.socket, path: Path) -> str:
    """Empty if it listens there, as a hot socket does."""
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET) or not listens:
        return "is not a Unix one that listens for sequential packets"
    given = os.fsdecode(listener.getsockname())
    if os.path.realpath(given) != os.path.realpath(path):
        return f"listens at {given}, and clients look at {path}: daemon.runtime_dir"
    return ""


def listen(path: Path, passed: socket.socket | None) -> socket.socket:
    """The hot socket, serving from now on: the passed one, or a new one in place of what lies there."""
    if passed is None:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(str(path))
        path.chmod(0o666)
    else:
        listener = passed
    listener.listen(BACKLOG)  # of a passed one too: clients are told the credentials of who listened last
    return listener


def _watchdog_ns(environ: Mapping[str, str], pid: int) -> int:
    """After how long a silence the manager kills us; 0: never, or it means another process."""
    period, whom = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(pid))
    if whom != str(pid) or not NUMBER.fullmatch(period):
        return 0
    return int(period) * 1000


class Pulse:
    """`beat` at every turn of the owner's loop: the watchdog is fed, and once in a while says how it stands."""

    def __init__(self, service: Service, status: Callable[[], str]) -> None:
        self._notifier = service.notifier
        self._status = status
        self._said = ""
        self._watched = bool(service.watchdog_ns)
        self._every_ns = service.watchdog_ns // BEATS or STATUS_NS
        self._status_ns = 0
        self.due_ns = 0  # when `beat` has something to do
        if not self._notifier.present:
            self.due_ns = 1 << 62

    def beat(self, now_ns: int) -> None:
        """Call when `due_ns` has come."""
        self.due_ns = now_ns + min(self._every_ns, STATUS_NS)
        if self._watched:
            self._notifier.alive()
        if now_ns >= self._status_ns:
            self._status_ns = now_ns + STATUS_NS
            self.say(self._status())

    def say(self, text: str) -> None:
        """One line for `systemctl status`, unless it says so already."""
        if text != self._said:
            self._said = text
            self._notifier.status(text)
