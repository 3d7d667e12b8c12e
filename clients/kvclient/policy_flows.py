"""Pins, prefetches and advice as flows; as in flows.py, which says what a flow is.

None raises because a daemon is missing or slow: what is not answered is not pinned, not fetched, not advised.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from kvclient.calls import give_back
from kvclient.flows import FRAME_KEYS_BYTES, Clock, Flow, Target, open_namespace
from kvclient.ledger import Ledger, OutNow
from kvclient.policy_calls import AdviseCall, PinCall, PinsCall, PrefetchCall, UnpinCall
from kvclient.results import Advice, Choice, Partial, PinInfo, PinResult
from kvproto.errors import UsageError
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME
from kvproto.policy_frames import REMOTE, Fetching, Question, Tier

if TYPE_CHECKING:
    from kvclient.protocol import Session

NOTHING_PINNED: Final = PinResult(0, None, 0, Partial.UNREACHABLE, ())


def pin(
    session: "Session | None",
    target: Target,
    tally: Ledger,
    keys: bytes,
    *,
    tier: Tier,
    ttl_ns: int,
    refresh: bool,
    deadline_ns: int,
) -> Flow[PinResult]:
    """Pin frame after frame of a chain until one is partial. It expires with the first of its pins.

    Blocks that were stored through the same object (`tally`) a moment ago may not be visible yet: they are waited for.
    """
    if session is None:
        return NOTHING_PINNED
    pins: list[int] = []
    calls: list[PinCall] = []
    pinned_bytes = blocks = expires_ns = 0
    partial = Partial.NOTHING
    opened = yield from open_namespace(session, target, deadline_ns)
    if opened is None:
        return NOTHING_PINNED

    def ask(chunk: bytes) -> PinCall:
        call = PinCall(
            session, opened.number, chunk, tier=tier, ttl_ns=ttl_ns, refresh=refresh, deadline_ns=deadline_ns
        )
        calls.append(call)
        return call

    try:
        for start in range(0, len(keys), FRAME_KEYS_BYTES):
            chunk = keys[start : start + FRAME_KEYS_BYTES]
            were_out = tally.out
            call = ask(chunk)
            yield call
            partial = call.partial
            if call.answered and partial is Partial.ABSENT and were_out:
                yield OutNow(tally, session.tickets_of, deadline_ns)
                again = ask(chunk)
                yield again
                if again.answered:  # it has what the first one has, which gives it back
                    if call.pinned.pin:
                        yield from unpin(session, [call.pinned.pin], deadline_ns)
                    call = again
                partial = again.partial
            if not call.answered:
                break
            pinned = call.pinned
            if pinned.pin:
                pins.append(pinned.pin)
                expires_ns = min(expires_ns, pinned.expires_ns) if expires_ns else pinned.expires_ns
            pinned_bytes, blocks = pinned_bytes + pinned.bytes, blocks + pinned.blocks
            if partial or pinned.blocks * KEY_BYTES < len(chunk):
                break
    except BaseException:  # cancelled or interrupted
        give_back(calls)
        raise
    return PinResult(pinned_bytes, expires_ns / 1e9 if pins else None, blocks, partial, tuple(pins))


def unpin(session: "Session | None", pins: Sequence[int], deadline_ns: int) -> Flow[int]:
    """How many of these pins there were to end."""
    ended = 0
    if session is None:
        return ended
    for start in range(0, len(pins), KEYS_PER_FRAME):
        call = UnpinCall(session, pins[start : start + KEYS_PER_FRAME], deadline_ns)
        yield call
        if not call.answered:
            break
        ended += call.ended
    return ended


def list_pins(session: "Session | None", target: Target, deadline_ns: int) -> Flow[list[PinInfo]]:
    """The pins in a namespace: the daemon lists those of the tenant, frame after frame until one is empty."""
    found: list[PinInfo] = []
    if session is None:
        return found
    opened = yield from open_namespace(session, target, deadline_ns)
    if opened is None:
        return found
    after = 0
    while True:
        call = PinsCall(session, after, deadline_ns)
        yield call
        if not call.answered or not call.pins:
            return found
        found += [
            PinInfo(pin.pin, pin.blocks, pin.bytes, pin.expires_ns / 1e9)
            for pin in call.pins
            if pin.namespace == opened.number
        ]
        after = call.pins[-1].pin


def prefetch(
    session: "Session | None",
    clock: Clock,
    target: Target,
    keys: bytes,
    *,
    tier: int,
    within_ns: int,
    timeout_ns: int,
) -> Flow[list[Fetching]]:
    """Ask for frame after frame of a chain until one is not there as a whole, nor will be."""
    asked: list[Fetching] = []
    began_ns = clock()
    deadline_ns = began_ns + timeout_ns
    if session is None or not keys or (tier == REMOTE and not session.hands_over):
        return asked
    opened = yield from open_namespace(session, target, deadline_ns)
    if opened is None:
        return asked
    calls: list[PrefetchCall] = []
    try:
        for start in range(0, len(keys), FRAME_KEYS_BYTES):
            chunk = keys[start : start + FRAME_KEYS_BYTES]
            left_ns = max(1, began_ns + within_ns - clock())
            call = PrefetchCall(session, opened.number, chunk, tier=tier, within_ns=left_ns, deadline_ns=deadline_ns)
            calls.append(call)
            yield call
            if not call.answered:
                break
            asked.append(call.fetching)
            if (call.fetching.there + call.fetching.coming) * KEY_BYTES < len(chunk):
                break
    except BaseException:  # cancelled or interrupted
        give_back(calls)
        raise
    return asked


def advise(
    session: "Session | None", target: Target, ask: Callable[[int], Question], deadline_ns: int
) -> Flow[Advice | None]:
    """What to do with the context of a request that waits. `ask` makes the question for a namespace's number."""
    if session is None:
        return None
    opened = yield from open_namespace(session, target, deadline_ns)
    if opened is None:
        return None
    call = AdviseCall(session, ask(opened.number), deadline_ns)
    yield call
    if isinstance(call.error, UsageError):
        raise UsageError(str(call.error))
    advised = call.advised
    if advised is None or not call.answered:
        return None
    return Advice(
        choice=tuple(Choice)[advised.choice],
        waste_preserve=_known(advised.preserve),
        waste_swap=_known(advised.swap),
        waste_discard=_known(advised.discard),
        swap_budget_bytes=advised.swap_budget_bytes,
    )


def number_of(session: "Session | None", target: Target, deadline_ns: int) -> Flow[int | None]:
    """The number of a namespace in this session, for what is said one way of it; None if it cannot be opened."""
    if session is None:
        return None
    opened = yield from open_namespace(session, target, deadline_ns)
    return opened.number if opened is not None else None


def _known(waste: float) -> float | None:
    return None if math.isnan(waste) else waste
