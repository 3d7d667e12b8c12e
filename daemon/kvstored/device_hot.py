"""LOAD, SAVE and CANCEL_TRANSFER: what mode daemon copies. Owner thread; `DeviceThreads` do it.

LOAD    -> MOVING; what is there is held -> Filling -> LOADED, group of layers by group; the last says how it ended
SAVE    -> MOVING; slots are reserved -> Emptying -> still wanted? published, the next slice ... -> SAVED
CANCEL_TRANSFER -> CANCELLED            when nothing is written any more; at once for what is over
the session ends -> its transfers are cancelled; its memory is closed when the last of them has ended

ATTACH and DETACH are `device_attach.py`'s.
"""

import logging
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np

from kvproto import device_frames, frames, policy_frames
from kvproto.device_frames import Fate, Loaded, State
from kvproto.errors import AttachError, KvError, LimitError, UsageError
from kvproto.frames import Head, Verb
from kvproto.limits import TRANSFERS_PER_SESSION
from kvproto.policy_frames import Tier
from kvstore.blocks import U4, U8
from kvstore.moving import Held
from kvstore.report import DeviceReport
from kvstore.sessions import Lease, Namespace, Parked, Session, Stream
from kvstore.store import Store
from kvstored import device_report
from kvstored.clients import Clients
from kvstored.connection import Connection
from kvstored.device_attach import Attached
from kvstored.device_hbm import HbmVerbs
from kvstored.device_records import Memory, Mover, Transfer, check_free, check_targets
from kvstored.device_work import Block, DeviceThreads, Done, Emptying, Filling, Region, Work
from kvstored.memory import HostMemory

_KEY_WORDS: Final = 4
_TIER_HEAD: Final = struct.Struct("<IB")  # how PIN and PREFETCH begin: namespace, tier
_NO_PLACES: Final[U4] = np.zeros(0, dtype=np.uint32)
Handler = Callable[[Connection, Session, Head], None]
log = logging.getLogger(__name__)


