"""The stream of keys as the store watches it: what leases and reserves bring, in slices, and bounded."""

import random
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count, pairwise

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.limits import KEYS_PER_FRAME, MIB, PAGE_BYTES, TENANTS
from kvstore.blocks import U1, U8, Rows
from kvstore.insight.advise import Sizes
from kvstore.insight.curves import Limits
from kvstore.insight.lookups import LATELY_S
from kvstore.insight.tap import ACCESS, SEED_WORDS, TAKE_AT, Tap, sample, threshold_of
from kvstore.insight.trial import SHADOW_BLOCKS, TRIED, Trial
from kvstore.rules import Chosen, Rule, Tier
from kvstore.savings import prices_of
from kvstore.sessions import Namespace, Parked
from kvstore.watching import SLICE, Observed, Watching
from tests.core import MS, SECOND, Core, chain, key_of, words
from tests.fakes import FakeRandomness

ALL = Limits(first_rate=1.0)  # no key is left out, so that small stores say something exact
SLOTS = 16  # of an arena of `Core`


def watched(arenas: int = 4, limits: Limits = ALL, tenants: int = TENANTS) -> tuple[Core, Watching]:
    """A store, and a room in place of its own that sees every key."""
    core = Core(arenas)
    store = core.store
    watching = Watching(
        store.tables, core.clock, FakeRandomness(3), store.limits.dram_bytes, store.tenants, limits=limits,
        tenants=tenants,
    )  # fmt: skip
    store.leasing.asked, store.reserving.asked = watching.asked, watching.reserved
    store.matching.asked = watching.matched
    return core, watching


def take_in(core: Core, watching: Watching) -> None:
    """Let a second pass, and all that waits be taken in and played."""
    core.store.leasing.account()
    core.clock.advance(SECOND)
    while (due_ns := watching.next_ns()) is not None and due_ns <= core.clock.ns:
        watching.tick(core.clock.ns)


def observe(core: Core, watching: Watching, tenant: str | None = None) -> Observed:
    """Of all, or of one."""
    core.store.leasing.account()
    whose = core.store.tenants[tenant] if tenant else None
    return watching.observe(whose, Sizes(core.store.limits.dram_bytes), "lru")


def accesses(core: Core, watching: Watching, tenant: str | None = None) -> float:
    """How many accesses a curve stands for."""
    curve = observe(core, watching, tenant).curve
    return curve.accesses if curve else 0.0


def frame(seed: int) -> U8:
    """A frame's worth of keys."""
    return np.random.default_rng(seed).integers(0, 1 << 64, 4 * KEYS_PER_FRAME, dtype=np.uint64)


