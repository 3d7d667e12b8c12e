"""Time to the first token of a real vLLM: computed, out of its own prefix cache, out of the daemon.

Engines run all the time, one as it comes, one with the connector and two with LMCache's, all with one thread of
arithmetic so that a core is left to the daemon; they take turns, each round another first. `vllm_steps` measures what
an engine's steps lose beside transfers, `vllm_serve` whole servers. What is not measured is None, with a reason.
"""

import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median
from types import SimpleNamespace
from typing import Any

import grpc

import kvclient
from bench.engines import VllmProcess, find_vllm, transfer_config, why_not
from bench.engines.model import SIZES, write_model
from bench.harness import Findings, say
from bench.process import DaemonProcess
from bench.vllm_peer import LmcacheServer, install
from bench.vllm_serve import serve
from bench.vllm_steps import steps_beside_transfers
from kvclient.integrations.vllm_scheduler import Scheduler
from kvclient.integrations.vllm_settings import Settings
from kvproto import control_pb2, control_pb2_grpc
from kvproto.control_token import token_metadata
from kvproto.frames import Role

PROMPT = 3000
KILLED = 700  # tokens: steps of half a second, whose noise is less than what would be a stall
BLOCK = 128
WARM = 100  # tokens of the request before each that is timed: no whole block, so that nobody stores it
SESSIONS = 3  # of an engine: its scheduler's, and two of its worker
PATIENCE_S = 60.0
BEST = "lmcache"  # of the two, the faster one
CHUNKS = {BEST: BLOCK, "lmcache_default": 256}  # LMCache's, in tokens; the second is what it takes by itself
LARGE, SMALL = "bench", "small"  # models
SMALL_DRAM, MAPPED = (
    "256MiB",
    13,
)  # after so many prompts an engine has mapped all of it, as one that has run for a while
DAEMON = ("--lock", "false", "--log-level", "warning")
TRUSTING = f"[tenants.default]\nuids = [{os.getuid()}]\ntrusting = true\n"  # a host with one user: mode direct
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": True, "max_model_len": 8192, "max_num_batched_tokens": 4096, "max_num_seqs": 8,
    "num_gpu_blocks_override": 400,
}  # fmt: skip


def run(*, quick: bool) -> Findings:
    """All figures of `vllm`. Needs `make engines`, 12 GiB of memory, and PyPI for LMCache's."""
    python = find_vllm()
    if python is None:
        raise RuntimeError(why_not())
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-") as folder:
        home = Path(folder)
        (home / "kvstored.toml").write_text(TRUSTING)
        for size in (LARGE, SMALL):
            write_model(home / size, SIZES[size], seed=0)
        peer, findings = _install(python, home / "lmcache")
        findings |= _small(home, python, peer, 3 if quick else 20)
        findings |= _engines(home, python, peer, quick=quick)
        return findings | serve(home, python, home / LARGE, peer, quick=quick)


def _install(python: Path, folder: Path) -> tuple[Path | None, Findings]:
    """LMCache's interpreter, or why there is none."""
    try:
        return install(python, folder), {}
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"LMCache cannot be installed: {error}")
        return None, {"lmcache_why_not": str(error)[-500:]}


def _small(home: Path, python: Path, peer: Path | None, rounds: int) -> Findings:
    """First tokens of an engine that spends about as much in the model as the one of the peers' own figures does.

    What the model takes is added to every contestant alike, and hides what they differ by: these are `small_ttft_*`.
    """
    run_dir = home / "run-small"
    with _daemon(home, "run-small", SMALL_DRAM) as daemon, ExitStack() as stack:
        daemon.await_memory()
        native = stack.enter_context(_engine(home, "native-small", python, size=SMALL))
        ours = stack.enter_context(_engine(home, "ours-small", python, transfer_config(run_dir), size=SMALL))
        peers, findings = _peers(stack, home, peer, SMALL)
        found = first_tokens(native, ours, peers, rounds, MAPPED)
        return findings | {f"small_{name}": value for name, value in found.items()}


def _engines(home: Path, python: Path, peer: Path | None, *, quick: bool) -> Findings:
    """Everything that is measured of the large model's engines, driven step by step."""
    run_dir = home / "run"
    with _daemon(home, "run", "2GiB") as daemon, ExitStack() as stack:
        daemon.await_memory()
        native = stack.enter_context(_engine(home, "native", python))
        ours = stack.enter_context(_engine(home, "ours", python, transfer_config(run_dir)))
        with ExitStack() as beside:  # LMCache's are gone before anything else is measured
            peers, findings = _peers(beside, home, peer, LARGE)
            say(f"engines that are ready: {', '.join(('native', 'ours', *peers))}")
            findings |= first_tokens(native, ours, peers, 3 if quick else 12)
        findings |= steps_beside_transfers(ours, prompt_of, lambda: clear(run_dir), BLOCK, 4 if quick else 30)
        findings |= _steps_in_mode_copy(home, python, run_dir, 4 if quick else 12)
        findings |= misses(native, ours, 3 if quick else 12)
        findings |= lookups(run_dir, 500 if quick else 5000)
        findings |= kill(native, ours, daemon)
        return findings | resume(home, run_dir, 2 if quick else 6)


