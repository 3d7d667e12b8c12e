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

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvclient.ledger import Ledger, Waiter
from kvclient.results import Reason
from kvproto import frames
from kvproto.errors import Grant, KvError, ProtocolError, RefusedError
from kvproto.frames import Flag, Head, Hello, Matched, Reserved, Role, Verb, Welcome
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME, PAGE_BYTES, PROTOCOL_VERSION

if TYPE_CHECKING:
    from kvclient.mapping import Mapping
    from kvclient.protocol import Session


class Answer(NamedTuple):
    """A frame from the daemon, with what came along and when. `fds` belong to whoever read the frame."""

    frame: bytes
    head: Head
    fds: Sequence[int]
    now_ns: int


class Opened(NamedTuple):
    """A namespace as this session knows it."""

    number: int
    slot_bytes: int
    block_bytes: int


class Call(Waiter):
    """One request and its answer."""

    answer: ClassVar[Verb]
    __slots__ = ("abandoned", "error", "lost", "request", "sent_ns", "session")

    def __init__(self, session: "Session", deadline_ns: int) -> None:
        super().__init__(deadline_ns)
        self.session = session
        self.request = 0
        self.sent_ns = 0
        self.abandoned = False
        self.error: KvError | None = None
        self.lost: Reason | None = None

    @property
    def answered(self) -> bool:
        """The answer came, and it is the one that was asked for."""
        return self.error is None and self.lost is None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        """The frame."""
        raise NotImplementedError

    def accept(self, answer: Answer) -> None:
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


