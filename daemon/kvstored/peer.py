"""Who is at the other end of a Unix socket, as the kernel says it."""

import os
import socket
import struct
from dataclasses import dataclass

from kvproto.errors import RefusedError

SO_PEERPIDFD = 77  # Linux 6.5; Python has no name for it yet
UNMAPPED_UID = 65534  # a user namespace without a mapping: this could be anybody
_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """Process and user of a client. `pidfd` becomes readable when the process has exited; the holder closes it."""

    pid: int
    uid: int
    gid: int
    pidfd: int

    @property
    def isolation(self) -> str:
        """Whether read-only descriptors bind this peer: not its own user, and not root."""
        return "accident only" if self.reads_all else "enforced"

    @property
    def reads_all(self) -> bool:
        """Root and the daemon's own user can read all memory anyway, so that they may be any tenant."""
        return self.uid in {0, os.geteuid()}


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel. Raises RefusedError for users that cannot be told apart or processes that are gone."""
    size = _CREDENTIALS.size
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid == UNMAPPED_UID:
        raise RefusedError(f"uid {uid} stands for every unmapped user of a user namespace; map the client's user")
    return Peer(pid, uid, gid, _pidfd(connection, pid))


def _pidfd(connection: socket.socket, pid: int) -> int:
    try:
        number = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return int.from_bytes(number, "little")
    except OSError:  # older kernel: a window in which the pid could be another's, and all there is
        try:
            return os.pidfd_open(pid)
        except OSError as error:
            raise RefusedError(f"process {pid} is gone or in another pid namespace: {error}") from error
