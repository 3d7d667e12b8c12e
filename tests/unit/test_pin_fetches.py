"""What pins want in DRAM and lies on disk: it comes, though not at once, as long as they last."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import cast

from kvproto.limits import PREFETCHES_PER_TENANT
from kvproto.policy_frames import Fetching, Partial, Pinned, Tier
from kvstore.pin_fetches import ASK, REST_NS, PinFetches
from kvstore.prefetching import Prefetching
from kvstore.sessions import Namespace, Tenant
from kvstore.tier.orders import Load, Outcome
from tests.core import MS, SECOND, Client, Core, chain, words
from tests.unit.test_prefetching import begin, in_dram, to_disk
from tests.unit.test_restart import successor

HOUR = 3600 * SECOND
MORE = 40  # than there may be in the queue


def pin(
    client: Client, namespace: Namespace, keys: list[bytes], ttl_ns: int = HOUR, tier: Tier = Tier.DRAM,
    *, refresh: bool = True,
) -> Pinned:  # fmt: skip
    """PIN, of all of it."""
    pinning, tenant = client.store.pinning, client.session.tenant
    pinned = pinning.pin(tenant, namespace, words(keys), 0, len(keys), ttl_ns, tier, refresh=refresh)
    assert (pinned.blocks, pinned.partial) == (len(keys), Partial.NOTHING)
    return pinned


def many_on_disk(more: int = MORE) -> tuple[Core, Client, Namespace, list[list[bytes]]]:
    """More chains on disk than may be fetched at once, and room in DRAM for all of them."""
    chains = [chain(1, f"many {number}") for number in range(PREFETCHES_PER_TENANT + more)]
    core, client, namespace = begin(arenas=60, segments=160)
    to_disk(client, namespace, *chains, pushes=60 * 16)
    return core, client, namespace, chains


def states(client: Client, namespace: Namespace, chains: list[list[bytes]]) -> Counter[int]:
    """How many of these chains have so many blocks in DRAM."""
    return Counter(in_dram(client, namespace, keys) for keys in chains)


def rest(core: Core, seconds: int = 5) -> None:
    """Time passes, and whatever is read is read."""
    for _ in range(10 * seconds):
        core.pass_time(100 * MS)
        core.work_all()
    core.audit()


def test_what_there_was_no_place_for_in_the_queue_comes_later() -> None:
    core, client, namespace, chains = many_on_disk()
    for keys in chains:
        pin(client, namespace, keys)
    assert core.store.prefetching.waiting(client.session.tenant) == PREFETCHES_PER_TENANT
    assert len(core.store.pinning.fetches) == MORE
    rest(core)
    assert states(client, namespace, chains) == {1: len(chains)}
    assert (len(core.store.pinning.fetches), core.store.prefetching.waiting(client.session.tenant)) == (0, 0)
    assert (core.store.pinning.next_ns() or 0) > core.clock.ns + SECOND // 2, "nothing keeps the owner busy"


def test_a_pin_that_is_over_asks_for_nothing_more() -> None:
    core, client, namespace, chains = many_on_disk()
    pinned = [pin(client, namespace, keys) for keys in chains]
    over = {one.pin for one in pinned[PREFETCHES_PER_TENANT::2]}
    core.store.pinning.unpin(client.session.tenant, over)
    assert len(core.store.pinning.fetches) == MORE - len(over)
    rest(core)
    there = [in_dram(client, namespace, keys) for keys in chains]
    assert there == [int(one.pin not in over) for one in pinned]


def test_what_waits_for_a_place_costs_the_owner_little_and_does_not_keep_it_busy() -> None:
    core, client, namespace, chains = many_on_disk()
    for keys in chains:
        pin(client, namespace, keys)
    prefetching, pinning = core.store.prefetching, core.store.pinning
    asked = prefetching.tally.asked
    core.store.tick()
    for _ in range(100):  # nothing is read meanwhile: no place becomes free
        core.pass_time(10 * MS)
        assert (pinning.next_ns() or 0) > core.clock.ns
    assert (prefetching.tally.asked, prefetching.tally.refused) == (asked, MORE)
    pinning.unpin(client.session.tenant, list(pinning.pins)[: PREFETCHES_PER_TENANT // 2])  # all places at once
    core.pass_time(SECOND)
    assert 0 < prefetching.tally.asked - asked <= ASK


class Queues:
    """`Prefetching`: who is asked for, by tenant; nothing is ever done."""

    def __init__(self, places: int) -> None:
        self.unreadable: Callable[[Iterable[int]], None] = lambda _numbers: None
        self.asked: list[Tenant] = []
        self._places = places

    def full(self, tenant: Tenant) -> bool:
        """As Prefetching's."""
        return self.asked.count(tenant) >= self._places

    def prefetch(self, tenant: Tenant, *_: object, kept: bool) -> Fetching:
        """As Prefetching's."""
        assert kept
        self.asked.append(tenant)
        return Fetching(len(self.asked), 0, 1)


