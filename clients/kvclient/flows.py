"""The verbs, written once for threads and for asyncio: generators that say what to do next and go on when it is done.

A flow yields steps; `connection` performs them blocking, `aio` awaits them:

    Call      send a request, wait for its answer (calls.py)
    Commit    send tickets, wait for nothing
    Watcher   wait until something has changed: Settled, for tickets to be published or to fail (ledger.py), and
              Arrival, for blocks of a lease to come (stream.py)
    Pause     wait
    Copy      move bytes

No flow waits past the deadline in its step, so none can hang; none raises because a daemon is missing. One that
is ended at a step (cancelled, ^C) gives back what it was granted, by the answer that it has not seen yet, too.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from kvclient.calls import (
    Call,
    DeleteCall,
    FlushCall,
    LeaseCall,
    MatchAllCall,
    MatchCall,
    OpenCall,
    Opened,
    PingCall,
    RenewCall,
    give_back,
)
from kvclient.copying import Gate, Move, copy, copy_at_once
from kvclient.ledger import Ledger, Pause, Settled, Watcher
from kvclient.results import Deleted, Match, Reason, Tiers
from kvclient.stream import AHEAD_NS, Part
from kvkernels.device.port import DeviceError
from kvproto.errors import Code, UsageError
from kvproto.frames import NOTHING_MATCHED, UNKNOWN_NS, Durable
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME, LEASE_WAIT_NS_MAX, MATCHES_PER_FRAME

if TYPE_CHECKING:
    from kvclient.protocol import Session

Clock: TypeAlias = Callable[[], int]  # CLOCK_MONOTONIC in nanoseconds


class Commit:
    """Send a COMMIT that nobody answers."""

    __slots__ = ("deadline_ns", "ledger", "sent", "session", "tickets")

    def __init__(self, session: "Session", tickets: list[int], ledger: Ledger, deadline_ns: int) -> None:
        self.session = session
        self.tickets = tickets
        self.ledger = ledger
        self.deadline_ns = deadline_ns
        self.sent = False


class Copy:
    """Move bytes; the memory on both sides is kept alive by whoever yields this, and may be read while in `gate`.

    `at_once`: see `copy_at_once`. `mover`: who does it, if it is a device's memory. `failed`: it could not.
    """

    __slots__ = ("at_once", "failed", "gate", "mover", "moves")

    def __init__(
        self, moves: list[Move], *, at_once: bool = False, gate: Gate | None = None,
        mover: Callable[[list[Move]], None] | None = None,
    ) -> None:  # fmt: skip
        self.moves = moves
        self.at_once = at_once
        self.gate = gate or nullcontext()
        self.mover = mover
        self.failed: DeviceError | None = None

    def carry_out(self) -> None:
        """In any thread. Raises WithdrawnError."""
        with self.gate:
            if self.mover is None:
                (copy_at_once if self.at_once else copy)(self.moves)
                return
            try:
                self.mover(self.moves)
            except DeviceError as error:
                self.failed = error


Step: TypeAlias = Call | Commit | Watcher | Pause | Copy
R = TypeVar("R")
Flow: TypeAlias = Generator[Step, None, R]
FRAME_KEYS_BYTES: Final = KEYS_PER_FRAME * KEY_BYTES
DURATION_NS_MAX: Final = 1 << 53  # 104 days: sums of these stay far from the end of 64 bits


@dataclass(frozen=True, slots=True)
class Target:
    """A namespace as the flows need it."""

    canonical: bytes
    block_bytes: int


def join_keys(keys: Sequence[bytes]) -> bytes:
    """The keys in one piece, as they travel. Raises UsageError unless each is 32 bytes."""
    try:
        joined = b"".join(keys)
        lengths = list(map(len, keys))
    except TypeError as error:
        raise UsageError(f"keys must be a sequence of {KEY_BYTES}-byte bytes objects: {error}") from error
    if lengths != [KEY_BYTES] * len(lengths) or len(joined) != KEY_BYTES * len(lengths):
        raise UsageError(f"a key has {KEY_BYTES} bytes, not {sorted({*lengths} - {KEY_BYTES})}")
    return joined


def nanoseconds(name: str, seconds: float, least_ns: int = 0) -> int:
    """A duration that a caller gave, in nanoseconds. Raises UsageError below `least_ns` and for no number."""
    try:
        ns = int(seconds * 1e9)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{name} must be a number of seconds, not {seconds!r}") from error
    if ns < least_ns:
        raise UsageError(f"{name} must be {'positive' if least_ns else '0 or more'}, not {seconds}")
    return min(ns, DURATION_NS_MAX)


def nothing() -> Flow[None]:
    """No step at all."""
    yield from ()


def open_namespace(session: "Session", target: Target, deadline_ns: int) -> Flow[Opened | None]:
    """The namespace in this session, opened on first use. Raises UsageError if the daemon finds it impossible."""
    opened = session.namespaces.get(target.canonical)
    if opened is not None:
        return opened
    call = OpenCall(session, target.canonical, target.block_bytes, deadline_ns)
    yield call
    if call.error is not None and call.error.code in {Code.BAD_ARGUMENT, Code.LIMIT}:
        raise UsageError(str(call.error))
    return call.opened


def fetch(
    session: "Session | None",
    clock: Clock,
    target: Target,
    keys: bytes,
    *,
    wait_ns: int,
    ttl_ns: int,
    timeout_ns: int,
) -> Flow[list[Part]]:
    """Lease the lead run, a frame's worth of keys at a time, each if all before it are there or promised."""
    parts: list[Part] = []
    calls: list[LeaseCall] = []
    wait_until_ns = clock() + wait_ns
    deadline_ns = wait_until_ns + timeout_ns
    if session is None or not keys:
        return parts
    opened = session.namespaces.get(target.canonical) or (yield from open_namespace(session, target, deadline_ns))
    if opened is None:
        return parts
    if len(keys) > FRAME_KEYS_BYTES:  # nobody could renew a part in less, once another one streams
        ttl_ns = min(ttl_ns + wait_ns, max(ttl_ns, AHEAD_NS))
    ttl_ns = session.clamp_ttl(ttl_ns)
    try:
        for start in range(0, len(keys), FRAME_KEYS_BYTES):
            chunk = keys[start : start + FRAME_KEYS_BYTES]
            wait_ns = min(LEASE_WAIT_NS_MAX, max(0, wait_until_ns - clock()))
            call = LeaseCall(session, opened, chunk, ttl_ns=ttl_ns, wait_ns=wait_ns, deadline_ns=deadline_ns)
            calls.append(call)
            yield call
            if call.part is None or not call.answered:
                break
            parts.append(call.part)
            if call.part.promised * KEY_BYTES < len(chunk):
                break
    except BaseException:  # cancelled or interrupted
        give_back(calls)
        raise
    return parts


