"""Numbers on the command line that no message can hold."""

import pytest

from kvctl.client import Exit
from tests.kvctl_line import Run
from tests.unit.control_fakes import DIGEST_A
from tests.unit.test_kvctl import Daemon, ask, bare_environment, daemon, kvctl  # noqa: F401  fixtures


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        (["events", "--after"], 64),
        (["watch", "--tenant", "research", "--from"], 64),
        (["ls", DIGEST_A.hex(), "--limit"], 32),
    ],
    ids=["events", "watch", "ls"],
)
def test_one_that_no_message_can_hold_is_a_mistake_on_the_command_line(ask: Run, words: list[str], bits: int) -> None:  # noqa: F811
    assert ask(*words, str((1 << bits) - 1)).code in (0, Exit.REFUSED, Exit.NOT_FOUND), (
        "the control: this one is only large"
    )
    for number in (1 << bits, 99999999999999999999999):
        answer = ask(*words, str(number))
        assert (answer.code, answer.out) == (Exit.USAGE, "")
        assert "Invalid value for" in answer.err
