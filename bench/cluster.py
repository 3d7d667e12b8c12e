"""`make cluster`: three hosts, one far side behind them, a router in front; one host is killed, another one cut off.

    engines --> router (clients/examples/router.py) --> three daemons, each with a directory and a cable of its own
                 by events of each daemon                     --cable--> an object store, or a Mooncake Store

    by turns        each request goes to the next host
    by events       each request goes where its prefix is
    in trouble      ... while a host is killed with -9, another one is cut off from the far side, and both come back

Every byte of every hit is compared with what was computed. What is printed is of this machine and this moment; figures
that count are taken by `python -m bench cluster --json FILE` (bench/METHOD.md says how).
"""

import argparse
import itertools
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

import kvclient
from bench.cable import Cable
from bench.cluster_load import Chain, Crowd, Engine, Seen, key_of, talks, traced
from bench.engines.mooncake import Mooncake, environment, find_mooncake, why_not
from bench.harness import ROOT, Findings, say
from bench.process import DaemonProcess
from bench.replay.models import BASE
from bench.replay.workload import Model
from kvclient.handing_over import take_over

HOSTS = 3
BLOCK_BYTES = 64 << 10
TRACE_BLOCK_BYTES = 4 << 10
TRACE_SHARES = (0.02, 0.05)  # of a trace's footprint, that fit into one host
TENANT = f"uid-{os.geteuid()}"
TRACE = "BENCH_CLUSTER_TRACE"  # names a file: then requests of a trace, too
PATIENCE_S = 60.0
LOOK_S = 0.005
GROUPS = 24
ROUTER = ROOT / "clients" / "examples" / "router.py"

Say = Callable[[str], None]


class ClusterError(Exception):
    """It could not be carried through."""


@dataclass
class Node:
    """One host: its daemon, the cable to the far side, an engine, and what the router knows of it."""

    name: str
    home: Path
    options: Sequence[str]
    cable: Cable | None
    daemon: DaemonProcess | None = None
    client: kvclient.Client | None = None
    engine: Engine | None = None

    def start(self) -> None:
        """Raises RuntimeError."""
        log_file = self.home / f"{self.name}.log"
        self.daemon = DaemonProcess(self.home / self.name, *self.options, log_file=log_file)

    def connect(self, block_bytes: int) -> None:
        """Its engine, once its daemon serves."""
        assert self.daemon is not None
        self.client = kvclient.connect(self.daemon.runtime_dir, timeout_s=1.0)
        if not self.client.wait_connected(PATIENCE_S):
            raise ClusterError(f"{self.name} cannot be reached: {self.client.status}")
        namespace = self.client.namespace(
            model="m", engine="cluster", layout="flat", dtype="uint8", block_tokens=16, block_bytes=block_bytes
        )
        self.engine = Engine(self.name, namespace)

    def end(self) -> None:
        """Nothing of it is left."""
        if self.client is not None:
            self.client.close()
        if self.daemon is not None:
            self.daemon.kill()
        if self.cable is not None:
            self.cable.close()


class Cluster:
    """Three hosts that serve. A context manager; `router` as the example is."""

    def __init__(self, home: Path, *, dram: str, block_bytes: int, far: "Far | None" = None) -> None:
        """`far`: what lies beyond; None: nothing."""
        self._stack = ExitStack()
        self._next = itertools.count()
        self._lock = threading.Lock()
        self.nodes: list[Node] = []
        try:
            self._start(home, dram, block_bytes, far)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, home: Path, dram: str, block_bytes: int, far: "Far | None") -> None:
        for number in range(HOSTS):
            cable = Cable(far.port) if far is not None else None
            usual = ("--dram", dram, "--lock", "false", "--log-level", "warning", "--events-listen", "grpc")
            beyond = far.options(cable.port) if far is not None and cable is not None else ()
            node = Node(f"host{number}", home, (*usual, *beyond), cable)
            self._stack.callback(node.end)
            self.nodes.append(node)
        with ThreadPoolExecutor(HOSTS) as starting:
            list(starting.map(Node.start, self.nodes))
        for node in self.nodes:
            node.connect(block_bytes)
        example = runpy.run_path(str(ROUTER))
        self._choose: Any = example["choose"]
        self.routed: list[Any] = []
        for node in self.nodes:
            assert node.daemon is not None
            self.routed.append(example["Host"](node.daemon.runtime_dir, TENANT))
            self._stack.callback(self.routed[-1].close)
        self._digests = [self.engines[0].namespace.identity.digest().hex()]

    @property
    def engines(self) -> list[Engine]:
        """One a host."""
        return [node.engine for node in self.nodes if node.engine is not None]

    def in_turn(self, _: Chain) -> Engine:
        """The next one."""
        return self.engines[next(self._next) % HOSTS]

    def by_events(self, chain: Chain) -> Engine:
        """Where the prefix is."""
        with self._lock:
            chosen = self._choose(self.routed, self._digests, chain)
        return self.engines[self.routed.index(chosen)]

    def await_up(self, number: int) -> None:
        """Until the router hears of a host. Raises ClusterError."""
        await_all(lambda: self.routed[number].up, f"the router hears nothing of host{number}")

    def __enter__(self) -> Self:
        for number in range(HOSTS):
            self.await_up(number)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@contextmanager