class TestWhatIsSeen:
    def test_a_lease_counts_for_its_tenant_and_for_all_and_for_nobody_else(self) -> None:
        core, watching = watched()
        for name, asked in (("a", 3), ("b", 5)):
            client = core.client(name)
            client.fetch(client.open(), chain(asked, name))
        take_in(core, watching)
        assert (accesses(core, watching, "a"), accesses(core, watching, "b")) == (3, 5)
        assert accesses(core, watching) == 8

    def test_what_was_there_is_counted_beside_what_was_asked_for(self) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(6))
        client.fetch(namespace, [*chain(6), key_of("more"), key_of("yet")])
        seen = observe(core, watching)
        assert (seen.asked, seen.found) == (8, 6)

    def test_the_curve_says_what_the_store_really_answered(self) -> None:
        core, watching = watched(arenas=4)
        client = core.client()
        namespace = client.open()
        names = [
            key_of(number) for number in range(5 * SLOTS)
        ]  # a quarter more than there is room for, round and round
        hits = 0
        for _ in range(6):
            for key in names:
                core.clock.advance(MS)
                hits += client.fetch(namespace, [key])
                core.store.leasing.account()  # as the daemon does once it has answered
                client.put(namespace, [key])
        take_in(core, watching)
        curve = observe(core, watching).curve
        assert curve is not None
        assert hits == 0
        assert curve.hit(4 * SLOTS * PAGE_BYTES).share == pytest.approx(0.0, abs=0.02)
        assert curve.hit(8 * SLOTS * PAGE_BYTES).share == pytest.approx(5 / 6, abs=0.02)

    def test_what_is_stored_counts_as_use_and_not_as_asked_for(self) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(4))
        take_in(core, watching)
        assert accesses(core, watching) == 0
        client.fetch(namespace, chain(4))
        take_in(core, watching)
        curve = observe(core, watching).curve
        assert curve is not None
        assert (curve.accesses, curve.hit_ceiling.share) == (4, 1.0)  # a miss of each, had storing not counted

    def test_a_lease_that_waits_is_counted_once_when_it_is_answered(self) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        tickets = client.begin(namespace, chain(2))
        locations = np.zeros(4, dtype=np.uint32)
        store = core.store
        asked = store.lease(client.session, namespace, 1, words(chain(2)), 0, 2, SECOND, SECOND, locations, 0)
        assert isinstance(asked, Parked)
        assert observe(core, watching).asked == 0
        client.commit(tickets)
        core.finish_all()
        assert (observe(core, watching).asked, observe(core, watching).found) == (2, 2)

    def test_what_blocks_cost_comes_from_their_namespace(self) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        namespace.recompute_ns = SECOND // 2
        client.fetch(namespace, chain(4))
        take_in(core, watching)
        before = observe(core, watching).curve
        namespace.recompute_ns = 2 * SECOND
        for _ in range(3):  # one namespace is looked at in a second
            client.fetch(namespace, chain(1))
            take_in(core, watching)
        client.fetch(namespace, chain(4))
        take_in(core, watching)
        after = observe(core, watching).curve
        assert before is not None
        assert after is not None
        assert before.cost_s == pytest.approx(2.0)
        assert after.cost_s > before.cost_s + 8.0 - 0.1

    @pytest.mark.parametrize("frames", [1, 4])
    @pytest.mark.parametrize("looks_up", [True, False])
    def test_a_chain_that_is_asked_for_in_pieces_costs_what_it_does_as_a_whole(
        self, frames: int, looks_up: bool
    ) -> None:
        core, watching = watched(arenas=8)
        client = core.client()
        namespace = client.open()
        for new in (256, 1024, 4096, 16_384, 65_536) * 8:
            core.store.costing.report_prefill(namespace, 0, new, new * 1e-5 + new * new * 1e-8)
        assert namespace.profile is not None
        namespace.profile.settle()
        first_s, slope_s = prices_of(namespace.profile, 0)
        keys, step = chain(64), 64 // frames
        for at in range(0, 64, step):  # as engines prefill, chunk by chunk
            if looks_up:
                client.match(namespace, keys)
            client.put(namespace, keys[at : at + step], keys[at - 1] if at else None)
        for at in range(0, 64, step):
            assert client.fetch(namespace, keys[at : at + step]) == step
        take_in(core, watching)
        seen = observe(core, watching)
        assert seen.curve is not None
        assert seen.curve.cost_s == pytest.approx((1 + looks_up) * (64 * first_s + slope_s * 63 * 64 / 2), rel=0.05)
        assert slope_s * 63 * 64 / 2 > 0.2 * 64 * first_s, "or it does not matter where a piece lies"

    def test_a_number_that_went_to_another_namespace_is_followed_as_that_one(self) -> None:
        core, watching = watched()
        client = core.client("a")
        first = client.open()
        watching.asked(first, words(chain(2)), 0, 2, 0)
        other = core.client("b")
        second = other.open(block_bytes=5 * PAGE_BYTES)
        heir = Namespace(first.number, second.tenant, second.identity, second.digest, second.slot_bytes, second.pool)
        watching.asked(heir, words(chain(3)), 0, 3, 0)
        take_in(core, watching)
        assert (accesses(core, watching, "a"), accesses(core, watching, "b")) == (2, 3)


