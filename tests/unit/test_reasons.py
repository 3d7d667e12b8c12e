"""Why keys are gone: what was noted is found, what was not is not, and a full table forgets the oldest first."""

import numpy as np
import pytest

from kvstore.blocks import U8
from kvstore.insight import reasons
from kvstore.insight.reasons import STEP_NS, Cause, Departure, Place, cause_word, departure, sentence, words_for

SEED = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89, 0x452821E638D01377)
START_NS = 1000 * STEP_NS
MINUTE_NS = 60 * 10**9
Keys = np.ndarray[tuple[int, int], np.dtype[np.uint64]]


def table_of(entries: int, *, cold: bool = True) -> U8:
    """A new table."""
    table: U8 = np.zeros(words_for(entries), dtype=np.uint64)
    reasons.begin(table, SEED, START_NS, cold=cold)
    return table


def keys_of(count: int, seed: int = 0) -> Keys:
    """Keys of four words."""
    return np.random.default_rng(seed).integers(0, 1 << 64, (count, 4), dtype=np.uint64)


def note(table: U8, key: U8, word: int, now_ns: int, namespace: int = 1) -> None:
    """`reasons.note` of a whole key."""
    reasons.note(table, key[0], key[1], key[2], key[3], namespace, word, now_ns)


@pytest.mark.parametrize("cause", [cause for cause in Cause if cause is not Cause.NEVER])
@pytest.mark.parametrize("place", list(Place))
def test_what_was_noted_is_found_with_cause_tier_rule_and_time(cause: Cause, place: Place) -> None:
    table, (key,) = table_of(100), keys_of(1)
    note(table, key, cause_word(cause, place, 31), START_NS + 3 * MINUTE_NS)
    found = departure(table, key, 1, START_NS + 13 * MINUTE_NS)
    assert (found.cause, found.place, found.rule) == (cause, place, 31)
    assert found.age_s == pytest.approx(600, abs=STEP_NS / 1e9)
    assert not found.whole_life
    assert reasons.noted(table) == 1


def test_the_last_departure_of_a_key_counts_and_takes_one_entry() -> None:
    table, keys = table_of(8), keys_of(9)
    for second in range(20):
        note(table, keys[0], cause_word(Cause.EVICTED, Place.DRAM), START_NS + second * STEP_NS)
    note(table, keys[0], cause_word(Cause.DELETED), START_NS + 20 * STEP_NS)
    for key in keys[1:8]:
        note(table, key, cause_word(Cause.EVICTED), START_NS + 20 * STEP_NS)
    assert departure(table, keys[0], 1, START_NS + 20 * STEP_NS).cause is Cause.DELETED
    assert [departure(table, key, 1, START_NS + 20 * STEP_NS).cause for key in keys[1:8]] == [Cause.EVICTED] * 7


def test_the_same_key_of_another_namespace_is_not_meant() -> None:
    table, (key,) = table_of(100), keys_of(1)
    note(table, key, cause_word(Cause.QUOTA), START_NS, namespace=1)
    assert departure(table, key, 2, START_NS).cause is Cause.NEVER


def test_a_key_that_never_was_is_not_there_since_the_store_was_empty() -> None:
    table, keys = table_of(100), keys_of(2)
    note(table, keys[0], cause_word(Cause.EVICTED), START_NS)
    found = departure(table, keys[1], 1, START_NS + 100 * STEP_NS)
    assert (found.cause, found.place, found.whole_life) == (Cause.NEVER, Place.NONE, True)
    assert found.age_s == pytest.approx(100 * STEP_NS / 1e9)
    assert not departure(table_of(100, cold=False), keys[1], 1, START_NS).whole_life


def test_a_full_set_forgets_the_oldest_and_says_how_far_it_reaches_back() -> None:
    table, keys = table_of(8), keys_of(20)
    for number, key in enumerate(keys):
        note(table, key, cause_word(Cause.EVICTED), START_NS + number * STEP_NS)
    now_ns = START_NS + 19 * STEP_NS
    causes = [departure(table, key, 1, now_ns).cause for key in keys]
    assert causes == [Cause.NEVER] * 12 + [Cause.EVICTED] * 8
    gone = departure(table, keys[0], 1, now_ns)
    assert gone.age_s == pytest.approx(7 * STEP_NS / 1e9)
    assert not gone.whole_life, "it may have left before that"


