"""A host for daemons in successive lives, with a disk tier if wanted, and what every key on it must hold.

`Node.start` begins a life, `kill` or `stop` ends it; the client stays over all of them. The bytes of a block follow
from its key and a version, so that any hit can be compared, and what is asserted equal is told from other blocks too.
"""

import hashlib
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

import kvclient
from bench.process import DaemonProcess
from kvclient.results import Tiers
from kvstore.tier.format import HEADER_BYTES, FormatError, Header, parse_header, parse_superblock, slot_offset
from kvstored import fd_keeper
from kvstored.index_marks import FOLDER
from tests.segments import flip, patch
from tests.systemd import ServiceManager

PATIENCE_S = 30.0
PAUSE_S = 0.005  # between two looks: whoever is waited for wants the processor, too
WAIT_S = 10.0  # of a fetch: until then a healthy disk has answered
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """What a fetch brought."""

    blocks: Bytes  # one a row
    tiers: Tiers


@dataclass(frozen=True)
class Slot:
    """A block in a segment file, as its header says."""

    path: Path
    offset: int  # of the header
    slot_bytes: int
    header: Header


class Node:
    """A directory for everything that outlives a daemon. A context manager that leaves nothing behind."""

    def __init__(self, *, disks: int = 1, dram: str = "64MiB", size: str = "256MiB", segment: str = "16MiB") -> None:
        """`disks`: directories of the disk tier, 0 for none."""
        self.home = Path(tempfile.mkdtemp(prefix="kvn-", dir="/var/tmp"))
        self.log_file = self.home / "log"
        self.run = self.home / "run"
        self.disks = [self.home / f"disk{number}" for number in range(disks)]
        # By age alone: what was learned of one-shot blocks would evict some before they are flushed.
        self.arguments = ["--dram", dram, "--arena", "4MiB", "--lock", "false", "--policy-dram", "lru"]
        if disks:
            self.arguments += ["--disk", ":".join(map(str, self.disks)), "--disk-size", size, "--disk-segment", segment]
        self.daemon: DaemonProcess | None = None
        self._cleanup = ExitStack()
        self._client: kvclient.Client | None = None

    # -- lives ---------------------------------------------------------------------------------------------------

    def start(self, *arguments: str) -> DaemonProcess:
        """A new life; later arguments override earlier ones."""
        assert self.daemon is None or self.daemon.process.poll() is not None, "two daemons at once"
        self.daemon = DaemonProcess(self.run, *self.arguments, *arguments, log_file=self.log_file)
        return self.daemon

    def kill(self) -> None:
        """`kill -9`."""
        assert self.daemon is not None
        self.daemon.kill()

    def stop(self) -> None:
        """SIGTERM, and it must end well."""
        assert self.daemon is not None
        assert self.daemon.terminate() == 0
        self.daemon.kill()

    def restart(self, *arguments: str) -> DaemonProcess:
        """`kill -9` and a new life."""
        self.kill()
        return self.start(*arguments)

    def assert_alive(self) -> None:
        """The daemon runs, and serves a session."""
        assert self.daemon is not None
        assert self.daemon.process.poll() is None, self.log_file.read_text()[-3000:]
        assert until(lambda: self.client.ping() is not None), "no answer to a ping"

    def log(self) -> str:
        """All that daemons have said; nothing where none was started yet."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    # -- its client ----------------------------------------------------------------------------------------------

    @property
    def client(self) -> kvclient.Client:
        """The same over all lives; connected now."""
        if self._client is None:
            self._client = self._cleanup.enter_context(kvclient.connect(self.run, timeout_s=PATIENCE_S))
        client = self._client
        assert until(lambda: client.wait_connected(PATIENCE_S) and client.ping() is not None), client.status
        return client

    def namespace(self, block_bytes: int = 64 << 10, **changes: str) -> kvclient.Namespace:
        """One of its namespaces."""
        fields = {"model": "m", "engine": "node", "layout": "flat", "dtype": "uint8"} | changes
        return self.client.namespace(block_bytes=block_bytes, **fields)  # type: ignore[arg-type]

    def await_disk(self, ns: kvclient.Namespace, canary: Sequence[bytes]) -> None:
        """Until what lies on disk is known: this chain, which must be durable, is there again."""
        assert until(lambda: ns.match(canary).blocks == len(canary)), f"{ns.match(canary)}\n{self.log()[-3000:]}"

    # -- its files -----------------------------------------------------------------------------------------------

    def segments(self) -> list[Path]:
        """All segment files, by number."""
        paths = (path for disk in self.disks for path in (disk / "segments").glob("*.seg"))
        return sorted(paths, key=lambda path: path.name)

    def segment_bytes(self) -> int:
        """Of all segment files, finished or not."""
        total = 0
        for disk in self.disks:
            for path in (disk / "segments").glob("[0-9]*"):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
        return total

    def slots(self) -> dict[bytes, Slot]:
        """Blocks in the segment files, by key; only headers are looked at."""
        return {slot.header.key: slot for path in self.segments() for slot in slots_of(path)}

    def drop_index(self) -> None:
        """No index for the next life."""
        shutil.rmtree(self.disks[0] / "index", ignore_errors=True)

    # -- end -----------------------------------------------------------------------------------------------------

    def end_keeper(self) -> None:
        """The fd-keeper of this node, if there is one, lets go."""
        end_keeper(self.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()
        if self.daemon is not None:
            self.daemon.kill()
        self.end_keeper()
        if error is not None:
            print(self.log()[-6000:])
        shutil.rmtree(self.home, ignore_errors=True)


def end_keeper(run: Path) -> None:
    """End the fd-keeper of a runtime directory, and wait until it is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        try:
            link.connect(str(run / fd_keeper.SOCKET_NAME))
        except OSError:
            return
        pid, _ = fd_keeper.credentials(link)
    watched = os.pidfd_open(pid)
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(watched, signal.SIGKILL)
        assert select.select([watched], [], [], PATIENCE_S)[0], "a keeper outlives SIGKILL"
    finally:
        os.close(watched)


