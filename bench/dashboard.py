"""`python -m bench.dashboard [--seconds N] [--out FILE]`: the panels of systemd/grafana/kvstored.json, drawn to a PNG.

A real daemon with two tenants, a disk tier, a bucket behind it (the tests' own server) and routers that listen serves
real traffic, a real Prometheus scrapes it and answers each panel's query, and what it answers is drawn. The picture
says which panels it shows (`digest`), so that a test finds one that is older than the dashboard. Prometheus is Debian's
package of that name.
"""

import argparse
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from itertools import zip_longest
from pathlib import Path
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import zmq

import kvclient
from bench.harness import HOMES, ROOT, say
from bench.process import DaemonProcess
from kvstored.block_events_address import IPC, endpoints_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SYSTEMD: Final = ROOT / "systemd"
ROUTER: Final = ROOT / "clients" / "examples" / "router.py"
DASHBOARD: Final = SYSTEMD / "grafana/kvstored.json"
PICTURE: Final = SYSTEMD / "grafana/kvstored.png"
BLOCK_BYTES: Final = 256 << 10
CHAIN: Final = 16  # blocks
KEPT: Final = 24  # chains that are asked for again: more than memory holds, fewer than the disk does
FAR: Final = 56  # chains ago: the disk has lost it, the bucket has it
MISSED: Final = 4  # messages that a router asks for again
PATIENCE_S: Final = 30.0
TENANTS: Final = ("chat", "research")
RATE_INTERVAL: Final = "15s"  # of the picture
DIGEST_KEY: Final = "Dashboard"  # of the picture's text

COLUMNS: Final = 4
SETTLED_S: Final = 20.0  # until rates are those of whole intervals
LEGENDS: Final = 10  # lines of a panel that are still named
UNITS: Final = {"s": "s", "ops": "/s", "Bps": "B/s", "bytes": "B", "decbytes": "B"}

Samples = list[tuple[float, float]]  # seconds since the epoch, and the value
Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel, with queries that Prometheus takes as they are."""

    title: str
    kind: str  # "stat" or "timeseries"
    unit: str
    targets: tuple[Target, ...]


def panels(rate_interval: str) -> list[Panel]:
    """All of the dashboard that ask for something, for all hosts."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            continue
        asked = ((one["expr"].replace("$__rate_interval", rate_interval), one) for one in panel["targets"])
        targets = tuple(Target(text.replace("$instance", ".*"), one["legendFormat"]) for text, one in asked)
        found.append(Panel(panel["title"], panel["type"], panel["fieldConfig"]["defaults"]["unit"], targets))
    return found


def digest(drawn: Sequence[Panel]) -> str:
    """Of these panels: their titles, units and queries, not where Grafana places them."""
    return hashlib.sha256(repr(list(drawn)).encode()).hexdigest()


# -- a host ----------------------------------------------------------------------------------------------------------


