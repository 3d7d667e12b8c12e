"""What hints do to memory: with ports that only write down what they are asked, and with a real store."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from kvproto.errors import NamespaceError
from kvproto.limits import KEYS_PER_FRAME, PREFETCH_NS_MAX
from kvproto.policy_frames import UNKNOWN, Event, Fetching, Hint, Partial, Pinned, Tier
from kvstore.blocks import U8
from kvstore.guiding import AGAIN_NS, FETCH_NS_MIN, Guiding
from kvstore.hints.limits import DUE_AT_ONCE, HOUR_S, PROGRAMS, RUNS
from kvstore.hints.programs import Costs
from kvstore.hints.refusal import Refusal, Refused
from kvstore.hints.report import HintCounters
from kvstore.sessions import Namespace, Tenant
from tests.core import SECOND, Client, Core, chain

HOUR = HOUR_S * SECOND
LOOP = json.dumps({"steps": [{"name": "a", "next": ["b"]}, {"name": "b", "next": ["a"]}]})
LINE = json.dumps({"steps": [{"name": "a", "next": ["b"]}, {"name": "b", "next": ["c"]}, {"name": "c"}]})


@dataclass
class Ports:
    """Pins and fetches that are written down in order. Of a pin the first `there` blocks are there, if so many."""

    there: int
    budget: int
    done: list[tuple[object, ...]] = field(default_factory=list)
    pins: dict[int, int] = field(default_factory=dict)  # blocks, by number
    number: int = 0
    now_ns: int = 0
    crowded: bool = False  # no fetch more is taken

    def pin(
        self, tenant: Tenant, namespace: Namespace, keys: U8, at: int, count: int, ttl_ns: int, tier: Tier,
        *, refresh: bool, owner: str,
    ) -> Pinned:  # fmt: skip
        assert tier is Tier.DRAM
        assert not refresh, "a use ends what a program waits for"
        assert keys.flags.writeable, "compiled code was warmed up for arrays that are"
        end = min(count, self.there)
        blocks_pinned = min(end, self.budget - sum(self.pins.values()))
        partial = Partial.BUDGET if blocks_pinned < end else Partial.ABSENT if end < count else Partial.NOTHING
        self.number += 1
        self.done.append(("pin", owner, ttl_ns, blocks_pinned))
        if blocks_pinned:
            self.pins[self.number] = blocks_pinned
        expires_ns = self.now_ns + ttl_ns
        return Pinned(self.number if blocks_pinned else 0, blocks_pinned, expires_ns, blocks_pinned, partial)

    def unpin(self, tenant: Tenant, numbers: Iterable[int]) -> int:
        ended = [number for number in numbers if self.pins.pop(number, 0)]
        self.done += [("unpin", number) for number in ended]
        return len(ended)

    def used_bytes(self, tenant: Tenant) -> int:
        return 4096 * sum(self.pins.values())

    def adopt(self, tenant: Tenant, program: str) -> Pinned | None:
        return None

    def prefetch(
        self, tenant: Tenant, namespace: Namespace, keys: U8, at: int, count: int, within_ns: int, tier: Tier
    ) -> Fetching:  # fmt: skip
        assert 0 < within_ns <= PREFETCH_NS_MAX
        if self.crowded:
            return Fetching(0, 0, count)
        self.number += 1
        self.done.append(("fetch", keys[:4].tobytes(), count, within_ns))
        return Fetching(self.number, 0, count)

    def cancel(self, tenant: Tenant, numbers: Iterable[int]) -> None:
        self.done += [("cancel", number) for number in numbers]

    def take(self) -> list[tuple[object, ...]]:
        """What was done since this was last asked."""
        done, self.done = self.done, []
        return done


class Teller:
    """A client of a store whose hints a room of the test's own hears."""

    def __init__(self, costs: Costs | None = None, there: int = KEYS_PER_FRAME, budget: int = KEYS_PER_FRAME) -> None:
        self.core = Core()
        self.client = self.core.client()
        self.namespace = self.client.open()
        self.ports = Ports(there, budget)
        self.asked: list[tuple[Namespace, int, int]] = []
        store = self.core.store

        def costs_of(namespace: Namespace, first: int, last: int) -> Costs:
            self.asked.append((namespace, first, last))
            return costs or Costs(0, 0)

        self.guiding = Guiding(store.tables, self.core.clock, store.registry, self.ports, self.ports, costs_of)

    def say(self, event: Event, name: str = "a", *, by: Client | None = None, **fields: object) -> Refused | None:
        """A hint of this client or another one."""
        self.ports.now_ns = self.core.clock.ns
        if event in (Event.CONTEXT, Event.BIND, Event.EXPECT):
            fields = {"namespace": self.namespace.number, **fields}
            fields["keys"] = b"".join(fields.get("keys", ()))  # type: ignore[arg-type]
        return self.guiding.hear((by or self.client).session, Hint(event, name, **fields))  # type: ignore[arg-type]

    def begin(self, *names: str, blocks_each: int = 4) -> None:
        """Programs with a context each."""
        for name in names:
            assert self.say(Event.PROGRAM, name) is None
            assert self.say(Event.CONTEXT, name, keys=chain(blocks_each, name)) is None

    def pass_time(self, ns: int) -> None:
        """Until nothing is left to do."""
        self.core.clock.advance(ns)
        self.ports.now_ns = self.core.clock.ns
        for _ in range(10_000):
            due_ns = self.guiding.next_ns()
            if due_ns is None or due_ns > self.core.clock.ns:
                return
            self.guiding.tick(self.core.clock.ns)
        raise AssertionError("there is always something left to do")


