"""A real daemon in a temporary directory, and a client that says whatever it likes on the hot socket."""

import array
import os
import select
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.process import DaemonProcess
from kvproto import frames
from kvproto.errors import Code
from kvproto.frames import Durable, Flag, Head, Hello, Leased, Mode, Ready, Reserved, Verb, Welcome
from kvproto.identity import NamespaceIdentity

PATIENCE_S = 20.0  # how long an answer may take on a busy machine before the test fails
Message = tuple[Head, bytes, list[int]]


@contextmanager
def real_daemon(*arguments: str, tenants: Sequence[str] = ()) -> Iterator[DaemonProcess]:
    """A small daemon in a directory of its own, until the block ends. This user may be any of `tenants`."""
    with tempfile.TemporaryDirectory(prefix="kvd-") as folder:
        home = Path(folder)
        home.chmod(0o755)  # some tests become another user
        if tenants:
            file = home / "kvstored.toml"
            file.write_text("".join(f"[tenants.{name}]\nuids = [{os.geteuid()}]\n" for name in tenants))
            arguments = (*arguments, "--config", str(file))
        small = ("--dram", "64MiB", "--arena", "8MiB", "--lock", "false", "--log-level", "error")
        with DaemonProcess(home / "run", *small, *arguments, log_file=home / "log") as process:
            yield process


@dataclass(slots=True)
class RawClient:
    """Frames out, frames in; nothing is checked on the way out."""

    socket: socket.socket
    welcome: Welcome | None = None
    fds: list[int] = field(default_factory=list)
    requests: int = 0
    unasked: list[Message] = field(default_factory=list)

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """One message."""
        if fds:
            rights = array.array("i", fds)
            self.socket.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        else:
            self.socket.send(frame)

    def receive(self) -> Message | None:
        """The next message, or None when the daemon has hung up."""
        ready, _, _ = select.select([self.socket], [], [], PATIENCE_S)
        assert ready, "the daemon is silent"
        try:
            frame, ancillary, _, _ = self.socket.recvmsg(1 << 16, 1 << 12)
        except ConnectionResetError:
            return None
        if not frame:
            return None
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        self.fds += fds
        return frames.parse_head(frame, len(frame)), frame, list(fds)

    def answer(self, verb: Verb) -> Message:
        """The next frame of this verb; others are kept in `unasked`."""
        while True:
            message = self.receive()
            assert message is not None, f"hung up instead of {verb.name}"
            if message[0].verb == verb:
                return message
            self.unasked.append(message)

    def goodbye(self) -> tuple[Code, str]:
        """GOAWAY and the end of file, which must be next."""
        head, frame, _ = self.answer(Verb.GOAWAY)
        assert self.receive() is None
        return frames.parse_failure(frame, head)

    def request(self) -> int:
        """A new request id."""
        self.requests += 1
        return self.requests

    def hello(self, **fields: object) -> Welcome:
        """Say HELLO properly."""
        self.send(frames.build_hello(self.request(), Hello(name="raw", **fields)))  # type: ignore[arg-type]
        head, frame, _ = self.answer(Verb.WELCOME)
        self.welcome = frames.parse_welcome(frame, head)
        return self.welcome

    def open(self, block_bytes: int = 4096, **fields: object) -> int:
        """Open a namespace; its number."""
        self.send(frames.build(Verb.OPEN, self.request(), identity(block_bytes, **fields).canonical()))
        _, frame, _ = self.answer(Verb.OPENED)
        number: int = frames.OPENED_BODY.unpack_from(frame, frames.HEAD_BYTES)[0]
        return number

    def reserve(self, namespace: int, keys: Sequence[bytes], parent: bytes | None = None) -> list[Reserved]:
        """RESERVE a chain."""
        self.send(frames.build_reserve(self.request(), namespace, parent, b"".join(keys)))
        head, frame, _ = self.answer(Verb.RESERVED)
        direct = self.welcome is not None and self.welcome.mode is Mode.DIRECT
        return frames.parse_reserved(frame, head, direct=direct)

    def writable(self) -> dict[int, int]:
        """Descriptors that came writable, by arena (mode direct)."""
        found: dict[int, int] = {}
        for head, frame, fds in self.unasked:
            if head.verb == Verb.ARENA and head.flags & Flag.WRITABLE:
                found.update((arena[0], fd) for arena, fd in zip(frames.parse_arenas(frame, head), fds, strict=True))
        return found

    def commit(self, tickets: Sequence[int]) -> int:
        """COMMIT; how many were not taken."""
        self.send(frames.build(Verb.COMMIT, self.request(), commits=tickets, flags=frames.Flag.WANTS_ANSWER))
        head, frame, _ = self.answer(Verb.COMMITTED)
        return frames.parse_number(frame, head)

    def lease(self, namespace: int, keys: Sequence[bytes], ttl_s: float = 5.0, wait_s: float = 0.0) -> Leased:
        """LEASE a chain."""
        ttl_ns, wait_ns = int(ttl_s * 1e9), int(wait_s * 1e9)
        self.send(frames.build_lease(self.request(), namespace, b"".join(keys), ttl_ns, wait_ns))
        head, frame, _ = self.answer(Verb.LEASED)
        return frames.parse_leased(frame, head)

    def ready(self) -> Ready:
        """The next READY, which may have come before an answer."""
        for index, (head, frame, _) in enumerate(self.unasked):
            if head.verb == Verb.READY:
                del self.unasked[index]
                return frames.parse_ready(frame, head)
        head, frame, _ = self.answer(Verb.READY)
        return frames.parse_ready(frame, head)

    def flush(self, namespace: int, wait_s: float = 0.0) -> Durable:
        """FLUSH a namespace."""
        self.send(frames.build_flush(self.request(), namespace, int(wait_s * 1e9)))
        head, frame, _ = self.answer(Verb.DURABLE)
        return frames.parse_durable(frame, head)

    def ping(self) -> None:
        """The daemon serves this session."""
        self.send(frames.build(Verb.PING, self.request(), bytes(8)))
        self.answer(Verb.PONG)

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def identity(block_bytes: int = 4096, **fields: object) -> NamespaceIdentity:
    """Some namespace."""
    return NamespaceIdentity(
        **{"model": "m", "engine": "raw", "layout": "flat", "dtype": "u8", "block_tokens": 16, **fields},  # type: ignore[arg-type]
        block_bytes=block_bytes,
    )


def dial(runtime_dir: Path) -> RawClient:
    """Connect and say nothing."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(runtime_dir / "hot.sock"))
    return RawClient(connection)


@contextmanager
def raw_client(runtime_dir: Path, **fields: object) -> Iterator[RawClient]:
    """A session in good standing."""
    client = dial(runtime_dir)
    try:
        client.hello(**fields)
        yield client
    finally:
        client.close()


def key(number: int) -> bytes:
    """Some key."""
    return number.to_bytes(32, "little")
