"""Timings wired into a store: what MATCH, RESERVE, LEASE, ADVISE and admission to disk make of them."""

from collections.abc import Sequence
from math import isnan, nan

import numpy as np
import pytest

from kvproto.frames import UNKNOWN_NS, Matched
from kvproto.limits import KEYS_PER_FRAME, MIB, PROFILES_PER_TENANT
from kvproto.policy_frames import Advised, Choice, Question, Tier
from kvstore import registry
from kvstore.blocks import U8
from kvstore.cost import PrefillProfile, Refusal
from kvstore.costing import BELIEVED, Costing
from kvstore.savings import seconds_of_code, seconds_saved
from kvstore.sessions import Namespace
from kvstore.tier.orders import Outcome
from tests.core import BLOCK_BYTES, MS, SECOND, Client, Core, Held, chain, words
from tests.unit.test_disk import begin, fetch, make, put

TOKENS = 16  # a block
PASS_S, TOKEN_S, PAIR_S = 0.01, 4e-5, 2e-8
FIRST_S, SLOPE_S = TOKEN_S * TOKENS + PAIR_S * TOKENS**2 / 2, PAIR_S * TOKENS**2


def prefill_s(cached: int, new: int, scale: float = 1.0) -> float:
    return scale * (PASS_S + TOKEN_S * new + PAIR_S * new * (cached + new / 2))


def teach(costing: Costing, namespace: Namespace, scale: float = 1.0) -> None:
    """An engine that costs what `prefill_s` says has reported."""
    for cached in (0, 256, 1024, 4096, 16_384):
        for new in (16, 64, 256, 1024, 4096, 16_384):
            assert costing.report_prefill(namespace, cached, new, prefill_s(cached, new, scale)) is None
    assert namespace.profile is not None
    namespace.profile.settle()


def time_loads(costing: Costing, namespace: Namespace, tier: Tier, bytes_per_s: float) -> None:
    for exponent in range(10, 24):
        assert costing.report_load(namespace, tier, 1 << exponent, 1e-5 + (1 << exponent) / bytes_per_s) is None


def match(client: Client, namespace: Namespace, keys: Sequence[bytes]) -> Matched:
    return client.store.match(namespace, words(keys), 0, len(keys))


def cost(core: Core, namespace: Namespace, key: bytes) -> float:
    """What the row of a block says, in seconds; 0.0 if it does not say."""
    code = int(core.store.tables.blocks["cost"][core.row(namespace, key)])
    return seconds_of_code(code) if code else 0.0


def ready() -> tuple[Core, Client, Namespace, list[bytes]]:
    core = Core()
    client = core.client()
    return core, client, client.open(), chain(40)


# -- MATCH ------------------------------------------------------------------------------------------------------


def test_a_match_says_how_long_loading_and_computing_take_once_somebody_has_reported() -> None:
    core, client, namespace, keys = ready()
    client.put(namespace, keys)
    assert match(client, namespace, keys) == Matched(0, 40, 0, 0, UNKNOWN_NS, UNKNOWN_NS)
    time_loads(core.store.costing, namespace, Tier.DRAM, 1e9)
    found = match(client, namespace, keys)
    assert found.load_ns == pytest.approx(1e9 * (1e-5 + 40 * BLOCK_BYTES / 1e9), rel=0.05)
    assert found.recompute_ns == UNKNOWN_NS
    teach(core.store.costing, namespace)
    found = match(client, namespace, keys)
    assert found.recompute_ns == pytest.approx(1e9 * prefill_s(0, 640), rel=0.1)
    assert match(client, namespace, keys[:20]).recompute_ns < 0.9 * found.recompute_ns
    assert match(client, namespace, chain(3, "nothing")) == Matched(0, 0, 0, 0, UNKNOWN_NS, UNKNOWN_NS)


def test_what_one_tenant_reports_moves_no_answer_of_another() -> None:
    core, client, namespace, keys = ready()
    client.put(namespace, keys)
    other = core.client("u")
    theirs = other.open()
    other.put(theirs, keys[:10])
    time_loads(core.store.costing, namespace, Tier.DRAM, 1e9)
    time_loads(core.store.costing, namespace, Tier.DISK, 1e5)
    teach(core.store.costing, namespace)
    assert match(other, theirs, keys)[4:] == (UNKNOWN_NS, UNKNOWN_NS)
    assert UNKNOWN_NS not in match(client, namespace, keys)[4:]
    assert core.store.costing.way(theirs.tenant, Tier.DISK).load_seconds(1) is None
    assert not core.store.costing.disk.reports, "what decides on disk is what the daemon has read itself"


