"""What LEASEs missed, by reason: all of it is counted, and a sample says why."""

import pytest

from kvstore.blocks import U8
from kvstore.insight import misses as counting
from kvstore.insight.explain import why_gone
from kvstore.insight.misses import ASKED, REASONS, Misses, Reason, loaded
from kvstore.insight.reasons import Cause
from kvstore.rules import Chosen, Rule, Tier
from kvstore.sessions import Namespace
from kvstore.store import Store
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import Client, Core, chain

SLOTS = 16  # of an arena of `Core`
DISK = DiskLimits(1 << 20, 1 << 18, Admission.ALL)


def watched(core: Core) -> Misses:
    """A store that evicts in the order of use, and what counts its misses."""
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LRU))
    misses = Misses(core.store)
    core.store.watching.missed = misses.missed
    return misses


def fetch(client: Client, namespace: Namespace, keys: list[bytes]) -> int:
    """LEASE, and what is done once its answer is on its way."""
    found = client.fetch(namespace, keys)
    client.core.store.leasing.account()
    return found


def counted(misses: Misses) -> dict[Reason, int]:
    """Those reasons that there were."""
    return {reason: count for reason, count in misses.blocks.items() if count}


def test_what_was_never_there_is_told_from_what_was_deleted_and_evicted() -> None:
    core = Core(arenas=1)
    misses, client = watched(core), core.client()
    ns = client.open()
    assert fetch(client, ns, chain(3, "new")) == 0
    assert counted(misses) == {("never", "none"): 3}
    client.put(ns, chain(4, "gone"))
    core.finish_all()
    client.delete(ns, chain(4, "gone")[2:])
    core.settle()
    assert fetch(client, ns, chain(4, "gone")) == 2
    assert counted(misses) == {("never", "none"): 3, ("deleted", "none"): 2}
    client.put(ns, chain(SLOTS, "pushes all else out"))
    core.finish_all()
    assert fetch(client, ns, chain(4, "gone")[:1]) == 0
    assert counted(misses)["evicted", "dram"] == 1
    assert fetch(client, ns, chain(SLOTS, "pushes all else out")) == SLOTS
    assert sum(misses.blocks.values()) == 6, "a hit is no miss"


def test_what_lies_on_disk_or_is_being_written_is_said_to() -> None:
    core = Core(arenas=1, disk=DISK)
    misses, client = watched(core), core.client()
    ns = client.open()
    client.put(ns, chain(SLOTS, "a"))
    core.work_all()
    client.put(ns, chain(SLOTS, "b"))
    core.work_all()
    assert fetch(client, ns, chain(SLOTS, "a")) == 0
    client.begin(ns, chain(1, "coming"))
    assert fetch(client, ns, chain(2, "coming")) == 0
    assert counted(misses) == {("on_disk", "disk"): SLOTS, ("writing", "dram"): 2}


def test_many_misses_are_all_counted_and_few_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []

    def note(store: Store, namespace: Namespace, key: U8) -> tuple[Cause, str]:
        looked.append(key.tobytes())
        return why_gone(store, namespace, key)

    monkeypatch.setattr(counting, "why_gone", note)
    core = Core(arenas=1)
    misses, client = watched(core), core.client()
    ns = client.open()
    for second in range(3):
        for number in range(40 * ASKED):
            fetch(client, ns, chain(2, f"{second}/{number}"))
        misses.second_passed()
        assert misses.blocks["never", "none"] == (second + 1) * 80 * ASKED, "nothing is left unsaid"
        assert 1 <= len(looked) <= (8 * ASKED if second == 0 else 2 * ASKED), "in the first second it is learned"
        looked.clear()
    misses.second_passed()
    fetch(client, ns, chain(2, "later"))
    assert len(looked) == 1, "where few miss, each is looked into"


def test_before_it_may_ask_it_counts_and_from_then_on_it_asks() -> None:
    core, may = Core(arenas=1), False
    misses, client = Misses(core.store, lambda: may), core.client()
    core.store.watching.missed = misses.missed
    ns = client.open()
    fetch(client, ns, chain(3, "early"))
    misses.second_passed()
    fetch(client, ns, chain(2, "early"))
    assert counted(misses) == {("not_asked", "none"): 5}
    may = True
    fetch(client, ns, chain(1, "late"))
    assert counted(misses) == {("not_asked", "none"): 5, ("never", "none"): 1}
    assert loaded(), "it has just asked"


def test_every_reason_is_there_from_the_start() -> None:
    assert Misses(Core().store).blocks == dict.fromkeys(REASONS, 0)
    assert len(set(REASONS)) == len(REASONS)
