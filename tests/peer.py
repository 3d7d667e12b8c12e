"""A daemon stand-in for faults that a correct daemon never shows: it speaks the frames and can be told to misspeak.

One thread, a dict of blocks, real sockets and real memfds. What it should do wrong is set on it before the client
gets there, or run in its thread with `do`:

    peer.mute(Verb.LEASE)          swallow these requests, keeping them
    peer.answer_held()             ... and answer them after all
    peer.instead[Verb.PING] = f    let `f(peer, head, frame)` answer instead
    peer.on_disk |= {key, ...}     these blocks come by READY, `peer.ready_blocks` a frame at once or when told:
    peer.ready(lease, count)       the next `count` blocks of a lease, rightly, or wrongly as the arguments say
    peer.do(lambda: peer.send(b))  anything else
    peer.wait_for(lambda: ...)     wait until the peer has seen something
"""

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from kvproto import frames, policy_frames
from kvproto.errors import Code, Grant, Outcome
from kvproto.frames import Durable, Flag, Head, Matched, Mode, Ready, Role, Verb, Welcome
from kvproto.limits import FRAME_BYTES, KEY_BYTES, KEYS_PER_FRAME, MIB, PAGE_BYTES, PROTOCOL_VERSION, slot_bytes_for
from kvproto.policy_frames import Hint, Report

PATIENCE_S: Final = 20.0
Answerer = Callable[["Peer", Head, bytes], None]


class Arena:
    """One memfd with slots of one size."""

    def __init__(self, number: int, arena_bytes: int) -> None:
        self.number = number
        self.bytes = arena_bytes
        self.fd = os.memfd_create(f"peer-arena-{number}")
        os.ftruncate(self.fd, arena_bytes)
        self.map = mmap.mmap(self.fd, arena_bytes)
        self.used = 0
        self.sent = False