# -- programs and their tools ---------------------------------------------------------------------------------------


def test_a_context_is_kept_during_a_tool_and_again_until_the_next_turn() -> None:
    teller = Teller()
    teller.begin("a")
    assert teller.ports.take() == []
    assert teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0) is None
    assert teller.ports.take() == [("pin", "program:a", 120 * SECOND, 4)]
    teller.core.clock.advance(10 * SECOND)
    assert teller.say(Event.TOOL_FINISHED) is None
    key = chain(1, "a")[0]
    assert teller.ports.take() == [
        ("pin", "program:a", 60 * SECOND, 4),
        ("unpin", 1),
        ("fetch", key, 4, FETCH_NS_MIN),
    ], "anew first, or what they share would be let go in between"
    assert teller.say(Event.TURN_FINISHED) is None
    assert teller.ports.take() == []


def test_a_program_that_is_over_keeps_nothing() -> None:
    teller = Teller()
    teller.begin("a", "b")
    for name in ("a", "b"):
        teller.say(Event.TOOL_STARTED, name, other="grep", seconds=30.0)
    teller.say(Event.TOOL_FINISHED)
    teller.ports.take()
    assert teller.say(Event.PROGRAM_FINISHED) is None
    assert teller.ports.take() == [("unpin", 3), ("cancel", 4)]
    assert set(teller.ports.pins) == {2}, "the other one's is still there"


def test_a_context_that_moves_takes_its_pin_along() -> None:
    teller = Teller()
    teller.begin("a")
    teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0)
    teller.core.clock.advance(20 * SECOND)
    assert teller.say(Event.CONTEXT, keys=chain(6, "a")) is None
    assert teller.ports.take()[1:] == [("pin", "program:a", 100 * SECOND, 6), ("unpin", 1)]


def test_what_it_costs_to_lose_a_context_is_asked_of_its_own_blocks() -> None:
    teller = Teller()
    teller.begin("a", blocks_each=7)
    teller.say(Event.TOOL_STARTED, other="grep")
    assert teller.asked == [(teller.namespace, 0, 7)]


