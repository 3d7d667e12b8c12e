"""Which program is at which step: what its context begins with tells, and what is remembered is bounded."""

from kvproto.ids import NamespaceNumber
from kvstore.hints.chains import Chain, marks_of
from kvstore.hints.limits import PROGRAMS
from kvstore.hints.visits import Visit, Visits
from tests.core import chain

SPACE = NamespaceNumber(1)


def of(length: int, name: str) -> Chain:
    """A chain of so many blocks."""
    return Chain(SPACE, b"".join(chain(length, name)))


def test_a_program_is_at_the_step_that_begins_with_the_most_of_its_context() -> None:
    visits = Visits()
    visits.entered(Visit("r", 0, "short", 1), marks_of(of(1, "a"))[-1])
    visits.entered(Visit("r", 1, "long", 3), marks_of(of(3, "a"))[-1])
    visits.began("p", of(5, "a"))
    visits.began("q", of(5, "b"))
    assert visits.beginning("p", 5) == 3
    assert visits.beginning("q", 5) == 5, "at no step that is known of"
    assert visits.left("r", 1) == "p"
    assert visits.left("r", 1) is None
    assert visits.left("r", 0) is None, "nobody came"


def test_of_two_that_wait_for_the_same_the_first_is_served_first() -> None:
    visits = Visits()
    end = marks_of(of(2, "a"))[-1]
    for run in "rs":
        visits.entered(Visit(run, 0, "a", 2), end)
    for program in "pq":
        visits.began(program, of(4, "a"))
    assert [visits.left(run, 0) for run in "rs"] == ["p", "q"]


def test_whether_turns_go_on_is_learned_by_step_and_can_change() -> None:
    visits = Visits()
    end = marks_of(of(2, "a"))[-1]
    expected = []
    for number in range(40):
        visits.entered(Visit("r", 0, "plan", 2), end)
        visits.began("p", of(4, "a"))
        expected.append(visits.ends_here("p"))
        if number >= 20:
            visits.went_on("p")
        visits.left("r", 0)
    assert not expected[0], "nothing is known yet"
    assert expected[20], "it never went on"
    assert not expected[39], "half of the turns do by now"


def test_what_is_remembered_is_bounded() -> None:
    visits = Visits()
    for number in range(PROGRAMS + 100):
        context = of(1, str(number))
        visits.entered(Visit(str(number), 0, str(number), 1), marks_of(context)[-1])
        visits.began(str(number), context)
    assert visits.left("0", 0) is None
    assert visits.left(str(PROGRAMS), 0) == str(PROGRAMS)
