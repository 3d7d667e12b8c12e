"""What a successor learns of pins, whenever it takes over; and what it does with those that it cannot have whole."""

import pytest

from kvproto.ids import BlockKey
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Event, Hint, Partial, Tier
from kvstore import blocks, pin_book
from kvstore.classes import PinClass
from kvstore.pin_book import OWNER_BYTES, PinBook, written_owner
from kvstore.pin_notes import GO_ON_NS, NOTE_NS, NOTED
from kvstore.pinning import LOOK_AT
from kvstore.report import ClearScope
from kvstore.sessions import Namespace
from tests.core import SECOND, Client, Core, chain, key_of, words
from tests.unit import test_pin_classes as classes
from tests.unit.test_guiding_store import tell
from tests.unit.test_pinning import begin, flood, pin
from tests.unit.test_repinning import A_WHILE, listed
from tests.unit.test_restart import successor

TTL_NS = 10 * SECOND


def live(core: Core, ns: int) -> None:
    """Let time pass as a daemon does, which looks whenever something is due."""
    end_ns = core.clock.ns + ns
    while core.clock.ns < end_ns:
        due_ns = core.store.next_tick_ns()
        core.clock.ns = min(end_ns, max(core.clock.ns + 1, due_ns if due_ns is not None else end_ns))
        core.store.tick()


# -- uses --------------------------------------------------------------------------------------------------------------


def used_at_once(count: int) -> tuple[Core, Client, Namespace]:
    """So many pins that end in two seconds, all of which were used just now."""
    core = Core(arenas=40)
    client = core.client(ring_pages=512)
    namespace = client.open()
    keys = [key_of(number) for number in range(count)]
    for key in keys:
        client.put(namespace, [key])
    for key in keys:
        core.store.pinning.pin(client.session.tenant, namespace, words([key]), 0, 1, TTL_NS, Tier.DRAM)
    live(core, 8 * SECOND)
    for key in keys:
        assert client.fetch(namespace, [key]) == 1
    core.store.leasing.account()
    return core, client, namespace


def left_to(core: Core) -> int:
    """Pins that are not over in the eyes of a successor three seconds from now."""
    core.clock.advance(3 * SECOND)
    later = successor(core)
    later.store.tick()
    later.audit()
    return len(later.store.pinning.pins)


def test_a_successor_knows_of_all_uses_that_are_a_second_old() -> None:
    core, _, _ = used_at_once(200)
    assert 3 * NOTED < 200
    live(core, NOTE_NS + 4 * GO_ON_NS)
    assert left_to(core) == 200


def test_uses_are_written_down_a_few_at_a_time_and_not_with_every_tick() -> None:
    core, _, _ = used_at_once(200)
    for _ in range(100):
        core.store.tick()
    assert left_to(core) == NOTED, "what is left waits for its turn"


def test_a_daemon_that_stops_leaves_all_uses() -> None:
    for stops in (True, False):
        core, _, _ = used_at_once(100)
        if stops:
            core.store.pinning.note_all()
        assert (left_to(core) == 100) == stops


def test_a_use_of_a_pin_that_is_over_is_not_written_over_another() -> None:
    core, client, namespace = begin()
    tenant, pinning = client.session.tenant, core.store.pinning
    for name in ("used", "new"):
        client.put(namespace, chain(2, name))
    for _ in range(NOTED + 1):
        last = pinning.pin(tenant, namespace, words(chain(2, "used")), 0, 2, TTL_NS, Tier.DRAM)
    assert client.fetch(namespace, chain(2, "used")) == 2
    core.store.leasing.account()
    core.store.tick()  # all but the last have been written down
    place = pinning.pins[last.pin].place
    pinning.unpin(tenant, [last.pin])
    taken = pin(client, namespace, chain(2, "new"))
    assert pinning.pins[taken.pin].place == place
    live(core, 2 * NOTE_NS)
    core.audit()
    later = listed(successor(core).client())
    assert taken.pin in later
    assert last.pin not in later


