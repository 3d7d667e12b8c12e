"""Pins, prefetches, timings and advice of a client, against a peer that takes them, refuses, is silent or is gone."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvclient
from kvclient.lease import TIMED_EACH
from kvclient.policy_flows import NOTHING_PINNED
from kvclient.results import Choice, Match, Partial, PinResult, Tiers
from kvproto import frames, policy_frames
from kvproto.errors import ClosedError, Outcome, UsageError
from kvproto.frames import Head, Matched, Verb
from kvproto.limits import KEYS_PER_FRAME, MIB
from kvproto.policy_frames import Fetching, Kind, Pin, Pinned, Report, Tier
from kvproto.retention import Retention
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import Stopwatch, client_of, keys_of, namespace_of, times, wait_until, within
from tests.unit.client_policy_kit import NAMESPACE, trio

SHORT_S = 0.1
SLACK_S = 15.0
KEYS = keys_of(5)


# -- pins ------------------------------------------------------------------------------------------------------


def test_a_pin_says_what_it_covers_and_how_long(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, policies, _, ns):
        before_s = time.monotonic()
        result = ns.pin(KEYS, 30)
        assert (result.bytes_pinned, result.blocks, result.pins) == (500, 5, (1,))
        assert result.partial is Partial.NOTHING
        assert not result.partial
        assert result.expires is not None
        assert before_s + 30 <= result.expires <= time.monotonic() + 30
        ns.pin(KEYS, 60, tier="disk", refresh=False)
        assert policies.asked == [(Tier.DRAM, 30 * 10**9, True), (Tier.DISK, 60 * 10**9, False)]


@pytest.mark.parametrize(
    ("retention", "seconds"),
    [(Retention.FIVE_MINUTES, 300), (Retention.ONE_HOUR, 3600), ("5m", 300), ("1h", 3600)],
)
def test_a_retention_is_a_time_with_a_name(tmp_path: Path, retention: Retention | str, seconds: int) -> None:
    with trio(tmp_path) as (_, policies, _, ns):
        assert ns.pin(KEYS, retention=retention).blocks == 5
        assert policies.asked == [(Tier.DRAM, seconds * 10**9, True)]


def test_what_is_no_pin_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    wrong: list[Callable[[kvclient.Namespace], object]] = [
        lambda ns: ns.pin(KEYS), lambda ns: ns.pin(KEYS, 30, retention="5m"), lambda ns: ns.pin(KEYS, retention="2h"),
        lambda ns: ns.pin(KEYS, 0), lambda ns: ns.pin(KEYS, -1), lambda ns: ns.pin(KEYS, math.nan),
        lambda ns: ns.pin(KEYS, math.inf), lambda ns: ns.pin(KEYS, 86401), lambda ns: ns.pin(KEYS, 30, tier="ram"),
        lambda ns: ns.pin([b"short"], 30), lambda ns: ns.unpin([-1]), lambda ns: ns.unpin(["1"]),  # type: ignore[list-item]
        lambda ns: ns.unpin([1 << 64]), lambda ns: ns.unpin(7), lambda ns: ns.unpin([True]),  # type: ignore[arg-type]
    ]  # fmt: skip
    with trio(tmp_path) as (peer, _, _, ns):
        for attempt in wrong:
            with pytest.raises(UsageError):
                attempt(ns)
        assert {Verb.PIN, Verb.UNPIN}.isdisjoint(peer.seen)
        ns.pin(KEYS, 86400)
        assert Verb.PIN in peer.seen


def test_a_long_chain_is_pinned_frame_by_frame_until_one_is_partial(tmp_path: Path) -> None:
    keys = keys_of(3 * KEYS_PER_FRAME)
    with trio(tmp_path) as (_, policies, _, ns):
        whole = ns.pin(keys, 30)
        assert (whole.blocks, whole.pins, whole.partial) == (3 * KEYS_PER_FRAME, (1, 2, 3), Partial.NOTHING)
        assert whole.expires == policies.pins[1].expires_ns / 1e9  # that of the first, which is the nearest
        policies.room_blocks = KEYS_PER_FRAME + 100
        part = ns.pin(keys, 30)
        assert (part.blocks, part.pins, part.partial) == (KEYS_PER_FRAME + 100, (4, 5), Partial.BUDGET)
        assert part.bytes_pinned == 100 * (KEYS_PER_FRAME + 100)
        assert len(policies.asked) == 5  # the third frame was not worth asking for
        none = ns.pin(keys, 30)
        assert none == PinResult(0, None, 0, Partial.BUDGET, ())


def test_pins_are_listed_and_ended(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, policies, _, ns):
        first, second = ns.pin(KEYS[:2], 30), ns.pin(KEYS, 60)
        third = ns.pin(KEYS, 90)
        policies.pins[2] = policies.pins[2]._replace(namespace=NAMESPACE + 1)  # another's
        listed = ns.pins()
        assert [(pin.pin, pin.blocks, pin.bytes_pinned) for pin in listed] == [(1, 2, 200), (3, 5, 500)]
        assert listed[0].expires == first.expires
        assert peer.seen.count(Verb.PINS) == 3  # two, one, none
        assert ns.unpin(first) == 1
        assert ns.unpin(first) == 0
        assert ns.unpin([*second.pins, *third.pins, 99]) == 2
        assert ns.unpin([]) == 0
        assert ns.pins() == []


@pytest.mark.parametrize("visible", ["before the answer", "after the answer", "never"])
def test_a_pin_waits_for_what_was_stored_just_before(tmp_path: Path, visible: str) -> None:
    with trio(tmp_path) as (peer, policies, client, ns):
        peer.publishing = False
        assert ns.store(KEYS, np.zeros((5, ns.block_bytes), np.uint8)).accepted == 5
        whole = policies.pin

        def some(peer: Peer, head: Head, frame: bytes) -> None:
            peer.instead[Verb.PIN] = whole
            seen = frames.build_published([(ticket, int(Outcome.PUBLISHED)) for ticket in peer.committed])
            policies.asked.append((0, 0, False))
            policies.pins[1] = Pin(1, 200, 0, 2, NAMESPACE)
            if visible == "before the answer":
                peer.send(seen)
            pinned = Pinned(1, 200, time.monotonic_ns() + 10**9, 2, policy_frames.Partial.ABSENT)
            peer.send(frames.build(Verb.PINNED, head.request, policy_frames.PINNED_BODY.pack(*pinned)))
            if visible == "after the answer":
                peer.send(seen)

        peer.instead[Verb.PIN] = some
        if visible == "never":
            for _ in times(client, ns):
                peer.wait_for(lambda: not policies.pins)
                peer.instead[Verb.PIN] = some
                result = ns.pin(KEYS, 30)
                if result.partial is not Partial.TIMED_OUT or result.blocks:  # else not even the first answer came
                    break
            within(PATIENCE_S, client, ns)
            assert (result.blocks, result.partial, result.pins) == (2, Partial.TIMED_OUT, (1,))
            peer.wait_for(lambda: list(policies.pins) == [1])  # the second is given back, if it was asked
        else:
            result = ns.pin(KEYS, 30)
            assert (result.blocks, result.partial, result.pins) == (5, Partial.NOTHING, (2,))
            assert list(policies.pins) == [2], "the shorter one is given back"


def test_a_daemon_that_does_not_pin_is_no_exception(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, policies, _, ns):
        policies.refuse = "no"
        assert ns.pin(KEYS, 30) == PinResult(0, None, 0, Partial.REFUSED, ())
        assert ns.prefetch(KEYS).coming == 0


def test_a_silent_daemon_pins_nothing_and_what_it_pins_after_all_is_given_back(tmp_path: Path) -> None:
    with trio(tmp_path, timeout_s=SHORT_S) as (peer, policies, client, ns):
        wait_until(lambda: client.ping() is not None and ns.pins() == [] and Verb.PINS in peer.seen)
        peer.mute(Verb.PIN, Verb.PREFETCH)
        with Stopwatch(SLACK_S):
            assert ns.pin(KEYS, 30) == PinResult(0, None, 0, Partial.TIMED_OUT, ())
        peer.answer_held()
        peer.wait_for(lambda: Verb.UNPIN in peer.seen)
        assert policies.pins == {}
        wait_until(lambda: client.ping() is not None)
        assert not client._connection._link.session._calls  # type: ignore[union-attr]
        peer.mute(Verb.PREFETCH)
        with Stopwatch(SLACK_S):
            assert ns.prefetch(KEYS).coming == 0
        peer.answer_held()
        peer.wait_for(lambda: peer.cancelled == [1])
        assert client.connected


def test_giving_back_what_came_too_late_is_no_silence_of_the_daemon(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, policies, client, ns):
        result = ns.pin(KEYS, 30)
        session = client._connection.session()
        assert session is not None
        with client._connection.guard():
            session.unpins.extend(result.pins)
            assert session.has_chores
            (frame,) = session.chores()
            assert not session.has_chores
            assert not session.silent
        assert client._connection._link.try_send(frame)
        wait_until(lambda: client.ping() is not None and not policies.pins)


def test_without_a_daemon_nothing_is_pinned_fetched_or_advised(tmp_path: Path) -> None:
    with kvclient.connect(tmp_path) as client:
        ns = namespace_of(client)
        assert ns.pin(KEYS, 30) == NOTHING_PINNED
        assert NOTHING_PINNED.partial is Partial.UNREACHABLE
        assert (ns.unpin([1]), ns.pins()) == (0, [])
        prefetch = ns.prefetch(KEYS)
        assert (prefetch.there, prefetch.coming) == (0, 0)
        prefetch.cancel()
        assert ns.advise(100, 1.0, 50) is None
        assert client.status.hints_dropped == 0
        ns.report_prefill(0, 10, 0.1)
        ns.report_load("dram", 10, 0.1)
        assert client.status.hints_dropped == 2
    for attempt in (lambda: ns.pin(KEYS, 30), lambda: ns.prefetch(KEYS), lambda: ns.report_prefill(0, 1, 1)):
        with pytest.raises(ClosedError):
            attempt()


@pytest.mark.parametrize("verb", [Verb.PIN, Verb.UNPIN, Verb.PINS, Verb.PREFETCH, Verb.ADVISE])
def test_a_daemon_that_dies_instead_of_answering_is_no_answer(tmp_path: Path, verb: Verb) -> None:
    with trio(tmp_path) as (peer, _, _, ns):
        peer.instead[verb] = lambda peer, head, frame: peer._hang_up()
        ask: dict[Verb, Callable[[], object]] = {
            Verb.PIN: lambda: ns.pin(KEYS, 30) == NOTHING_PINNED,
            Verb.UNPIN: lambda: ns.unpin([1]) == 0,
            Verb.PINS: lambda: ns.pins() == [],
            Verb.PREFETCH: lambda: ns.prefetch(KEYS).coming == 0,
            Verb.ADVISE: lambda: ns.advise(1, 1, 1) is None,
        }
        with Stopwatch(SLACK_S):
            assert ask[verb]()


def lie(verb: Verb, body: bytes, count: int = 0) -> Callable[[Peer, Head, bytes], None]:
    return lambda peer, head, _: peer.send(frames.build(verb, head.request, body, count=count))


PIN_ITEM = policy_frames.PIN_ITEM.pack(1, 1, 1, 1, NAMESPACE)


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        (Verb.PIN, lie(Verb.PINNED, policy_frames.PINNED_BODY.pack(*Pinned(1, 1, 1, 6, 0)))),  # more than asked
        (Verb.PIN, lie(Verb.PINNED, policy_frames.PINNED_BODY.pack(*Pinned(1, 1, 1, 1, 99)))),
        (Verb.PIN, lie(Verb.PINNED, policy_frames.PINNED_BODY.pack(*Pinned(0, 1, 1, 1, 0)))),
        (Verb.PIN, lie(Verb.PINNED, policy_frames.PINNED_BODY.pack(*Pinned(1, 0, 0, 0, 1)))),
        (Verb.PIN, lie(Verb.PINNED, bytes(8))),
        (Verb.PREFETCH, lie(Verb.FETCHING, policy_frames.FETCHING_BODY.pack(*Fetching(1, 3, 3)))),
        (Verb.PINS, lie(Verb.PIN_LIST, PIN_ITEM * 2, count=2)),  # would be asked for again and again
        (Verb.PINS, lie(Verb.PIN_LIST, PIN_ITEM, count=2)),
        (Verb.ADVISE, lie(Verb.ADVISED, policy_frames.ADVISED_BODY.pack(3, 0, 0, 0, 0, 0))),
    ],
)
def test_a_daemon_that_misspeaks_is_left(
    tmp_path: Path, verb: Verb, wrong: Callable[[Peer, Head, bytes], None]
) -> None:
    with trio(tmp_path) as (peer, _, client, ns):
        asked: dict[Verb, Callable[[], object]] = {
            Verb.PIN: lambda: ns.pin(KEYS, 30).blocks == 0,
            Verb.PREFETCH: lambda: ns.prefetch(KEYS).coming == 0,
            Verb.PINS: lambda: ns.pins() == [],
            Verb.ADVISE: lambda: ns.advise(1, 1, 1) is None,
        }
        peer.instead[verb] = wrong
        with Stopwatch(SLACK_S):
            assert asked[verb]()
        assert client.wait_connected(SLACK_S)
        assert peer.hellos == 2


# -- prefetches ------------------------------------------------------------------------------------------------


def test_a_prefetch_says_what_is_there_and_what_comes_and_can_be_cancelled(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, policies, _, ns):
        policies.there = 2
        prefetch = ns.prefetch(KEYS, deadline_s=60.0)
        assert (prefetch.there, prefetch.coming) == (2, 3)
        tier, within_ns, keys = policies.prefetches[0]
        assert (tier, keys) == (Tier.DRAM, 5)
        assert 0 < within_ns <= 60 * 10**9
        prefetch.cancel()
        prefetch.cancel()
        peer.wait_for(lambda: peer.cancelled == [1])
        policies.there = 5
        nothing_to_do = ns.prefetch(KEYS, tier="disk")
        assert repr(nothing_to_do) == "Prefetch(there=5, coming=0)"
        nothing_to_do.cancel()
        assert ns.match(KEYS).blocks == 0
        assert peer.seen.count(Verb.CANCEL) == 1


def test_a_long_chain_is_prefetched_frame_by_frame(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, policies, _, ns):
        prefetch = ns.prefetch(keys_of(2 * KEYS_PER_FRAME + 5))
        assert prefetch.coming == 2 * KEYS_PER_FRAME + 5
        assert [keys for _, _, keys in policies.prefetches] == [KEYS_PER_FRAME, KEYS_PER_FRAME, 5]
        prefetch.cancel()
        peer.wait_for(lambda: peer.cancelled == [1, 2, 3])
        part = policy_frames.FETCHING_BODY.pack(*Fetching(9, 3, 4))
        peer.instead[Verb.PREFETCH] = lie(Verb.FETCHING, part)
        assert ns.prefetch(keys_of(2 * KEYS_PER_FRAME)).coming == 4
        assert peer.seen.count(Verb.PREFETCH) == 4  # what follows a gap is of no use


@pytest.mark.parametrize("deadline_s", [0, -1, math.nan, 3601])
def test_a_prefetch_has_a_deadline(tmp_path: Path, deadline_s: float) -> None:
    with trio(tmp_path) as (_, _, _, ns), pytest.raises(UsageError):
        ns.prefetch(KEYS, deadline_s=deadline_s)


# -- timings ---------------------------------------------------------------------------------------------------


def test_timings_are_told_and_nobody_waits_for_them(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, _, _, ns):
        ns.report_prefill(1024, 512, 0.25)
        ns.report_load("disk", 1 << 30, 0.5)
        ns.report_queue(0.125)
        peer.wait_for(lambda: len(peer.reports) == 3)
        assert peer.reports == [
            Report(NAMESPACE, Kind.PREFILL, 1024, 512, 0.25),
            Report(NAMESPACE, Kind.LOAD, Tier.DISK, 1 << 30, 0.5),
            Report(NAMESPACE, Kind.QUEUE, 0, 0, 0.125),
        ]
        assert peer.reports != [Report(NAMESPACE, Kind.PREFILL, 1024, 512, 0.5), *peer.reports[1:]]
        wrong: list[Callable[[], object]] = [
            lambda: ns.report_prefill(-1, 5, 1), lambda: ns.report_prefill(0, 0, 1),
            lambda: ns.report_prefill(0, 5, 0), lambda: ns.report_prefill(0, 5, math.inf),
            lambda: ns.report_prefill(0, 5.5, 1), lambda: ns.report_load("tape", 5, 1),  # type: ignore[arg-type]
            lambda: ns.report_load("dram", 0, 1), lambda: ns.report_load("dram", 5, math.nan),
        ]  # fmt: skip
        for attempt in wrong:
            with pytest.raises(UsageError):
                attempt()
        ns.report_prefill(np.int64(3), np.int32(4), np.float32(0.5))  # type: ignore[arg-type]
        peer.wait_for(lambda: peer.reports[-1] == Report(NAMESPACE, Kind.PREFILL, 3, 4, 0.5))


def test_a_namespace_that_is_not_open_is_not_opened_for_a_timing(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, _, client, ns):
        peer.hang_up()
        wait_until(lambda: client.connected and peer.hellos == 2)
        ns.report_prefill(0, 10, 1)
        assert client.status.hints_dropped == 1
        ns.match(KEYS)
        ns.report_prefill(0, 20, 1)
        peer.wait_for(lambda: len(peer.reports) == 1)
        assert peer.reports[0].amount == 20


def test_one_in_sixteen_large_copies_is_timed_and_reported(tmp_path: Path) -> None:
    block = bytes(range(256)) * 4096  # 1 MiB
    with Peer(tmp_path, arena_bytes=4 * MIB, ring_bytes=4 * MIB) as peer, client_of(peer) as client:
        large, small = namespace_of(client, MIB), namespace_of(client, MIB - 1)
        keys = keys_of(1)
        assert large.store(keys, [block], wait=True).accepted == 1
        target = bytearray(MIB)

        def copy_all(times: int) -> None:
            for _ in range(times):
                with large.fetch(keys) as lease:
                    assert lease.copy_to([target])
            assert client.ping() is not None  # by now the peer has read what was said

        with large.fetch(keys) as lease:  # copies out of a map that is still being populated are not reported
            assert lease.views
            wait_until(lambda: not any(part.cold for part in lease._parts))
        copy_all(TIMED_EACH - 1)
        assert peer.reports == []
        copy_all(1)
        assert [report[:4] for report in peer.reports] == [(NAMESPACE, Kind.LOAD, Tier.DRAM, MIB)]
        assert 0 < peer.reports[0].seconds < SLACK_S
        copy_all(TIMED_EACH - 1)
        assert len(peer.reports) == 1
        copy_all(1)
        assert len(peer.reports) == 2
        with small.fetch(keys) as lease:  # too small to say much: not counted
            for _ in range(2 * TIMED_EACH):
                assert lease.copy_to([memoryview(target)[: MIB - 1]])
        assert client.ping() is not None
        assert len(peer.reports) == 2


# -- advice ----------------------------------------------------------------------------------------------------


def test_advice_is_asked_for_and_told(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, policies, _, ns):
        advice = ns.advise(4000, 1.5, 9000)
        assert advice is not None
        assert (advice.choice, advice.waste_preserve, advice.waste_swap, advice.waste_discard) == (
            Choice.SWAP, 3.0, None, 5.0,
        )  # fmt: skip
        assert advice.swap_budget_bytes == 4096
        asked = policies.questions[0]
        assert (asked.namespace, asked.tokens, asked.running_tokens, asked.elapsed_s) == (NAMESPACE, 4000, 9000, 1.5)
        assert asked.token_bytes == ns.identity.block_bytes / ns.identity.block_tokens
        assert math.isnan(asked.expected_s)
        assert math.isnan(asked.forward_s)
        ns.advise(1, 0, 0, token_bytes=8, expected_s=2.0, forward_s=0.1, batch_tokens=64, chunk_tokens=32)
        assert policies.questions[1] == (NAMESPACE, 1, 8, 0, 0, 2.0, 0.1, 64, 32)


def test_questions_without_sense_are_the_callers_mistake(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, policies, _, ns):
        wrong: list[Callable[[], object]] = [
            lambda: ns.advise(-1, 1, 1), lambda: ns.advise(1, -1, 1), lambda: ns.advise(1, 1, -1),
            lambda: ns.advise(1, math.nan, 1), lambda: ns.advise(1, 1, 1, token_bytes=math.inf),
            lambda: ns.advise(1, 1, 1, chunk_tokens=-1), lambda: ns.advise(1, "2", 1),  # type: ignore[arg-type]
            lambda: ns.advise(1, 10**400, 1),
        ]  # fmt: skip
        for attempt in wrong:
            with pytest.raises(UsageError):
                attempt()
        assert policies.questions == []
        policies.refuse = "too many tokens"
        with pytest.raises(UsageError, match="too many tokens"):
            ns.advise(10**12, 1, 1)


# -- what a match says of time -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load_ns", "recompute_ns", "worth"),
    [
        (10**9, 2 * 10**9, True), (2 * 10**9, 10**9, False), (10**9, 10**9, True),
        (frames.UNKNOWN_NS, 10**9, True), (10**9, frames.UNKNOWN_NS, True),
    ],
)  # fmt: skip
def test_a_match_says_whether_loading_pays(tmp_path: Path, load_ns: int, recompute_ns: int, worth: bool) -> None:
    def match(peer: Peer, head: Head, frame: bytes) -> None:
        matched = Matched(0, 1, 4, 0, load_ns, recompute_ns)
        peer.send(frames.build(Verb.MATCHED, head.request, frames.MATCHED_BODY.pack(*matched)))

    with trio(tmp_path) as (peer, _, _, ns):
        peer.instead[Verb.MATCH] = match
        found = ns.match(KEYS)
        assert found.worth_loading is worth
        assert found.load_s == (None if load_ns == frames.UNKNOWN_NS else load_ns / 1e9) == found.load_seconds
        assert found.recompute_s == (None if recompute_ns == frames.UNKNOWN_NS else recompute_ns / 1e9)
    assert Match(0, Tiers(), 0, None, None).worth_loading
