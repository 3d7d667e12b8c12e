"""Hints on a real store: words on blocks, pins within the tenant's budget, fetches from disk; and noise."""

import json
import random
from collections.abc import Iterable
from itertools import pairwise

import pytest

from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import UNKNOWN, Event, Hint, Tier
from kvstore import blocks
from kvstore.hints.expectations import Expectation
from kvstore.policies import Chosen
from kvstore.rules import Rule
from kvstore.rules import Tier as TierName
from kvstore.sessions import Namespace
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import MS, SECOND, Client, Core, chain, words

LINE = json.dumps({"steps": [{"name": "a", "next": ["b"]}, {"name": "b", "next": ["c"]}, {"name": "c"}]})


def tell(
    client: Client, event: Event, name: str, namespace: Namespace | None = None, keys: Iterable[bytes] = (),
    **fields: object,
) -> None:  # fmt: skip
    """A hint that must be taken, to a real store, which then does all that follows."""
    number = namespace.number if namespace else 0
    hint = Hint(event, name, namespace=number, keys=b"".join(keys), **fields)  # type: ignore[arg-type]
    assert client.store.guiding.hear(client.session, hint) is None
    for _ in range(100):
        if client.store.guiding.next_ns() != 0:
            return
        client.store.tick()
    raise AssertionError("there is always something left to do")


def said(core: Core, namespace: Namespace, keys: Iterable[bytes]) -> list[int]:
    """What is noted on blocks."""
    rows = [core.row(namespace, key) for key in keys]
    return [int(core.store.tables.blocks[row]["uses"]) >> blocks.HINT_BITS for row in rows]


def listening(rule: Rule = Rule.DENSITY) -> tuple[Core, Client, Namespace]:
    """A store by that rule, and a client that has stored four chains."""
    core = Core(arenas=4)
    core.store.choose_rule(Chosen(TierName.DRAM, None, rule))
    client = core.client()
    namespace = client.open()
    for name in "abcx":
        client.put(namespace, chain(3, name))
    return core, client, namespace


def test_tools_say_when_a_context_is_used_next() -> None:
    core, client, namespace = listening()
    keys = chain(3, "a")
    tell(client, Event.PROGRAM, "a")
    tell(client, Event.CONTEXT, "a", namespace, keys)
    assert said(core, namespace, keys) == [Expectation.THINKING] * 3
    for seconds, word in ((60.0, Expectation.SOON), (600.0, Expectation.LATER), (6000.0, Expectation.HARDLY)):
        tell(client, Event.TOOL_STARTED, "a", other="grep", seconds=seconds)
        assert said(core, namespace, keys) == [word] * 3
    tell(client, Event.TOOL_FINISHED, "a")
    assert said(core, namespace, keys) == [Expectation.AT_ONCE] * 3
    tell(client, Event.PROGRAM_FINISHED, "a")
    assert said(core, namespace, keys) == [Expectation.HARDLY] * 3
    assert said(core, namespace, chain(3, "x")) == [0, 0, 0], "nothing was said of others"
    core.audit()


def test_what_was_learned_of_a_tool_wins_over_what_a_caller_says() -> None:
    core, client, namespace = listening()
    tell(client, Event.PROGRAM, "a")
    tell(client, Event.CONTEXT, "a", namespace, chain(3, "a"))
    for _ in range(100):
        tell(client, Event.TOOL_STARTED, "a", other="grep", seconds=1.0)
        core.clock.advance(600 * SECOND)
        tell(client, Event.TOOL_FINISHED, "a")
    tell(client, Event.TOOL_STARTED, "a", other="grep", seconds=1.0)
    assert said(core, namespace, chain(3, "a")) == [Expectation.LATER] * 3
    tell(client, Event.TOOL_STARTED, "a", other="grep", seconds=6000.0)
    assert said(core, namespace, chain(3, "a")) == [Expectation.LATER] * 3


def test_steps_say_how_near_they_are_and_a_shared_prefix_counts_for_the_nearest() -> None:
    core, client, namespace = listening()
    shared, far = chain(3, "a"), chain(3, "b")
    tell(client, Event.WORKFLOW, "line", text=json.dumps({"steps": [
        {"name": str(n), "next": [str(n + 1)] if n < 6 else []} for n in range(7)
    ]}), version=1)  # fmt: skip
    tell(client, Event.RUN, "r", other="line")
    tell(client, Event.BIND, "r", namespace, shared[:1], other="1", version=1)
    tell(client, Event.BIND, "r", namespace, shared, other="3", version=1)
    tell(client, Event.BIND, "r", namespace, far, other="6", version=1)
    assert said(core, namespace, shared) == [0, 0, 0], "a run that has not begun says nothing"
    tell(client, Event.ENTER, "r", other="0", version=1)
    assert said(core, namespace, shared) == [Expectation.NEXT_STEP, Expectation.LATER, Expectation.LATER]
    assert said(core, namespace, far) == [Expectation.FAR] * 3
    core.audit()