# -- drops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["delete", "clear"])
def test_a_drop_that_was_answered_leaves_a_successor_what_comes_before(how: str) -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(8))
    pinned = pin(client, namespace, chain(8))
    answers: list[object] = []
    if how == "delete":
        core.store.delete(namespace, words(chain(8)[6:7]), 0, 1, answers.append)
    else:
        scope = ClearScope("t", namespace.digest, (BlockKey(chain(8)[6]),))
        core.store.clear(scope, answers.append, dry_run=False)
    while not answers:
        assert core.store.next_tick_ns() is not None, "nobody would look again"
        core.store.tick()
    later = successor(core)  # killed as soon as the answer was given
    assert {number: count for number, (count, _) in listed(later.client()).items()} == {pinned.pin: 6}
    assert later.store.kept.pins_lost == 0


def test_who_drops_waits_for_all_pins_that_there_are_and_for_none_that_there_are_not() -> None:
    core, client, namespace = begin(arenas=4)
    tenant, pinning = client.session.tenant, core.store.pinning
    client.put(namespace, chain(3))
    client.put(namespace, chain(1, "other"))
    answers: list[int] = []
    core.store.delete(namespace, words(chain(1, "other")), 0, 1, answers.append)
    assert answers == [1], "nothing is pinned, so nobody has to look"
    one = pinning.pin(tenant, namespace, words(chain(2)), 0, 2, A_WHILE, Tier.DRAM)
    core.settle()
    assert pinning.next_ns() != 0
    pinning.when_cut(tenant, lambda: answers.append(0))
    assert pinning.next_ns() == 0, "somebody waits"
    core.store.tick()
    assert answers.pop() == 0
    pinning.unpin(tenant, [one.pin])
    for _ in range(2 * LOOK_AT):
        pinning.pin(tenant, namespace, words(chain(2)), 0, 2, A_WHILE, Tier.DRAM)
    last = pinning.pin(tenant, namespace, words(chain(3)), 0, 3, A_WHILE, Tier.DRAM)
    core.store.delete(namespace, words(chain(3)[2:]), 0, 1, answers.append)
    core.store.tick()
    assert answers == [1], "not all have been looked at"
    while len(answers) < 2:
        core.store.tick()
    assert pinning.pins[last.pin].rows.size == 2
    saved = {one.number: one for one in PinBook(core.memory.tables["pins"]).read() or []}
    assert saved[last.pin].count == 2


# -- what a successor cannot have whole --------------------------------------------------------------------------------


def test_a_pin_stays_of_the_class_that_it_asked_for() -> None:
    core, client, namespace = begin()
    core.store.choose_quota("t", {"pin_1h_ttl_s": 240.0})
    client.put(namespace, chain(4))
    pinned = pin(client, namespace, chain(4), ttl_ns=3600 * SECOND)
    assert pinned.expires_ns == core.clock.ns + 240 * SECOND
    for _ in range(2):
        core = successor(core)
        client = core.client()
        assert [one.kind for one in core.store.pinning.pins.values()] == [PinClass.LONG]
        assert core.store.pinning.class_bytes(client.session.tenant, PinClass.LONG) == 4 * PAGE_BYTES
        assert listed(client) == {pinned.pin: (4, pinned.expires_ns)}
    core.clock.advance(200 * SECOND)
    core.work_all()
    assert client.fetch(client.open(), chain(4)) == 4
    core.pass_time(239 * SECOND)
    assert core.store.pinning.pins
    core.pass_time(2 * SECOND)
    assert not core.store.pinning.pins, "a use is worth no more than the class allows"


def test_of_a_pin_for_which_there_is_too_little_budget_the_beginning_stays() -> None:
    core, client, namespace = begin()
    for name in ("a", "b"):
        client.put(namespace, chain(4, name))
        pin(client, namespace, chain(4, name))
    core.store.registry.choose_quota("t", {"pin_share": 0.4})  # six of sixteen; nobody has let go yet
    later = successor(core)
    later.audit()
    client = later.client()
    assert [count for count, _ in listed(client).values()] == [4, 2]
    assert (later.store.kept.pins, later.store.kept.pins_lost) == (2, 0)
    later.work_all()
    flood(client, client.open(), "flood")
    assert [client.match(client.open(), chain(4, name)) for name in ("a", "b")] == [4, 2]


