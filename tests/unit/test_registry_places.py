"""Places for tenants: configured ones have theirs, and who only came and went gives its place up."""

import pytest

from kvproto.errors import Grant, LimitError
from kvproto.limits import TENANTS
from kvproto.policy_frames import Event, Hint
from kvstore.quotas import Quota
from tests.core import ARENA_BYTES, Client, Core, chain

CHAT = {"chat": Quota(dram_guaranteed_bytes=ARENA_BYTES)}


def come_and_go(core: Core, count: int, first: int = 0, *, opens: bool = False) -> None:
    """One after the other; with `opens` each asks for a namespace."""
    for number in range(first, first + count):
        client = core.client(f"uid-{number}")
        if opens:
            client.open()
        core.store.detach(client.session)
        core.store.exited(client.session)


def serves(client: Client, name: object) -> bool:
    """Does it get what it stores?"""
    keys = chain(4, name)
    stored = client.put(client.open(), keys)
    client.core.settle()
    return stored == [Grant.GRANTED] * 4 and client.fetch(client.open(), keys) == 4


def successor(core: Core, quotas: dict[str, Quota]) -> Core:
    return Core(arenas=4, memory=core.memory.successor(), clock=core.clock, quotas=quotas)


def test_who_only_came_and_went_keeps_nobody_out() -> None:
    core = Core(arenas=4, quotas=CHAT)
    stays = core.client("stays")
    come_and_go(core, TENANTS + 6)
    assert serves(core.client("one-more"), "one-more")
    assert serves(core.client("chat"), "chat")
    assert stays.session.tenant is core.store.tenants["stays"], "a tenant with a session is not forgotten"
    numbers = [tenant.number for tenant in core.store.tenants.values()]
    assert len(numbers) == len(set(numbers)) <= TENANTS
    assert core.store.quotas.tenants == list(core.store.tenants.values())
    core.audit()
    later = successor(core, CHAT)
    assert later.store.kept.warm, later.store.kept.reason
    assert sorted(later.store.tenants) == ["chat", "one-more"]
    later.work_all()
    for name in ("one-more", "chat"):
        client = later.client(name)
        assert client.fetch(client.open(), chain(4, name)) == 4
    come_and_go(later, TENANTS + 6)
    assert serves(later.client("another"), "another")
    later.audit()


def test_a_number_that_goes_to_another_tenant_brings_nothing_along() -> None:
    core = Core(arenas=4)
    come_and_go(core, TENANTS)
    former = {tenant.number: tenant for tenant in core.store.tenants.values()}
    client = core.client("new")
    mine = client.session.tenant
    assert mine is not former[mine.number], "it took somebody's place"
    assert former[mine.number].name not in core.store.tenants
    assert list(mine.index.shape[3:5]) != list(former[mine.number].index.shape[3:5])
    assert serves(client, "new")
    assert core.client(former[mine.number].name).session.tenant.entries() == 0
    core.audit()


def test_a_configured_tenant_has_its_place_though_others_keep_theirs() -> None:
    core = Core(arenas=4, quotas=CHAT)
    come_and_go(core, TENANTS - 1, opens=True)
    with pytest.raises(LimitError, match="beside those that are configured"):
        core.client("one-more")
    for each in (core, successor(core, CHAT)):
        assert each is core or each.store.kept.warm, each.store.kept.reason
        with pytest.raises(LimitError, match="beside those that are configured"):
            each.client("one-more")
    later = successor(core, CHAT)
    assert serves(later.client("chat"), "chat")
    with pytest.raises(LimitError, match=r"more than 64 tenants$"):
        later.client("one-more")
    assert later.store.registry.known_tenant("one-more") is None
    later.audit()


def test_an_earlier_versions_journal_of_who_came_and_went_keeps_no_configured_tenant_out() -> None:
    core = Core(arenas=4)
    assert serves(core.client("works"), "works")
    come_and_go(core, TENANTS - 1)
    for tenant in core.store.tenants.values():
        core.store.registry.keep(tenant)  # everybody was written down
    with pytest.raises(LimitError):
        core.client("one-more")
    later = successor(core, CHAT)
    assert later.store.kept.warm, later.store.kept.reason
    later.work_all()
    client = later.client("works")
    assert client.fetch(client.open(), chain(4, "works")) == 4
    come_and_go(later, TENANTS, opens=False)
    assert serves(later.client("chat"), "chat")
    later.audit()


def test_where_those_who_had_something_leave_no_place_for_the_configured_a_start_is_cold() -> None:
    core = Core(arenas=4)
    come_and_go(core, TENANTS, opens=True)
    assert successor(core, {}).store.kept.warm
    later = successor(core, CHAT)
    assert "65 tenants had something or are configured now" in later.store.kept.reason
    assert serves(later.client("chat"), "chat")
    later.audit()


def test_who_said_something_of_its_programs_keeps_its_place_and_an_operators_choice_stays() -> None:
    core = Core(arenas=4)
    says = core.client("says")
    assert core.store.guiding.hear(says.session, Hint(Event.PROGRAM, "p")) is None
    core.store.detach(says.session)
    core.client("chosen-for")
    core.store.choose_quota("chosen-for", {"in_flight": 7})
    core.store.detach(next(one for one in core.store.sessions.values() if one.tenant.name == "chosen-for"))
    come_and_go(core, 2 * TENANTS)
    assert core.store.tenants["says"] is says.session.tenant
    assert "chosen-for" not in core.store.tenants
    assert core.store.registry.knows("chosen-for")
    assert not core.store.registry.knows("uid-0")
    assert core.client("chosen-for").session.tenant.quota.in_flight == 7
