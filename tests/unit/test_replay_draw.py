"""Tables and pictures of curves."""

from pathlib import Path

from bench.replay.draw import Curve, draw, table
from bench.replay.score import Score

CURVES = (
    Curve("lru", (0.01, 0.2), (Score(0.1, 0.2, 0.3), Score(0.4, 0.5, 0.6))),
    Curve("belady", (0.01, 0.2), (Score(0.5, 0.6, 0.7), Score(0.8, 0.9, 1.0))),
)
CEILING = Score(0.8, 0.9, 1.0)


def test_a_table_has_a_line_a_policy_and_a_column_a_capacity_and_measure() -> None:
    assert table(CURVES, CEILING).splitlines() == [
        "                              blocks hit      tokens hit   compute saved",
        "of footprint                1.0%   20.0%    1.0%   20.0%    1.0%   20.0%",
        "lru                         10.0    40.0    20.0    50.0    30.0    60.0",
        "belady                      50.0    80.0    60.0    90.0    70.0   100.0",
        "infinite                            80.0            90.0           100.0",
    ]


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    target = tmp_path / "curves.png"
    draw("toy", CURVES, CEILING, target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
