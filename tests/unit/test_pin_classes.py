"""Classes of pins: how long each lasts, what each is sure of, and which gives way."""

import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Partial, Pinned, Tier
from kvstore.classes import PinClass, class_of
from kvstore.quotas import Quota
from kvstore.sessions import Namespace
from tests.core import MS, SECOND, Client, Core, chain, words

MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
SHORT, LONG = 4 * MINUTE, HOUR  # of two classes
ARENAS = 4
SLOTS = 16 * ARENAS
OWNER = "program:p"


def begin(**quota: float) -> tuple[Core, Client, Namespace]:
    """A store of 64 slots that are one tenant's, of whom this is said; half of them may be pinned."""
    core = Core(arenas=ARENAS, quotas={"t": Quota(**quota)})  # type: ignore[arg-type]  # shares and seconds
    client = core.client()
    return core, client, client.open()


def pin(client: Client, namespace: Namespace, name: str, count: int, ttl_ns: int, owner: str = "") -> Pinned:
    """Store a chain and pin it."""
    client.put(namespace, chain(count, name))
    tenant, keys = client.session.tenant, words(chain(count, name))
    pinned = client.store.pinning.pin(tenant, namespace, keys, 0, count, ttl_ns, Tier.DRAM, owner=owner)
    client.core.audit()
    return pinned


def used(client: Client, kind: PinClass) -> int:
    """Blocks that a class covers."""
    return client.store.pinning.class_bytes(client.session.tenant, kind) // PAGE_BYTES


def test_what_a_pin_asks_for_says_which_class_it_is_of() -> None:
    assert class_of(5 * MINUTE, "") is class_of(SECOND, "operator") is PinClass.SHORT
    assert class_of(5 * MINUTE + 1, "") is class_of(24 * HOUR, "operator") is PinClass.LONG
    assert class_of(SECOND, OWNER) is class_of(HOUR, OWNER) is PinClass.TOOL


@pytest.mark.parametrize(("kind", "ttl_ns", "owner"), [("5m", SHORT, ""), ("1h", LONG, ""), ("tool", LONG, OWNER)])
def test_a_class_lasts_no_longer_than_its_quota_says(kind: str, ttl_ns: int, owner: str) -> None:
    core, client, namespace = begin(**{f"pin_{kind}_ttl_s": 30.0})
    now_ns = core.clock.ns
    assert pin(client, namespace, "capped", 4, ttl_ns, owner).expires_ns == now_ns + 30 * SECOND
    assert pin(client, namespace, "shorter", 4, 20 * SECOND, owner).expires_ns == now_ns + 20 * SECOND
    other = (LONG, "") if kind == "5m" else (SHORT, "")
    assert pin(client, namespace, "other", 4, *other).expires_ns == now_ns + other[0], "it is of another class"
    client.put(namespace, chain(4, "capped"))
    core.clock.advance(25 * SECOND)
    assert client.fetch(namespace, chain(4, "capped")) == 4
    core.pass_time(29 * SECOND)
    assert len(core.store.pinning.pins) == 2, "its use began the time anew, and so did nobody else's"
    core.pass_time(3 * SECOND)
    assert len(core.store.pinning.pins) == 1, "but not for longer than the class lasts"


def test_a_time_that_is_chosen_later_counts_from_the_next_use_on() -> None:
    core, client, namespace = begin()
    pin(client, namespace, "a", 4, LONG)
    core.clock.advance(MINUTE)
    core.store.choose_quota("t", {"pin_1h_ttl_s": 30.0})
    client.fetch(namespace, chain(4, "a"))
    (listed,) = core.store.pinning.list_pins(client.session.tenant, 0, 9)
    assert listed.expires_ns == core.clock.ns - MINUTE + LONG, "who was told an hour keeps it"
    core.pass_time(LONG - MINUTE - SECOND)
    assert len(core.store.pinning.pins) == 1
    client.fetch(namespace, chain(4, "a"))
    core.pass_time(31 * SECOND)
    assert not core.store.pinning.pins


def test_a_class_below_its_share_takes_from_the_one_above() -> None:
    _core, client, namespace = begin(pin_1h_share=0.25)
    for number in range(4):
        assert pin(client, namespace, f"short{number}", 8, SHORT).blocks == 8
    assert used(client, PinClass.SHORT) == SLOTS // 2, "the other class's share is lent while nobody wants it"
    assert pin(client, namespace, "more", 8, SHORT).partial == Partial.BUDGET
    first = pin(client, namespace, "long", 12, LONG)
    assert (first.blocks, first.partial) == (12, Partial.NOTHING)
    assert used(client, PinClass.SHORT) == 16, "whole pins, those that began first"
    numbers = [one.blocks for one in client.store.pinning.list_pins(client.session.tenant, 0, 9)]
    assert numbers == [8, 8, 12]
    second = pin(client, namespace, "longer", 12, LONG)
    assert second.blocks == 4, "what is left; its share is used up"
    assert used(client, PinClass.SHORT) == 16
    assert client.store.pinning.tally.gave_way == 2


def test_what_a_class_is_sure_of_nobody_takes() -> None:
    _core, client, namespace = begin(pin_5m_share=0.25, pin_1h_share=0.25)
    assert pin(client, namespace, "short", 16, SHORT).blocks == 16
    assert pin(client, namespace, "long", 16, LONG).blocks == 16
    for kind, ttl_ns in (("short", SHORT), ("long", LONG)):
        assert pin(client, namespace, f"{kind}er", 8, ttl_ns).blocks == 0
    assert pin(client, namespace, "tool", 8, LONG, OWNER).blocks == 0
    assert (used(client, PinClass.SHORT), used(client, PinClass.LONG)) == (16, 16)


