"""Both halves of the vLLM connector with plain tensors and no vLLM: an engine that is stepped by hand, for tests."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import kvclient
from kvclient import Role
from kvclient.codecs import Codec
from kvclient.integrations.codec_choice import codec_for
from kvclient.integrations.vllm_jobs import Plan, Progress
from kvclient.integrations.vllm_layout import Layout, layout_of
from kvclient.integrations.vllm_saves import EngineMemory
from kvclient.integrations.vllm_scheduler import Scheduler
from kvclient.integrations.vllm_settings import Settings
from kvclient.integrations.vllm_worker import Worker
from tests.node import PATIENCE_S, until

BLOCKS, TOKENS, LAYERS = 32, 16, 3
INNER = (2, 16, 8)  # heads, tokens, keys and values


def patient(**settings: Any) -> Settings:
    """Settings for a host that may be busy."""
    return Settings(lookup_timeout_ms=1e4, **settings)


@dataclass
class Rank:
    """One worker: its memory, its clients."""

    caches: dict[str, torch.Tensor]
    layout: Layout
    worker: Worker
    clients: list[kvclient.Client]
    codec: Codec | None = None


@dataclass
class Engine:
    """Scheduler and workers, stepped by hand."""

    run: Path
    settings: Settings = field(default_factory=patient)
    ranks: int = 1
    caches_prefixes: bool = False
    name: str = "m"  # engines of one name share what they store
    near: bool = False  # its scheduler tells its only worker of loads as soon as they are planned
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.workers = [self._rank(rank) for rank in range(self.ranks)]
        self.lookups = kvclient.connect(self.run, role=Role.TOOL, timeout_s=self.settings.lookup_timeout_ms / 1000)
        assert self.lookups.wait_connected(PATIENCE_S)
        shards = [
            self._namespace(self.lookups, rank, each.layout, each.codec) for rank, each in enumerate(self.workers)
        ]
        block_bytes = self.workers[0].layout.block_bytes
        self.free = BLOCKS  # but for those that are held
        self.held: Counter[int] = Counter()  # references of each block
        self.forgotten: list[set[int]] = []
        self.scheduler = Scheduler(
            self.lookups, shards, TOKENS, block_bytes, self.settings,
            memory=EngineMemory(
                BLOCKS, lambda: self.free - len(self.held), self.forgotten.append, self._hold, self._let_go,
                reuses_oldest=self.caches_prefixes,
            ),
            near=self.workers[0].worker if self.near else None,
        )  # fmt: skip
        self.saved = 0
        self.plans: list[Plan] = []

    def _hold(self, block_ids: Sequence[int]) -> Sequence[int]:
        self.held.update(block_ids)
        return block_ids

    def _let_go(self, block_ids: Sequence[int]) -> None:
        self.held -= Counter(block_ids)

    def _rank(self, rank: int) -> Rank:
        generator = torch.Generator().manual_seed(rank)
        caches = {
            f"layer {number}": torch.randn((BLOCKS, *INNER), generator=generator, dtype=torch.float32).to(self.dtype)
            for number in range(LAYERS)
        }
        layout = layout_of(caches, BLOCKS)
        quick = kvclient.connect(self.run, role=Role.TOOL, timeout_s=10.0)
        patient = kvclient.connect(self.run, timeout_s=PATIENCE_S)
        assert quick.wait_connected(PATIENCE_S)
        assert patient.wait_connected(PATIENCE_S)
        codec = codec_for(
            self.settings.codec, lossy=self.settings.lossy, dtype=self.dtype, block_bytes=layout.block_bytes,
            row=INNER[-1] // 2, accelerate=self.settings.accelerate,
        )  # fmt: skip
        names = [self._namespace(client, rank, layout, codec) for client in (quick, patient)]
        if codec is not None:
            names = [name.encoded_by(codec) for name in names]
        worker = Worker(names[0], names[1], layout, disk_wait_s=2.0, layerwise=self.settings.layerwise)
        return Rank(caches, layout, worker, [quick, patient], codec)

    def _namespace(self, client: kvclient.Client, rank: int, layout: Layout, codec: Codec | None) -> kvclient.Namespace:
        return client.namespace(
            model=self.name, engine="vllm", layout=layout.words, dtype=str(self.dtype), block_tokens=TOKENS,
            block_bytes=codec.stored_bytes if codec else layout.block_bytes, tp=(rank, self.ranks),
            codec=codec.text if codec else "raw",
        )  # fmt: skip

    def step(self, scheduled: dict[str, int], blocks: dict[str, list[int]]) -> Plan:
        """As vLLM does: plan, fence, load, compute, save, and what became of it."""
        plan = self.scheduler.plan(scheduled, blocks.__getitem__)
        self.plans.append(plan)
        for rank in self.workers:
            rank.worker.fence(plan)
            rank.worker.begin(plan)
            for name in rank.caches:
                rank.worker.wait_for_layer(name)
            rank.worker.end(plan)
        self.listen()
        return plan

    def listen(self) -> set[str]:
        """What the workers say; requests whose loads have ended."""
        progress = Progress()
        received: set[str] = set()
        for rank in self.workers:
            progress = progress.joined(rank.worker.take_progress() or Progress())
            received |= rank.worker.take_received()
        self.saved += len(progress.saved)
        self.scheduler.heard(progress, received)
        return received

    def save(self, request: Any, block_ids: list[int]) -> None:
        """Compute all of a request, save it, and let it be over."""
        self.scheduler.on_new_request(request)
        plan = self.step({request.request_id: request.num_tokens}, {request.request_id: block_ids})
        assert not plan.saves, "of a step that has not ended"
        request.num_computed_tokens = request.num_tokens
        self.scheduler.finished(request, block_ids)
        self.step({}, {})
        assert until(lambda: self.listen() is not None and not self.scheduler._saves), "it never ends"
        for rank in self.workers:
            rank.worker._patient.flush(PATIENCE_S)  # visible, too

    def stop(self) -> None:
        """End it."""
        for rank in self.workers:
            rank.worker.stop()
            for client in rank.clients:
                client.close()
        self.lookups.close()


def request_of(name: str, blocks: int, *, tokens: int = 0, params: object = None) -> Any:
    """What the halves read of a request of vLLM."""
    hashes = [f"{name} {number}".encode().ljust(32, b".") for number in range(blocks)]
    tokens = tokens or blocks * TOKENS + 1
    return SimpleNamespace(
        request_id=name, block_hashes=hashes, num_tokens=tokens, num_computed_tokens=0, kv_transfer_params=params
    )


def again(request: Any, name: str) -> Any:
    """Another request with the same tokens."""
    return SimpleNamespace(**(vars(request) | {"request_id": name, "num_computed_tokens": 0}))


def load(engine: Engine, request: Any, block_ids: list[int]) -> int:
    """Look up, load, and step; blocks that were loaded."""
    engine.scheduler.on_new_request(request)
    tokens, beside = engine.scheduler.matched(request, 0)
    assert tokens is not None
    engine.scheduler.allocated(request, block_ids, tokens)
    request.num_computed_tokens = tokens
    engine.step({} if beside else {request.request_id: request.num_tokens - tokens}, {request.request_id: block_ids})
    if beside:
        assert until(lambda: request.request_id in engine.listen())
    return tokens // TOKENS
