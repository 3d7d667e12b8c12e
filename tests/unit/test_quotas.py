"""Quotas: what is guaranteed cannot be taken, what is allowed is not exceeded, and both can be changed at run time."""

from dataclasses import asdict, replace

import pytest

from kvproto import control_pb2 as pb
from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Tier as PinTier
from kvstore.quotas import (
    HBM,
    USUAL,
    Capacity,
    Choice,
    Quota,
    QuotaError,
    check_quotas,
    choice_as_record,
    choice_of_record,
)
from kvstore.rules import Tier
from kvstore.sessions import Parked
from kvstore.store import Store
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstored.admin_quotas import quota_warnings, set_quota, wish_of
from tests.core import ARENA_BYTES, MS, SECOND, Client, Core, Held, chain, words
from tests.fakes import FakeRandomness

SLOTS = ARENA_BYTES // PAGE_BYTES
SEGMENT_BYTES = 18 * PAGE_BYTES  # eight slots of two pages, a header, and a page over
DISK_SLOTS = 8


def arenas(count: float) -> int:
    """Bytes of so many arenas."""
    return int(count * ARENA_BYTES)


def segments(count: int) -> int:
    """Bytes of so many segments."""
    return count * SEGMENT_BYTES


def store(client: Client, count: int, name: object, block_bytes: int = 96) -> list[bytes]:
    """Single blocks without parents, a millisecond apart; BUSY is asked again. Those that were taken."""
    taken = []
    for key in chain(count, name):
        for _ in range(10):
            client.core.clock.advance(MS)
            (grant,) = client.put(client.open(block_bytes), [key])
            client.core.settle()
            client.core.store.tick()  # pins let go of what had to give way
            client.core.settle()
            if grant is not Grant.BUSY:
                break
        taken += [key] if grant in {Grant.GRANTED, Grant.KNOWN} else []
    client.core.settle()
    return taken


def there(client: Client, keys: list[bytes]) -> int:
    """How many of some blocks are still there, byte for byte."""
    return sum(client.fetch(client.open(), [key]) for key in keys)


def held(core: Core) -> dict[str, int]:
    """Arenas by tenant."""
    return {name: tenant.arenas for name, tenant in core.store.tenants.items()}


# -- guarantees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guaranteed", "kept"), [(3, 3), (None, 2)])
def test_a_flood_by_another_tenant_takes_nothing_that_is_guaranteed(guaranteed: int | None, kept: int) -> None:
    quota = USUAL if guaranteed is None else Quota(dram_guaranteed_bytes=arenas(guaranteed))
    core = Core(arenas=4, quotas={"quiet": quota})
    quiet, flood = core.client("quiet"), core.client("flood")
    keys = store(quiet, 3 * SLOTS, "quiet")
    store(flood, 20 * SLOTS, "flood")
    assert held(core) == {"quiet": kept, "flood": 4 - kept}
    assert there(quiet, keys) == kept * SLOTS
    core.audit()


def test_what_is_guaranteed_is_lent_while_nobody_wants_it_and_given_back_then() -> None:
    core = Core(arenas=4, quotas={"late": Quota(dram_guaranteed_bytes=arenas(3))})
    early = core.client("early")
    store(early, 4 * SLOTS, "early")
    assert held(core) == {"early": 4}, "it lay idle"
    late = core.client("late")
    keys = store(late, 3 * SLOTS, "late")
    assert there(late, keys) == 3 * SLOTS
    store(early, 8 * SLOTS, "more")
    assert held(core) == {"early": 1, "late": 3}
    assert there(late, keys) == 3 * SLOTS
    core.audit()


def test_a_guarantee_holds_against_leases_that_are_never_let_go() -> None:
    core = Core(arenas=4, quotas={"late": Quota(dram_guaranteed_bytes=arenas(2))})
    early = core.client("early")
    leased = [early.lease(early.open(), [key], 2 * SECOND) for key in store(early, 4 * SLOTS, "early")]
    late = core.client("late")
    assert late.put(late.open(), chain(1, "late")) == [Grant.BUSY]
    for _ in range(3):
        core.pass_time(SECOND)
        for lease in leased:
            core.store.renew(early.session, lease.number, 2 * SECOND)
        core.settle()
    assert len(store(late, SLOTS, "late")) == SLOTS
    core.audit()