def test_tenants_take_turns_and_one_without_a_place_is_passed_over() -> None:
    core = Core(arenas=4)
    queues, tenants = Queues(places=ASK + 2), []
    fetches = PinFetches(core.store.tables, core.clock, cast(Prefetching, queues))
    for name in ("a", "b"):
        client = core.client(name)
        client.put(client.open(), chain(1))
        tenants.append(client.session.tenant)
        for _ in range(4 * ASK):
            fetches.wait(core.store.pinning.pins[pin(client, client.open(), chain(1)).pin])
    a, b = tenants
    turns = []
    for _ in range(6):
        before = len(queues.asked)
        fetches.tick(core.clock.ns)
        core.clock.ns = fetches.next_ns() or 0
        turns.append(Counter(queues.asked[before:]))
    assert turns == [{a: ASK}, {b: ASK}, {a: 2}, {b: 2}, {}, {}]
    assert [fetches.waiting(tenant) for tenant in tenants] == [3 * ASK - 2] * 2


def test_what_a_pin_that_is_used_wants_is_never_too_late() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    keys = [chain(1, f"pushes {number}") for number in range(32)]
    leases = [client.lease(namespace, each, ttl_ns=60 * SECOND) for each in keys if in_dram(client, namespace, each)]
    pinned = pin(client, namespace, chain(3), ttl_ns=10 * SECOND)
    for _ in range(30):  # there is no room, and it is used all the time
        core.pass_time(SECOND)
        core.store.pinning.leased(core.store.pinning.pins[pinned.pin].rows[-1:])
    assert core.store.prefetching.tally.no_room > 2
    assert core.store.prefetching.tally.late == 0
    for lease in leases:
        client.release(lease)
    for _ in range(70):
        core.pass_time(SECOND)
        core.work_all()
        if in_dram(client, namespace, chain(3)) == 3:
            break
        core.store.pinning.leased(core.store.pinning.pins[pinned.pin].rows[-1:])
    assert in_dram(client, namespace, chain(3)) == 3


def test_what_could_not_be_read_is_tried_again_now_and_then() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    loads: list[int] = []

    def fail(order: object) -> Outcome | None:
        if not isinstance(order, Load):
            return None
        loads.append(core.clock.ns)
        return Outcome.FAILED

    core.drive.fault = fail
    pin(client, namespace, chain(3))
    rest(core)
    tried = len(loads)
    assert 0 < tried <= 3, "not again and again"
    assert core.store.prefetching.waiting(client.session.tenant) == 0, "others have its place"
    core.drive.fault = lambda _order: None
    rest(core)
    assert in_dram(client, namespace, chain(3)) == 0
    core.pass_time(REST_NS)
    rest(core)
    assert in_dram(client, namespace, chain(3)) == 3
    assert len(core.store.pinning.fetches) == 0


def test_a_pin_that_rests_and_is_over_does_not_ask_again() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Load) else None
    pinned = pin(client, namespace, chain(3))
    rest(core)
    core.store.pinning.unpin(client.session.tenant, [pinned.pin])
    assert len(core.store.pinning.fetches) == 0
    core.drive.fault = lambda _order: None
    asked = core.store.prefetching.tally.asked
    core.pass_time(REST_NS)
    rest(core)
    assert (in_dram(client, namespace, chain(3)), core.store.prefetching.tally.asked) == (0, asked)


def test_what_is_not_on_disk_any_more_is_not_waited_for() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Load) else None
    pin(client, namespace, chain(3))
    rest(core)
    assert len(core.store.pinning.fetches) == 1
    client.delete(namespace, chain(3)[1:])
    rest(core)
    core.drive.fault = lambda _order: None
    core.pass_time(REST_NS)
    rest(core)
    assert (in_dram(client, namespace, chain(3)), len(core.store.pinning.fetches)) == (1, 0)
    client.delete(namespace, chain(1))
    rest(core)
    assert not core.store.pinning.pins


def test_a_pin_of_tier_disk_brings_nothing() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    pin(client, namespace, chain(3), tier=Tier.DISK)
    core = successor(core)
    rest(core)
    client = core.client()
    assert in_dram(client, client.open(), chain(3)) == 0
    assert len(core.store.pinning.pins) == 1


def test_a_successor_brings_what_was_still_to_come() -> None:
    core, client, namespace, chains = many_on_disk()
    for number, keys in enumerate(chains):
        pin(client, namespace, keys, refresh=bool(number % 2))
    core = successor(core)
    client = core.client()
    namespace = client.open()
    rest(core, seconds=10)
    pins = [core.store.pinning.pins[number] for number in sorted(core.store.pinning.pins)]
    assert [one.refresh for one in pins] == [number % 2 == 1 for number in range(len(chains))]
    assert states(client, namespace, chains) == {1: len(chains)}
    assert core.store.prefetching.tally.refused == 0
