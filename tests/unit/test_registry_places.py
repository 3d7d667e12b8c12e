"""Places for tenants: configured ones have theirs, and who only came and went gives its place up."""

import pytest

from kvproto.errors import Grant, LimitError
from kvproto.limits import TENANTS
from kvproto.policy_frames import Event, Hint
from kvstore.quotas import Quota
from kvstore.sessions import Tenant
from tests.core import ARENA_BYTES, SECOND, Client, Core, chain

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


# -- who has only said something -------------------------------------------------------------------------------------


def say(core: Core, name: str, *hints: Hint) -> Tenant:
    """A client comes, says something, and goes; nobody asks for a namespace."""
    client = core.client(name)
    for hint in hints or (Hint(Event.PROGRAM, "p"),):
        core.store.guiding.hear(client.session, hint)
    core.store.detach(client.session)
    core.store.exited(client.session)
    return client.session.tenant


def teach(core: Core, name: str) -> Tenant:
    """The same of one whose tool has run once."""
    begun, called = Hint(Event.PROGRAM, "p"), Hint(Event.TOOL_STARTED, "p", other="grep")
    return say(core, name, begun, called, Hint(Event.TOOL_FINISHED, "p"), Hint(Event.PROGRAM_FINISHED, "p"))


def test_who_has_said_one_thing_and_left_keeps_nobody_out() -> None:
    core = Core(arenas=4)
    for number in range(TENANTS + 6):
        say(core, f"says-{number}")
        say(core, f"is-refused-{number}", Hint(Event.TURN_FINISHED, "nobody"))
    assert serves(core.client("one-more"), "one-more")
    numbers = [tenant.number for tenant in core.store.tenants.values()]
    assert len(numbers) == len(set(numbers)) <= TENANTS
    assert core.store.guiding.report().programs_total <= TENANTS
    for _ in range(70):
        core.pass_time(60 * SECOND)
    core.audit()


def test_who_has_said_something_gives_way_after_who_has_not_and_who_was_not_heard_of_for_longest_first() -> None:
    core = Core(arenas=4)
    names = [f"says-{number}" for number in range(TENANTS - 1)]
    for name in names:
        teach(core, name)
    say(core, names[0])  # it is heard of again
    come_and_go(core, 10)
    assert set(names) < set(core.store.tenants)
    for number in range(3):
        teach(core, f"new-{number}")
    assert [name for name in names if name not in core.store.tenants] == names[1:3]
    back = teach(core, names[1])
    assert core.store.tenants[names[1]] is back
    assert names[3] not in core.store.tenants
    assert core.store.guiding.lessons(back) == 1, "it began anew"
    core.audit()


def test_who_has_a_session_or_asked_for_a_namespace_does_not_give_way_though_it_said_something() -> None:
    core = Core(arenas=4)
    stays, opened = core.client("stays"), core.client("opened")
    for client in (stays, opened):
        core.store.guiding.hear(client.session, Hint(Event.PROGRAM, "p"))
    assert serves(opened, "opened")
    core.store.exited(opened.session)
    for number in range(2 * TENANTS):
        teach(core, f"says-{number}")
    assert core.store.tenants["stays"] is stays.session.tenant
    assert core.store.tenants["opened"] is opened.session.tenant
    assert core.store.guiding.report(stays.session.tenant).programs_total == 1
    core.audit()


def test_a_configured_tenant_that_said_something_does_not_give_way() -> None:
    core = Core(arenas=4, quotas=CHAT)
    chat = teach(core, "chat")
    for number in range(2 * TENANTS):
        teach(core, f"says-{number}")
    assert core.store.tenants["chat"] is chat
    assert core.store.guiding.lessons(chat) == 1


def test_of_whom_nothing_was_learned_nothing_is_left_after_an_hour() -> None:
    core = Core(arenas=4)
    taught, says = teach(core, "taught"), say(core, "says")
    for _ in range(70):
        core.pass_time(60 * SECOND)
    for number in range(TENANTS - 2):
        teach(core, f"later-{number}")
    teach(core, "one-more")
    assert says.name not in core.store.tenants
    assert core.store.tenants["taught"] is taught
    for _ in range(70):  # and nobody speaks of whom a number was before
        core.pass_time(60 * SECOND)
    teach(core, "two-more")
    assert "taught" not in core.store.tenants
    assert core.store.guiding.export(taught) == b""
    core.audit()


def test_what_the_tools_of_one_without_a_namespace_have_taught_survives_a_restart_as_far_as_there_are_places() -> None:
    core = Core(arenas=4)
    assert serves(core.client("works"), "works")
    taught = {name: teach(core, name) for name in ("a", "b")}
    learned = {name: core.store.guiding.export(tenant) for name, tenant in taught.items()}
    assert all(learned.values())
    core.store.learned.save()
    for _ in range(2):
        core = successor(core, {})
        assert core.store.kept.warm, core.store.kept.reason
        assert core.store.kept.faults == []
        tenants = core.store.tenants
        assert {name: core.store.guiding.export(tenants[name]) for name in taught} == learned
        core.store.learned.save()
    former = [core.store.tenants[name] for name in taught]
    for number in range(TENANTS):
        say(core, f"later-{number}", Hint(Event.TURN_FINISHED, "nobody"))
    assert not set(taught) & set(core.store.tenants), "they give way in that life too"
    assert [core.store.guiding.export(tenant) for tenant in former] == [b"", b""]
    full = {f"configured-{number}": Quota() for number in range(TENANTS - 1)}
    crowded = successor(core, full)
    assert crowded.store.kept.warm, crowded.store.kept.reason
    assert sorted(crowded.store.tenants) == ["works"]
    assert crowded.store.kept.faults, "it is said that lessons are lost"
    crowded.audit()


def test_of_who_has_only_said_something_a_successor_knows_nothing_but_what_was_learned() -> None:
    core = Core(arenas=4)
    assert serves(core.client("works"), "works")
    teach(core, "taught")
    core.store.learned.save()
    core = successor(core, {})
    assert sorted(core.store.tenants) == ["taught", "works"]
    core.memory.tables["learned"][:] = 0
    assert sorted(successor(core, {}).store.tenants) == ["works"]