def test_a_guarantee_holds_against_pins() -> None:
    core = Core(arenas=4, quotas={"early": Quota(pin_share=1.0), "late": Quota(dram_guaranteed_bytes=arenas(2))})
    early = core.client("early")
    keys = store(early, 4 * SLOTS, "early")
    tenant, namespace = early.session.tenant, early.open()
    for key in keys:
        pinned = core.store.pinning.pin(tenant, namespace, words([key]), 0, 1, 3600 * SECOND, PinTier.DRAM)
        assert pinned.blocks == 1
    assert core.store.pinning.used_bytes(tenant) == arenas(4)
    late = core.client("late")
    assert len(store(late, 2 * SLOTS, "late")) == 2 * SLOTS
    assert held(core) == {"early": 2, "late": 2}
    assert core.store.pinning.used_bytes(tenant) == arenas(2)
    assert there(early, keys) == 2 * SLOTS, "what nobody else is promised stays pinned"
    core.audit()


def test_guarantees_are_in_whole_arenas() -> None:
    core = Core(arenas=4, quotas={"quiet": Quota(dram_guaranteed_bytes=arenas(2.9))})
    quiet, flood = core.client("quiet"), core.client("flood")
    store(quiet, 3 * SLOTS, "quiet")
    store(flood, 8 * SLOTS, "flood")
    assert held(core) == {"quiet": 2, "flood": 2}
    assert core.store.quotas.dram.guaranteed_bytes("quiet") == arenas(2)


def test_who_is_furthest_above_its_guarantee_gives_way_first() -> None:
    quotas = {"a": Quota(dram_guaranteed_bytes=arenas(1)), "b": Quota(dram_guaranteed_bytes=arenas(3))}
    core = Core(arenas=6, quotas=quotas)
    a, b, c = (core.client(name) for name in "abc")
    store(b, 3 * SLOTS, "b")
    store(a, 3 * SLOTS, "a")  # as many as b, and older than anything it stored would make no difference
    store(c, 4 * SLOTS, "c")
    assert held(core) == {"a": 1, "b": 3, "c": 2}
    core.audit()


@pytest.mark.parametrize("count", [7, 8])
def test_what_is_left_beyond_all_guarantees_is_shared_and_does_not_go_to_and_fro(count: int) -> None:
    one = Quota(dram_guaranteed_bytes=arenas(1))
    core = Core(arenas=count, quotas={"a": one, "b": one})
    a, b = core.client("a"), core.client("b")
    store(a, 8 * SLOTS, "a")
    store(b, 8 * SLOTS, "b")
    assert held(core) == {"a": 4, "b": count - 4}
    recycled = core.store.arenas.recycled
    store(a, 8 * SLOTS, "a again")
    store(b, 8 * SLOTS, "b again")
    assert held(core) == {"a": 4, "b": count - 4}
    assert core.store.arenas.recycled == recycled
    core.audit()