def test_a_run_that_is_over_leaves_what_no_other_run_reads() -> None:
    core, client, namespace = listening()
    tell(client, Event.WORKFLOW, "line", text=LINE, version=1)
    for run in "rs":
        tell(client, Event.RUN, run, other="line")
        tell(client, Event.BIND, run, namespace, chain(3, "a"), other="b", version=1)
        tell(client, Event.ENTER, run, other="a", version=1)
    tell(client, Event.BIND, "r", namespace, chain(3, "b"), other="c", version=1)
    tell(client, Event.RUN_FINISHED, "r")
    assert said(core, namespace, chain(3, "a")) == [Expectation.NEXT_STEP] * 3, "the other one reads it next"
    assert said(core, namespace, chain(3, "b")) == [Expectation.HARDLY] * 3
    tell(client, Event.RUN_FINISHED, "s")
    assert said(core, namespace, chain(3, "a")) == [Expectation.HARDLY] * 3


def test_a_run_that_begins_anew_under_its_name_is_over_first() -> None:
    core, client, namespace = listening()
    tell(client, Event.WORKFLOW, "line", text=LINE, version=1)
    tell(client, Event.RUN, "r", other="line", version=1)
    tell(client, Event.BIND, "r", namespace, chain(3, "a"), other="b", version=1)
    before = said(core, namespace, chain(3, "a"))
    assert Expectation.HARDLY not in before
    tell(client, Event.RUN, "r", other="line", version=1)
    assert said(core, namespace, chain(3, "a")) == before, "it is the same one"
    tell(client, Event.RUN, "r", other="line", version=2)
    assert said(core, namespace, chain(3, "a")) == [Expectation.HARDLY] * 3


def test_whoever_expects_something_says_it_in_seconds_or_in_words_and_may_take_it_back() -> None:
    core, client, namespace = listening()
    keys = chain(3, "a")
    for fields, word in (
        ({"expectation": 3}, Expectation.HARDLY),
        ({"expectation": 1}, Expectation.SOON),
        ({"seconds": 1.0, "expectation": 3}, Expectation.AT_ONCE),
        ({"expectation": 2}, Expectation.LATER),
        ({"expectation": 0}, Expectation.NONE),
    ):
        tell(client, Event.EXPECT, "router", namespace, keys, **fields)
        assert said(core, namespace, keys) == [word] * 3
    assert core.store.guiding.tally.said_blocks == 15


@pytest.mark.parametrize("rule", list(Rule))
def test_every_rule_is_told(rule: Rule) -> None:
    core, client, namespace = listening(rule)
    tell(client, Event.EXPECT, "router", namespace, chain(3, "a"), expectation=1)
    assert said(core, namespace, chain(3, "a")) == [Expectation.SOON] * 3
    assert core.store.guiding.tally.said_blocks == 3
    core.audit()


def visited(client: Client, namespace: Namespace, kept: list[bytes] | None) -> None:
    """A run whose step "a" begins with one block, and whose program asks for three."""
    if not client.store.guiding.report().workflows:
        tell(client, Event.WORKFLOW, "line", text=LINE, version=1)
    tell(client, Event.RUN, "r", other="line")
    tell(client, Event.BIND, "r", namespace, chain(1, "a"), other="a", version=1)
    tell(client, Event.ENTER, "r", other="a", version=1)
    tell(client, Event.PROGRAM, "p")
    tell(client, Event.CONTEXT, "p", namespace, chain(3, "a"))
    if kept is not None:
        tell(client, Event.BIND, "r", namespace, kept, other="a", version=2)


def test_during_a_visit_its_own_blocks_are_those_of_a_turn_and_the_beginning_that_of_a_step() -> None:
    core, client, namespace = listening()
    visited(client, namespace, None)
    assert said(core, namespace, chain(3, "a")) == [Expectation.SOON, Expectation.THINKING, Expectation.THINKING]
    tell(client, Event.TOOL_STARTED, "p", other="grep", seconds=1.0)
    assert said(core, namespace, chain(3, "a"))[1:] == [Expectation.AT_ONCE] * 2
    core.audit()


def test_of_what_a_step_keeps_nothing_is_said_and_the_rest_of_a_visit_is_of_no_use() -> None:
    core, client, namespace = listening()
    visited(client, namespace, chain(2, "a"))
    assert said(core, namespace, chain(3, "a")) == [Expectation.SOON, Expectation.NONE, Expectation.HARDLY]
    core.audit()