def test_a_context_is_fetched_before_a_long_tool_is_expected_to_end() -> None:
    teller = Teller(Costs(0, 50 * SECOND))
    teller.begin("a")
    teller.say(Event.PROGRAM, seconds=24.0 * HOUR_S)
    teller.say(Event.TOOL_STARTED, other="person", seconds=2.0 * HOUR_S)
    teller.pass_time(2 * HOUR - 101 * SECOND)
    assert teller.ports.take() == [], "nobody pins for longer than an hour"
    teller.pass_time(SECOND)
    assert teller.ports.take() == [("fetch", chain(1, "a")[0], 4, 100 * SECOND)]
    teller.pass_time(HOUR)
    assert teller.ports.take() == []


@pytest.mark.parametrize("crowded", [False, True])
def test_a_fetch_takes_the_place_of_the_one_before_if_it_is_taken(*, crowded: bool) -> None:
    teller = Teller()
    teller.begin("a")
    teller.say(Event.PROGRAM, seconds=24.0 * HOUR_S)
    teller.say(Event.TOOL_STARTED, other="person", seconds=2.0 * HOUR_S)
    teller.pass_time(2 * HOUR_S * SECOND)
    assert [deed[0] for deed in teller.ports.take()] == ["fetch"]
    first, teller.ports.crowded = teller.ports.number, crowded
    teller.say(Event.TOOL_FINISHED)
    assert [deed[0] for deed in teller.ports.take()] == (["pin"] if crowded else ["pin", "fetch", "cancel"])
    last = first if crowded else teller.ports.number
    teller.say(Event.PROGRAM_FINISHED)
    assert ("cancel", last) in teller.ports.take()


def test_a_silent_program_is_over() -> None:
    teller = Teller()
    teller.begin("a")
    teller.say(Event.PROGRAM, seconds=100.0)
    teller.say(Event.TOOL_STARTED, other="grep", seconds=1000.0)
    teller.ports.take()
    teller.pass_time(99 * SECOND)
    assert teller.ports.take() == []
    teller.pass_time(2 * SECOND)
    assert teller.ports.take() == [("unpin", 1)]
    assert teller.say(Event.TURN_FINISHED) == Refused(Refusal.UNKNOWN, "a")


def test_a_pin_that_ends_early_is_tried_again_as_its_last_blocks_may_still_be_on_their_way() -> None:
    teller = Teller(there=2)
    teller.begin("a")
    teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0)
    teller.ports.there = 4
    teller.pass_time(AGAIN_NS[0])
    assert teller.ports.take() == [
        ("pin", "program:a", 120 * SECOND, 2),
        ("pin", "program:a", 120 * SECOND - AGAIN_NS[0], 4),
        ("unpin", 1),
    ]
    teller.pass_time(10 * SECOND)
    assert teller.ports.take() == [], "it covers all"


def test_what_never_comes_is_tried_for_a_few_times_only() -> None:
    teller = Teller(there=0)
    teller.begin("a")
    teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0)
    for _ in range(10):
        teller.pass_time(SECOND)
    assert len(teller.ports.take()) == 1 + len(AGAIN_NS)
    assert teller.guiding.report().programs[0].pinned_s == 0
    teller.say(Event.CONTEXT, keys=chain(6, "a"))
    assert teller.ports.take() == [], "there is no pin to move"


def test_what_ends_in_between_is_not_tried_again() -> None:
    teller = Teller(there=2)
    teller.begin("a")
    teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0)
    teller.say(Event.PROGRAM_FINISHED)
    teller.ports.take()
    teller.pass_time(10 * SECOND)
    assert teller.ports.take() == []


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_under_pressure_the_program_that_came_last_gives_way_first() -> None:
    teller = Teller(budget=9)
    teller.begin("first", "second", "third")
    for name in ("second", "third"):
        teller.say(Event.TOOL_STARTED, name, other="grep", seconds=30.0)
    teller.ports.take()
    teller.say(Event.TOOL_STARTED, "first", other="grep", seconds=30.0)
    assert teller.ports.take() == [
        ("pin", "program:first", 120 * SECOND, 1),
        ("unpin", 2),
        ("pin", "program:first", 120 * SECOND, 4),
        ("unpin", 3),
    ]
    assert teller.ports.pins == {1: 4, 4: 4}, "third gave way, second did not have to"
    assert teller.guiding.tally.gave_way == 1
    teller.ports.take()
    teller.say(Event.CONTEXT, "third", keys=chain(6, "third"))
    assert teller.ports.take() == [], "it does not come back by moving"


