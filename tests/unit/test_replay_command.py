"""`python -m bench replay`: what it prints, writes and refuses."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from bench.replay import command
from bench.replay.score import infinite
from bench.replay.synthetic import chat

SMALL = ("chat", "--minutes", "3", "--capacity", "20,5")


def replayed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The record of a run on a small workload: the last line of output."""
    command.run([*SMALL, *arguments])
    record: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def test_results_go_by_policy_then_capacity_share_then_measure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    json_file, png_file = tmp_path / "replay.json", tmp_path / "replay.png"
    record = replayed(
        capsys, "--policy", "lru,density", "--seed", "7", "--json", str(json_file), "--png", str(png_file)
    )
    assert set(record["results"]) == {"lru", "density", "belady"}
    for shares in record["results"].values():
        assert list(shares) == ["0.05", "0.2"]
        for measures in shares.values():
            assert set(measures) == {"hit", "token_hit", "compute_saved"}
            assert all(0 <= measure <= 1 for measure in measures.values())
    assert json.loads(json_file.read_text()) == record
    assert png_file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert record["quick"]  # it says so of itself
    assert record["accesses_a_second"].keys() == record["results"].keys()
    ceiling = infinite(chat(7, minutes=3)).hit
    assert record["results"]["density"]["0.2"]["hit"] <= ceiling + 1e-4


def test_of_several_seeds_the_results_are_the_means(capsys: pytest.CaptureFixture[str]) -> None:
    record = replayed(capsys, "--policy", "lru", "--seed", "7,8")
    by_seed = record["by_seed"]
    assert set(by_seed) == {"7", "8"}
    means = [fmean(by_seed[seed]["lru"][share]["hit"] for seed in by_seed) for share in ("0.05", "0.2")]  # type: ignore[index]
    assert [record["results"]["lru"][share]["hit"] for share in ("0.05", "0.2")] == pytest.approx(means, abs=1e-4)


def test_a_cost_changes_what_is_saved_and_not_what_is_hit(capsys: pytest.CaptureFixture[str]) -> None:
    usual = replayed(capsys, "--policy", "lru")["results"]["lru"]["0.2"]
    other = replayed(capsys, "--policy", "lru", "--cost", "deepseek-v3-tp8")["results"]["lru"]["0.2"]
    assert other["hit"] == usual["hit"]
    assert other["compute_saved"] != usual["compute_saved"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "best"), "no policy 'best': choose from lru"),
        (("--capacity", "0"), "above 0"),
        (("--cost", "free"), "no prefill profile 'free'"),
        (("--block-bytes", "0"), "--block-bytes"),
        (("--seed", "one"), "'one'"),
    ],
)
def test_what_it_does_not_know_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        command.run([*SMALL, *arguments])
    assert said in capsys.readouterr().err


def test_a_trace_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        command.run([str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err