class Peer:
    """Serves one client at a time at `directory/hot.sock`; a context manager. Attributes say what it does wrong."""

    def __init__(self, directory: Path, *, arena_bytes: int = MIB, ring_bytes: int = MIB) -> None:
        self.path = directory / "hot.sock"
        self.arena_bytes = arena_bytes
        self.ring_bytes = ring_bytes
        self.clock_offset_ns = 0
        self.version = PROTOCOL_VERSION
        self.lease_ttl_ns_max = 60 * 10**9
        self.instead: dict[Verb, Answerer] = {}
        self.grants: list[Grant] = []  # taken from the front for the keys of RESERVE, GRANTED when empty
        self.outcomes: list[Outcome] = []  # likewise for committed tickets
        self.publishing = True
        self.on_disk: set[bytes] = set()  # of the blocks
        self.ready_blocks = 0  # how many a READY brings right after LEASED; 0: none comes unless told
        self.durables: list[Durable] = []  # answers to FLUSH, from the front; all zeros when empty: no disk

        self.seen: list[Verb] = []
        self.hellos = 0
        self.leases: dict[int, int] = {}  # lease -> blocks
        self.coming: dict[int, list[tuple[bytes, tuple[int, int]]]] = {}  # lease -> its blocks to come: key, place
        self.recompute_us: list[int] = []  # of every RESERVE
        self.waits_ns: list[int] = []  # of every LEASE
        self.flush_waits_ns: list[int] = []
        self.released: list[int] = []
        self.committed: list[int] = []
        self.aborted: list[int] = []
        self.dropped: list[int] = []
        self.hints: list[Hint] = []  # none is ever refused
        self.reports: list[Report] = []
        self.cancelled: list[int] = []  # prefetches
        self.blocks: dict[bytes, tuple[Arena, int]] = {}
        self.arenas: dict[int, Arena] = {}

        self._muted: set[Verb] = set()
        self._held: list[tuple[Head, bytes]] = []
        self._block_bytes = 0
        self._tickets: dict[int, tuple[bytes, int]] = {}  # ticket -> key, page
        self._numbers = 0
        self._lease = 0
        self._page = 0
        self._ring: mmap.mmap | None = None
        self._sock: socket.socket | None = None
        self._changed = threading.Condition()
        self._jobs: list[Callable[[], None]] = []
        self._stopping = False
        self._listener = self._listen()
        self._nudge_read, self._nudge_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, name="peer", daemon=True)

    # -- for the test's thread ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        os.write(self._nudge_write, b".")
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the peer hangs"
        self._hang_up()
        self._listener.close()
        for arena in self.arenas.values():
            arena.map.close()
            os.close(arena.fd)
        os.close(self._nudge_read)
        os.close(self._nudge_write)

    def do(self, job: Callable[[], None]) -> None:
        """Run `job` in the peer's thread and wait until it has."""
        done = threading.Event()

        def run() -> None:
            job()
            done.set()

        self._jobs.append(run)
        os.write(self._nudge_write, b".")
        assert done.wait(PATIENCE_S), "the peer hangs"

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the peer has seen what makes `condition` true. Fails after a generous while."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), f"never came; seen {self.seen[-20:]}"

    def mute(self, *verbs: Verb) -> None:
        """Keep requests of these verbs without an answer. None: all but HELLO."""
        self._muted = set(verbs) if verbs else set(Verb) - {Verb.HELLO}

    def answer_held(self) -> None:
        """Answer what was kept, and no longer keep anything."""

        def answer() -> None:
            self._muted = set()
            held, self._held = self._held, []
            for head, frame in held:
                self._handle(head, frame)

        self.do(answer)

    def send(self, frame: bytes, fds: list[int] | None = None) -> None:
        """Send a message to the client. Only in the peer's thread (`do`, `instead`)."""
        assert self._sock is not None
        socket.send_fds(self._sock, [frame], fds or [])

    def hang_up(self) -> None:
        """Close the connection as a dying daemon does."""
        self.do(self._hang_up)

    def stop_listening(self) -> None:
        """From now on there is no daemon."""
        self.do(self._listener.close)
        self.path.unlink()

    def listen_again(self) -> None:
        """There is one again, which remembers nothing."""

        def listen() -> None:
            self.blocks.clear()
            self._listener = self._listen()

        self.do(listen)

    def put(self, key: bytes, block: bytes) -> None:
        """Store a block from nowhere. Before the client comes, or in the peer's thread."""
        arena, slot = self._slot_for(len(block))
        start = slot * slot_bytes_for(len(block))
        arena.map[start : start + len(block)] = block
        self.blocks[key] = (arena, slot)

    def take_back(self, arena: int) -> None:
        """ARENA_GONE. Its blocks are forgotten, the memory is zeroed as a punched hole would be."""

        def gone() -> None:
            gone_arena = self.arenas[arena]
            self.blocks = {key: at for key, at in self.blocks.items() if at[0] is not gone_arena}
            gone_arena.used = gone_arena.bytes  # never used again
            gone_arena.sent = False
            self.send(frames.build_arena_gone(arena))

        self.do(gone)

    def ready(
        self,
        lease: int,
        count: int,
        *,
        left: int | None = None,
        places: list[tuple[int, int]] | None = None,
        deadline_ns: int | None = None,
        cut: int = 0,
    ) -> None:
        """Send the next `count` blocks of a lease by READY; any argument more is a lie. From any thread.

        `left`: blocks to come, 0 to end early; `places`: instead of where they lie; `cut`: bytes missing at the end.
        """

        def send() -> None:
            self._ready(lease, count, left, places, deadline_ns, cut)

        send() if threading.current_thread() is self._thread else self.do(send)

    # -- its thread ---------------------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.path))
        listener.listen(8)
        return listener

    def _serve(self) -> None:
        while not self._stopping:
            waiting: list[socket.socket | int] = [self._nudge_read]
            if self._sock is not None:
                waiting.append(self._sock)
            elif self._listener.fileno() >= 0:
                waiting.append(self._listener)
            ready, _, _ = select.select(waiting, [], [], PATIENCE_S)
            if self._nudge_read in ready:
                os.read(self._nudge_read, 64)
            jobs, self._jobs = self._jobs, []
            for job in jobs:
                job()
            if self._sock is not None and self._sock in ready:
                self._read()
            elif self._listener in ready:
                self._sock, _ = self._listener.accept()
            with self._changed:
                self._changed.notify_all()

    def _read(self) -> None:
        assert self._sock is not None
        try:
            frame = self._sock.recv(FRAME_BYTES)
        except ConnectionError:
            frame = b""
        if not frame:
            self._hang_up()
            return
        head = frames.parse_head(frame, len(frame))
        verb = frames.verb_of(head)
        self.seen.append(verb)
        if verb in self._muted:
            self._held.append((head, frame))
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._handle(head, frame)

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._held.clear()
        self._tickets.clear()
        for arena in self.arenas.values():
            arena.sent = False

    def _handle(self, head: Head, frame: bytes) -> None:
        releases, commits = frames.riders(frame, head)
        self.released += releases
        self._commit(commits)
        verb = Verb(head.verb)
        answer = self.instead.get(verb) or _ANSWERS[verb]
        answer(self, head, frame)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _slot_for(self, block_bytes: int) -> tuple[Arena, int]:
        slot_bytes = slot_bytes_for(block_bytes)
        for arena in self.arenas.values():
            if arena.used + slot_bytes <= arena.bytes:
                break
        else:
            number = len(self.arenas) + 1
            arena = self.arenas[number] = Arena(number, self.arena_bytes)
        arena.used += slot_bytes
        return arena, arena.used // slot_bytes - 1

    def _commit(self, tickets: tuple[int, ...]) -> None:
        outcomes = []
        for ticket in tickets:
            key, page = self._tickets.pop(ticket)
            self.committed.append(ticket)
            outcome = self.outcomes.pop(0) if self.outcomes else Outcome.PUBLISHED
            if outcome == Outcome.PUBLISHED and self._ring is not None:
                start = page * PAGE_BYTES
                self.put(key, self._ring[start : start + self._block_bytes])
            outcomes.append((ticket, int(outcome)))
        if outcomes and self.publishing:
            self.send(frames.build_published(outcomes))

    # -- answers of a correct daemon ----------------------------------------------------------------------------

    def hello(self, head: Head, frame: bytes) -> None:
        """WELCOME."""
        self.hellos += 1
        hello = frames.parse_hello(frame, head)
        ring_bytes = self.ring_bytes if hello.role is Role.ENGINE else 0
        pidfd = os.pidfd_open(os.getpid())
        fds = [pidfd]
        if ring_bytes:
            fds.append(os.memfd_create("peer-ring"))
            os.ftruncate(fds[1], ring_bytes)
            self._ring = mmap.mmap(fds[1], ring_bytes)
            self._page = 0
        clock_ns = time.monotonic_ns() + self.clock_offset_ns
        welcome = Welcome(
            self.version, Mode.COPY, self.hellos, clock_ns, ring_bytes, self.lease_ttl_ns_max, 30 * 10**9,
            KEYS_PER_FRAME, hello.tenant or "default", "",
        )  # fmt: skip
        self.send(frames.build_welcome(head.request, welcome), fds)
        for fd in fds:
            os.close(fd)

    def open(self, head: Head, frame: bytes) -> None:
        """OPENED, or FAILED for a block beyond the arena."""
        from kvproto.identity import NamespaceIdentity

        identity = NamespaceIdentity.from_canonical(frame[head.body :])
        if identity.block_bytes > self.arena_bytes:
            text = "block beyond the arena"
            self.send(frames.build_failure(Verb.FAILED, head.request, Code.BAD_ARGUMENT, text))
            return
        self._block_bytes = identity.block_bytes
        body = frames.OPENED_BODY.pack(7, slot_bytes_for(identity.block_bytes))
        self.send(frames.build(Verb.OPENED, head.request, body))

    def lead(self, keys: list[bytes]) -> list[tuple[Arena, int]]:
        """Places of the lead run."""
        found = []
        for key in keys:
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
        return found

    def match(self, head: Head, frame: bytes) -> None:
        """MATCHED."""
        self._matched(head, _keys(frame, frames.require_keys(head, frames.KEYS_HEAD.size), head))

    def match_all(self, head: Head, frame: bytes) -> None:
        """MATCHED: every namespace has all blocks. Unknown to a daemon before version 4."""
        if self.version < 4:
            self.send(frames.build_failure(Verb.GOAWAY, 0, Code.UNKNOWN_VERB, "verb 22"))
            self._hang_up()
            return
        self._matched(head, _keys(frame, frames.parse_match_all(frame, head)[1], head))

    def _matched(self, head: Head, keys: list[bytes]) -> None:
        matched = Matched(0, len(self.lead(keys)), 0, 0, 1000, frames.UNKNOWN_NS)
        body = frames.MATCHED_BODY.pack(
            matched.hbm, matched.dram, matched.disk, matched.pending, matched.load_ns, matched.recompute_ns
        )
        self.send(frames.build(Verb.MATCHED, head.request, body))

    def lease(self, head: Head, frame: bytes) -> None:
        """ARENA for what the client has not seen, then LEASED."""
        keys = _keys(frame, frames.require_keys(head, frames.LEASE_HEAD.size), head)
        _, ttl_ns, wait_ns = frames.LEASE_HEAD.unpack_from(frame, head.body)
        self.waits_ns.append(wait_ns)
        places = self.lead(keys)
        self._introduce(places)
        at_once = next((number for number, key in enumerate(keys[: len(places)]) if key in self.on_disk), len(places))
        spots = [(arena.number, slot) for arena, slot in places]
        later = list(zip(keys[at_once:], spots[at_once:], strict=False)) if wait_ns else []
        self.send(self.leased(head.request, ttl_ns, spots[:at_once], later))
        while self.ready_blocks and later and self.coming[self._lease]:
            self._ready(self._lease, min(self.ready_blocks, len(self.coming[self._lease])))

    def _introduce(self, places: list[tuple[Arena, int]]) -> None:
        fresh = [arena for arena in self.arenas.values() if not arena.sent and any(at is arena for at, _ in places)]
        if fresh:
            body = [(arena.number, arena.bytes) for arena in fresh]
            self.send(frames.build_arenas(body), [arena.fd for arena in fresh])
            for arena in fresh:
                arena.sent = True

    def leased(
        self,
        request: int,
        ttl_ns: int,
        places: list[tuple[int, int]],
        later: Sequence[tuple[bytes, tuple[int, int]]] = (),
    ) -> bytes:
        """A LEASED frame."""
        promised = len(places) + len(later)
        if promised:
            self._lease += 1
            self.leases[self._lease] = promised
            self.coming[self._lease] = list(later)
        lease, deadline_ns = (self._lease, time.monotonic_ns() + ttl_ns) if promised else (0, 0)
        body = frames.LEASED_HEAD.pack(lease, deadline_ns, len(later))
        body += b"".join(frames.LOCATION.pack(*place) for place in places)
        return frames.build(Verb.LEASED, request, body, count=len(places))

    def _ready(
        self,
        lease: int,
        count: int,
        left: int | None = None,
        places: list[tuple[int, int]] | None = None,
        deadline_ns: int | None = None,
        cut: int = 0,
    ) -> None:
        coming = self.coming.get(lease, [])
        chunk, self.coming[lease] = coming[:count], coming[count:]
        disk = sum(key in self.on_disk for key, _ in chunk)
        ready = Ready(
            lease,
            time.monotonic_ns() + 10**10 if deadline_ns is None else deadline_ns,
            len(self.coming[lease]) if left is None else left,
            disk if places is None else 0,
            [place for _, place in chunk] if places is None else places,
        )
        frame = frames.build_ready(ready)
        self.send(frame[: len(frame) - cut])

    def flush(self, head: Head, frame: bytes) -> None:
        """DURABLE."""
        self.flush_waits_ns.append(frames.parse_flush(frame, head)[1])
        durable = self.durables.pop(0) if self.durables else Durable(0, 0, 0, 0)
        self.send(frames.build_durable(head.request, durable))

    def renew(self, head: Head, frame: bytes) -> None:
        """RENEWED."""
        lease, ttl_ns = frames.RENEW_BODY.unpack_from(frame, head.body)
        known = lease in self.leases and lease not in self.released
        deadline_ns = time.monotonic_ns() + ttl_ns if known else 0
        self.send(frames.build(Verb.RENEWED, head.request, frames.CLOCK_BODY.pack(deadline_ns)))

    def reserve(self, head: Head, frame: bytes) -> None:
        """RESERVED, with spans one after the other, for ever new."""
        keys = _keys(frame, frames.require_keys(head, frames.RESERVE_HEAD.size), head)
        self.recompute_us.append(frames.RESERVE_HEAD.unpack_from(frame, head.body)[1])
        pages = slot_bytes_for(self._block_bytes) // PAGE_BYTES
        items = []
        for key in keys:
            grant = self.grants.pop(0) if self.grants else Grant.GRANTED
            if grant is Grant.GRANTED and key in self.blocks:
                grant = Grant.KNOWN
            if grant is Grant.GRANTED:
                if (self._page + pages) * PAGE_BYTES > self.ring_bytes:
                    self._page = 0
                ticket = self._number()
                self._tickets[ticket] = (key, self._page)
                items.append((int(grant), self._page, ticket))
                self._page += pages
            else:
                items.append((int(grant), 0, 0))
        body = b"".join(frames.RESERVED_ITEM.pack(*item) for item in items)
        self.send(frames.build(Verb.RESERVED, head.request, body, count=len(items)))

    def commit(self, head: Head, frame: bytes) -> None:
        """COMMITTED, if it is wanted."""
        if head.flags & Flag.WANTS_ANSWER:
            self.send(frames.build(Verb.COMMITTED, head.request, frames.NUMBER_BODY.pack(0)))

    def abort(self, head: Head, frame: bytes) -> None:
        """Nothing is said."""
        tickets = frames.parse_tickets(frame, head)
        for ticket in tickets:
            del self._tickets[ticket]
        self.aborted += tickets

    def delete(self, head: Head, frame: bytes) -> None:
        """DELETED."""
        keys = _keys(frame, frames.require_keys(head, frames.KEYS_HEAD.size), head)
        deleted = sum(self.blocks.pop(key, None) is not None for key in keys)
        self.send(frames.build(Verb.DELETED, head.request, frames.NUMBER_BODY.pack(deleted)))

    def ping(self, head: Head, frame: bytes) -> None:
        """PONG."""
        self.send(frames.build(Verb.PONG, head.request, frame[head.body :]))

    def arena_dropped(self, head: Head, frame: bytes) -> None:
        """Nothing is said."""
        self.dropped.append(frames.parse_number(frame, head))

    def hint(self, head: Head, frame: bytes) -> None:
        """Nothing is said."""
        self.hints.append(policy_frames.parse_hint(frame, head))

    def report(self, head: Head, frame: bytes) -> None:
        """Nothing is said."""
        self.reports.append(policy_frames.parse_report(frame, head))

    def cancel(self, head: Head, frame: bytes) -> None:
        """Nothing is said."""
        self.cancelled += policy_frames.parse_numbers(frame, head)

    def release(self, head: Head, frame: bytes) -> None:
        """Riders only."""


def _keys(frame: bytes, offset: int, head: Head) -> list[bytes]:
    return [key for (key,) in struct.iter_unpack(f"{KEY_BYTES}s", frame[offset : offset + KEY_BYTES * head.count])]


_ANSWERS: dict[Verb, Answerer] = {
    Verb.HELLO: Peer.hello,
    Verb.OPEN: Peer.open,
    Verb.MATCH: Peer.match,
    Verb.MATCH_ALL: Peer.match_all,
    Verb.LEASE: Peer.lease,
    Verb.RELEASE: Peer.release,
    Verb.RENEW: Peer.renew,
    Verb.RESERVE: Peer.reserve,
    Verb.COMMIT: Peer.commit,
    Verb.ABORT: Peer.abort,
    Verb.DELETE: Peer.delete,
    Verb.FLUSH: Peer.flush,
    Verb.PING: Peer.ping,
    Verb.ARENA_DROPPED: Peer.arena_dropped,
    Verb.HINT: Peer.hint,
    Verb.REPORT: Peer.report,
    Verb.CANCEL: Peer.cancel,
}