def test_the_last_one_takes_what_is_left_and_nothing_from_those_before_it() -> None:
    teller = Teller(budget=9)
    teller.begin("first", "second", "third")
    for name in ("first", "second", "third"):
        teller.say(Event.TOOL_STARTED, name, other="grep", seconds=30.0)
    assert teller.ports.pins == {1: 4, 2: 4, 3: 1}
    assert teller.guiding.tally.gave_way == 0


# -- workflows -------------------------------------------------------------------------------------------------------


def run_line(teller: Teller, run: str = "r", version: int = 1) -> None:
    """A run of a -> b -> c with a chain for each."""
    teller.say(Event.WORKFLOW, "line", text=LINE, version=version)
    assert teller.say(Event.RUN, run, other="line") is None
    for step in "abc":
        assert teller.say(Event.BIND, run, other=step, keys=chain(3, step), version=1) is None


def test_what_comes_next_is_fetched_once_for_each_time_it_comes_near() -> None:
    teller = Teller()
    run_line(teller)
    teller.pass_time(0)
    first, second, third = ((("fetch", chain(1, step)[0], 3, FETCH_NS_MIN)) for step in "abc")
    assert teller.ports.take() == [first], "a step to go"
    teller.say(Event.ENTER, "r", other="a", version=1)
    teller.pass_time(0)
    assert teller.ports.take() == [second], "and not again what was fetched a moment ago"
    teller.say(Event.ENTER, "r", other="a", version=2)
    teller.pass_time(0)
    assert teller.ports.take() == []
    teller.say(Event.BIND, "r", other="b", keys=chain(3, "b"), version=2)
    teller.pass_time(0)
    assert teller.ports.take() == [second], "it was bound anew"
    teller.say(Event.ENTER, "r", other="b", version=3)
    teller.pass_time(0)
    assert teller.ports.take() == [third]


def test_a_run_that_ends_meanwhile_fetches_nothing() -> None:
    teller = Teller()
    run_line(teller)
    teller.say(Event.RUN_FINISHED, "r")
    teller.pass_time(0)
    assert teller.ports.take() == []


