"""Requests: each class builds one frame, takes its answer apart, and gives back what comes too late.

    caller                      session (protocol.py)
    call = LeaseCall(...)
    submit(call)          --->  a request id, a place in the table, the frame
    ...
    call.accept(answer)   <---  the answer came in time: `done`, fields filled in
    call.undo()           <---  the answer came after the caller had left: what it grants is given back

After the wait exactly one holds: the answer's fields are set; `error` says why the daemon refused (FAILED); `lost`
says why there is no answer. Sans-I/O; guarded like the session.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvclient.ledger import Ledger, Waiter
from kvclient.results import Reason
from kvclient.stream import Part
from kvproto import frames
from kvproto.errors import Grant, KvError, ProtocolError, RefusedError
from kvproto.frames import Durable, Flag, Head, Hello, Matched, Mode, Reserved, Role, Verb, Welcome
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME, PAGE_BYTES

if TYPE_CHECKING:
    from kvclient.mapping import Place
    from kvclient.protocol import Session


class Opened(NamedTuple):
    """A namespace as this session knows it."""

    number: int
    slot_bytes: int
    block_bytes: int


class Call(Waiter):
    """One request and its answer."""

    answer: ClassVar[Verb]
    fds: Sequence[int] = ()  # that go with the frame
    patient: ClassVar[bool] = False  # a daemon that is well may take any time to answer
    request = 0  # until it has been sent
    sent_ns = 0
    abandoned = False  # nobody waits any more
    error: KvError | None = None
    lost: Reason | None = None

    def __init__(self, session: "Session", deadline_ns: int) -> None:
        super().__init__(deadline_ns)
        self.session = session

    @property
    def answered(self) -> bool:
        """The answer came, and it is the one that was asked for."""
        return self.error is None and self.lost is None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        """The frame."""
        raise NotImplementedError

    def accept(self, frame: bytes, head: Head) -> None:
        """Take the answer apart. Raises ProtocolError for what no daemon should say."""
        raise NotImplementedError

    def undo(self) -> None:
        """The caller had left before `accept`: give back what the answer grants."""

    def refuse(self, error: KvError) -> None:
        """The daemon answered FAILED."""
        self.error = error

    def lose(self, why: Reason) -> None:
        """No answer will come, or not in time."""
        self.lost = why
        self.finish()


def give_back(calls: Iterable[Call]) -> None:
    """Whoever made them has left with their answers: what those granted goes back with the next chores. No guard."""
    for call in calls:
        if call.done and call.answered:
            call.undo()


class HelloCall(Call):
    """HELLO -> WELCOME: the first request of a session."""

    answer = Verb.WELCOME

    def __init__(self, session: "Session", hello: Hello, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.hello = hello

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        assert not releases, "nothing is leased before HELLO"
        return frames.build_hello(request, self.hello)

    def accept(self, frame: bytes, head: Head) -> None:
        welcome = frames.parse_welcome(frame, head)
        self._check(welcome)
        if self._has_ring(welcome):
            self.session.ring = self.session.memory.map_ring(self.session.fds[1], welcome.ring_bytes)
        if welcome.mode is Mode.DAEMON:
            self.session.keep_daemon(self.session.fds[0])
        self.session.welcome = welcome

    def _has_ring(self, welcome: Welcome) -> bool:
        """In mode direct an engine writes into slots instead."""
        return self.hello.role is Role.ENGINE and welcome.mode is not Mode.DIRECT

    def _check(self, welcome: Welcome) -> None:
        hello = self.hello
        if not hello.version_low <= welcome.version <= hello.version_high or welcome.mode not in hello.modes:
            raise RefusedError(f"the daemon chose version {welcome.version}, mode {welcome.mode.name}")
        if not self.sent_ns <= welcome.clock_ns <= self.session.heard_ns:
            # Leases are deadlines on a clock that both sides must share (another host, or a time namespace).
            raise RefusedError("the daemon's monotonic clock is not this process's")
        fds = 2 if self._has_ring(welcome) else 1  # its pidfd, then the ring
        if len(self.session.fds) != fds or welcome.keys_per_frame < KEYS_PER_FRAME:
            raise ProtocolError(f"WELCOME: {len(self.session.fds)} descriptors, {welcome.keys_per_frame} keys a frame")


class OpenCall(Call):
    """OPEN -> OPENED."""

    answer = Verb.OPENED

    def __init__(self, session: "Session", canonical: bytes, block_bytes: int, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.canonical = canonical
        self.block_bytes = block_bytes
        self.opened: Opened | None = None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build(Verb.OPEN, request, self.canonical, releases=releases)

    def accept(self, frame: bytes, head: Head) -> None:
        offset = frames.require_body(head, frames.OPENED_BODY.size)
        number, slot_bytes = frames.OPENED_BODY.unpack_from(frame, offset)
        if slot_bytes < self.block_bytes or slot_bytes % PAGE_BYTES:
            raise ProtocolError(f"slots of {slot_bytes} bytes for blocks of {self.block_bytes}")
        self.opened = Opened(number, slot_bytes, self.block_bytes)
        self.session.namespaces[self.canonical] = self.opened


class MatchCall(Call):
    """MATCH -> MATCHED."""

    answer = Verb.MATCHED

    def __init__(self, session: "Session", namespace: int, keys: bytes, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.matched: Matched | None = None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_match(request, self.namespace, self.keys, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        matched = frames.parse_matched(frame, head)
        if (
            matched is not frames.NOTHING_MATCHED
            and matched.hbm + matched.dram + matched.disk + matched.pending > len(self.keys) // KEY_BYTES
        ):
            raise ProtocolError("MATCHED says more blocks than were asked for")
        self.matched = matched


class MatchAllCall(MatchCall):
    """MATCH_ALL -> MATCHED. A daemon before version 4 would end the session for it."""

    def __init__(self, session: "Session", namespaces: Sequence[int], keys: bytes, deadline_ns: int) -> None:
        super().__init__(session, namespaces[0], keys, deadline_ns)
        self.namespaces = namespaces

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_match_all(request, self.namespaces, self.keys, releases)


class LeaseCall(Call):
    """LEASE -> LEASED."""

    answer = Verb.LEASED
    part: Part | None = None  # stays None for a miss

    def __init__(
        self, session: "Session", namespace: Opened, keys: bytes, *, ttl_ns: int, wait_ns: int, deadline_ns: int
    ) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.ttl_ns = ttl_ns
        self.wait_ns = wait_ns

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_lease(request, self.namespace.number, self.keys, self.ttl_ns, self.wait_ns, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        blocks = head.count
        offset = frames.require_body(head, frames.LEASED_HEAD.size + frames.LOCATION.size * blocks)
        lease, deadline_ns, coming = frames.LEASED_HEAD.unpack_from(frame, offset)
        promised = blocks + coming
        if promised > len(self.keys) // KEY_BYTES or (lease == 0) != (promised == 0):
            raise ProtocolError(f"LEASED says {blocks} blocks and {coming} coming, lease {lease}")
        if promised:
            self.part = Part(self, lease, deadline_ns, blocks, frame)
            if coming:
                self._follow(self.part, coming)
            if self.session.cold:
                self.session.warm(self.part.places(), self.namespace.block_bytes)

    def _follow(self, part: Part, coming: int) -> None:
        if not self.wait_ns:
            raise ProtocolError(f"LEASED says that {coming} blocks are coming, which nobody waits for")
        part.expect(coming, self.sent_ns + self.wait_ns)
        self.session.follow_stream(part)

    def undo(self) -> None:
        if self.part is not None:
            self.session.releases.append(self.part.lease)


class RenewCall(Call):
    """RENEW -> RENEWED."""

    answer = Verb.RENEWED

    def __init__(self, part: Part, ttl_ns: int, deadline_ns: int) -> None:
        super().__init__(part.session, deadline_ns)
        self.part = part
        self.ttl_ns = ttl_ns

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        body = frames.RENEW_BODY.pack(self.part.lease, self.ttl_ns)
        return frames.build(Verb.RENEW, request, body, releases=releases)

    def accept(self, frame: bytes, head: Head) -> None:
        offset = frames.require_body(head, frames.CLOCK_BODY.size)
        (self.part.deadline_ns,) = frames.CLOCK_BODY.unpack_from(frame, offset)  # 0: the lease is gone


class ReserveCall(Call):
    """RESERVE -> RESERVED; commits earlier tickets on the way."""

    answer = Verb.RESERVED

    def __init__(
        self,
        session: "Session",
        namespace: Opened,
        *,
        parent: bytes | None,
        keys: Sequence[bytes],
        commits: Sequence[int],
        ledger: Ledger,
        deadline_ns: int,
        recompute_us: int = 0,
    ) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.parent = parent
        self.keys = keys
        self.commits = commits
        self.ledger = ledger
        self.recompute_us = recompute_us  # a block; 0: unknown
        self.items: list[Reserved] = []  # one for each key
        self.spans: list[Place | None] = []  # where to copy each granted block to

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        self.session.note_commit(self.commits, self.ledger)
        return frames.build_reserve(
            request, self.namespace.number, self.parent, b"".join(self.keys), self.commits, releases, self.recompute_us
        )

    def accept(self, frame: bytes, head: Head) -> None:
        items = frames.parse_reserved(frame, head, direct=self.session.mode is Mode.DIRECT)
        if len(items) != len(self.keys):
            raise ProtocolError(f"RESERVED answers {len(items)} keys of {len(self.keys)}")
        self.spans = [self._span(item) for item in items]
        self.items = items

    def _span(self, item: Reserved) -> "Place | None":
        """In the ring, or in mode direct in a slot. The map stays as long as this is kept."""
        if item.grant != Grant.GRANTED:
            if item.grant > Grant.DRAINING:
                raise ProtocolError(f"RESERVED says grant {item.grant}")
            return None
        ring, offset = self.session.ring, item.page * PAGE_BYTES
        if self.session.mode is Mode.DIRECT:
            ring, offset = self.session.writable.get(item.arena), item.page * self.namespace.slot_bytes
        if ring is None or offset + self.namespace.block_bytes > ring.bytes:
            raise ProtocolError("RESERVED names a span beyond the ring, or in no arena that may be written to")
        return ring, offset

    def undo(self) -> None:
        self.session.abort([item.ticket for item in self.items if item.grant == Grant.GRANTED])


class CommitCall(Call):
    """COMMIT that wants an answer -> COMMITTED."""

    answer = Verb.COMMITTED

    def __init__(self, session: "Session", commits: Sequence[int], ledger: Ledger, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.commits = commits
        self.ledger = ledger
        self.stale = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        self.session.note_commit(self.commits, self.ledger)
        return frames.build(Verb.COMMIT, request, flags=Flag.WANTS_ANSWER, releases=releases, commits=self.commits)

    def accept(self, frame: bytes, head: Head) -> None:
        self.stale = frames.parse_number(frame, head)


class FlushCall(Call):
    """FLUSH -> DURABLE."""

    answer = Verb.DURABLE

    def __init__(self, session: "Session", namespace: int, wait_ns: int, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.wait_ns = wait_ns
        self.durable = Durable(0, 0, 0, 0)

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_flush(request, self.namespace, self.wait_ns, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        self.durable = frames.parse_durable(frame, head)


class DeleteCall(Call):
    """DELETE -> DELETED."""

    answer = Verb.DELETED

    def __init__(self, session: "Session", namespace: int, keys: bytes, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.deleted = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_delete(request, self.namespace, self.keys, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        self.deleted = frames.parse_number(frame, head)


class PingCall(Call):
    """PING -> PONG."""

    answer = Verb.PONG

    def __init__(self, session: "Session", deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.heard_ns = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build(Verb.PING, request, frames.CLOCK_BODY.pack(request), releases=releases)

    def accept(self, frame: bytes, head: Head) -> None:
        offset = frames.require_body(head, frames.CLOCK_BODY.size)
        if frames.CLOCK_BODY.unpack_from(frame, offset) != (self.request,):
            raise ProtocolError("PONG does not repeat what PING said")
        self.heard_ns = self.session.heard_ns