class DeviceVerbs:
    """All of it. `hot.py` asks `handlers`, `ready` and `leased`; the store says `cut`; the daemon's loop `finish`."""

    def __init__(
        self, threads: Sequence[DeviceThreads], frame: memoryview, words: U8, store: Callable[[], Store],
        clients: Clients, memory: HostMemory, tell: Callable[[Session, bytes], None],
    ) -> None:  # fmt: skip
        self._threads = threads
        self._frame = frame
        self._words = words
        self._store = store
        self._clients = clients
        self._host = memory
        self._tell = tell
        self._attached = Attached(threads, frame, self._put, self._send, clients.hang_up)
        self._hbm = HbmVerbs(threads, store, memory, self._put, self._give_back)
        self._promotions = self._hbm.promotions
        self._waiting: dict[Lease | Parked, Transfer | None] = {}  # None: not wanted any more
        self._works: dict[Work, Callable[[Done], None]] = {}
        memory.unmapping = self._unmapping

    def handlers(self) -> dict[int, Handler]:
        """By verb."""
        return {
            Verb.ATTACH: self._attached.attach,
            Verb.DETACH: self._attached.detach,
            Verb.LOAD: self._load,
            Verb.SAVE: self._save,
            Verb.CANCEL_TRANSFER: self._cancel_transfer,
        }

    def why_not(self) -> str:
        """Why there is no mode daemon; empty: there is."""
        if not self._threads:
            return "no GPU is configured (gpu.devices)"
        lost = [threads for threads in self._threads if threads.lost]
        return f"lost: {lost[0].lost}" if len(lost) == len(self._threads) else ""

    @property
    def threads(self) -> Sequence[DeviceThreads]:
        """Of the devices that are configured and were there at the start."""
        return self._threads

    @property
    def emulated(self) -> bool:
        """Is any of them an emulation? Whoever is told of a device is told that, too."""
        return any(threads.device.properties.emulated for threads in self._threads)

    def warnings(self) -> Iterator[str]:
        """For status: what is no GPU, and what works no more."""
        return device_report.warnings(self._threads)

    def begin(self, store: Store) -> None:
        """The store is there, and hears of the tiers on GPUs."""
        self._hbm.begin(store)

    def report(self) -> tuple[DeviceReport, ...]:
        """How each of them stands, for metrics."""
        return tuple(device_report.report(threads, self._attached.bytes(threads)) for threads in self._threads)

    def _unmapping(self, address: int) -> None:
        """An arena goes. On the memory thread."""
        for threads in self._threads:
            threads.unmapping(address)

    # -- LOAD ----------------------------------------------------------------------------------------------------

    def _load(self, connection: Connection, session: Session, head: Head) -> None:
        mover = self._attached.mover(connection, session)
        load = device_frames.parse_load(self._frame, head)
        namespace = self._store().namespace(session, load.namespace)
        try:
            memory = self._memory(mover, load.memory, namespace, load.pages)
            check_targets(memory, load)
        except (UsageError, LimitError, AttachError) as error:
            self._refuse(connection, head, error)
            return
        memory.threads.tally.loads += 1
        self._hbm.settle(memory.threads, namespace)
        memory.filling.update(load.pages)
        transfer = self._begin(mover, memory, namespace, load.pages, head)
        transfer.groups = load.groups
        keys = self._keys(load.keys_at, head.count)
        found = self._store().moving.lease(session, namespace, head.request, keys, 0, head.count, load.wait_ns)
        if isinstance(found, Held):
            self._fill(transfer, found)
        else:
            transfer.waits_for = found
            self._waiting[found] = transfer

    def ready(self, stream: Stream, left: int) -> bool:
        """Blocks of a lease have come; whether it is a LOAD's. It begins when all are there."""
        if stream.lease not in self._waiting:
            return False
        if not left:
            transfer = self._waiting.pop(stream.lease)
            if transfer is None:
                self._store().moving.drop(stream.lease.session, stream.lease)
            else:
                self._fill(transfer, self._store().moving.come(stream, transfer.namespace))
        return True

    def leased(self, session: Session, parked: Parked, lease: Lease | None, locations: U4) -> bool:
        """A LEASE that had to wait is answered; whether it is a LOAD's."""
        if parked not in self._waiting:
            return False
        transfer = self._waiting.pop(parked)
        moving = self._store().moving
        if transfer is None:
            if lease is not None:
                moving.drop(session, lease)
        elif lease is not None and lease.stream is not None:
            transfer.waits_for = lease
            self._waiting[lease] = transfer
        else:
            self._fill(transfer, moving.take(session, transfer.namespace, lease, locations))
        return True

    def cut(self, lease: Lease) -> None:
        """A lease has ended while blocks came for it, as one does that a DELETE has met: a LOAD gets nothing by it."""
        transfer = self._waiting.pop(lease, None)
        if transfer is not None:
            self._fill(transfer, self._store().moving.take(lease.session, transfer.namespace, None, _NO_PLACES))

    def _fill(self, transfer: Transfer, held: Held) -> None:
        transfer.waits_for, transfer.held = None, held
        opened = transfer.memory.opened
        assert opened is not None, "memory that is in use stays open"
        sources = self._promotions.sources(transfer.memory.threads, held)
        transfer.copies = sources.copies
        transfer.work = Filling(
            opened.pages,
            transfer.pages[: len(held.places)],
            sources.addresses,
            sources.regions,
            transfer.groups,
            [copy is not None for copy in sources.copies],
        )
        if not held.places:
            self._end_load(transfer, State.DONE)
            return
        self._tell_loaded(transfer, State.MOVING)
        self._put(transfer.memory.threads, transfer.work, partial(self._filled, transfer, transfer.work))

    def _filled(self, transfer: Transfer, work: Filling, done: Done) -> None:
        """A piece of it is there, or it is over."""
        if not done.over:
            # A client that is behind with reading need not hear of each: the next one says as much.
            if done.groups_done > transfer.told and not transfer.of.connection.waiting:
                transfer.told = done.groups_done
                self._tell_loaded(transfer, State.MOVING)
            return
        transfer.told = done.groups_done
        if work.error is not None:
            transfer.memory.threads.tally.failed += 1
            log.warning("load failed: device=%r reason=%s", transfer.memory.threads.name, work.error)
        state = State.DONE if done.groups_done == transfer.groups else State.CANCELLED
        self._end_load(transfer, State.FAILED if work.error is not None else state)

    def _end_load(self, transfer: Transfer, state: State) -> None:
        if transfer.held is not None:
            if state is State.DONE:
                transfer.told = transfer.groups
                transfer.memory.threads.tally.loaded_bytes += (
                    len(transfer.held.places) * transfer.namespace.identity.block_bytes
                )
            self._promotions.loaded(
                transfer.memory.threads, transfer.held, transfer.copies, transfer.namespace, good=state is State.DONE
            )
        transfer.memory.filling.difference_update(transfer.pages)
        self._tell_loaded(transfer, state)
        self._end(transfer)

    def _tell_loaded(self, transfer: Transfer, state: State) -> None:
        blocks = len(transfer.held.places) if transfer.held is not None else 0
        self._send(transfer.of, device_frames.build_loaded(Loaded(transfer.number, blocks, transfer.told, state)))

    def _give_back(self, held: Held) -> None:
        self._store().moving.give_back(held)

    def nearer(self, handler: Handler) -> Handler:
        """PIN and PREFETCH for the tier on a GPU mean the one that the session has memory on."""

        def handle(connection: Connection, session: Session, head: Head) -> None:
            mover = self._attached.movers.get(session)
            policy_frames.pin_keys(head)  # is it as long as it says?
            number, tier = _TIER_HEAD.unpack_from(self._frame, head.body)
            if tier == Tier.HBM and mover is not None:
                namespace = self._store().namespace(session, number)
                for memory in list(mover.memories.values())[:1]:
                    self._hbm.settle(memory.threads, namespace)
            handler(connection, session, head)

        return handle

    # -- SAVE ----------------------------------------------------------------------------------------------------

    def _save(self, connection: Connection, session: Session, head: Head) -> None:
        mover = self._attached.mover(connection, session)
        save = device_frames.parse_save(self._frame, head)
        namespace = self._store().namespace(session, save.namespace)
        try:
            memory = self._memory(mover, save.memory, namespace, save.pages)
            check_free(memory.filling, save.pages)
        except (UsageError, LimitError, AttachError) as error:
            self._refuse(connection, head, error)
            return
        memory.threads.tally.saves += 1
        said_ns = save.recompute_us * 1000
        namespace.recompute_ns = said_ns or namespace.recompute_ns
        memory.emptying.update(save.pages)
        transfer = self._begin(mover, memory, namespace, save.pages, head)
        transfer.until_ns = device_frames.deadline_of(save, time.monotonic_ns())
        keys = self._keys(save.keys_at, head.count)
        transfer.saving = self._store().moving.save(session, namespace, save.parent, keys, said_ns)
        self._empty(transfer)

    def _empty(self, transfer: Transfer) -> None:
        """The next slice of it, or its end."""
        saving, opened = transfer.saving, transfer.memory.opened
        assert saving is not None, "a LOAD saves nothing"
        assert opened is not None, "memory that is in use stays open"
        granted = self._store().moving.reserve(saving) if _is_wanted(transfer) else []
        self._store().flush_outcomes(transfer.of.session)  # a LEASE may have waited for one that is not to be
        if not granted:
            self._end_save(transfer)
            return
        views = {arena: self._host.view(arena) for arena in {copy.arena for _, copy in granted}}
        blocks = [
            Block(
                copy.ticket, transfer.pages[index],
                views[copy.arena][copy.target_offset : copy.target_offset + copy.block_bytes],
            )
            for index, copy in granted
        ]  # fmt: skip
        regions = [Region(int(view.ctypes.data), view.size) for view in views.values()]
        transfer.work = Emptying(opened.pages, blocks, regions)
        self._put(transfer.memory.threads, transfer.work, partial(self._emptied, transfer, transfer.work))

    def _emptied(self, transfer: Transfer, work: Emptying, done: Done) -> None:
        """All of a slice has ended; those of its blocks that were not copied never will be there."""
        saving = transfer.saving
        if not done.over or saving is None:
            return
        store, session = self._store(), transfer.of.session
        instead = Fate.CANCELLED if work.error is None else Fate.DEVICE
        wanted = _is_wanted(transfer)  # asked now: all that is here was read before
        for block in work.blocks:
            checksum = block.checksum if wanted else None
            store.moving.copied(saving, block.ticket, checksum, instead)
            if checksum is not None:
                transfer.memory.threads.tally.saved_bytes += block.target.size
        if work.error is not None:
            transfer.memory.threads.tally.failed += 1
            log.warning("save failed: device=%r reason=%s", transfer.memory.threads.name, work.error)
            saving.fates[saving.next :] = [Fate.DEVICE] * (saving.count - saving.next)
            saving.next = saving.count
        work.blocks = ()  # lets go of views
        self._empty(transfer)
        if not session.attached:
            self._clients.reap(transfer.of.connection)

    def _end_save(self, transfer: Transfer) -> None:
        assert transfer.saving is not None, "a LOAD saves nothing"
        transfer.memory.emptying -= Counter(transfer.pages)  # forgets those that nobody reads
        self._send(transfer.of, device_frames.build_saved(transfer.number, transfer.saving.fates))
        self._end(transfer)

    # -- of both -------------------------------------------------------------------------------------------------

    def _memory(self, mover: Mover, number: int, namespace: Namespace, pages: Sequence[int]) -> Memory:
        """Pages that there are, of the namespace's size. Raises UsageError, LimitError, AttachError."""
        memory = mover.memories.get(number)
        if memory is None or memory.closing or memory.opened is None:
            raise UsageError("no such memory is attached")
        if memory.threads.lost:
            raise AttachError(f"{memory.threads.name} is lost: {memory.threads.lost}")
        shared = memory.opening.shared
        if len(shared.pieces) * shared.piece_bytes != namespace.identity.block_bytes:
            page_bytes = len(shared.pieces) * shared.piece_bytes
            raise UsageError(f"pages of {page_bytes} bytes, and blocks of {namespace.identity.block_bytes}")
        if max(pages) >= shared.blocks:
            raise UsageError(f"page {max(pages)} of {shared.blocks}")
        if len(mover.transfers) >= TRANSFERS_PER_SESSION:
            raise LimitError(f"{TRANSFERS_PER_SESSION} transfers are under way already")
        return memory

    def _keys(self, at: int, count: int) -> U8:
        return self._words[at >> 3 : (at >> 3) + _KEY_WORDS * count].copy()

    def _begin(
        self, mover: Mover, memory: Memory, namespace: Namespace, pages: Sequence[int], head: Head
    ) -> Transfer:  # fmt: skip
        transfer = Transfer(mover.next_transfer, mover, memory, namespace, pages)
        mover.next_transfer += 1
        mover.transfers[transfer.number] = transfer
        memory.users += 1
        self._send(mover, device_frames.build_transfer(Verb.MOVING, head.request, transfer.number))
        return transfer

    def _cancel_transfer(self, connection: Connection, session: Session, head: Head) -> None:
        mover = self._attached.mover(connection, session)
        number = device_frames.parse_transfer(self._frame, head)
        transfer = mover.transfers.get(number)
        if transfer is None:
            connection.send(device_frames.build_transfer(Verb.CANCELLED, head.request, number))
            return
        if len(transfer.cancels) >= TRANSFERS_PER_SESSION:
            raise LimitError(f"transfer {number} was cancelled {TRANSFERS_PER_SESSION} times")
        transfer.cancels.append(head.request)
        self._cancel(transfer)

    def _cancel(self, transfer: Transfer) -> None:
        """It ends soon; at once while it only waits."""
        transfer.unwanted = True
        waits_for = transfer.waits_for
        if transfer.work is not None:
            transfer.work.cancelled = True
        elif waits_for is not None:
            if isinstance(waits_for, Lease):
                del self._waiting[waits_for]
                self._store().moving.drop(transfer.of.session, waits_for)
            elif transfer.of.gone:
                del self._waiting[waits_for]  # nobody answers it any more
            else:
                self._waiting[waits_for] = None
            transfer.waits_for = None
            self._end_load(transfer, State.CANCELLED)

    def _end(self, transfer: Transfer) -> None:
        mover, memory = transfer.of, transfer.memory
        del mover.transfers[transfer.number]
        memory.users -= 1
        for request in transfer.cancels:
            self._send(mover, device_frames.build_transfer(Verb.CANCELLED, request, transfer.number))
        self._attached.close_if_unused(mover, memory)
        if mover.gone:
            self._attached.open_some()
            self._attached.forget_if_done(mover)

    def parted(self, session: Session) -> None:
        """A session has ended, its process perhaps not. Before its tickets end."""
        mover = self._attached.movers.get(session)
        if mover is None or mover.gone:
            return
        mover.gone = True
        for transfer in list(mover.transfers.values()):
            self._cancel(transfer)
        for parked in [each for each in session.parked if self._waiting.get(each, 0) is None]:
            del self._waiting[parked]
        self._attached.part(mover)

    # -- the threads ---------------------------------------------------------------------------------------------

    def _put(self, threads: DeviceThreads, work: Work, then: Callable[[Done], None]) -> None:
        self._works[work] = then
        threads.put(work)

    def finish(self) -> None:
        """Go on with what threads have done."""
        for threads in self._threads:
            for done in threads.take_done():
                (self._works.pop(done.work) if done.over else self._works[done.work])(done)
            self._hbm.look(threads)

    # -- answers -------------------------------------------------------------------------------------------------

    def _send(self, mover: Mover, frame: bytes) -> None:
        """To a client that may be gone, or slow."""
        if not mover.gone:
            self._tell(mover.session, frame)

    def _refuse(self, connection: Connection, head: Head, error: KvError) -> None:
        connection.send(frames.build_failure(Verb.FAILED, head.request, error.code, str(error)))


def _is_wanted(transfer: Transfer) -> bool:
    """Does the client of a SAVE still keep its pages as they were? If not, what was read there may be anybody's.

    A checksum does not tell: it is of what was read. A client that has given up may have been heard of by nothing but
    the end of its socket, behind frames that are not read yet, or by the time.
    """
    if transfer.unwanted or transfer.of.gone or transfer.of.connection.left:
        return False
    return time.monotonic_ns() < transfer.until_ns
