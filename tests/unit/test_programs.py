"""What follows for a program's context from what is told of it."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.ids import BlockKey, NamespaceNumber
from kvstore.hints.chains import Chain, Chains
from kvstore.hints.gaps import Gaps
from kvstore.hints.limits import HOUR_S, NAME_CHARS, SECOND_NS
from kvstore.hints.programs import Action, Costs, Fetch, Keep, LetGo, Programs
from kvstore.hints.refusal import Refusal, Refused

HOUR_NS = HOUR_S * SECOND_NS
CHEAP = Costs(0, 0)
DEAR = Costs(0, 100 * SECOND_NS)
NAMESPACE = NamespaceNumber(3)


def chain(blocks: int, name: str = "") -> Chain:
    return Chain.of(NAMESPACE, [BlockKey(hashlib.sha256(f"{name} {n}".encode()).digest()) for n in range(blocks)])


class Told:
    """Programs that have begun at 0, each with a context of four blocks."""

    def __init__(self, *names: str, most: int = 100) -> None:
        self.gaps = Gaps()
        self.chains = Chains()
        self.programs = Programs(self.gaps, self.chains, most)
        for name in names:
            assert self.programs.begin(name, 0) == ()
            assert self.programs.context(name, chain(4, name), 0) == ()

    def learn(self, tool: str, gap_s: int) -> None:
        for _ in range(100):
            self.gaps.observed(tool, gap_s * SECOND_NS)

    def due(self, now_ns: int) -> list[Action]:
        return list(self.programs.due(now_ns))


# -- tools ----------------------------------------------------------------------------------------------------------


def test_with_an_estimate_the_context_is_kept_for_four_times_that() -> None:
    told = Told("a")
    answer = told.programs.tool_started("a", "grep", SECOND_NS, CHEAP, expected_s=30.0)
    assert answer == (Keep("a", chain(4, "a"), 121 * SECOND_NS),)
    assert told.programs.tool_started("a", "grep", 0, CHEAP, 1.0) == (Keep("a", chain(4, "a"), 60 * SECOND_NS),)
    assert told.programs.tool_started("a", "grep", 0, CHEAP, 3000.0) == (Keep("a", chain(4, "a"), HOUR_NS),)


def test_a_tool_said_to_take_longer_than_any_pin_is_not_pinned_for_but_fetched_for() -> None:
    told = Told("a")
    told.programs.begin("a", 0, ttl_s=3 * HOUR_S)
    assert told.programs.tool_started("a", "human", 0, DEAR, 2.0 * HOUR_S) == (LetGo("a"),)
    assert told.due(2 * HOUR_NS - 201 * SECOND_NS) == []
    assert told.due(2 * HOUR_NS - 199 * SECOND_NS) == [Fetch("a", chain(4, "a"), 2 * HOUR_NS)]


def test_without_an_estimate_what_was_learned_decides() -> None:
    told = Told("a")
    assert told.programs.tool_started("a", "grep", 0, CHEAP) == (Keep("a", chain(4, "a"), 2 * SECOND_NS),)
    told.learn("grep", 10)
    (kept,) = told.programs.tool_started("a", "grep", 0, DEAR)  # type: ignore[misc]
    assert isinstance(kept, Keep)
    assert 10 * SECOND_NS <= kept.until_ns < 11 * SECOND_NS
    assert told.programs.tool_started("a", "grep", 0, CHEAP) == (LetGo("a"),), "to get it back costs nothing"


def test_what_is_not_kept_is_fetched_in_time_for_the_likely_end() -> None:
    told = Told("a")
    told.learn("build", 100)
    assert told.programs.tool_started("a", "build", 0, Costs(0, SECOND_NS)) == (LetGo("a"),)
    next_ns = told.programs.next_ns()
    assert next_ns is not None
    assert 98 * SECOND_NS <= next_ns < 110 * SECOND_NS
    assert told.due(next_ns - SECOND_NS) == []
    (fetch,) = told.due(next_ns)
    assert isinstance(fetch, Fetch)
    assert fetch.by_ns - next_ns == pytest.approx(2 * SECOND_NS, abs=SECOND_NS / 10)
    assert told.due(next_ns + 60 * SECOND_NS) == [], "once"


def test_the_end_of_a_tool_brings_the_context_back_and_keeps_it_for_the_turn() -> None:
    told = Told("a")
    told.programs.tool_started("a", "grep", 0, CHEAP, 10.0)
    answer = told.programs.tool_finished("a", 5 * SECOND_NS)
    assert answer == (
        Keep("a", chain(4, "a"), 65 * SECOND_NS),
        Fetch("a", chain(4, "a"), 5 * SECOND_NS),
    )
    assert told.gaps.samples("grep") == 1
    assert told.gaps.samples("other") == 0
    assert told.programs.tool_finished("a", 6 * SECOND_NS) == Refused(Refusal.NO_TOOL, "a")


def test_a_tool_that_ends_early_is_not_fetched_for_again() -> None:
    told = Told("a")
    told.programs.tool_started("a", "build", 0, CHEAP, 2.0 * HOUR_S)
    told.programs.tool_finished("a", SECOND_NS)
    assert not [action for action in told.due(10 * HOUR_NS) if isinstance(action, Fetch)]


def test_a_program_that_has_named_no_context_has_nothing_to_keep_but_teaches() -> None:
    told = Told()
    told.programs.begin("a", 0)
    assert told.programs.tool_started("a", "grep", 0, CHEAP, 10.0) == (LetGo("a"),)
    assert told.programs.tool_finished("a", SECOND_NS) == ()
    assert told.gaps.samples("grep") == 1
    assert list(told.programs.drop_order(0)) == []


def test_a_pin_moves_with_the_context() -> None:
    told = Told("a")
    assert told.programs.context("a", chain(6, "a"), 1) == (), "nothing is pinned"
    told.programs.tool_started("a", "grep", 0, CHEAP, 10.0)
    assert told.programs.context("a", chain(9, "a"), 2) == (Keep("a", chain(9, "a"), 60 * SECOND_NS),)
    assert told.programs.context("a", chain(9, "a"), 60 * SECOND_NS) == (), "it has run out"
    assert (told.chains.blocks, told.chains.ends) == (9, 1), "what was named before is forgotten"


# -- the end --------------------------------------------------------------------------------------------------------


def test_a_finished_program_is_let_go_and_teaches_how_many_turns_there_are() -> None:
    told = Told(*map(str, range(10)))
    for number in range(10):
        for turn in range(5):
            assert told.programs.turn_finished(str(number), turn) == ()
        assert told.gaps.eta() == 0
        assert told.programs.finished(str(number)) == (LetGo(str(number)),)
    assert told.gaps.eta() == pytest.approx(1)
    assert (len(told.programs), told.chains.blocks, told.programs.next_ns()) == (0, 0, None)
    assert told.programs.finished("0") == Refused(Refusal.UNKNOWN, "0")


def test_a_silent_program_is_over_and_one_that_is_heard_of_is_not() -> None:
    told = Told("silent", "heard")
    told.programs.turn_finished("heard", HOUR_NS // 2)
    assert told.due(HOUR_NS - 1) == []
    assert told.due(HOUR_NS) == [LetGo("silent")]
    assert told.programs.tool_started("silent", "grep", HOUR_NS, CHEAP) == Refused(Refusal.UNKNOWN, "silent")
    assert told.programs.begin("heard", HOUR_NS) == ()
    assert told.due(2 * HOUR_NS - 1) == []
    assert told.due(2 * HOUR_NS) == [LetGo("heard")]
    assert told.chains.blocks == 0


def test_a_tool_that_never_ends_is_learned_as_endless() -> None:
    told = Told("a")
    told.programs.tool_started("a", "hang", 0, CHEAP)
    assert told.due(HOUR_NS) == [LetGo("a")]
    assert told.gaps.samples("hang") == 1
    told.learn("other", 1)
    assert told.gaps.likely_ns("hang") is not None
    for _ in range(110):
        told.programs.begin("a", 0)
        told.programs.tool_started("a", "hang", 0, CHEAP)
        told.due(HOUR_NS)
    assert told.gaps.likely_ns("hang") is None
    assert told.gaps.worth_keeping_ns("hang", 0, 100 * HOUR_NS) == 0


def test_a_program_that_is_over_in_the_midst_of_a_short_patience_teaches_no_gap() -> None:
    told = Told()
    told.programs.begin("a", 0, ttl_s=60.0)
    told.programs.tool_started("a", "hang", 0, CHEAP)
    assert told.due(61 * SECOND_NS) == [LetGo("a")]
    assert told.gaps.samples("hang") == 0


# -- pressure -------------------------------------------------------------------------------------------------------


def test_under_pressure_the_program_that_came_last_gives_way_first() -> None:
    told = Told("first", "second", "third", "idle")
    for name in ("third", "first", "second"):
        told.programs.tool_started(name, "grep", 0, CHEAP, 10.0)
    told.programs.begin("first", SECOND_NS)
    assert list(told.programs.drop_order(SECOND_NS)) == ["third", "second", "first"]
    told.programs.dropped("third")
    told.programs.dropped("who?")
    assert list(told.programs.drop_order(SECOND_NS)) == ["second", "first"]
    assert list(told.programs.drop_order(60 * SECOND_NS)) == [], "they have run out"


# -- bad hints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e300, float("nan"), float("inf"), float("-inf"), 8 * 86400.0])
def test_a_time_that_is_none_is_refused_and_nothing_changes(seconds: float) -> None:
    told = Told("a")
    assert told.programs.begin("b", 0, ttl_s=seconds) == Refused(Refusal.TIME, "b")
    assert told.programs.tool_started("a", "grep", 0, CHEAP, seconds) == Refused(Refusal.TIME, "grep")
    assert told.programs.tool_finished("a", 0) == Refused(Refusal.NO_TOOL, "a")
    assert len(told.programs) == 1


@pytest.mark.parametrize("name", ["", "x" * (NAME_CHARS + 1), "a\nb", "\0", "\ud800"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    told = Told("a")
    for answer in (told.programs.begin(name, 0), told.programs.tool_started("a", name, 0, CHEAP)):
        assert isinstance(answer, Refused)
        assert answer.refusal is Refusal.NAME
        assert answer.what.isascii()
        assert len(answer.what) <= NAME_CHARS
    assert told.programs.begin("x" * NAME_CHARS, 0) == ()


def test_a_million_programs_are_refused_until_others_are_over() -> None:
    told = Told(*map(str, range(100)))
    for number in range(1000):
        assert told.programs.begin(f"more {number}", SECOND_NS) == Refused(Refusal.FULL, f"more {number}")
    assert told.programs.begin("7", SECOND_NS) == (), "it is one of them"
    assert len(told.due(HOUR_NS)) == 99
    assert told.programs.begin("more", HOUR_NS) == ()


def test_a_chain_that_is_none_or_too_long_leaves_the_context_as_it_was() -> None:
    told = Told("a")
    good, doubled = chain(4, "a"), chain(2, "b")
    for keys, refusal in (
        (b"", Refusal.FORM),
        (good.keys[:-1], Refusal.FORM),
        (doubled.keys * 2, Refusal.NO_CHAIN),
        (good.keys[32:], Refusal.NO_CHAIN),
        (bytes(32 * 70_000), Refusal.LARGE),
    ):
        assert told.programs.context("a", Chain(NAMESPACE, keys), 0) == Refused(refusal, "a")
    assert told.programs.context("b", good, 0) == Refused(Refusal.UNKNOWN, "b")
    assert told.programs.tool_started("a", "grep", 0, CHEAP, 1.0) == (Keep("a", good, 60 * SECOND_NS),)


VERBS = st.tuples(
    st.sampled_from(["begin", "context", "started", "estimated", "tool over", "turn", "finished", "due"]),
    st.sampled_from(["a", "b", "c", "d"]),
    st.integers(1, 8),
    st.integers(0, HOUR_NS // 2),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(verbs=st.lists(VERBS, max_size=60))
def test_whatever_is_told_in_any_order_nothing_raises_and_nothing_stays(verbs: list[tuple[str, str, int, int]]) -> None:
    told, now_ns = Told(most=3), 0
    programs = told.programs
    for verb, name, size, ns in verbs:
        now_ns += ns
        told.due(now_ns)
        if verb == "begin":
            programs.begin(name, now_ns, ttl_s=100.0 * size)
        elif verb == "context":
            programs.context(name, chain(size), now_ns)
        elif verb == "started":
            programs.tool_started(name, "tool", now_ns, DEAR)
        elif verb == "estimated":
            programs.tool_started(name, "tool", now_ns, CHEAP, 1000.0 * size)
        elif verb == "tool over":
            programs.tool_finished(name, now_ns)
        elif verb == "turn":
            programs.turn_finished(name, now_ns)
        elif verb == "finished":
            programs.finished(name)
        assert len(programs) <= 3
        assert len(list(programs.drop_order(now_ns))) <= told.chains.ends <= len(programs)
    told.due(now_ns + HOUR_NS)
    assert (len(programs), told.chains.blocks, told.chains.ends, programs.next_ns()) == (0, 0, 0, None)
