"""Copies on GPUs as the store knows them: what MATCH says, what pins and hints want there, what a lost GPU leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import xxhash

from kvproto.device_frames import Fate
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Partial, Pinned, Tier
from kvstore.moving import Held
from kvstore.quotas import Quota
from kvstore.sessions import Namespace
from kvstore.tier import hbms
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.hbm import Copy, Hbm
from kvstore.tier.hbms import CARRIES, LIFTS, LIFTS_EACH
from tests.core import BLOCK_BYTES, SECOND, Client, Core, chain, words

SLOTS = 4  # of an arena
ARENA = SLOTS * PAGE_BYTES
SEGMENT_BYTES = 18 * PAGE_BYTES
DISK = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)


@dataclass
class Gpus:
    """Copies at once what is lifted or lowered, as threads would."""

    core: Core
    tiers: list[Hbm] = field(default_factory=list)
    bytes: dict[Copy, bytes] = field(default_factory=dict)

    def add(self, arenas: int = 2) -> Hbm:
        store, hbm = self.core.store, Hbm(arenas * ARENA, ARENA)
        store.hbm.join(hbm)
        store.hbm.carry, store.hbm.lower = self.carry, self.lower
        store.matching.above = store.hbm.above
        if not self.tiers:
            store.hear_misses(store.hbm.missed)
        self.tiers.append(hbm)
        return hbm

    def carry(self, hbm: Hbm, namespace: Namespace, held: Held) -> None:
        for place in held.places:
            copy = hbm.reserve(namespace.tenant, namespace.slot_bytes, place.row, place.generation)
            if copy is not None:
                hbm.filled(copy)
                self.bytes[copy] = self.core.memory.view(place.arena)[place.offset :][:BLOCK_BYTES].tobytes()
                self.core.store.hbm.call(hbm, [copy], namespace)
        self.core.store.moving.give_back(held)
        self.core.store.hbm.carried(hbm)

    def lower(self, hbm: Hbm, copies: Sequence[Copy]) -> None:
        store, names = self.core.store, [copy.name for copy in copies if copy.name is not None]
        assert len(names) == len(copies)
        session = store.own_session(names[0].namespace.tenant)
        saving = store.moving.save(session, names[0].namespace, names[0].parent, words([name.key for name in names]))
        while granted := store.moving.reserve(saving):
            for index, copy in granted:
                slot = self.core.memory.view(copy.arena)[copy.target_offset :][:BLOCK_BYTES]
                slot[:] = np.frombuffer(self.bytes[copies[index]], np.uint8)
                assert xxhash.xxh3_64_intdigest(slot.tobytes()) == names[index].checksum
                store.moving.copied(saving, copy.ticket, names[index].checksum)
        store.hbm.lowered(hbm, copies, saving.fates.count(Fate.SAVED))


def begin(
    gpus: int = 1, *, disk: DiskLimits | None = None, quota: Quota | None = None
) -> tuple[Core, Client, Namespace, list[Hbm]]:
    """A store of 64 slots, and of 8 on each GPU."""
    core = Core(arenas=4 if disk is None else 2, disk=disk, quotas={"t": quota} if quota else None)
    client, gpu = core.client(), Gpus(core)
    for _ in range(gpus):
        gpu.add()
    return core, client, client.open(), gpu.tiers


def pin(client: Client, namespace: Namespace, keys: list[bytes], ttl_ns: int = 100 * SECOND) -> Pinned:
    pinned = client.store.pinning.pin(
        client.session.tenant, namespace, words(keys), 0, len(keys), ttl_ns, Tier.HBM, refresh=False
    )
    client.core.pass_time(1)
    client.core.audit()
    return pinned


def match(client: Client, namespace: Namespace, keys: list[bytes]) -> tuple[int, int, int]:
    found = client.store.match(namespace, words(keys), 0, len(keys))
    return found.hbm, found.dram, found.disk


def prefetch(client: Client, namespace: Namespace, keys: list[bytes]) -> int:
    tenant = client.session.tenant
    return client.store.prefetching.prefetch(tenant, namespace, words(keys), 0, len(keys), SECOND, Tier.HBM).coming


def late(core: Core) -> list[Callable[[], None]]:
    """What is copied up from now on is only there once what this receives is called."""
    carry, coming = core.store.hbm.carry, list[Callable[[], None]]()
    assert carry is not None
    core.store.hbm.carry = lambda *given: coming.append(partial(carry, *given))
    return coming


def test_a_pin_is_copied_there_as_far_as_its_budget_goes_and_says_how_far() -> None:
    core, client, namespace, (hbm,) = begin()
    tenant, keys = client.session.tenant, chain(6)
    client.put(namespace, keys)
    assert match(client, namespace, keys) == (0, 6, 0)
    pinned = pin(client, namespace, keys)
    assert (pinned.blocks, pinned.partial) == (4, Partial.BUDGET)  # half of 8 slots
    assert match(client, namespace, keys) == (4, 2, 0)
    assert core.store.hbm.pinned_bytes(tenant) == 4 * PAGE_BYTES
    again = pin(client, namespace, keys[:3])
    assert (again.blocks, again.partial) == (3, Partial.NOTHING)  # what is paid for once is not paid for twice
    other = chain(2, "other")
    client.put(namespace, other)
    refused = pin(client, namespace, other)
    assert (refused.blocks, refused.partial) == (0, Partial.BUDGET)
    assert client.store.pinning.unpin(tenant, [pinned.pin]) == 1
    core.pass_time(1)
    assert core.store.hbm.pinned_bytes(tenant) == 3 * PAGE_BYTES
    assert pin(client, namespace, other).blocks == 1
    assert hbm.used_bytes(tenant) == core.store.hbm.used_bytes(tenant) > 0


def test_what_is_pinned_there_outlasts_what_is_loaded_and_its_end_lets_it_go() -> None:
    core, client, namespace, (hbm,) = begin()
    keys, loaded = chain(4), chain(30, "loaded")
    client.put(namespace, keys)
    client.put(namespace, loaded)
    pin(client, namespace, keys, ttl_ns=10 * SECOND)
    for first in range(0, 30, 5):
        prefetch(client, namespace, loaded[: first + 5])
        core.pass_time(1)
    assert match(client, namespace, keys) == (4, 0, 0)
    assert hbm.tally.evicted
    core.pass_time(11 * SECOND)
    core.settle()
    assert core.store.hbm.pinned_bytes(client.session.tenant) == 0
    for first in range(0, 30, 5):
        prefetch(client, namespace, loaded[: first + 5])
        core.pass_time(1)
    assert match(client, namespace, keys)[0] == 0


def test_what_is_deleted_under_a_pin_is_neither_found_nor_paid_for() -> None:
    core, client, namespace, _ = begin()
    keys = chain(4)
    client.put(namespace, keys)
    pin(client, namespace, keys)
    client.delete(namespace, keys[1:2])
    core.pass_time(1)
    core.settle()
    core.pass_time(1)
    assert match(client, namespace, keys) == (1, 0, 0)
    assert core.store.hbm.pinned_bytes(client.session.tenant) == PAGE_BYTES
    client.put(namespace, keys[1:], parent=keys[0])
    assert match(client, namespace, keys) == (1, 3, 0)  # other blocks than those that have copies


def test_what_comes_from_disk_is_copied_there_once_it_has_come() -> None:
    core, client, namespace, _ = begin(disk=DISK)
    keys = chain(3)
    client.put(namespace, keys)
    core.work_all()
    for number in range(40):
        client.put(namespace, chain(1, f"pushes {number}"))
        core.work_all()
    assert match(client, namespace, keys) == (0, 0, 3)
    assert prefetch(client, namespace, keys) == 3
    core.work_all()
    core.pass_time(1)
    assert match(client, namespace, keys) == (3, 0, 0)


def test_a_block_counts_once_where_it_is_nearest() -> None:
    core, client, namespace, _ = begin(disk=DISK)
    keys = chain(3)
    client.put(namespace, keys)
    core.work_all()
    prefetch(client, namespace, keys[:2])
    core.pass_time(1)
    assert match(client, namespace, keys) == (2, 1, 0)
    for number in range(40):
        client.put(namespace, chain(1, f"pushes {number}"))
        core.work_all()
    assert match(client, namespace, keys) == (2, 0, 1), "of those on disk, too, two have a copy"
    both = client.store.match_all([namespace, namespace], words(keys), 0, 3)
    assert (both.hbm, both.dram, both.disk) == (2, 0, 1)


def test_ranks_have_a_block_there_if_all_of_them_do() -> None:
    core, client, first, (one, two) = begin(gpus=2)
    second, keys = client.open(model="n"), chain(4)
    for namespace, hbm in ((first, one), (second, two)):
        core.store.hbm.settle(namespace, hbm)
        client.put(namespace, keys)
    prefetch(client, first, keys)
    core.pass_time(1)
    prefetch(client, second, keys[:2])
    core.pass_time(1)
    assert (one.blocks, two.blocks) == (4, 2)
    both = client.store.match_all([first, second], words(keys), 0, 4)
    assert (both.hbm, both.dram, both.disk) == (2, 2, 0)


def test_a_lost_gpu_takes_its_tier_along_and_no_block() -> None:
    core, client, namespace, (hbm,) = begin()
    keys = chain(4)
    client.put(namespace, keys)
    assert pin(client, namespace, keys).blocks == 4
    core.store.hbm.lose(hbm)
    core.store.hbm.lose(hbm)
    assert match(client, namespace, keys) == (0, 4, 0)
    assert client.fetch(namespace, keys) == 4
    assert core.store.hbm.pinned_bytes(client.session.tenant) == 0
    more = chain(6, "more")
    client.put(namespace, more)
    assert pin(client, namespace, more).blocks == 6  # as of DRAM
    assert client.store.pinning.unpin(client.session.tenant, list(client.store.pinning.pins)) == 2
    core.audit()


def test_a_long_chain_is_lifted_part_by_part() -> None:
    core, client, namespace, (hbm,) = begin()
    keys = chain(8)
    client.put(namespace, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hbms, "LIFT_BLOCKS", 3)
        prefetch(client, namespace, keys)
        for there in (3, 6, 8, 8):
            core.pass_time(1)
            assert hbm.blocks == there
    assert match(client, namespace, keys) == (8, 0, 0)


def test_what_is_wanted_there_is_bounded_for_all_and_for_each() -> None:
    core = Core(arenas=8)
    hbm = Gpus(core).add()
    clients = [core.client(f"t{number}") for number in range(LIFTS // LIFTS_EACH + 1)]
    keys = chain(2)
    for at, client in enumerate(clients):
        namespace = client.open()
        client.put(namespace, keys)
        for _ in range(LIFTS_EACH + 1):
            prefetch(client, namespace, keys)
        assert core.store.hbm.not_lifted == at + 1 + LIFTS_EACH * (at == len(clients) - 1)
    assert core.store.next_tick_ns() == 0
    for _ in range(LIFTS):
        core.pass_time(1)
    assert core.store.hbm.next_ns() is None
    assert hbm.blocks


def test_few_parts_of_chains_are_copied_up_at_a_time_and_another_gpu_does_not_wait_for_them() -> None:
    core, client, first, (one, two) = begin(gpus=2)
    second, coming = client.open(model="n"), late(core)
    for namespace, hbm in ((first, one), (second, two)):
        core.store.hbm.settle(namespace, hbm)
    for number in range(CARRIES + 2):
        client.put(first, chain(1, number))
        prefetch(client, first, chain(1, number))
        core.pass_time(1)
    assert len(coming) == CARRIES
    assert core.store.hbm.next_ns() is None, "nothing to do before one has ended"
    client.put(second, chain(1))
    prefetch(client, second, chain(1))
    core.pass_time(1)
    assert len(coming) == CARRIES + 1
    while coming:
        coming.pop(0)()
        core.pass_time(1)
    assert (one.blocks, two.blocks) == (CARRIES + 2, 1)


# -- what DRAM has evicted -------------------------------------------------------------------------------------------


def lifted(client: Client, namespace: Namespace, name: str, count: int = 3) -> list[bytes]:
    """A chain with copies on a GPU."""
    keys = chain(count, name)
    client.put(namespace, keys)
    prefetch(client, namespace, keys)
    client.core.pass_time(1)
    assert match(client, namespace, keys) == (count, 0, 0)
    return keys


def crowd_out(client: Client, namespace: Namespace, name: str = "crowd") -> None:
    """Everything that lies in DRAM."""
    for number in range(300):
        client.put(namespace, chain(1, f"{name} {number}"))


def comes_back(client: Client, namespace: Namespace, keys: list[bytes]) -> int:
    """Ask, which is a miss; and ask again. Every byte is compared."""
    assert client.fetch(namespace, keys) == 0
    client.core.pass_time(1)
    client.core.pass_time(1)
    client.core.audit()
    return client.fetch(namespace, keys)


def test_what_dram_has_evicted_comes_back_from_its_copy_once_it_is_asked_for() -> None:
    core, client, namespace, (hbm,) = begin()
    keys, control = lifted(client, namespace, "kept"), chain(3, "control")
    client.put(namespace, control)
    crowd_out(client, namespace)
    assert comes_back(client, namespace, keys) == 3
    assert comes_back(client, namespace, control) == 0
    assert core.store.hbm.lowered_blocks == 3
    assert hbm.blocks == 0, "it is an ordinary block again"


def test_a_prefetch_of_what_only_a_copy_is_left_of_brings_it_back() -> None:
    core, client, namespace, _ = begin()
    keys = lifted(client, namespace, "kept")
    crowd_out(client, namespace)
    tenant = client.session.tenant
    client.store.prefetching.prefetch(tenant, namespace, words(keys), 0, 3, SECOND, Tier.DRAM, wished=True)
    core.pass_time(1)
    assert client.fetch(namespace, keys) == 3


def test_a_copy_that_gives_way_is_written_back_where_dram_has_evicted_it_and_not_where_it_is_clean() -> None:
    core, client, namespace, (hbm,) = begin()
    lifted(client, namespace, "kept")
    for number in range(4):  # all of these stay in DRAM
        lifted(client, namespace, f"others {number}", 2)
    core.pass_time(1)
    assert hbm.tally.evicted
    assert core.store.hbm.lowered_blocks == 0, "a clean copy is written nowhere"
    crowd_out(client, namespace)
    new = chain(3, "new")
    client.put(namespace, new)
    prefetch(client, namespace, new)  # for which there is no room, but soon
    for _ in range(8):
        core.pass_time(1)
    assert core.store.hbm.lowered_blocks
    prefetch(client, namespace, new)
    core.pass_time(1)
    assert match(client, namespace, new) == (3, 0, 0)
    core.audit()


def test_what_was_deleted_never_comes_back() -> None:
    core, client, namespace, _ = begin()
    before, after, beyond = (lifted(client, namespace, name, 2) for name in ("before", "after", "beyond"))
    client.delete(namespace, before[:1])
    core.settle()
    crowd_out(client, namespace)
    assert comes_back(client, namespace, before) == 0
    client.delete(namespace, after)  # which no tier knows any more, but for the copies
    core.settle()
    assert comes_back(client, namespace, after) == 0
    assert comes_back(client, namespace, beyond) == 0, "nobody says which of them was dropped: a miss is right"
    assert core.store.hbm.lowered_blocks == 0


def test_a_store_that_is_broken_off_costs_no_copy_of_others() -> None:
    core, client, namespace, _ = begin()
    keys = lifted(client, namespace, "kept")
    crowd_out(client, namespace)
    other = core.client()
    tickets = [one.ticket for one in other.reserve(other.open(), chain(2, "broken off"))]
    core.store.reserving.abort(other.session, tickets)
    core.settle()
    assert comes_back(client, namespace, keys) == 3


def test_what_nobody_has_used_for_too_long_does_not_come_back() -> None:
    core, client, namespace, _ = begin(quota=Quota(unused_ttl_s=60.0))
    keys = lifted(client, namespace, "old")
    crowd_out(client, namespace)
    core.clock.advance(61 * SECOND)
    assert not any(core.store.hbm.is_alone(copy) for copy in core.store.hbm.tiers[0]._copies.values())
    assert client.fetch(namespace, keys) == 0
    assert core.store.hbm.lowered_blocks == 0


def test_what_was_stored_anew_meanwhile_is_left_alone() -> None:
    core, client, namespace, _ = begin()
    keys = lifted(client, namespace, "anew")
    crowd_out(client, namespace)
    client.put(namespace, keys[:1])
    assert client.fetch(namespace, keys) == 1  # and the rest is missed
    core.pass_time(1)
    assert client.fetch(namespace, keys) == 3
    assert core.store.hbm.lowered_blocks == 2
    core.audit()


def test_what_was_deleted_while_it_was_copied_up_never_comes_back() -> None:
    core, client, namespace, _ = begin()
    coming, deleted, control = late(core), chain(2, "deleted"), chain(2, "control")
    for keys in (deleted, control):
        client.put(namespace, keys)
        prefetch(client, namespace, keys)
        core.pass_time(1)
    client.delete(namespace, deleted[:1])
    core.settle()
    assert len(coming) == 2
    for copied in coming:
        copied()
    core.settle()
    crowd_out(client, namespace)
    assert comes_back(client, namespace, deleted) == 0
    assert comes_back(client, namespace, control) == 2


def test_neither_an_older_copy_nor_one_of_a_namespace_that_is_forgotten_is_stored_anew() -> None:
    core, client, namespace, (hbm,) = begin()
    keys = lifted(client, namespace, "twice", 1)
    older = hbm.called(namespace, keys[0])
    crowd_out(client, namespace)
    client.put(namespace, keys)
    prefetch(client, namespace, keys)
    core.pass_time(1)
    newer = hbm.called(namespace, keys[0])
    assert older is not newer
    crowd_out(client, namespace, "again")
    assert newer is not None
    assert older is not None
    assert (core.store.hbm.is_alone(older), core.store.hbm.is_alone(newer)) == (False, True)
    core.store.hbm.forget_namespace(namespace)
    assert not core.store.hbm.is_alone(newer)
    assert not hbm.has_names
    hbm.forget(older)
    hbm.forget(newer)
    assert hbm.blocks == 0


def test_a_pin_that_cannot_be_there_ends_no_other() -> None:
    _, client, namespace, _ = begin(quota=Quota(pin_5m_share=0.5))
    keys, more, lasting = chain(4), chain(4, "more"), chain(28, "lasting")
    for each in (keys, more, lasting):
        client.put(namespace, each)
    tenant, pinning = client.session.tenant, client.store.pinning
    assert pinning.pin(tenant, namespace, words(lasting), 0, 28, 1000 * SECOND, Tier.DRAM).blocks == 28
    assert pin(client, namespace, keys).blocks == 4  # all that may be pinned in DRAM, and on the GPU
    assert pin(client, namespace, more).partial is Partial.BUDGET
    assert len(pinning.pins) == 2, "what is no use ends no pin of another class"
    assert pinning.pin(tenant, namespace, words(more), 0, 4, 100 * SECOND, Tier.DRAM).blocks == 4
    assert pinning.tally.gave_way == 1
