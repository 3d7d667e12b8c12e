"""Curves of policies over capacity: a table to read in a terminal, and a PNG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.replay.score import Score

BOUND: Final = "belady"  # drawn apart from what could be run
RIVAL: Final = "libcachesim/"  # begins the names of those that are not ours

_MEASURES: Final[tuple[tuple[str, Callable[[Score], float]], ...]] = (
    ("blocks hit", lambda score: score.hit),
    ("tokens hit", lambda score: score.token_hit),
    ("compute saved", lambda score: score.compute_saved),
)
_MARKERS: Final = "osD^v<>PX*hd"


@dataclass(frozen=True, slots=True)
class Curve:
    """One policy's scores; `shares` of the footprint, rising, and a score for each."""

    policy: str
    shares: tuple[float, ...]
    scores: tuple[Score, ...]


def table(curves: Sequence[Curve], ceiling: Score) -> str:
    """In %, a block of columns a measure; the last line is what an infinite cache would have."""
    shares = curves[0].shares
    width = 8 * len(shares)
    lines = [
        f"{'':24}" + "".join(f"{name:>{width}}" for name, _ in _MEASURES),
        f"{'of footprint':24}" + "".join(f"{share:8.1%}" for share in shares) * len(_MEASURES),
    ]
    for curve in curves:
        values = (value(score) for _, value in _MEASURES for score in curve.scores)
        lines.append(f"{curve.policy:24}" + "".join(f"{100 * each:8.1f}" for each in values))
    lines.append(f"{'infinite':24}" + "".join(f"{100 * value(ceiling):{width}.1f}" for _, value in _MEASURES))
    return "\n".join(lines)


def draw(title: str, curves: Sequence[Curve], ceiling: Score, target: Path) -> None:
    """Write a PNG with a panel a measure."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    figure.suptitle(title)
    for axes, (name, value) in zip(figure.subplots(1, len(_MEASURES)), _MEASURES, strict=True):
        _panel(axes, name, curves, value, value(ceiling))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(target, format="png", dpi=110)


def _panel(axes: Axes, name: str, curves: Sequence[Curve], value: Callable[[Score], float], ceiling: float) -> None:
    for number, curve in enumerate(curves):
        bound, hinted = curve.policy == BOUND, "," in curve.policy
        axes.plot(
            [100 * share for share in curve.shares],
            [100 * value(score) for score in curve.scores],
            label=curve.policy,
            color="black" if bound else f"C{number % 10}",
            linestyle="--" if bound else ":" if curve.policy.startswith(RIVAL) else "-." if hinted else "-",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
        )
    axes.axhline(100 * ceiling, color="grey", linestyle=":", label="infinite")
    shares = [100 * share for share in curves[0].shares]
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("capacity, % of footprint")
    axes.set_ylabel(f"{name}, %")
    axes.grid(visible=True, alpha=0.3)