def test_a_class_has_what_it_is_sure_of_in_the_next_life_too() -> None:
    for share in (0.25, None):
        core, client, namespace = classes.begin()
        for number in range(2):
            classes.pin(client, namespace, f"short{number}", 8, classes.SHORT)
        long = classes.pin(client, namespace, "long", 16, classes.LONG)
        assert long.blocks == 16
        core.store.registry.choose_quota("t", {"pin_share": 0.25, "pin_1h_share": share})
        later = successor(core)
        later.audit()
        client = later.client()
        expected = (0, 16) if share else (16, 0)  # else those that began first have it
        assert (classes.used(client, PinClass.SHORT), classes.used(client, PinClass.LONG)) == expected


def away() -> tuple[Core, Client, Namespace, int]:
    """A life whose disk is still being read, where a pin of the former one covers eight blocks; and its number."""
    core, client, namespace = begin(disk=8)
    client.put(namespace, chain(8))
    core.work_all()
    flood(client, namespace, "first", 40)
    core.work_all()
    number = pin(client, namespace, chain(8), tier=Tier.DISK, ttl_ns=3600 * SECOND).pin
    limits = core.store.limits
    later = Core(
        limits.dram_bytes // limits.arena_bytes, disk=limits.disk, drive=core.drive.successor(),
        memory=core.memory.successor(), clock=core.clock,
        first_generation=int(core.store.tables.book[blocks.GENERATION]) + 1,
    )  # fmt: skip
    client = later.client()
    return later, client, client.open(), number


def test_a_pin_whose_blocks_have_not_been_found_yet_can_be_ended() -> None:
    for ended in (True, False):
        core, client, _, number = away()
        other = core.client("other").session.tenant
        assert core.store.pinning.unpin(other, [number]) == 0, "it is nobody else's"
        if ended:
            assert core.store.pinning.unpin(client.session.tenant, [number, number, 77]) == 1
            assert core.store.pinning.unpin(client.session.tenant, [number]) == 0
            assert core.store.pinning.tally.ended == 1
        core.open_disk()
        core.work_all()
        assert list(listed(client)) == ([] if ended else [number])
        assert core.store.kept.pins_lost == 0
        core.audit()
        saved = PinBook(core.memory.tables["pins"]).read()
        assert saved is not None
        assert [one.number for one in saved] == list(listed(client))


def test_a_list_is_in_the_order_of_numbers_whatever_came_back_late() -> None:
    core, client, namespace, number = away()
    client.put(namespace, chain(2, "new"))
    new = pin(client, namespace, chain(2, "new")).pin
    core.open_disk()
    core.work_all()
    tenant, pinning = client.session.tenant, core.store.pinning
    assert list(pinning._of[tenant]) == [new, number], "the control: it came back late"
    first = pinning.list_pins(tenant, 0, 1)
    second = pinning.list_pins(tenant, first[-1].pin, 1)
    assert [one.pin for one in (*first, *second)] == [number, new]


# -- programs ----------------------------------------------------------------------------------------------------------


def waiting(program: str) -> tuple[Core, Client, Namespace]:
    """A program's context is pinned, while it waits for a tool, and the daemon is killed: its successor."""
    core, client, namespace = begin(arenas=4)
    client.put(namespace, chain(6))
    tell(client, Event.PROGRAM, program)
    tell(client, Event.CONTEXT, program, namespace, chain(4))
    tell(client, Event.TOOL_STARTED, program, other="grep", seconds=600.0)
    assert len(core.store.pinning.pins) == 1
    later = successor(core)
    client = later.client()
    assert [count for count, _ in listed(client).values()] == [4]
    return later, client, client.open()


@pytest.mark.parametrize("program", ["p", "ü" * 60, "x" * 128])
def test_a_program_that_is_over_leaves_no_pin_of_a_former_life(program: str) -> None:
    core, client, _ = waiting(program)
    over = Hint(Event.PROGRAM_FINISHED, program)
    assert core.store.guiding.hear(client.session, Hint(Event.PROGRAM_FINISHED, "other")) is not None
    assert len(core.store.pinning.pins) == 1
    assert core.store.guiding.hear(client.session, over) is not None, "this life knows nothing of it"
    assert not core.store.pinning.pins
    core.store.tick()
    core.audit()


