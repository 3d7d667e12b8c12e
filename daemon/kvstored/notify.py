"""The service manager: what it is told over NOTIFY_SOCKET, and the descriptors it keeps for us.

    us -> systemd   READY=1 | STOPPING=1 | STATUS=text | WATCHDOG=1 | EXTEND_TIMEOUT_USEC=n
                    FDSTORE=1\nFDNAME=name\nFDPOLL=0  + descriptor   held while the unit restarts, `kill -9` included
                    FDSTOREREMOVE=1\nFDNAME=name
    systemd -> us   LISTEN_PID=ours LISTEN_FDS=n LISTEN_FDNAMES=a:b:..., descriptors 3 to 2 + n, at the next start

Nothing here waits: a `Queue` keeps what the other end cannot take yet. Owner thread.
"""

import array
import errno
import logging
import os
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

from kvstored import fd_keeper

log = logging.getLogger(__name__)

QUEUE_MAX: Final = 2 * fd_keeper.HELD_MAX  # messages: forget and keep, for all that may be held
WATCHDOG: Final = "WATCHDOG=1"
RETRY_S: Final = 0.005  # while something is pending: a datagram queue of 10, 200 times a second
BUSY: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS, errno.ENOMEM})

_AWAY: Final = frozenset({errno.ECONNREFUSED, errno.ENOENT})  # the service manager is re-executing
_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_LISTEN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
NUMBER: Final = re.compile(r"[0-9]{1,12}", re.ASCII)  # of descriptors, of microseconds


@dataclass(frozen=True, slots=True)
class Message:
    """One datagram or record. `name` and `fd` are set if it hands a descriptor over."""

    text: str
    name: str = ""
    fd: int = -1


class Queue:
    """Messages in order, and a `send` that says False when the other end cannot take one now."""

    def __init__(self, send: Callable[[Message], bool]) -> None:
        self._send = send
        self._messages: deque[Message] = deque()
        self.faults: list[str] = []

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        """Last in the queue, and as much as possible of it is sent."""
        if len(self._messages) >= QUEUE_MAX:
            self.fault("the keeper of memory takes no messages: the next restart finds less than it could")
            return
        self._messages.append(message)
        self.flush()

    def cancel(self, unwanted: Callable[[Message], bool]) -> None:
        """Drop messages that have not been sent."""
        if any(map(unwanted, self._messages)):
            self._messages = deque(message for message in self._messages if not unwanted(message))

    def flush(self, wait_s: float = 0.0) -> None:
        """See `kvstored.keep.Keeper`."""
        deadline = time.monotonic() + wait_s
        while self._messages:
            if self._send(self._messages[0]):
                self._messages.popleft()
            elif time.monotonic() < deadline:
                select.select([], [], [], RETRY_S)
            else:
                return

    def fault(self, text: str) -> None:
        """Say it once."""
        if text not in self.faults and len(self.faults) < 16:
            self.faults.append(text)
            log.warning("%s", text)


class Notifier:
    """What the service manager is told, over NOTIFY_SOCKET. Without one, nothing is."""

    def __init__(self, address: str) -> None:
        """`address`: a path, `@` and an abstract name, or empty."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self.queue = Queue(self._send)
        if not address:
            return
        if address[0] not in "/@" or len(address.encode(errors="surrogateescape")) > 107:
            self._address = ""
            self.queue.fault(f"NOTIFY_SOCKET {address[:40]!r} is of a kind that cannot be used")
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    @property
    def present(self) -> bool:
        """Is there a service manager to tell anything?"""
        return self._socket is not None

    @property
    def pending(self) -> int:
        """See `kvstored.keep.Keeper`."""
        return len(self.queue)

    def notify(self, text: str) -> None:
        """`READY=1`, `STOPPING=1` and their like; after what is pending."""
        if self.present:
            self.queue.put(Message(text))

    def status(self, text: str) -> None:
        """One line for `systemctl status`; it takes the place of one that is still pending."""
        if self.present:
            self.queue.cancel(lambda message: message.text.startswith("STATUS="))
            self.notify("STATUS=" + text.replace("\n", " "))

    def alive(self) -> None:
        """`WATCHDOG=1`, at most one of which is pending: what a manager has not read yet says it as well."""
        if self.present:
            self.queue.cancel(lambda message: message.text == WATCHDOG)
            self.notify(WATCHDOG)

    def flush(self, wait_s: float = 0.0) -> None:
        """See `kvstored.keep.Keeper`."""
        self.queue.flush(wait_s)

    def close(self) -> None:
        """Give the socket back. Nothing can be told any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.queue.cancel(lambda _: True)

    def _send(self, message: Message) -> bool:
        assert self._socket is not None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [message.fd]))] if message.fd >= 0 else []
        try:
            self._socket.sendmsg([message.text.encode()], ancillary, socket.MSG_NOSIGNAL, self._address)
        except OSError as error:
            if error.errno in BUSY | _AWAY:
                return False
            self.queue.fault(f"the service manager cannot be told {message.text.splitlines()[0]}: {error}")
        return True


