"""`python -m bench load [--seconds 600] [--seed N] [--quick] [--json FILE]`: see the package.

Ends with 1, and says why, if a promise was broken; the record is the last line of output all the same.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.harness import Figure, record, say
from bench.load.board import Verb
from bench.load.run import CLIENTS, PROCESSES, TENANTS, Outcome, load

SECONDS: Final = 600.0
QUICK_S: Final = 20.0
WARM_SHARE: Final = 0.1  # of the time, and at least:
WARM_S: Final = 6.0
SEED: Final = 20_261_121


def run(arguments: Sequence[str]) -> None:
    """Load, show, and print the record. Ends the process with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=None, help=f"under load; {SECONDS:.0f} unless told")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:.0f} seconds; does not count as a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (QUICK_S if options.quick else SECONDS)
    say(f"{CLIENTS} clients of {TENANTS} tenants in {PROCESSES} processes, seed {options.seed}")
    outcome = load(seconds, max(WARM_S, WARM_SHARE * seconds), options.seed)
    results = results_of(outcome)
    for name, value in results.items():
        say(f"{name:28} {value:14.4f}" if isinstance(value, int | float) else f"{name:28} {value}")
    verbs = verbs_of(outcome)
    for name, figures in verbs.items():
        say(f"{name:10} " + "  ".join(f"{key} {value:10.2f}" for key, value in figures.items()))
    line = record("load", results, quick=seconds < SECONDS, verbs=verbs)
    if options.json:
        options.json.write_text(json.dumps(json.loads(line), indent=1) + "\n")
    print(line)
    for sentence in outcome.wrong:
        say(f"WRONG: {sentence}")
    if outcome.wrong:
        sys.exit(1)


def results_of(outcome: Outcome) -> dict[str, Figure]:
    """For the record; METHOD.md says what each is."""
    board, before, after = outcome.board, outcome.before, outcome.after
    times = outcome.latencies()
    return {
        "seconds": outcome.seconds,
        "wrong": len(outcome.wrong),
        "hangs": len(outcome.hangs),
        "leaks": len(outcome.leaks),
        "p99_us": outcome.board.all_calls().p99_s * 1e6,
        **{f"{verb.name.lower()}_p99_us": times[verb].p99_s * 1e6 for verb in (Verb.FETCH, Verb.STORE, Verb.MATCH)},
        "clients": CLIENTS,
        "tenants": TENANTS,
        "processes_killed": outcome.kills,
        "processes_stopped": outcome.stops,
        "drive_faults": outcome.faults,
        "calls": board.asked(),
        "calls_late": board.total("late"),
        "worst_late_ms": board.total("worst_late_ns") and int(board.lines["worst_late_ns"].max()) / 1e6,
        "blocks_hit": board.total("hits"),
        "blocks_hit_disk": board.total("disk_hits"),
        "blocks_missed": board.total("misses"),
        "bytes_compared": board.total("compared_bytes"),
        "bytes_wrong": board.total("wrong"),
        "leases_lapsed": board.total("lapsed"),
        "blocks_stored": board.total("stored"),
        "blocks_known": board.total("known"),
        "blocks_refused": board.total("refused"),
        "blocks_durable": board.total("durable"),
        "settled_s": outcome.settled_s,
        "descriptors_before": before.total,
        "descriptors_after": after.total,
        "anonymous_mib_before": before.anonymous_bytes / 2**20,
        "anonymous_mib_peak": outcome.peak_anonymous_bytes / 2**20,
        "anonymous_mib_after": after.anonymous_bytes / 2**20,
        "threads_after": after.threads,
        "disk_blocks_damaged": outcome.statistics.get("kvstored_drive_damaged_blocks_total", 0.0),
        "disk_calls_failed": outcome.statistics.get("kvstored_drive_errors_total", 0.0),
    }


def verbs_of(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Milliseconds by verb."""
    return {
        verb.name.lower(): {
            "count": found.count, "p50_ms": found.p50_s * 1e3, "p99_ms": found.p99_s * 1e3,
            "longest_ms": found.longest_s * 1e3,
        }
        for verb, found in outcome.latencies().items()
    }  # fmt: skip
