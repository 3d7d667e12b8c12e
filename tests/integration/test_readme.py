"""What the README gives its reader to paste, against a real daemon: as one program, and line by line at a prompt."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from bench.process import DaemonProcess

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
PATIENCE_S: Final = 120.0  # of a program, on a busy host
SECTIONS: Final = ("Use it", "What agents know")


def snippets(heading: str) -> list[str]:
    """The Python below a heading, as far as the next heading, for a daemon at `~/kv`."""
    (part,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ [A-Z]|\Z)", README.read_text(), re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    assert found, f"{heading} has no Python"
    return found


def run(arguments: list[str], home: Path, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Python with its home in `home`, which is told `text`."""
    return subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        env={"HOME": str(home), "HF_HUB_OFFLINE": "1"}, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A reader's, with the daemon of the README."""
    words = ("--dram", "256MiB", "--lock", "false")
    with DaemonProcess(tmp_path / "kv", *words, log_file=tmp_path / "log"):
        yield tmp_path


def test_the_programs_of_the_readme_run_one_after_the_other(home: Path) -> None:
    program = "\n".join(snippet for heading in SECTIONS for snippet in snippets(heading))
    ran = run(["-W", "error", "-c", program], home)
    assert (ran.returncode, ran.stderr) == (0, "")
    stored, fetched, connected, worth = ran.stdout.splitlines()
    assert stored.startswith("StoreResult(accepted=10, known=0, refused=none")
    assert (fetched, connected, worth) == ("10 True", "True", "True")


def test_they_run_when_they_are_pasted_at_a_prompt(home: Path) -> None:
    pasted = "".join(snippet for heading in SECTIONS for snippet in snippets(heading))
    ran = run(["-i", "-q"], home, pasted)
    assert "Error" not in ran.stderr
    assert "StoreResult(accepted=10, known=0" in ran.stdout
    assert "\n10 True\nTrue\n" in ran.stdout


@pytest.mark.slow
def test_the_model_of_the_readme_loads_what_it_computed_before(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (program,) = snippets("In transformers")
    exec(compile(program, str(README), "exec"), {})
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()] == ["0", "192"]
