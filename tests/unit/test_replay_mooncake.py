"""The Mooncake format: what is read, and what is refused by name of the line."""

import json
from pathlib import Path

import pytest

from bench.replay import profiles
from bench.replay.mooncake import BLOCK_TOKENS, TraceError, read
from bench.replay.rivals import belady_bound
from bench.replay.score import infinite

TRACE = Path(__file__).parents[3] / "shared/traces/mooncake_conversation.jsonl"
GOOD = {"timestamp": 27000, "input_length": 600, "output_length": 5, "hash_ids": [0, 4]}


def test_a_trace_becomes_requests_of_blocks(tmp_path: Path) -> None:
    trace = tmp_path / "short.jsonl"
    longer = {**GOOD, "timestamp": 28500, "input_length": 1536, "hash_ids": [0, 1, 2], "type": "text"}
    trace.write_text("".join(json.dumps(each) + "\n" for each in (GOOD, longer)))
    workload = read(trace, block_bytes=1 << 20, profile=profiles.LARGE)
    workload.check()
    assert workload.name == "short"
    assert [(one.at_s, one.tokens, one.keys.tolist()) for one in workload.requests] == [
        (27.0, 600, [0, 4]),
        (28.5, 1536, [0, 1, 2]),
    ]
    (model,) = workload.models
    assert (model.block_tokens, model.block_bytes, model.profile) == (BLOCK_TOKENS, 1 << 20, profiles.LARGE)
    assert workload.footprint_bytes == 4 << 20


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "Expecting value"),
        ("[1]", "not an object"),
        (json.dumps({**GOOD, "timestamp": 1.5}), "timestamp is not a whole number"),
        (json.dumps({**GOOD, "timestamp": 1}), "before that of the line above"),
        (json.dumps({**GOOD, "input_length": True}), "input_length is not"),
        (json.dumps({**GOOD, "output_length": -1}), "output_length is not"),
        (json.dumps({**GOOD, "hash_ids": [0, "4"]}), "hash_ids is not a list"),
        (json.dumps({**GOOD, "hash_ids": [0, 1 << 64]}), "fit 64 bits"),
        (json.dumps({**GOOD, "input_length": 500}), "2 hash_ids for 500 tokens"),
        (json.dumps({**GOOD, "hash_ids": [1, 4]}), "hash id 4 follows 1 here and 0"),
        (json.dumps({"timestamp": 27000}), "input_length is not"),
    ],
)
def test_a_line_of_another_format_is_named(tmp_path: Path, line: str, why: str) -> None:
    trace = tmp_path / "bad.jsonl"
    trace.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(TraceError, match=rf"bad\.jsonl:2: .*{why}"):
        read(trace)


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not here")
def test_belady_on_the_conversation_trace_is_what_the_policies_are_held_against() -> None:
    workload = read(TRACE)
    assert (workload.accesses, workload.unique_blocks) == (288_500, 182_790)
    assert infinite(workload).hit == pytest.approx(0.366, abs=0.0005)
    bound = belady_bound(workload, workload.footprint_bytes // 100)
    assert bound.hit == pytest.approx(0.246, abs=0.0005)
