"""What operators are given: the list of names, the dashboard and the alerts fit what the daemon says of itself."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstored.metrics_table import HISTOGRAMS, METRICS

SYSTEMD = Path(__file__).parents[2] / "systemd"
DASHBOARD = SYSTEMD / "grafana/kvstored.json"
RULES = SYSTEMD / "prometheus/kvstored.rules.yml"
RULE_TESTS = SYSTEMD / "prometheus/kvstored.rules.test.yml"
_ROW = re.compile(r"^\| `([a-z_]+)` \| (counter|gauge|histogram) \| ([a-z, ]*) \| (.+) \|$", re.MULTILINE)
_NAME = re.compile(r"\b(?:kvstored|process)_[a-z_]+")
OURS = {metric.name for metric in METRICS} | {name for name, _, _ in HISTOGRAMS}
ENDINGS = ("_bucket", "_sum", "_count")


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels by name, as METRICS.md has them."""
    rows = _ROW.findall((SYSTEMD / "METRICS.md").read_text())
    found = {name: (kind, tuple(filter(None, labels.strip().split(", ")))) for name, kind, labels, _ in rows}
    assert len(found) == len(rows), "a name is there twice"
    return found


def panels() -> Iterator[dict[str, Any]]:
    """Those that ask for something."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def known(expression: str) -> set[str]:
    """Names of metrics in an expression; each must exist."""
    names = set()
    for name in _NAME.findall(expression):
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
        histogram = name.removesuffix(ending) in {name for name, _, _ in HISTOGRAMS}
        names.add(name.removesuffix(ending) if histogram else name)
    return names


def test_the_list_has_every_metric_with_its_kind_and_labels_and_no_other() -> None:
    listed = documented()
    assert {name for name in listed if name.startswith("kvstored_")} == OURS
    for metric in METRICS:
        assert listed[metric.name] == (metric.kind, metric.labels)
    for name, _, label in HISTOGRAMS:
        assert listed[name] == ("histogram", (label,) if label else ())


def test_names_and_units_are_those_of_prometheus() -> None:
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not re.search(r"_(ms|us|ns|kib|mib|gib|percent|ratio)(_|$)", metric.name), metric.name
        assert metric.says.endswith("."), metric.name
        assert not {"key", "request", "model", "namespace", "pid", "client"} & set(metric.labels), metric.name


def test_dashboard_and_alerts_ask_for_what_there_is() -> None:
    asked: set[str] = set()
    for panel in panels():
        for target in panel["targets"]:
            assert "$instance" in target["expr"], f"{panel['title']}: not of the hosts that were chosen"
            asked |= known(target["expr"])
    alerts = re.findall(r"expr:(.*?)(?=\n        (?:for|labels):)", RULES.read_text(), re.DOTALL)
    assert len(alerts) == RULES.read_text().count("- alert:")
    for expression in alerts:
        asked |= known(expression)
    assert asked <= set(documented()), asked - set(documented())
    assert len(asked) >= 40, "the comparison would not notice an empty dashboard"


def test_panels_are_told_apart_and_lie_beside_each_other() -> None:
    whole = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in whole}) == len(whole)
    assert len({panel["title"] for panel in whole}) == len(whole)
    taken: set[tuple[int, int]] = set()
    for panel in whole:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: Debian has it in the package prometheus")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_promtool_takes_rules_and_configuration(promtool: str) -> None:
    for what, file in (("rules", RULES), ("config", SYSTEMD / "prometheus/prometheus.yml")):
        checked = run(promtool, "check", what, str(file))
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_for_who_is_ill_and_for_nobody_else(promtool: str, tmp_path: Path) -> None:
    named = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert sorted(named) == sorted(re.findall(r'ALERTS\{alertname="(\w+)"', RULE_TESTS.read_text()))
    checked = run(promtool, "test", "rules", str(RULE_TESTS))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    # The control: an alert that is the other way round is noticed.
    (tmp_path / RULES.name).write_text(RULES.read_text().replace("kvstored_drive_up == 0", "kvstored_drive_up == 1"))
    (tmp_path / RULE_TESTS.name).write_text(RULE_TESTS.read_text())
    broken = run(promtool, "test", "rules", str(tmp_path / RULE_TESTS.name))
    assert broken.returncode != 0
    assert "KvstoredDriveDown" in broken.stdout + broken.stderr
