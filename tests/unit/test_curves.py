"""Curves from one key in a hundred against caches that really ran; bounds on memory and work; fading."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from kvproto.limits import GIB, KEYS_PER_FRAME, MIB, PAGE_BYTES
from kvstore.blocks import U4, U8, Number, compiled
from kvstore.insight import stack as stacks
from kvstore.insight import tap as taps
from kvstore.insight.curves import SECOND_NS, Curve, Curves, Limits
from kvstore.insight.tap import TAKE_AT, sample

SEED = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89, 0x452821E638D01377)
POINT = 0.01
KEYS = 100_000


@cache
def all_keys(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """As many as any test wants, four words each."""
    return np.random.default_rng(seed).integers(0, 1 << 63, (KEYS, 4), dtype=np.uint64)


def words(numbers: Sequence[int] | U4, seed: int = 0) -> U8:
    """The keys of these numbers, one after another."""
    return np.ascontiguousarray(all_keys(seed)[numbers]).reshape(-1)


@compiled
def _sample_runs(keys: U8, at: Number, run: Number, namespace: Number, tap: U8) -> Number:
    """Runs until enough wait; where it stopped."""
    while at < keys.size and np.int64(tap[taps.WAITING]) < TAKE_AT:
        sample(keys, at, min(run, (keys.size - at) // 4), namespace, 0, 0, tap)
        at += 4 * run
    return at


def follow(keys: U8, curves: Curves, *, run: int = 1, namespace: int = 1) -> None:
    """Let keys pass in runs."""
    at = 0
    while at < keys.size:
        at = _sample_runs(keys, at, run, namespace, curves.tap.words)
        curves.drain(0)


def at_rate(rate: float, *, keys: int = 1 << 13, slot_bytes: int = PAGE_BYTES) -> Curves:
    """Curves with one open namespace and no bound on work."""
    curves = Curves(SEED, 2, 0, Limits(keys=keys, first_rate=rate, accesses_per_s=1 << 40))
    curves.open(1, 1, slot_bytes)
    return curves


def lru_hits(numbers: U4, capacity: int) -> float:
    """Hit share of a cache that really holds so many keys."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in numbers.tolist():
        if number in cache:
            hits += 1
            cache.move_to_end(number)
        else:
            cache[number] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    return hits / numbers.size


def zipf(count: int, keys: int = 100_000, seed: int = 1) -> U4:
    """Numbers of keys by popularity 1/rank."""
    shares = 1 / np.arange(1, keys + 1)
    drawn: U4 = np.random.default_rng(seed).choice(keys, count, p=shares / shares.sum()).astype(np.uint32)
    return drawn


def loop(count: int, keys: int = 50_000) -> U4:
    """All keys in turn, again and again: LRU has all or nothing of it."""
    return (np.arange(count) % keys).astype(np.uint32)


SIZES = (1000, 3000, 8000, 16_000, 32_000, 70_000)


def errors(curve: Curve, true: list[float]) -> list[float]:
    """How far a curve is from what caches of `SIZES` really answered."""
    return [abs(curve.hit(size * PAGE_BYTES).share - share) for size, share in zip(SIZES, true, strict=True)]


@pytest.mark.parametrize("numbers", [zipf(120_000), loop(120_000)], ids=["zipf", "loop"])
def test_one_key_in_a_hundred_gives_the_curve_within_two_points(numbers: U4) -> None:
    true = [lru_hits(numbers, size) for size in SIZES]
    found: list[float] = []
    for seed in range(8):
        curves = at_rate(0.01)
        follow(words(numbers, seed), curves)
        curve = curves.curve(0, SECOND_NS)
        found += errors(curve, true)
        assert curve.keys < 900
        assert curve.accesses == numbers.size
    assert np.mean(found) <= 2 * POINT, found


def test_the_order_of_accesses_makes_the_curve_and_not_their_number() -> None:
    numbers = loop(120_000)
    mixed = np.random.default_rng(3).permutation(numbers)
    curves = at_rate(0.05)
    follow(words(mixed), curves)
    curve = curves.curve(0, SECOND_NS)
    assert np.mean(errors(curve, [lru_hits(mixed, size) for size in SIZES])) <= 2 * POINT
    other = errors(curve, [lru_hits(numbers, size) for size in SIZES])
    assert np.mean(other) > 10 * POINT, "the same keys equally often, and another curve"