def test_who_is_sure_of_nothing_takes_from_nobody() -> None:
    _core, client, namespace = begin()
    assert pin(client, namespace, "short", 32, SHORT).blocks == 32
    assert pin(client, namespace, "long", 8, LONG).blocks == 0
    assert client.store.pinning.tally.gave_way == 0


def test_what_is_used_goes_after_what_is_not() -> None:
    core, client, namespace = begin(pin_1h_share=0.25)
    for number in range(4):
        pin(client, namespace, f"short{number}", 8, SHORT)
    core.clock.advance(SHORT - SECOND)
    client.fetch(namespace, chain(8, "short0"))
    core.clock.advance(SECOND // 2)
    for number in range(1, 4):
        pinning, tenant = core.store.pinning, client.session.tenant
        pinning.pin(tenant, namespace, words(chain(8, f"short{number}")), 0, 8, SHORT, Tier.DRAM)
    core.pass_time(SECOND)
    assert used(client, PinClass.SHORT) == 32
    assert pin(client, namespace, "long", 8, LONG).blocks == 8
    kept = {
        bytes(core.store.tables.blocks["key"][held.rows[-1]].tobytes()) for held in core.store.pinning.pins.values()
    }
    assert chain(8, "short0")[-1] in kept
    assert chain(8, "short1")[-1] not in kept


def test_what_two_classes_cover_is_paid_for_once_and_counts_in_each() -> None:
    core, client, namespace = begin()
    pin(client, namespace, "a", 8, SHORT)
    pin(client, namespace, "a", 8, LONG)
    assert (used(client, PinClass.SHORT), used(client, PinClass.LONG)) == (8, 8)
    assert core.store.pinning.used_bytes(client.session.tenant) == 8 * PAGE_BYTES
    core.pass_time(SHORT + SECOND)
    assert (used(client, PinClass.SHORT), used(client, PinClass.LONG)) == (0, 8)


def test_a_smaller_pin_share_ends_pins_of_the_class_furthest_above_its_own() -> None:
    core, client, namespace = begin()
    for number in range(2):
        pin(client, namespace, f"short{number}", 8, SHORT)
        pin(client, namespace, f"long{number}", 8, LONG)
    core.store.choose_quota("t", {"pin_share": 0.25, "pin_1h_share": 0.25})
    assert core.store.next_tick_ns() == 0
    for _ in range(4):
        core.store.tick()
    core.audit()
    assert (used(client, PinClass.SHORT), used(client, PinClass.LONG)) == (0, 16)
    core.store.choose_quota("t", {"pin_share": 1.0})
    core.store.tick()
    assert used(client, PinClass.LONG) == 16, "a larger one ends nothing"


# -- arenas that pins alone hold ---------------------------------------------------------------------------------


def scattered(core: Core, client: Client, namespace: Namespace) -> list[Pinned]:
    """Fill all arenas, with one pinned block in each; more in the first ones."""
    pins = []
    for arena in range(ARENAS):
        for number in range(16):
            core.clock.advance(1)
            client.put(namespace, chain(1, f"{arena}/{number}"))
            if number <= ARENAS - 1 - arena:
                pins.append(pin(client, namespace, f"{arena}/{number}", 1, LONG))
    return pins


def let_go(core: Core) -> None:
    """Pins hear of what is being drained, and it is drained."""
    for _ in range(4):
        core.pass_time(20 * MS)


def test_a_slot_size_without_any_arena_gets_the_one_in_which_fewest_pins_end() -> None:
    core, client, namespace = begin()
    scattered(core, client, namespace)
    large = client.open(3 * PAGE_BYTES)
    assert large.pool.arenas == 0
    keys = chain(5, "large")
    client.put(large, keys)
    let_go(core)
    client.put(large, keys)
    core.audit()
    assert client.match(large, keys) == 5
    assert used(client, PinClass.LONG) == 9, "the one pin of the last arena is over, the others are not"
    assert client.match(namespace, chain(1, "0/0")) == 1
    for number in range(5, 30):
        client.put(large, chain(1, f"large{number}"))
        core.settle()
    leases = [client.lease(large, chain(1, f"large{number}"), 50 * SECOND) for number in range(25, 30)]
    assert sum(lease.blocks for lease in leases) == 5
    core.clock.advance(SECOND)
    assert client.put(large, chain(1, "one more")) == [Grant.FULL]
    assert large.pool.arenas == 1, "who has an arena takes no pins from others"
    assert core.store.arenas.draining is None
    assert used(client, PinClass.LONG) == 9


def test_an_arena_that_is_leased_too_is_left_alone() -> None:
    core, client, namespace = begin()
    scattered(core, client, namespace)
    leases = [client.lease(namespace, chain(1, f"{arena}/0"), 50 * SECOND) for arena in range(ARENAS)]
    large = client.open(3 * PAGE_BYTES)
    client.put(large, chain(1, "large"))
    assert core.store.arenas.draining is None
    core.settle()
    client.put(large, chain(1, "large"))
    assert client.match(large, chain(1, "large")) == 0
    for lease in leases:
        client.release(lease)
    core.clock.advance(SECOND)
    client.put(large, chain(1, "large"))
    let_go(core)
    client.put(large, chain(1, "large"))
    assert client.match(large, chain(1, "large")) == 1
    core.audit()