def renew(parts: Sequence[Part], ttl_ns: int, deadline_ns: int) -> Flow[bool]:
    """Keep every part of a lease; False if one is gone."""
    for part in parts:
        call = RenewCall(part, part.session.clamp_ttl(ttl_ns), deadline_ns)
        yield call
        if not call.answered or not part.deadline_ns:
            return False
    return True


NO_MATCH: Final = Match(0, Tiers(), 0, None, None)


def match(session: "Session | None", target: Target, keys: bytes, deadline_ns: int) -> Flow[Match]:
    """Add up the lead runs of frame after frame until one falls short."""
    if session is None or not keys:
        return NO_MATCH
    opened = session.namespaces.get(target.canonical) or (yield from open_namespace(session, target, deadline_ns))
    if opened is None:
        return NO_MATCH
    return (yield from _match(session, [opened.number], keys, deadline_ns))


def match_all(session: "Session | None", targets: Sequence[Target], keys: bytes, deadline_ns: int) -> Flow[Match]:
    """What all of these namespaces have of a chain."""
    if session is None or not keys:
        return NO_MATCH
    if not session.matches_all:
        return (yield from _match_each(session, targets, keys, deadline_ns))
    numbers: list[int] = []
    for target in targets:
        opened = session.namespaces.get(target.canonical) or (yield from open_namespace(session, target, deadline_ns))
        if opened is None:
            return NO_MATCH
        numbers.append(opened.number)
    return (yield from _match(session, numbers, keys, deadline_ns))


