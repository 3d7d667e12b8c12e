"""A disk in memory, with its threads: carries out the orders of the disk tier when told to, and fails when told to.

Between two syncs it remembers what was there at the last one, so that a test can take the power away.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kvkernels.planes import PlanesError, pack, unpack
from kvproto.limits import PAGE_BYTES, slot_bytes_for
from kvstore.ports import Bytes
from kvstore.tier.format import (
    CHUNK_SLOTS,
    HEADER_BYTES,
    RECORD,
    Codec,
    FormatError,
    Header,
    Superblock,
    pack_header_into,
    pack_superblock,
    parse_header,
    parse_superblock,
    slot_offset,
)
from kvstore.tier.orders import (
    EVERY,
    WHOLE,
    Commit,
    DropSegment,
    Erase,
    Found,
    Load,
    MakeSegment,
    Name,
    Order,
    Outcome,
    Owe,
    Pack,
    Packed,
    Save,
    Verify,
)
from kvstore.tier.scrub import NOWHERE
from tests.fakes import FakeMemory

STORE = b"0123456789abcdef"
SECTOR_BYTES = 512  # what is written whole


@dataclass
class FakeDrive:
    """`kvstore.ports.Workers`, with everything behind it."""

    segment_bytes: int
    files: dict[int, bytearray] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)  # what survives a loss of power for certain
    # Sectors that a failed sync has lost: as they are read, and as the drive has them. No later sync writes them.
    unsynced: dict[tuple[int, int], tuple[bytes, bytes]] = field(default_factory=dict)
    chunks: dict[tuple[int, int], bytes] = field(default_factory=dict)
    names: dict[int, Name] = field(default_factory=dict)
    erased: set[tuple[int, int]] = field(default_factory=set)  # places; not those written since
    owed: set[tuple[int, int]] = field(default_factory=set)
    owed_tenants: set[str] = field(default_factory=set)  # of whom all is to go
    waiting: list[Sequence[Order]] = field(default_factory=list)
    fault: Callable[[Order], Outcome | None] = lambda _order: None  # how an order is to fail, if at all
    doubt: Callable[[Order], bool] = lambda _order: False  # is one that fails carried out all the same?
    idle: float = 1.0
    drives: int = 1  # segments lie on them in turn
    loads: int = 0
    saves: int = 0
    memory: FakeMemory = field(default_factory=FakeMemory)

    def submit(self, batch: Sequence[Order]) -> None:
        """See the port."""
        assert batch, "an empty batch"
        assert len({type(order) for order in batch}) == 1, "a batch of several kinds"
        assert all(order.outcome is Outcome.OPEN for order in batch), "an order is given twice"
        self.waiting.append(batch)

    def idle_share(self) -> float:
        """See the port."""
        return self.idle

    def drive_of(self, segment: int) -> int:
        """See the port."""
        return segment % self.drives

    def carry_out(self, index: int = 0) -> Sequence[Order]:
        """A thread ends one batch."""
        batch = self.waiting.pop(index)
        for order in batch:
            failure = self.fault(order)
            if failure is None or self.doubt(order):
                order.outcome = self._do(order)
            order.outcome = failure or order.outcome
        return batch

    def _do(self, order: Order) -> Outcome:
        if isinstance(order, MakeSegment):
            return self._make(order)
        if isinstance(order, DropSegment | Owe):
            return self._drop(order)
        if isinstance(order, Commit):
            return self._commit(order)
        if isinstance(order, Verify):
            good = xxhash.xxh3_64_intdigest(self._block(order.arena, order.arena_offset, order.block_bytes))
            return Outcome.DONE if good == order.checksum else Outcome.DAMAGED
        if isinstance(order, Pack):
            return self._pack(order)
        return self._do_in_segment(order)

    def _do_in_segment(self, order: Save | Load | Erase) -> Outcome:
        segment = order.header.segment if isinstance(order, Save) else order.segment
        file = self.files.get(segment)
        if file is None:
            return Outcome.GONE
        if isinstance(order, Save):
            return self._save(order, file)
        if isinstance(order, Load):
            return self._load(order, file)
        at = slot_offset(order.slot_bytes, order.slot)
        self.erased.add((segment, order.slot))
        file[at : at + HEADER_BYTES] = bytes(HEADER_BYTES)
        self._write_anew(segment, at, HEADER_BYTES)
        if order.segment in self.synced:
            kept = bytearray(self.synced[order.segment])
            kept[at : at + HEADER_BYTES] = bytes(HEADER_BYTES)
            self.synced[order.segment] = bytes(kept)
        return Outcome.DONE

    def _drop(self, order: DropSegment | Owe) -> Outcome:
        if isinstance(order, Owe):
            self.owed.update(order.places - {EVERY})
            if EVERY in order.places:
                self.owed_tenants.add(order.tenant)
        else:
            self.files.pop(order.segment, None)
            self.synced.pop(order.segment, None)
        return Outcome.DONE

    def _make(self, order: MakeSegment) -> Outcome:
        assert order.segment not in self.files, f"segment {order.segment} is made twice"
        page = pack_superblock(Superblock(order.segment, self.segment_bytes, order.slot_bytes, 1, STORE, order.tenant))
        self.files[order.segment] = bytearray(page + bytes(self.segment_bytes - len(page)))
        self.synced[order.segment] = bytes(self.files[order.segment])
        return Outcome.DONE

    def _block(self, arena: int, offset: int, block_bytes: int) -> bytes:
        return self.memory.view(arena)[offset : offset + block_bytes].tobytes()

    def _pack(self, order: Pack) -> Outcome:
        """As the real packers do: where that saves a page and a tenth."""
        block = self.memory.view(order.arena)[order.arena_offset : order.arena_offset + order.block_bytes]
        most_bytes = min(order.block_bytes * 9 // 10, slot_bytes_for(order.block_bytes) - PAGE_BYTES)
        done = pack(block, most_bytes)
        if done is not None:
            content, stored_bytes = done
            checksum = xxhash.xxh3_64_intdigest(content[:stored_bytes].tobytes())
            order.packed = Packed(order.codec, stored_bytes, checksum, content)
        return Outcome.DONE

    def _save(self, order: Save, file: bytearray) -> Outcome:
        self.saves += 1
        self.erased.discard((order.header.segment, order.header.slot))
        at = slot_offset(order.slot_bytes, order.header.slot)
        assert at + order.slot_bytes <= len(file), "a block is written past its segment"
        page = bytearray(HEADER_BYTES)
        pack_header_into(memoryview(page), order.header)
        file[at : at + HEADER_BYTES] = page
        block = self._block(order.arena, order.arena_offset, order.header.block_bytes)
        if order.packed is not None:
            assert isinstance(order.packed.content, np.ndarray), "a packed block is an array"
            block = order.packed.content.tobytes()
        assert len(block) <= order.slot_bytes - HEADER_BYTES, "a block is larger than its slot"
        file[at + HEADER_BYTES : at + HEADER_BYTES + len(block)] = block
        self._write_anew(order.header.segment, at, HEADER_BYTES + len(block))
        return Outcome.DONE

    def _write_anew(self, segment: int, start: int, length: int) -> None:
        """What a sync has lost here is of no account any more, though the same bytes are written again."""
        for at in range(start // SECTOR_BYTES * SECTOR_BYTES, start + length, SECTOR_BYTES):
            self.unsynced.pop((segment, at), None)

    def _load(self, order: Load, file: bytearray) -> Outcome:
        self.loads += 1
        block_bytes = order.namespace.identity.block_bytes
        whole = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        target = np.zeros(whole, dtype=np.uint8)
        if order.arena != NOWHERE:
            target = self.memory.view(order.arena)[order.arena_offset : order.arena_offset + whole]
        target[:] = 0  # whatever comes of it, what lay there before is gone
        found = _read(file, order.slot_bytes, order.slot, target[:block_bytes])
        if found is None:
            return Outcome.DAMAGED
        wanted = (order.key, order.namespace.digest, order.namespace.tenant.name, order.generation, order.segment)
        names = (found.key, found.digest, found.tenant, found.generation, found.segment)
        good = wanted == names and found.slot == order.slot and found.checksum == order.checksum
        return Outcome.DONE if good else Outcome.DAMAGED

    def _commit(self, order: Commit) -> Outcome:
        for segment in order.segments:
            if segment in self.files:
                (self._lose_written if segment in order.failed else self._sync)(segment)
        for segment in order.dropped:
            for place in [place for place in self.chunks if place[0] == segment]:
                del self.chunks[place]
        for segment, chunk, records in order.chunks:
            assert len(records) == CHUNK_SLOTS * RECORD.itemsize, "a chunk of another size"
            if segment not in order.failed:
                self.chunks[segment, chunk] = records
        self.names.update({name.number: name for name in order.names})
        return Outcome.DONE

    def _sync(self, segment: int) -> None:
        file = self.files[segment]
        kept = bytearray(file)
        for (other, at), (read, had) in list(self.unsynced.items()):
            if other != segment:
                continue
            if file[at : at + SECTOR_BYTES] == read:
                kept[at : at + SECTOR_BYTES] = had
            else:  # written again since
                del self.unsynced[other, at]
        self.synced[segment] = bytes(kept)

    def _lose_written(self, segment: int) -> None:
        file, kept = self.files[segment], self.synced[segment]
        for at in range(0, len(kept), SECTOR_BYTES):
            read, had = bytes(file[at : at + SECTOR_BYTES]), kept[at : at + SECTOR_BYTES]
            if read != had:
                self.unsynced[segment, at] = (read, had)

    # -- looks from outside --------------------------------------------------------------------------------------

    def headers(self) -> list[Header]:
        """Every header that is whole and in its place."""
        found = []
        for segment, file in self.files.items():
            superblock = parse_superblock(bytes(file[:HEADER_BYTES]))
            for slot in range(superblock.slots):
                at = slot_offset(superblock.slot_bytes, slot)
                try:
                    header = parse_header(bytes(file[at : at + HEADER_BYTES]))
                except FormatError:
                    continue
                if (header.segment, header.slot) == (segment, slot):
                    found.append(header)
        return found

    def slot_bytes(self, segment: int) -> int:
        """What its superblock says."""
        return parse_superblock(bytes(self.files[segment][:HEADER_BYTES])).slot_bytes

    def content(self, segment: int, slot: int, *, synced: bool = False) -> tuple[int, bytes] | None:
        """Generation and bytes of the block that lies at a place, if they are whole."""
        file = self.synced.get(segment) if synced else self.files.get(segment)
        if file is None:
            return None
        slot_bytes, at = self.slot_bytes(segment), slot_offset(self.slot_bytes(segment), slot)
        try:
            header = parse_header(bytes(file[at : at + HEADER_BYTES]))
        except FormatError:
            return None
        block = np.zeros(header.block_bytes, dtype=np.uint8)
        return None if _read(file, slot_bytes, slot, block) is None else (header.generation, block.tobytes())

    def recorded(self, segment: int, slot: int) -> int:
        """The generation that the index knows at a place; 0 for none."""
        content = self.chunks.get((segment, slot // CHUNK_SLOTS))
        return 0 if content is None else int(np.frombuffer(content, dtype=RECORD)["generation"][slot % CHUNK_SLOTS])

    # -- the next life -------------------------------------------------------------------------------------------

    def found(self) -> tuple[list[Found], list[Name], list[int], int]:
        """What the index says, as a daemon that starts is told. What it says of segments that are gone is forgotten,
        and their numbers are not given again.
        """
        self.erase_owed()
        numbers = [*self.files, *(segment for segment, _ in (*self.chunks, *self.owed))]
        for place in [place for place in self.chunks if place[0] not in self.files]:
            del self.chunks[place]
        found = []
        for segment, file in self.files.items():
            superblock = parse_superblock(bytes(file[:HEADER_BYTES]))
            slots = superblock.slots
            records = np.zeros(-(-slots // CHUNK_SLOTS) * CHUNK_SLOTS, dtype=RECORD)
            for (other, chunk), content in self.chunks.items():
                if other == segment:
                    start = chunk * CHUNK_SLOTS
                    records[start : start + CHUNK_SLOTS] = np.frombuffer(content, dtype=RECORD)
            found.append(Found(segment, superblock.slot_bytes, slots, superblock.tenant, records[:slots]))
        return found, list(self.names.values()), [], max(numbers, default=0) + 1

    def erase_owed(self) -> None:
        """What a start does first."""
        for segment, slot in sorted(place for place in self.owed if place[0] in self.files):
            self.owed.remove((segment, slot))
            if slot == WHOLE:  # the first of its segment
                del self.files[segment], self.synced[segment]
            if segment not in self.files:
                continue
            at = slot_offset(self.slot_bytes(segment), slot)
            kept = bytearray(self.synced[segment])
            for file in (self.files[segment], kept):
                file[at : at + HEADER_BYTES] = bytes(HEADER_BYTES)
            self.synced[segment] = bytes(kept)
            self._write_anew(segment, at, HEADER_BYTES)
            records = bytearray(self.chunks.get((segment, slot // CHUNK_SLOTS), b""))
            if records:
                np.frombuffer(records, dtype=RECORD)[slot % CHUNK_SLOTS] = np.zeros((), RECORD)
                self.chunks[segment, slot // CHUNK_SLOTS] = bytes(records)

    def known_blocks(self) -> int:
        """How many blocks the index knows, in segments that are there."""
        records = [np.frombuffer(chunk, RECORD) for (segment, _), chunk in self.chunks.items() if segment in self.files]
        return sum(int(np.count_nonzero(some["generation"])) for some in records)

    def rebuild(self) -> None:
        """Forget the index and make it anew from headers, as the index process does."""
        self.erase_owed()
        self.synced = {segment: bytes(file) for segment, file in self.files.items()}  # before it believes them
        self.unsynced.clear()
        numbers = {(name.tenant, name.canonical): name.number for name in self.names.values()}
        self.chunks.clear()
        best: dict[tuple[str, bytes, bytes], tuple[int, int, int]] = {}
        for segment, file in self.files.items():
            superblock = parse_superblock(bytes(file[:HEADER_BYTES]))
            for slot in range(superblock.slots):
                at = slot_offset(superblock.slot_bytes, slot)
                try:
                    header = parse_header(bytes(file[at : at + HEADER_BYTES]))
                except FormatError:
                    continue
                if (header.segment, header.slot) != (segment, slot):
                    continue
                identity = (header.tenant, header.digest, header.key)
                if header.generation <= best.get(identity, (0, 0, 0))[0]:
                    continue
                best[identity] = (header.generation, segment, slot)
                number = numbers.setdefault((header.tenant, header.identity), len(numbers) + 1)
                self.names[number] = Name(number, header.tenant, header.identity)
        for generation, segment, slot in best.values():
            self._record(segment, slot, generation, numbers)

    def _record(self, segment: int, slot: int, generation: int, numbers: dict[tuple[str, bytes], int]) -> None:
        superblock = parse_superblock(bytes(self.files[segment][:HEADER_BYTES]))
        at = slot_offset(superblock.slot_bytes, slot)
        header = parse_header(bytes(self.files[segment][at : at + HEADER_BYTES]))
        place = (segment, slot // CHUNK_SLOTS)
        records = np.frombuffer(bytearray(self.chunks.get(place, bytes(CHUNK_SLOTS * RECORD.itemsize))), dtype=RECORD)
        one = records[slot % CHUNK_SLOTS : slot % CHUNK_SLOTS + 1]
        one["key"] = np.frombuffer(header.key, dtype=np.uint64)
        one["generation"] = generation
        one["parent_generation"] = header.parent_generation
        one["parent_segment"], one["parent_slot"] = header.parent_segment, header.parent_slot
        one["checksum"] = header.checksum
        one["namespace"] = numbers[header.tenant, header.identity]
        self.chunks[place] = records.tobytes()

    def lose_power(self, rng: random.Random) -> None:
        """What was written since the last sync is there, torn or gone, page by page and in any order."""
        self.waiting.clear()
        for segment, file in self.files.items():
            kept = bytearray(self.synced[segment])
            for at in range(0, len(kept), SECTOR_BYTES):
                content = bytes(file[at : at + SECTOR_BYTES])
                lost = self.unsynced.get((segment, at))
                if rng.random() < 0.5 and (lost is None or content != lost[0]):
                    kept[at : at + SECTOR_BYTES] = content
            self.files[segment] = kept
            self.synced[segment] = bytes(kept)
        self.unsynced.clear()

    def successor(self) -> "FakeDrive":
        """The same disk, with the threads of a new process."""
        return FakeDrive(
            self.segment_bytes, self.files, self.synced, self.unsynced, self.chunks, self.names, self.erased,
            self.owed, self.owed_tenants, fault=self.fault, doubt=self.doubt, idle=self.idle, drives=self.drives,
        )  # fmt: skip

    def flip(self, rng: random.Random, segment: int, slot: int, slot_bytes: int) -> None:
        """Change one bit of a slot."""
        at = slot_offset(slot_bytes, slot) + rng.randrange(slot_bytes)
        self.files[segment][at] ^= 1 << rng.randrange(8)


def _read(file: bytes | bytearray, slot_bytes: int, slot: int, target: Bytes) -> Header | None:
    """The header of a slot, with its block in `target`, if both are whole."""
    at = slot_offset(slot_bytes, slot)
    try:
        header = parse_header(bytes(file[at : at + HEADER_BYTES]))
    except FormatError:
        return None
    if header.block_bytes != target.size or header.stored_bytes > slot_bytes - HEADER_BYTES:
        return None
    stored = np.frombuffer(bytes(file[at + HEADER_BYTES : at + HEADER_BYTES + header.stored_bytes]), dtype=np.uint8)
    if xxhash.xxh3_64_intdigest(stored.tobytes()) != header.stored_checksum:
        return None
    if header.codec is Codec.RAW:
        target[:] = stored
    else:
        try:
            unpack(stored, target)
        except PlanesError:
            return None
    return header if xxhash.xxh3_64_intdigest(target.tobytes()) == header.checksum else None