def hosts(*, dram: str, block_bytes: int, far: "Far | None" = None) -> Iterator[Cluster]:
    """Three fresh ones, in a folder of their own."""
    with (
        tempfile.TemporaryDirectory(prefix="kvc-") as folder,
        Cluster(Path(folder), dram=dram, block_bytes=block_bytes, far=far) as cluster,
    ):
        yield cluster


class Far:
    """What lies beyond the hosts: where, and how a daemon is told of it."""

    def __init__(self, name: str, port: int, options: Callable[[int], tuple[str, ...]]) -> None:
        """`options`: by the port of a host's cable to it."""
        self.name = name
        self.port = port
        self.options = options


@contextmanager
def object_store() -> Iterator[Far]:
    """A server that speaks S3: the tests' own."""
    from tests.s3 import S3Server

    with S3Server() as server:
        os.environ |= server.environ

        def options(port: int) -> tuple[str, ...]:
            endpoint = ("--remote-endpoint", f"http://127.0.0.1:{port}", "--remote-deadline", "1s")
            return ("--remote", f"s3://{server.bucket}/cluster", "--remote-size", "4GiB", *endpoint)

        yield Far("object", server.port, options)


@contextmanager
def mooncake_store(home: Path) -> Iterator[Far]:
    """A Mooncake Store. Raises ClusterError where it is not there."""
    python = find_mooncake()
    if python is None:
        raise ClusterError(why_not())
    os.environ |= environment()
    with Mooncake(python, log_file=home / "mooncake.log", store_bytes=1 << 30) as serving:

        def options(port: int) -> tuple[str, ...]:
            places = ("--remote", f"mooncake://127.0.0.1:{port}", "--remote-python", str(python))
            return (*places, "--remote-size", "4GiB", "--remote-deadline", "1s")

        yield Far("mooncake", int(serving.address.rpartition(":")[2]), options)


# -- what is done to them --------------------------------------------------------------------------------------------


def compare_routes(
    requests: Sequence[Chain], *, dram: str, block_bytes: int, threads: int, say: Say, model: Model = BASE
) -> tuple[Seen, Seen]:
    """The same requests by turns and by events, on fresh hosts without a far side."""
    seen = []
    for name in ("by turns", "by events"):
        with hosts(dram=dram, block_bytes=block_bytes) as cluster:
            route = cluster.in_turn if name == "by turns" else cluster.by_events
            seen.append(Crowd(requests, route, threads=threads, model=model).serve(len(requests)))
        hits = f"{seen[-1].share:.1%} of {seen[-1].blocks:,} blocks were hits, {seen[-1].saved:.1%} of prefill saved"
        say(f"{name}: {hits}; {dict(seen[-1].by_host)}")
    return seen[0], seen[1]


@dataclass(frozen=True, slots=True)
class Troubled:
    """What was seen before, while a host was dead, while another one was cut off as well, and after both came back."""

    before: Seen
    killed: Seen
    cut: Seen
    mended: Seen
    brought_blocks: int  # of the prefixes that all share, what a host that began anew had from the far side

    @property
    def all(self) -> tuple[Seen, Seen, Seen, Seen]:
        """In their order."""
        return (self.before, self.killed, self.cut, self.mended)


