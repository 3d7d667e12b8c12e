"""Spans of a ring against a plain set of pages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.limits import PAGE_BYTES
from kvstore.ring import Ring

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 5), st.integers(1, 6)),
        st.tuples(st.just("give"), st.integers(0, 63), st.just(0)),
    ),
    max_size=80,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(pages=st.integers(0, 40), steps=STEPS)
def test_spans_never_overlap_and_nothing_is_lost(pages: int, steps: list[tuple[str, int, int]]) -> None:
    ring = Ring(pages * PAGE_BYTES)
    free = set(range(pages))
    spans: list[tuple[int, int]] = []
    for verb, a, b in steps:
        if verb == "take":
            promised = ring.spans_free(a, b)
            taken = ring.take(a, b)
            assert len(taken) == promised == min(b, _fits(free, pages, a))
            for page in taken:
                assert set(range(page, page + a)) <= free, "a span overlaps another, or the end"
                free -= set(range(page, page + a))
                spans.append((page, a))
        elif spans:
            page, size = spans.pop(a % len(spans))
            ring.give(page, size)
            free |= set(range(page, page + size))
        ring.check()
        assert ring.free_pages == len(free)
    for page, size in spans:
        ring.give(page, size)
    ring.check()
    assert ring.spans_free(max(pages, 1), 1) == (1 if pages else 0), "neighbours were not merged"


def _fits(free: set[int], pages: int, span_pages: int) -> int:
    """How many spans fit into the runs of free pages."""
    fits, run = 0, 0
    for page in range(pages + 1):
        if page in free:
            run += 1
        else:
            fits, run = fits + run // span_pages, 0
    return fits


def test_the_lowest_pages_are_used_again_first() -> None:
    ring = Ring(10 * PAGE_BYTES)
    assert ring.take(2, 5) == [0, 2, 4, 6, 8]
    ring.give(6, 2)
    ring.give(2, 2)
    assert ring.take(2, 1) == [2]
    assert ring.take(2, 3) == [6]
    assert ring.take(1, 1) == []


@pytest.mark.parametrize("page", [0, 3, 9])
def test_a_span_given_back_twice_is_a_bug_that_is_caught(page: int) -> None:
    ring = Ring(10 * PAGE_BYTES)
    ring.take(1, 10)
    ring.give(page, 1)
    with pytest.raises(AssertionError, match="twice"):
        ring.give(page, 1)


def test_pages_past_the_end_of_a_ring_are_never_taken_back() -> None:
    ring = Ring(4 * PAGE_BYTES + 100)
    ring.take(1, 4)
    with pytest.raises(AssertionError):
        ring.give(3, 2)


def test_a_ring_without_pages_gives_nothing() -> None:
    ring = Ring(0)
    assert ring.spans_free(1, 5) == 0
    assert ring.take(1, 5) == []
    ring.check()


def test_spans_free_does_not_count_beyond_what_is_asked() -> None:
    ring = Ring(100 * PAGE_BYTES)
    assert ring.spans_free(3, 1000) == 33
    assert ring.spans_free(3, 7) == 7
