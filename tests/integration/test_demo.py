"""`make demo` as a user sees it, at a small scale."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.demo import judge, verdict
from bench.demo_engine import OTHER_BLOCKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "bench.demo", "--quick"]
COLUMNS = 80
ROWS = ("stored ", "kill -9", "B: ", "C: ", "D: ", "... ")


@pytest.fixture
def home() -> Iterator[Path]:
    """Where it puts its temporary files. On a drive, or it would go elsewhere."""
    folder = Path(tempfile.mkdtemp(prefix="kvd-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(home: Path) -> dict[str, str]:
    """Of a demonstration in that place."""
    return os.environ | {"TMPDIR": str(home), "COLUMNS": str(COLUMNS)}


def running(home: Path) -> list[str]:
    """Command lines that name the place: daemons, keepers, engines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone meanwhile
            continue
        if str(home) in line:
            found.append(line)
    return found


@pytest.mark.timeout(420)
def test_the_demonstration_shows_every_promise_in_80_columns_and_all_it_measured_if_asked(home: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--json"], cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (list(home.glob("kvstored-demo-*")), running(home)) == ([], [])
    *lines, last = done.stdout.splitlines()
    results = json.loads(last)
    assert not [line for line in lines if len(line) > COLUMNS]
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("what  ")) :]
    rows = sum(len(life) for life in judge(results))
    assert sum(line.startswith(ROWS) for line in table) == rows, "none wraps"
    assert re.fullmatch(r"All 14 promises shown in \d+ s\.", lines[-1]), lines[-1]
    assert results["durable_blocks"] == results["stored_blocks"] > 0
    assert results["control_differs"] is True
    assert results["survived_kill"] is True
    assert results["served_from"] == "dram"
    assert results["speedup"] >= 5
    assert results["daemon_version"]
    kept, let_go = results["kept"], results["let_go"]
    assert (kept["served_from"], kept["began"], kept["loaded_blocks"]) == ("dram", "warm", 0)
    assert kept["kept_blocks"] >= results["stored_blocks"]
    assert (let_go["served_from"], let_go["began"], let_go["kept_blocks"]) == ("disk", "cold", 0)
    assert let_go["loaded_blocks"] == results["stored_blocks"] + OTHER_BLOCKS
    for found in (results, kept, let_go):
        assert found["identical"] is True
        assert found["hit_tokens"] == found["prompt_tokens"] - found["question_tokens"]
        assert found["ttft_cold_s"] > found["ttft_warm_s"] > 0
        assert found["fetch_gb_per_s"] > 0
    for tier in ("from dram ", "from dram (kept)", "from disk"):
        assert tier in done.stdout
    assert_misses_are_told(results)


def assert_misses_are_told(results: dict[str, Any]) -> None:
    """The same results with one thing gone wrong: each is a promise that was not kept."""
    assert broken(results) == []
    miss = {"hit_tokens": 0, "hit_blocks": 0, "served_from": "none", "fetch_bytes": 0, "fetch_gb_per_s": 0.0}
    for life, name in (("kept", "C"), ("let_go", "D")):
        lost = broken(results | {life: results[life] | miss})
        assert lost == [f"{name}: tokens fetched, not computed", "... logits against a recompute"]
        part = broken(results | {life: results[life] | {"hit_tokens": results["hit_tokens"] - 16}})
        assert part == [f"{name}: tokens fetched, not computed"]
        other = broken(results | {life: results[life] | {"identical": False}})
        assert other == ["... logits against a recompute"]
    from_disk = broken(results | {"kept": results["kept"] | {"served_from": "disk"}})
    assert from_disk == ["C: tokens fetched, not computed"]
    promoted = broken(results | {"kept": results["kept"] | {"loaded_blocks": 1}})
    assert promoted == ["C: tokens fetched, not computed"], "what came from disk first was not kept"
    from_memory = broken(results | {"let_go": results["let_go"] | {"served_from": "dram"}})
    assert from_memory == ["D: tokens fetched, not computed"]
    assert broken(results | {"durable_blocks": 0}) == ["stored by A, and flushed to disk"]


def broken(results: dict[str, Any]) -> list[str]:
    """Promises that were not kept."""
    return [promise.what for life in judge(results) for promise in life if promise.kept is False]


@pytest.mark.timeout(120)
def test_a_demonstration_that_is_stopped_leaves_no_process_and_no_file(home: Path) -> None:
    with subprocess.Popen(COMMAND, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert any(line.startswith("start the daemon ") for line in demo.stdout)
        assert any("fd_keeper" in line for line in running(home)), "or there is nothing to leave"
        demo.terminate()
        assert demo.wait(60) == 128 + 15
    assert (list(home.glob("kvstored-demo-*")), running(home)) == ([], [])


def test_its_last_line_says_how_many_promises_were_shown() -> None:
    assert verdict([True, None, True], 12.3) == "All 2 promises shown in 12 s."
    assert verdict([True, None, False], 12.3) == "[red]1 of 2 promises NOT SHOWN[/red], in 12 s."
