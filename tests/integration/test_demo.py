"""`make demo` as a user sees it, at a small scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(240)
def test_the_demonstration_shows_every_promise_and_ends_with_one_json_line() -> None:
    command = [sys.executable, "-m", "bench.demo", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["identical"] is True
    assert results["control_differs"] is True
    assert results["survived_kill"] is True
    assert results["hit_tokens"] == results["prompt_tokens"] - results["question_tokens"]
    assert results["served_from"] == "dram"
    assert results["ttft_cold_s"] > results["ttft_warm_s"] > 0
    assert results["speedup"] >= 5
    assert results["fetch_gb_per_s"] > 0
    assert results["daemon_version"]
