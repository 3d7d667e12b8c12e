"""Durations end up in the right buckets, all of them, and do not pile up where nobody looks."""

import sys
import threading

import numpy as np
import pytest

from kvproto.frames import Verb
from kvstored import metrics_timing
from kvstored.metrics_timing import REQUEST_S, Timing, Timings


def test_every_duration_is_counted_in_each_bucket_that_it_fits() -> None:
    random = np.random.Generator(np.random.SFC64(5))
    durations_ns = [*random.integers(1_000, 2_000_000_000, 5000).tolist(), *(round(bound * 1e9) for bound in REQUEST_S)]
    timing = Timing(REQUEST_S)
    for duration_ns in durations_ns:
        timing.note(duration_ns)
    assert sum(timing.buckets().counts) == 0, "nothing is counted before it is folded"
    timing.fold()
    found = timing.buckets()
    wanted = [sum(duration_ns <= round(bound * 1e9) for duration_ns in durations_ns) for bound in REQUEST_S]
    assert list(found.counts) == [*wanted, len(durations_ns)]
    assert found.sum_s == pytest.approx(sum(durations_ns) / 1e9)
    assert len(set(found.counts)) == len(found.counts), "these durations tell all buckets apart"
    timing.fold()
    assert timing.buckets() == found, "nothing is counted twice"


def test_nothing_is_lost_while_threads_note_and_one_folds() -> None:
    timing, each = Timing(REQUEST_S), 300_000
    threads = [threading.Thread(target=lambda: [timing.note(1000) for _ in range(each)]) for _ in range(3)]
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet at every step
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            timing.fold()
    finally:
        sys.setswitchinterval(usual_s)
    timing.fold()
    assert timing.buckets().counts[-1] == 3 * each


def test_what_nobody_folds_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_timing, "WAITING", 100)
    timing = Timing(REQUEST_S)
    for _ in range(1000):
        timing.note(1)
    timing.bound()
    timing.fold()
    assert timing.buckets().counts[-1] == 100
    timing.note(1)
    timing.bound()
    timing.fold()
    assert timing.buckets().counts[-1] == 101, "and what comes later counts again"


def test_each_verb_has_its_own_durations_or_shares_those_of_the_others() -> None:
    timings = Timings()
    notes = timings.by_verb()
    for verb in Verb:
        if verb < len(notes):
            notes[verb](1000)
    for timing in timings.all():
        timing.fold()
    counted = {name: timing.buckets().counts[-1] for name, timing in timings.verbs.items()}
    assert counted["lease"] == counted["reserve"] == counted["commit"] == 1
    assert counted["match"] == 2, "MATCH and MATCH_ALL"
    assert sum(counted.values()) == sum(verb < len(notes) for verb in Verb)