class SystemdKeeper:
    """systemd's descriptor store. It adds under a name that it knows already, so that one is removed first."""

    def __init__(self, notifier: Notifier, there: Iterable[str], fds_max: int = fd_keeper.HELD_MAX) -> None:
        """`there`: names that the store holds already; `fds_max`: of FileDescriptorStoreMax=."""
        self._notifier = notifier
        self._there = set(filter(fd_keeper.NAME.fullmatch, there))  # no other name fits into a message
        self._fds_max = fds_max
        self.faults = notifier.queue.faults

    @property
    def pending(self) -> int:
        """See `kvstored.keep.Keeper`."""
        return self._notifier.pending

    def keep(self, name: str, fd: int) -> None:
        """See `kvstored.keep.Keeper`."""
        assert fd_keeper.NAME.fullmatch(name), f"not a name to keep anything under: {name!r}"
        self.forget(name)
        if len(self._there) >= self._fds_max:
            self._notifier.queue.fault(f"FileDescriptorStoreMax={self._fds_max} is too few: a restart loses the rest")
            return
        self._there.add(name)
        # FDPOLL=0: systemd would otherwise drop a descriptor that reports an error or hang-up; memory never does.
        self._notifier.queue.put(Message(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", name, fd))

    def forget(self, name: str) -> None:
        """See `kvstored.keep.Keeper`."""
        if name in self._there:
            self._there.remove(name)
            self._notifier.queue.cancel(lambda message: message.name == name)
            self._notifier.queue.put(Message(f"FDSTOREREMOVE=1\nFDNAME={name}"))

    def flush(self, wait_s: float = 0.0) -> None:
        """See `kvstored.keep.Keeper`."""
        self._notifier.flush(wait_s)


def notifier_of(environ: Mapping[str, str]) -> Notifier:
    """The service manager that started us, or one that is told nothing."""
    return Notifier(environ.get("NOTIFY_SOCKET", ""))


def inherited(environ: MutableMapping[str, str], pid: int) -> list[tuple[str, int]]:
    """Names and descriptors that the service manager passed on, close-on-exec from now on; the caller's.

    Takes LISTEN_* out of `environ`. Where names and descriptors do not match, all are closed, and each name has -1.
    """
    given_pid, count, names, _ = (environ.pop(name, "") for name in _LISTEN)
    if given_pid != str(pid):  # meant for a process that started us, if for anybody
        return []
    if not NUMBER.fullmatch(count) or int(count) > 2 * fd_keeper.HELD_MAX:
        log.warning("LISTEN_FDS %r is not a number of descriptors", count[:40])
        return []
    fds = [fd for fd in range(_FIRST_FD, _FIRST_FD + int(count)) if _is_open(fd)]
    for fd in fds:
        os.set_inheritable(fd, False)
    parts = names.split(":") if names else []
    if len(parts) == len(fds) == int(count):
        return list(zip(parts, fds, strict=True))
    log.warning("%s descriptors were announced, %d came, with %d names: none is used", count, len(fds), len(parts))
    for fd in fds:
        os.close(fd)
    return [(name, -1) for name in parts]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