def test_equal_shares_are_of_what_nobody_is_promised_by_name() -> None:
    core = Core(
        arenas=8, quotas={"big": Quota(dram_guaranteed_bytes=arenas(5)), "none": Quota(dram_guaranteed_bytes=0)}
    )
    for name in ("a", "b", "none"):
        core.client(name)
    dram = core.store.quotas.dram
    shares = {name: dram.guaranteed_bytes(name) // ARENA_BYTES for name in ("big", "none", "a", "b", "newcomer")}
    assert shares == {"big": 5, "none": 0, "a": 1, "b": 1, "newcomer": 1}


# -- maxima ------------------------------------------------------------------------------------------------------


def test_a_tenant_at_its_maximum_evicts_its_own_though_there_is_room() -> None:
    core = Core(arenas=8, quotas={"small": Quota(dram_max_bytes=arenas(1))})
    small, other = core.client("small"), core.client("other")
    kept = store(other, SLOTS, "other")
    keys = store(small, 3 * SLOTS, "small")
    assert len(keys) == 3 * SLOTS
    assert held(core) == {"small": 1, "other": 1}
    assert there(small, keys) == SLOTS
    assert there(other, kept) == SLOTS
    store(other, 7 * SLOTS, "control")
    store(small, 3 * SLOTS, "more")
    assert held(core) == {"small": 1, "other": 7}, "who is far above its share gives nothing to it either"
    core.audit()


def test_a_tenant_at_its_maximum_that_has_nothing_to_give_is_told_quota() -> None:
    core = Core(arenas=4, quotas={"small": Quota(dram_max_bytes=arenas(1))})
    small = core.client("small")
    lease = small.lease(small.open(), chain(SLOTS) if small.put(small.open(), chain(SLOTS)) else [])
    assert small.put(small.open(), chain(2, "new")) == [Grant.QUOTA, Grant.NO_PARENT]
    assert (core.store.tally.refused_quota, small.session.tenant.refused) == (1, 1)
    small.release(lease)
    assert small.put(small.open(), chain(2, "new")) == [Grant.GRANTED] * 2
    core.audit()


def test_a_maximum_holds_for_empty_arenas_of_others_and_own_sizes_share_what_is_allowed() -> None:
    core = Core(arenas=4, quotas={"small": Quota(dram_max_bytes=arenas(2))})
    small, other = core.client("small", 256), core.client("other")
    emptied = store(other, 2 * SLOTS, "other")
    store(small, 2 * SLOTS, "small")
    other.delete(other.open(), emptied)
    core.settle()
    store(small, 4 * SLOTS, "more")
    assert held(core) == {"small": 2, "other": 2}, "what lies empty is not for it"
    large = 4 * PAGE_BYTES
    assert len(store(small, 4, "large", large)) == 4
    assert held(core) == {"small": 2, "other": 2}
    core.audit()


def test_a_tenant_above_a_lower_maximum_gives_way_before_all_others() -> None:
    core = Core(arenas=6, quotas={"a": Quota(dram_guaranteed_bytes=arenas(1))})
    a, b = core.client("a"), core.client("b")
    store(a, 4 * SLOTS, "a")
    store(b, 2 * SLOTS, "b")  # less above its guarantee than a is
    core.store.choose_quota("b", {"dram_guaranteed_bytes": 0, "dram_max_bytes": arenas(1)})
    store(core.client("c"), SLOTS, "c")
    assert held(core) == {"a": 4, "b": 1, "c": 1}
    core.audit()


# -- changes at run time -----------------------------------------------------------------------------------------


def test_a_lower_maximum_counts_from_the_next_allocation_on() -> None:
    core = Core(arenas=4)
    client = core.client("t")
    keys = store(client, 4 * SLOTS, "old")
    core.store.choose_quota("t", {"dram_max_bytes": arenas(2)})
    core.settle()
    assert held(core) == {"t": 4}
    assert there(client, keys) == 4 * SLOTS
    for step in range(8):
        store(client, 1, step)
    assert held(core) == {"t": 2}
    assert len(core.store.arenas.free) == 2
    core.audit()


def test_a_higher_maximum_and_a_guarantee_count_from_the_next_allocation_on() -> None:
    core = Core(arenas=4, quotas={"t": Quota(dram_max_bytes=arenas(1))})
    client, other = core.client("t"), core.client("other")
    store(other, 4 * SLOTS, "other")
    store(client, 2 * SLOTS, "one")
    assert held(core) == {"other": 3, "t": 1}
    core.store.choose_quota("t", {"dram_guaranteed_bytes": arenas(3), "dram_max_bytes": None})
    assert held(core) == {"other": 3, "t": 1}
    store(client, 3 * SLOTS, "three")
    assert held(core) == {"other": 1, "t": 3}
    core.store.choose_quota("t", {})
    assert core.store.quotas.of("t") == Quota(dram_max_bytes=arenas(1)), "as configured"
    core.audit()


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    core = Core(arenas=4, quotas={"a": Quota(dram_guaranteed_bytes=arenas(3))})
    core.client("b")
    with pytest.raises(QuotaError, match="more than the tier has"):
        core.store.choose_quota("b", {"dram_guaranteed_bytes": arenas(2)})
    assert core.store.quotas.of("b") == core.store.tenants["b"].quota == USUAL
    assert not core.store.quotas.chosen()
    core.store.choose_quota("b", {"dram_guaranteed_bytes": arenas(1)})


# -- restarts ----------------------------------------------------------------------------------------------------

CHOSEN = Quota(arenas(1), arenas(3.5), 0, None, 0.25, 77)


def test_a_choice_holds_in_all_successors_and_wins_over_the_configuration() -> None:
    core = Core(arenas=4, quotas={"t": Quota(in_flight=5), "other": Quota(in_flight=6)})
    keys = store(core.client("t"), 4, "t")
    core.store.choose_quota("t", {"pin_share": 0.9})
    core.store.choose_quota("t", asdict(CHOSEN))
    core.store.choose_quota("other", asdict(CHOSEN))
    core.store.choose_quota("other", {})
    for _ in range(3):
        core = Core(arenas=4, memory=core.memory.successor(), clock=core.clock, quotas=core.store.limits.quotas)
        assert core.store.kept.warm, core.store.kept.reason
        assert core.store.quotas.of("t") == core.client("t").session.tenant.quota == CHOSEN
        assert core.store.quotas.chosen() == [("t", asdict(CHOSEN))]
        assert core.store.quotas.dram.most(core.store.tenants["t"]) == 3
        assert core.store.quotas.of("other") == Quota(in_flight=6)
        assert core.store.kept.blocks == len(keys) == 4
        core.audit()


def test_a_cold_start_knows_of_no_choice() -> None:
    core = Core(arenas=4)
    store(core.client("t"), 4, "t")
    core.store.choose_quota("t", asdict(CHOSEN))
    later = Core(arenas=5, memory=core.memory.successor())
    assert not later.store.kept.warm
    assert later.store.quotas.of("t") == USUAL


def test_choices_that_the_configuration_leaves_no_room_for_are_forgotten() -> None:
    core = Core(arenas=4)
    store(core.client("t"), 4, "t")
    core.store.choose_quota("t", {"dram_guaranteed_bytes": arenas(3)})
    for guaranteed, forgotten in ((1, ()), (2, (("t", "dram_guaranteed_bytes"),))):
        limits = replace(core.store.limits, quotas={"boss": Quota(dram_guaranteed_bytes=arenas(guaranteed))})
        memory = core.memory.successor()
        later = Store(limits, core.clock, FakeRandomness(2), memory, core.outbox, None, memory)
        assert later.kept.warm, later.kept.reason
        assert later.quotas.forgotten == forgotten
        assert (later.quotas.of("t") == USUAL) == bool(forgotten)


def later_with(core: Core, quotas: dict[str, Quota]) -> Store:
    """A successor with another configuration, which starts warm."""
    limits, memory = replace(core.store.limits, quotas=quotas), core.memory.successor()
    later = Store(limits, core.clock, FakeRandomness(2), memory, core.outbox, None, memory)
    assert later.kept.warm, later.kept.reason
    return later


def test_of_choices_that_do_not_fit_any_more_only_guarantees_go_the_last_first() -> None:
    core = Core(arenas=8)
    store(core.client("t"), 4, "t")
    core.store.choose_quota("first", {"dram_guaranteed_bytes": arenas(2), "dram_max_bytes": arenas(3)})
    core.store.choose_quota("last", {"dram_guaranteed_bytes": arenas(2), "dram_max_bytes": arenas(4), "in_flight": 5})
    core.store.choose_quota("none", {"dram_max_bytes": arenas(1), "pin_share": 0.1})
    core.store.choose_quota("boss", {"dram_guaranteed_bytes": 0})
    quotas = later_with(core, {"boss": Quota(arenas(4))}).quotas
    assert quotas.forgotten == (), "less than is configured was chosen for one, which takes nothing from others"
    for other, gone in ((4, ()), (6, ("last",)), (7, ("first",))):  # each goes on with what the one before left
        quotas = later_with(core, {"other": Quota(arenas(other))}).quotas
        assert quotas.forgotten == tuple((name, "dram_guaranteed_bytes") for name in gone)
        assert quotas.of("first") == Quota(None if "first" in gone else arenas(2), arenas(3))
        assert quotas.of("last") == Quota(arenas(2) if other == 4 else None, arenas(4), in_flight=5)
        assert quotas.of("none") == Quota(dram_max_bytes=arenas(1), pin_share=0.1)


def test_what_does_not_fit_any_more_is_warned_of_until_somebody_agrees() -> None:
    core = Core(arenas=8)
    store(core.client("t"), 4, "t")
    for name in ("first", "last"):
        core.store.choose_quota(name, {"dram_guaranteed_bytes": arenas(2)})
    later = later_with(core, {"other": Quota(arenas(7))})
    assert [said.split(" was ")[0] for said in quota_warnings(later)] == [
        "dram_guaranteed of last", "dram_guaranteed of first",
    ]  # fmt: skip
    assert "`kvctl quota last reset dram_guaranteed` agrees to it" in next(quota_warnings(later))
    agreed = wish_of(pb.SetQuotaRequest(tenant="last", configured=["dram_guaranteed_bytes"]))
    set_quota(later, (), agreed, dry_run=True)
    assert len(list(quota_warnings(later))) == 2
    set_quota(later, (), agreed, dry_run=False)
    assert [said.split(" was ")[0] for said in quota_warnings(later)] == ["dram_guaranteed of first"]


@pytest.mark.parametrize(
    ("configured", "chosen", "gone"),
    [
        (
            Quota(dram_max_bytes=arenas(1)),
            {"dram_guaranteed_bytes": arenas(2), "in_flight": 5},
            "dram_guaranteed_bytes",
        ),
        (Quota(arenas(2)), {"dram_max_bytes": arenas(1), "in_flight": 5}, "dram_max_bytes"),
        (Quota(pin_share=0.2), {"pin_1h_share": 0.4, "in_flight": 5}, "pin_1h_share"),
        (Quota(pin_1h_share=0.4), {"pin_share": 0.2, "in_flight": 5}, "pin_share"),
        (Quota(pin_tool_share=0.4), {"pin_1h_share": 0.2, "in_flight": 5}, "pin_1h_share"),
    ],
)
def test_what_does_not_fit_the_rest_of_a_tenants_own_quota_goes_alone(
    configured: Quota, chosen: Choice, gone: str
) -> None:
    core = Core(arenas=4)
    store(core.client("t"), 4, "t")
    core.store.choose_quota("t", chosen)
    later = later_with(core, {"t": configured})
    assert later.quotas.forgotten == (("t", gone),)
    assert later.quotas.of("t") == replace(configured, in_flight=5)


def test_a_choice_is_of_what_it_names_and_the_rest_follows_a_later_configuration() -> None:
    core = Core(arenas=4, quotas={"t": Quota(in_flight=5, pin_share=0.2)})
    store(core.client("t"), 4, "t")
    core.store.choose_quota("t", {"pin_share": 0.9, "dram_max_bytes": None})
    assert core.store.quotas.of("t") == Quota(in_flight=5, pin_share=0.9)
    later = {"t": Quota(in_flight=7, pin_share=0.3, dram_max_bytes=arenas(2), unused_ttl_s=600.0)}
    core = Core(arenas=4, memory=core.memory.successor(), clock=core.clock, quotas=later)
    assert core.store.kept.warm, core.store.kept.reason
    assert core.store.quotas.of("t") == Quota(in_flight=7, pin_share=0.9, unused_ttl_s=600.0), "no maximum was chosen"
    core.store.choose_quota("t", {"pin_share": 0.9})
    assert core.store.quotas.of("t").dram_max_bytes == arenas(2)
    core.store.choose_quota("t", {})
    assert core.store.quotas.of("t") == later["t"]


def test_a_record_says_a_choice_whole() -> None:
    classes = Quota(None, 3, None, 4, 0.6, 7, 60.5, 0.1, 61.5, 0.2, 62.5, 0.3, 600.0)
    for choice in (asdict(CHOSEN), asdict(USUAL), {}, {"pin_share": 1 / 3}, {"dram_max_bytes": None}, asdict(classes)):
        kind, *rest = choice_as_record("t", choice)
        assert kind == "quota"
        assert choice_of_record(rest) == ("t", choice)
    assert choice_of_record(choice_as_record("t", asdict(CHOSEN))[1:]) != ("t", asdict(USUAL))


def test_a_choice_that_an_earlier_version_wrote_is_one_of_all_that_it_knew_of() -> None:
    values = ["" if value is None else str(value) for value in asdict(CHOSEN).values()]
    whole = dict(list(asdict(CHOSEN).items())[:13])
    assert choice_of_record(["t", *values[:13]]) == ("t", whole), "as it was written before GPUs had quotas"
    assert "hbm_max_bytes" not in whole
    name, older = choice_of_record(["t", *values[:6]])
    assert (name, older) == ("t", dict(list(asdict(CHOSEN).items())[:6])), "as it was written before there were classes"
    assert len(older) == 6


@pytest.mark.parametrize(
    "rest",
    [
        [], ["t", "1"], ["t", "x", "", "", "", "0.5", ""], ["t", "", "", "", "", "2", ""],
        ["t", "-1", "", "", "", "0", ""], ["t", "", "", "", "", "0", "0"], ["t", *[""] * 14],
        ["t", "uids=3"], ["t", "in_flight=x"], ["t", "in_flight=0"], ["t", "pin_share=0.5", "3"],
        ["t", *[""] * 4, "0.5", "", "0", *[""] * 6], ["t", *[""] * 4, "0.5", "", "", "2", *[""] * 5],
    ],
)  # fmt: skip
def test_what_no_daemon_has_written_is_no_choice(rest: list[int | str]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  whatever it says, the record is left out
        choice_of_record(rest)


# -- what can be -------------------------------------------------------------------------------------------------

DRAM, DISK = Capacity(Tier.DRAM, 100, 8), Capacity(Tier.DISK, 1000, 4)


@pytest.mark.parametrize(
    ("quotas", "tenant", "field", "reason"),
    [
        ({"a": Quota(dram_guaranteed_bytes=900)}, "a", "dram_guaranteed_bytes", "more than the tier has"),
        ({"a": Quota(pin_5m_share=0.3, pin_1h_share=0.3)}, "a", "pin_1h_share", "more than pin_share, 0.5, leaves"),
        ({"a": Quota(pin_share=0.1, pin_tool_share=0.2)}, "a", "pin_tool_share", "more than pin_share, 0.1, leaves"),
        ({"a": Quota(pin_5m_share=float("nan"))}, "a", "pin_5m_share", "from 0 to 1"),
        ({"a": Quota(pin_1h_ttl_s=0.5)}, "a", "pin_1h_ttl_s", "from 1 to 86400 seconds"),
        ({"a": Quota(pin_tool_ttl_s=float("inf"))}, "a", "pin_tool_ttl_s", "from 1 to 86400 seconds"),
        ({"a": Quota(unused_ttl_s=59.0)}, "a", "unused_ttl_s", "from 60 to"),
        (
            {"a": Quota(dram_guaranteed_bytes=500), "b": Quota(dram_guaranteed_bytes=400)},
            "b", "dram_guaranteed_bytes", "3 of 8 arenas",
        ),
        ({"a": Quota(disk_guaranteed_bytes=5000)}, "a", "disk_guaranteed_bytes", "4 of 4 segments"),
        ({"a": Quota(dram_guaranteed_bytes=300, dram_max_bytes=200)}, "a", "dram_max_bytes", "less than the 300"),
        ({"a": Quota(dram_max_bytes=99)}, "a", "dram_max_bytes", "does not hold one arena"),
        ({"a": Quota(disk_max_bytes=999)}, "a", "disk_max_bytes", "does not hold one segment"),
        ({"a": Quota(dram_max_bytes=-1)}, "a", "dram_max_bytes", "must be from 0"),
        ({"a": Quota(pin_share=1.01)}, "a", "pin_share", "from 0 to 1"),
        ({"a": Quota(pin_share=float("nan"))}, "a", "pin_share", "from 0 to 1"),
        ({"a": Quota(in_flight=0)}, "a", "in_flight", "must be from 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_found_with_its_reason(
    quotas: dict[str, Quota], tenant: str, field: str, reason: str
) -> None:
    with pytest.raises(QuotaError, match=reason) as caught:
        check_quotas(quotas, (DRAM, DISK))
    assert (caught.value.tenant, caught.value.field) == (tenant, field)


def test_memory_of_gpus_is_promised_in_whole_arenas_that_each_of_them_has() -> None:
    three, none = Capacity(HBM, 100, 3), Capacity(HBM, 100, 0)
    check_quotas({"a": Quota(hbm_guaranteed_bytes=250, hbm_max_bytes=300)}, (DRAM, DISK, three))
    check_quotas({"a": Quota(hbm_max_bytes=1)}, (DRAM, DISK, none))
    for quota, capacity, field, reason in (
        (
            Quota(hbm_guaranteed_bytes=400),
            three,
            "hbm_guaranteed_bytes",
            "more than the tier has left .* 3 of 3 arenas",
        ),
        (Quota(hbm_max_bytes=99), three, "hbm_max_bytes", "does not hold one arena"),
        (Quota(hbm_guaranteed_bytes=1), none, "hbm_guaranteed_bytes", "there is no hbm tier"),
        (Quota(hbm_max_bytes=-1), three, "hbm_max_bytes", "must be from 0"),
    ):
        with pytest.raises(QuotaError, match=reason) as caught:
            check_quotas({"a": quota}, (DRAM, DISK, capacity))
        assert caught.value.field == field


def test_what_can_be_is_not_refused() -> None:
    check_quotas(
        {
            "a": Quota(500, 500, 4000, 1 << 40, 0.0, 1),
            "b": Quota(399, 1 << 40, 999, None, 1.0),
            "c": Quota(0, 0, 0, 0),
            "d": USUAL,
        },
        (DRAM, DISK),
    )
    with pytest.raises(QuotaError, match="there is no disk tier"):
        check_quotas({"a": Quota(disk_guaranteed_bytes=1)}, (DRAM, Capacity(Tier.DISK, 0, 0)))
    check_quotas({"a": Quota(disk_max_bytes=1)}, (DRAM, Capacity(Tier.DISK, 0, 0)))


# -- requests in flight ------------------------------------------------------------------------------------------


def test_a_tenant_has_no_more_tickets_than_it_may_in_all_its_sessions_together() -> None:
    core = Core(arenas=4, quotas={"t": Quota(in_flight=6)})
    one, two, other = core.client("t"), core.client("t"), core.client("other")
    first = one.reserve(one.open(), chain(4, "one"))
    assert [answer.grant for answer in first] == [Grant.GRANTED] * 4
    second = two.reserve(two.open(), chain(4, "two"))
    assert [answer.grant for answer in second] == [Grant.GRANTED] * 2 + [Grant.BUSY] * 2
    assert (one.session.tenant.in_flight, one.session.tenant.refused) == (6, 2)
    assert other.put(other.open(), chain(10, "other")) == [Grant.GRANTED] * 10
    core.store.abort(one.session, [answer.ticket for answer in first[:2]])
    core.audit()
    one.commit([answer.ticket for answer in first[2:]])
    core.finish_all()
    assert one.session.tenant.in_flight == 2
    assert two.put(two.open(), chain(5, "five")) == [Grant.GRANTED] * 4 + [Grant.BUSY]
    core.store.exited(two.session)
    core.settle()
    assert one.session.tenant.in_flight == 0
    core.audit()


def test_a_lease_of_a_tenant_with_too_much_in_flight_is_answered_with_what_is_there() -> None:
    core = Core(arenas=4, quotas={"t": Quota(in_flight=3)})
    client = core.client("t")
    keys = chain(5)
    client.put(client.open(), keys[:2])
    tickets = client.begin(client.open(), keys[2:4], keys[1])
    assert isinstance(client.ask(client.open(), keys, wait_ns=SECOND), Parked), "the third"
    assert client.session.tenant.in_flight == 3
    at_once = client.ask(client.open(), keys, wait_ns=SECOND)
    assert isinstance(at_once, Held)
    assert at_once.blocks == 2
    assert client.session.tenant.refused == 1
    core.audit()
    client.commit(tickets)
    core.finish_all()
    assert client.session.tenant.in_flight == 0, "what waited is answered"
    client.begin(client.open(), keys[4:], keys[3])
    assert isinstance(client.ask(client.open(), keys, wait_ns=SECOND), Parked)
    assert client.session.tenant.in_flight == 2
    core.audit()
    core.store.detach(client.session)
    core.settle()
    assert client.session.tenant.in_flight == 0
    core.audit()


# -- pins --------------------------------------------------------------------------------------------------------


def test_the_pin_budget_is_a_share_of_what_a_tenant_can_count_on() -> None:
    core = Core(arenas=8, quotas={"a": Quota(dram_guaranteed_bytes=arenas(2)), "b": Quota(pin_share=0.25)})
    a, b = core.client("a"), core.client("b")
    budget = core.store.quotas.pin_budget_bytes
    assert budget(a.session.tenant) == arenas(1)
    assert budget(b.session.tenant) == arenas(6) // 4
    store(a, 4 * SLOTS, "a")
    assert budget(a.session.tenant) == arenas(2), "it has more than it is promised"
    core.store.choose_quota("a", {"dram_guaranteed_bytes": arenas(2), "dram_max_bytes": arenas(3), "pin_share": 1.0})
    assert budget(a.session.tenant) == arenas(3), "and may not keep all of that"


# -- disk --------------------------------------------------------------------------------------------------------


def on_disk(quotas: dict[str, Quota]) -> Core:
    """A small memory above eight segments of eight blocks; all that is stored is written."""
    disk = DiskLimits(segments(8), SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    return Core(arenas=3, disk=disk, quotas=quotas)


def write(client: Client, count: int, name: object) -> list[bytes]:
    """Store single blocks, and let the disk follow."""
    keys = chain(count, name)
    for key in keys:
        client.core.clock.advance(MS)
        for _ in range(10):
            if client.put(client.open(), [key]) != [Grant.BUSY]:
                break
            client.core.settle()
        client.core.work_all()
    return keys


def lie(core: Core) -> dict[str, int]:
    """Segments by tenant."""
    return {name: tenant.segments for name, tenant in core.store.tenants.items()}


@pytest.mark.parametrize(("guaranteed", "kept"), [(6, 6), (None, 4)])
def test_a_flood_takes_no_segment_that_is_guaranteed(guaranteed: int | None, kept: int) -> None:
    quota = USUAL if guaranteed is None else Quota(disk_guaranteed_bytes=segments(guaranteed))
    core = on_disk({"quiet": quota})
    quiet, flood = core.client("quiet"), core.client("flood")
    write(quiet, 6 * DISK_SLOTS, "quiet")
    assert lie(core) == {"quiet": 6, "flood": 0}
    write(flood, 12 * DISK_SLOTS, "flood")
    assert lie(core) == {"quiet": kept, "flood": 8 - kept}
    core.audit()


def test_on_disk_too_who_is_furthest_above_its_guarantee_gives_way_first() -> None:
    core = on_disk({"a": Quota(disk_guaranteed_bytes=segments(2)), "b": Quota(disk_guaranteed_bytes=segments(1))})
    a, b = core.client("a"), core.client("b")
    write(a, 2 * DISK_SLOTS, "a")  # older than all that b and c write
    write(b, 6 * DISK_SLOTS, "b")
    assert lie(core) == {"a": 2, "b": 6}
    write(core.client("c"), 6 * DISK_SLOTS, "c")
    assert lie(core) == {"a": 2, "b": 1, "c": 5}
    core.audit()


def test_a_tenant_has_no_more_segments_than_it_may_and_gives_back_what_is_more() -> None:
    core = on_disk({"t": Quota(disk_max_bytes=segments(3))})
    client = core.client("t")
    write(client, 6 * DISK_SLOTS, "first")
    assert lie(core) == {"t": 3}
    core.store.choose_quota("t", {"disk_max_bytes": segments(5)})
    write(client, 6 * DISK_SLOTS, "second")
    assert lie(core) == {"t": 5}
    core.store.choose_quota("t", {"disk_max_bytes": segments(2)})
    write(client, 6 * DISK_SLOTS, "third")
    assert lie(core) == {"t": 2}
    core.store.choose_quota("t", {"disk_max_bytes": 0})
    write(client, 6 * DISK_SLOTS, "fourth")
    assert lie(core) == {"t": 0}
    core.store.choose_quota("t", {"disk_max_bytes": segments(1)})
    write(core.client("other"), 8 * DISK_SLOTS, "other")
    write(client, 3 * DISK_SLOTS, "fifth")
    assert lie(core) == {"t": 1, "other": 7}
    write(client, 3 * DISK_SLOTS, "sixth")
    assert lie(core) == {"t": 1, "other": 7}, "who is far above its share gives nothing more to it"
    core.audit()


def test_a_segment_that_was_emptied_for_a_tenant_is_not_snatched_by_the_one_who_gave_it() -> None:
    core = on_disk({"late": Quota(disk_guaranteed_bytes=segments(4))})
    flood, late = core.client("flood"), core.client("late")
    write(flood, 8 * DISK_SLOTS, "flood")
    assert lie(core) == {"flood": 8, "late": 0}
    for step in range(4 * DISK_SLOTS):
        write(late, 1, f"late {step}")
        write(flood, 1, f"more {step}")
    assert lie(core) == {"flood": 4, "late": 4}
    core.audit()
