"""`token.sock`: whoever connects is sent a token, as the kernel says who that is (`kvproto/control_token.py`).

A thread of its own accepts, answers and hangs up; nothing is read, and nobody is waited for. Open to every user whom
the directory lets in, as the hot socket is: what a token allows is up to `admin_access.py`.
"""

import json
import logging
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Final

from kvproto.control_token import TOKEN_SOCKET, TOKEN_TTL_S
from kvproto.errors import RefusedError
from kvstored.admin_access import Access, TooManyTokensError
from kvstored.peer import peer_of

log = logging.getLogger(__name__)

BACKLOG: Final = 64
SEND_S: Final = 1.0  # the answer fits into any socket's buffer, so this is never waited for
RETRY_S: Final = 0.1  # where accept fails: out of descriptors, most likely
SO_PEERGROUPS: Final = 59  # Linux 4.13; Python has no name for it
_GROUPS_BYTES: Final = 1024  # the most that Python's getsockopt takes: 256 groups


class TokenSocket:
    """Serves `runtime_dir`/token.sock from `start` to `stop`, which belong to one thread."""

    def __init__(self, access: Access, runtime_dir: Path) -> None:
        self.path = runtime_dir / TOKEN_SOCKET
        self._access = access
        self._listener: socket.socket | None = None
        self._inode = 0
        self._thread = threading.Thread(target=self._serve, name="tokens", daemon=True)

    def start(self) -> None:
        """Serve. Raises OSError. What a dead daemon left behind under the name is replaced."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self.path.chmod(0o666)
        self._inode = self.path.stat().st_ino
        self._listener.listen(BACKLOG)
        self._thread.start()

    def stop(self, _grace_s: float = 0.0) -> None:
        """Hang up, and remove the socket. Idempotent; nobody is ever waited for."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join()
        listener.close()
        if self.path.exists() and self.path.stat().st_ino == self._inode:
            self.path.unlink()

    def _serve(self) -> None:
        listener = self._listener
        while listener is not None and self._listener is listener:
            try:
                accepted, _ = listener.accept()
            except OSError as error:
                if self._listener is listener:
                    log.warning("accept failed: %s", error)
                    time.sleep(RETRY_S)
                continue
            with accepted:
                self._answer(accepted)

    def _answer(self, accepted: socket.socket) -> None:
        try:
            accepted.settimeout(SEND_S)
            accepted.sendall(json.dumps(self._said(accepted)).encode() + b"\n")
        except OSError as error:  # they did not wait for it
            log.debug("no token sent: %s", error)

    def _said(self, accepted: socket.socket) -> dict[str, object]:
        try:
            peer = peer_of(accepted)
            os.close(peer.pidfd)
            token, caller = self._access.issue(peer.uid, peer.pid, groups_of(accepted, peer.gid))
        except (RefusedError, TooManyTokensError) as error:
            log.warning("token refused: %s", error)
            return {"refused": str(error)}
        return {
            "token": token, "expires_s": TOKEN_TTL_S, "uid": caller.uid, "acts": caller.acts,
            "tenants": list(caller.tenants),
        }  # fmt: skip


def groups_of(peer: socket.socket, gid: int) -> frozenset[int]:
    """Groups of a process, `gid` its own one. Of who is in more than 256, that one alone."""
    try:
        found = peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        return frozenset({gid})
    return frozenset({gid, *struct.unpack(f"={len(found) // 4}I", found)})
