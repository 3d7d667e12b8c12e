"""Many clients at once, killed and stopped, on a drive that fails: a slice of `python -m bench load`, and controls."""

import os
from pathlib import Path

import pytest

from bench.load.board import Verb
from bench.load.command import results_of, verbs_of
from bench.load.levels import Levels, leaks
from bench.load.run import Outcome, load

SEED = 20_261_121
SECONDS, WARM_S = 6.0, 2.0
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
    """Nothing was wrong, and enough happened for something to be."""
    assert not outcome.wrong, "\n".join(outcome.wrong)
    results = results_of(outcome)
    floors = {"calls": 50, "blocks_hit": 200, "bytes_compared": 10**6, "blocks_stored": 20, "processes_killed": 0.5}
    for name, each_second in floors.items():
        found = results[name]
        assert isinstance(found, int | float)
        assert found >= each_second * outcome.seconds, f"{name}: {found} is too little to prove anything"
    assert results["drive_faults"]
    assert results["disk_calls_failed"]
    assert verbs_of(outcome).keys() == {verb.name.lower() for verb in Verb} - {"nothing"}


def test_64_clients_of_8_tenants_are_killed_on_a_bad_drive_and_nothing_is_wrong_or_left() -> None:
    outcome = load(SECONDS, WARM_S, SEED)
    assert_sound(outcome)


def test_a_daemon_that_keeps_rings_and_serves_wrong_bytes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    outcome = load(3.0, 0.5, SEED)
    assert any("WrongBytesError" in sentence for sentence in outcome.wrong), outcome.wrong
    assert any("blocks had wrong bytes" in sentence for sentence in outcome.wrong)
    assert any(sentence.startswith("ring: ") for sentence in outcome.wrong), outcome.wrong


def test_what_has_grown_is_named() -> None:
    before = Levels({"ring": 0, "arena": 8, "segment": 4}, 100 << 20, 30, {})
    assert not leaks(before, Levels({"arena": 8, "segment": 9}, 110 << 20, 38, {}))
    after = Levels({"ring": 1, "arena": 8, "pidfd": 2}, 200 << 20, 39, {})
    assert [sentence.split(":")[0] for sentence in leaks(before, after)] == [
        "pidfd", "ring", "anonymous memory", "39 threads, 30 before",
    ]  # fmt: skip
    held = Levels({}, 0, 0, {"kvstored_leases": 1.0, "kvstored_pins": 0.0, "kvstored_used_bytes": 4096.0})
    assert (held.held(), held.left()) == ({"kvstored_leases": 1.0}, {"kvstored_used_bytes": 4096.0})
    places = {"kvstored_blocks": 3.0, "kvstored_quarantined_slots": 3.0}
    assert not Levels({}, 0, 0, places).left(), "damaged places stay out of use"
    assert Levels({}, 0, 0, places | {"kvstored_blocks": 4.0}).left() == {"kvstored_blocks": 4.0}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ten_minutes_of_it() -> None:
    assert_sound(load(600.0, 60.0, SEED + 1))