@contextmanager
def managed(
    node: Node, *arguments: str, command: Sequence[str] = ("-m", "kvstored"), watchdog_s: float = 0.0
) -> Iterator[ServiceManager]:
    """A service manager that plays systemd for daemons of this node. Start it; it kills on the way out."""
    line = [sys.executable, *command, "--runtime-dir", str(node.run), *node.arguments, *arguments]
    with ServiceManager(line, os.environ, node.home, log_file=node.log_file, watchdog_s=watchdog_s) as manager:
        yield manager


# -- blocks ----------------------------------------------------------------------------------------------------------


def chain(name: object, count: int) -> list[bytes]:
    """Keys of a chain; chains of different names share nothing."""
    return [hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(count)]


def roots(name: object, count: int) -> list[bytes]:
    """Keys of chains of one block each: losing one costs no other."""
    return chain(f"root-{name}", count)


def value(key: bytes, block_bytes: int, version: int = 0) -> Bytes:
    """Noise that belongs to one key and version."""
    random = np.random.Generator(np.random.SFC64([int.from_bytes(key, "little"), version]))
    return np.frombuffer(random.bytes(block_bytes), dtype=np.uint8)


def values(keys: Sequence[bytes], block_bytes: int, version: int = 0) -> Bytes:
    """One a row."""
    return np.stack([value(key, block_bytes, version) for key in keys])


