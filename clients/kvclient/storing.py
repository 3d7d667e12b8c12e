"""`store`, from the first RESERVE to the last answer.

    RESERVE keys  ->  grants: a ticket and a span of the ring each; in mode direct the span is the block's own slot
    copy into the spans of a batch (16 MiB), COMMIT it, so that the daemon publishes while the next is copied
    the last batch rides on the next RESERVE, or goes with a COMMIT that wants an answer: accepted

Every ticket leaves by exactly one door: committed, or aborted when the copy could not be made.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

from kvclient.buffers import Memory
from kvclient.calls import CommitCall, Opened, ReserveCall, give_back
from kvclient.flows import Clock, Commit, Copy, Flow, Target, open_namespace
from kvclient.ledger import Ledger, Pause, Settled
from kvclient.results import Reason, Refused, StoreResult
from kvproto.errors import Code, Grant, KvError
from kvproto.frames import Mode
from kvproto.limits import KEYS_PER_FRAME, MIB, RIDERS_PER_FRAME, slot_bytes_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvclient.codecs import Codec
    from kvclient.mapping import Mapping, Place
    from kvclient.protocol import Session
    from kvproto.frames import Reserved

# A frame may cost the daemon a wake-up of 100 us; copying this much takes 1,600. Larger ones leave leaf threads idle.
BATCH_BYTES: Final = 16 * MIB
NAP_NS: Final = 10**6
NAP_NS_MAX: Final = 20 * 10**6

_REASONS: Final = {
    Grant.NO_PARENT: Reason.NO_PARENT,
    Grant.FULL: Reason.FULL,
    Grant.QUOTA: Reason.QUOTA,
    Grant.DRAINING: Reason.DRAINING,
}
_REFUSALS: Final = {
    Code.DRAINING: Reason.DRAINING,
    Code.SHUTTING_DOWN: Reason.DRAINING,
    Code.LIMIT: Reason.BUSY,  # more tickets out than a session may have
}
# Where the chain breaks off for one of these, the blocks after it lack a parent; otherwise they share its reason.
_BREAKS: Final = frozenset({Reason.FULL, Reason.QUOTA, Reason.DRAINING})


class Allowance:
    """Time that may be spent waiting for one thing, in all."""

    __slots__ = ("_began_ns", "_clock", "_whole_ns", "left_ns")

    def __init__(self, clock: Clock, allowance_ns: int) -> None:
        self._clock = clock
        self._began_ns = 0
        self._whole_ns = allowance_ns
        self.left_ns = allowance_ns

    def refill(self) -> None:
        """What was waited for has come."""
        self.left_ns = self._whole_ns

    def begin(self) -> int:
        """A wait begins; its deadline."""
        self._began_ns = self._clock()
        return self._began_ns + max(0, self.left_ns)

    def end(self) -> None:
        """It is over."""
        self.left_ns -= self._clock() - self._began_ns


class Storing:
    """One `store` on its way.

    Waits at most `space_ns` for ring space in all, and at most `timeout_ns` for answers without getting on.
    """

    def __init__(
        self,
        session: "Session",
        clock: Clock,
        target: Target,
        tally: Ledger,
        *,
        timeout_ns: int,
        space_ns: int,
        recompute_us: int,
        codec: "Codec | None" = None,
    ) -> None:
        assert session.store_bytes, "only engines store"
        self._session = session
        self._clock = clock
        self._target = target
        self._recompute_us = recompute_us
        self._codec = codec
        self._answers = Allowance(clock, timeout_ns)
        self._space = Allowance(clock, space_ns)
        self._nap_ns = NAP_NS
        self._ledger = Ledger(tally)
        self._keys: Sequence[bytes] = ()
        self._source: Memory = Memory((), None)
        self._parent: bytes | None = None
        self._fits = max(1, session.store_bytes // slot_bytes_for(target.block_bytes))
        self._ask = KEYS_PER_FRAME
        self._next = 0  # index of the first key without an answer
        # Index, span, ticket: not copied yet. The map of a span stays as long as it is here, whatever becomes of the
        # session: this copies into it.
        self._grants: list[tuple[int, Place, int]] = []
        self._batch: list[int] = []  # tickets copied and not committed
        self._unfit: list[int] = []  # those of blocks that the codec could not take
        self._may_hold_back = False
        self._tickets: list[tuple[int, int]] = []  # index, ticket: copied
        self._known = 0
        self._refused: list[Refused] = []
        self._stop: Reason | None = None  # why no more keys are asked for
        self._lost: Reason | None = None  # why nobody knows of the last commits

    def store(self, keys: "Sequence[bytes]", source: Memory, parent: bytes | None, *, wait: bool) -> Flow[StoreResult]:
        """The verb. `source` holds a block for each key."""
        self._keys, self._source, self._parent = keys, source, parent
        # In mode direct nothing waits for room in a ring. Who waits only until the blocks are accepted is not slowed
        # down by leaf threads that hash the first of them while it copies the others.
        self._may_hold_back = self._session.mode is Mode.DIRECT and not wait
        try:
            opened = yield from self._open()
            while opened is not None and self._stop is None and self._next < len(keys):
                began = self._next
                yield from self._reserve(opened)
                yield from self._fill(opened)
                if self._next == began and self._stop is None:
                    yield from self._make_room()
            yield from self._commit_rest()
            if wait:
                yield from self._await_visible()
        finally:
            self._give_back()
        return self._result()

    def _open(self) -> Flow[Opened | None]:
        opened = yield from open_namespace(self._session, self._target, self._answers.begin())
        self._answers.end()
        if opened is None:
            self._stop = Reason.UNREACHABLE if self._answers.left_ns > 0 else Reason.TIMED_OUT
        return opened

    def _reserve(self, opened: Opened) -> Flow[None]:
        """Ask for the next keys; the last batch's commits ride along."""
        first = self._next
        parent = self._keys[first - 1] if first else self._parent
        keys = self._keys[first : first + self._ask]
        deadline_ns = self._answers.begin()
        call = ReserveCall(
            self._session,
            opened,
            parent=parent,
            keys=keys,
            commits=self._batch,
            ledger=self._ledger,
            deadline_ns=deadline_ns,
            recompute_us=self._recompute_us,
        )
        try:
            yield call
        except BaseException:  # cancelled or interrupted
            give_back([call])
            raise
        finally:
            if call.request:  # it was sent, and the commits with it
                self._batch = []
        self._answers.end()
        if call.lost is not None:
            self._stop = self._lost = call.lost
        elif call.error is not None:
            self._stop = _refusal(call.error)
        else:
            self._sort(call.items, call.spans)
            if self._next > first:
                self._answers.refill()

    def _sort(self, items: "Sequence[Reserved]", spans: "Sequence[Place | None]") -> None:
        """What to copy, what to leave, and where to go on."""
        for offset, (item, span) in enumerate(zip(items, spans, strict=True)):
            grant = item.grant
            if span is not None:
                self._grants.append((self._next + offset, span, item.ticket))
            elif grant == Grant.KNOWN:
                self._known += 1
            elif grant == Grant.PENDING:
                self._refused.append(Refused(self._next + offset, Reason.PENDING))
            else:
                # The rest lacks a parent. Tickets beyond a gap would be of no use.
                self._session.abort([stray.ticket for stray in items[offset:] if stray.grant == Grant.GRANTED])
                self._stop = _REASONS.get(Grant(grant))  # None for BUSY: ask again
                self._ask = min(KEYS_PER_FRAME, self._fits)  # the ring is full: more cannot be granted at once
                self._next += offset
                return
        self._next += len(items)

    def _fill(self, opened: Opened) -> Flow[None]:
        """Copy into the spans; commit every batch but the last."""
        blocks = min(RIDERS_PER_FRAME, max(1, BATCH_BYTES // opened.block_bytes))
        at_once = self._may_hold_back and self._next == len(self._keys)
        cold = [span for _, span, _ in self._grants if span[0].cold]
        if cold:
            self._session.memory.warm(cold, opened.block_bytes)
        scattered = self._source.scattered
        while self._grants and self._lost is None:
            batch = self._grants[:blocks]
            targets = [mapping.address + offset for _, (mapping, offset), _ in batch]
            if self._codec is not None:
                maps = [mapping for _, (mapping, _), _ in batch]
                encoded = yield from self._encode(self._codec, [index for index, _, _ in batch], targets, maps)
                if encoded is None:
                    self._stop = Reason.DEVICE
                    return
                copied = encoded
            else:
                moves = self._source.moves_out([index for index, _, _ in batch], targets, opened.block_bytes)
                side, maps = self._source.device, [mapping for _, (mapping, _), _ in batch]
                mover = None if side is None else partial(side.drain, maps=maps)
                gate = scattered.gate if scattered else None
                step = Copy(moves, at_once=scattered is not None, gate=gate, mover=mover)
                yield step
                if step.failed is not None:
                    self._stop = Reason.DEVICE
                    return
                copied = len(batch)
            del self._grants[:copied]  # `batch` still keeps their maps
            self._batch += [ticket for _, _, ticket in batch[:copied]]
            self._tickets += [(index, ticket) for index, _, ticket in batch[:copied]]
            if copied < len(batch):
                self._break_off()
                return
            if self._grants and not at_once:
                yield from self._commit()

    def _encode(
        self, codec: "Codec", indices: list[int], targets: list[int], maps: "list[Mapping]"
    ) -> Flow[int | None]:
        """Encode blocks into their spans; how many until one was unfit. None: the device that they are on failed."""
        from kvclient.codecs_moving import Encode, EncodeOnDevice  # noqa: PLC0415  # raw namespaces never need it

        gate = self._source.scattered.gate if self._source.scattered else None
        if self._source.device is None:
            step: Encode | EncodeOnDevice = Encode(codec, self._source, indices, targets, gate)
        else:
            step = EncodeOnDevice(codec, self._source, indices, targets, gate, maps)
        yield step
        return step.done if step.failed is None else None

    def _break_off(self) -> None:
        """The first of the grants is a block that the codec cannot take: what continues it would lack a parent."""
        index, _, ticket = self._grants.pop(0)
        self._unfit.append(ticket)
        self._refused.append(Refused(index, Reason.UNFIT))
        self._stop = Reason.NO_PARENT

    def _commit(self) -> Flow[None]:
        step = Commit(self._session, self._batch, self._ledger, self._answers.begin())
        try:
            yield step
        finally:
            if step.sent:
                self._batch = []
        self._answers.end()
        if not step.sent:
            self._stop = self._lost = Reason.UNREACHABLE

    def _make_room(self) -> Flow[None]:
        """Not one key was granted: wait for some of our own blocks to leave the ring, or for somebody else's."""
        if self._space.left_ns <= 0:
            self._stop = Reason.BUSY
            return
        deadline_ns = self._space.begin()
        if self._ledger.out:
            yield Settled(self._ledger, self._ledger.out // 2, deadline_ns)
        else:
            yield Pause(min(deadline_ns, self._clock() + self._nap_ns))
            self._nap_ns = min(2 * self._nap_ns, NAP_NS_MAX)
        self._space.end()
        if self._session.over:
            self._stop = self._lost = Reason.UNREACHABLE

    def _commit_rest(self) -> Flow[None]:
        """Commit the last batch and hear that it was accepted."""
        if self._batch and self._lost is None:
            call = CommitCall(self._session, self._batch, self._ledger, self._answers.begin())
            try:
                yield call
            finally:
                if call.request:
                    self._batch = []
            if call.lost is not None:
                self._lost = call.lost
            elif call.stale > len(self._ledger.reasons):  # which ones, PUBLISHED will say
                yield Settled(self._ledger, 0, call.deadline_ns)
            self._answers.end()

    def _await_visible(self) -> Flow[None]:
        if self._ledger.out and self._lost is None:
            allowance = Allowance(self._clock, max(0, self._space.left_ns) + max(0, self._answers.left_ns))
            yield Settled(self._ledger, 0, allowance.begin())
            if self._ledger.out:
                self._lost = Reason.TIMED_OUT

    def _give_back(self) -> None:
        """Tickets of blocks that could not be copied, or not be committed."""
        unused = [*self._unfit, *(ticket for _, _, ticket in self._grants)]
        unused += [ticket for ticket in self._batch if not self._session.is_out(ticket)]
        if unused and not self._session.over:
            self._session.abort(unused)

    def _result(self) -> StoreResult:
        refused = self._refused
        accepted = 0
        for index, ticket in self._tickets:
            reason = self._fate(ticket)
            if reason is None:
                accepted += 1
            else:
                refused.append(Refused(index, reason))
        why = self._lost or (self._stop if self._stop in (Reason.DEVICE, Reason.NO_PARENT) else Reason.UNREACHABLE)
        refused += [Refused(index, why) for index, _, _ in self._grants]
        rest = range(self._next, len(self._keys))
        if rest and self._stop is not None:
            after = Reason.NO_PARENT if self._stop in _BREAKS else self._stop
            refused.append(Refused(rest[0], self._stop))
            refused += [Refused(index, after) for index in rest[1:]]
        return StoreResult(accepted, self._known, tuple(sorted(refused, key=lambda one: one.index)))

    def _fate(self, ticket: int) -> Reason | None:
        """None: accepted."""
        failed = self._ledger.reasons.get(ticket)
        if failed is None and self._lost is not None and (ticket in self._batch or self._session.is_out(ticket)):
            return self._lost
        return failed


def _refusal(error: KvError) -> Reason:
    return _REFUSALS.get(error.code, Reason.UNREACHABLE)


def store(
    session: "Session | None",
    clock: Clock,
    target: Target,
    tally: Ledger,
    *,
    keys: "Sequence[bytes]",
    source: Memory,
    parent: bytes | None,
    wait: bool,
    timeout_ns: int,
    space_ns: int,
    recompute_us: int = 0,
    codec: "Codec | None" = None,
) -> Flow[StoreResult]:
    """Store a chain. `source` holds a block for each key, and stays as it is until this ends.

    `recompute_us`: what computing a block anew would take; 0: unknown. `codec`: encode blocks with it on the way.
    """
    if session is None or not session.store_bytes or not keys:
        return StoreResult(0, 0, tuple(Refused(index, Reason.UNREACHABLE) for index in range(len(keys))))
    storing = Storing(
        session, clock, target, tally, timeout_ns=timeout_ns, space_ns=space_ns, recompute_us=recompute_us, codec=codec
    )
    return (yield from storing.store(keys, source, parent, wait=wait))
