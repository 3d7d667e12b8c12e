"""Curves of policies over capacity: tables to read in a terminal, and a PNG, which alone wants matplotlib."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.replay.score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUND: Final = "belady"  # drawn apart from what could be run
RIVAL: Final = "libcachesim/"  # begins the names of those that are not ours

_MEASURES: Final[tuple[tuple[str, Callable[[Score], float]], ...]] = (
    ("blocks hit", lambda score: score.hit),
    ("tokens hit", lambda score: score.token_hit),
    ("compute saved", lambda score: score.compute_saved),
)
_NAME, _CELL = 24, 8  # columns: of a policy's name, and of a figure. Seven capacities fit in a terminal's 80
_MARKERS: Final = "osD^v<>PX*hd"


@dataclass(frozen=True, slots=True)
class Curve:
    """One policy's scores; `shares` of the footprint, rising, and a score for each."""

    policy: str
    shares: tuple[float, ...]
    scores: tuple[Score, ...]


def tables(curves: Sequence[Curve], ceiling: Score) -> str:
    """In %, one a measure, a column a capacity; the last line is what an infinite cache would have, of any capacity."""
    shares = curves[0].shares
    parts = []
    for name, value in _MEASURES:
        lines = [f"{f'{name}, %':{_NAME}}" + "".join(f"{f'{100 * share:g} %':>{_CELL}}" for share in shares)]
        for curve in curves:
            cells = "".join(f"{100 * value(score):{_CELL}.1f}" for score in curve.scores)
            lines.append(f"{curve.policy:{_NAME}}{cells}")
        lines.append(f"{'infinite':{_NAME}}{100 * value(ceiling):{_CELL * len(shares)}.1f}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def why_no_picture() -> str:
    """Empty if one can be drawn."""
    return "" if find_spec("matplotlib") else "matplotlib is missing, which the environment of `make demo` has"


def draw(title: str, curves: Sequence[Curve], ceiling: Score, target: Path) -> None:
    """Write a PNG with a panel a measure. Raises ImportError without matplotlib: see `why_no_picture`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    figure.suptitle(title)
    for axes, (name, value) in zip(figure.subplots(1, len(_MEASURES)), _MEASURES, strict=True):
        _panel(axes, name, curves, value, value(ceiling))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(target, format="png", dpi=110)


def _panel(axes: "Axes", name: str, curves: Sequence[Curve], value: Callable[[Score], float], ceiling: float) -> None:
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
