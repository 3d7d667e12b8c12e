"""The reference of the client is what its docstrings say."""

import subprocess
import sys
from pathlib import Path

import kvclient

ROOT = Path(__file__).parent.parent.parent


def test_the_reference_is_that_of_this_client() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "clients" / "reference.py"], capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "clients" / "API.md").read_text(), "make reference"
    for name in kvclient.__all__:
        assert f"\n## {name}\n" in made
    assert "\n## Endpoint\n" not in made, "the control: what is not public is not in it"