class TestLookups:
    """Who looks up first leases what is there: the rest counts as missed once it is stored, and once."""

    def test_the_curve_says_what_lookups_found_of_what_they_asked_for(self) -> None:
        core, watching = watched(arenas=4)
        client = core.client()
        namespace = client.open()
        told: list[int] = []
        watching.missed = lambda _namespace, _keys, _at, count: told.append(count)
        rng = random.Random(2)
        asked = found = 0
        for second in range(1500):
            keys = chain(4, f"doc{min(int(rng.paretovariate(0.6)), 400)}")
            there = client.match(namespace, keys)
            client.fetch(namespace, keys[:there])
            if there < 4:
                client.put(namespace, keys[there:], keys[there - 1] if there else None)
            asked, found = asked + 4, found + there
            core.clock.advance(SECOND)
            if second % 50 == 0:
                take_in(core, watching)
        take_in(core, watching)
        seen = observe(core, watching)
        assert seen.curve is not None
        assert 0.6 < found / asked < 0.8, "or nothing is seen here"
        assert seen.found / seen.asked == pytest.approx(found / asked, abs=0.05)  # the last hours count for more
        assert seen.curve.hit(core.store.limits.dram_bytes).share == pytest.approx(found / asked, abs=0.05)
        assert sum(told) == pytest.approx(asked - found, rel=0.05)  # unless it was evicted again within minutes

    @pytest.mark.parametrize("times", [1, 30])
    def test_a_request_that_waits_and_is_looked_up_again_and_again_counts_once(self, times: int) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        told: list[int] = []
        watching.missed = lambda _namespace, _keys, _at, count: told.append(count)
        client.put(namespace, chain(6)[:2])
        for _ in range(times):
            assert client.match(namespace, chain(6)) == 2
            core.clock.advance(2 * MS)
        client.fetch(namespace, chain(6)[:2])
        client.put(namespace, chain(6)[2:4], chain(6)[1])  # what each step of a prefill has computed
        client.put(namespace, chain(8)[4:], chain(6)[3])  # the last two are what the model said: nobody asked for them
        seen = observe(core, watching)
        assert (seen.asked, seen.found, told) == (6, 2, [4])
        assert accesses(core, watching) == 6

    def test_what_nobody_stores_is_told_of_again_after_a_while_and_is_not_asked_for(self) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        told: list[int] = []
        watching.missed = lambda _namespace, _keys, _at, count: told.append(count)
        for _ in range(2):
            client.match(namespace, chain(3))
            core.clock.advance((LATELY_S + 1) * SECOND)
        assert (told, observe(core, watching).asked) == ([3, 3], 0)

    @pytest.mark.parametrize("looks_up", [True, False])
    def test_what_a_lease_has_counted_counts_no_more(self, looks_up: bool) -> None:
        """As the adapter for transformers asks: a lookup, a lease of all, a lookup of what it is about to store."""
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        told: list[int] = []
        watching.missed = lambda _namespace, _keys, _at, count: told.append(count)
        client.put(namespace, chain(2))
        for keys in (chain(5), chain(7)):
            if looks_up:
                client.match(namespace, keys)
            if keys == chain(5):
                client.fetch(namespace, keys)
                core.store.leasing.account()
        client.put(namespace, chain(7)[2:], chain(7)[1])
        seen = observe(core, watching)
        assert (seen.asked, seen.found, told) == (5, 2, [3])

    def test_what_another_stores_meanwhile_and_what_comes_from_beyond_is_not_missed(self) -> None:
        core, watching = watched()
        client = core.client()
        namespace = client.open()
        client.match(namespace, chain(4))
        watching.reserved(namespace, words(chain(4)), 0, 2, np.zeros(2, dtype=np.uint32), by_client=False)
        grants = np.array([Grant.KNOWN, Grant.PENDING, Grant.GRANTED, Grant.FULL], dtype=np.uint32)
        watching.reserved(namespace, words(chain(4)), 0, 4, grants)
        assert observe(core, watching).asked == 2, "those that are new, and the one that there was no room for"

    def test_every_rank_misses_what_one_of_them_lacks(self) -> None:
        core, watching = watched()
        client = core.client()
        ranks = [client.open(model=f"rank {number}") for number in range(3)]
        client.put(ranks[2], chain(4)[:1])
        assert client.match_all(ranks, chain(4)) == 0
        for rank in ranks:
            client.put(rank, chain(4))
        assert observe(core, watching).asked == 4 + 4 + 3

    def test_shadows_miss_what_lookups_missed(self) -> None:
        core, watching = watched(limits=Limits(first_rate=1.0, accesses_per_s=1 << 30))
        watching.shadows._threshold = threshold_of(1.0)  # plays every key
        for shadow in watching.shadows.shadows:
            shadow.scale(1.0)
        client = core.client()
        namespace = client.open()
        for number in range(20):
            client.match(namespace, chain(16, number))
            client.put(namespace, chain(16, number))
            client.match(namespace, chain(16, number))
            client.fetch(namespace, chain(16, number))
            take_in(core, watching)
        shares = [report.hit.share for report in observe(core, watching).shadows]
        assert shares == pytest.approx([0.5] * len(shares), abs=0.1)


