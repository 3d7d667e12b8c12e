"""`python -m bench replay`: what it prints, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from bench.replay import command
from bench.replay.score import infinite
from bench.replay.synthetic import chat

ROOT = Path(__file__).parents[2]
SMALL = ("chat", "--minutes", "3", "--capacity", "20,5")
WITHOUT_MATPLOTLIB = "import sys; sys.modules['matplotlib'] = None; from bench.__main__ import main; main()"


def replayed(folder: Path, *arguments: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The record of a run on a small workload."""
    file = folder / "replay.json"
    command.run([*SMALL, *arguments, "--json", str(file)])
    record: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(file.read_text())
    return record


def test_results_go_by_policy_then_capacity_share_then_measure(tmp_path: Path) -> None:
    png_file = tmp_path / "replay.png"
    record = replayed(tmp_path, "--policy", "lru,density", "--seed", "7", "--png", str(png_file))
    assert set(record["results"]) == {"lru", "density", "belady"}
    for shares in record["results"].values():
        assert list(shares) == ["0.05", "0.2"]
        for measures in shares.values():
            assert set(measures) == {"hit", "token_hit", "compute_saved"}
            assert all(0 <= measure <= 1 for measure in measures.values())
    assert png_file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert record["quick"]  # it says so of itself
    assert record["accesses_a_second"].keys() == record["results"].keys()
    ceiling = infinite(chat(7, minutes=3)).hit
    assert record["results"]["density"]["0.2"]["hit"] <= ceiling + 1e-4


def test_what_is_printed_is_for_people_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["chat", "--minutes", "3", "--policy", "lru,density"])
    printed = capsys.readouterr().out
    assert "compute saved, %             1 %     5 %    10 %    20 %\n" in printed
    assert "{" not in printed, "a record is written where --json says"
    assert max(map(len, printed.splitlines())) <= 80


def test_only_a_picture_wants_matplotlib(tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-c", WITHOUT_MATPLOTLIB, "replay", *SMALL, "--policy", "lru", *arguments]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    plain = run()
    assert (plain.returncode, "compute saved" in plain.stdout) == (0, True), plain.stderr
    picture = run("--png", str(tmp_path / "curves.png"))
    assert picture.returncode == 2
    assert picture.stderr.splitlines()[-1].endswith("matplotlib is missing, which the environment of `make demo` has")


def test_of_several_seeds_the_results_are_the_means(tmp_path: Path) -> None:
    record = replayed(tmp_path, "--policy", "lru", "--seed", "7,8")
    by_seed = record["by_seed"]
    assert set(by_seed) == {"7", "8"}
    means = [fmean(by_seed[seed]["lru"][share]["hit"] for seed in by_seed) for share in ("0.05", "0.2")]  # type: ignore[index]
    assert [record["results"]["lru"][share]["hit"] for share in ("0.05", "0.2")] == pytest.approx(means, abs=1e-4)


def test_a_cost_changes_what_is_saved_and_not_what_is_hit(tmp_path: Path) -> None:
    usual = replayed(tmp_path, "--policy", "lru")["results"]["lru"]["0.2"]
    other = replayed(tmp_path, "--policy", "lru", "--cost", "deepseek-v3-tp8")["results"]["lru"]["0.2"]
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
