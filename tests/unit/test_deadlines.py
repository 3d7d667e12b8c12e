"""Deadlines that move against a plain dict: never early, never late, none lost, and no more memory than they need."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.hints.deadlines import Deadlines

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 9), st.integers(-5, 60)),
        st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("pass"), st.integers(1, 5), st.integers(0, 20)),
    ),
    max_size=80,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(steps=STEPS)
def test_everything_falls_due_at_its_last_deadline_and_once(steps: list[tuple[str, int, int]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    set_ns: dict[int, int] = {}
    now_ns = 0
    for verb, thing, ns in steps:
        if verb == "set":
            set_ns[thing] = now_ns + ns
            deadlines.set(thing, now_ns + ns)
        elif verb == "drop":
            set_ns.pop(thing, None)
            deadlines.drop(thing)
        else:
            now_ns += ns
            wanted = sorted(deadline for deadline in set_ns.values() if deadline <= now_ns)[:thing]
            assert [set_ns.pop(due) for due in deadlines.due(now_ns, most=thing)] == wanted
        assert deadlines.next_ns() == min(set_ns.values(), default=None)
        assert len(deadlines) == len(set_ns)


def test_what_falls_due_at_one_time_comes_in_the_order_in_which_it_was_set() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for thing in ("c", "a", "b"):
        deadlines.set(thing, 5)
    deadlines.set("first", 0)
    assert list(deadlines.due(4)) == ["first"]
    assert list(deadlines.due(5)) == ["c", "a", "b"]


def test_a_deadline_that_moves_a_million_times_takes_no_more_memory() -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.set("other", 7)
    for ns in range(10_000):
        deadlines.set("later", ns)
        deadlines.set("sooner", 10**9 - ns)
        deadlines.set(f"once {ns}", 10**8 + ns)
        deadlines.drop(f"once {ns}")
    assert len(deadlines) == 3
    assert len(deadlines._queue) < 100
    assert len(deadlines._queued_ns) < 100
    assert list(deadlines.due(10**9)) == ["other", "later", "sooner"]