def _steps_in_mode_copy(home: Path, python: Path, run_dir: Path, rounds: int) -> Findings:
    """The same of an engine whose tenant is not trusting: its stores go through the ring, and are copied twice."""
    transfer = transfer_config(run_dir)
    transfer["kv_connector_extra_config"]["mode"] = "copy"
    with _engine(home, "copy", python, transfer) as engine:
        found = steps_beside_transfers(engine, prompt_of, lambda: clear(run_dir), BLOCK, rounds)
    return {f"mode_copy_{name}": value for name, value in found.items()}


def _daemon(home: Path, name: str, dram: str) -> DaemonProcess:
    """One with a tenant that is trusting."""
    arguments = ("--dram", dram, *DAEMON, "--config", str(home / "kvstored.toml"))
    return DaemonProcess(home / name, *arguments, log_file=home / f"log-{name}")


def _engine(
    home: Path, name: str, python: Path, transfer: dict[str, Any] | None = None, size: str = LARGE
) -> VllmProcess:
    """An engine of one thread."""
    engine = ENGINE | {"model": str(home / size)} | ({"kv_transfer_config": transfer} if transfer else {})
    return VllmProcess(python, engine, log_file=home / f"engine-{name}", threads=1)


def _peers(stack: ExitStack, home: Path, python: Path | None, size: str) -> tuple[dict[str, VllmProcess], Findings]:
    """An engine with a server of LMCache for each of CHUNKS; none, and why, if one does not start."""
    peers: dict[str, VllmProcess] = {}
    try:
        for name, chunk in CHUNKS.items() if python is not None else ():
            assert python is not None
            server = stack.enter_context(LmcacheServer(python, chunk, log_file=home / f"server-{size}-{name}"))
            peers[name] = stack.enter_context(_engine(home, f"{size}-{name}", python, server.transfer(), size))
    except (OSError, RuntimeError) as error:  # EngineGoneError too
        say(f"LMCache does not run: {error}")
        return {}, {"lmcache_why_not": str(error)[-500:]}
    return peers, {}


def clear(run_dir: Path) -> int:
    """Empty a daemon; how many blocks it had."""
    with grpc.insecure_channel(f"unix:{run_dir}/control.sock") as channel:
        everything = control_pb2.ClearRequest(everything=control_pb2.ClearRequest.Everything())
        stub = control_pb2_grpc.ControlStub(channel)
        return int(stub.Clear(everything, metadata=token_metadata(run_dir)).blocks)


def prompt_of(name: object, tokens: int = PROMPT) -> list[int]:
    """Tokens that no other name has."""
    random = Random(str(name))
    return [random.randrange(2, SIZES["bench"].vocabulary) for _ in range(tokens)]


def ask(engine: VllmProcess, *prompts: list[int]) -> list[dict[str, Any]]:
    """Run these together, and whatever follows from them."""
    answers = engine.generate(*({"prompt": prompt, "max_tokens": 1} for prompt in prompts))
    assert engine.ask(do="settle")["settled"]
    return answers


