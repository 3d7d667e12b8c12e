"""What becomes of a context while its request waits for a tool: preserved, swapped out, discarded, or as advised.

InferCept's comparison (Abhyankar et al. 2024) with the engine of `bench/swap_engine.py`, in real time, on the host's
memory. Every run has the same requests, and all of them must say the same tokens. Twice: over the link that there is,
the host's memory, and over one that is paced, so that moving a context takes a fifth of computing it.
bench/METHOD.md says what each figure covers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean
from typing import Final

import torch

import kvclient
from bench.harness import Findings, daemon, percentile, say
from bench.swap_engine import Engine, Policy, Request, Script, Tally, Turn
from bench.swap_model import BLOCK_BYTES, BLOCK_TOKENS, TOKEN_BYTES, VOCABULARY, PagedModel
from kvclient.copying import Gate
from kvclient.results import Advice, StoreResult
from kvclient.swap_budget import Budget
from kvclient.swap_ways import Flight, Incoming, Way, host_pages, way_of
from kvclient.swapping import Priority, Swapper

MIB: Final = 1 << 20
TIMEOUT_S: Final = 10.0
WARM_TOKENS: Final = 512
WARM_ROUNDS: Final = 3
PACED_SHARE: Final = 0.2  # of computing a context, what moving it one way takes over the paced link
SEED: Final = 11
THREADS: Final = 1  # the other core is the daemon's


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is asked for."""

    requests: int
    every_s: float  # a request, on average
    pool_pages: int
    prompt_tokens: tuple[int, int] = (64, 384)
    turns: tuple[int, int] = (2, 4)
    generate_tokens: tuple[int, int] = (8, 24)
    answer_tokens: tuple[int, int] = (16, 64)
    short_s: float = 0.03  # median of a tool that computes,
    long_s: float = 1.0  # and of one that asks elsewhere, or somebody


FULL: Final = Scale(requests=48, every_s=0.6, pool_pages=128)
QUICK: Final = Scale(requests=8, every_s=0.1, pool_pages=64)


def run(*, quick: bool) -> Findings:
    """All figures of `swap`."""
    torch.set_num_threads(THREADS)
    scale = QUICK if quick else FULL
    scripts = script_of(scale, SEED)
    model = PagedModel(scale.pool_pages)
    results: Findings = {"requests": len(scripts), "pool_mib": scale.pool_pages * BLOCK_BYTES / MIB}
    said: list[list[int]] = []
    bytes_per_s = 0.0
    for name in ("memory", "paced"):
        # A daemon each: what one has learned of its link is nothing to the other.
        with daemon("--dram", "2GiB") as process, kvclient.connect(process.runtime_dir, timeout_s=TIMEOUT_S) as client:
            process.await_memory()
            if not client.wait_connected(TIMEOUT_S):
                raise RuntimeError(client.status.why_not)
            link = Link(client, model, bytes_per_s)
            compute_s, swap_s = link.warm_up()
            if not bytes_per_s:
                bytes_per_s = WARM_TOKENS * TOKEN_BYTES / (PACED_SHARE * compute_s)
                results |= {"recompute_over_swap": compute_s / swap_s, "paced_mib_per_s": bytes_per_s / MIB}
            for policy in Policy:
                requests, tally, seconds = link.serve(scripts, policy, scale.pool_pages)
                tokens = [request.output for request in requests]
                said = said or tokens
                results[f"{name}_{policy.value}_same_tokens"] = float(tokens == said)
                figures = figures_of(requests, tally, seconds, scale)
                results |= {f"{name}_{policy.value}_{figure}": value for figure, value in figures.items()}
                say(f"swap: {name} {policy.value}: {figures}")
    return results


def script_of(scale: Scale, seed: int) -> list[Script]:
    """Requests whose tools take times with a heavy tail: two kinds, each log-normal."""
    random = Random(seed)
    scripts = []
    arrival_s = 0.0
    for _ in range(scale.requests):
        turns = [
            Turn(random.randint(*scale.generate_tokens), _gap_s(random, scale), _tokens(random, scale.answer_tokens))
            for _ in range(random.randint(*scale.turns) - 1)
        ]
        turns.append(Turn(random.randint(*scale.generate_tokens)))
        scripts.append(Script(arrival_s, _tokens(random, scale.prompt_tokens), tuple(turns)))
        arrival_s += random.expovariate(1 / scale.every_s)
    return scripts


def _tokens(random: Random, between: tuple[int, int]) -> tuple[int, ...]:
    return tuple(random.randrange(VOCABULARY) for _ in range(random.randint(*between)))


def _gap_s(random: Random, scale: Scale) -> float:
    median_s = scale.short_s if random.random() < 0.5 else scale.long_s
    return median_s * min(20.0, random.lognormvariate(0.0, 1.0))