def test_a_piece_that_is_not_at_the_root_is_priced_where_it_lies() -> None:
    core, client, namespace, _ = ready()
    keys = chain(45)
    teach(core.store.costing, namespace)
    client.put(namespace, keys[:5])
    client.put(namespace, keys[5:], keys[4])
    whole = match(client, namespace, keys).recompute_ns
    first, rest = match(client, namespace, keys[:5]), match(client, namespace, keys[5:])
    assert first.recompute_ns + rest.recompute_ns == pytest.approx(whole, rel=0.05), "one pass in all"
    assert rest.recompute_ns == pytest.approx(1e9 * (40 * (FIRST_S + SLOPE_S * (5 + 39 / 2))), rel=0.02)


def test_one_slow_load_alone_says_nothing() -> None:
    core, client, namespace, keys = ready()
    client.put(namespace, keys)
    for _ in range(BELIEVED - 1):
        assert core.store.costing.report_load(namespace, Tier.DRAM, 1 << 20, 1000.0) is None
        assert match(client, namespace, keys).load_ns == UNKNOWN_NS
    for _ in range(BELIEVED):
        assert core.store.costing.report_load(namespace, Tier.DRAM, 1 << 20, 1e-3) is None
    assert match(client, namespace, keys).load_ns == pytest.approx(1e9 * 40 * BLOCK_BYTES * 1e-3 / (1 << 20), rel=0.5)


def test_no_timing_makes_an_estimate_that_does_not_fit_the_wire() -> None:
    core, client, namespace, keys = ready()
    client.put(namespace, keys)
    for _ in range(BELIEVED):
        core.store.costing.report_load(namespace, Tier.DRAM, 1, 3600.0)
    core.store.costing.report_prefill(namespace, 0, 1, 3600.0)
    found = match(client, namespace, keys)
    assert 0 < found.load_ns < UNKNOWN_NS
    assert 0 < found.recompute_ns < UNKNOWN_NS
    costs = core.store.costing.costs_of(namespace, 1 << 14, 1 << 18)
    assert 0 < costs.reload_ns < UNKNOWN_NS


@pytest.mark.parametrize(
    ("cached", "new", "seconds", "refusal"),
    [
        (0, 16, nan, Refusal.NOT_A_NUMBER),
        (0, 16, -1.0, Refusal.NEGATIVE),
        (0, 0, 1.0, Refusal.ABSURD),
        (1 << 63, 16, 1.0, Refusal.ABSURD),
    ],
)
def test_a_prefill_that_cannot_be_is_refused_and_leaves_no_profile(
    cached: int, new: int, seconds: float, refusal: Refusal
) -> None:
    core, _, namespace, _ = ready()
    assert core.store.costing.report_prefill(namespace, cached, new, seconds) is refusal
    assert (namespace.profile, core.store.costing.heard) == (None, False)


def test_a_load_that_cannot_be_is_refused() -> None:
    core, _, namespace, _ = ready()
    costing = core.store.costing
    assert costing.report_load(namespace, Tier.DRAM, 0, 1.0) is Refusal.ABSURD
    assert costing.report_load(namespace, Tier.DRAM, 10, -1.0) is Refusal.NEGATIVE
    assert costing.report_load(namespace, 3, 10, 1.0) is Refusal.ABSURD
    assert not costing.heard
    assert costing.report_load(namespace, Tier.HBM, 10, 1.0) is None
    assert costing.way(namespace.tenant, Tier.HBM).reports == 1
    assert costing.way(namespace.tenant, Tier.DRAM).reports == 0


# -- RESERVE ----------------------------------------------------------------------------------------------------


