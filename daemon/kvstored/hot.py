"""The hot socket: frames in, verbs of the store, frames out. Owner thread.

    readable -> receive into one buffer -> parse_head -> riders (releases, commits) -> verb -> answer

Every field is checked before anything is allocated. A frame that breaks the rules ends its session with a reason
(GOAWAY) and harms nobody else.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvproto import frames
from kvproto.errors import Code, KvError, LimitError, ProtocolError, UnknownVerbError, UsageError
from kvproto.frames import Head, Verb
from kvproto.identity import NamespaceIdentity
from kvproto.limits import FLUSH_WAIT_NS_MAX, FRAME_BYTES, KEY_BYTES, KEYS_PER_FRAME, LEASE_WAIT_NS_MAX
from kvstore.blocks import U4
from kvstore.sessions import IN_PLACE, Copy, Lease, Parked, Session, Stream
from kvstore.store import ITEM, Store
from kvstored.clients import Clients
from kvstored.config_values import Config
from kvstored.connection import Connection, SlowReaderError
from kvstored.descriptors import CLOSING, closing
from kvstored.device_hot import DeviceVerbs
from kvstored.device_work import DeviceThreads
from kvstored.hot_hello import Greeter
from kvstored.hot_policy import PolicyVerbs
from kvstored.leaf import LeafThreads, Move
from kvstored.loop import CLOSED, READABLE, WRITABLE, Loop
from kvstored.memory import HostMemory
from kvstored.metrics_timing import Note
from kvstored.service import HOT_SOCKET

log = logging.getLogger(__name__)

SOCKET_NAME = HOT_SOCKET
BATCH_BYTES = 8 << 20  # what a leaf thread copies before it reports: a report wakes the owner and a client
FDS_PER_FRAME = 253
TIMED = 7  # one frame of a session in so many: reading the clock takes 0.02 to 0.15 us. Odd, so that no habit hides one

_LEASED_AT = frames.HEAD_BYTES + frames.LEASED_HEAD.size
assert _LEASED_AT % 4 == 0


Handler = Callable[[Connection, Session, Head], None]


class HotServer:
    """Answers the frames of all connected clients."""

    def __init__(
        self, config: Config, loop: Loop, memory: HostMemory, leaf: LeafThreads,
        devices: Sequence[DeviceThreads] = (),
    ) -> None:  # fmt: skip
        """`devices`: of the GPUs that mode daemon copies for."""
        self._config = config
        self._loop = loop
        self._memory = memory
        self._leaf = leaf
        self.store: Store  # set once by the daemon: store and server know each other
        self.clients = Clients(loop, memory, self._on_ready)
        self.clients.uids = tuple(tenant.uids for tenant in config.tenants)
        self.notes: Sequence[Note] | None = None  # by verb: what hears how long a frame took
        self._received = np.zeros(FRAME_BYTES, dtype=np.uint8)
        self._frame = memoryview(self._received)  # type: ignore[arg-type]  # ndarray has the buffer protocol
        self._words = self._received.view(np.uint64)
        self._answer = np.zeros(FRAME_BYTES, dtype=np.uint8)
        self._answer_bytes = memoryview(self._answer)  # type: ignore[arg-type]
        self._locations = self._answer.view(np.uint32)
        self._items = self._answer[frames.HEAD_BYTES : frames.HEAD_BYTES + KEYS_PER_FRAME * ITEM.itemsize].view(ITEM)
        self.devices = DeviceVerbs(
            devices, self._frame, self._words, lambda: self.store, self.clients, memory, self._tell
        )  # fmt: skip
        self.clients.parting = self.devices.parted
        self._greeter = Greeter(config, self._frame, lambda: self.store, self.clients, self.devices)
        self._verbs: dict[int, Handler] = {
            Verb.OPEN: self._open,
            Verb.MATCH: self._match,
            Verb.MATCH_ALL: self._match_all,
            Verb.LEASE: self._lease,
            Verb.RELEASE: self._nothing,
            Verb.RENEW: self._renew,
            Verb.RESERVE: self._reserve,
            Verb.COMMIT: self._commit,
            Verb.ABORT: self._abort,
            Verb.DELETE: self._delete,
            Verb.PING: self._ping,
            Verb.ARENA_DROPPED: self._arena_dropped,
            Verb.FLUSH: self._flush,
            **PolicyVerbs(self._frame, self._words, lambda: self.store).handlers(),
            **self.devices.handlers(),
        }
        if devices:
            self.wrap(Verb.PIN, self.devices.nearer)
            self.wrap(Verb.PREFETCH, self.devices.nearer)

    def wrap(self, verb: Verb, around: Callable[[Handler], Handler]) -> None:
        """From now on what `around` makes of it answers this verb."""
        self._verbs[verb] = around(self._verbs[verb])

    # -- a frame -------------------------------------------------------------------------------------------------

    def _on_ready(self, connection: Connection, events: int) -> None:
        try:
            if events & WRITABLE:
                connection.flush()
                if not connection.waiting:
                    self._loop.rewatch(connection.socket.fileno(), READABLE)
            if events & (READABLE | CLOSED):
                self._read(connection)
        except KvError as error:
            self.clients.fail(connection, error.code, str(error))
        except SlowReaderError:
            self.clients.fail(connection, Code.SLOW_READER, "too many frames were left unread")
        except OSError as error:
            log.info("client gone: pid=%d name=%r reason=%s", connection.peer.pid, connection.name, error)
            self.clients.hang_up(connection)

    def _read(self, connection: Connection) -> None:
        """One frame a turn, so that nobody can keep the loop to itself."""
        if connection.receives:
            self._read_with_descriptors(connection)
            return
        try:
            frame_bytes = connection.socket.recv_into(self._frame, FRAME_BYTES, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        if frame_bytes == 0:
            self.clients.hang_up(connection)
            return
        self._handle(connection, frame_bytes)
        if connection.waiting and connection.socket.fileno() >= 0:
            self._loop.rewatch(connection.socket.fileno(), READABLE | WRITABLE)

    def _read_with_descriptors(self, connection: Connection) -> None:
        """The same where a frame may bring descriptors. Those that nobody takes are closed."""
        try:
            frame_bytes = connection.receive_with_descriptors(self._frame)
        except BlockingIOError:
            return
        try:
            if frame_bytes == 0:
                self.clients.hang_up(connection)
                return
            if connection.fds and closing.many:
                raise LimitError(f"more than {CLOSING} descriptors that were sent are not closed yet")
            self._handle(connection, frame_bytes)
        finally:
            connection.close_descriptors()
        if connection.waiting and connection.socket.fileno() >= 0:
            self._loop.rewatch(connection.socket.fileno(), READABLE | WRITABLE)

    def _handle(self, connection: Connection, frame_bytes: int) -> None:
        connection.requests += 1
        notes = None if connection.requests % TIMED else self.notes
        began_ns = time.monotonic_ns() if notes is not None else 0
        head = frames.parse_head(self._frame, frame_bytes)
        session = connection.session
        verb = self._verbs.get(head.verb)
        if session is None:
            if head.verb != Verb.HELLO:
                raise ProtocolError("the first frame must be HELLO")
            self._greeter.hello(connection, head)
            return
        if verb is None:
            raise ProtocolError("a second HELLO") if head.verb == Verb.HELLO else UnknownVerbError(f"verb {head.verb}")
        releases: tuple[int, ...] = ()
        if head.releases or head.commits:
            releases, commits = frames.riders(self._frame, head)
            if commits and head.verb != Verb.COMMIT:
                self._run_copies(connection, self.store.commit(session, commits))
            self.store.leasing.riding = session, releases
            if releases and head.verb == Verb.RESERVE:  # what they free may be what it needs
                self.store.release_riding()
        verb(connection, session, head)
        if notes is not None:
            notes[head.verb](time.monotonic_ns() - began_ns)
        if releases:  # after the answer is on its way
            self.store.release_riding()
        if session.outcomes:
            self.store.flush_outcomes(session)

    def _open(self, connection: Connection, session: Session, head: Head) -> None:
        form = bytes(self._frame[head.body : head.body + head.body_bytes])
        try:
            namespace = self.store.open(session, NamespaceIdentity.from_canonical(form))
        except (UsageError, LimitError) as error:
            connection.send(frames.build_failure(Verb.FAILED, head.request, error.code, str(error)))
            return
        body = frames.OPENED_BODY.pack(namespace.number, namespace.slot_bytes)
        connection.send(frames.build(Verb.OPENED, head.request, body))

    # -- reading -------------------------------------------------------------------------------------------------

    def _match(self, connection: Connection, session: Session, head: Head) -> None:
        keys_at = frames.require_keys(head, frames.KEYS_HEAD.size)
        (number,) = frames.KEYS_HEAD.unpack_from(self._frame, head.body)
        namespace = self.store.namespace(session, number)
        self._matched(connection, head, self.store.match(namespace, self._words, keys_at >> 3, head.count))

    def _match_all(self, connection: Connection, session: Session, head: Head) -> None:
        numbers, keys_at = frames.parse_match_all(self._frame, head)
        namespaces = [self.store.namespace(session, number) for number in numbers]
        self._matched(connection, head, self.store.match_all(namespaces, self._words, keys_at >> 3, head.count))

    def _matched(self, connection: Connection, head: Head, found: frames.Matched) -> None:
        body_bytes = frames.MATCHED_BODY.size
        frames.HEAD.pack_into(self._answer_bytes, 0, Verb.MATCHED, 0, 0, head.request, 0, 0, body_bytes)
        frames.MATCHED_BODY.pack_into(self._answer_bytes, frames.HEAD_BYTES, *found)
        connection.send(self._answer_bytes[: frames.HEAD_BYTES + body_bytes])
        self.store.matching.account()

    def _lease(self, connection: Connection, session: Session, head: Head) -> None:
        keys_at = frames.require_keys(head, frames.LEASE_HEAD.size)
        number, ttl_ns, wait_ns = frames.LEASE_HEAD.unpack_from(self._frame, head.body)
        if not ttl_ns or wait_ns > LEASE_WAIT_NS_MAX:
            raise ProtocolError(f"a lease for {ttl_ns} ns, waiting {wait_ns} ns, is outside the limits")
        namespace = self.store.namespace(session, number)
        lease = self.store.lease(
            session, namespace, head.request, self._words, keys_at >> 3, head.count, ttl_ns, wait_ns,
            self._locations, _LEASED_AT >> 2,
        )  # fmt: skip
        if not isinstance(lease, Parked):
            self._send_leased(connection, head.request, lease)
            self.store.leasing.account()

    def _send_leased(self, connection: Connection, request: int, lease: Lease | None) -> None:
        """Answer from the buffer that `Store.lease` wrote its locations to."""
        count = whole = lease.count if lease else 0
        if lease and lease.stream is not None:
            whole = lease.stream.rows.size
        body_bytes = frames.LEASED_HEAD.size + frames.LOCATION.size * count
        frames.HEAD.pack_into(self._answer_bytes, 0, Verb.LEASED, 0, count, request, 0, 0, body_bytes)
        number, deadline_ns = (lease.number, lease.deadline_ns) if lease else (0, 0)
        frames.LEASED_HEAD.pack_into(self._answer_bytes, frames.HEAD_BYTES, number, deadline_ns, whole - count)
        if lease and lease.fresh:
            start = _LEASED_AT >> 2
            arenas = self._locations[start : start + 2 * whole : 2]
            self._send_arenas(connection, self.store.fresh_arenas(lease.session, arenas))
        connection.send(self._answer_bytes[: frames.HEAD_BYTES + body_bytes])

    def _send_arenas(self, connection: Connection, arenas: list[int], *, writable: bool = False) -> None:
        for start in range(0, len(arenas), FDS_PER_FRAME):
            some = arenas[start : start + FDS_PER_FRAME]
            fds = self._open_all(some, writable=writable)
            sizes = [(arena, self._config.arena_bytes) for arena in some]
            connection.send(frames.build_arenas(sizes, writable=writable), fds)

    def _open_all(self, arenas: list[int], *, writable: bool) -> list[int]:
        fds: list[int] = []
        reopen = self._memory.open_writable if writable else self._memory.open_read_only
        try:
            for arena in arenas:
                fds.append(reopen(arena))  # noqa: PERF401  those opened so far must be closed
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def _renew(self, connection: Connection, session: Session, head: Head) -> None:
        lease, ttl_ns = frames.RENEW_BODY.unpack_from(self._frame, frames.require_body(head, frames.RENEW_BODY.size))
        deadline_ns = self.store.renew(session, lease, ttl_ns)
        connection.send(frames.build(Verb.RENEWED, head.request, frames.CLOCK_BODY.pack(deadline_ns)))

    def _nothing(self, connection: Connection, session: Session, head: Head) -> None:
        """RELEASE: its riders have said it all."""
        frames.require_body(head, 0)

    # -- writing -------------------------------------------------------------------------------------------------

    def _reserve(self, connection: Connection, session: Session, head: Head) -> None:
        keys_at = frames.require_keys(head, frames.RESERVE_HEAD.size)
        number, recompute_us, _ = frames.RESERVE_HEAD.unpack_from(self._frame, head.body)
        namespace = self.store.namespace(session, number)
        if recompute_us:
            namespace.recompute_ns = recompute_us * 1000
        parent_at = (keys_at - KEY_BYTES) >> 3 if head.flags & frames.Flag.HAS_PARENT else None
        self._fault_ring_in(connection)
        self.store.reserving.answer(
            session, namespace, self._words, keys_at >> 3, head.count, parent_at, self._items, recompute_us * 1000
        )
        body_bytes = head.count * ITEM.itemsize
        if session.owner is not None:
            body_bytes += self._add_arenas(connection, session, head.count)
        frames.HEAD.pack_into(self._answer_bytes, 0, Verb.RESERVED, 0, head.count, head.request, 0, 0, body_bytes)
        connection.send(self._answer_bytes[: frames.HEAD_BYTES + body_bytes])
        self.store.reserving.account()

    def _add_arenas(self, connection: Connection, session: Session, count: int) -> int:
        """Mode direct: say in which arenas the granted slots lie, behind the items, once the client has them all.

        Returns the bytes that it takes.
        """
        arenas = self.store.reserving.arenas[:count]  # 0 where nothing was granted
        fresh = self.store.fresh_writable(session, filter(None, arenas.tolist()))
        if fresh:
            self._send_arenas(connection, fresh, writable=True)
        start = (frames.HEAD_BYTES + count * ITEM.itemsize) >> 2
        self._locations[start + count] = 0  # bodies are whole multiples of 8
        self._locations[start : start + count] = arenas
        return 4 * (count + count % 2)

    def _fault_ring_in(self, connection: Connection) -> None:
        """A session that begins to store will want its whole ring."""
        if connection.ring is not None and not connection.ring_wanted:
            connection.ring_wanted = True
            self._memory.fault_in(connection.ring)

    def _commit(self, connection: Connection, session: Session, head: Head) -> None:
        frames.require_body(head, 0)
        _, commits = frames.riders(self._frame, head)
        copies = self.store.commit(session, commits)
        try:
            if head.flags & frames.Flag.WANTS_ANSWER:  # first, since somebody waits for it
                body = frames.NUMBER_BODY.pack(len(commits) - len(copies))
                connection.send(frames.build(Verb.COMMITTED, head.request, body))
        finally:  # a copy that is begun must run, whether or not its client is there
            self._run_copies(connection, copies)

    def _run_copies(self, connection: Connection, copies: list[Copy]) -> None:
        ring = connection.ring
        batch: list[Move] = []
        batch_bytes = 0
        for copy in copies:
            source = None
            if copy.source_offset != IN_PLACE:
                assert ring is not None, "a copy without a ring"
                source = ring.view[copy.source_offset : copy.source_offset + copy.block_bytes]
            target = self._memory.view(copy.arena)[copy.target_offset : copy.target_offset + copy.block_bytes]
            batch.append(Move(copy.ticket, source, target))
            batch_bytes += copy.block_bytes
            if batch_bytes >= BATCH_BYTES:
                self._leaf.submit(batch)
                batch, batch_bytes = [], 0
        if batch:
            self._leaf.submit(batch)

    def finish_copies(self) -> None:
        """Publish what leaf threads have copied, and tell whoever waits for it."""
        done = self._leaf.take_done()
        if not done:
            return
        touched: dict[Session, None] = {}
        for ticket, checksum in done:
            self.store.copied(ticket, checksum)
            touched[ticket.session] = None
        for session in touched:
            self.store.flush_outcomes(session)
            connection = self.clients.by_session.get(session)
            if connection is not None and not session.attached:
                self.clients.reap(connection)

    def _abort(self, connection: Connection, session: Session, head: Head) -> None:
        self.store.abort(session, frames.parse_tickets(self._frame, head))
        self.store.flush_outcomes(session)  # a LEASE may have waited for one of them

    def _delete(self, connection: Connection, session: Session, head: Head) -> None:
        keys_at = frames.require_keys(head, frames.KEYS_HEAD.size)
        (number,) = frames.KEYS_HEAD.unpack_from(self._frame, head.body)
        namespace = self.store.namespace(session, number)
        request = head.request

        def answer(deleted: int) -> None:
            self.store.tally.deleted += deleted
            if session.attached:
                self._tell(session, frames.build(Verb.DELETED, request, frames.NUMBER_BODY.pack(deleted)))

        self.store.delete(namespace, self._words, keys_at >> 3, head.count, answer)

    def _flush(self, connection: Connection, session: Session, head: Head) -> None:
        number, _, wait_ns = frames.FLUSH_BODY.unpack_from(
            self._frame, frames.require_body(head, frames.FLUSH_BODY.size)
        )
        if wait_ns > FLUSH_WAIT_NS_MAX:
            raise ProtocolError(f"a FLUSH that waits {wait_ns} ns")
        counts = self.store.flush(session, self.store.namespace(session, number), head.request, wait_ns)
        if counts is not None:
            self.durable(session, head.request, counts)

    def _ping(self, connection: Connection, session: Session, head: Head) -> None:
        body_at = frames.require_body(head, frames.CLOCK_BODY.size)
        body = bytes(self._frame[body_at : body_at + head.body_bytes])
        connection.send(frames.build(Verb.PONG, head.request, body))

    def _arena_dropped(self, connection: Connection, session: Session, head: Head) -> None:
        self.store.arena_dropped(session, frames.parse_number(self._frame, head))

    # -- kvstore.ports.Outbox ------------------------------------------------------------------------------------

    def published(self, session: Session, outcomes: Sequence[tuple[int, int]]) -> None:
        """See the port."""
        for start in range(0, len(outcomes), KEYS_PER_FRAME):
            self._tell(session, frames.build_published(outcomes[start : start + KEYS_PER_FRAME]))

    def leased(self, session: Session, parked: Parked, lease: Lease | None, locations: U4) -> None:
        """See the port."""
        if self.devices.leased(session, parked, lease, locations):
            return
        connection = self.clients.by_session[session]
        count = 0
        if lease:
            count = 2 * (lease.stream.rows.size if lease.stream is not None else lease.count)
        self._locations[_LEASED_AT >> 2 : (_LEASED_AT >> 2) + count] = locations[:count]
        self._guard(connection, lambda: self._send_leased(connection, parked.request, lease))

    def ready(self, stream: Stream, first: int, stop: int, left: int) -> None:
        """See the port."""
        if self.devices.ready(stream, left):
            return
        if first == stop and left and self.clients.by_session[stream.lease.session].waiting:
            return  # a promise, and no block, is no news to a client that does not even read the others
        lease, on_disk = stream.lease, int(stream.on_disk[first:stop].sum())
        body = frames.READY_HEAD.pack(lease.number, lease.deadline_ns, left, on_disk)
        body += stream.locations[2 * first : 2 * stop].tobytes()
        self._tell(lease.session, frames.build(Verb.READY, 0, body, count=stop - first))

    def durable(self, session: Session, request: int, counts: tuple[int, int, int, int]) -> None:
        """See the port."""
        self._tell(session, frames.build(Verb.DURABLE, request, frames.DURABLE_BODY.pack(*counts)))

    def arena_gone(self, session: Session, arena: int) -> None:
        """See the port."""
        if session.attached:
            self._tell(session, frames.build_arena_gone(arena))

    def _tell(self, session: Session, frame: bytes) -> None:
        """Send what was not asked for. A client that is gone or slow must not disturb the store's work."""
        connection = self.clients.by_session[session]
        self._guard(connection, lambda: connection.send(frame))

    def _guard(self, connection: Connection, send: Callable[[], None]) -> None:
        if connection.socket.fileno() < 0 or connection.goaway is not None:
            return
        try:
            send()
            if connection.waiting:
                self._loop.rewatch(connection.socket.fileno(), READABLE | WRITABLE)
        except SlowReaderError:
            self._loop.call(lambda: self.clients.fail(connection, Code.SLOW_READER, "too many frames were left unread"))
            connection.goaway = Code.SLOW_READER
        except OSError as error:
            log.info("client gone: pid=%d name=%r reason=%s", connection.peer.pid, connection.name, error)
            self._loop.call(lambda: self.clients.hang_up(connection))