def test_what_was_passed_over_meanwhile_is_not_fetched() -> None:
    teller = Teller()
    run_line(teller)
    teller.say(Event.ENTER, "r", other="c", version=1)
    teller.pass_time(0)
    assert teller.ports.take() == [("fetch", chain(1, "c")[0], 3, FETCH_NS_MIN)]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "fields", "refusal"),
    [
        (Event.PROGRAM, {"name": ""}, Refusal.NAME),
        (Event.PROGRAM, {"name": "a\n"}, Refusal.NAME),
        (Event.PROGRAM, {"name": "a" * 129}, Refusal.NAME),
        (Event.PROGRAM, {"seconds": 0.0}, Refusal.TIME),
        (Event.PROGRAM, {"seconds": -1.0}, Refusal.TIME),
        (Event.PROGRAM, {"seconds": float("inf")}, Refusal.TIME),
        (Event.PROGRAM, {"seconds": 1e9}, Refusal.TIME),
        (Event.CONTEXT, {"name": "nobody", "keys": chain(1)}, Refusal.UNKNOWN),
        (Event.CONTEXT, {"keys": ()}, Refusal.FORM),
        (Event.CONTEXT, {"keys": [*chain(2), *chain(2)]}, Refusal.NO_CHAIN),
        (Event.TOOL_STARTED, {"name": "nobody", "other": "grep"}, Refusal.UNKNOWN),
        (Event.TOOL_STARTED, {"other": ""}, Refusal.NAME),
        (Event.TOOL_STARTED, {"other": "grep", "seconds": -1.0}, Refusal.TIME),
        (Event.TOOL_STARTED, {"other": "grep", "seconds": 1e30}, Refusal.TIME),
        (Event.TOOL_FINISHED, {}, Refusal.NO_TOOL),
        (Event.TOOL_FINISHED, {"name": "nobody"}, Refusal.UNKNOWN),
        (Event.TURN_FINISHED, {"name": "nobody"}, Refusal.UNKNOWN),
        (Event.PROGRAM_FINISHED, {"name": "nobody"}, Refusal.UNKNOWN),
        (Event.WORKFLOW, {"text": "no json"}, Refusal.FORM),
        (Event.WORKFLOW, {"text": "[" * 50_000}, Refusal.FORM),
        (Event.WORKFLOW, {"text": LOOP}, Refusal.ENDLESS),
        (Event.WORKFLOW, {"text": '{"steps":[' + "{}," * 20_000 + "{}]}"}, Refusal.LARGE),
        (Event.WORKFLOW, {"text": '{"steps":[{"name":"a","next":[' + "1," * 20_000 + "1]}]}"}, Refusal.LARGE),
        (Event.WORKFLOW, {"name": "", "text": LINE}, Refusal.NAME),
        (Event.WORKFLOW, {"name": "line", "text": LINE.replace("c", "d"), "version": 1}, Refusal.OLD),
        (Event.RUN, {"name": "new", "other": "no workflow"}, Refusal.UNKNOWN),
        (Event.RUN, {"name": "", "other": "line"}, Refusal.NAME),
        (Event.RUN, {"name": "new", "other": "line", "seconds": 0.0}, Refusal.TIME),
        (Event.BIND, {"name": "nobody", "other": "a", "keys": chain(1)}, Refusal.UNKNOWN),
        (Event.BIND, {"name": "r", "other": "no step", "keys": chain(1)}, Refusal.UNKNOWN),
        (Event.BIND, {"name": "r", "other": "a", "keys": chain(1), "version": 1}, Refusal.OLD),
        (Event.ENTER, {"name": "nobody", "other": "a"}, Refusal.UNKNOWN),
        (Event.ENTER, {"name": "r", "other": "no step"}, Refusal.UNKNOWN),
        (Event.RUN_FINISHED, {"name": "nobody"}, Refusal.UNKNOWN),
        (Event.EXPECT, {"name": "", "keys": chain(1)}, Refusal.NAME),
        (Event.EXPECT, {"keys": ()}, Refusal.FORM),
        (Event.EXPECT, {"keys": chain(1), "seconds": -1.0}, Refusal.TIME),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(event: Event, fields: dict[str, object], refusal: Refusal) -> None:
    teller = Teller()
    teller.begin("a")
    run_line(teller)
    teller.pass_time(0)
    teller.ports.take()
    before = replace(teller.guiding.report(), counters=HintCounters())
    refused = teller.say(event, **fields)  # type: ignore[arg-type]
    assert isinstance(refused, Refused)
    assert refused.refusal is refusal
    teller.pass_time(0)
    assert teller.ports.take() == []
    assert replace(teller.guiding.report(), counters=HintCounters()) == before
    assert teller.guiding.tally.refused == 1


def test_a_tenant_knows_nothing_of_what_another_one_says() -> None:
    teller = Teller()
    teller.begin("a")
    teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0)
    run_line(teller)
    stranger = teller.core.client("stranger")
    for event in (Event.TOOL_FINISHED, Event.TURN_FINISHED, Event.PROGRAM_FINISHED):
        assert teller.say(event, by=stranger) == Refused(Refusal.UNKNOWN, "a")
    assert teller.say(Event.ENTER, "r", other="a", version=9, by=stranger) == Refused(Refusal.UNKNOWN, "r")
    with pytest.raises(NamespaceError):
        teller.say(Event.EXPECT, keys=chain(1), by=stranger)
    assert teller.say(Event.ENTER, "r", other="a", version=9) is None
    assert teller.say(Event.TOOL_FINISHED) is None
    colleague = teller.core.client()
    assert teller.say(Event.TURN_FINISHED, by=colleague) is None, "an orchestrator may speak for an engine"


