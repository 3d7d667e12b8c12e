"""Last copies of blocks, from the tier on a GPU back into DRAM. Owner thread; `DeviceThreads` copy.

lower -> reserve a slice, as a SAVE does -> Returning: copied into its slots, hashed there -> published if the bytes
         are those that were copied up -> the next slice ... -> HbmTiers.lowered
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import xxhash

from kvkernels.copyhash import Bytes
from kvkernels.device.port import DeviceError, Direction, Stream
from kvproto.device_frames import Fate
from kvstore.moving import Saving
from kvstore.sessions import Session, Tenant, Ticket
from kvstore.store import Store
from kvstore.tier.hbm import Copy, Hbm
from kvstored.device_work import PIECE_BYTES, DeviceThreads, Done, Region, Work
from kvstored.memory import HostMemory

log: Final = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Returned:
    """One block: where it lies on the device, and its slot. `checksum` of what lies there then; None: not copied."""

    ticket: Ticket
    source: int
    target: Bytes
    wanted: int  # the checksum that it must have
    checksum: int | None = None


@dataclass(slots=True, eq=False)
class Returning:
    """Blocks of the tier into slots of arenas, all of one size, and hashed there."""

    blocks: Sequence[Returned]
    regions: Sequence[Region]
    cancelled: bool = False
    error: DeviceError | None = None
    direction: Direction = Direction.TO_HOST
    _next: int = 0

    def step(self, threads: DeviceThreads, stream: Stream) -> bool:
        """See `Work`."""
        if not self._next:
            threads.want(self.regions)
        some = self.blocks[self._next : self._next + max(1, PIECE_BYTES // self.blocks[0].target.size)]
        moves = [(int(block.target.ctypes.data), block.source, block.target.size) for block in some]
        threads.copier.to_host(stream, moves).wait()
        for block in some:
            block.checksum = xxhash.xxh3_64_intdigest(block.target)  # type: ignore[arg-type]  # has the buffer protocol
        self._next += len(some)
        return self._next < len(self.blocks)


@dataclass(slots=True, eq=False)
class _Run:
    """Copies of a chain, one after another."""

    threads: DeviceThreads
    hbm: Hbm
    copies: Sequence[Copy]
    checksums: Sequence[int]  # that they must have
    saving: Saving


class Lowering:
    """Of all devices."""

    def __init__(
        self, store: Callable[[], Store], threads: Sequence[DeviceThreads], host: HostMemory,
        put: Callable[[DeviceThreads, Work, Callable[[Done], None]], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._threads = threads
        self._host = host
        self._put = put
        self._sessions: dict[Tenant, Session] = {}

    def lower(self, hbm: Hbm, copies: Sequence[Copy]) -> None:
        """See `HbmTiers.lower`: these are held, and follow each other."""
        store, first = self._store(), copies[0].name
        threads = next(each for each in self._threads if each.hbm is hbm)
        if threads.lost or first is None or not self._are_alone(copies):
            store.hbm.lowered(hbm, copies, 0)
            return
        namespace = first.namespace
        if namespace.tenant not in self._sessions:
            self._sessions[namespace.tenant] = store.own_session(namespace.tenant)
        names = [copy.name for copy in copies if copy.name is not None]
        keys = b"".join(name.key for name in names)
        saving = store.moving.save(
            self._sessions[namespace.tenant], namespace, first.parent, np.frombuffer(keys, dtype=np.uint64)
        )
        self._go_on(_Run(threads, hbm, copies, [name.checksum for name in names], saving))

    def _are_alone(self, copies: Sequence[Copy]) -> bool:
        """Something may have been dropped since they began to wait."""
        return all(self._store().hbm.is_alone(copy) for copy in copies)

    def _go_on(self, run: _Run) -> None:
        """The next slice of it, or its end."""
        store, saving = self._store(), run.saving
        dead = run.threads.lost or not self._are_alone(run.copies[saving.next :])
        granted = [] if dead else store.moving.reserve(saving)
        if not granted:
            store.hbm.lowered(run.hbm, run.copies, saving.fates.count(Fate.SAVED))
            return
        views = {arena: self._host.view(arena) for arena in {copy.arena for _, copy in granted}}
        blocks = []
        for index, copy in granted:
            target = views[copy.arena][copy.target_offset : copy.target_offset + copy.block_bytes]
            source = run.threads.hbm_address(run.copies[index])
            blocks.append(Returned(copy.ticket, source, target, run.checksums[index]))
        work = Returning(blocks, [Region(int(view.ctypes.data), view.size) for view in views.values()])
        self._put(run.threads, work, partial(self._returned, run, work))

    def _returned(self, run: _Run, work: Returning, done: Done) -> None:
        """A slice has ended. What is not what was copied up never was here."""
        if not done.over:
            return
        for block in work.blocks:
            good = block.checksum == block.wanted
            if block.checksum is not None and not good:
                log.error("damaged in memory of a GPU: device=%r", run.threads.name)
            self._store().moving.copied(run.saving, block.ticket, block.checksum if good else None, Fate.DEVICE)
        work.blocks = ()  # lets go of views
        self._go_on(run)
