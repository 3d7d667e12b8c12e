"""Tables and pictures of curves."""

from pathlib import Path

from bench.replay.draw import Curve, draw, tables
from bench.replay.score import Score

CURVES = (
    Curve("lru", (0.01, 0.2), (Score(0.1, 0.2, 0.3), Score(0.4, 0.5, 0.6))),
    Curve("belady", (0.01, 0.2), (Score(0.5, 0.6, 0.7), Score(0.8, 0.9, 1.0))),
)
CEILING = Score(0.8, 0.9, 1.0)


def test_each_measure_has_a_table_with_a_line_a_policy_and_a_column_a_capacity() -> None:
    assert tables(CURVES, CEILING).splitlines() == [
        "blocks hit, %                1 %    20 %",
        "lru                         10.0    40.0",
        "belady                      50.0    80.0",
        "infinite                            80.0",
        "",
        "tokens hit, %                1 %    20 %",
        "lru                         20.0    50.0",
        "belady                      60.0    90.0",
        "infinite                            90.0",
        "",
        "compute saved, %             1 %    20 %",
        "lru                         30.0    60.0",
        "belady                      70.0   100.0",
        "infinite                           100.0",
    ]


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    target = tmp_path / "curves.png"
    draw("toy", CURVES, CEILING, target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
