"""Huge pages and NUMA nodes: what they do for the start and for a fetch, in pairs of daemons with and without.

bench/METHOD.md says what each figure covers.
"""

import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import grpc

import kvclient
from bench.dram import MIB, measure_fetch, measure_first_fetch, open_namespace
from bench.harness import Findings, daemon, say
from kvkernels import libc
from kvproto import control_pb2, control_pb2_grpc
from kvstored.placement import Topology
from kvstored.regions import make_region

DRAM_MIB = 1024
GIB = 1 << 30
LOOK_S = 0.002
PLACED_S = 30.0
# Python runs it at the start of a daemon: two nodes, of which pages lie on the one they were wanted on.
TWO_NODES = """
import sys
if sys.orig_argv[1:3] == ["-m", "kvstored"]:
    from kvkernels import numa
    wanted = []
    numa.prefer = lambda address, size, node: wanted.append((address, size, node))
    numa.nodes_of = lambda pages: [
        ([node for start, size, node in wanted if start <= page < start + size] or [0])[-1] for page in pages
    ]
    from kvstored import placement
    placement.Topology.read = staticmethod(lambda: placement.Topology((0, 1)))
"""


def run(*, quick: bool) -> Findings:
    """All figures of `placement`. Needs 2 GiB of memory."""
    rounds = 1 if quick else 5
    results: Findings = {}
    starts: dict[str, list[tuple[float, float]]] = {"huge": [], "small": []}
    touched = []
    for turn in range(rounds):
        touched.append(touch_seconds())
        for name in ("huge", "small") if turn % 2 else ("small", "huge"):
            starts[name].append(start_seconds(name))
        say(f"start {turn + 1} of {rounds}: done")
    results["touch_s_per_gib"] = median(touched)
    for name, pairs in starts.items():
        results[f"{name}_serving_s"] = median(serving for serving, _ in pairs)
        results[f"{name}_populate_s_per_gib"] = median(populated for _, populated in pairs) * GIB / (DRAM_MIB * MIB)
    for name in starts:
        results |= {f"{name}_{figure}": value for figure, value in fetches(name, quick=quick).items()}
        say(f"fetch from {name} pages: done")
    nodes = Topology.read().nodes
    results["nodes"] = len(nodes)
    if len(nodes) > 1:
        results |= {f"node_{node}_fetch_2mib_over_memcpy": fetch_from(node, quick=quick) for node in nodes}
    else:
        results["node_fetch_2mib_over_memcpy"] = "not measured: this machine has one node"
    return results | shared_by_two_nodes()


def touch_seconds() -> float:
    """The limit of populating: the kernel makes and zeroes each small page of 1 GiB of shared memory."""
    region = make_region("bench", GIB)
    begun = time.perf_counter()
    libc.advise(region.address, GIB, libc.MADV_POPULATE_WRITE)
    seconds = time.perf_counter() - begun
    region.unmap()
    os.close(region.fd)
    return seconds


def start_seconds(pages: str) -> tuple[float, float]:
    """From exec until it serves, and from then until all of DRAM is populated."""
    begun = time.perf_counter()
    with daemon(*arguments(pages)) as running:
        serving = time.perf_counter() - begun
        with grpc.insecure_channel(f"unix:{running.runtime_dir}/control.sock") as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            while (
                tier := stub.GetStatus(control_pb2.GetStatusRequest()).tiers[0]
            ).populated_bytes < tier.capacity_bytes:
                time.sleep(LOOK_S)
        populated = time.perf_counter() - begun - serving
        assert bool(tier.huge_bytes) == (pages == "huge"), f"{tier.huge_bytes} bytes in huge pages"
    return serving, populated


def fetches(pages: str, *, quick: bool) -> dict[str, float]:
    """By a client that has mapped everything, and by fresh ones."""
    with daemon(*arguments(pages)) as running, kvclient.connect(str(running.runtime_dir)) as client:
        running.await_memory()
        assert client.wait_connected(5)
        namespace = open_namespace(client, 2 * MIB)
        found = measure_fetch(namespace, 2 * MIB, 100, 5 if quick else 25, "fetch_2mib")
        return found | measure_first_fetch(running.runtime_dir, namespace, 3 if quick else 9)


def fetch_from(node: int, *, quick: bool) -> float:
    """Of memory that lies on one node, by a client wherever it runs."""
    with (
        daemon("--numa", str(node), *arguments("huge")) as running,
        kvclient.connect(str(running.runtime_dir)) as client,
    ):
        running.await_memory()
        assert client.wait_connected(5)
        found = measure_fetch(open_namespace(client, 2 * MIB), 2 * MIB, 100, 5 if quick else 25, "fetch")
        return found["fetch_over_memcpy"]


def shared_by_two_nodes() -> Findings:
    """What a daemon makes of two nodes that there are not: how much of DRAM it wants on either."""
    with TemporaryDirectory(prefix="kvstored-bench-") as folder:
        Path(folder, "sitecustomize.py").write_text(TWO_NODES)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = folder if before is None else f"{folder}{os.pathsep}{before}"
        try:
            with daemon(*arguments("small")) as running:
                running.await_memory()
                on_nodes = bytes_on_nodes(running.runtime_dir)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
    return {
        "simulated_nodes": len(on_nodes),
        "simulated_mib_placed": sum(on_nodes) / MIB,
        "simulated_mib_apart": (max(on_nodes) - min(on_nodes)) / MIB,
    }


def bytes_on_nodes(runtime_dir: Path) -> list[int]:
    """Of a daemon's DRAM; it looks once a second until it knows of all."""
    deadline_s = time.monotonic() + PLACED_S
    with grpc.insecure_channel(f"unix:{runtime_dir}/control.sock") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        while True:
            tier = stub.GetStatus(control_pb2.GetStatusRequest()).tiers[0]
            found = [node.bytes for node in tier.nodes]
            if sum(found) >= tier.capacity_bytes or time.monotonic() > deadline_s:
                return found or [0]
            time.sleep(LOOK_S)


def arguments(pages: str) -> tuple[str, ...]:
    """For a daemon with huge pages or without."""
    return ("--dram", f"{DRAM_MIB}MiB", "--lock", "false", "--huge-pages", str(pages == "huge").lower())