class TestBounds:
    def test_switched_off_nothing_is_watched_and_nothing_is_due(self) -> None:
        core = Core()
        off = Watching(core.store.tables, core.clock, FakeRandomness(3), 4 * MIB, core.store.tenants, on=False)
        on = Watching(core.store.tables, core.clock, FakeRandomness(3), 4 * MIB, core.store.tenants, limits=ALL)
        namespace = core.client().open()
        for watching in (off, on):
            watching.asked(namespace, words(chain(9)), 0, 9, 0)
        assert (off.curves.tap.waiting, off.next_ns()) == (0, None)
        assert not observe(core, off).watched
        assert on.curves.tap.waiting == 9

    def test_tenants_beyond_the_bound_are_said_not_to_be_observed(self) -> None:
        core, watching = watched(tenants=2)
        for name in ("a", "b", "c"):
            client = core.client(name)
            client.fetch(client.open(), chain(4, name))
        take_in(core, watching)
        assert [observe(core, watching, name).watched for name in ("a", "b", "c")] == [True, True, False]
        assert accesses(core, watching) == 8

    def test_64_tenants_and_all_shadows_fit_into_64_mib(self) -> None:
        core = Core(arenas=64)
        watching = Watching(core.store.tables, core.clock, FakeRandomness(3), 1 << 40, core.store.tenants)
        for number in range(TENANTS):
            namespace = core.client(f"t{number}").open()
            watching.asked(namespace, frame(number), 0, KEYS_PER_FRAME, 0)
            take_in(core, watching)
        assert max(shadow.rule.held_bytes for shadow in watching.shadows.shadows) > MIB / 2  # they have begun
        assert all(shadow.rule.blocks <= SHADOW_BLOCKS for shadow in watching.shadows.shadows)
        watching.matched(namespace, frame(TENANTS), 0, KEYS_PER_FRAME)
        assert 32 * MIB < watching.held_bytes <= 64 * MIB

    def test_a_tick_takes_in_one_slice_and_says_that_there_is_more(self) -> None:
        core, watching = watched()
        namespace = core.client().open()
        for number in range(4):
            watching.asked(namespace, frame(number), 0, KEYS_PER_FRAME, 0)
        assert watching.curves.tap.waiting == TAKE_AT
        assert watching.next_ns() == 0  # enough wait: at once
        left = [TAKE_AT]
        while watching.next_ns() == 0:
            watching.tick(core.clock.ns)
            left.append(watching.curves.tap.waiting)
        assert max(before - after for before, after in pairwise(left)) <= SLICE + KEYS_PER_FRAME
        assert left[-1] == 0
        assert len(left) > 4
        assert watching.next_ns() is None  # and an idle store is left alone

    def test_a_few_accesses_wait_for_a_second(self) -> None:
        core, watching = watched()
        namespace = core.client().open()
        watching.asked(namespace, words(chain(2)), 0, 2, 0)
        due_ns = watching.next_ns()
        assert due_ns == core.clock.ns + SECOND
        watching.tick(due_ns - 1)
        assert watching.curves.tap.waiting == 2
        watching.tick(due_ns)
        assert watching.curves.tap.waiting == 0

    def test_the_store_asks_for_its_own_ticks(self) -> None:
        core = Core()
        client = core.client()
        namespace = client.open()
        for number in range(40):
            client.fetch(namespace, chain(16, number))
        waiting = core.store.watching.curves.tap.waiting
        assert waiting > 0
        assert core.store.next_tick_ns() is not None
        core.pass_time(SECOND)
        for _ in range(20):
            core.store.tick()
        assert core.store.watching.curves.tap.waiting == 0


class TestSlices:
    def test_taken_in_slices_is_what_is_taken_at_once_and_runs_stay_whole(self) -> None:
        taps = [Tap(list(range(1, SEED_WORDS + 1)), 2) for _ in range(2)]
        keys = frame(7)
        for tap in taps:
            tap.open(1, 1, MIB)
            tap.set_threshold(1, threshold_of(0.5))
            for number in range(40):
                sample(keys, 4 * 25 * number, 25, 1, 0, 0, tap.words)
        at_once = taps[0].take()
        parts = list(self.slices(taps[1], 30))
        assert len(parts) > 8
        together = np.concatenate(parts)
        said = [name for name in ACCESS.names or () if name != "pad"]
        assert len(said) == 6
        assert all((together[name] == at_once[name]).all() for name in said)
        runs = [set(part["run"].tolist()) for part in parts]
        assert not any(one & other for one, other in pairwise(runs))
        assert max(part.size for part in parts) > 30  # or no slice ever ended in the middle of a run

    @staticmethod
    def slices(tap: Tap, most: int) -> Iterator[Rows]:
        while tap.waiting:
            yield tap.take(most)


def played(trial: Trial, keys: list[list[int]], pages: int = 1) -> list[list[int]]:
    """Whether each key of each run was there."""
    found = []
    for second, run in enumerate(keys):
        rows: Rows = np.zeros(len(run), dtype=ACCESS)
        rows["hash"], rows["pages"], rows["run"], rows["cost_s"] = run, pages, second, 0.1
        hits: U1 = np.zeros(len(run), dtype=np.uint8)
        trial.play(rows, hits, (1000 + second) * SECOND)
        found.append(hits.tolist())
    return found


