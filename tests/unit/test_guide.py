"""What a guide has still to do for runs: of those that are over, nothing, however many there were."""

import json

import pytest

from kvproto.policy_frames import Event, Hint
from kvstore.hints.guide import FREE, Guide
from kvstore.hints.refusal import Refused
from tests.core import chain

STEPS = [{"name": "a", "next": ["b"]}, {"name": "b", "next": ["c"]}, {"name": "c"}]
LINE = json.dumps({"steps": STEPS})


def say(guide: Guide, event: Event, name: str, **fields: object) -> None:
    """A hint that must be taken, and nothing done of what is left to be done."""
    heard = guide.hear(Hint(event, name, **fields), 1, lambda _: FREE)  # type: ignore[arg-type]
    assert not isinstance(heard, Refused), heard


def walk(guide: Guide, run: str, version: int) -> None:
    """Begin a run, say what its steps read, and enter the first one."""
    say(guide, Event.RUN, run, other="line", version=version)
    for step in "abc":
        say(guide, Event.BIND, run, other=step, version=version, namespace=1, keys=b"".join(chain(2, f"{run} {step}")))
    say(guide, Event.ENTER, run, other="a", version=version)


def left(guide: Guide, run: str) -> tuple[int, int]:
    """Words and fetches that are due for a run."""
    unsaid, unfetched = (sum(key[0] == run for key in some) for some in (guide._unsaid, guide._unfetched))
    return unsaid, unfetched


@pytest.mark.parametrize("ends", [True, False], ids=["each ends", "each begins anew"])
def test_what_was_to_be_done_for_runs_that_are_over_does_not_pile_up(*, ends: bool) -> None:
    guide = Guide()
    say(guide, Event.WORKFLOW, "line", text=LINE, version=1)
    walk(guide, "stays", 1)
    due = left(guide, "stays")
    assert min(due) > 0
    for number in range(1, 50):
        run = f"r{number}" if ends else "r"
        walk(guide, run, number)
        assert left(guide, run) == due
        if ends:
            say(guide, Event.RUN_FINISHED, run)
            assert left(guide, run) == (0, 0)
        else:
            say(guide, Event.RUN, run, other="line", version=number + 100)
            assert left(guide, run) == (0, 0), "the new one has not been told what it reads"
            say(guide, Event.RUN_FINISHED, run)
    assert left(guide, "stays") == due, "what runs is not touched"
    assert len(guide._unsaid) + len(guide._unfetched) == sum(due)