def test_a_visit_is_over_when_the_next_step_begins() -> None:
    core, client, namespace = listening()
    visited(client, namespace, None)
    tell(client, Event.ENTER, "r", other="b", version=2)
    assert said(core, namespace, chain(3, "a"))[1:] == [Expectation.HARDLY] * 2


def test_where_turns_of_a_step_never_went_on_that_is_expected() -> None:
    core, client, namespace = listening()
    for _ in range(20):
        visited(client, namespace, None)
        tell(client, Event.RUN_FINISHED, "r")
        tell(client, Event.PROGRAM_FINISHED, "p")
    visited(client, namespace, None)
    assert said(core, namespace, chain(3, "a"))[1:] == [Expectation.HARDLY] * 2


def hits_with(word: int, rule: Rule) -> int:
    """Of 1,500 blocks that are used again 12 steps later, in memory for 8 of them, half of it taken by what never is:
    that of which `word` is said."""
    core = Core(arenas=1)
    core.store.choose_rule(Chosen(TierName.DRAM, None, rule))
    client = core.client()
    namespace, hits = client.open(), 0
    for number in range(1500):
        core.clock.advance(10 * MS)
        client.put(namespace, chain(1, f"never {number}"))
        tell(client, Event.EXPECT, "s", namespace, chain(1, f"never {number}"), expectation=word)
        client.put(namespace, chain(1, f"again {number}"))
        hits += client.fetch(namespace, chain(1, f"again {number - 12}"))
    core.audit()
    return hits


@pytest.mark.parametrize(
    "rule", [Rule.DENSITY, Rule.LRU, Rule.S3FIFO]
)  # others keep what was used twice, whatever is said
def test_hints_change_who_is_evicted(rule: Rule) -> None:
    with_hints, without = hits_with(3, rule), hits_with(0, rule)
    assert with_hints > 1.2 * without + 200, f"{with_hints} hits with hints, {without} without"


def test_a_step_of_a_wide_run_says_its_words_a_chain_at_a_time() -> None:
    core, client, namespace = listening()
    wide = {"steps": [{"name": "a", "next": list("bc")}, {"name": "b"}, {"name": "c"}]}
    tell(client, Event.WORKFLOW, "wide", text=json.dumps(wide), version=1)
    tell(client, Event.RUN, "r", other="wide")
    for step in "abc":
        tell(client, Event.BIND, "r", namespace, chain(3, step), other=step, version=1)
    guiding = core.store.guiding
    guiding.hear(client.session, Hint(Event.ENTER, "r", "a", version=1))
    counts = [guiding.tally.said_blocks]
    while guiding.next_ns() == 0:
        guiding.tick(core.clock.ns)
        counts.append(guiding.tally.said_blocks)
    steps = [after - before for before, after in pairwise(counts)]
    assert max(steps) == 3
    assert counts[-1] == 9


# -- pins and fetches ------------------------------------------------------------------------------------------------


def test_budgets_are_those_of_the_store() -> None:
    core = Core(arenas=1)  # 16 slots, of which 8 may be pinned
    client = core.client()
    namespace = client.open()
    tell(client, Event.PROGRAM, "early")
    for name in ("late", "later"):
        tell(client, Event.PROGRAM, name)
        client.put(namespace, chain(4, name))
        tell(client, Event.CONTEXT, name, namespace, keys=chain(4, name))
        tell(client, Event.TOOL_STARTED, name, other="grep", seconds=30.0)
    assert core.store.pinning.used_bytes(client.session.tenant) == 8 * namespace.slot_bytes
    client.put(namespace, chain(4, "early"))
    tell(client, Event.CONTEXT, "early", namespace, keys=chain(4, "early"))
    tell(client, Event.TOOL_STARTED, "early", other="grep", seconds=30.0)
    owners = {pin.owner: pin.rows.size for pin in core.store.pinning.pins.values()}
    assert owners == {"program:early": 4, "program:late": 4}
    core.audit()


def test_a_context_that_went_to_disk_during_a_tool_is_fetched_when_the_tool_ends() -> None:
    core, client, namespace = with_disk()
    client.put(namespace, chain(4, "a"))
    core.work_all()
    tell(client, Event.PROGRAM, "a")
    tell(client, Event.CONTEXT, "a", namespace, chain(4, "a"))
    tell(client, Event.TOOL_STARTED, "a", other="person", seconds=2 * 3600.0)
    flood(client, namespace)
    found = client.store.match(namespace, words(chain(4, "a")), 0, 4)
    assert (found.dram, found.disk) == (0, 4), "two hours are too long for a pin"
    tell(client, Event.TOOL_FINISHED, "a")
    core.work_all()
    assert client.store.match(namespace, words(chain(4, "a")), 0, 4).dram == 4
    flood(client, namespace)
    assert client.store.match(namespace, words(chain(4, "a")), 0, 4).dram == 4, "and it stays for the next turn"
    core.audit()