class HelloCall(Call):
    """HELLO -> WELCOME: the first request of a session."""

    answer = Verb.WELCOME
    __slots__ = ("hello",)

    def __init__(self, session: "Session", hello: Hello, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.hello = hello

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        assert not releases, "nothing is leased before HELLO"
        return frames.build_hello(request, self.hello)

    def accept(self, answer: Answer) -> None:
        welcome = frames.parse_welcome(answer.frame, answer.head)
        self._check(welcome, answer)
        if self.hello.role is Role.ENGINE:
            self.session.ring = self.session.memory.map_ring(answer.fds[1], welcome.ring_bytes)
        self.session.welcome = welcome

    def _check(self, welcome: Welcome, answer: Answer) -> None:
        if welcome.version != PROTOCOL_VERSION or welcome.mode not in self.hello.modes:
            raise RefusedError(f"the daemon chose version {welcome.version}, mode {welcome.mode.name}")
        if not self.sent_ns <= welcome.clock_ns <= answer.now_ns:
            # Leases are deadlines on a clock that both sides must share (another host, or a time namespace).
            raise RefusedError("the daemon's monotonic clock is not this process's")
        fds = 2 if self.hello.role is Role.ENGINE else 1  # its pidfd, then the ring
        if len(answer.fds) != fds or welcome.keys_per_frame < KEYS_PER_FRAME:
            raise ProtocolError(f"WELCOME: {len(answer.fds)} descriptors, {welcome.keys_per_frame} keys a frame")


class OpenCall(Call):
    """OPEN -> OPENED."""

    answer = Verb.OPENED
    __slots__ = ("block_bytes", "canonical", "opened")

    def __init__(self, session: "Session", canonical: bytes, block_bytes: int, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.canonical = canonical
        self.block_bytes = block_bytes
        self.opened: Opened | None = None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build(Verb.OPEN, request, self.canonical, releases=releases)

    def accept(self, answer: Answer) -> None:
        offset = frames.require_body(answer.head, frames.OPENED_BODY.size)
        number, slot_bytes = frames.OPENED_BODY.unpack_from(answer.frame, offset)
        if slot_bytes < self.block_bytes or slot_bytes % PAGE_BYTES:
            raise ProtocolError(f"slots of {slot_bytes} bytes for blocks of {self.block_bytes}")
        self.opened = Opened(number, slot_bytes, self.block_bytes)
        self.session.namespaces[self.canonical] = self.opened


class MatchCall(Call):
    """MATCH -> MATCHED."""

    answer = Verb.MATCHED
    __slots__ = ("keys", "matched", "namespace")

    def __init__(self, session: "Session", namespace: int, keys: bytes, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.matched: Matched | None = None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_match(request, self.namespace, self.keys, releases)

    def accept(self, answer: Answer) -> None:
        matched = frames.parse_matched(answer.frame, answer.head)
        if matched.hbm + matched.dram + matched.disk + matched.pending > len(self.keys) // KEY_BYTES:
            raise ProtocolError("MATCHED says more blocks than were asked for")
        self.matched = matched


class Part:
    """One lease of the daemon's: at most a frame's worth of blocks. `arenas` keeps their maps alive."""

    __slots__ = ("arenas", "blocks", "deadline_ns", "lease", "places", "session", "slot_bytes")

    def __init__(
        self,
        session: "Session",
        *,
        lease: int,
        deadline_ns: int,
        places: tuple[int, ...],
        arenas: "dict[int, Mapping]",
        slot_bytes: int,
    ) -> None:
        self.session = session
        self.lease = lease
        self.deadline_ns = deadline_ns  # CLOCK_MONOTONIC; 0 once it is gone
        self.places = places  # arena, slot, arena, slot, ...
        self.blocks = len(places) // 2
        self.arenas = arenas
        self.slot_bytes = slot_bytes


_places: dict[int, struct.Struct] = {}  # block count -> its locations; at most one for each size of frame


class LeaseCall(Call):
    """LEASE -> LEASED."""

    answer = Verb.LEASED
    __slots__ = ("keys", "namespace", "part", "ttl_ns", "wait_ns")

    def __init__(
        self, session: "Session", namespace: Opened, keys: bytes, *, ttl_ns: int, wait_ns: int, deadline_ns: int
    ) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.ttl_ns = ttl_ns
        self.wait_ns = wait_ns
        self.part: Part | None = None  # stays None for a miss

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_lease(request, self.namespace.number, self.keys, self.ttl_ns, self.wait_ns, releases)

    def accept(self, answer: Answer) -> None:
        frame, head = answer.frame, answer.head
        count = head.count
        offset = frames.require_body(head, frames.LEASED_HEAD.size + frames.LOCATION.size * count)
        lease, deadline_ns = frames.LEASED_HEAD.unpack_from(frame, offset)
        if count > len(self.keys) // KEY_BYTES or (lease == 0) != (count == 0):
            raise ProtocolError(f"LEASED says {count} blocks, lease {lease}")
        if not count:
            return
        layout = _places.get(count)
        if layout is None:
            layout = _places[count] = struct.Struct(f"<{2 * count}I")
        places = layout.unpack_from(frame, offset + frames.LEASED_HEAD.size)
        arenas = self._arenas_of(places)
        self.part = Part(
            self.session,
            lease=lease,
            deadline_ns=deadline_ns,
            places=places,
            arenas=arenas,
            slot_bytes=self.namespace.slot_bytes,
        )

    def _arenas_of(self, places: tuple[int, ...]) -> "dict[int, Mapping]":
        known = self.session.arenas
        try:
            used = {arena: known[arena] for arena in dict.fromkeys(places[::2])}
        except KeyError as error:
            raise ProtocolError(f"LEASED names arena {error}, which was never sent") from error
        # A slot beyond its arena would be read beyond its map.
        slot_bytes = self.namespace.slot_bytes
        end = max(places[1::2]) * slot_bytes + self.namespace.block_bytes
        for arena, mapping in used.items():
            if end > mapping.bytes:
                raise ProtocolError("LEASED names a slot beyond its arena")
            if mapping.cold:
                offsets = [slot * slot_bytes for at, slot in zip(places[::2], places[1::2], strict=True) if at == arena]
                self.session.memory.warm(mapping, offsets, slot_bytes)
        return used

    def undo(self) -> None:
        if self.part is not None:
            self.session.releases.append(self.part.lease)


class RenewCall(Call):
    """RENEW -> RENEWED."""

    answer = Verb.RENEWED
    __slots__ = ("part", "ttl_ns")

    def __init__(self, part: Part, ttl_ns: int, deadline_ns: int) -> None:
        super().__init__(part.session, deadline_ns)
        self.part = part
        self.ttl_ns = ttl_ns

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        body = frames.RENEW_BODY.pack(self.part.lease, self.ttl_ns)
        return frames.build(Verb.RENEW, request, body, releases=releases)

    def accept(self, answer: Answer) -> None:
        offset = frames.require_body(answer.head, frames.CLOCK_BODY.size)
        (self.part.deadline_ns,) = frames.CLOCK_BODY.unpack_from(answer.frame, offset)  # 0: the lease is gone


class ReserveCall(Call):
    """RESERVE -> RESERVED; commits earlier tickets on the way."""

    answer = Verb.RESERVED
    __slots__ = ("commits", "items", "keys", "ledger", "namespace", "parent")

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
    ) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.parent = parent
        self.keys = keys
        self.commits = commits
        self.ledger = ledger
        self.items: list[Reserved] = []  # one for each key

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        self.session.note_reserve(len(self.keys))
        self.session.note_commit(self.commits, self.ledger)
        return frames.build_reserve(
            request, self.namespace.number, self.parent, b"".join(self.keys), self.commits, releases
        )

    def accept(self, answer: Answer) -> None:
        items = frames.parse_reserved(answer.frame, answer.head)
        if len(items) != len(self.keys):
            raise ProtocolError(f"RESERVED answers {len(items)} keys of {len(self.keys)}")
        ring = self.session.ring
        assert ring is not None, "only engines reserve"
        granted = 0
        for grant, page, _ in items:
            if grant == Grant.GRANTED:
                granted += 1
                if page * PAGE_BYTES + self.namespace.block_bytes > ring.bytes:
                    raise ProtocolError("RESERVED names a span beyond the ring")
            elif grant > Grant.DRAINING:
                raise ProtocolError(f"RESERVED says grant {grant}")
        self.session.note_granted(len(self.keys), granted)
        self.items = items

    def undo(self) -> None:
        self.session.abort([ticket for grant, _, ticket in self.items if grant == Grant.GRANTED])

    def refuse(self, error: KvError) -> None:
        self.session.note_granted(len(self.keys), 0)
        super().refuse(error)


class CommitCall(Call):
    """COMMIT that wants an answer -> COMMITTED."""

    answer = Verb.COMMITTED
    __slots__ = ("commits", "ledger", "stale")

    def __init__(self, session: "Session", commits: Sequence[int], ledger: Ledger, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.commits = commits
        self.ledger = ledger
        self.stale = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        self.session.note_commit(self.commits, self.ledger)
        return frames.build(Verb.COMMIT, request, flags=Flag.WANTS_ANSWER, releases=releases, commits=self.commits)

    def accept(self, answer: Answer) -> None:
        self.stale = frames.parse_number(answer.frame, answer.head)


class DeleteCall(Call):
    """DELETE -> DELETED."""

    answer = Verb.DELETED
    __slots__ = ("deleted", "keys", "namespace")

    def __init__(self, session: "Session", namespace: int, keys: bytes, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.deleted = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build_delete(request, self.namespace, self.keys, releases)

    def accept(self, answer: Answer) -> None:
        self.deleted = frames.parse_number(answer.frame, answer.head)


class PingCall(Call):
    """PING -> PONG."""

    answer = Verb.PONG
    __slots__ = ("heard_ns",)

    def __init__(self, session: "Session", deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.heard_ns = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build(Verb.PING, request, frames.CLOCK_BODY.pack(request), releases=releases)

    def accept(self, answer: Answer) -> None:
        offset = frames.require_body(answer.head, frames.CLOCK_BODY.size)
        if frames.CLOCK_BODY.unpack_from(answer.frame, offset) != (self.request,):
            raise ProtocolError("PONG does not repeat what PING said")
        self.heard_ns = answer.now_ns