def figures_of(requests: Sequence[Request], tally: Tally, seconds: float, scale: Scale) -> dict[str, float]:
    """Of one run; bench/METHOD.md names them."""
    latencies = [
        1000 * (each.finished_s - each.script.arrival_s - sum(turn.gap_s for turn in each.script.turns))
        / len(each.output)
        for each in requests
    ]  # fmt: skip
    pool_byte_s = scale.pool_pages * BLOCK_BYTES * seconds
    return {
        "latency_ms_per_token": mean(latencies),
        "latency_p90_ms_per_token": percentile(latencies, 0.9),
        "tokens_per_s": sum(len(each.output) for each in requests) / seconds,
        "requests_per_s": len(requests) / seconds,
        "waste_share": tally.waste_byte_s / pool_byte_s,
        "waste_idle_share": tally.idle_byte_s / pool_byte_s,
        "waste_recompute_share": tally.recompute_byte_s / pool_byte_s,
        "waste_stall_share": tally.stall_byte_s / pool_byte_s,
        "recomputed_tokens": tally.recomputed_tokens,
        "swapped_out_mib": tally.swapped_out_bytes / MIB,
        "swapped_in_mib": tally.swapped_in_bytes / MIB,
        "clean_blocks": tally.clean_blocks,
        "swaps": tally.swaps,
        "discards": tally.discards,
        "evictions": tally.evictions,
    }


class Link:
    """A namespace, and a swapper between it and the model's pages; `bytes_per_s`: no faster than that."""

    def __init__(self, client: kvclient.Client, model: PagedModel, bytes_per_s: float = 0.0) -> None:
        self._model = model
        self._client = client
        self._runs = 0
        self._namespace = client.namespace(
            model=f"bench swap {bytes_per_s:.0f}", engine="bench", layout="pages", dtype="float64",
            block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES,
        )  # fmt: skip
        pages = host_pages(model.layers)
        if not bytes_per_s:
            self._swapper = client.swapper(self._namespace, pages)
            self._tick: Callable[[float, Advice | None], object] = client.tick
            return
        budget = Budget(bytes_per_s)
        way = PacedWay(way_of(self._namespace, pages, None), bytes_per_s)
        self._swapper = swapper = Swapper(self._namespace, way, budget, lambda: None)

        def tick(forward_s: float, advice: Advice | None) -> None:
            budget.tick(forward_s, time.monotonic(), (advice.swap_budget_bytes or None) if advice else None)
            swapper.wake()

        self._tick = tick

    def warm_up(self, context_tokens: int = WARM_TOKENS) -> tuple[float, float]:
        """Compute and move some contexts, so that the daemon knows what either takes: seconds of each, one way."""
        pages = range(context_tokens // BLOCK_TOKENS)
        compute_s, swap_s = [], []
        for number in range(WARM_ROUNDS):
            tokens = [(number + token) % VOCABULARY for token in range(context_tokens)]
            keys = self._namespace.keys(tokens, extra=b"warm up")
            begun = time.perf_counter()
            self._model.forward(tokens, pages, 0)
            compute_s.append(time.perf_counter() - begun)
            self._namespace.report_prefill(0, context_tokens, compute_s[-1])
            self._swapper.swap_out(keys, pages, priority=Priority.URGENT).result(60.0)
            self._namespace.fetch(keys).release()  # all of it is visible
            begun = time.perf_counter()
            result = self._swapper.swap_in(keys, pages, Priority.URGENT).result(60.0)
            swap_s.append(time.perf_counter() - begun)
            if result.blocks != len(keys):
                raise RuntimeError(f"only {result.blocks} blocks of {len(keys)} came back")
        return min(compute_s), min(swap_s)

    def serve(self, scripts: Sequence[Script], policy: Policy, pool_pages: int) -> tuple[list[Request], Tally, float]:
        """One run: its requests, what it cost, and seconds."""
        self._runs += 1
        engine = Engine(
            self._model, self._namespace, self._swapper, self._tick, policy, pool_pages, f"run {self._runs}".encode()
        )
        begun = time.perf_counter()
        requests = engine.run(scripts)
        return requests, engine.tally, time.perf_counter() - begun


class PacedWay:
    """A way whose chunks take at least as long as a link of so many bytes a second would."""

    def __init__(self, way: Way, bytes_per_s: float) -> None:
        self._way = way
        self._bytes_per_s = bytes_per_s
        self.pages = way.pages
        self.lanes = 1
        self.stream_event, self.order, self.unsettled = way.stream_event, way.order, way.unsettled

    def save(self, keys: Sequence[bytes], ids: Sequence[int], parent: bytes | None, gate: Gate) -> StoreResult:
        """See `swap_ways.Way`."""
        begun = time.monotonic()
        result = self._way.save(keys, ids, parent, gate)
        self._wait(begun, result.accepted * self.pages.block_bytes)
        return result

    def load(self, keys: Sequence[bytes], ids: Sequence[int], groups: int, wait_s: float) -> Incoming:
        """See `swap_ways.Way`."""
        incoming = self._way.load(keys, ids, groups, wait_s)
        begin = incoming.begin

        def paced(most_bytes: float, *, urgent: bool) -> list[Flight]:
            begun = time.monotonic()
            flights = begin(most_bytes, urgent=urgent)
            self._wait(begun, sum(flight.moved_bytes for flight in flights))
            return flights

        incoming.begin = paced  # type: ignore[method-assign]
        return incoming

    def _wait(self, begun: float, moved_bytes: int) -> None:
        time.sleep(max(0.0, moved_bytes / self._bytes_per_s - (time.monotonic() - begun)))
