"""The hot path: what a verb costs beyond an empty round trip, and what a block costs in memory.

Every figure is a difference or ratio within one run: pings and verbs are measured in turn in one loop, so that
a neighbour's noise hits both. bench/METHOD.md says more.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import kvclient
from bench.harness import Results, daemon, percentile, say
from bench.process import DaemonProcess
from kvclient import Client, Namespace

BLOCK_BYTES = 4096
REST_S = 5.0  # after its start, a daemon has loaded the rest of its compiled code: 40 MiB that are not its blocks'
Chain = list[bytes]


def run(*, quick: bool) -> Results:
    """All figures of `hot`. Needs 5 GiB of memory, a tenth of it with `quick`."""
    blocks = 100_000 if quick else 1_000_000
    rounds = 300 if quick else 3000
    dram = f"{(blocks * BLOCK_BYTES >> 20) + 192}MiB"  # and three arenas, so that nothing is evicted
    results: Results = {}
    with daemon("--dram", dram, "--lock", "false") as running:
        client = kvclient.connect(str(running.runtime_dir))
        assert client.wait_connected(5)
        hundreds = open_namespace(client, "hundreds")
        results |= measure_memory(running, hundreds, blocks)
        chains = chains_of(blocks // 100, 100)
        results |= measure_chains(client, hundreds, chains, rounds)
        results |= measure_load(client, hundreds, chains, running.runtime_dir, rounds)
        assert hundreds.delete([chain[0] for chain in chains]) == blocks
        thousands = open_namespace(client, "thousands")
        long_chains = chains_of(blocks // 1000, 1000)
        fill(thousands, long_chains)
        lease, ping = in_turn(lambda: lease_one(thousands, long_chains), lambda: ping_once(client), rounds // 2)
        results["lease_1000_over_ping_us"] = 1e6 * (median(lease) - median(ping))
        client.close()
    return results | measure_policies(blocks // 10, rounds)


def open_namespace(client: Client, name: str) -> Namespace:
    """A namespace of small blocks."""
    return client.namespace(
        model=name, engine="bench", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
    )


def chains_of(count: int, length: int, seed: int = 0) -> list[Chain]:
    """Chains of keys; keys are opaque to the store, so any 32 bytes serve."""
    generator = random.Random(length << 8 | seed)
    return [[generator.randbytes(32) for _ in range(length)] for _ in range(count)]


def fill(namespace: Namespace, chains: list[Chain]) -> None:
    """Store every chain."""
    block = os.urandom(BLOCK_BYTES)
    for number, chain in enumerate(chains):
        result = namespace.store(chain, [block] * len(chain), space_s=10)
        assert result.accepted == len(chain), result
        if number % max(1, len(chains) // 10) == 0:
            say(f"filling: {100 * number // len(chains)} %")
    assert namespace.flush(60).pending == 0


def measure_memory(running: DaemonProcess, namespace: Namespace, blocks: int) -> Results:
    """Proportional memory of the daemon less its arenas, per block, less an idle daemon's with one client.

    The client has stored before the first look, so that its ring counts in both.
    """
    fill(namespace, chains_of(1, 64))
    time.sleep(REST_S)
    empty_bytes = memory_bytes(running.process.pid)
    fill(namespace, chains_of(blocks // 100, 100))
    full_bytes = memory_bytes(running.process.pid)
    return {"bytes_per_block": (full_bytes - empty_bytes) / blocks, "empty_daemon_mib": empty_bytes / 2**20}


def memory_bytes(pid: int) -> int:
    """Proportional set size of a process without its arenas; index memfds included."""
    total_kib, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counts = "memfd:kvstored-arena" not in line
        elif counts and line.startswith("Pss:"):
            total_kib += int(line.split()[1])
    return total_kib << 10


def measure_chains(client: Client, namespace: Namespace, chains: list[Chain], rounds: int) -> Results:
    """LEASE+RELEASE and MATCH of chains of 100, each against pings in the same loop."""
    generator = random.Random(1)
    absent = chains_of(50, 100, seed=1)
    holed = [[*chain[:99], os.urandom(32)] for chain in generator.sample(chains, 500)]

    def match_absent() -> None:
        assert namespace.match(generator.choice(absent)).blocks == 0

    def match_holed() -> None:
        assert namespace.match(generator.choice(holed)).blocks == 99

    results: Results = {}
    lease, ping = in_turn(lambda: lease_one(namespace, chains), lambda: ping_once(client), rounds)
    results["ping_p50_us"] = 1e6 * median(ping)
    results["ping_p99_us"] = 1e6 * percentile(ping, 0.99)
    results["lease_100_p50_us"] = 1e6 * median(lease)
    results["lease_100_over_ping_us"] = 1e6 * (median(lease) - median(ping))
    for name, verb in (("match_absent", match_absent), ("match_99_of_100", match_holed)):
        match, ping = in_turn(verb, lambda: ping_once(client), rounds)
        results[f"{name}_over_ping_us"] = 1e6 * (median(match) - median(ping))
    return results


def measure_load(client: Client, namespace: Namespace, chains: list[Chain], runtime_dir: Path, rounds: int) -> Results:
    """p99 of LEASE, quiet and while another process asks for status 50 times a second, in slices of either."""
    ping = [seconds(lambda: ping_once(client)) for _ in range(rounds)]
    quiet: list[float] = []
    loaded: list[float] = []
    calls = 0
    for _ in range(4):
        quiet += [seconds(lambda: lease_one(namespace, chains)) for _ in range(rounds)]
        command = [sys.executable, "-m", "bench.hot", str(runtime_dir)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as control:
            assert control.stdout is not None
            assert control.stdout.readline().strip() == "ready"
            until = time.perf_counter() + 2.0
            while time.perf_counter() < until:
                loaded.append(seconds(lambda: lease_one(namespace, chains)))
            answer, _ = control.communicate("stop\n")
            calls += int(json.loads(answer)["calls"])
    quiet_p99, loaded_p99 = percentile(quiet, 0.99), percentile(loaded, 0.99)
    return {
        "lease_p99_quiet_us": 1e6 * quiet_p99,
        "lease_p99_loaded_us": 1e6 * loaded_p99,
        "control_calls_per_s": calls / 8.0,
        "lease_p99_loaded_over_quiet": loaded_p99 / quiet_p99,
        "lease_p99_loaded_over_ping_p50": loaded_p99 / median(ping),
    }


def measure_policies(blocks: int, rounds: int) -> Results:
    """What quotas, DENSITY and curves cost a LEASE+RELEASE of 100: a daemon with all of them against one with none.

    Both serve at the same time and are asked in turn, by pairs of a lease and a ping, which waits for what is noted
    behind the lease's answer.
    """
    dram = f"{(blocks * BLOCK_BYTES >> 20) + 192}MiB"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstored-bench-"))
        file = Path(folder) / "kvstored.toml"
        file.write_text(
            f'[tenants.bench]\nuids = [{os.geteuid()}]\ndram_guaranteed = "64MiB"\ndram_max = "{dram}"\n'
            f'pin_share = 0.5\nin_flight = 4096\n[tenants.other]\nuids = [{os.geteuid()}]\ndram_guaranteed = "64MiB"\n'
        )
        sides = []
        for arguments, tenant in (
            (("--policy-dram", "lru", "--insight-curves", "off"), ""),
            (("--policy-dram", "density", "--insight-curves", "on", "--config", str(file)), "bench"),
        ):
            running = stack.enter_context(daemon("--dram", dram, "--lock", "false", *arguments))
            client = stack.enter_context(kvclient.connect(str(running.runtime_dir), tenant=tenant))
            assert client.wait_connected(5), client.status
            namespace, chains = open_namespace(client, "hundreds"), chains_of(blocks // 100, 100)
            fill(namespace, chains)
            sides.append((client, namespace, chains))
        (one, plain, chains), (two, quotas, _) = sides
        pairs = [
            (seconds(lambda: lease_one(plain, chains)), seconds(lambda: ping_once(one)),
             seconds(lambda: lease_one(quotas, chains)), seconds(lambda: ping_once(two)))
            for _ in range(rounds)
        ]  # fmt: skip
    plain_s, with_s = median(pair[0] for pair in pairs), median(pair[2] for pair in pairs)
    return {
        "lease_100_plain_p50_us": 1e6 * plain_s,
        "lease_100_quotas_p50_us": 1e6 * with_s,
        "lease_100_quotas_over_plain": with_s / plain_s,
        "lease_and_ping_quotas_over_plain": median(sum(pair[2:]) for pair in pairs)
        / median(sum(pair[:2]) for pair in pairs),
    }


def lease_one(namespace: Namespace, chains: list[Chain]) -> None:
    """LEASE and RELEASE a whole chain drawn at random."""
    chain = random.choice(chains)
    with namespace.fetch(chain) as lease:
        assert lease.blocks == len(chain)


def ping_once(client: Client) -> None:
    """An empty round trip."""
    assert client.ping() is not None


def seconds(verb: Callable[[], None]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    verb()
    return time.perf_counter() - begun


def in_turn(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, taken alternately."""
    for _ in range(20):
        one()
        other()
    pairs = [(seconds(one), seconds(other)) for _ in range(rounds)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def control_load(runtime_dir: str) -> None:
    """What the other process does: status 50 times a second over gRPC, statistics every time as well."""
    import select

    import grpc

    from kvproto import control_pb2, control_pb2_grpc

    with grpc.insecure_channel(f"unix:{runtime_dir}/control.sock") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        stub.GetStatus(control_pb2.GetStatusRequest())
        print("ready", flush=True)
        calls, next_s = 0, time.monotonic()
        while not select.select([sys.stdin], [], [], max(0.0, next_s - time.monotonic()))[0]:
            stub.GetStatus(control_pb2.GetStatusRequest())
            stub.GetStatistics(control_pb2.GetStatisticsRequest())
            calls += 1
            next_s += 0.02
    print(json.dumps({"calls": calls}), flush=True)


if __name__ == "__main__":
    control_load(sys.argv[1])