def test_each_block_costs_what_computing_it_at_its_place_takes() -> None:
    core, client, namespace, _ = ready()
    keys = chain(45)
    client.put(namespace, keys[:1])
    assert cost(core, namespace, keys[0]) == 0.0, "nobody knew"
    teach(core.store.costing, namespace)
    client.put(namespace, keys[:20], None)
    client.put(namespace, keys[20:], keys[19])
    costs = [cost(core, namespace, key) for key in keys[1:]]
    wanted = [FIRST_S + i * SLOPE_S for i in range(1, 45)]
    assert costs == pytest.approx(wanted, rel=0.02)
    assert costs[-1] > 1.25 * costs[0]


def test_what_a_client_says_with_a_store_wins_for_that_store() -> None:
    core, client, namespace, keys = ready()
    items = np.zeros(KEYS_PER_FRAME, dtype=[("grant", "<u4"), ("page", "<u4"), ("ticket", "<u8")])
    teach(core.store.costing, namespace)
    core.store.reserve(client.session, namespace, words(keys[:4]), 0, 4, None, items, 3 * SECOND)
    assert [cost(core, namespace, key) for key in keys[:4]] == pytest.approx([3.0] * 4, rel=1e-3)
    client.put(namespace, chain(4, "other"))
    assert cost(core, namespace, chain(4, "other")[0]) == pytest.approx(FIRST_S, rel=0.02)


def test_profiles_are_kept_of_namespaces_that_were_reported_on_last() -> None:
    core = Core()
    costing, clients = core.store.costing, (core.client(), core.client())  # a session opens fewer
    spaces = [clients[i % 2].open(model=f"m{i}") for i in range(PROFILES_PER_TENANT + 2)]
    tenant = spaces[0].tenant
    for namespace in spaces[:-2]:
        costing.report_prefill(namespace, 0, 16, 0.01)
    costing.report_prefill(spaces[0], 0, 16, 0.01)
    for namespace in spaces[-2:]:
        costing.report_prefill(namespace, 0, 16, 0.01)
    assert [namespace.number for namespace in spaces if namespace.profile is None] == [
        spaces[1].number,
        spaces[2].number,
    ]
    assert costing.profiled(tenant)[0] is spaces[-1]
    assert len(costing.profiled(tenant)) == PROFILES_PER_TENANT
    costing.forget(spaces[-1])
    assert spaces[-1].profile is None
    assert costing.profiled(tenant)[0] is spaces[-2]


def test_a_namespace_whose_number_goes_to_another_leaves_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "NAMESPACES_PER_TENANT", 2)
    core = Core()
    gone, stays = core.client(), core.client()
    old, kept = gone.open(model="old"), stays.open(model="kept")
    for namespace in (old, kept):
        core.store.costing.report_prefill(namespace, 0, 16, 0.01)
    core.store.exited(gone.session)
    new = stays.open(model="new")
    assert (new.number, new.profile) == (old.number, None)
    assert core.store.costing.profiled(new.tenant) == [kept]


def test_a_successor_goes_on_with_the_profiles_that_it_is_told_of() -> None:
    core = Core()
    client = core.client()
    spaces = [client.open(model=f"m{i}") for i in range(3)]
    for namespace in spaces:
        teach(core.store.costing, namespace)
    told = [(one, one.profile.to_bytes()) for one in core.store.costing.profiled(spaces[0].tenant) if one.profile]
    heir = Core()
    theirs = heir.client()
    costing = heir.store.costing
    again = {one.identity.model: one for one in (theirs.open(model=f"m{i}") for i in range(3))}
    assert costing.report_prefill(again["m1"], 0, 16, 7.0) is None
    taken = [costing.take_over(again[one.identity.model], PrefillProfile.from_bytes(written)) for one, written in told]
    assert taken == [True, False, True], "what this life has seen itself wins"
    assert [one.identity.model for one in costing.profiled(again["m0"].tenant)] == ["m1", "m2", "m0"]
    here, there = again["m0"].profile, spaces[0].profile
    assert here is not None
    assert there is not None
    assert (here.seconds(100, 1000), here.reports) == (there.seconds(100, 1000), 30)
    assert again["m1"].profile is not None
    assert again["m1"].profile.reports == 1
    assert not costing.take_over(theirs.open(model="m3"), PrefillProfile(TOKENS)), "of nothing reported"


# -- LEASE: compute saved ---------------------------------------------------------------------------------------


