"""Fault 22: bugs that are planted on purpose, each in a copy of the tree, are noticed by the tests that name them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.figures import Recorder
from tests.mutants import MUTANTS, PASSED, Copy, LostPlaceError, Mutant, mutated, verdict_of

AT_ONCE = 2  # copies


def test_every_bug_has_its_place_in_the_source_as_it_is_today() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    for mutant in MUTANTS:
        assert mutated(mutant) != mutant.old
        assert mutant.breaks
        assert mutant.caught_by


def test_a_bug_that_has_lost_its_place_is_said_so() -> None:
    with pytest.raises(LostPlaceError, match="0 times"):
        mutated(replace(MUTANTS[0], old="nothing of the kind"))
    with pytest.raises(LostPlaceError, match="times in"):
        mutated(replace(MUTANTS[0], old="\n"))


def verdicts_of(mutants: list[Mutant]) -> list[str]:
    """Of each, in one copy after the other."""
    with Copy() as copy:
        assert all(Path(file).is_relative_to(copy.root) for file in copy.where().split()), copy.where()
        return [verdict_of(copy, mutant) for mutant in mutants]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_planted_bug_is_caught(record_property: Recorder) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = [list(MUTANTS[start::AT_ONCE]) for start in range(AT_ONCE)]
        verdicts = [verdict for part in pool.map(verdicts_of, parts) for verdict in part]
    record_property("planted", len(verdicts))
    record_property("caught", verdicts.count(""))
    assert not any(verdicts), "\n\n".join(filter(None, verdicts))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_without_a_bug_the_same_tests_pass() -> None:
    """The control: or whatever else fails in a copy would pass for a bug that is caught."""
    tests = sorted({test for mutant in MUTANTS for test in mutant.caught_by})
    with Copy() as copy:
        done = copy.run(*tests)
    assert done.returncode == PASSED, done.stdout[-4000:] + done.stderr[-2000:]
