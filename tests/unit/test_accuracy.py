"""The weight of hints against sources of which it is known how right they are."""

import hashlib
from collections.abc import Callable
from functools import cache
from heapq import heapify, heappop, heappush
from random import Random
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.hints.accuracy import HORIZON_NS, SAMPLE_SHIFT_MAX, TRIALS_AT_ONCE, Accuracy, Claim, next_use, reuse
from kvstore.hints.chains import Mark
from kvstore.hints.limits import SAMPLED_USES, SECOND_NS, SOURCES, TRIALS
from kvstore.hints.refusal import Refusal, Refused

SAMPLED = Mark(1 << 20)
Request: TypeAlias = tuple[int, list[tuple[Mark, int | None]]]  # when, and its blocks with the time to their next use
Source: TypeAlias = Callable[[Random, float, int | None], Claim | Refused | None]  # the second: one draw a request

NEVER_NS = 3600 * SECOND_NS


def block(name: str) -> Mark:
    return Mark(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


@cache
def workload(seed: int, again: float) -> list[Request]:
    """Conversations behind three system prompts; each turn reads all before it, and may be the last.

    Of the blocks only those that are sampled at a shift of 3.
    """
    random = Random(seed)
    heap = [(int(n * SECOND_NS * random.uniform(0.9, 1.1)), n, 0) for n in range(1200)]
    heapify(heap)
    requests = []
    while heap:
        now_ns, number, turn = heappop(heap)
        prompt = [block(f"prompt {seed} {number % 3} {n}") for n in range(4)]
        marks = prompt + [block(f"{seed} {number} {n}") for n in range(16 + 4 * turn)]
        requests.append((now_ns, [mark for mark in marks if not mark % 8]))
        if random.random() < again:
            heappush(heap, (now_ns + int((1 + random.lognormvariate(4, 1.2)) * SECOND_NS), number, turn + 1))
    later: dict[Mark, int] = {}
    known: list[Request] = []
    for now_ns, marks in reversed(requests):
        known.append((now_ns, [(mark, later[mark] - now_ns if mark in later else None) for mark in marks]))
        later.update(dict.fromkeys(marks, now_ns))
    return known[::-1]


def weights(seed: int, again: float, **sources: Source) -> dict[str, tuple[float, float]]:
    """Of claims that blocks will not be used, and that they will."""
    accuracy, random = Accuracy(shift=3), Random(seed)
    for now_ns, blocks in workload(seed, again):
        for mark, _ in blocks:
            accuracy.used(mark, now_ns)
        one = random.random()
        for mark, after_ns in blocks:
            for name, source in sources.items():
                claim = source(random, one, after_ns)
                if isinstance(claim, Claim):
                    accuracy.predicted(name, mark, claim, now_ns)
    accuracy.expire(now_ns + NEVER_NS)
    return {name: (accuracy.weight(name, used=False), accuracy.weight(name)) for name in sources}


def right(share: float) -> Source:
    """One bit a block."""
    return lambda random, _, after: reuse(near(after) == (random.random() < share))


def near(after_ns: int | None) -> bool:
    return after_ns is not None and after_ns <= HORIZON_NS


WORTHLESS: dict[str, Source] = {
    "random": right(0.5),
    "random by request": lambda _, one, after: reuse(one < 0.5),
    "inverted": right(0.0),
    "mostly inverted": right(0.2),
    "always": lambda random, one, after: reuse(True),
    "never": lambda random, one, after: reuse(False),
    "random times": lambda random, _, after: next_use(random.randrange(1, NEVER_NS)),
    "random near times": lambda random, _, after: next_use(1 + int(random.lognormvariate(4, 1.2) * SECOND_NS)),
    "inverted times": lambda random, _, after: next_use(max(NEVER_NS - (after or NEVER_NS), 1)),
    "one time": lambda random, one, after: next_use(60 * SECOND_NS),
}


# -- the weight -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 10, 3))
@pytest.mark.parametrize("again", [0.1, 0.5])
def test_who_is_no_better_than_chance_has_no_weight(first: int, again: float) -> None:
    worthless = dict(list(WORTHLESS.items())[first : first + 3])
    found = weights(1, again, **worthless, good=right(1.0))
    assert min(found.pop("good")) > 0.6, "what is right about the same blocks at the same time has"
    assert found == dict.fromkeys(worthless, (0, 0))


@pytest.mark.parametrize("again", [0.1, 0.5])
def test_the_more_often_a_source_is_right_the_more_it_weighs(again: float) -> None:
    found = weights(2, again, perfect=right(1.0), good=right(0.8), fair=right(0.7), chance=right(0.5))
    for kind in (0, 1):
        assert 1 >= found["perfect"][kind] > found["good"][kind] > found["fair"][kind] >= found["chance"][kind] == 0
        assert 0.1 < found["good"][kind] < 0.6, "four fifths tend to 0.6"


def test_soft_times_that_are_mostly_right_weigh() -> None:
    def times(random: Random, _: float, after_ns: int | None) -> Claim | Refused:
        return next_use(random.randrange(1, NEVER_NS) if random.random() < 0.2 else after_ns or NEVER_NS)

    assert min(weights(3, 0.5, times=times)["times"]) > 0.3


def test_who_seldom_speaks_but_is_right_weighs() -> None:
    def seldom(random: Random, _: float, after_ns: int | None) -> Claim | None:
        return reuse(True) if near(after_ns) and random.random() < 0.05 else None

    found = weights(4, 0.5, seldom=seldom, bad=right(0.0))
    assert found["seldom"][1] > 0.5
    assert found["bad"] == (0, 0)


def test_who_was_right_and_no_longer_is_loses_its_weight_and_who_has_learned_gains_it() -> None:
    accuracy, now_ns = Accuracy(shift=0), 0
    weight = []
    for phase in range(3):
        for number in range(2500):
            now_ns += SECOND_NS
            mark, is_right = block(f"{phase} {number}"), phase != 1
            accuracy.used(mark, now_ns)
            accuracy.predicted("source", mark, reuse((number % 3 == 0) == is_right, 30 * SECOND_NS), now_ns)
            if number % 3 == 0:
                accuracy.used(mark, now_ns + SECOND_NS // 2)
        weight.append(accuracy.weight("source"))
    assert weight[1] == 0 < min(weight[0], weight[2])


def test_nothing_weighs_before_there_is_evidence() -> None:
    accuracy = Accuracy(shift=0)
    assert accuracy.weight("who?") == 0
    for number in range(5):
        now_ns = number * SECOND_NS
        accuracy.used(block(str(number)), now_ns)
        accuracy.predicted("source", block(str(number)), reuse(True), now_ns)
        accuracy.used(block(str(number)), now_ns + SECOND_NS // 2)
    assert accuracy.weight("source") == 0


# -- trials ---------------------------------------------------------------------------------------------------------


def kept(accuracy: Accuracy, used: bool = True) -> tuple[float, float] | None:
    """Cases that have ended, and those of them that came true."""
    return next(((s.cases, s.kept) for s in accuracy.standings() if s.used == used), None)


@pytest.mark.parametrize(
    ("claim", "after_ns", "came_true"),
    [
        (reuse(True, 60 * SECOND_NS), 60 * SECOND_NS, True),
        (reuse(True, 60 * SECOND_NS), 60 * SECOND_NS + 1, False),
        (reuse(True, 60 * SECOND_NS), None, False),
        (reuse(False, 60 * SECOND_NS), 60 * SECOND_NS, False),
        (reuse(False, 60 * SECOND_NS), 61 * SECOND_NS, True),
        (reuse(False, 60 * SECOND_NS), None, True),
        (next_use(100 * SECOND_NS), 199 * SECOND_NS, True),
        (next_use(100 * SECOND_NS), 201 * SECOND_NS, False),
        (next_use(4000 * SECOND_NS), 999 * SECOND_NS, False),
        (next_use(4000 * SECOND_NS), None, True),
    ],
)
def test_a_claim_comes_true_or_its_time_runs_out(claim: Claim, after_ns: int | None, came_true: bool) -> None:
    accuracy = Accuracy()
    accuracy.predicted("source", SAMPLED, claim, 7)
    assert kept(accuracy, claim.used) is None
    if after_ns is not None:
        accuracy.used(SAMPLED, 7 + after_ns)
    accuracy.expire(7 + 4000 * SECOND_NS)
    assert kept(accuracy, claim.used) == (1, came_true)
    assert kept(accuracy, not claim.used) is None


def test_the_use_that_a_claim_comes_with_does_not_make_it_true() -> None:
    accuracy = Accuracy()
    accuracy.predicted("source", SAMPLED, reuse(True), 0)
    accuracy.used(SAMPLED, 0)
    accuracy.used(SAMPLED, SECOND_NS // 10)
    assert kept(accuracy) is None
    accuracy.used(SAMPLED, SECOND_NS)
    assert kept(accuracy) == (1, 1)


def test_what_is_said_time_and_again_without_coming_true_is_broken() -> None:
    accuracy = Accuracy()
    for number in range(100):
        accuracy.predicted("source", SAMPLED, reuse(True, 60 * SECOND_NS), number * SECOND_NS)
    assert accuracy.trials == 2, "and not a hundred"
    accuracy.expire(1000 * SECOND_NS)
    ended = kept(accuracy)
    assert ended is not None
    assert ended[0] > 3
    assert ended[1] == 0


def test_of_one_instant_only_a_few_trials_count() -> None:
    accuracy = Accuracy()
    for number in range(100):
        accuracy.predicted("source", Mark(number << 20), reuse(True), 5)
    assert accuracy.trials == TRIALS_AT_ONCE
    accuracy.predicted("source", SAMPLED, reuse(True), 6)
    assert accuracy.trials == TRIALS_AT_ONCE + 1


def test_only_sampled_blocks_are_looked_at() -> None:
    accuracy = Accuracy(shift=4)
    other = Mark(SAMPLED + 8)
    assert (accuracy.samples(SAMPLED), accuracy.samples(other)) == (True, False)
    accuracy.predicted("source", other, reuse(True), 0)
    accuracy.used(other, 0)
    assert accuracy.trials == 0
    accuracy.predicted("source", SAMPLED, reuse(True), 0)
    assert accuracy.trials == 1


# -- bad hints ------------------------------------------------------------------------------------------------------


def test_a_time_that_is_past_and_a_name_that_is_none_are_refused() -> None:
    assert next_use(0) == next_use(-(10**30)) == Refused(Refusal.TIME)
    assert next_use(10**30) == reuse(False, 3600 * SECOND_NS)
    assert next_use(1) == reuse(True, SECOND_NS)
    accuracy = Accuracy()
    assert accuracy.predicted("", SAMPLED, reuse(True), 0) == Refused(Refusal.NAME)
    assert accuracy.predicted("a\nb", SAMPLED, reuse(True), 0) == Refused(Refusal.NAME, "a\\nb")
    assert accuracy.trials == 0
    assert accuracy.predicted("good", SAMPLED, reuse(True), 0) is None
    assert accuracy.trials == 1


def test_a_million_sources_oust_each_other_and_not_one_that_speaks() -> None:
    accuracy = Accuracy(shift=0)
    for number in range(10 * SOURCES):
        now_ns = number * SECOND_NS
        for name in ("speaks", f"source {number}"):
            accuracy.predicted(name, block(str(number)), reuse(True), now_ns)
        accuracy.used(block(str(number)), now_ns + SECOND_NS // 2)
    standings = accuracy.standings()
    assert len(standings) == SOURCES
    assert {s.source: s.cases > 100 for s in standings}["speaks"]
    assert not {s.source: s.cases > 100 for s in standings}[f"source {number}"]


def test_with_too_many_open_trials_fewer_blocks_are_sampled_and_later_as_many_as_before() -> None:
    accuracy = Accuracy(shift=0, most_trials=64)
    for number in range(5000):
        accuracy.predicted("source", block(str(number)), reuse(True), number)
        assert accuracy.trials <= 64
    assert accuracy.shift > 3
    for number in range(SAMPLE_SHIFT_MAX):
        accuracy.expire(2 * HORIZON_NS + number * 11 * SECOND_NS)
    assert (accuracy.trials, accuracy.shift) == (0, 0)
    same = Accuracy(shift=0)
    for number in range(TRIALS + 100):
        same.predicted("source", Mark(number << 40), reuse(True), number)
    assert same.trials <= TRIALS, "though their lowest bits agree"


def test_of_a_flood_of_uses_only_so_many_a_second_are_looked_at() -> None:
    accuracy = Accuracy(shift=0)
    looked_at = 0
    for number in range(40_000):
        mark, now_ns = block(str(number % 2000)), number * SECOND_NS // 10_000
        looked_at += accuracy.samples(mark)
        accuracy.used(mark, now_ns)
    assert SAMPLED_USES < looked_at < 10 * SAMPLED_USES
    assert accuracy.shift == accuracy._shift_least + looked_at // SAMPLED_USES


MOVES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans(), st.integers(0, 400 * SECOND_NS)), max_size=60
)


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(moves=MOVES)
def test_whatever_is_said_nothing_is_left_when_its_time_is_up(moves: list[tuple[str, int, bool, int]]) -> None:
    accuracy, now_ns = Accuracy(shift=0, most_trials=8), 0
    for source, number, used, ns in moves:
        now_ns += ns
        accuracy.used(Mark(number), now_ns)
        accuracy.predicted(source, Mark(number), reuse(used, ns), now_ns)
        assert 0 <= accuracy.trials <= 8
        assert all(0 <= s.kept <= s.cases and 0 <= s.weight <= 1 for s in accuracy.standings())
    accuracy.expire(now_ns + 3601 * SECOND_NS)
    assert (accuracy.trials, accuracy._open, accuracy._over.next_ns()) == (0, {}, None)