def test_the_age_is_right_when_time_comes_round() -> None:
    table, keys = table_of(8), keys_of(10)
    late_ns = (reasons.STEPS - 2) * STEP_NS
    for number, key in enumerate(keys):
        note(table, key, cause_word(Cause.EVICTED), late_ns + number * STEP_NS)
    now_ns = late_ns + 10 * STEP_NS
    assert [departure(table, key, 1, now_ns).cause for key in keys[:2]] == [Cause.NEVER] * 2
    ages = [departure(table, key, 1, now_ns).age_s for key in keys[2:]]
    assert ages == pytest.approx([(10 - number) * STEP_NS / 1e9 for number in range(2, 10)])


def test_of_four_times_as_many_entries_as_blocks_nearly_all_are_remembered_and_none_is_made_up() -> None:
    table, left, never = table_of(40_000), keys_of(20_000, 1), keys_of(20_000, 2)
    for key in left:
        note(table, key, cause_word(Cause.EVICTED, Place.DRAM, 2), START_NS)
    known = sum(departure(table, key, 1, START_NS).cause is Cause.EVICTED for key in left)
    assert known > 0.97 * len(left), "half full, eight to a set: few sets overflow"
    assert all(departure(table, key, 1, START_NS).cause is Cause.NEVER for key in never[:5000])


def test_keys_that_differ_in_one_bit_are_told_apart_wherever_it_is() -> None:
    table = table_of(4096)
    base = keys_of(1)[0]
    note(table, base, cause_word(Cause.CORRUPT), START_NS)
    for bit in range(256):
        other = base.copy()
        other[bit // 64] ^= np.uint64(1 << bit % 64)
        assert departure(table, other, 1, START_NS).cause is Cause.NEVER, bit


def test_a_table_that_was_kept_is_used_on_and_anything_else_is_not() -> None:
    table, (key,) = table_of(1000), keys_of(1)
    note(table, key, cause_word(Cause.CLEARED), START_NS)
    kept = np.frombuffer(table.tobytes(), dtype=np.uint64).copy()
    assert reasons.usable(kept)
    assert departure(kept, key, 1, START_NS).cause is Cause.CLEARED
    assert not reasons.usable(kept[:-8]), "of another size"
    assert not reasons.usable(np.zeros_like(kept))
    assert not reasons.usable(kept[:4])
    kept[0] += np.uint64(1)
    assert not reasons.usable(kept), "of another version"


def test_memory_is_eight_bytes_an_entry() -> None:
    assert 8 * words_for(4_000_000) == 32_000_128
    assert words_for(0) == words_for(8) == reasons.HEAD_WORDS + reasons.WAYS


def test_every_departure_has_a_sentence() -> None:
    rules = ("lru", "second_touch")
    evicted = Departure(Cause.EVICTED, Place.DRAM, 1, 720.0, whole_life=False)
    assert sentence(evicted, rules) == "evicted from DRAM by second_touch, 12 min ago"
    assert sentence(Departure(Cause.EVICTED, Place.DISK, 9, 3.0, whole_life=False), rules) == (
        "evicted from disk by rule 9, 9 s ago"
    )
    assert sentence(Departure(Cause.NEVER, Place.NONE, 0, 7200.0, whole_life=True), rules) == (
        "never stored since the daemon began with an empty store, 2.0 h ago (sure to 1 in 500 million)"
    )
    assert sentence(Departure(Cause.NEVER, Place.NONE, 0, 600.0, whole_life=False), rules) == (
        "not stored, or gone for more than 10 min: departures before that are forgotten"
    )
    for cause in set(Cause) - {Cause.NEVER, Cause.EVICTED}:
        for place in Place:
            assert sentence(Departure(cause, place, 0, 60.0, whole_life=False), rules).endswith("1 min ago")
