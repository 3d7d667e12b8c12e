"""Which program is at which step: what its context begins with tells, and what is remembered is bounded."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvproto.ids import NamespaceNumber
from kvproto.limits import KEYS_PER_FRAME
from kvstore.hints.chains import Chain, Mark, marks_of
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


def test_who_is_at_another_step_by_now_does_not_leave_the_one_before() -> None:
    visits = Visits()
    ends = [marks_of(of(2, name))[-1] for name in "ab"]
    for step, end in enumerate(ends):
        visits.entered(Visit("r", step, "ab"[step], 2), end)
    visits.began("p", of(4, "a"))
    visits.began("p", of(5, "b"))
    assert visits.left("r", 0) is None, "or what it is doing now would be forgotten"
    assert visits.beginning("p", 5) == 2
    assert visits.left("r", 1) == "p"
    visits.entered(Visit("s", 0, "a", 2), ends[0])
    visits.began("q", of(4, "a"))
    visits.forget("q")
    assert visits.left("s", 0) is None, "it is over"


class Counted(list[Mark]):
    """Marks, and how many of them were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Mark]:
        for mark in super().__iter__():
            self.looked_at += 1
            yield mark

    def __reversed__(self) -> Iterator[Mark]:
        for mark in super().__reversed__():
            self.looked_at += 1
            yield mark

    def index(self, *arguments: Any) -> int:
        found = super().index(*arguments)
        self.looked_at += found + 1
        return found


def test_a_context_of_which_every_block_is_waited_for_is_looked_through_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    visits, context = Visits(), of(KEYS_PER_FRAME, "a")
    marks = Counted(marks_of(context))
    for number, mark in enumerate(marks):
        visits.entered(Visit("r", number, f"{number}", number + 1), mark)
    monkeypatch.setattr("kvstore.hints.visits.marks_of", lambda _: marks)
    marks.looked_at = 0
    visits.began("p", context)
    assert marks.looked_at <= 2 * KEYS_PER_FRAME
    assert visits.beginning("p", KEYS_PER_FRAME) == KEYS_PER_FRAME, "the longest one"
    assert visits.left("r", KEYS_PER_FRAME - 1) == "p"


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
