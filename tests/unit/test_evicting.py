"""Room that an operator makes: what goes, in which order, and what stays."""

import random

import pytest

from kvproto.ids import BlockKey
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Tier as PinTier
from kvstore.blocks import DISK_USED
from kvstore.evicting import EvictReport, evict
from kvstore.insight.explain import MissQuestion, explain
from kvstore.report import ClearScope
from kvstore.rules import Tier
from kvstore.sessions import Namespace
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import SECOND, Client, Core, chain, words
from tests.unit.test_pinning import SEGMENT_BYTES

EVERYTHING = ClearScope()


def asked(
    core: Core, scope: ClearScope = EVERYTHING, tier: Tier = Tier.DRAM, wanted_bytes: int = 0, *, dry_run: bool = False,
    exactly: bool = False,
) -> EvictReport:  # fmt: skip
    """What came of it; everything is whole afterwards."""
    reports: list[EvictReport] = []
    evict(core.store, scope, tier, wanted_bytes, reports.append, dry_run=dry_run, exactly=exactly)
    core.settle()
    core.audit()
    (report,) = reports
    return report


def begin(arenas: int = 4, disk: int = 0) -> tuple[Core, Client, Namespace]:
    """A store; with `disk` segments what is stored is written there too."""
    limits = DiskLimits(disk * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW)
    core = Core(arenas=arenas, disk=limits if disk else None)
    client = core.client()
    return core, client, client.open()


def put(core: Core, client: Client, namespace: Namespace, name: str, count: int = 4) -> list[bytes]:
    """A chain, a second after whatever came before."""
    core.pass_time(SECOND)
    keys = chain(count, name)
    client.put(namespace, keys)
    if core.store.limits.disk.disk_bytes:
        core.work_all()
    return keys


def test_the_longest_unused_goes_first_from_its_end_and_no_more_than_was_asked_for() -> None:
    core, client, namespace = begin()
    old, new = put(core, client, namespace, "old"), put(core, client, namespace, "new")
    core.pass_time(SECOND)
    assert client.fetch(namespace, old) == 4, "so that `new` is the older one now"
    report = asked(core, wanted_bytes=3 * PAGE_BYTES)
    assert report == EvictReport(3, 3 * PAGE_BYTES, 0, 0, 0, dry_run=False)
    assert client.match(namespace, new) == 1
    assert client.match(namespace, old) == 4
    assert asked(core).blocks == 5
    assert client.match(namespace, old) == client.match(namespace, new) == 0


def test_what_is_leased_or_pinned_stays_with_what_leads_there() -> None:
    core, client, namespace = begin()
    leased, pinned, free = (put(core, client, namespace, name) for name in ("leased", "pinned", "free"))
    held = client.lease(namespace, leased[:3], ttl_ns=30 * SECOND)
    core.store.pinning.pin(client.session.tenant, namespace, words(pinned), 0, 2, 60 * SECOND, PinTier.DRAM)
    told, report = asked(core, dry_run=True), asked(core)
    assert (report.blocks, report.held_blocks, report.pinned_blocks) == (1 + 2 + 4, 2, 1)
    assert (told.blocks, told.held_blocks, told.pinned_blocks) == (1 + 2 + 4, 2, 1)
    assert [client.match(namespace, keys) for keys in (leased, pinned, free)] == [3, 2, 0]
    client.release(held)
    core.store.pinning.unpin(client.session.tenant, list(core.store.pinning.pins))
    assert asked(core).blocks == 5, "the control: without lease and pin they go"
    assert client.match(namespace, leased) == client.match(namespace, pinned) == 0