def test_a_namespace_whose_number_went_to_another_tenant_is_left_alone() -> None:
    teller = Teller()
    teller.begin("a")
    theirs = teller.core.client("stranger").open()
    teller.core.store.registry.by_number[teller.namespace.number] = theirs
    assert teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0) is None
    assert teller.say(Event.TOOL_FINISHED) is None
    assert teller.ports.take() == []
    assert teller.asked == []


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_programs_beyond_the_limit_are_refused_until_some_are_over() -> None:
    teller = Teller()
    taken = [teller.say(Event.PROGRAM, f"p{number}") for number in range(PROGRAMS + 3)]
    assert taken[:PROGRAMS] == [None] * PROGRAMS
    assert all(isinstance(each, Refused) and each.refusal is Refusal.FULL for each in taken[PROGRAMS:])
    assert teller.say(Event.PROGRAM_FINISHED, "p0") is None
    assert teller.say(Event.PROGRAM, "another") is None


def test_runs_beyond_the_limit_are_refused() -> None:
    teller = Teller()
    teller.say(Event.WORKFLOW, "line", text=LINE, version=1)
    taken = [teller.say(Event.RUN, f"r{number}", other="line") for number in range(RUNS + 1)]
    assert taken[:RUNS] == [None] * RUNS
    assert isinstance(taken[RUNS], Refused)


def test_a_tick_ends_no_more_than_a_few_programs() -> None:
    teller = Teller()
    for number in range(100):
        teller.say(Event.PROGRAM, f"p{number}", seconds=10.0)
    teller.core.clock.advance(11 * SECOND)
    for ended in range(1, 4):
        due_ns = teller.guiding.next_ns()
        assert due_ns is not None
        assert due_ns <= teller.core.clock.ns
        teller.guiding.tick(teller.core.clock.ns)
        assert teller.guiding.report().programs_total == 100 - ended * DUE_AT_ONCE


def test_tenants_take_turns() -> None:
    teller = Teller()
    other = teller.core.client("other")
    for number in range(10 * DUE_AT_ONCE):
        teller.say(Event.PROGRAM, f"p{number}", seconds=10.0)
    teller.say(Event.PROGRAM, "alone", seconds=10.0, by=other)
    teller.core.clock.advance(11 * SECOND)
    for _ in range(2):
        teller.guiding.tick(teller.core.clock.ns)
    assert teller.guiding.report(other.session.tenant).programs_total == 0
    assert teller.guiding.report(teller.client.session.tenant).programs_total == 9 * DUE_AT_ONCE


# -- tenants that come and go ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays", [False, True])
def test_a_tenant_without_a_session_for_an_hour_is_forgotten_but_for_what_its_tools_have_taught(stays: bool) -> None:
    teller = Teller()
    teller.begin("a")
    for _ in range(100):
        teller.say(Event.TOOL_STARTED, other="grep")
        teller.core.clock.advance(5 * SECOND)
        teller.say(Event.TOOL_FINISHED)
    teller.say(Event.PROGRAM, seconds=24.0 * HOUR_S)
    run_line(teller)
    teller.say(Event.RUN, "s", other="line", seconds=24.0 * HOUR_S)
    tenant = teller.client.session.tenant
    learned = teller.guiding.export(tenant)
    if not stays:
        teller.core.store.exited(teller.client.session)
    for _ in range(62):
        teller.pass_time(60 * SECOND)
    report = teller.guiding.report()
    assert (report.programs_total, len(report.workflows), report.runs_total) == ((1, 1, 1) if stays else (0, 0, 0))
    assert teller.guiding.export(tenant) == learned
    assert (teller.guiding.next_ns() is None) is not stays, "nobody wakes up for who is gone"
    back = teller.core.client()
    refused = teller.say(Event.TURN_FINISHED, by=back)
    assert refused == (None if stays else Refused(Refusal.UNKNOWN, "a"))
    assert teller.guiding.export(tenant) == learned


