"""Processes of clients that write into slots themselves: told from each other by number and start time, also by a
successor, and watched until they are gone. Owner thread.

Where /proc does not show other users' processes (hidepid=, ProtectProc=invisible of our own unit), the inode of a pidfd
stands in for the start time. Only there: a successor of an older version knows start times alone, takes any other one
for that of another process, and would give slots away that are still written to. Where it cannot look either, it waits.
"""

import errno
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvstore.sessions import Process
from kvstored.loop import READABLE, Loop
from kvstored.peer import Peer

_START: Final = 19  # field of /proc/PID/stat, counted from behind the name, which may hold anything
_BY_INODE: Final = 1 << 63  # marks a `start` that is an inode; 2^63 ticks are longer than any host is up


def process_of(peer: Peer) -> Process | None:
    """Who is at the other end of a socket; None if this host cannot tell: another pid namespace, gone already, or
    hidden by /proc before Linux 6.9.
    """
    if peer.pid <= 0:  # of another pid namespace: a successor could not look for it
        return None
    start = _start_of(peer.pid)
    if start is None:
        start = _inode_of(peer.pidfd)
    if start is None or _is_over(peer.pidfd):  # its number may be another's by now
        return None
    return Process(peer.pid, start, _pid_namespace())


def identity_of(peer: Peer) -> int:
    """The same for all sessions of a process, and for no other one that lives; below 0 where nobody can tell: one for
    all of a user's in other pid namespaces, before Linux 6.9. While its pidfd is open.
    """
    inode = _inode_of(peer.pidfd)
    if inode is not None:
        return inode
    return peer.pid if peer.pid > 0 else -1 - peer.uid


class HostProcesses:
    """`kvstore.ports.Processes` of a real host."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def watch(self, process: Process, gone: Callable[[], None]) -> bool:
        """See the port. Who cannot be looked for is taken to live for ever."""
        if process.space != _pid_namespace():
            return True
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            return error.errno != errno.ESRCH
        start = _inode_of(pidfd) if process.start & _BY_INODE else _start_of(process.pid)
        if start not in (process.start, None) or _is_over(pidfd):
            os.close(pidfd)
            return False

        def over(_events: int) -> None:
            self._loop.unwatch(pidfd)
            os.close(pidfd)
            gone()

        self._loop.watch(pidfd, READABLE, over)
        return True


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if nobody may know."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return int(stat[stat.rindex(b")") + 2 :].split()[_START])
    except (OSError, ValueError, IndexError):
        return None


def _inode_of(pidfd: int) -> int | None:
    """The inode of a process's pidfds, which no other process has since boot; None before Linux 6.9: one for all."""
    other = os.eventfd(0)
    try:
        anonymous = os.fstat(other).st_dev
    finally:
        os.close(other)
    state = os.fstat(pidfd)
    return None if state.st_dev == anonymous else state.st_ino | _BY_INODE


def _is_over(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _pid_namespace() -> int:
    """What numbers of processes mean here; 0 if nobody can say."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino & 0xFFFF_FFFF
    except OSError:
        return 0
