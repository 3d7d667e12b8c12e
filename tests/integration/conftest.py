"""What the tests with real engines share."""

import os
from pathlib import Path

import pytest

from bench.engines import find_vllm, why_not


@pytest.fixture(scope="session")
def python() -> Path:
    """Of the environment with vLLM."""
    found = find_vllm()
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(why_not())
    if found is None:
        pytest.skip(why_not())
    return found
