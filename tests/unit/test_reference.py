"""The reference of the client is what its docstrings say."""

import runpy
from pathlib import Path

import pytest

import kvclient

ROOT = Path(__file__).parent.parent.parent


def test_the_reference_is_that_of_this_client(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "clients" / "reference.py"), run_name="__main__")
    made = capsys.readouterr().out
    assert made == (ROOT / "clients" / "API.md").read_text(), "make reference"
    for name in kvclient.__all__:
        assert f"\n## {name}\n" in made
    assert "\n## Endpoint\n" not in made, "the control: what is not public is not in it"