def first_tokens(
    native: VllmProcess, ours: VllmProcess, peers: dict[str, VllmProcess], rounds: int, warm_up: int = 1
) -> Findings:
    """One prompt a round: computed, cached by the engine, by the daemon, and by LMCache in chunks of CHUNKS.

    `warm_up` rounds come before those that count.
    A peer that does not find what it has stored, or fails, is left out from then on, and has no figures.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("recompute", "native", "kvstored", *peers)}
    lost: dict[str, str] = {}  # peers, and why

    def store(name: str, engine: VllmProcess, prompt: list[int]) -> None:
        if name != "native":
            ask(engine, prompt)
        assert engine.ask(do="reset_prefix_cache")["reset"]

    def first_token(name: str, engine: VllmProcess, prompt: list[int]) -> None:
        chunk = CHUNKS.get(name, BLOCK)
        expected = 0 if name == "recompute" else (PROMPT - 1) // BLOCK * BLOCK // chunk * chunk
        ask(engine, prompt_of(f"warm {name} {len(seconds[name])}", WARM))  # as warm as one that serves is
        (answer,) = ask(engine, prompt)
        if answer["cached_tokens"] != expected:
            raise RuntimeError(f"{name} found {answer['cached_tokens']} of {expected} tokens")
        seconds[name].append(answer["first_token_s"])

    for number in range(rounds + warm_up):
        prompt = prompt_of(f"first {number}")
        asked = {name: engine for name, engine in peers.items() if name == BEST or number % 3 == 1}
        turns = [("recompute", native), ("native", native), *asked.items()]
        turns.insert(len(turns) if number % 2 else 0, ("kvstored", ours))
        for work in (store, first_token):
            for name, engine in turns:
                if name in lost or (work is store and name == "recompute"):
                    continue
                try:
                    work(name, engine, prompt)
                except RuntimeError as error:
                    if name not in peers:
                        raise
                    say(f"{name}: {error}")
                    lost[name] = str(error)[-500:]
        if number == warm_up - 1:
            seconds = {name: [] for name in seconds}
        say(f"first tokens: {number + 1} of {rounds + warm_up}")
    times = {name: median(each) * 1e3 for name, each in seconds.items() if name not in lost}
    return _over_peers(times) | {f"{name}_why_not": reason for name, reason in lost.items()}


def _over_peers(times: dict[str, float]) -> Findings:
    """Of medians in ms."""
    findings: Findings = {f"ttft_{name}_ms": time_ms for name, time_ms in times.items()}
    findings |= {f"ttft_over_{name}": times["kvstored"] / times[name] for name in ("native", "recompute")}
    if BEST not in times:
        return findings | {"ttft_lmcache_ms": None, "ttft_over_lmcache": None}
    added = {name: times[name] - times["native"] for name in ("kvstored", BEST)}
    return findings | {
        "ttft_over_lmcache": times["kvstored"] / times[BEST],
        "ttft_added_over_lmcache": added["kvstored"] / added[BEST],
    }


def misses(native: VllmProcess, ours: VllmProcess, pairs: int) -> Findings:
    """What is never asked for again: what storing it costs the request."""
    shares = []
    for number in range(pairs):
        took: dict[str, float] = {}
        for name, engine in (("ours", ours), ("native", native))[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            ask(engine, prompt_of(f"miss {number} {name}", 1500))
            took[name] = time.perf_counter() - began
        shares.append(took["ours"] / took["native"] - 1)
        say(f"misses: {number + 1} of {pairs}")
    return {"miss_overhead_share": median(shares)}


def lookups(run_dir: Path, rounds: int) -> Findings:
    """What a lookup of the scheduler's half takes, in turn with an empty round trip of the same client."""
    with kvclient.connect(str(run_dir), role=Role.TOOL, timeout_s=0.02) as client:
        assert client.wait_connected(5)
        namespace = client.namespace(model="m", engine="e", layout="l", dtype="uint8", block_bytes=1 << 20)
        scheduler = Scheduler(client, [namespace], BLOCK, 1 << 20, Settings())
        request = SimpleNamespace(
            request_id="r",
            block_hashes=[Random(number).randbytes(32) for number in range(23)],
            num_tokens=PROMPT,
            num_computed_tokens=0,
            kv_transfer_params=None,
        )
        looked: list[float] = []
        pinged: list[float] = []
        for _ in range(rounds):
            began = time.perf_counter()
            scheduler.matched(request, 0)
            middle = time.perf_counter()
            client.ping()
            looked.append(middle - began)
            pinged.append(time.perf_counter() - middle)
    p99 = [sorted(each)[len(each) * 99 // 100] * 1e6 for each in (looked, pinged)]
    return {"lookup_p99_us": p99[0], "ping_p99_us": p99[1], "lookup_over_ping_p99_us": p99[0] - p99[1]}


def kill(native: VllmProcess, ours: VllmProcess, daemon: DaemonProcess) -> Findings:
    """Requests that are all there, one after another, and the daemon dies: the longest step against computing them."""
    prompts = [prompt_of(f"kill {number}", KILLED) for number in range(16)]
    for prompt in prompts:
        ask(ours, prompt)
        ask(native, prompt)
    for engine in (ours, native):
        assert engine.ask(do="reset_prefix_cache")["reset"]
        engine.ask(do="steps")
    expected = [ask(native, prompt)[0] for prompt in prompts]
    normal = native.ask(do="steps")
    for prompt in prompts:
        ours.tell(do="generate", requests=[{"prompt": prompt, "max_tokens": 1}])
    answers = [ours.hear()["answers"][0] for _ in range(4)]
    daemon.kill()
    answers += [ours.hear()["answers"][0] for _ in range(len(prompts) - len(answers))]
    assert answers[0]["cached_tokens"] > answers[-1]["cached_tokens"] == 0, "it died between"
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in expected]
    steps = ours.ask(do="steps")
    longest = max(steps["steps"] + steps["idle"])
    return {"kill_step_max_ms": max(0.0, longest - max(normal["steps"])) * 1e3}


def resume(home: Path, run_dir: Path, times: int) -> Findings:
    """The daemon is away for a while, as long as a restart takes or longer, and comes back: until all sessions of the
    engine are there again, counted from when it serves. Nothing is asked of the engine meanwhile.
    """
    took = []
    for number in range(times):
        time.sleep(1.0 + number / times)  # not always at the same point of its patience
        with _daemon(home, run_dir.name, "2GiB") as daemon:
            began = time.perf_counter()
            while _sessions(daemon) < SESSIONS:
                assert time.perf_counter() - began < PATIENCE_S, "the engine does not come back"
                time.sleep(0.005)
            took.append(time.perf_counter() - began)
        say(f"the daemon is back, and its engine after {took[-1]:.3f} s")
    return {"resume_max_s": max(took), "resume_median_s": median(took)}


def _sessions(daemon: DaemonProcess) -> int:
    with grpc.insecure_channel(f"unix:{daemon.runtime_dir}/control.sock") as channel:
        return int(control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest()).sessions)
