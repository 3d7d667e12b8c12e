"""What the guide gives its reader to run: the first replay, and the program, against a real daemon."""

import re
import shlex
from pathlib import Path

import pytest

from bench.replay import command
from tests.integration.conftest import StartDaemon
from tests.integration.test_insight import answer

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "GUIDE.md"


def test_the_program_of_the_guide_gives_a_daemon_something_to_advise_on(start_daemon: StartDaemon) -> None:
    (program,) = re.findall(r"^```python\n(import hashlib.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    daemon = start_daemon("--dram", "32MiB", "--lock", "false")
    for told, here in (
        ("/tmp/kv-guide", str(daemon.runtime_dir)),
        ("minutes=12", "minutes=1"),
        (" + request.at_s", ""),
    ):
        assert program.count(told) == 1
        program = program.replace(told, here)
    exec(compile(program, str(GUIDE), "exec"), {})
    seen = answer(daemon.runtime_dir, "advise")
    assert seen["watched"]
    assert (seen["doubt"], seen["dram_bytes"]) == ("short", 32 << 20), "a minute's requests, sent at once"
    assert seen["really_hit_share"] > 0, "prompts begin as earlier ones did"


def test_the_first_replay_of_the_guide_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    text = GUIDE.read_text()
    (said,) = re.findall(r"^    \.venv/bin/python -m bench replay (agents .*)$", text, re.MULTILINE)
    (shown,) = re.findall(r"^```\n(compute saved, %.*?)^```", text, re.MULTILINE | re.DOTALL)
    command.run(shlex.split(said))
    assert capsys.readouterr().out.endswith(shown)