class Host:
    """A daemon with metrics, a bucket behind it, two clients that keep it busy, routers. A context manager."""

    def __init__(self, folder: Path) -> None:
        from tests.s3 import S3Server

        tables = [f'[tenants.{name}]\nuids = [{os.geteuid()}]\ndram_guaranteed = "16MiB"\n' for name in TENANTS]
        (folder / "kvstored.toml").write_text("".join(tables))
        self._random = Random(5)
        self._round = 0
        self._stack = ExitStack()
        s3 = self._stack.enter_context(S3Server())
        self.log_file = folder / "log"
        self.daemon = self._stack.enter_context(
            DaemonProcess(
                folder / "run", "--config", str(folder / "kvstored.toml"), "--dram", "64MiB", "--arena", "4MiB",
                "--lock", "false", "--disk", str(folder / "disk"), "--disk-size", "256MiB", "--disk-segment", "16MiB",
                "--disk-admission", "all", "--metrics-listen", "127.0.0.1:0", "--events-listen", IPC,
                "--remote", f"s3://{s3.bucket}/hosts", "--remote-endpoint", s3.endpoint, "--remote-size", "768MiB",
                log_file=self.log_file, through=("env", *(f"{name}={value}" for name, value in s3.environ.items())),
            )
        )  # fmt: skip
        self.address = self.log_file.read_text().split("metrics: listening on ", 1)[1].split()[0]
        clients = [self._stack.enter_context(kvclient.connect(folder / "run", tenant=name)) for name in TENANTS]
        assert all(client.wait_connected(PATIENCE_S) for client in clients)
        self._namespaces = [
            client.namespace(
                model="m", engine="dashboard", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
            )
            for client in clients
        ]
        self._routers = [self._stack.enter_context(Router(folder / "run", name)) for name in TENANTS]
        self._blocks = np.frombuffer(self._random.randbytes(CHAIN * BLOCK_BYTES), dtype=np.uint8)
        self._targets = np.zeros((CHAIN, BLOCK_BYTES), dtype=np.uint8)

    def busy(self) -> None:
        """One round of all that clients do: half a second, or less."""
        self._round += 1
        for ns in self._namespaces:
            keys = self._chain(ns, self._round)
            with ns.fetch(keys) as missed:
                assert not missed.blocks
            ns.report_prefill(0, CHAIN * 16, 0.1 * CHAIN)
            ns.report_load("dram", 20 << 20, 0.004)
            ns.store(keys, list(self._blocks.reshape(CHAIN, -1)), wait=True, space_s=PATIENCE_S)
            ns.match(keys)
            for back in self._random.sample(range(min(KEPT, self._round)), min(4, self._round)):
                with ns.fetch(self._chain(ns, self._round - back), wait_s=2.0) as lease:
                    lease.copy_to(self._targets[: lease.expected])
            older = self._chain(ns, max(1, self._round - KEPT // 2))
            ns.prefetch(older, deadline_s=2.0)
            ns.pin(keys, ttl_s=3.0)
            past, far = self._round - KEPT, self._round - FAR
            if past > 0 and past % 2:
                ns.delete(self._chain(ns, past)[:1])
            if far > 0 and not far % 2:
                ns.prefetch(self._chain(ns, far), deadline_s=2.0)
            with ns.fetch(older) as again:
                again.copy_to(self._targets[: again.blocks])
        for router in self._routers:
            router.hear()

    def _chain(self, ns: kvclient.Namespace, number: int) -> list[bytes]:
        return list(ns.keys([number] * 16 * CHAIN))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Router:
    """Follows a tenant's changes on the control socket and on ZeroMQ, and misses a few there. A context manager."""

    def __init__(self, runtime_dir: Path, tenant: str) -> None:
        self._watcher: Any = runpy.run_path(str(ROUTER))["Host"](runtime_dir, tenant)
        self._context = zmq.Context()
        self._told, self._replayed = self._context.socket(zmq.SUB), self._context.socket(zmq.DEALER)
        places = endpoints_of(IPC, runtime_dir, tenant)
        self._told.subscribe(b"")
        self._told.connect(places.publish)
        self._replayed.connect(places.replay)

    def hear(self) -> None:
        """All that was told since, and of the last messages once more."""
        last = 0
        while self._told.poll(0):
            _, number, _ = self._told.recv_multipart()
            last = int.from_bytes(number, "big")
        if last:
            self._replayed.send_multipart((b"", max(0, last - MISSED + 1).to_bytes(8, "big")))
        while self._replayed.poll(0):
            self._replayed.recv_multipart()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.close()
        self._context.destroy(linger=0)


# -- Prometheus ------------------------------------------------------------------------------------------------------


def find_prometheus() -> str | None:
    """Its command; None where it is not installed."""
    return shutil.which("prometheus")


class Prometheus:
    """The real one, with a folder of its own. A context manager that kills it."""

    def __init__(self, command: str, folder: Path, target: str, *, every: str = "1s") -> None:
        """`target`: what it scrapes. `folder` is there, and empty."""
        config = {
            "global": {"scrape_interval": every},
            "scrape_configs": [{"job_name": "kvstored", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML too
        self._log = (folder / "log").open("ab")
        self._process = subprocess.Popen(
            [
                command, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:0", "--log.level=info",
            ],
            stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self._log_file = folder / "log"
        try:
            self._url = self._await_address(time.monotonic() + PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def _await_address(self, deadline_s: float) -> str:
        while time.monotonic() < deadline_s and self._process.poll() is None:
            found = re.search(r'msg="Listening on" address=([0-9.:]+)', self._log_file.read_text())
            if found:
                return f"http://{found[1]}"
            time.sleep(0.02)
        raise RuntimeError(f"Prometheus does not listen\n{self._log_file.read_text()[-2000:]}")

    def query(self, expression: str) -> list[float]:
        """Values of all series as of now. Raises OSError while it is not ready; ValueError for a bad query."""
        result = self._ask("query", query=expression)
        return [float(one["value"][1]) for one in result]

    def query_range(self, expression: str, begin_s: float, end_s: float, step_s: float) -> list[tuple[Labels, Samples]]:
        """Each series with its values over time."""
        result = self._ask("query_range", query=expression, start=begin_s, end=end_s, step=step_s)
        return [(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in result]

    def _ask(self, verb: str, **arguments: str | float) -> list[Any]:
        url = f"{self._url}/api/v1/{verb}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
                return found
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            if error.code == HTTPStatus.BAD_REQUEST:
                raise ValueError(f"{arguments['query']}: {text}") from None
            raise OSError(f"{error.code}: {text}") from None

    def close(self) -> None:
        """End it. Any number of times."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# -- drawing ---------------------------------------------------------------------------------------------------------


def draw(prometheus: Prometheus, begin_s: float, end_s: float, target: Path) -> list[str]:
    """Write a PNG of all panels; the titles of those to which there was no answer."""
    from matplotlib.figure import Figure

    every, empty = panels(RATE_INTERVAL), []
    rows = -(-len(every) // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 2.7 * rows), layout="constrained")
    for axes, panel in zip_longest(figure.subplots(rows, COLUMNS).flat, every):
        if panel is None:
            axes.set_axis_off()
        elif not _draw_panel(axes, panel, prometheus, begin_s, end_s):
            empty.append(panel.title)
    figure.savefig(target, format="png", dpi=80, metadata={DIGEST_KEY: digest(every)})
    return empty


def _draw_panel(axes: "Axes", panel: Panel, prometheus: Prometheus, begin_s: float, end_s: float) -> bool:
    """Each series a line; whether there were any."""
    from matplotlib.ticker import EngFormatter

    drawn = 0
    for one in panel.targets:
        series = prometheus.query_range(one.expression, begin_s, end_s, max(1.0, (end_s - begin_s) / 240))
        for labels, samples in series:
            finite = [(at - begin_s, value) for at, value in samples if math.isfinite(value)]
            if finite:
                drawn += 1
                name = one.legend
                for label, value in labels.items():
                    name = name.replace("{{" + label + "}}", Path(value).name)
                axes.plot(*zip(*finite, strict=True), label=name, linewidth=1.1)
    axes.set_title(panel.title, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds", fontsize=7)
    if panel.unit in UNITS:
        axes.yaxis.set_major_formatter(EngFormatter(UNITS[panel.unit]))
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, alpha=0.3)
    if 1 < drawn <= LEGENDS:
        axes.legend(fontsize=6, loc="best")
    return drawn > 0


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m bench.dashboard")
    parser.add_argument("--seconds", type=float, default=120.0, help="of traffic")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    command = find_prometheus()
    if command is None:
        raise SystemExit("Prometheus is not installed: Debian has it in the package prometheus")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstored-bench-", dir=HOMES)))
        (folder / "prometheus").mkdir()
        host = stack.enter_context(Host(folder))
        prometheus = stack.enter_context(Prometheus(command, folder / "prometheus", host.address))
        begin_s, rounds = time.time(), 0
        while time.time() < begin_s + options.seconds:
            host.busy()
            rounds += 1
            time.sleep(max(0.0, begin_s + 0.5 * rounds - time.time()))
        empty = draw(prometheus, begin_s + SETTLED_S, time.time(), options.out)
        say(f"{rounds} rounds, drawn to {options.out}")
        if empty:
            raise SystemExit(f"no answer for: {', '.join(empty)}")


if __name__ == "__main__":
    main()
