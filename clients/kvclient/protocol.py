"""The client's side of one session: frames in, frames out, and what they leave behind.

Sans-I/O: no sockets, no threads, no clock but the one passed in. `connection` (threads) and `aio` (asyncio) drive
the same object; each guards it (a mutex, the event loop). What may be touched without that guard says so.

    arenas      what the daemon sent, until it takes it back; a lease keeps the maps that it uses
    namespaces  numbers of this session; a new session opens them anew
    calls       requests without an answer, those included whose callers have left
    tickets     committed, fate unknown -> the ledger that wants to know
    streams     leases with blocks still to come by READY, as long as somebody keeps them
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kvclient.calls import Call, Opened, PingCall, RenewCall
from kvclient.copying import Bounce
from kvclient.ledger import Ledger
from kvclient.mapping import Mapping, Memory, Place
from kvclient.policy_calls import UnpinCall
from kvclient.refusals import Refusals
from kvclient.results import Reason, Status
from kvclient.stream import Part, Renewals
from kvclient.transfers import CancelCall, Pidfd, Transfer
from kvproto import device_frames, frames, policy_frames
from kvproto.errors import Code, ProtocolError, error_for
from kvproto.frames import Flag, Head, Mode, Verb, Welcome
from kvproto.limits import KEYS_PER_FRAME, RIDERS_PER_FRAME

_MATCH_ALL_SINCE = 4  # version of the wire
_HAND_OVER_SINCE = 5
_FAILED = int(Verb.FAILED)  # enum members compare slowly
_REQUEST_MAX = (1 << 32) - 1
ABANDONED_CALLS = 1024  # a correct daemon answers everything sooner or later; each keeps a few hundred bytes
_OUTCOMES: tuple[Reason | None, ...] = (None, Reason.STALE, Reason.DISCARDED)  # by kvproto's Outcome


class Session:
    """One session with one daemon, from HELLO to its end. It never comes back: a reconnect makes a new one."""

    def __init__(self, memory: Memory, refusals: Refusals | None = None) -> None:
        self.memory = memory
        self.refusals = refusals if refusals is not None else Refusals()
        self.welcome: Welcome | None = None
        self.ring: Mapping | None = None
        self.namespaces: dict[bytes, Opened] = {}
        self.arenas: dict[int, Mapping] = {}  # replaced, never changed: leases hold on to what was there
        self.cold: list[Mapping] = []  # those that are not wholly populated yet
        self.writable: dict[int, Mapping] = {}  # mode direct: arenas mapped a second time, for the slots of stores
        self.bounce = Bounce()  # mode ring: what copies pass through
        self.over = False
        self.goodbye = ""  # why the daemon ended it, if it said so
        self.heard_ns = 0  # when the last frame came
        self.fds: Sequence[int] = ()  # that came with it; good only while it is being taken
        self.silent = False  # it missed a deadline and has not been heard since: calls miss at once
        # Given back with the next frame. Appending needs no guard (deques are atomic, and `unmapped` is appended
        # to from within the garbage collector).
        self.releases: deque[int] = deque()
        self.unmapped: deque[int] = deque()
        self.unpins: deque[int] = deque()  # pins and prefetches whose caller had left when they were granted
        self.cancels: deque[int] = deque()
        self.transfers: dict[int, Transfer] = {}  # mode daemon: those under way, by number
        self.unwanted: deque[Transfer] = deque()  # of them, those whose caller had left when they began
        self.daemon: Pidfd | None = None  # mode daemon: whose exit ends what is under way
        self._aborts: deque[int] = deque()
        self._calls: dict[int, Call] = {}
        self._abandoned = 0  # of them, those that nobody waits for any more
        self._request = 0
        self._tickets: dict[int, Ledger] = {}
        self._streams: weakref.WeakValueDictionary[int, Part] = weakref.WeakValueDictionary()
        self._mapped_twice: weakref.WeakValueDictionary[int, _MappedTwice] = weakref.WeakValueDictionary()
        self._renewals: weakref.WeakSet[Renewals] = weakref.WeakSet()
        self._last_stream = 0  # the highest lease that ever had blocks to come: the daemon counts leases upwards

    # -- out ----------------------------------------------------------------------------------------------------

    def submit(self, call: Call, now_ns: int) -> bytes:
        """The frame of a request. The answer, or the end of the session, will finish the call."""
        assert not self.over, "the owner asks no dead session"
        request = self._request + 1 if self._request < _REQUEST_MAX else 1
        while request in self._calls:  # only after wrapping around past a call that is still out
            request = request + 1 if request < _REQUEST_MAX else 1
        self._request = request
        self._calls[request] = call
        call.request = request
        call.sent_ns = now_ns
        return call.build(request, self._take_releases() if self.releases else ())

    def abandon(self, call: Call) -> None:
        """The caller's deadline has passed. What the answer grants will be given back when it comes."""
        if call.done:
            return
        call.abandoned = True
        self._abandoned += 1
        call.lost = Reason.TIMED_OUT
        if self.heard_ns < call.sent_ns and not call.patient:
            self.silent = True

    def probe(self, now_ns: int) -> bytes:
        """A PING that nobody waits for: any frame in answer ends the silence."""
        call = PingCall(self, now_ns)
        frame = self.submit(call, now_ns)
        self.abandon(call)
        return frame

    def commit(self, tickets: Sequence[int], ledger: Ledger) -> bytes:
        """COMMIT that wants no answer."""
        self.note_commit(tickets, ledger)
        return frames.build(Verb.COMMIT, 0, releases=self._take_releases(), commits=tickets)

    def abort(self, tickets: Sequence[int]) -> None:
        """These tickets will not be committed; the daemon hears of it with the next chores. Needs no guard."""
        self._aborts.extend(tickets)

    def chores(self) -> Iterator[bytes]:
        """Frames that nobody waits for: aborts, arenas let go, releases that found no frame to ride on, and what undoes
        pins and prefetches.
        """
        while self._aborts:
            yield frames.build_abort(0, _take(self._aborts, KEYS_PER_FRAME))
        while self.unmapped:
            yield frames.build_arena_dropped(self.unmapped.popleft())
        while self.releases:
            yield frames.build(Verb.RELEASE, 0, releases=self._take_releases())
        while self.cancels:
            yield policy_frames.build_cancel(_take(self.cancels, KEYS_PER_FRAME))
        while self.unpins and not self.over:
            call = UnpinCall(self, _take(self.unpins, KEYS_PER_FRAME), self.heard_ns)
            frame = self.submit(call, self.heard_ns)  # as if sent then, since no silence follows from it
            self.abandon(call)
            yield frame
        while self.unwanted and not self.over:
            cancel = CancelCall(self, self.unwanted.popleft(), self.heard_ns)
            frame = self.submit(cancel, self.heard_ns)
            self.abandon(cancel)
            yield frame

    def renewals(self, now_ns: int) -> Iterator[bytes]:
        """Frames that keep parts of leases while others stream. Nobody waits for their answers."""
        for renewals in list(self._renewals):
            for part in renewals.due(now_ns):
                if self.over:
                    return
                call = RenewCall(part, part.ttl_ns, now_ns)
                frame = self.submit(call, self.heard_ns)  # no silence follows from it
                self.abandon(call)
                yield frame
            if renewals.over:
                self._renewals.discard(renewals)

    def keep_daemon(self, pidfd: int) -> None:
        """Mode daemon: remember whose exit ends transfers. Raises OSError."""
        self.daemon = Pidfd(pidfd)

    def clamp_ttl(self, ttl_ns: int) -> int:
        """A lease's length that the daemon accepts."""
        return min(ttl_ns, self.welcome.lease_ttl_ns_max) if self.welcome is not None else ttl_ns

    @property
    def mode(self) -> Mode:
        """How bytes come and go. Needs no guard."""
        return self.welcome.mode if self.welcome is not None else Mode.COPY

    @property
    def store_bytes(self) -> int:
        """How many bytes of a store may be on their way at a time; 0: this session cannot store. Needs no guard."""
        if self.mode is Mode.DIRECT:
            return self.welcome.ring_bytes if self.welcome is not None else 0
        return self.ring.bytes if self.ring is not None else 0

    @property
    def matches_all(self) -> bool:
        """Does this daemon know MATCH_ALL? Needs no guard."""
        return self.welcome is not None and self.welcome.version >= _MATCH_ALL_SINCE

    @property
    def hands_over(self) -> bool:
        """Does this daemon know PREFETCH for the remote tier? Needs no guard."""
        return self.welcome is not None and self.welcome.version >= _HAND_OVER_SINCE

    @property
    def has_chores(self) -> bool:
        """Whether `chores` would yield anything, or `renewals` might. Needs no guard."""
        return bool(
            self.releases
            or self.unmapped
            or self._aborts
            or self.unpins
            or self.cancels
            or len(self._renewals)
            or self.unwanted
        )

    @property
    def hopeless(self) -> bool:
        """The daemon leaves so much unanswered that only a new session will help. Needs no guard."""
        return self._abandoned > ABANDONED_CALLS

    def is_out(self, ticket: int) -> bool:
        """Committed, and the daemon has not said yet what became of it. Needs no guard."""
        return ticket in self._tickets

    def tickets_of(self, ledger: Ledger) -> set[int]:
        """Those that are out and that this ledger, or one below it, wants to know of."""
        return {ticket for ticket, owner in self._tickets.items() if ledger in (owner, owner.parent)}

    def _take_releases(self) -> list[int]:
        return _take(self.releases, RIDERS_PER_FRAME)

    def status(self, directory: str, daemon_pid: int) -> Status:
        """Where a welcomed session stands. Needs no guard."""
        welcome = self.welcome
        assert welcome is not None
        return Status(
            connected=not self.over,
            why_not="the daemon has not answered in time" if self.silent else "",
            runtime_dir=directory,
            tenant=welcome.tenant,
            session=welcome.session,
            daemon_pid=daemon_pid,
            mode=welcome.mode.name.lower(),
            notes=welcome.notes,
            ring_bytes=self.store_bytes,
            lease_ttl_s_max=welcome.lease_ttl_ns_max / 1e9,
        )

    # -- bookkeeping of calls -----------------------------------------------------------------------------------

    def note_commit(self, tickets: Sequence[int], ledger: Ledger) -> None:
        """These tickets go out with the frame being built. Their PUBLISHED may overtake the sender's return."""
        ledger.commit(len(tickets))
        for ticket in tickets:
            self._tickets[ticket] = ledger

    def follow_stream(self, part: Part) -> None:
        """READY frames for this lease will come."""
        self._streams[part.lease] = part
        self._last_stream = max(self._last_stream, part.lease)

    def keep(self, renewals: Renewals) -> None:
        """These parts are to be kept, as long as the caller keeps `renewals`."""
        self._renewals.add(renewals)

    def forget_stream(self, part: Part) -> None:
        """Those that still come are for nobody."""
        self._streams.pop(part.lease, None)

    # -- in -----------------------------------------------------------------------------------------------------

    def receive(self, frame: bytes, fds: Sequence[int], now_ns: int) -> None:
        """Take one message. `fds` stay the caller's, to be closed afterwards.

        Raises ProtocolError for what a daemon would never say, RefusedError where this session must not be, OSError
        where memory cannot be mapped: the caller then ends the session.
        """
        self.heard_ns = now_ns
        self.silent = False
        self.fds = fds
        head = frames.parse_head(frame, len(frame))
        if not head.request:
            self._receive_unasked(frame, head)
            return
        call = self._calls.get(head.request)
        if call is None:
            raise ProtocolError(f"an answer to request {head.request}, which nobody made")
        if head.verb == call.answer:
            call.accept(frame, head)
        elif head.verb == _FAILED:
            call.refuse(error_for(*frames.parse_failure(frame, head)))
        else:
            raise ProtocolError(f"verb {head.verb} in answer to {call.answer.name}")
        del self._calls[head.request]
        if call.abandoned:
            self._abandoned -= 1
            call.undo()
        else:
            call.finish()

    def _receive_unasked(self, frame: bytes, head: Head) -> None:
        verb = frames.verb_of(head)
        if verb is Verb.PUBLISHED:
            self._published(frame, head)
        elif verb is Verb.READY:
            self._ready(frame, head)
        elif verb is Verb.ARENA:
            self._arenas_came(frame, head)
        elif verb is Verb.ARENA_GONE:
            self._arena_gone(frames.parse_number(frame, head))
        elif verb in {Verb.LOADED, Verb.SAVED}:
            self._moved(verb, frame, head)
        elif verb is Verb.REFUSED:
            self.refusals.note(*frames.parse_failure(frame, head))
        elif verb is Verb.GOAWAY:
            code, text = frames.parse_failure(frame, head)
            self.goodbye = f"{text} ({code.name})"
            raise error_for(code, text) if code is not Code.OK else ProtocolError(text)
        else:
            raise ProtocolError(f"{verb.name} that nobody asked for")

    def _published(self, frame: bytes, head: Head) -> None:
        for ticket, outcome in frames.parse_published(frame, head):
            ledger = self._tickets.pop(ticket, None)
            if ledger is None or outcome >= len(_OUTCOMES):
                raise ProtocolError(f"PUBLISHED says outcome {outcome} of ticket {ticket}")
            ledger.settle(ticket, _OUTCOMES[outcome])

    def _ready(self, frame: bytes, head: Head) -> None:
        ready = frames.parse_ready(frame, head)
        part = self._streams.get(ready.lease)
        if part is None:  # released, dropped or ended meanwhile, unless it never was
            if ready.lease > self._last_stream:
                raise ProtocolError(f"READY for lease {ready.lease}, which has no blocks to come")
            return
        places = part.take(ready, self.arenas)
        if not part.coming:
            self.forget_stream(part)
        if self.cold and places:
            self.warm(places, part.block_bytes)

    def _moved(self, verb: Verb, frame: bytes, head: Head) -> None:
        """How far a transfer has come."""
        if verb is Verb.LOADED:
            loaded = device_frames.parse_loaded(frame, head)
            transfer = self.transfers.get(loaded.transfer)
            if transfer is None or not transfer.loads:
                raise ProtocolError(f"LOADED for transfer {loaded.transfer}, which there is not")
            transfer.loaded(loaded.blocks, loaded.groups, loaded.state)
        else:
            number, fates = device_frames.parse_saved(frame, head)
            transfer = self.transfers.get(number)
            if transfer is None or transfer.loads:
                raise ProtocolError(f"SAVED for transfer {number}, which there is not")
            transfer.saved(fates)
        if transfer.over:
            del self.transfers[transfer.number]

    def _arenas_came(self, frame: bytes, head: Head) -> None:
        arenas = frames.parse_arenas(frame, head)
        if len(arenas) != len(self.fds):
            raise ProtocolError(f"{len(arenas)} arenas came with {len(self.fds)} descriptors")
        writable = bool(head.flags & Flag.WRITABLE)
        if writable and self.mode is not Mode.DIRECT:
            raise ProtocolError("an arena came writable, which is for mode direct")
        known = dict(self.writable if writable else self.arenas)
        for (arena, arena_bytes), fd in zip(arenas, self.fds, strict=True):
            if arena in known:
                raise ProtocolError(f"arena {arena} came twice")
            if writable:
                known[arena] = self.memory.map_ring(fd, arena_bytes, self._when_unmapped(arena))
                continue
            known[arena] = self.memory.map_arena(fd, arena_bytes, self._when_unmapped(arena))
            if known[arena].cold:
                self.cold.append(known[arena])
        if writable:
            self.writable = known
        else:
            self.arenas = known

    def _when_unmapped(self, arena: int) -> Callable[[], None]:
        """What a map of an arena calls when it is gone. It holds the queue, and not this session."""
        if self.mode is not Mode.DIRECT:
            return partial(self.unmapped.append, arena)
        both = self._mapped_twice.get(arena) or _MappedTwice(arena, self.unmapped)
        self._mapped_twice[arena] = both
        return both.one_is_gone

    def _arena_gone(self, arena: int) -> None:
        if arena not in self.arenas and arena not in self.writable:
            raise ProtocolError("ARENA_GONE for an arena that was never sent")
        for maps in (self.arenas, self.writable):
            if arena in maps:
                maps[arena].gone = True  # its last user unmaps it, and then `unmapped` says so
        self.cold = [mapping for mapping in self.cold if not mapping.gone]
        self.arenas = {number: mapping for number, mapping in self.arenas.items() if number != arena}
        self.writable = {number: mapping for number, mapping in self.writable.items() if number != arena}

    def warm(self, places: Sequence[Place], block_bytes: int) -> None:
        """Blocks that are about to be read lie here: see that their pages are there."""
        cold = [place for place in places if place[0].cold]
        if cold:
            self.memory.warm(cold, block_bytes)
        self.cold = [mapping for mapping in self.cold if mapping.cold]

    def let_go(self) -> None:
        """Unmap every arena that nobody reads, so that the daemon hears of it before the end."""
        for mapping in (*self.arenas.values(), *self.writable.values()):
            mapping.gone = True  # who has registered it with a device lets go of it, too
        self.arenas = {}
        self.writable = {}
        self.cold = []

    # -- the end ------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The connection is gone: calls are lost, tickets failed, streams ended. Maps go when their last user does."""
        if self.over:
            return
        self.over = True
        for call in list(self._calls.values()):
            if not call.done and not call.abandoned:
                call.lose(Reason.UNREACHABLE)
        self._calls.clear()
        for ticket, ledger in list(self._tickets.items()):
            ledger.settle(ticket, Reason.UNREACHABLE)
        self._tickets.clear()
        for part in list(self._streams.values()):
            part.stop()
        for transfer in list(self.transfers.values()):
            transfer.lose()
        self.transfers.clear()
        self.unwanted.clear()
        self.let_go()
        if self.ring is not None:
            self.ring.gone = True
        self.ring = None


class _MappedTwice:
    """An arena that may be mapped for reading and for writing. When neither map is left, the daemon is told.

    Whoever unmaps holds on to this until then, and may be the garbage collector: no locks.
    """

    __slots__ = ("__weakref__", "_arena", "_queue")

    def __init__(self, arena: int, queue: deque[int]) -> None:
        self._arena = arena
        self._queue = queue

    def one_is_gone(self) -> None:
        """It lets go of this, too."""

    def __del__(self) -> None:
        self._queue.append(self._arena)


def _take(queue: deque[int], most: int) -> list[int]:
    return [queue.popleft() for _ in range(min(len(queue), most))]
