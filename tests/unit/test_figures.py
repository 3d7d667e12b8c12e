"""The record of long forms."""

import json
import subprocess
import sys
from pathlib import Path

from bench.harness import ROOT

LONG = """
import pytest

@pytest.mark.long
def test_one(record_property):
    record_property("rounds", {rounds})

@pytest.mark.long
def test_{other}():
    assert {good}

def test_short():
    pass
"""


def run(folder: Path, **words: object) -> dict[str, dict[str, object]]:
    """The record after these have run."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = long: a long form\n")
    (folder / "test_some.py").write_text(LONG.format(**words))
    file = folder / "record.json"
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "--figures",
        str(file),
        "--rootdir",
        str(folder),
    ]
    subprocess.run([*line, "-c", str(folder / "pytest.ini"), str(folder)], cwd=ROOT, capture_output=True, check=False)
    found: dict[str, dict[str, object]] = json.loads(file.read_text())
    return found


def test_a_record_made_in_parts_keeps_what_was_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, rounds=10, other="two", good=True)
    assert first["results"] | {"test_one_s": 0, "test_two_s": 0} == {
        "test_one_passed": 1, "test_one_rounds": 10, "test_one_s": 0, "test_two_passed": 1, "test_two_s": 0,
    }  # fmt: skip
    second = run(tmp_path, rounds=20, other="three", good=False)
    found = second["results"]
    assert (found["test_one_rounds"], found["test_two_passed"], found["test_three_passed"]) == (20, 1, 0)
    assert set(second["made"]) == {"test_one", "test_two", "test_three"}
    assert second["made"]["test_two"] == first["made"]["test_two"]
