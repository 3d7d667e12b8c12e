"""What was learned survives a warm restart, and nothing that was bent is believed."""

import numpy as np
import pytest

from kvproto.policy_frames import Event, Hint
from kvstore import blocks
from kvstore.blocks import REUSE
from kvstore.rules import Chosen, Rule, Tier
from tests.core import SECOND, Core, chain
from tests.unit.test_restart import successor


def learn(core: Core) -> None:
    """Have a store learn something of everything."""
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.DENSITY))
    client = core.client("a")
    namespace = client.open()
    for number in range(20):
        client.put(namespace, chain(2, number))
        core.pass_time(SECOND)
        client.fetch(namespace, chain(2, number))
    for cached in range(0, 4096, 512):
        assert core.store.costing.report_prefill(namespace, cached, 512, 0.05 + cached * 1e-5) is None
    for _ in range(10):
        for event, other in ((Event.PROGRAM, ""), (Event.TOOL_STARTED, "search"), (Event.TOOL_FINISHED, "")):
            core.store.guiding.hear(client.session, Hint(event, "agent", other))
            core.pass_time(3 * SECOND)


def gaps(core: Core) -> bytes:
    """What is known of a tenant's tools."""
    return core.store.guiding.export(core.store.tenants["a"])


def test_a_successor_knows_what_was_learned() -> None:
    core = Core(arenas=2)
    learn(core)
    before = core.store
    before.learned.save()
    later = successor(core)
    namespace, former = (next(iter(store.namespaces.values())) for store in (later.store, before))
    assert former.profile is not None
    assert namespace.profile is not None
    former.profile.settle()  # a successor goes by all reports from the start
    assert namespace.profile.seconds(2048, 512) == former.profile.seconds(2048, 512)
    assert gaps(later) == gaps(core) != b""
    pool = former.pool.number
    assert before.tables.reuse[pool]["again"].any()
    for field in ("again", "gone"):
        assert np.array_equal(later.store.tables.reuse[pool][field], before.tables.reuse[pool][field])
    assert later.store.tables.reuse[pool]["index"].any()
    later.audit()


def test_where_nothing_whole_is_left_a_successor_learns_anew() -> None:
    core = Core(arenas=2)
    learn(core)
    core.store.learned.save()
    for half in np.split(core.memory.tables["learned"], 2):
        half[30] ^= 1
    later = successor(core)
    assert later.store.kept.warm
    assert all(namespace.profile is None for namespace in later.store.namespaces.values())
    assert gaps(later) == b""
    assert any("lessons" in fault for fault in later.store.kept.faults)
    assert not successor(Core(arenas=2)).store.kept.faults, "who left nothing left nothing damaged"


@pytest.mark.parametrize("bend", ["nan", "negative", "huge", "short", "clock", "unknown", "text"])
def test_what_cannot_be_is_not_taken(bend: str) -> None:
    core = Core(arenas=2)
    learn(core)
    lessons, pool = core.store.lessons, next(iter(core.store.namespaces.values())).pool.number
    contents = {thing.name: thing.content_of() for thing in lessons.things()}
    name, good = f"reuse/{pool}", contents[f"reuse/{pool}"]
    assert lessons.take_over({name: good}) == 1, "as it was written it is"
    counts = np.frombuffer(good, np.float32, offset=16).copy()
    counts[5] = {"nan": np.nan, "negative": -1.0, "huge": 1e30}.get(bend, 0.0)
    bad = {
        "short": {name: good[:-4]},
        "clock": {name: np.float64(-3).tobytes() + good[8:]},
        "unknown": {"reuse/77": good, "profile/999999": good, "gaps/nobody": good, "other/1": good, "": good},
        "text": {"profile/1": b"no profile", "gaps/a": b"no gaps", "reuse/x": good, "reuse/-1": good},
    }.get(bend, {name: good[:16] + counts.tobytes()})
    before = core.store.tables.reuse[pool]["again"].copy()
    assert lessons.take_over(bad) == 0
    assert np.array_equal(core.store.tables.reuse[pool]["again"], before)
    assert REUSE["again"].shape == before.shape
    assert int(core.store.tables.pools[pool]["rule"]) == blocks.DENSITY


def test_tenants_and_pools_that_come_and_go_during_a_round_disturb_nothing() -> None:
    core = Core(arenas=4)
    learn(core)
    learned = core.client("a")
    learned.open(5000)
    things = core.store.lessons.things()
    names = [next(things).name]
    for number in range(3):
        core.client(f"late {number}").open(5000 + 4096 * number)
    core.store.costing.report_prefill(next(iter(core.store.namespaces.values())), 0, 512, 0.1)
    names += [next(things).name, next(things).name]
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LRU))
    names += [thing.name for thing in things]
    pool = next(iter(core.store.namespaces.values())).pool.number
    assert names == ["gaps/a", "profile/1", f"reuse/{pool}"], "the other pools go by another rule by now"
    assert len(list(core.store.lessons.things())) == 5