def test_a_dry_run_says_the_same_and_changes_nothing() -> None:
    core, client, namespace = begin()
    for name in "abc":
        put(core, client, namespace, name)
    before = core.store.tables.blocks.tobytes(), core.store.tables.slots.tobytes(), core.store.tables.book.tobytes()
    for wanted in (0, PAGE_BYTES, 5 * PAGE_BYTES, 1 << 40):
        told = asked(core, wanted_bytes=wanted, dry_run=True)
        after = core.store.tables.blocks.tobytes(), core.store.tables.slots.tobytes(), core.store.tables.book.tobytes()
        assert after == before
        assert told.dry_run
    told = asked(core, wanted_bytes=7 * PAGE_BYTES, dry_run=True)
    done = asked(core, wanted_bytes=7 * PAGE_BYTES)
    assert (told.blocks, told.bytes, told.held_blocks) == (done.blocks, done.bytes, done.held_blocks) == (7, 28672, 0)
    assert core.store.tables.blocks.tobytes() != before[0]


@pytest.mark.parametrize("dry_run", [True, False])
def test_only_what_the_scope_names_goes(dry_run: bool) -> None:
    core, client, namespace = begin(arenas=8)
    stranger = core.client("u")
    theirs, second = stranger.open(), client.open(model="n")
    keys = chain(6)
    for who, where in ((client, namespace), (client, second), (stranger, theirs)):
        who.put(where, keys)
    branch = chain(2, "branch")
    client.put(namespace, branch, keys[1])

    def left() -> list[int]:
        return [
            client.match(namespace, keys), client.match(namespace, [*keys[:2], *branch]),
            client.match(second, keys), stranger.match(theirs, keys),
        ]  # fmt: skip

    whole = left()
    below = ClearScope("t", namespace.digest, (BlockKey(keys[2]),))
    for scope, blocks, after in (
        (below, 4, [2, 4, 6, 6]),
        (ClearScope("t", namespace.digest), 4 if not dry_run else 8, [0, 0, 6, 6]),
        (ClearScope("t"), 6 if not dry_run else 14, [0, 0, 0, 6]),
        (ClearScope(None, namespace.digest), 6 if not dry_run else 14, [0, 0, 0, 0]),
    ):
        assert asked(core, scope, dry_run=dry_run).blocks == blocks
        assert left() == (whole if dry_run else after)


def test_what_an_operator_evicted_is_told_apart_from_what_went_for_want_of_room() -> None:
    core, client, namespace = begin(arenas=2)
    keys = put(core, client, namespace, "a")
    question = MissQuestion("t", namespace.digest, tuple(map(BlockKey, keys)))
    asked(core, dry_run=True)
    assert explain(core.store, question).state == "hit"
    asked(core)
    found = explain(core.store, question)
    assert (found.cause, found.tier, found.rule) == ("operator", "dram", "")
    assert any(sentence.startswith("An operator evicted it from DRAM, about") for sentence in found.sentences)
    assert (core.store.tally.evicted_by_operators, core.store.tally.evicted) == (4, 0)
    for _ in range(90):
        core.pass_time(10 * SECOND)
        client.put(namespace, chain(1, "another"))  # evictions are counted when somebody stores
    later = explain(core.store, question)
    assert later.cause == "operator"
    assert 890 < later.age_s < 910
    client.put(namespace, keys)
    core.pass_time(60 * SECOND)
    for step in range(64):
        client.put(namespace, chain(4, f"new {step}"))
        core.pass_time(SECOND)
    assert explain(core.store, question).cause == "evicted", "the later one counts"
    assert core.store.tally.evicted_by_operators == 4


def test_from_memory_to_disk_and_from_disk_alone() -> None:
    core, client, namespace = begin(disk=8)
    keys = put(core, client, namespace, "a", 8)
    told = asked(core, tier=Tier.DISK, wanted_bytes=1, dry_run=True)
    assert (told.blocks, told.kept_blocks) == (1, 1)
    report = asked(core, tier=Tier.DRAM)
    assert (report.blocks, report.kept_blocks) == (8, 8)
    assert client.match(namespace, keys) == 8, "on disk"
    report = asked(core, tier=Tier.DISK, wanted_bytes=2 * PAGE_BYTES)
    assert report.kept_blocks == 0
    assert client.match(namespace, keys) == 8 - report.blocks
    question = MissQuestion("t", namespace.digest, tuple(map(BlockKey, keys)))
    found = explain(core.store, question)
    assert (found.cause, found.tier) == ("operator", "disk")
    assert any(sentence.startswith("An operator evicted it from disk, about") for sentence in found.sentences)
    counted = core.store.tally
    assert (counted.evicted_by_operators, counted.disk_evicted_by_operators, counted.evicted) == (8, report.blocks, 0)
    assert asked(core, tier=Tier.DISK).blocks == 8 - report.blocks
    assert client.match(namespace, keys) == 0
    core.work_all()  # once the index has forgotten them
    assert int(core.store.tables.book[DISK_USED]) == 0, "nothing is left there"