def test_whoever_says_something_within_the_hour_is_not_forgotten() -> None:
    teller = Teller()
    teller.begin("a")
    teller.say(Event.PROGRAM, seconds=24.0 * HOUR_S)
    teller.core.store.exited(teller.client.session)
    for minute in range(100):
        teller.pass_time(60 * SECOND)
        if minute == 50:
            guest = teller.core.client()
            assert teller.say(Event.TURN_FINISHED, by=guest) is None
            teller.core.store.exited(guest.session)
    assert teller.guiding.report().programs_total == 1
    for _ in range(20):
        teller.pass_time(60 * SECOND)
    assert teller.guiding.report().programs_total == 0


def test_what_tools_have_taught_passes_to_the_next_life_unless_it_is_damaged() -> None:
    teller, heir, blank = Teller(), Teller(), Teller()
    for each in (teller, heir, blank):
        each.core.clock.ns = 10**12
    teller.begin("a")
    for _ in range(100):
        teller.say(Event.TOOL_STARTED, other="grep")
        teller.core.clock.advance(5 * SECOND)
        teller.say(Event.TOOL_FINISHED)
    written = teller.guiding.export(teller.client.session.tenant)
    damaged = bytes([written[0] ^ 1]) + written[1:]
    refused = heir.guiding.take_over(heir.client.session.tenant.name, damaged)
    assert refused == Refused(Refusal.DAMAGED)
    assert heir.guiding.take_over(heir.client.session.tenant.name, written) is None
    kept = []
    for each in (heir, blank):
        each.begin("a")
        each.say(Event.TOOL_STARTED, other="grep")
        kept.append(each.ports.take())
    assert kept[0] != kept[1], "five seconds, against two where nothing is known"
    assert blank.guiding.export(Tenant("nobody", 9, blank.client.session.tenant.index)) == b""


# -- reports ---------------------------------------------------------------------------------------------------------


def test_programs_and_workflows_are_reported_as_they_stand() -> None:
    teller = Teller()
    teller.begin("a", "b")
    teller.say(Event.TOOL_STARTED, other="grep", seconds=30.0)
    teller.say(Event.TURN_FINISHED, "b")
    run_line(teller)
    teller.say(Event.ENTER, "r", other="a", version=1)
    teller.core.clock.advance(20 * SECOND)
    report = teller.guiding.report()
    late, early = report.programs
    assert (early.program, early.state, early.tool, early.tool_s) == ("a", "in tool", "grep", 20.0)
    assert (early.context_blocks, early.pinned_blocks, early.pinned_s) == (4, 4, 100.0)
    assert (late.program, late.state, late.tool, late.turns, late.pinned_s) == ("b", "thinking", "", 1, 0.0)
    assert [(each.workflow, each.steps, each.runs) for each in report.workflows] == [("line", 3, 1)]
    assert [(each.run, each.running, each.near, each.bound_steps) for each in report.runs] == [("r", ("a",), ("b",), 3)]
    assert teller.guiding.report(teller.core.client("other").session.tenant).programs == ()


def test_a_report_is_bounded_however_much_there_is() -> None:
    teller = Teller()
    for number in range(PROGRAMS):
        teller.say(Event.PROGRAM, f"p{number}")
    report = teller.guiding.report()
    assert report.programs_total == PROGRAMS
    assert len(report.programs) == 512
    assert report.programs[0].program == f"p{PROGRAMS - 1}"


def test_seconds_that_are_unknown_are_those_of_the_limits() -> None:
    teller = Teller()
    teller.say(Event.PROGRAM, seconds=UNKNOWN)
    teller.pass_time(HOUR - SECOND)
    assert teller.guiding.report().programs_total == 1
    teller.pass_time(2 * SECOND)
    assert teller.guiding.report().programs_total == 0
