"""Deadlines against a plain dict: never early, never later than a bucket, none lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.wheel import BUCKET_NS, Wheel

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9), st.integers(0, 12 * BUCKET_NS)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("pass"), st.just(0), st.integers(0, 3 * BUCKET_NS)),
    ),
    max_size=80,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(steps=STEPS)
def test_everything_falls_due_once_never_early_and_at_most_a_bucket_late(steps: list[tuple[str, int, int]]) -> None:
    wheel: Wheel[int] = Wheel()
    set_ns: dict[int, int] = {}
    now_ns = 0
    for verb, thing, ns in steps:
        if verb == "add" and thing not in set_ns:
            set_ns[thing] = now_ns + ns
            wheel.add(thing, now_ns + ns)
        elif verb == "remove" and thing in set_ns:
            wheel.remove(thing, set_ns.pop(thing))
        elif verb == "pass":
            now_ns += ns
            for due in list(wheel.due(now_ns)):
                assert set_ns.pop(due) <= now_ns, "early, or twice"
            assert all(deadline_ns > now_ns - BUCKET_NS for deadline_ns in set_ns.values()), "later than a bucket"
        next_ns = wheel.next_ns()
        if set_ns:
            assert next_ns is not None
            assert min(set_ns.values()) <= next_ns < min(set_ns.values()) + BUCKET_NS, "the loop would sleep too long"
        else:
            assert next_ns is None, "the loop would wake for nothing"


def test_what_falls_due_at_one_time_comes_in_the_order_in_which_it_was_set() -> None:
    wheel: Wheel[str] = Wheel()
    for thing in ("c", "a", "b"):
        wheel.add(thing, 5)
    wheel.add("first", 0)
    assert list(wheel.due(BUCKET_NS)) == ["first", "c", "a", "b"]


def test_what_is_set_while_others_fall_due_is_not_lost() -> None:
    wheel: Wheel[int] = Wheel()
    wheel.add(1, BUCKET_NS)
    seen = []
    for thing in wheel.due(10 * BUCKET_NS):
        seen.append(thing)
        if thing < 4:
            wheel.add(thing + 1, (thing + 1) * BUCKET_NS)
    wheel.add(9, 20 * BUCKET_NS)
    assert seen == [1, 2, 3, 4]
    assert wheel.next_ns() == 20 * BUCKET_NS


def test_removing_what_is_not_there_is_no_news() -> None:
    wheel: Wheel[int] = Wheel()
    wheel.remove(1, 5)
    wheel.add(2, 5)
    wheel.remove(1, 5)
    assert list(wheel.due(BUCKET_NS)) == [2]
    assert wheel.next_ns() is None


def test_no_more_fall_due_at_once_than_asked_for_and_the_rest_stays_due() -> None:
    wheel: Wheel[int] = Wheel()
    for number in range(10):
        wheel.add(number, 1)
    assert list(wheel.due(BUCKET_NS, 4)) == [0, 1, 2, 3]
    assert wheel.next_ns() == BUCKET_NS
    wheel.remove(5, 1)
    assert list(wheel.due(BUCKET_NS, 100)) == [4, 6, 7, 8, 9]
    assert wheel.next_ns() is None
