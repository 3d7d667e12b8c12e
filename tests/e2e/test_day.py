"""The day, in a hurry: everything that is promised is there, and a promise that is broken is seen."""

from pathlib import Path

import pytest

from tests.e2e.day import Day, live

pytestmark = pytest.mark.slow


def test_a_day_in_the_life_of_a_host_keeps_every_promise() -> None:
    told: list[str] = []
    promises = live(told.append, patient=False)
    story = "\n".join(told)
    assert len(promises) >= 20, story
    # How long something took is for `make day` to judge: here other tests may want both processors meanwhile.
    assert not [one for one in promises if not one.held and not one.found.endswith(" s")], story


def test_a_promise_that_is_broken_stands_out() -> None:
    day = Day(lambda _: None, patient=False)
    day.promise("hits", "all", "8 of 8", held=True)
    day.promise("start", "within 1 s", 2.5, held=False)
    assert day.table().splitlines() == [
        "ok   hits   8 of 8  all",
        "BAD  start  2.50 s  within 1 s",
    ]


@pytest.mark.long
def test_a_day_at_its_own_pace() -> None:
    assert all(one.held for one in live(print, patient=True))


def test_the_story_is_told_by_make() -> None:
    makefile = Path(__file__).parents[2].joinpath("Makefile").read_text()
    assert "-m tests.e2e.day" in makefile
