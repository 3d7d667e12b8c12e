"""Who asks on the control socket: a token from the socket beside it, where the kernel says who connects.

gRPC does not tell a handler whose process is at the other end of a Unix socket. So whoever wants to act connects to
RUNTIME_DIR/token.sock first and is sent one line of JSON, then end of file:

    {"token": "...", "expires_s": 60.0, "uid": 1000, "acts": false, "tenants": ["chat"]}
    {"refused": "why"}

The token goes with each call as metadata, `kvstored-token`. It says who asks for as long as it is good; it is worth as
much as its owner's uid, so nobody writes it down.
"""

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "ANSWER_BYTES", "TOKEN_KEY", "TOKEN_SOCKET", "TOKEN_TTL_S", "ControlToken", "TokenRefusedError", "ask_token",
    "token_metadata",
]  # fmt: skip

TOKEN_SOCKET: Final = "token.sock"  # noqa: S105  a name, and no secret
TOKEN_KEY: Final = "kvstored-token"  # noqa: S105
TOKEN_TTL_S: Final = 60.0
AGAIN_S: Final = 0.001
ANSWER_BYTES: Final = 64 * 1024  # 64 tenants of 256 bytes each, escaped, are a quarter of it


class TokenRefusedError(Exception):
    """The daemon, or what answers in its place, gives us no token. Says why."""


@dataclass(frozen=True, slots=True)
class ControlToken:
    """What the daemon knows of this process. `acts`: it may change things; else it may see what its tenants have."""

    token: str
    expires_s: float  # from the answer on
    uid: int
    acts: bool
    tenants: tuple[str, ...]

    def __repr__(self) -> str:  # a token must not get into a log by way of an error
        return f"ControlToken(uid={self.uid}, acts={self.acts}, tenants={self.tenants})"


def ask_token(runtime_dir: Path, timeout_s: float) -> ControlToken | None:
    """A token for this process; None where the daemon has no such socket. Any thread.

    Raises TokenRefusedError, or OSError (TimeoutError too) if nobody answers.
    """
    deadline_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(timeout_s)
        try:
            _connect(peer, runtime_dir / TOKEN_SOCKET, deadline_s)
        except FileNotFoundError:
            return None
        answer = b""
        while len(answer) <= ANSWER_BYTES:
            peer.settimeout(max(1e-3, deadline_s - time.monotonic()))
            piece = peer.recv(ANSWER_BYTES)
            if not piece:
                break
            answer += piece
    return _parsed(answer)


def _connect(peer: socket.socket, path: Path, deadline_s: float) -> None:
    """Wait while too many others ask; Linux says so at once."""
    while True:
        try:
            peer.connect(str(path))
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise TimeoutError("too many ask for tokens") from None
            time.sleep(AGAIN_S)
        else:
            return


def token_metadata(runtime_dir: Path, timeout_s: float = 1.0) -> tuple[tuple[str, str], ...]:
    """What goes with a call that acts, as gRPC wants it; nothing where the daemon gives no tokens. Raises as above."""
    token = ask_token(runtime_dir, timeout_s)
    return () if token is None else ((TOKEN_KEY, token.token),)


def _parsed(answer: bytes) -> ControlToken:
    """Raises TokenRefusedError for a refusal, and for what is no answer."""
    try:
        said = json.loads(answer) if len(answer) <= ANSWER_BYTES else None
    except ValueError:
        said = None
    match said:
        case {"refused": str(why)}:
            raise TokenRefusedError(why)
        case {"token": str(token), "expires_s": float(expires_s), "uid": int(uid), "acts": bool(acts),
              "tenants": [*names]} if all(isinstance(name, str) for name in names):  # fmt: skip
            return ControlToken(token, expires_s, uid, acts, tuple(names))
    raise TokenRefusedError("what answers there is no kvstored of this version")
