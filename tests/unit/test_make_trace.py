"""The example that makes a trace of a log is read by the replay, and tells equal prefixes from others."""

import json
import subprocess
import sys
from pathlib import Path

from bench.replay import mooncake

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "clients" / "examples" / "make_trace.py"


def test_a_log_of_prompts_becomes_a_trace(tmp_path: Path) -> None:
    shared = list(range(1024))
    log = [
        {"at": 12.5, "tokens": [*shared, 7], "answer": 3},
        {"at": 10.0, "tokens": [*shared, *range(600)]},  # out of order
        {"at": 13.0, "tokens": [5, *shared[1:], 7]},
    ]
    made = subprocess.run(
        [sys.executable, PROGRAM], input="\n".join(map(json.dumps, log)), capture_output=True, text=True, check=True
    ).stdout
    lines = [json.loads(line) for line in made.splitlines()]
    assert [line["timestamp"] for line in lines] == [0, 2500, 3000]
    assert [line["hash_ids"] for line in lines] == [[0, 1, 2, 3], [0, 1, 4], [5, 6, 7]]
    assert lines[1]["output_length"] == 3
    path = tmp_path / "trace.jsonl"
    path.write_text(made)
    workload = mooncake.read(path)
    assert [request.tokens for request in workload.requests] == [1624, 1025, 1025]


def test_a_line_that_is_no_request_is_named() -> None:
    log = '{"at": 1, "tokens": [1]}\n\n{"at": 2}\n'
    made = subprocess.run([sys.executable, PROGRAM], input=log, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr == "line 3 is not a request with `at` and `tokens`: KeyError('tokens')\n"