def trouble(far: Far, requests: Sequence[Chain], *, dram: str, block_bytes: int, threads: int, say: Say) -> Troubled:
    """Four parts of the requests: undisturbed; host0 killed meanwhile; host1 cut off too; both back. Raises."""
    part = max(1, len(requests) // 4)
    with hosts(dram=dram, block_bytes=block_bytes, far=far) as cluster:
        first, second, _ = cluster.nodes
        assert first.daemon is not None
        assert first.client is not None
        assert second.cable is not None
        crowd = Crowd(requests, cluster.by_events, threads=threads)
        before = crowd.serve(part)
        say(f"all well: {told(before)}")
        killed = crowd.serve(part, midway=first.daemon.kill)
        say(f"host0 killed with -9 under load: {told(killed)}")
        cut = crowd.serve(part, midway=second.cable.cut)
        say(f"host1 cut off from the far side as well: {told(cut)}")
        second.cable.mend()
        first.start()
        await_all(lambda: first.client is not None and first.client.ping() is not None, "host0 does not come back")
        cluster.await_up(0)
        mended = crowd.serve(len(requests))
        say(f"both are back: {told(mended)}")
        brought = bring(cluster.engines[0])
        say(f"host0, which began with nothing, had {brought:,} blocks of shared prefixes from the far side")
    return Troubled(before, killed, cut, mended, brought)


def bring(engine: Engine) -> int:
    """Blocks of the prefixes that all share, once the host has asked the far side for each."""
    brought = 0
    for group in range(GROUPS):
        keys = [key_of(f"group {group}/{at}") for at in range(16)]
        with take_over(engine.namespace, keys, wait_s=0.3) as lease:
            brought += lease.blocks
    return brought


def told(seen: Seen) -> str:
    """In a line."""
    return f"{seen.share:.1%} hits, {seen.wrong} wrong blocks, longest call {1e3 * seen.longest_s:.0f} ms"


def await_all(there: Callable[[], object], trouble: str) -> None:
    """Raises ClusterError."""
    until = time.monotonic() + PATIENCE_S
    while not there():
        if time.monotonic() > until:
            raise ClusterError(trouble)
        time.sleep(LOOK_S)


# -- runs ------------------------------------------------------------------------------------------------------------


def run(*, quick: bool, say: Say = say) -> Findings:
    """All figures of `cluster`. Needs 1 GiB of memory; with a trace (BENCH_CLUSTER_TRACE) some minutes."""
    requests = talks(GROUPS, 300 if quick else 2000)
    turns, events = compare_routes(requests, dram="16MiB", block_bytes=BLOCK_BYTES, threads=2, say=say)
    findings: Findings = routes("talks", turns, events)
    if TRACE in os.environ:
        chains, model = traced(Path(os.environ[TRACE]), 500 if quick else None)
        footprint = len({key for chain in chains for key in chain}) * TRACE_BLOCK_BYTES
        for share in TRACE_SHARES:
            dram = f"{max(16, round(share * footprint / (1 << 20)))}MiB"
            say(f"a trace of {len(chains):,} requests, {dram} a host")
            turns, events = compare_routes(
                chains, dram=dram, block_bytes=TRACE_BLOCK_BYTES, threads=2, say=say, model=model
            )
            findings |= routes(f"trace_{share:.0%}", turns, events)
    with tempfile.TemporaryDirectory(prefix="kvc-") as folder:
        for name, lies in (("object", object_store), ("mooncake", lambda: mooncake_store(Path(folder)))):
            say(f"-- {name} store behind them")
            try:
                with lies() as far:
                    found = trouble(far, requests, dram="16MiB", block_bytes=BLOCK_BYTES, threads=2, say=say)
            except (ClusterError, ImportError, RuntimeError) as error:
                findings[f"{name}_why_not"] = str(error)[-400:]
                say(f"not shown: {error}")
                continue
            for when, seen in zip(("before", "killed", "cut", "mended"), found.all, strict=True):
                findings |= {f"{name}_{when}_hit_share": seen.share, f"{name}_{when}_longest_s": seen.longest_s}
            findings |= {f"{name}_wrong_blocks": sum(seen.wrong for seen in found.all)}
            findings |= {f"{name}_brought_blocks": found.brought_blocks}
    return findings


def routes(name: str, turns: Seen, events: Seen) -> Findings:
    """By events, over by turns."""
    return {
        f"{name}_by_turns_hit_share": turns.share,
        f"{name}_by_events_hit_share": events.share,
        f"{name}_hits_by_events_over_turns": events.hits / turns.hits if turns.hits else None,
        f"{name}_by_turns_compute_saved": turns.saved,
        f"{name}_by_events_compute_saved": events.saved,
        f"{name}_saved_by_events_over_turns": events.saved / turns.saved if turns.saved else None,
        f"{name}_wrong_blocks": turns.wrong + events.wrong,
    }


def main() -> int:
    """The demonstration. Its exit status: 0 only if no wrong byte was seen."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description="Three hosts on one machine.")
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    findings = run(quick=options.quick, say=console.print)
    table = Table("", "found", box=None, pad_edge=False)
    for name, found in findings.items():
        table.add_row(name, f"{found:.4g}" if isinstance(found, int | float) else str(found))
    console.print(table)
    return 1 if any(name.endswith("wrong_blocks") and found for name, found in findings.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