def test_at_the_full_rate_a_distance_is_exact_to_a_sixteenth_of_an_octave() -> None:
    numbers = zipf(20_000, keys=3000)
    curves = at_rate(1.0, keys=1 << 12)
    follow(words(numbers), curves)
    curve = curves.curve(0, SECOND_NS)
    for size in (50, 200, 1000):
        low, high = (lru_hits(numbers, int(size * factor)) for factor in (0.95, 1.05))
        assert low <= curve.hit(size * PAGE_BYTES).share <= high
    assert curve.hit_ceiling.share == pytest.approx(1 - len(set(numbers.tolist())) / numbers.size)


def test_a_bounded_memory_lowers_the_rate_and_keeps_the_curve() -> None:
    numbers = zipf(120_000)
    curves = at_rate(0.25, keys=1 << 9)
    follow(words(numbers), curves)
    curve = curves.curve(0, SECOND_NS)
    assert curve.keys <= 1 << 9
    assert curve.rate < 0.015
    assert np.mean(errors(curve, [lru_hits(numbers, size) for size in SIZES])) <= 2 * POINT
    assert int(curves.tap.words[8 + 4]) == int(curves._streams[1].stack.words[stacks.THRESHOLD]), "the tap samples on"


def test_the_standard_error_covers_what_really_went_wrong() -> None:
    numbers = zipf(100_000, keys=50_000)
    true = {size: lru_hits(numbers, size) for size in (1000, 4000, 16_000)}
    distances = []
    for seed in range(20):
        curves = at_rate(0.01)
        follow(words(numbers, seed), curves)
        curve = curves.curve(0, SECOND_NS)
        for size, share in true.items():
            estimate = curve.hit(size * PAGE_BYTES)
            distances.append((estimate.share - share) / estimate.error)
    assert np.mean(np.abs(distances) > 2) <= 0.1, "one in twenty would be expected"
    assert 0.7 < np.std(distances) < 1.3, "neither too bold nor too shy"


def test_blocks_of_two_sizes_share_one_curve_in_bytes() -> None:
    numbers = zipf(60_000, keys=20_000)
    large = numbers % 2 == 1
    curves = at_rate(0.05)
    curves.open(2, 2, 4 * PAGE_BYTES)
    keys = words(numbers)
    for i in range(numbers.size):
        sample(keys, 4 * i, 1, 2 if large[i] else 1, 0, 0, curves.tap.words)
        if curves.due:
            curves.drain(0)
    curves.drain(0)
    curve = curves.curve(0, SECOND_NS)
    for capacity in (2000, 8000, 20_000):
        cache: OrderedDict[int, int] = OrderedDict()
        hits = used = 0
        for number in numbers.tolist():
            hits += number in cache
            used += (4 if number % 2 else 1) - cache.pop(number, 0)
            cache[number] = 4 if number % 2 else 1
            while used > capacity:
                used -= cache.popitem(last=False)[1]
        assert curve.hit(capacity * PAGE_BYTES).share == pytest.approx(hits / numbers.size, abs=2.5 * POINT)
    assert curves.curve(1, SECOND_NS).accesses + curves.curve(2, SECOND_NS).accesses == numbers.size


def test_of_one_chain_a_small_cache_keeps_the_beginning() -> None:
    curves = at_rate(1.0)
    follow(words(range(100)), curves, run=100)
    follow(words(range(100)), curves, run=100)
    half = curves.curve(0, SECOND_NS).hit(50.5 * PAGE_BYTES).share
    assert half == pytest.approx(0.25, abs=0.01), "LRU key by key would have none of it"


