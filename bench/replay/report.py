"""Fills the tables of `bench/results/replay.md` from the records beside it: `python -m bench.replay.report`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is written around it is for people to judge by.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.replay.synthetic import GENERATORS

RESULTS: Final = Path(__file__).parents[1] / "results"
RIVALS: Final = ("lru", "pgdsf", "s3fifo", "arc")
SHARES: Final = ("0.01", "0.05", "0.1", "0.2")
HEAD: Final = "| 1 % | 5 % | 10 % | 20 % |"
TRACES: Final = {
    "trace": "conversation",
    "trace, first half": "conversation_half_1",
    "trace, second half": "conversation_half_2",
}
ALLOWED: Final = 0.3  # points that a default may lose
POLICIES_MD: Final = {  # its section 2, in %
    "lru": (5.3, 19.6, 27.9, 34.5),
    "pgdsf": (5.5, 20.4, 28.6, 33.6),
    "s3fifo": (7.6, 19.1, 24.3, 30.7),
    "arc": (6.5, 21.0, 28.4, 32.0),
    "second_touch": (11.0, 21.3, 29.4, 34.3),
    "density, one bit 80 %": (8.6, 30.6, 35.7, 36.4),
    "belady": (24.6, 36.6, 36.6, 36.6),
}

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # policy -> share -> measure


def main() -> None:
    """Fill all tables. An unknown name is an error."""
    path = RESULTS / "replay.md"
    text, count = re.subn(
        r"(<!-- table (.+?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{_table(found[2])}\n{found[3]}",
        path.read_text(),
        flags=re.DOTALL,
    )
    path.write_text(text)
    print(f"{count} tables")


def _table(name: str) -> str:
    kind, _, rest = name.partition(" ")
    makers: dict[str, Callable[[str], str]] = {
        "against": _against, "worst": _worst, "policies": lambda _: _policies(), "scores": _scores, "hints": _hints,
        "speed": lambda _: _speed(),
    }  # fmt: skip
    return makers[kind](rest)


def _record(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"replay_{name}.json").read_text())
    return loaded


def _rows(head: str, rows: Iterable[Sequence[str]]) -> str:
    columns = head.count("|") - 1
    lines = [head, "|" + "---|" * columns]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _saved(scores: Scores, policy: str, share: str) -> float:
    return 100 * scores[policy][share]["compute_saved"]


def _lead(scores: Scores, policy: str, share: str) -> tuple[float, str]:
    """Points ahead of the best rival, and who that is."""
    best = max(RIVALS, key=lambda rival: _saved(scores, rival, share))
    return _saved(scores, policy, share) - _saved(scores, best, share), best


def _cell(points: float, whose: str) -> str:
    text = f"{points:+.2f} {whose}"
    return f"**{text}**" if points < -ALLOWED else text


def _against(policy: str) -> str:
    """Against the best of the rivals: the trace, its halves, and means over held-out seeds."""
    sources = TRACES | {name: name for name in GENERATORS}
    rows = []
    for shown, name in sources.items():
        scores = _record(name)["results"]
        rows.append((shown, *(_cell(*_lead(scores, policy, share)) for share in SHARES)))
    return _rows(f"| {HEAD}", rows)


def _worst(policy: str) -> str:
    rows = []
    for name in GENERATORS:
        cells = []
        for share in SHARES:
            by_seed = {seed: _lead(scores, policy, share) for seed, scores in _record(name)["by_seed"].items()}
            seed = min(by_seed, key=lambda each: by_seed[each][0])
            points, best = by_seed[seed]
            cells.append(_cell(points, f"{best} ({seed})"))
        rows.append((name, *cells))
    return _rows(f"| {HEAD}", rows)


def _policies() -> str:
    """Hits of blocks beside the rows of POLICIES.md."""
    scores = _record("conversation")["results"]
    rows = []
    for policy, theirs in POLICIES_MD.items():
        cells = []
        for share, there in zip(SHARES, theirs, strict=True):
            here = 100 * scores[policy][share]["hit"]
            text = f"{here:.1f} ({here - there:+.1f})"
            cells.append(f"**{text}**" if abs(here - there) > 0.5 else text)
        rows.append((policy, *cells))
    return _rows(f"| policy {HEAD}", rows)


def _scores(rest: str) -> str:
    """Of one record, one measure: `scores agents compute_saved`."""
    name, measure = rest.split(" ")
    scores: Scores = _record(name)["results"]
    shown = [policy for policy in scores if "," not in policy]
    rows = [(policy, *(f"{100 * scores[policy][share][measure]:.1f}" for share in SHARES)) for policy in shown]
    return _rows(f"| policy {HEAD}", rows)


def _hints(rest: str) -> str:
    """What hints bring over LRU without: points of blocks hit on the trace, the factor of compute saved elsewhere."""
    scores: Scores = _record(rest)["results"]
    shown = [policy for policy in scores if "," in policy or policy in {"density", "belady"}]
    rows = []
    for policy in shown:
        cells = []
        for share in SHARES:
            if rest == "conversation":
                here, lru = (100 * scores[each][share]["hit"] for each in (policy, "lru"))
                cells.append(f"{here:.1f} ({here - lru:+.1f})")
            else:
                cells.append(f"{_saved(scores, policy, share) / _saved(scores, 'lru', share):.2f}")
        rows.append((policy, *cells))
    return _rows(f"| {HEAD}", rows)


def _speed() -> str:
    speeds: dict[str, float] = _record("conversation")["accesses_a_second"]
    rows = [(policy, f"{speed:,.0f}") for policy, speed in speeds.items() if "," not in policy and "/" not in policy]
    return _rows("| policy | block accesses a second |", rows)


if __name__ == "__main__":
    main()
