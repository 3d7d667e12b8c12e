"""Writing behind: which blocks of DRAM get a copy on disk, and how the writes are put together. Owner thread.

    published (admission "all")  \\
    leased again ("second_touch") -> queue -> gather with unsaved ancestors -> [pack] -> places -> Save batches -> done
    FLUSH                        /             parent first                    smaller  segments.py

A block is written once and keeps its place for as long as it lies there. What waits in the queue can be evicted; what
is being packed or written is held. Back-pressure loses the copy, never the block.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from kvproto.limits import KEYS_PER_FRAME, MIB
from kvstore import blocks
from kvstore.blocks import DESCRIBED, DOOMED, U4, Rows, Tables
from kvstore.costing import Costing
from kvstore.ports import Workers
from kvstore.sessions import Namespace, Pool, Tenant
from kvstore.tier.codec import Choice
from kvstore.tier.erasure import Erasure
from kvstore.tier.format import HEADER_BYTES, Codec, Header, stored_slot_bytes
from kvstore.tier.orders import Outcome, Pack, Save
from kvstore.tier.segments import SETTLED_NS, Room, Segments

BATCH_BYTES = 8 * MIB  # one write of so many neighbouring slots
# Held for writing at a time. A read that comes meanwhile waits behind what the drive has taken: four writes of a batch
# each. Who waits for FLUSH has as many as bring the most, and as many again in front of the threads.
RUNNING_BYTES = 32 * MIB
HURRY_BYTES = 192 * MIB
DRAM_SHARE = 4  # and no more than this part of DRAM: what is held for writing cannot make room for who stores
# While clients store at full speed, writing behind takes processor time from them (two cores: a quarter of their
# speed), so it waits, unless somebody waits for it. Once three quarters of DRAM have been stored since the first block
# in the queue, one write at a time; from seven eighths on, all it can: blocks would be evicted before their turn.
GENTLE_BYTES = BATCH_BYTES
AHEAD_BYTES = 64 * MIB  # that give way at once on a full disk, for writes to come: each time waits for a commit
AHEAD_SHARE = 16  # but no more than this part of the pool
CALM_NS = 30 * 10**6  # nothing was published for so long: nobody is storing
BUSY_BYTES_PER_S = 512 * MIB
QUEUE = 1 << 20  # ends of chains that wait; past that nothing more is admitted
TURN_BLOCKS = 256  # once so many are on their way, the owner thread does something else first: 10 us each
LATE_NS = 10**9  # what is written for so long may be on a drive that hangs: others go on, within twice the limit
WAIT_NS = 10**9  # how long until what waits for places, or a segment, looks again whether others are to give way
PATIENCE = 5  # and after so many times of that nobody waits for this pool any more, until a place has come free there
LATER_NS = 5 * 10**6  # how long a block whose parent is still being written is left alone


class Admission(StrEnum):
    """Which blocks are written without being asked for."""

    ALL = "all"
    SECOND_TOUCH = "second_touch"
    NONE = "none"


@dataclass(slots=True)
class Tally:
    """Totals, in blocks unless the name says otherwise."""

    saved: int = 0
    saved_bytes: int = 0
    packed: int = 0
    dropped: int = 0  # admitted, and given up for lack of room
    not_worth: int = 0  # slower to read than to compute
    save_faults: int = 0


class Demotion:
    """The queue and the writes that run."""

    def __init__(
        self,
        tables: Tables,
        segments: Segments,
        workers: Workers,
        tenants: dict[str, Tenant],
        namespaces: dict[int, Namespace],
        *,
        most_rows: int,
        dram_bytes: int,
        bytes_per_s: int,
        choice: Choice,
        costing: Costing,
        erasure: Erasure,
    ) -> None:
        """`dram_bytes`: of all, `bytes_per_s`: to be written at most, 0 for no limit."""
        self._erasure = erasure
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._tenants = tenants
        self._namespaces = namespaces
        self._most = most_rows
        self._bytes_per_s = bytes_per_s
        self._budget = float(bytes_per_s)
        self._budget_ns = 0
        self._choice = choice
        self._costing = costing
        self._queue: deque[tuple[int, int, int]] = deque()  # row, generation, what had been published by then
        self._published_bytes = 0
        self._published_ns = 0
        self._dram_bytes = dram_bytes
        self._share_bytes = max(1, dram_bytes // DRAM_SHARE)
        self._window_ns = 0  # since when it is counted what is published
        self._window_bytes = 0
        self._busy = False  # were clients storing at full speed when that was last looked at?
        self.hurry = False  # does somebody wait?
        self._rows: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._described: Rows = np.zeros(KEYS_PER_FRAME, dtype=DESCRIBED)
        self._later_ns = 0
        self._faults_seen = 0  # when places were last waited for
        self._waits_since_ns = 0  # what is to be written, for places; 0: it has found some
        self._again_ns = 0  # when it looks again at the latest, if it is stuck
        self._in_vain: dict[int, int] = {}  # pools that were waited for in vain, and when others may give way again
        self.stuck = False  # waits for a segment, or for places that the index has to forget
        self.enabled = False
        self.running: dict[int, list[Pack] | list[Save]] = {}  # batches, by the identity of their first order
        self.running_bytes = 0
        self._began: dict[int, tuple[int, int]] = {}  # of each: when, and its bytes; the first one first
        self._now_ns = 0
        self.tally = Tally()

    # -- admission -----------------------------------------------------------------------------------------------

    def admit(self, rows: Iterable[int], generations: Iterable[int]) -> None:
        """Queue blocks, each with what it continues."""
        table = self._tables.blocks
        for row, generation in zip(rows, generations, strict=True):
            if len(self._queue) >= QUEUE:
                self.tally.dropped += 1
                return
            if not table["flags"][row] & blocks.QUEUED:
                table["flags"][row] |= blocks.QUEUED
                self._queue.append((row, generation, self._published_bytes))

    def published(self, block_bytes: int, now_ns: int) -> None:
        """Somebody stores."""
        self._published_bytes += block_bytes
        self._published_ns = now_ns
        self._window_bytes += block_bytes
        passed_ns = now_ns - self._window_ns
        if passed_ns >= CALM_NS:
            self._busy = self._window_bytes * 10**9 > BUSY_BYTES_PER_S * passed_ns
            self._window_ns, self._window_bytes = now_ns, 0

    def _most_running(self, now_ns: int) -> int:
        """How many bytes may be on their way to disk now."""
        if self.hurry:
            return min(HURRY_BYTES, self._share_bytes)
        if not self._busy or not self._queue or now_ns - self._published_ns >= CALM_NS:
            return min(RUNNING_BYTES, self._share_bytes)
        behind = self._published_bytes - self._queue[0][2]
        if 4 * behind < 3 * self._dram_bytes:
            return 0
        return min(GENTLE_BYTES if 8 * behind < 7 * self._dram_bytes else RUNNING_BYTES, self._share_bytes)

    def _on_their_way(self, now_ns: int) -> tuple[int, int]:
        """Bytes that count, and when it will be fewer though nothing ends, or -1. As many as may run may be late."""
        late, most = 0, min(HURRY_BYTES, self._share_bytes)
        for began_ns, some in self._began.values():
            if late + some > most:
                break
            if now_ns < began_ns + LATE_NS:
                return self.running_bytes - late, began_ns + LATE_NS
            late += some
        return self.running_bytes - late, -1

    def took(self, seconds: float, read_bytes: int) -> None:
        """Reads have ended: what reading costs decides what is worth writing."""
        self._costing.read(read_bytes, seconds)

    @property
    def waiting(self) -> int:
        """Chains in the queue."""
        return len(self._queue)

    @property
    def behind_bytes(self) -> int:
        """What clients have stored since the chain was queued that waits longest; 0 if none waits."""
        return self._published_bytes - self._queue[0][2] if self._queue else 0

    # -- the pump ------------------------------------------------------------------------------------------------

    def pump(self, now_ns: int) -> None:
        """Start writes while there is something to write, and room and budget for it."""
        self._now_ns = now_ns
        if not self.enabled:
            return
        begun = 0
        if self.stuck and now_ns >= self._again_ns:
            self.stuck = False
        while self._queue and not self.stuck and now_ns >= self._later_ns and begun < TURN_BLOCKS:
            if self._on_their_way(now_ns)[0] >= self._most_running(now_ns) or not self._afford(now_ns):
                return
            gathered = self._start(now_ns)
            if not gathered:
                return
            begun += gathered

    def next_ns(self) -> int | None:
        """When the pump has something to do without an event, 0 for at once; None if only an event can help."""
        if not self.enabled or not self._queue:
            return None
        if self.stuck:
            return self._again_ns
        running_bytes, fewer_ns = self._on_their_way(self._now_ns)
        if running_bytes >= min(HURRY_BYTES if self.hurry else RUNNING_BYTES, self._share_bytes):
            return fewer_ns if fewer_ns >= 0 else None
        if running_bytes >= self._most_running(self._published_ns):
            return self._published_ns + CALM_NS
        if self._bytes_per_s and self._budget <= 0:
            return max(self._later_ns, self._budget_ns + int(-self._budget / self._bytes_per_s * 1e9) + 10**6)
        return self._later_ns

    def _afford(self, now_ns: int) -> bool:
        if not self._bytes_per_s:
            return True
        passed_s = (now_ns - self._budget_ns) / 1e9 if self._budget_ns else 0.0
        self._budget_ns = now_ns
        self._budget = min(self._bytes_per_s / 4, self._budget + passed_s * self._bytes_per_s)
        return self._budget > 0

    def _start(self, now_ns: int) -> int:
        """Gather one batch of one namespace and send it on its way. How many blocks; 0 if it has to wait."""
        gathered, namespace, postponed = 0, None, 0
        table = self._tables.blocks
        most = KEYS_PER_FRAME
        while self._queue and gathered < most:
            row, generation, _ = self._queue[0]
            if int(table["generation"][row]) != generation or not table["flags"][row] & blocks.QUEUED:
                self._queue.popleft()  # evicted, written or dropped meanwhile
                continue
            mine = self._namespaces[int(table["namespace"][row])]
            if namespace is None:
                namespace = mine
                most = min(most, max(1, min(BATCH_BYTES, self._share_bytes) // mine.slot_bytes))
            elif mine is not namespace:
                break
            end, whole = blocks.gather_unsaved(self._tables, row, self._rows[:most], gathered)
            if end < 0:  # its parent is on its way: look again soon
                self._queue.rotate(-1)
                postponed += 1
                if postponed > min(len(self._queue), 64):
                    self._later_ns = now_ns + LATER_NS
                    break
                continue
            gathered = end
            if whole:
                self._queue.popleft()
                table["flags"][row] &= ~blocks.QUEUED
        if not gathered or namespace is None:
            return 0
        self._send(namespace, gathered, now_ns)
        return gathered

    def _send(self, namespace: Namespace, count: int, now_ns: int) -> None:
        if not self._costing.worth_writing(namespace, self._rows[:count]):
            self.tally.not_worth += count
            self._give_up(namespace, self._rows[:count])
            return
        codec = self._choice.codec_for(namespace, self._workers)
        if codec is not Codec.RAW:
            self._pack(namespace, codec, count)
            return
        self._save(namespace, self._rows[:count].copy(), HEADER_BYTES + namespace.slot_bytes, {}, now_ns)

    # -- packing -------------------------------------------------------------------------------------------------

    def _pack(self, namespace: Namespace, codec: Codec, count: int) -> None:
        blocks.hold_rows(self._tables, self._rows, 0, count)
        described = self._describe(self._rows, count)
        block_bytes = namespace.identity.block_bytes
        batch = []
        for one in described.tolist():
            arena, offset = self._place(one[6], namespace.slot_bytes)
            batch.append(Pack(one[5], one[2], arena, offset, block_bytes, codec))
        self._submitted(batch, namespace.slot_bytes)

    def packed(self, batch: list[Pack], now_ns: int) -> None:
        """Packing has ended: each block is written in the smallest slot that takes it."""
        table = self._tables.blocks
        namespace = self._namespaces[int(table["namespace"][batch[0].row])]
        self._ended(batch, namespace.slot_bytes)
        by_size: dict[int, list[Pack]] = {}
        for order in batch:
            small = order.packed
            self._choice.learn(namespace, order.block_bytes, small.stored_bytes if small else order.block_bytes)
            slot_bytes = HEADER_BYTES + namespace.slot_bytes
            if small is not None:
                slot_bytes = min(slot_bytes, _size_class(stored_slot_bytes(small.stored_bytes), namespace.slot_bytes))
            by_size.setdefault(slot_bytes, []).append(order)
        for slot_bytes, orders in by_size.items():
            rows = np.array([order.row for order in orders], dtype=np.uint32)
            alive = rows[table["state"][rows] != DOOMED]
            self._save(namespace, alive, slot_bytes, {order.row: order for order in orders}, now_ns)
        rows = np.array([order.row for order in batch], dtype=np.uint32)
        dead = rows[table["state"][rows] == DOOMED]
        blocks.ungather(self._tables, dead, 0, dead.size)
        blocks.unhold_rows(self._tables, rows, 0, rows.size)

    # -- writing -------------------------------------------------------------------------------------------------

    def _save(self, namespace: Namespace, rows: U4, slot_bytes: int, packs: dict[int, Pack], now_ns: int) -> None:
        """Find places for these blocks and write them there; what finds none waits, or is given up."""
        tables, tenant = self._tables, namespace.tenant
        pool = self._segments.pool(tenant, slot_bytes)
        done, now = 0, np.uint64(now_ns)
        while pool is not None and done < rows.size:
            first, done = done, blocks.take_places(tables, pool.number, rows, done, rows.size, self._most, now)
            if done > first:
                self._waits_since_ns = 0
                self._in_vain.pop(pool.number, None)
                self._write(namespace, rows[first:done], slot_bytes, packs)
                if self._queue and int(tables.book[blocks.DISK_USED]) < self._most:
                    self._segments.make_ahead(pool, len(self._queue), now_ns)
                continue
            if now_ns < self._in_vain.get(pool.number, 0):
                break
            late, nobodys = self._erasure.late(now_ns), self._nobodys(pool)
            coming = nobodys - self._erasure.held_up(late, pool.number)
            missing = int(rows.size) - done - coming
            patient = nobodys > 0 and self._goes_on(pool)
            room = Room.SOON if patient and missing <= 0 else Room.EVICT
            if room is Room.EVICT and int(tables.book[blocks.DISK_USED]) < self._most:
                room = self._segments.make_room(pool, now_ns)
            if room is Room.FULL and self._detach(namespace, pool, missing, now_ns):
                room = Room.SOON
            if room is Room.EVICT and self._evict(tenant, pool, missing, coming, late):
                room = Room.SOON
            if self._waits(pool, now_ns, comes=patient or room is Room.SOON):
                self._postpone(rows[done:])
                return
            break
        if done < rows.size:
            self.tally.dropped += rows.size - done
            self._give_up(namespace, rows[done:])

    def _goes_on(self, pool: Pool) -> bool:
        """Are places that are being given up waited for? Not where writes fail, or what has failed would be tried again
        with each block that continues it.
        """
        fails = self._faults_seen != self.tally.save_faults
        self._faults_seen = self.tally.save_faults
        return not fails and pool.number not in self._in_vain

    def _waits(self, pool: Pool, now_ns: int, *, comes: bool) -> bool:
        """Wait, and all others with it, for what is to come; not for ever: a drive may hang, or the index refuse."""
        if comes and pool.number not in self._in_vain:
            self._waits_since_ns = self._waits_since_ns or now_ns
            if now_ns < self._waits_since_ns + PATIENCE * WAIT_NS:
                self.stuck, self._again_ns = True, now_ns + WAIT_NS
                return True
            self._in_vain[pool.number] = now_ns
        if pool.number in self._in_vain:
            self._in_vain[pool.number] = now_ns + WAIT_NS
        self._waits_since_ns = 0
        return False

    def _nobodys(self, pool: Pool) -> int:
        """Places of a pool that nobody has any more: free once they are erased, and the index has forgotten them."""
        arenas, shift = self._tables.arenas, int(self._tables.book[blocks.SHIFT])
        mine = arenas["pool"] == pool.number + 1
        quarantined = sum(bool(mine[place >> shift]) for place in self._erasure.quarantined)
        return int(arenas["used"][mine].sum()) - int(self._tables.pools["blocks"][pool.number]) - quarantined

    def _detach(self, namespace: Namespace, pool: Pool, wanted: int, now_ns: int) -> bool:
        """Have blocks that lie in DRAM too, and that nobody has touched for a while, give way. Whether one did."""
        before = np.uint64(max(0, now_ns - SETTLED_NS))
        detached = 0
        while detached < wanted and blocks.detach_oldest(self._tables, namespace.pool.number, pool.number, before):
            detached += 1
        return detached > 0

    def _evict(self, tenant: Tenant, pool: Pool, wanted: int, coming: int, late: set[int]) -> bool:
        """Have so many of the oldest leaves give way, and some more, since it takes a commit: less those that come.
        Those of drives that take long do not count, and give way where they are in front of others, so many at once.
        Whether one did.
        """
        if wanted <= 0 or (late and late.issuperset(self._drives_of(pool))):
            return False
        ahead = min(AHEAD_BYTES // pool.slot_bytes, int(self._tables.pools["blocks"][pool.number]) // AHEAD_SHARE)
        most, wanted, evicted = max(wanted, ahead), max(wanted, ahead - coming), 0
        while wanted > 0 and evicted < most:
            wanted -= not late or self._drive_of_next(pool) not in late
            if not blocks.evict(self._tables, tenant.index, pool.number):
                break
            evicted += 1
        return evicted > 0

    def _drives_of(self, pool: Pool) -> set[int]:
        positions = np.flatnonzero(self._tables.arenas["pool"] == pool.number + 1).tolist()
        return {self._workers.drive_of(self._segments.number_at(position)) for position in positions}

    def _drive_of_next(self, pool: Pool) -> int:
        """Where the leaf lies that would give way next."""
        disk = int(self._tables.blocks["disk"][int(blocks.next_victim(self._tables, pool.number))])
        return self._workers.drive_of(self._segments.number_at(disk >> int(self._tables.book[blocks.SHIFT])))

    def _give_up(self, namespace: Namespace, rows: U4) -> None:
        """These will not be written, nor what waits to be written behind them: or the same would be tried for ever."""
        blocks.ungather(self._tables, rows, 0, rows.size)
        table = self._tables.blocks
        if self._queue:
            row, generation, _ = self._queue[0]
            if int(table["namespace"][row]) == namespace.number:
                self._queue.popleft()
                if int(table["generation"][row]) == generation:
                    table["flags"][row] &= ~blocks.QUEUED

    def _postpone(self, rows: U4) -> None:
        table = self._tables.blocks
        table["flags"][rows] = (table["flags"][rows] & ~blocks.SAVING) | blocks.QUEUED
        for row, generation in zip(rows[::-1].tolist(), table["generation"][rows[::-1]].tolist(), strict=True):
            self._queue.appendleft((row, generation, self._published_bytes))

    def _write(self, namespace: Namespace, rows: U4, slot_bytes: int, packs: dict[int, Pack]) -> None:
        tables = self._tables
        shift = int(tables.book[blocks.SHIFT])
        mask = (1 << shift) - 1
        identity = namespace.identity.canonical()
        digest, tenant, block_bytes = namespace.digest, namespace.tenant.name, namespace.identity.block_bytes
        described = self._describe(rows, rows.size)
        keys, parents = described["key"].tobytes(), described["parent_key"].tobytes()
        numbers: dict[int, int] = {}
        batch: list[Save] = []
        last = (-1, -1)
        for i, one in enumerate(described.tolist()):
            _, _, generation, parent_generation, checksum, row, slot, disk, parent_disk, _, _, _ = one
            position, place = disk >> shift, disk & mask
            segment = numbers.get(position) or numbers.setdefault(position, self._segments.number_at(position))
            arena, offset = self._place(slot, namespace.slot_bytes)
            pack = packs.get(row)
            small = pack.packed if pack is not None else None
            header = Header(
                keys[32 * i : 32 * i + 32], parents[32 * i : 32 * i + 32], digest, tenant, generation,
                parent_generation, self._segments.number_at(parent_disk >> shift) if parent_disk else 0,
                parent_disk & mask, segment, place, block_bytes, small.stored_bytes if small else block_bytes, checksum,
                small.stored_checksum if small else checksum, small.codec if small else Codec.RAW, identity,
            )  # fmt: skip
            if batch and (segment != last[0] or place <= last[1] or len(batch) * slot_bytes >= BATCH_BYTES):
                self._submitted(batch, slot_bytes)
                batch = []
            last = (segment, place)
            batch.append(Save(row, header, slot_bytes, arena, offset, small))
        self._submitted(batch, slot_bytes)

    def _describe(self, rows: U4, count: int) -> Rows:
        described = self._described[:count]
        blocks.describe(self._tables, rows, 0, count, described)
        return described

    def _place(self, slot: int, slot_bytes: int) -> tuple[int, int]:
        shift = int(self._tables.book[blocks.SHIFT])
        arena = int(self._tables.arenas["id"][slot >> shift])
        return arena, (slot & ((1 << shift) - 1)) * slot_bytes

    def _submitted(self, batch: "list[Pack] | list[Save]", slot_bytes: int) -> None:
        self.running[id(batch[0])] = batch
        self.running_bytes += len(batch) * slot_bytes
        self._began[id(batch[0])] = self._now_ns, len(batch) * slot_bytes
        if isinstance(batch[0], Save):
            self._budget -= len(batch) * slot_bytes  # what is packed is written later, and is less by then
        self._workers.submit(batch)

    def _ended(self, batch: "list[Pack] | list[Save]", slot_bytes: int) -> None:
        del self.running[id(batch[0])], self._began[id(batch[0])]
        self.running_bytes -= len(batch) * slot_bytes

    def saved(self, batch: list[Save]) -> list[Save]:
        """Writes have ended. Returns those whose blocks lie on disk now."""
        self._ended(batch, batch[0].slot_bytes)
        table = self._tables.blocks
        good: list[Save] = []
        for order in batch:
            dropped = int(table["state"][order.row]) == DOOMED
            if blocks.finish_save(self._tables, order.row, order.outcome is Outcome.DONE):
                good.append(order)
            elif not dropped:
                self.tally.save_faults += 1
        self.tally.saved += len(good)
        self.tally.saved_bytes += sum(order.slot_bytes for order in good)
        # Not when it is packed: what then finds no place is packed again.
        self.tally.packed += sum(order.header.codec is not Codec.RAW for order in good)
        return good


def _size_class(slot_bytes: int, block_slot_bytes: int) -> int:
    """A slot size on disk that at most 16 share a block size: so that few pools, and segments, do."""
    step = max(4096, -(-block_slot_bytes // 16 // 4096) * 4096)
    return HEADER_BYTES + -(-(slot_bytes - HEADER_BYTES) // step) * step