def test_what_is_stored_is_used_and_is_neither_hit_nor_miss() -> None:
    curves = at_rate(1.0)
    keys = words(range(10))
    sample(keys, 0, 10, 1, 0, 1, curves.tap.words)
    sample(keys, 0, 10, 1, 0, 0, curves.tap.words)
    curves.drain(0)
    curve = curves.curve(1, SECOND_NS)
    assert (curve.accesses, curve.hit_ceiling.share) == (10, 1.0)


def test_cost_counts_by_position_and_has_its_own_curve() -> None:
    curves = at_rate(1.0)
    curves.tap.price(1, 1.0, 0.5)
    keys = words(range(30))
    sample(keys, 0, 10, 1, 0, 0, curves.tap.words)  # 1.0 to 5.5 s: 32.5 s
    sample(keys, 0, 10, 1, 0, 0, curves.tap.words)
    sample(keys, 40, 10, 1, 10, 0, curves.tap.words)  # 6.0 to 10.5 s: 82.5 s, never seen before
    curves.drain(0)
    curve = curves.curve(0, 10 * SECOND_NS)
    assert curve.cost_s == pytest.approx(147.5)
    assert curve.cost_s_per_s == pytest.approx(14.75)
    assert curve.hit_ceiling.share == pytest.approx(1 / 3)
    assert curve.save_ceiling.share == pytest.approx(32.5 / 147.5)


def test_the_same_key_in_another_namespace_is_another_block() -> None:
    curves = at_rate(1.0)
    curves.open(2, 1, PAGE_BYTES)
    keys = words(range(50))
    for namespace in (1, 2):
        sample(keys, 0, 50, namespace, 0, 0, curves.tap.words)
    curves.drain(0)
    assert curves.curve(1, SECOND_NS).hit_ceiling.share == 0.0


def test_what_is_not_open_costs_nothing_and_is_not_counted() -> None:
    curves = at_rate(1.0)
    keys = words(range(50))
    assert sample(keys, 0, 50, 7, 0, 0, curves.tap.words) == 0
    curves.tap.close(1)
    curves.tap.set_threshold(0, taps.threshold_of(1.0))
    assert sample(keys, 0, 50, 1, 0, 0, curves.tap.words) == 0
    curves.drain(0)
    assert curves.curve(0, SECOND_NS).accesses == 0


def test_more_work_than_allowed_halves_the_rate_of_the_busiest_stream() -> None:
    curves = Curves(SEED, 2, 0, Limits(first_rate=0.5, accesses_per_s=1000))
    curves.open(1, 1, PAGE_BYTES)
    curves.open(2, 2, PAGE_BYTES)
    for _ in range(40):
        sample(words(range(1000)), 0, 1000, 1, 0, 0, curves.tap.words)
        curves.drain(1)
    sample(words(range(10)), 0, 10, 2, 0, 0, curves.tap.words)
    curves.drain(1)
    assert curves.curve(0, 1).rate < 0.05
    assert curves.curve(1, 1).rate < 0.05
    assert curves.curve(2, 1).rate == 0.5, "another tenant's curve pays nothing"


def test_a_frame_that_finds_no_room_to_wait_is_counted_as_lost() -> None:
    curves = at_rate(1.0)
    keys = words(range(KEYS_PER_FRAME))
    for _ in range(9):
        waiting = sample(keys, 0, KEYS_PER_FRAME, 1, 0, 0, curves.tap.words)
    assert waiting == taps.WAITING_MOST >= TAKE_AT
    assert curves.tap.lost == KEYS_PER_FRAME
    drained = curves.drain(0)
    assert (drained.accesses.size, drained.passed) == (taps.WAITING_MOST, 9 * KEYS_PER_FRAME)
    assert curves.curve(0, 1).accesses == 9 * KEYS_PER_FRAME


def test_the_curve_follows_the_last_hours() -> None:
    limits = Limits(first_rate=1.0, half_life_s=3600.0, accesses_per_s=1 << 40)
    curves = Curves(SEED, 1, 0, limits)
    curves.open(1, 1, PAGE_BYTES)
    new = iter(range(100, KEYS))
    for minute in range(1, 601):
        numbers = list(range(50)) if minute <= 300 else [next(new) for _ in range(50)]
        sample(words(numbers), 0, 50, 1, 0, 0, curves.tap.words)
        curves.drain(minute * 60 * SECOND_NS)
        if minute == 300:
            assert curves.curve(0, minute * 60 * SECOND_NS).hit_ceiling.share > 0.99
    curve = curves.curve(0, 600 * 60 * SECOND_NS)
    assert curve.hit_ceiling.share < 0.05, "five half-lives later"
    assert curve.accesses / curve.span_s == pytest.approx(50 / 60, rel=0.05)


