"""Drives on real files, with system calls that fail, stop short or hang when a test says so."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import numpy as np
import xxhash

from kvkernels.aligned import Bytes, aligned
from kvproto.ids import NamespaceDigest
from kvproto.limits import MIB, slot_bytes_for
from kvstore.sessions import Namespace
from kvstore.tier.format import Codec, Header, stored_slot_bytes
from kvstore.tier.orders import Load, MakeSegment, Order, Outcome, Packed, Save
from kvstored.drive import Drives
from kvstored.drive_files import Files
from kvstored.drive_keys import StoreKeys
from kvstored.mounts import Mounts

STORE = b"0123456789abcdef"
PATIENCE_S = 20
Rule = Callable[..., object]


class UnreliableFiles(Files):
    """The real thing, after the rule for that call: it may raise, or answer an int in its place."""

    def __init__(self) -> None:
        self.rules: dict[str, Rule] = {}
        self.calls: Counter[str] = Counter()
        self.sizes: list[tuple[str, int, int]] = []  # call, buffers, bytes

    def _before(self, name: str, *arguments: Any) -> object:
        self.calls[name] += 1
        rule = self.rules.get(name)
        return rule(*arguments) if rule else None

    def open(self, path: Path, flags: int) -> int:
        self._before("open", path, flags)
        return super().open(path, flags)

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.sizes.append(("pread", len(buffers), sum(map(len, buffers))))
        answer = self._before("pread", fd, buffers, offset)
        return answer if isinstance(answer, int) else super().pread(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.sizes.append(("pwrite", len(buffers), sum(map(len, buffers))))
        answer = self._before("pwrite", fd, buffers, offset)
        return answer if isinstance(answer, int) else super().pwrite(fd, buffers, offset)

    def fallocate(self, fd: int, file_bytes: int) -> None:
        self._before("fallocate", fd, file_bytes)
        super().fallocate(fd, file_bytes)

    def fdatasync(self, fd: int) -> None:
        self._before("fdatasync", fd)
        super().fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        self._before("sync_folder", path)
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", source, target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._before("unlink", path)
        super().unlink(path)

    def identity(self, path: Path) -> tuple[int, int]:
        self._before("identity", path)
        return super().identity(path)

    def space(self, path: Path) -> tuple[int, int]:
        self._before("space", path)
        return super().space(path)


def error(number: int, *, times: int = 1 << 30, after: int = 0) -> Rule:
    """Fail with this errno: so many times, after so many calls."""
    calls = iter(range(1 << 30))

    def rule(*_: object) -> None:
        if after <= next(calls) < after + times:
            raise OSError(number, os.strerror(number))

    return rule


class Gate:
    """A call that hangs until it is let go."""

    def __init__(self, *, if_: Callable[..., bool] = lambda *_: True) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._if = if_

    def __call__(self, *arguments: object) -> None:
        if self._if(*arguments) and not self._open.is_set():
            self.reached.set()
            assert self._open.wait(PATIENCE_S)

    def let_go(self) -> None:
        self._open.set()

    def wait_reached(self) -> None:
        assert self.reached.wait(PATIENCE_S)


@dataclass(frozen=True)
class Place:
    """A block in the arena."""

    offset: int
    block_bytes: int


@dataclass(eq=False)
class Rig:
    """Drives, an arena, and a clock that stands still."""

    directories: Sequence[Path]
    segment_bytes: int = 4 * MIB
    arena_bytes: int = 8 * MIB
    readers: int = 2
    writers: int = 2
    packers: int = 1
    store: bytes = STORE
    keys: StoreKeys | None = None
    files: UnreliableFiles = field(default_factory=UnreliableFiles)
    clock_ns: int = 10**12
    mounts: Mounts | None = None

    def __post_init__(self) -> None:
        for directory in self.directories:
            directory.mkdir(exist_ok=True)
        self.arena: Bytes = aligned(self.arena_bytes)
        self.arena[:] = 0
        self._news = threading.Condition()
        self._finished: list[Sequence[Order]] = []
        self.drives = Drives(
            self.directories, self.segment_bytes, self.store, lambda arena: self.arena, self._wake,
            readers=self.readers, writers=self.writers, packers=self.packers, files=self.files,
            now_ns=lambda: self.clock_ns, keys=self.keys, mounts=self.mounts,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.drives.start()
        self.until(lambda: all(drive.directory.ready.is_set() for drive in self.drives._drives))
        self.files.calls.clear()
        self.files.sizes.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.drives.stop()
        assert not [thread for thread in self.drives._threads if thread.is_alive()]

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def until(self, happened: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(happened, PATIENCE_S), "it did not happen"

    def wait(self, *batches: Sequence[Order]) -> None:
        def all_done() -> bool:
            self._finished += self.drives.take_done()
            return all(any(batch is done for done in self._finished) for batch in batches)

        self.until(all_done)

    def run(self, orders: Sequence[Order]) -> list[Outcome]:
        """Carry these out and say how they ended."""
        batch = list(orders)
        self.drives.submit(batch)
        self.wait(batch)
        return [order.outcome for order in batch]

    def make(self, segment: int, slot_bytes: int) -> Outcome:
        return self.run([MakeSegment(segment, slot_bytes, "a")])[0]

    def look(self, after_s: int = 1) -> None:
        """Let time pass, look around, and wait for what was seen."""
        self.clock_ns += after_s * 10**9
        self.drives.look_around()
        self.until(lambda: not any(drive.directory._looking_since_ns for drive in self.drives._drives))

    def fill(self, count: int, block_bytes: int, seed: int = 1) -> list[Place]:
        """Blocks of noise in the arena, and more noise up to the next page."""
        room = slot_bytes_for(block_bytes)
        self.arena[: count * room] = np.random.default_rng(seed).integers(0, 256, count * room, dtype=np.uint8)
        return [Place(i * room, block_bytes) for i in range(count)]

    def content(self, place: Place) -> Bytes:
        return self.arena[place.offset : place.offset + place.block_bytes]

    def path(self, segment: int, directory: int = 0) -> Path:
        return self.directories[directory] / "segments" / f"{segment:08d}.seg"

    def save_blocks(self, segment: int, count: int, block_bytes: int) -> tuple[list[Place], list[Save]]:
        """Make a segment and fill its first slots; then wipe the arena."""
        places = self.fill(count, block_bytes)
        saves = [save_of(self, segment, slot, place) for slot, place in enumerate(places)]
        assert self.make(segment, saves[0].slot_bytes) is Outcome.DONE
        assert self.run(saves) == [Outcome.DONE] * count
        self.arena[:] = 0
        return places, saves


def namespace_of(block_bytes: int, tenant: str = "a", digest: bytes = b"d" * 32) -> Namespace:
    """As much of a namespace as the drives look at."""
    return cast(
        "Namespace",
        SimpleNamespace(
            digest=NamespaceDigest(digest),
            tenant=SimpleNamespace(name=tenant),
            identity=SimpleNamespace(block_bytes=block_bytes),
        ),
    )


def save_of(rig: Rig, segment: int, slot: int, place: Place, packed: Packed | None = None) -> Save:
    checksum = xxhash.xxh3_64_intdigest(rig.content(place).data)
    header = Header(
        key=slot.to_bytes(32, "little"), parent=bytes(32), digest=NamespaceDigest(b"d" * 32), tenant="a",
        generation=100 + slot, parent_generation=0, parent_segment=0, parent_slot=0, segment=segment, slot=slot,
        block_bytes=place.block_bytes, stored_bytes=place.block_bytes, checksum=checksum, stored_checksum=checksum,
        codec=Codec.RAW, identity=b"identity",
    )  # fmt: skip
    if packed:
        header = replace(
            header, stored_bytes=packed.stored_bytes, stored_checksum=packed.stored_checksum, codec=packed.codec
        )
    return Save(slot, header, stored_slot_bytes(header.stored_bytes), 0, place.offset, packed)


def load_of(save: Save, place: Place, **changed: Any) -> Load:
    header = save.header
    fields: dict[str, Any] = {
        "row": save.row, "namespace": namespace_of(place.block_bytes), "key": header.key,
        "generation": header.generation, "checksum": header.checksum, "segment": header.segment,
        "slot": header.slot, "slot_bytes": save.slot_bytes, "arena": 0, "arena_offset": place.offset,
    } | changed  # fmt: skip
    return Load(**fields)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_fds() -> int:
    return len(names(Path("/proc/self/fd")))