def test_what_is_pinned_on_disk_stays_there() -> None:
    core, client, namespace = begin(disk=8)
    keys = put(core, client, namespace, "a", 8)
    asked(core, tier=Tier.DRAM)
    core.store.pinning.pin(client.session.tenant, namespace, words(keys), 0, 3, 60 * SECOND, PinTier.DISK)
    report = asked(core, tier=Tier.DISK)
    assert (report.blocks, report.held_blocks, report.pinned_blocks) == (5, 1, 1)
    assert client.match(namespace, keys) == 3


def test_a_copy_on_disk_goes_and_the_block_in_memory_stays() -> None:
    core, client, namespace = begin(disk=8)
    keys = put(core, client, namespace, "a", 8)
    report = asked(core, tier=Tier.DISK)
    assert (report.blocks, report.kept_blocks, report.held_blocks) == (8, 8, 0)
    core.work_all()
    assert client.fetch(namespace, keys) == 8
    assert int(core.store.tables.book[DISK_USED]) == 0


def test_it_goes_in_slices_between_which_others_come_and_go() -> None:
    rng = random.Random(5)
    core = Core(arenas=4, arena_bytes=256 * PAGE_BYTES, slice_steps=64)
    client = core.client(ring_pages=512)
    namespace = client.open()
    chains = [chain(10, f"c{number}") for number in range(60)]
    for keys in chains:
        client.put(namespace, keys)
    reports: list[EvictReport] = []
    evict(core.store, EVERYTHING, Tier.DRAM, 0, reports.append, dry_run=False)
    slices = 0
    while not reports:
        slices += 1
        match rng.randrange(4):
            case 0:
                client.put(namespace, chain(3, f"new{slices}"))
            case 1:
                client.delete(namespace, rng.choice(chains)[5:6])
            case 2:
                client.fetch(namespace, rng.choice(chains))
        core.audit()
        core.store.tick()
    assert slices > 100
    assert reports[0].blocks > 400
    asked(core)  # what others cut off meanwhile had been looked at as what has a child
    assert all(client.match(namespace, keys) == 0 for keys in chains)
    assert core.store.arenas.serving() == 0 or int(core.store.tables.pools["blocks"].sum()) == 0


def test_unknown_names_are_told() -> None:
    core, client, namespace = begin()
    put(core, client, namespace, "a")
    with pytest.raises(KeyError, match="no tenant"):
        asked(core, ClearScope("nobody"))
    with pytest.raises(KeyError, match="no namespace"):
        asked(core, ClearScope("t", type(namespace.digest)(bytes(32))))


@pytest.mark.parametrize("exactly", [True, False])
def test_a_chain_that_is_named_block_by_block_goes_once_and_a_dry_run_says_so(*, exactly: bool) -> None:
    core, client, namespace = begin()
    keys = put(core, client, namespace, "a", 6)
    scope = ClearScope("t", namespace.digest, tuple(BlockKey(key) for key in keys[:4]))
    goes = 0 if exactly else 6  # others continue what is named
    for dry_run in (True, False):
        report = asked(core, scope, dry_run=dry_run, exactly=exactly)
        assert report == EvictReport(goes, goes * PAGE_BYTES, 0, 0, 0, dry_run=dry_run)
    assert client.match(namespace, keys) == 6 - goes
