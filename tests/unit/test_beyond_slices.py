"""Who asks what is beyond this host is answered slice by slice: none of them looks at all there is."""

import sys
from types import FrameType

from kvstore.beyond import BLOCKS, PART, Beyond
from tests.core import Core, chain, key_of
from tests.unit.test_beyond import space


def calls_of_a_slice(known: Beyond, start: int) -> tuple[int, int]:
    """How many calls into Python a slice takes, and where the next one begins."""
    calls = 0

    def count(_frame: FrameType, event: str, _what: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        _, following = known.there([1], start, PART)
    finally:
        sys.setprofile(None)
    return calls, following


def test_a_slice_does_not_look_at_all_that_is_there() -> None:
    (namespace, place), known = space(Core()), Beyond()
    assert namespace.number == 1
    for blocks in (2 * PART, BLOCKS):
        known.note(namespace, place, (key_of(number) for number in range(blocks)))
        for _ in known.take(blocks):
            pass
        start, slices = 1, 0
        while start:
            calls, start = calls_of_a_slice(known, start)
            slices += 1
            assert calls < 8 * PART
        assert slices == blocks // PART


def test_what_is_taken_back_leaves_nothing_and_what_is_told_again_comes_last() -> None:
    (namespace, place), known = space(Core()), Beyond()
    keys = chain(2 * PART)
    known.note(namespace, place, keys)
    for _ in known.take(len(keys)):
        pass
    first, start = known.there([1], 1, PART)
    assert [key for _, key in first] == keys[:PART]
    known.withdraw(1, keys[PART:-1])
    known.note(namespace, place, keys[PART : PART + 2])
    rest, start = known.there([1], start, PART)
    assert ([key for _, key in rest], start) == ([keys[-1]], 0), "what was told meanwhile is left out"
    every, start = known.there([1], 1, 2 * PART)
    assert ([key for _, key in every], start) == ([*keys[:PART], keys[-1], *keys[PART : PART + 2]], 0)
    known.withdraw(1, keys)
    for _ in known.take(10 * PART):
        pass
    assert known.there([1], 1, PART) == ([], 0)
    assert not known._order
