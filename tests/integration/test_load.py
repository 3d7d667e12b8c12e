"""Many clients at once, killed and stopped, on a drive that fails: a slice of `python -m bench load`, and controls."""

import os
import time
from pathlib import Path

import pytest

from bench.load import run
from bench.load.board import Board, Verb, bucket_of
from bench.load.client import Place
from bench.load.command import results_of, verbs_of
from bench.load.crowd import HANG_S, Crowd, members_of
from bench.load.levels import Levels, leaks
from bench.load.run import Outcome, load

SEED = 20_261_121
SECONDS, WARM_S = 4.0, 1.0
# Python runs it at the start of the daemon: rings are kept for ever, one block in twenty changes after it was hashed.
PLANT = """
import sys
if sys.orig_argv[1:3] == ["-m", "bench.load.victim"]:
    from kvstored import leaf, memory
    memory.HostMemory.drop = lambda self, region: None
    real, turn = leaf.copy_and_hash, 0
    def spoil(source, target):
        global turn
        checksum, turn = real(source, target), turn + 1
        if turn % 20 == 0:
            target[5000] ^= 1
        return checksum
    leaf.copy_and_hash = spoil
"""


def assert_sound(outcome: Outcome) -> None:
    """Nothing was wrong."""
    assert not outcome.wrong, "\n".join(outcome.wrong)
    results = results_of(outcome)
    assert (results["wrong"], results["leaks"], results["hangs"]) == (0, 0, 0)
    slowest, middle = outcome.board.all_calls().longest_s, outcome.board.all_calls().p50_s
    p99_us = results["p99_us"]
    assert isinstance(p99_us, float)
    assert middle * 1e6 <= p99_us <= slowest * 1.05e6


def too_little(outcome: Outcome, seconds: float) -> str:
    """What there was less of than proves anything; `seconds`: as much as happens in so many."""
    results = results_of(outcome)
    floors = {"calls": 50, "blocks_hit": 200, "bytes_compared": 10**6, "blocks_stored": 20, "processes_killed": 0.5}
    for name, each_second in floors.items():
        found = results[name]
        assert isinstance(found, int | float)
        if found < each_second * seconds:
            return f"{name}: {found}"
    if not (results["drive_faults"] and results["disk_calls_failed"]):
        return "faults of the drive"
    missing = {verb.name.lower() for verb in Verb} - {"nothing"} - verbs_of(outcome).keys()
    assert verbs_of(outcome).keys() <= {verb.name.lower() for verb in Verb}
    return ", ".join(missing)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_64_clients_of_8_tenants_are_killed_on_a_bad_drive_and_nothing_is_wrong_or_left() -> None:
    for times in (1, 2, 4):  # a busy machine takes longer for as much
        outcome = load(times * SECONDS, WARM_S, SEED)
        assert_sound(outcome)
        if not (little := too_little(outcome, SECONDS)):
            return
    raise AssertionError(little)


def test_a_daemon_that_keeps_rings_and_serves_wrong_bytes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(run, "CALM_S", 0.0)
    outcome = load(3.0, 0.5, SEED)
    assert any("WrongBytesError" in sentence for sentence in outcome.wrong), outcome.wrong
    assert any("blocks had wrong bytes" in sentence for sentence in outcome.wrong)
    assert any(sentence.startswith("ring: ") for sentence in outcome.leaks), outcome.wrong
    results = results_of(outcome)
    assert (results["leaks"], results["wrong"]) == (len(outcome.leaks), len(outcome.wrong))


def test_a_client_that_waits_far_beyond_its_time_hangs_and_one_that_was_stopped_does_not(tmp_path: Path) -> None:
    board = Board.make(tmp_path / "board", 8)
    place = Place(str(tmp_path), str(tmp_path / "board"), str(tmp_path), ("a", "b"), (), SEED)
    crowd = Crowd(place, board, members_of(8, 2, 4), SEED)
    now_ns = time.monotonic_ns()
    board.lines["verb"] = Verb.FETCH
    board.lines["limit_ns"] = now_ns
    board.lines["limit_ns"][[1, 2]] = now_ns - int(2 * HANG_S * 1e9)
    crowd.members[1].stopped_until_s = time.monotonic() + 60.0
    crowd.tick()
    assert [sentence.split(" begun")[0] for sentence in crowd.hangs] == ["client 1 in FETCH"]
    crowd.tick()
    assert len(crowd.hangs) == 1, "said once"


def test_times_of_all_calls_are_those_of_each_verb_together(tmp_path: Path) -> None:
    board = Board.make(tmp_path / "board", 2)
    for verb, us, count in ((Verb.MATCH, 100, 98), (Verb.FETCH, 10_000, 2)):
        board.lines["times"][1, verb, bucket_of(us * 1000)] += count
        board.lines["longest_ns"][1, verb] = us * 1000
    every = board.all_calls()
    assert (every.count, every.longest_s) == (100, 0.01)
    assert 95e-6 < every.p50_s < 105e-6
    assert 9.5e-3 < every.p99_s < 10.5e-3
    assert board.latency(Verb.MATCH).p99_s < 105e-6, "the control: without the two slow ones"


def test_what_has_grown_is_named() -> None:
    before = Levels({"ring": 0, "arena": 8, "segment": 4}, 100 << 20, 30, {})
    assert not leaks(before, Levels({"arena": 8, "segment": 9}, 110 << 20, 38, {}))
    after = Levels({"ring": 1, "arena": 8, "pidfd": 2}, 200 << 20, 39, {})
    assert [sentence.split(":")[0] for sentence in leaks(before, after)] == [
        "pidfd", "ring", "anonymous memory", "39 threads, 30 before",
    ]  # fmt: skip
    held = Levels({}, 0, 0, {"kvstored_leases": 1.0, "kvstored_pins": 0.0, "kvstored_used_bytes": 4096.0})
    assert held.leftovers() == [
        "still held: kvstored_leases = 1",
        "not empty after a clear: kvstored_used_bytes = 4096",
    ]
    assert (held.held(), held.left()) == ({"kvstored_leases": 1.0}, {"kvstored_used_bytes": 4096.0})
    places = {"kvstored_blocks": 3.0, "kvstored_quarantined_slots": 3.0}
    assert not Levels({}, 0, 0, places).left(), "damaged places stay out of use"
    assert Levels({}, 0, 0, places | {"kvstored_blocks": 4.0}).left() == {"kvstored_blocks": 4.0}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ten_minutes_of_it() -> None:
    outcome = load(600.0, 60.0, SEED + 1)
    assert_sound(outcome)
    assert not too_little(outcome, 600.0)