def _match(session: "Session", numbers: Sequence[int], keys: bytes, deadline_ns: int) -> Flow[Match]:
    hbm = dram = disk = pending = 0
    load_ns: int | None = 0
    recompute_ns: int | None = 0
    step = KEY_BYTES * min(KEYS_PER_FRAME, MATCHES_PER_FRAME // len(numbers))
    for start in range(0, len(keys), step):
        chunk = keys[start : start + step]
        if len(numbers) == 1:
            call = MatchCall(session, numbers[0], chunk, deadline_ns)
        else:
            call = MatchAllCall(session, numbers, chunk, deadline_ns)
        yield call
        if call.matched is None or not call.answered:
            if start == 0:
                return NO_MATCH
            break
        found = call.matched
        if found is NOTHING_MATCHED and start == 0:
            return NO_MATCH
        hbm, dram, disk, pending = hbm + found.hbm, dram + found.dram, disk + found.disk, found.pending
        load_ns = _add(load_ns, found.load_ns)
        recompute_ns = _add(recompute_ns, found.recompute_ns)
        if (found.hbm + found.dram + found.disk) * KEY_BYTES < len(chunk):
            break
    tiers = Tiers(hbm, dram, disk)
    return Match(hbm + dram + disk, tiers, pending, _seconds(load_ns), _seconds(recompute_ns))


def _match_each(session: "Session", targets: Sequence[Target], keys: bytes, deadline_ns: int) -> Flow[Match]:
    """As `match_all`, with a daemon of before: one MATCH after the other, each as far as all before it reach. What
    loading takes is not known then, unless all have as much.
    """
    found: list[Match] = []
    for target in targets:
        found.append((yield from match(session, target, keys, deadline_ns)))
        keys = keys[: (found[-1].blocks + found[-1].pending) * KEY_BYTES]
        if not keys:
            return NO_MATCH
    blocks = min(some.blocks for some in found)
    disk = min(blocks, max(some.tiers.disk for some in found))
    load_s = recompute_s = None
    if all(some.blocks == blocks for some in found):
        load_s = _longest([some.load_seconds for some in found])
        recompute_s = _longest([some.recompute_seconds for some in found])
    pending = len(keys) // KEY_BYTES - blocks
    return Match(blocks, Tiers(0, blocks - disk, disk), pending, load_s, recompute_s)


def delete(session: "Session | None", clock: Clock, target: Target, keys: bytes, timeout_ns: int) -> Flow[Deleted]:
    """How many blocks the daemon forgot. Each answer may take `timeout_ns`: whoever names many is not left half-way."""
    deleted = asked = 0
    if session is None or not keys:
        return Deleted(0, len(keys) // KEY_BYTES)
    opened = yield from open_namespace(session, target, clock() + timeout_ns)
    while opened is not None and asked < len(keys):
        call = DeleteCall(session, opened.number, keys[asked : asked + FRAME_KEYS_BYTES], clock() + timeout_ns)
        yield call
        if not call.answered:
            break
        deleted += call.deleted
        asked += len(call.keys)
    return Deleted(deleted, (len(keys) - asked) // KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a flush found: of tickets, totals since the namespace object was made; of the disk, since the last flush."""

    visible: int
    failed: int
    out: int
    disk: Durable


def flush(
    session: "Session | None", clock: Clock, target: Target, tally: Ledger, *, seen: int, until_ns: int, timeout_ns: int
) -> Flow[Flushed]:
    """Wait for every ticket of a namespace, then for the disk. `seen`: how many were visible at the last flush."""
    if tally.out:
        yield Settled(tally, 0, until_ns)
    disk = Durable(0, 0, 0, 0)
    if session is not None and tally.published:
        opened = session.namespaces.get(target.canonical)  # if it is not open, nothing was stored there
        if opened is not None:
            disk = yield from _make_durable(session, clock, opened, tally.published - seen, until_ns, timeout_ns)
    return Flushed(tally.published, tally.failed, tally.out, disk)


def _make_durable(
    session: "Session", clock: Clock, opened: Opened, blocks: int, until_ns: int, timeout_ns: int
) -> Flow[Durable]:
    """FLUSH, again where the daemon waits less long than the caller. `blocks`: how many may be on their way."""
    durable = failed = evicted = 0
    while True:
        wait_ns = min(LEASE_WAIT_NS_MAX, max(0, until_ns - clock()))
        call = FlushCall(session, opened.number, wait_ns, clock() + wait_ns + timeout_ns)
        yield call
        if not call.answered:
            # Without an answer nothing is known to be durable; a daemon that is still there may yet get to it.
            left = max(0, blocks - durable - failed - evicted) if call.lost is Reason.TIMED_OUT else 0
            return Durable(durable, failed, evicted, left)
        found = call.durable
        durable, failed, evicted = durable + found.durable, failed + found.failed, evicted + found.evicted
        now_ns = clock()
        if not found.pending or now_ns >= until_ns or now_ns < call.sent_ns + wait_ns:
            return Durable(durable, failed, evicted, found.pending)


def ping(session: "Session | None", deadline_ns: int) -> Flow[float | None]:
    """Seconds from sending to reading, None without an answer."""
    if session is None:
        return None
    call = PingCall(session, deadline_ns)
    yield call
    return (call.heard_ns - call.sent_ns) / 1e9 if call.answered else None


def _add(total_ns: int | None, more_ns: int) -> int | None:
    return None if total_ns is None or more_ns == UNKNOWN_NS else total_ns + more_ns


def _longest(seconds: Sequence[float | None]) -> float | None:
    known = [some for some in seconds if some is not None]
    return max(known) if len(known) == len(seconds) else None


def _seconds(total_ns: int | None) -> float | None:
    return None if total_ns is None else total_ns / 1e9
