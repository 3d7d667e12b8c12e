"""Shadow caches against caches that really ran: scaled down, bounded in work, and the same keys for every rule."""

from collections import OrderedDict

import numpy as np
import pytest

from kvproto.limits import PAGE_BYTES
from kvstore.blocks import U1, U4, Rows
from kvstore.insight.curves import LEAST_THRESHOLD, SECOND_NS, Drained
from kvstore.insight.shadow import Lru, Shadows
from kvstore.insight.tap import ACCESS

RNG_SEED = 4
KEYS = 40_000
SIZE = 8000


class Newest(Lru):
    """A bad rule: what came last goes first."""

    @property
    def name(self) -> str:
        """For reports."""
        return "newest"

    def _evict(self) -> None:
        while self._used_pages > self._capacity_pages:
            self._used_pages -= self._order.popitem(last=True)[1]


def accesses_of(numbers: U4, rate: float = 1.0, *, cost_s: float = 0.1) -> Rows:
    """Accesses of one key each, as a tap of this rate gives them."""
    hashes = np.random.default_rng(RNG_SEED).integers(0, 1 << 64, KEYS, dtype=np.uint64)
    rows: Rows = np.zeros(numbers.size, dtype=ACCESS)
    rows["hash"], rows["cost_s"], rows["pages"] = hashes[numbers], cost_s, 1
    rows["run"] = np.arange(numbers.size)
    return rows[rows["hash"] < np.uint64(rate * 2.0**64 - 1)] if rate < 1 else rows