@pytest.mark.parametrize("engine_wants_it", [False, True])
def test_a_program_that_ends_takes_back_its_own_wishes_and_nobody_elses(*, engine_wants_it: bool) -> None:
    core, client, namespace = with_disk()
    client.put(namespace, chain(4, "a"))
    core.work_all()
    tell(client, Event.PROGRAM, "a", seconds=24 * 3600.0)
    tell(client, Event.CONTEXT, "a", namespace, chain(4, "a"))
    flood(client, namespace)
    if engine_wants_it:
        keys, tenant = words(chain(4, "a")), client.session.tenant
        core.store.prefetching.prefetch(tenant, namespace, keys, 0, 4, 3 * 3600 * SECOND, Tier.DRAM)
    tell(client, Event.TOOL_STARTED, "a", other="person", seconds=2 * 3600.0)
    core.clock.advance(2 * 3600 * SECOND)
    core.store.guiding.tick(core.clock.ns)
    assert core.store.guiding.tally.fetches == 1, "the tool is about to end"
    tell(client, Event.TOOL_FINISHED, "a")
    assert core.store.guiding.tally.fetches == 2
    tell(client, Event.PROGRAM_FINISHED, "a")
    assert core.store.prefetching.waiting(client.session.tenant) == engine_wants_it
    core.work_all()
    assert client.store.match(namespace, words(chain(4, "a")), 0, 4).dram == (4 if engine_wants_it else 0)


def test_a_context_stays_while_its_program_waits_for_a_short_tool() -> None:
    core, client, namespace = with_disk()
    for name in ("a", "other"):
        client.put(namespace, chain(4, name))
    core.work_all()
    tell(client, Event.PROGRAM, "a")
    tell(client, Event.CONTEXT, "a", namespace, chain(4, "a"))
    tell(client, Event.TOOL_STARTED, "a", other="grep", seconds=10.0)
    flood(client, namespace)
    assert client.store.match(namespace, words(chain(4, "a")), 0, 4).dram == 4
    assert client.store.match(namespace, words(chain(4, "other")), 0, 4).dram == 0
    tell(client, Event.PROGRAM_FINISHED, "a")
    flood(client, namespace)
    assert client.store.match(namespace, words(chain(4, "a")), 0, 4).dram == 0


def with_disk() -> tuple[Core, Client, Namespace]:
    """A store of 16 slots in DRAM, and disk for far more."""
    segment_bytes = 18 * PAGE_BYTES
    limits = DiskLimits(32 * segment_bytes, segment_bytes, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    core = Core(arenas=1, disk=limits)
    client = core.client()
    return core, client, client.open()


def flood(client: Client, namespace: Namespace) -> None:
    """Store so much that nothing unheld stays."""
    for number in range(40):
        client.put(namespace, chain(1, f"flood/{client.core.clock.ns}/{number}"))
        client.core.work_all()
    while blocks.evict(client.store.tables, namespace.tenant.index, namespace.pool.number):  # whatever is said of it
        pass


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_no_hint_makes_the_store_raise_or_leaves_anything_behind(seed: int) -> None:
    luck = random.Random(seed)
    core, client, namespace = listening()
    others = [client, core.client(), core.client("stranger")]
    spaces = [namespace, others[1].open(), others[2].open()]
    names = ["a", "a", "r", "r", "line", "line", "", "x" * 200, "\n"]
    times = [*[UNKNOWN] * 6, 0.0, -1.0, 1.0, 30.0, 1e4, 1e300, float("inf")]
    texts = [LINE, "", "{}", '{"steps": 1}', LINE[:-3], LINE.replace("c", "a")]
    taken = refused = 0
    for _ in range(3000):
        who = luck.randrange(3)
        keys = chain(luck.randrange(5), luck.choice("abcx")) if luck.random() < 0.9 else [*chain(2), *chain(2)]
        hint = Hint(
            luck.choice(list(Event)), luck.choice(names), luck.choice(names), luck.choice(texts),
            spaces[who].number, luck.randrange(50), luck.choice(times), luck.randrange(4), b"".join(keys),
        )  # fmt: skip
        if core.store.guiding.hear(others[who].session, hint) is None:
            taken += 1
        else:
            refused += 1
        if luck.random() < 0.1:
            core.pass_time(luck.choice([0, MS, SECOND, SECOND, 100 * SECOND, 4000 * SECOND]))
    assert taken > 200
    assert refused > 200
    core.audit()
    for other in others:
        core.store.exited(other.session)
    for _ in range(1000):
        core.pass_time(60 * SECOND)
    assert core.store.guiding.next_ns() is None
    assert core.store.pinning.pins == {}
    core.audit()