def bf16_values(keys: Sequence[bytes], block_bytes: int) -> Bytes:
    """As `values`, of numbers as a model leaves them: normal, in bfloat16. They pack to two thirds or so."""
    rows = []
    for key in keys:
        random = np.random.Generator(np.random.SFC64([int.from_bytes(key, "little"), 1]))
        floats = random.standard_normal(block_bytes // 2, dtype=np.float32)
        rows.append((floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))
    return np.stack(rows)


def put(ns: kvclient.Namespace, keys: Sequence[bytes], blocks: Bytes, *, durable: bool = True) -> None:
    """Store a chain, all of it, and with `durable` have it on disk."""
    result = ns.store(keys, blocks, wait=True, space_s=PATIENCE_S)
    assert result.accepted + result.known == len(keys), result
    if durable:
        flushed = ns.flush(PATIENCE_S)
        assert flushed.durable == result.accepted, flushed


def put_roots(ns: kvclient.Namespace, keys: Sequence[bytes], version: int = 0, *, durable: bool = True) -> None:
    """Store chains of one block each, and with `durable` have them on disk."""
    block_bytes = ns.identity.block_bytes
    for key in keys:
        result = ns.store([key], [value(key, block_bytes, version)], wait=not durable, space_s=PATIENCE_S)
        assert result.accepted == 1, result
    if durable:
        flushed = ns.flush(PATIENCE_S)
        assert flushed.durable == len(keys), flushed


def fetch(ns: kvclient.Namespace, keys: Sequence[bytes], wait_s: float = WAIT_S) -> Found:
    """The lead run, copied while the lease was good."""
    with ns.fetch(keys, wait_s=wait_s) as lease:
        targets = np.zeros((lease.expected, ns.identity.block_bytes), dtype=np.uint8)
        if not lease.expected:
            return Found(targets, lease.tiers)
        whole = lease.copy_to(targets)
        good = len(targets) if whole else lease.blocks if lease.valid() else 0
        return Found(targets[:good], lease.tiers)


def assert_blocks(found: Bytes, wanted: Bytes) -> None:
    """All of these, byte by byte; and the comparison can tell them from others."""
    assert found.shape == wanted.shape
    assert np.array_equal(found, wanted), f"wrong blocks: {np.flatnonzero((found != wanted).any(axis=1))[:10]}"
    assert found.any(), "nothing but zeros is no evidence"
    if len(wanted) > 1:
        assert not np.array_equal(found, wanted[::-1]), "the control is equal as well"
    else:
        assert not np.array_equal(found, np.roll(wanted, 1, axis=1)), "the control is equal as well"


@dataclass(frozen=True)
class Census:
    """What became of chains of one block each, by key."""

    hits: frozenset[bytes]
    misses: frozenset[bytes]
    disk: int  # of the hits, read from there

    @property
    def asked(self) -> int:
        """How many."""
        return len(self.hits) + len(self.misses)


def census(
    ns: kvclient.Namespace, keys: Sequence[bytes], version: int | Callable[[bytes], int] = 0, wait_s: float = WAIT_S
) -> Census:
    """Fetch chains of one block each and compare every byte of every hit; a wrong one fails at once."""
    block_bytes, hits, misses, disk, last = ns.identity.block_bytes, set(), set(), 0, None
    for key in keys:
        found = fetch(ns, [key], wait_s)
        if not len(found.blocks):
            misses.add(key)
            continue
        wanted = value(key, block_bytes, version if isinstance(version, int) else version(key))
        assert np.array_equal(found.blocks[0], wanted), f"wrong bytes for {key.hex()} from {found.tiers}"
        assert last is None or not np.array_equal(found.blocks[0], last), "the control is equal as well"
        last = wanted
        hits.add(key)
        disk += found.tiers.disk
    return Census(frozenset(hits), frozenset(misses), disk)


# -- files -----------------------------------------------------------------------------------------------------------


def slots_of(path: Path) -> Iterator[Slot]:
    """Blocks in one segment file."""
    with path.open("rb") as file:
        superblock = parse_superblock(file.read(HEADER_BYTES))
        for number in range(superblock.slots):
            offset = slot_offset(superblock.slot_bytes, number)
            file.seek(offset)
            page = file.read(HEADER_BYTES)
            if not any(page[:8]):
                continue
            with suppress(FormatError):
                yield Slot(path, offset, superblock.slot_bytes, parse_header(page))


def spoil_index(node: Node, random: Random) -> str:
    """Damage the index of a dead daemon in one of many ways."""
    folder = node.disks[0] / FOLDER
    file = folder / "data.mdb"
    size = len(file.read_bytes().rstrip(b"\0"))  # what lies behind is set aside, and nothing is in it yet
    how = random.choice(["flip", "flips", "cut", "empty", "zeros", "gone", "no-store", "folder-is-a-file"])
    if how in {"flip", "flips"}:
        for _ in range(1 if how == "flip" else 200):
            flip(file, random.randrange(8 * size))
    elif how == "cut":
        os.truncate(file, random.randrange(1, size))
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "zeros":
        patch(file, random.randrange(size // 4096) * 4096, bytes(4096))
    elif how == "no-store":
        (node.disks[0] / "store").unlink()
    else:
        shutil.rmtree(folder)
        if how == "folder-is-a-file":
            folder.write_text("?")
    return how


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S, pause_s: float = PAUSE_S) -> bool:
    """Ask again and again until it holds; False if it never does."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(pause_s)
    return True


def opened_by(pid: int) -> list[str]:
    """What the descriptors of a process refer to; some may close meanwhile."""
    opened = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            opened.append(str(link.readlink()))
    return opened