def test_a_lease_saves_what_computing_its_blocks_would_have_taken() -> None:
    core, client, namespace, _ = ready()
    keys = chain(45)
    teach(core.store.costing, namespace)
    client.put(namespace, keys[:40])
    client.put(namespace, keys[40:], keys[39])
    assert namespace.saved.seconds == 0.0
    assert namespace.profile is not None
    wanted = seconds_saved(namespace.profile, 45 * TOKENS, 64 * TOKENS)
    client.fetch(namespace, keys)
    whole = namespace.saved.dram_seconds
    assert whole == pytest.approx(wanted, rel=0.1)
    assert whole == pytest.approx(45 * (FIRST_S + SLOPE_S * 22), rel=0.02)
    client.fetch(namespace, keys[:20])
    client.fetch(namespace, keys[20:])  # the same once more, in two frames
    assert namespace.saved.dram_seconds == pytest.approx(2 * whole, rel=0.01)
    assert namespace.saved.dram_seconds > whole + 1.02 * 2 * 22.5 * FIRST_S, "not each frame from the root"
    client.fetch(namespace, chain(4, "absent"))
    assert (namespace.saved.blocks, namespace.saved.unpriced_blocks, namespace.saved.disk_seconds) == (90, 0, 0.0)
    assert namespace.tenant.saved.dram_seconds == namespace.saved.dram_seconds


def test_blocks_that_nobody_has_priced_are_counted_as_such_until_a_profile_prices_them() -> None:
    core, client, namespace, keys = ready()
    client.put(namespace, keys)
    client.fetch(namespace, keys)
    assert (namespace.saved.seconds, namespace.saved.blocks, namespace.saved.unpriced_blocks) == (0.0, 40, 40)
    teach(core.store.costing, namespace)
    client.fetch(namespace, keys)
    assert namespace.saved.unpriced_blocks == namespace.tenant.saved.unpriced_blocks == 40
    assert namespace.saved.dram_seconds == pytest.approx(40 * (FIRST_S + SLOPE_S * 39 / 2), rel=0.02)


def test_what_clients_said_of_their_blocks_is_saved_without_a_profile() -> None:
    _, client, namespace, keys = ready()
    namespace.recompute_ns = 2 * MS
    client.put(namespace, keys)
    client.fetch(namespace, keys[:10])
    assert namespace.saved.dram_seconds == pytest.approx(0.02, rel=1e-3)


def test_compute_saved_by_disk_is_counted_apart() -> None:
    core = make(arenas=2)
    client, namespace = begin(core)
    teach(core.store.costing, namespace)
    put(client, namespace, chain(12))
    put(client, namespace, chain(28, "other"))  # drives the tail of the first chain out of DRAM
    found = match(client, namespace, chain(12))
    assert found.disk
    assert found.dram
    assert fetch(client, namespace, chain(12)) == 12
    saved = namespace.saved
    tail = sum(FIRST_S + SLOPE_S * i for i in range(found.dram, 12))
    assert saved.disk_seconds == pytest.approx(tail, rel=0.02)
    assert saved.seconds == pytest.approx(12 * (FIRST_S + SLOPE_S * 11 / 2), rel=0.02)
    assert saved.blocks == 12
    assert fetch(client, namespace, chain(12)) == 12
    assert saved.disk_seconds == pytest.approx(tail, rel=0.02), "it was in DRAM the second time"


@pytest.mark.parametrize("reads", [0, 1, None])
def test_what_a_slow_drive_did_not_bring_saves_nothing_and_is_a_miss(reads: int | None) -> None:
    """So many reads end in time; None: all do."""
    core = make(arenas=2)
    client, namespace = begin(core)
    teach(core.store.costing, namespace)
    put(client, namespace, chain(12))
    put(client, namespace, chain(32, "other"))
    store, tally = core.store, core.store.tally
    misses: dict[str, int] = {}

    def missed(namespace: Namespace, keys: U8, at: int, count: int) -> None:
        del namespace
        index = chain(12).index(keys[at : at + 4].tobytes())
        misses[f"from {index}"] = misses.get(f"from {index}", 0) + count

    store.watching.missed = missed
    assert match(client, namespace, chain(12)).disk == 12
    held = client.ask(namespace, chain(12), SECOND, wait_ns=SECOND)
    store.leasing.account()
    assert isinstance(held, Held)
    assert (namespace.saved.blocks, tally.lease_hits) == (0, 0), "nothing has come yet"
    for _ in range(len(core.drive.waiting) if reads is None else reads):
        core.work()
    core.pass_time(2 * SECOND)
    came = store.leases[held.number].count
    assert came == 12 if reads is None else came < 12
    assert bool(came) is (reads != 0)
    saved = namespace.saved
    assert saved.disk_seconds == pytest.approx(sum(FIRST_S + SLOPE_S * i for i in range(came)), rel=0.02)
    assert (saved.blocks, namespace.tenant.saved.disk_bytes) == (came, came * BLOCK_BYTES)
    assert (tally.lease_hits, tally.lease_disk_hits, tally.lease_misses) == (came, came, 12 - came)
    assert misses == ({f"from {came}": 12 - came} if came < 12 else {})
    core.work_all()
    core.audit()


