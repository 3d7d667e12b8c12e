"""A real Prometheus, a real daemon, real traffic: every panel of the dashboard has an answer."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.dashboard import TENANTS, Host, Prometheus, find_prometheus, panels

pytestmark = pytest.mark.slow

PATIENCE_S = 90.0
# A rate of nothing is an answer, too: these move only where there is a bucket, and routers that listen.
MOVED = (
    "kvstored_remote_written_bytes_total", "kvstored_remote_read_bytes_total", "kvstored_events_changes_total",
    "kvstored_events_replayed_messages_total", "kvstored_events_subscribers", "kvstored_events_watchers",
)  # fmt: skip


@pytest.fixture
def prometheus_command() -> str:
    found = find_prometheus()
    if found is None:
        pytest.skip("Prometheus is not installed: Debian has it in the package prometheus")
    return found


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvp-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_every_query_of_every_panel_is_answered_with_figures(prometheus_command: str, home: Path) -> None:
    (home / "prometheus").mkdir()
    waiting = {(panel.title, target.expression) for panel in panels("30s") for target in panel.targets}
    assert len(waiting) >= 50
    waiting |= {("really", f"{name} > 0") for name in MOVED}
    with Host(home) as host, Prometheus(prometheus_command, home / "prometheus", host.address) as prometheus:
        deadline_s = time.monotonic() + PATIENCE_S
        while waiting and time.monotonic() < deadline_s:
            host.busy()
            waiting = {one for one in waiting if not any(map(math.isfinite, prometheus.query(one[1])))}
        assert not waiting, waiting
        assert prometheus.query("kvstored_serving") == [1.0]
        assert not prometheus.query("kvstored_no_such_metric"), "the control is answered as well"
        with pytest.raises(ValueError, match="parse error"):
            prometheus.query("rate(")
        assert prometheus.query("sum(kvstored_hit_bytes_total)")[0] > 0
        sessions = prometheus.query_range("kvstored_sessions", time.time() - 30, time.time(), 10.0)
        assert sorted(labels["tenant"] for labels, _ in sessions) == sorted(TENANTS)