def drifting(count: int) -> U4:
    """Numbers of keys by popularity, which one gains when another loses it."""
    shares = 1 / (20 + np.arange(KEYS))
    drawn = np.random.default_rng(RNG_SEED).choice(KEYS, count, p=shares / shares.sum())
    numbers: U4 = ((drawn + np.arange(count) // 4) % KEYS).astype(np.uint32)
    return numbers


def really(numbers: U4, *, newest: bool = False) -> float:
    """Hit share of a whole cache of `SIZE` keys."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in numbers.tolist():
        hits += number in cache
        cache[number] = None
        cache.move_to_end(number)
        if len(cache) > SIZE:
            cache.popitem(last=newest)
    return hits / numbers.size


def test_one_key_in_twenty_tells_two_rules_apart_and_gives_both_their_hit_shares() -> None:
    numbers = drifting(100_000)
    shadows = Shadows([Lru, Newest], [SIZE * PAGE_BYTES], 0, first_rate=0.05, accesses_per_s=1 << 40)
    shadows.play(Drained(accesses_of(numbers, 0.2), 0.2, numbers.size, 0.1 * numbers.size), 0)
    lru, newest = shadows.reports()
    assert (lru.rule, newest.rule) == ("lru", "newest")
    assert lru.hit.share == pytest.approx(really(numbers), abs=0.02)
    assert newest.hit.share == pytest.approx(really(numbers, newest=True), abs=0.02)
    assert lru.save.share == pytest.approx(lru.hit.share, abs=1e-6), "every block costs the same here"
    gain = shadows.gain(1, 0)
    assert gain.share == pytest.approx(lru.save.share - newest.save.share)
    assert gain.share > 4 * gain.error
    assert lru.blocks == SIZE * 0.05


def test_a_larger_shadow_of_lru_never_hits_less() -> None:
    numbers = drifting(20_000)
    sizes = [size * PAGE_BYTES for size in (100, 1000, 10_000)]
    shadows = Shadows([Lru], sizes, 0, first_rate=0.25, accesses_per_s=1 << 40)
    shadows.play(Drained(accesses_of(numbers), 1.0, numbers.size, 0.0), 0)
    shares = [report.hit.share for report in shadows.reports()]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < shares[2]


def test_more_accesses_than_allowed_halve_the_keys_and_the_size_with_them() -> None:
    numbers = drifting(20_000)
    shadows = Shadows([Lru], [SIZE * PAGE_BYTES], 0, first_rate=0.5, accesses_per_s=500)
    rows = accesses_of(numbers)
    for part in range(20):
        now_ns = part * SECOND_NS
        shadows.play(Drained(rows[1000 * part : 1000 * (part + 1)], 1.0, 1000, 100.0), now_ns)
    assert shadows.rate < 0.5
    assert shadows.reports()[0].blocks <= SIZE * shadows.rate
    assert shadows.reports()[0].hit.share == pytest.approx(really(numbers), abs=0.06)


@pytest.mark.parametrize("first_rate", [1.0, LEAST_THRESHOLD / 2.0**64])
@pytest.mark.parametrize("blocks", [2, 1 << 16], ids=["few", "more than a shadow may have"])
def test_one_key_that_is_asked_for_over_and_over_is_played_no_more_often_than_allowed(
    monkeypatch: pytest.MonkeyPatch, first_rate: float, blocks: int
) -> None:
    turns = 0
    tighten = Shadows._tighten

    def counted(self: Shadows, threshold: int) -> None:
        nonlocal turns
        turns += 1
        assert turns < 1000, "the keys are thinned out for ever"
        tighten(self, threshold)

    monkeypatch.setattr(Shadows, "_tighten", counted)
    rows: Rows = np.zeros(5000, dtype=ACCESS)  # of a hash that no share of the keys leaves out
    rows["pages"], rows["run"] = 1, np.arange(rows.size)
    capacity_bytes = blocks * PAGE_BYTES * (2**64 // LEAST_THRESHOLD)  # so that so many are left with the fewest keys
    shadows = Shadows([Lru], [capacity_bytes], 0, first_rate=first_rate, accesses_per_s=100)
    for part in range(10):
        shadows.add(Drained(rows, 1.0, rows.size, 100.0), part)
        assert part == 0 or shadows.waiting == 100
        while shadows.step(part):
            pass
        assert shadows.waiting == 0
        shadows.shadows[0].rule.play(rows[:1], np.zeros(1, dtype=np.uint8), part)  # so that none begins anew
    assert shadows.reports()[0].blocks == 1


def test_shadows_never_play_keys_that_their_source_no_longer_samples() -> None:
    shadows = Shadows([Lru], [SIZE * PAGE_BYTES], 0, first_rate=0.5)
    shadows.play(Drained(accesses_of(drifting(100), 0.1), 0.1, 100, 0.0), 0)
    assert shadows.rate == pytest.approx(0.1)


def test_the_past_fades() -> None:
    shadows = Shadows([Lru], [SIZE * PAGE_BYTES], 0, first_rate=1.0, accesses_per_s=1 << 40, half_life_s=60.0)
    shadows.play(Drained(accesses_of(np.arange(1000, dtype=np.uint32)), 1.0, 1000, 100.0), 0)
    assert shadows.reports()[0].hit.share == 0.0
    again = Drained(accesses_of(np.zeros(1000, dtype=np.uint32)), 1.0, 1000, 100.0)
    for minute in range(1, 11):
        shadows.play(again, minute * 60 * SECOND_NS)
    assert shadows.reports()[0].hit.share > 0.99


def test_lookups_of_a_run_come_before_its_uses_and_what_is_stored_is_no_miss() -> None:
    rows = accesses_of(np.array([1, 2, 3, 1, 2, 3], dtype=np.uint32))
    rows["run"] = [0, 0, 0, 1, 1, 1]
    rows["stored"][:3] = 1
    lru = Lru()
    lru.resize(2)
    hits: U1 = np.zeros(6, dtype=np.uint8)
    lru.play(rows, hits, 0)
    assert hits[3:].tolist() == [1, 1, 0], "the end of the chain went first"
    shadows = Shadows([Lru], [2 * PAGE_BYTES], 0, first_rate=1.0)
    shadows.play(Drained(rows, 1.0, 3, 0.3), 0)
    assert shadows.reports()[0].hit.share == pytest.approx(2 / 3)


def test_shadows_of_nothing_claim_nothing() -> None:
    report = Shadows([Lru], [PAGE_BYTES], 0).reports()[0]
    assert (report.hit.share, report.hit.error, report.blocks) == (0.0, 1.0, 0)