def test_what_had_come_when_a_lease_was_given_back_counts() -> None:
    core = make(arenas=2)
    client, namespace = begin(core)
    put(client, namespace, chain(12))
    put(client, namespace, chain(32, "other"))
    held = client.ask(namespace, chain(12), SECOND, wait_ns=SECOND)
    assert isinstance(held, Held)
    core.work()
    came = 12 - len(core.drive.waiting[0]) if core.drive.waiting else 12
    assert 0 < came < 12, "or this shows nothing"
    client.release(held)
    assert core.store.tally.lease_hits == came
    core.work_all()
    assert core.store.tally.lease_hits == came


# -- disk -------------------------------------------------------------------------------------------------------


def test_reads_are_timed_together_as_they_run_side_by_side() -> None:
    core = make(arenas=2)
    client, namespace = begin(core)
    put(client, namespace, chain(12))
    put(client, namespace, chain(32, "other"))
    assert match(client, namespace, chain(12)).disk == 12
    client.ask(namespace, chain(12), wait_ns=10 * SECOND)
    batches = len(core.drive.waiting)
    assert batches > 1
    for _ in range(batches):
        core.clock.advance(3 * MS)
        core.work()
    disk = core.store.costing.disk
    assert disk.reports == 1
    assert disk.load_seconds(12 * 2 * 4096) == pytest.approx(batches * 3e-3, rel=0.01)
    core.work_all()
    assert match(client, namespace, chain(12)).dram == 12
    assert core.store.costing.heard


def test_reads_that_fail_are_not_timed() -> None:
    core = make(arenas=2)
    client, namespace = begin(core)
    put(client, namespace, chain(4))
    put(client, namespace, chain(32, "other"))
    client.ask(namespace, chain(4), wait_ns=10 * SECOND)
    core.clock.advance(3 * MS)
    for order in (batch := core.drive.carry_out(0)):
        order.outcome = Outcome.FAILED
    core.store.finished(batch)
    assert core.store.costing.disk.reports == 0


def test_blocks_that_a_profile_prices_below_a_read_are_not_written() -> None:
    core = make()
    client, namespace = begin(core)
    teach(core.store.costing, namespace)
    core.store.costing.read(MIB, 1e-9)
    put(client, namespace, chain(4))
    assert core.drive.saves == 4, "nothing is faster to compute than to read from such a drive"
    for _ in range(20):
        core.store.costing.read(MIB, 3600.0)
    put(client, namespace, chain(4, "cheap"))
    assert core.drive.saves == 4
    assert core.store.disk.demotion.tally.not_worth == 4
    namespace.recompute_ns = 3600 * SECOND
    put(client, namespace, chain(4, "dear"))
    assert core.drive.saves == 8, "a client knows better"


def test_loads_that_a_tenant_reports_win_over_the_daemons_own_reads_in_its_estimates() -> None:
    core = make()
    client, namespace = begin(core)
    put(client, namespace, chain(4))
    put(client, namespace, chain(16, "other"))
    core.store.costing.read(1000, 1.0)
    found = match(client, namespace, chain(4))
    assert found.disk == 4
    assert found.load_ns == pytest.approx(1e9 * 4 * BLOCK_BYTES / 1000, rel=0.01)
    time_loads(core.store.costing, namespace, Tier.DISK, 1e9)
    assert match(client, namespace, chain(4)).load_ns < 10 * MS