def test_a_program_that_goes_on_has_one_pin() -> None:
    core, client, namespace = waiting("p")
    (former,) = core.store.pinning.pins
    tell(client, Event.PROGRAM, "p")
    assert list(core.store.pinning.pins) == [former], "it may still wait"
    tell(client, Event.CONTEXT, "p", namespace, chain(6))
    tell(client, Event.TOOL_STARTED, "p", other="grep", seconds=60.0)
    (pinned,) = core.store.pinning.pins.values()
    assert (pinned.number > former, pinned.rows.size) == (True, 6)
    tell(client, Event.PROGRAM_FINISHED, "p")
    assert not core.store.pinning.pins
    core.audit()


def test_a_program_that_was_killed_while_one_pin_took_the_place_of_another_has_one() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    tenant, pinning = client.session.tenant, core.store.pinning
    for count in (2, 4):
        pinning.pin(tenant, namespace, words(chain(4)), 0, count, A_WHILE, Tier.DRAM, owner="program:p")
    later = successor(core)
    client = later.client()
    assert len(later.store.pinning.pins) == 2
    tell(client, Event.PROGRAM, "p")
    assert [one.rows.size for one in later.store.pinning.pins.values()] == [4]
    later.audit()


@pytest.mark.parametrize("lives", [1, 2])
@pytest.mark.parametrize(
    "name", ["p", "\u0430\u0433\u0435\u043d\u0442 " * 18, "x" * 126], ids=["short", "cyrillic", "long"]
)
def test_programs_whose_long_names_begin_alike_have_a_pin_each(name: str, lives: int) -> None:
    core, client, namespace = begin(arenas=4)
    for end in "ab":
        client.put(namespace, chain(3, end))
        tell(client, Event.PROGRAM, name + end)
        tell(client, Event.CONTEXT, name + end, namespace, chain(3, end))
        tell(client, Event.TOOL_STARTED, name + end, other="grep", seconds=600.0)
    for _ in range(lives):
        core = successor(core)
    client, left = core.client(), core.store.pinning.pins
    first, second = left
    tell(client, Event.PROGRAM, name + "a")
    assert set(left) == {first, second}, "neither is over"
    tell(client, Event.PROGRAM_FINISHED, name + "a")
    assert set(left) == {second}
    tell(client, Event.PROGRAM, name + "b")
    tell(client, Event.PROGRAM_FINISHED, name + "b")
    assert not left
    core.audit()


@pytest.mark.parametrize("owner", ["program:" + "x" * 120, "program:" + "x" * 121, "program:" + "\u0430" * 128])
def test_what_is_written_of_an_owner_has_room_and_stays_what_it_is(owner: str) -> None:
    written = written_owner(owner)
    assert (written == owner) == (len(owner.encode()) <= OWNER_BYTES)
    assert len(written.encode()) <= OWNER_BYTES
    assert written_owner(written) == written
    assert written.startswith(owner[:40])
    assert written_owner(owner[:-1] + "z") != written


def test_where_the_book_is_full_a_pin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin_book, "_RECORDS", 3)
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pins = [pin(client, namespace, chain(count)) for count in (1, 2, 3, 4)]
    assert [pinned.partial for pinned in pins] == [Partial.NOTHING] * 3 + [Partial.TOO_MANY]
    assert (pins[-1].pin, pins[-1].blocks) == (0, 0)
    core.store.pinning.unpin(client.session.tenant, [pins[0].pin])
    assert pin(client, namespace, chain(4)).blocks == 4
    core.audit()


def test_a_pin_of_a_former_life_that_is_over_is_no_programs() -> None:
    core, client, _ = waiting("p")
    core.store.pinning.unpin(client.session.tenant, list(core.store.pinning.pins))
    tell(client, Event.PROGRAM, "p")
    assert core.store.pinning.adopt(client.session.tenant, "p") is None
    assert not core.store.guiding._told[client.session.tenant].pins
