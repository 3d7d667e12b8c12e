"""Notes of what lookups did not find."""

import numpy as np

from kvproto.errors import Grant
from kvstore.blocks import U4, U8
from kvstore.insight.lookups import LATELY_S, NOTES, Lookups
from tests.core import chain, words

FACTORS: U8 = np.array([3, 5, 7, 11], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
NEW: U4 = np.full(1024, Grant.GRANTED, dtype=np.uint32)


def test_notes_are_of_one_namespace_and_are_taken_once() -> None:
    lookups, keys = Lookups(FACTORS), words(chain(6))
    assert lookups.matched(1, keys, 0, 6, 5) == 6
    assert lookups.reserved(2, keys, 0, 6, NEW, 5) == (0, 0)
    assert lookups.reserved(1, keys, 0, 6, NEW, 5) == (0, 6)
    assert lookups.reserved(1, keys, 0, 6, NEW, 5) == (0, 0)


def test_a_part_of_a_run_counts_and_what_was_overwritten_within_it_does_too() -> None:
    lookups, keys = Lookups(FACTORS), words(chain(8))
    lookups.matched(1, keys, 4 * 2, 4, 5)
    assert lookups._notes is not None
    noted = np.flatnonzero(lookups._notes)
    assert noted.size == 4
    before = lookups._notes.copy()
    lookups.matched(1, keys, 4 * 3, 1, 6)
    lookups._notes[np.flatnonzero(lookups._notes != before)] = 0  # another key took the place of the fourth
    assert lookups.reserved(1, keys, 0, 8, NEW, 6) == (2, 6)


def test_what_was_looked_up_long_ago_is_forgotten_and_what_waits_is_not() -> None:
    keys = words(chain(3))
    for asks_on in (True, False):
        lookups = Lookups(FACTORS)
        assert lookups.matched(1, keys, 0, 3, 100) == 3
        if asks_on:
            assert lookups.matched(1, keys, 0, 3, 100 + LATELY_S // 2) == 0
        assert lookups.reserved(1, keys, 0, 3, NEW, 100 + LATELY_S + 1) == ((0, 3) if asks_on else (0, 0))


def test_a_lookup_that_ends_where_a_lease_did_asks_nothing_new() -> None:
    lookups, keys = Lookups(FACTORS), words(chain(9))
    assert lookups.leased(1, keys, 0, 3, 5) == 3, "nobody looks up here, so nothing is noted"
    assert lookups.held_bytes == 0
    lookups.matched(1, keys, 4 * 8, 1, 5)
    assert lookups.held_bytes == 8 * NOTES
    assert lookups.leased(1, keys, 0, 3, 5) == 3
    assert lookups.matched(1, keys, 0, 6, 5) == 0
    assert lookups.reserved(1, keys, 0, 6, NEW, 5) == (0, 0)
    assert lookups.matched(1, keys, 0, 6, 5) == 6, "it was stored, and is gone again"
    assert lookups.leased(1, keys, 0, 6, 5) == 0, "its lookup has told of them"