# -- programs, and requests that wait ---------------------------------------------------------------------------


def test_losing_a_context_costs_the_cheaper_way_back() -> None:
    core, _, namespace, _ = ready()
    costing = core.store.costing
    assert costing.costs_of(namespace, 0, 10).reload_ns == 0
    teach(costing, namespace)
    recompute_ns = 1e9 * prefill_s(0, 160)
    assert costing.costs_of(namespace, 0, 10).reload_ns == pytest.approx(recompute_ns, rel=0.1)
    assert costing.costs_of(namespace, 1000, 1010).reload_ns > 1.2 * recompute_ns
    time_loads(costing, namespace, Tier.DISK, 1e9)
    assert costing.costs_of(namespace, 0, 10).reload_ns == pytest.approx(1e4 + 10 * BLOCK_BYTES, rel=0.05)
    assert costing.costs_of(namespace, 0, 10).queue_ns == 0
    assert costing.report_queue(namespace, float("nan")) is Refusal.NOT_A_NUMBER
    assert costing.report_queue(namespace, -1.0) is Refusal.NEGATIVE
    for _ in range(100):
        assert costing.report_queue(namespace, 0.5) is None
    assert costing.costs_of(namespace, 0, 10).queue_ns == pytest.approx(5e8)
    costing.report_queue(namespace, 2.1)
    assert costing.costs_of(namespace, 0, 10).queue_ns == pytest.approx(6e8)


def asked(namespace: Namespace, **fields: float) -> Question:
    unknown = dict.fromkeys(Question._fields[1:], nan)
    return Question(namespace.number, **{**unknown, "tokens": 4096.0, **fields})


def test_advice_is_nan_where_nobody_has_measured() -> None:
    core, _, namespace, _ = ready()
    advised = core.store.costing.advise(namespace, asked(namespace, elapsed_s=1.0))
    assert isinstance(advised, Advised)
    assert advised.choice == Choice.PRESERVE
    assert advised.preserve == pytest.approx(4096 * BLOCK_BYTES / TOKENS), "bytes a token are those of the blocks"
    assert isnan(advised.swap)
    assert isnan(advised.discard)
    assert isnan(advised.forward_s)


def test_advice_follows_what_was_measured() -> None:
    core, _, namespace, _ = ready()
    costing = core.store.costing
    teach(costing, namespace)
    time_loads(costing, namespace, Tier.DRAM, 1e6)

    def choice(**fields: float) -> Advised:
        advised = costing.advise(namespace, asked(namespace, **fields))
        assert isinstance(advised, Advised)
        return advised

    assert choice(elapsed_s=1e-3, batch_tokens=16.0).choice == Choice.PRESERVE
    long = choice(elapsed_s=1e5, batch_tokens=16.0, running_tokens=1000.0)
    assert long.choice == Choice.SWAP
    assert long.forward_s == pytest.approx(prefill_s(0, 16), rel=0.1)
    assert not isnan(long.swap)
    slow = choice(elapsed_s=1e5, token_bytes=1e5, running_tokens=1000.0)
    assert slow.choice == Choice.DISCARD, "four minutes of moving against a third of a second of computing"
    assert choice(forward_s=0.5, elapsed_s=1.0).forward_s == 0.5


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"tokens": nan}, Refusal.NOT_A_NUMBER),
        ({"tokens": -1.0}, Refusal.NEGATIVE),
        ({"tokens": 1e300}, Refusal.ABSURD),
        ({"batch_tokens": float("inf")}, Refusal.NOT_A_NUMBER),
        ({"chunk_tokens": -0.5}, Refusal.NEGATIVE),
        ({"running_tokens": 1e12}, Refusal.ABSURD),
        ({"token_bytes": -1.0}, Refusal.NEGATIVE),
        ({"elapsed_s": 1e12}, Refusal.ABSURD),
        ({"expected_s": float("-inf")}, Refusal.NOT_A_NUMBER),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(fields: dict[str, float], refusal: Refusal) -> None:
    core, _, namespace, _ = ready()
    assert core.store.costing.advise(namespace, asked(namespace, **fields)) is refusal
    assert isinstance(core.store.costing.advise(namespace, asked(namespace)), Advised)