@pytest.mark.parametrize("idle_s", [0, 5 * 3600])
def test_a_stream_spans_what_has_passed_since_its_own_first_access(idle_s: int) -> None:
    curves = Curves(SEED, 2, 0, Limits(first_rate=1.0))
    curves.open(1, 1, PAGE_BYTES)
    curves.tap.price(1, 0.5, 0.0)
    for second in range(121):
        if second == 60:
            curves.open(2, 2, PAGE_BYTES)
        for namespace in (1, 2)[: 1 + (second >= 60)]:
            sample(words(range(8 * second, 8 * second + 8)), 0, 8, namespace, 0, 0, curves.tap.words)
        curves.drain((idle_s + second) * SECOND_NS)
    spans = [curves.curve(stream, (idle_s + 120) * SECOND_NS).span_s for stream in (0, 1, 2)]
    assert spans == pytest.approx([120, 120, 60], rel=0.01)
    assert curves.curve(1, (idle_s + 120) * SECOND_NS).cost_s_per_s == pytest.approx(8 * 0.5, rel=0.02)


def test_what_comes_after_an_idle_time_has_not_faded_with_it() -> None:
    limits = Limits(first_rate=1.0, half_life_s=3600.0)
    curves = Curves(SEED, 1, 0, limits)
    curves.open(1, 1, PAGE_BYTES)
    for second in (0, 10 * 3600):
        sample(words(range(1000)), 0, 1000, 1, 0, 0, curves.tap.words)
        curves.drain(second * SECOND_NS)
    assert curves.curve(1, 36_000 * SECOND_NS).accesses == pytest.approx(1000, rel=0.01)
    assert curves.curve(1, 36_000 * SECOND_NS).hit_ceiling.share == pytest.approx(1.0, abs=0.01), "the first were new"


def test_what_was_not_used_for_too_long_is_forgotten_before_the_rate_falls() -> None:
    limits = Limits(keys=256, keys_per_tenant=256, first_rate=1.0, memory_s=100.0, accesses_per_s=1 << 40)
    curves = Curves(SEED, 1, 0, limits)
    curves.open(1, 1, PAGE_BYTES)
    for second in range(1000):
        sample(words([second]), 0, 1, 1, 0, 0, curves.tap.words)
        curves.drain(second * SECOND_NS)
    curve = curves.curve(0, 1000 * SECOND_NS)
    assert curve.rate == pytest.approx(1.0)
    assert curve.keys <= 256


def test_positions_fill_up_and_are_numbered_anew_without_a_trace() -> None:
    small, large = at_rate(1.0, keys=256), at_rate(1.0, keys=1 << 13)
    numbers = zipf(10_000, keys=250)
    for curves in (small, large):
        follow(words(numbers), curves)
    one, other = small.curve(0, 1), large.curve(0, 1)
    assert one.rate == other.rate
    assert np.array_equal(one.hits, other.hits)


def test_memory_stays_within_64_mib_with_all_tenants() -> None:
    limits = Limits()
    curves = Curves(SEED, 64, 0, limits)
    for tenant in range(1, 65):
        curves.open(tenant, tenant, MIB)
    assert curves.held_bytes <= 64 * MIB
    assert curves.held_bytes == pytest.approx(limits.held_bytes(64) + curves.tap.held_bytes, rel=0.001)


def test_a_curve_of_nothing_says_so() -> None:
    curve = at_rate(0.01).curve(0, SECOND_NS)
    assert curve.hit(GIB).error == 1.0
    assert curve.cost_s_per_s == 0.0
    assert curve.points() == [(PAGE_BYTES, 0.0, 0.0)]
