"""Segment files with headers and payloads as the daemon writes them, and what an index should say of them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event

import numpy as np
import xxhash

from kvproto.ids import NamespaceDigest
from kvproto.limits import PAGE_BYTES
from kvstore.tier.format import (
    CHUNK_SLOTS,
    HEADER_BYTES,
    RECORD,
    Codec,
    Header,
    Superblock,
    pack_header_into,
    pack_superblock,
    slot_offset,
)
from kvstore.tier.orders import Commit, Name
from kvstored.index import Index, State
from kvstored.index_loaded import Loaded
from kvstored.mounts import Mounts

STORE = bytes(range(16))
SLOT_BYTES = 2 * PAGE_BYTES
MADE_S = 1_700_000_000
PATIENCE_S = 60.0

Fact = tuple[str, bytes, bytes, int, int, int, int]  # tenant, digest, key, generation, segment, slot, checksum


@dataclass(frozen=True)
class Block:
    """One block on disk."""

    header: Header
    payload: bytes

    @property
    def fact(self) -> Fact:
        h = self.header
        return h.tenant, h.digest, h.key, h.generation, h.segment, h.slot, h.checksum


def block(seed: int, segment: int, slot: int, *, tenant: str = "acme", generation: int = 0, model: int = 0) -> Block:
    random = Random(seed)  # the key depends on nothing else
    canonical = f"model-{model}".encode()
    payload = Random(seed * 1000 + generation).randbytes(PAGE_BYTES - 96)
    checksum = xxhash.xxh3_64_intdigest(payload)
    header = Header(
        key=random.randbytes(32), parent=bytes(32), digest=NamespaceDigest(hashlib.sha256(canonical).digest()),
        tenant=tenant, generation=generation or seed + 1, parent_generation=0, parent_segment=0, parent_slot=0,
        segment=segment, slot=slot, block_bytes=len(payload), stored_bytes=len(payload), checksum=checksum,
        stored_checksum=checksum, codec=Codec.RAW, identity=canonical,
    )  # fmt: skip
    return Block(header, payload)


def path_of(directory: Path, segment: int) -> Path:
    return directory / "segments" / f"{segment:08d}.seg"


def make_segment(
    directory: Path, segment: int, slots: int, blocks: Sequence[Block] = (), *,
    tenant: str = "acme", store: bytes = STORE, made_s: int = MADE_S, name: int | None = None,
) -> Path:  # fmt: skip
    """A segment file; `name` if it is to stand under another number than its own."""
    path = path_of(directory, segment if name is None else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    segment_bytes = HEADER_BYTES + slots * SLOT_BYTES
    with path.open("wb") as file:
        file.truncate(segment_bytes)
        file.write(pack_superblock(Superblock(segment, segment_bytes, SLOT_BYTES, made_s, store, tenant)))
    for each in blocks:
        put(path, each)
    return path


def put(path: Path, each: Block, *, slot: int | None = None) -> None:
    """Write a block, by default where its header says that it is."""
    page = bytearray(HEADER_BYTES)
    pack_header_into(memoryview(page), each.header)
    patch(path, slot_offset(SLOT_BYTES, each.header.slot if slot is None else slot), bytes(page) + each.payload)


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def chunks_of(blocks: Sequence[Block], numbers: dict[tuple[str, bytes], int]) -> list[tuple[int, int, bytes]]:
    """Index chunks that hold exactly these blocks."""
    chunks: dict[tuple[int, int], np.ndarray[tuple[int], np.dtype[np.void]]] = {}
    for each in blocks:
        h = each.header
        records = chunks.setdefault((h.segment, h.slot // CHUNK_SLOTS), np.zeros(CHUNK_SLOTS, RECORD))
        record = records[h.slot % CHUNK_SLOTS : h.slot % CHUNK_SLOTS + 1]
        record["key"] = np.frombuffer(h.key, "<u8")
        record["generation"] = h.generation
        record["checksum"] = h.checksum
        record["namespace"] = numbers[h.tenant, h.digest]
        record["touched_s"] = MADE_S
    return [(segment, chunk, records.tobytes()) for (segment, chunk), records in chunks.items()]


def commit_of(blocks: Sequence[Block], *, dropped: Sequence[int] = ()) -> Commit:
    """A commit of these blocks, and of their namespaces."""
    numbers: dict[tuple[str, bytes], int] = {}
    names: list[Name] = []
    for each in blocks:
        h = each.header
        if (h.tenant, h.digest) not in numbers:
            numbers[h.tenant, h.digest] = len(numbers) + 1
            names.append(Name(len(numbers), h.tenant, h.identity))
    segments = tuple(sorted({each.header.segment for each in blocks}))
    return Commit(segments, chunks_of(blocks, numbers), names, list(dropped))


def facts(loaded: Loaded) -> set[Fact]:
    """All records of an index, with their namespaces spelled out."""
    names = {name.number: name for name in loaded.names}
    told: set[Fact] = set()
    for found in loaded.segments:
        records = found.records
        assert isinstance(records, np.ndarray)
        assert len(records) == found.slots
        for slot in np.flatnonzero(records["generation"]).tolist():
            record = records[slot]
            name = names[int(record["namespace"])]
            key, generation, checksum = record["key"].tobytes(), int(record["generation"]), int(record["checksum"])
            told.add((name.tenant, name.digest, key, generation, found.segment, slot, checksum))
    return told


def facts_of(blocks: Sequence[Block]) -> set[Fact]:
    return {each.fact for each in blocks}


class Opened:
    """An index that has loaded."""

    def __init__(self, index: Index, woken: Event) -> None:
        self.index = index
        self.woken = woken
        self.loaded = self._await()

    def commit(self, blocks: Sequence[Block], *, dropped: Sequence[int] = ()) -> bool:
        return self.index.commit(commit_of(blocks, dropped=dropped))

    def await_state(self, state: State) -> None:
        while self.index.state is not state:
            assert self.woken.wait(PATIENCE_S), self.index.state
            self.woken.clear()

    def _await(self) -> Loaded:
        while (loaded := self.index.take_loaded()) is None:
            assert self.woken.wait(PATIENCE_S), self.index.state
            self.woken.clear()
        return loaded


@contextmanager
def opened(
    *directories: Path, map_bytes: int = 1 << 26, commit_s: float = PATIENCE_S, mounts: Mounts | None = None
) -> Iterator[Opened]:
    """An index over these directories, from its start to its stop."""
    woken = Event()
    index = Index(
        directories, woken.set, map_bytes=map_bytes, commit_s=commit_s, answer_s=PATIENCE_S, mounts=mounts
    )  # fmt: skip
    index.start()
    try:
        yield Opened(index, woken)
    finally:
        index.stop()