class TestTrials:
    ROOM = 50

    def trial(self, rule: Rule) -> Trial:
        trial = Trial(rule)
        trial.resize(self.ROOM)
        return trial

    def test_lru_of_the_engine_hits_where_lru_does(self) -> None:
        drawn = (np.random.default_rng(5).zipf(1.2, 3000) % 400 + 1).tolist()
        cache: OrderedDict[int, None] = OrderedDict()
        expected = []
        for key in drawn:
            expected.append([int(key in cache)])
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > self.ROOM:
                cache.popitem(last=False)
        assert played(self.trial(Rule.LRU), [[key] for key in drawn]) == expected
        assert 0.2 < np.mean(expected) < 0.9

    def test_rules_differ_where_they_should(self) -> None:
        """Some keys come twice and again much later; a flood of others between is longer than the cache."""
        fresh = count(1000)
        runs = []
        for _ in range(20):
            runs += [[key] for key in range(1, 11) for _ in range(2)]
            runs += [[next(fresh)] for _ in range(60)]
        hits = {rule: sum(map(sum, played(self.trial(rule), runs))) for rule in TRIED}
        assert hits[Rule.SECOND_TOUCH] > hits[Rule.LRU] + 100
        assert hits[Rule.PGDSF] > hits[Rule.LRU] + 100

    def test_a_run_is_a_chain_and_its_end_goes_first(self) -> None:
        trial = self.trial(Rule.LRU)
        first = list(range(1, 41))
        played(trial, [first, list(range(101, 121))])
        assert played(trial, [first])[0] == [1] * 30 + [0] * 10

    def test_what_was_stored_already_is_not_used_by_being_stored(self) -> None:
        trial = self.trial(Rule.SECOND_TOUCH)
        rows: Rows = np.zeros(1, dtype=ACCESS)
        rows["hash"], rows["pages"] = 5, 1
        hits: U1 = np.zeros(1, dtype=np.uint8)
        for stored in (0, 1):
            rows["stored"], rows["run"] = stored, stored
            trial.play(rows, hits, 10**12)
        flood = [[key] for key in range(1000, 1100)]
        assert played(trial, [*flood, [5]])[-1] == [0]  # used once: it went with the flood

    def test_larger_blocks_make_the_cache_one_of_fewer(self) -> None:
        trial = self.trial(Rule.LRU)
        played(trial, [[key] for key in range(1, 101)], pages=5)
        assert trial.blocks == trial.capacity_blocks == self.ROOM // 5

    def test_a_shadow_of_the_real_size_does_as_the_store_did(self) -> None:
        core, watching = watched(arenas=4, limits=Limits(first_rate=1.0, accesses_per_s=1 << 30))
        watching.shadows._threshold = threshold_of(1.0)  # plays every key
        watching.shadows.accesses_per_s = 1 << 30
        for shadow in watching.shadows.shadows:
            shadow.scale(1.0)
        core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.SECOND_TOUCH))
        client = core.client()
        namespace = client.open()
        generator = np.random.default_rng(8)
        for key in (generator.zipf(1.3, 4000) % 300).tolist():
            core.clock.advance(SECOND)
            client.fetch(namespace, [key_of(key)])
            core.store.leasing.account()
            client.put(namespace, [key_of(key)])
            core.store.tick()
            watching.tick(core.clock.ns)
        take_in(core, watching)
        seen = observe(core, watching)
        shares = {report.rule: report.hit.share for report in seen.shadows}
        assert shares["second_touch"] == pytest.approx(seen.found / seen.asked, abs=0.02)
        assert shares["lru"] < shares["second_touch"] - 0.01


def test_what_comes_in_plenty_while_shadows_play_is_taken_in_at_once() -> None:
    core = Core()
    watching = core.store.watching
    namespace = core.client().open()
    for number in range(40):  # a few for shadows to play
        watching.asked(namespace, frame(number), 0, KEYS_PER_FRAME, 0)
        watching.tick(core.clock.ns + SECOND)
        if watching.next_ns() == 0:
            break
    for number in range(100, 200):
        watching.asked(namespace, frame(number), 0, KEYS_PER_FRAME, 0)
        if watching.curves.due:
            break
    assert watching.curves.due
    while watching.next_ns() == 0:
        watching.tick(core.clock.ns + SECOND)
    assert watching.curves.tap.waiting == 0
