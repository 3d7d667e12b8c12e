"""vLLM's tiers on a CPU, for tests: all of it is vLLM's own but the copying between the engine's memory and tier one.

vLLM 0.32 does that with streams of a GPU and refuses to start without one. Here the engine's thread does it. And a
second tier that lies, for the controls of equality tests: `lie = "zeros"` fills what is loaded with zeros and calls it
good, `lie = "short"` does so with every other chunk, and says that it was not there.
"""

import atexit
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvclient.integrations.vllm_tier import KvstoredTier
from kvclient.integrations.vllm_tier_chunks import Chunk


class CPUTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]  # vLLM is not installed where this is checked
    """See the module."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Of this rank."""
        assert self.blocks_per_chunk == 1
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CPUWorker(kv_caches, region)


class CPUWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies at once, in the order in which it is told to."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        atexit.register(self._unlink)  # of an engine that refuses to start
        self._groups = kv_caches.group_data_refs
        self._engine = [each.tensor for each in kv_caches.tensors]
        self._tier = [region.create_next_worker_view(each.page_size_bytes) for each in kv_caches.tensors]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        """Out of the engine."""
        self._move(job_id, src_spec, dst_spec, self._tier, self._engine, out=True)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        """Into the engine."""
        self._move(job_id, dst_spec, src_spec, self._engine, self._tier, out=False)
        return True

    def _move(
        self, job_id: int, of_engine: GPULoadStoreSpec, of_tier: CPULoadStoreSpec,
        targets: list[torch.Tensor], sources: list[torch.Tensor], *, out: bool,
    ) -> None:  # fmt: skip
        starts = np.cumsum([0, *of_engine.group_sizes])
        assert len(of_engine.block_ids) == len(of_tier.chunk_ids) == starts[-1]
        for refs, first, stop in zip(self._groups, starts[:-1], starts[1:], strict=True):
            for block, chunk in zip(of_engine.block_ids[first:stop], of_tier.chunk_ids[first:stop], strict=True):
                target, source = (chunk, block) if out else (block, chunk)
                for ref in refs:
                    at = slice(0, ref.page_size_bytes)
                    targets[ref.tensor_idx][target, at] = sources[ref.tensor_idx][source, at]
        self._finished.append(TransferResult(job_id, True))

    def get_finished(self) -> list[TransferResult]:
        """Since the last time."""
        self._unlink()  # a step is over, so both halves have mapped it: one that is killed must leave no file behind
        finished, self._finished = self._finished, []
        return finished

    def _unlink(self) -> None:
        Path(self._region.mmap_path).unlink(missing_ok=True)

    def wait(self, job_ids: set[int]) -> None:
        """Everything is over as soon as it is told."""

    def shutdown(self) -> None:
        """Give the memory back."""
        self._engine.clear()
        self._tier.clear()
        self._region.cleanup()


class LyingTier(KvstoredTier):
    """See the module."""

    def __init__(self, *args: Any, lie: str, **given: Any) -> None:
        super().__init__(*args, **given)
        chunks = self._chunks
        honest = chunks.load

        own = chunks._rows
        assert own is not None

        def load(chunks: Iterable[Chunk]) -> set[bytes]:
            mine = list(chunks)
            good = honest(mine)
            spoilt = mine if lie == "zeros" else mine[::2]
            for chunk in spoilt:
                own[chunk.row] = 0
            return good if lie == "zeros" else good - {chunk.name for chunk in spoilt}

        chunks.load = load  # type: ignore[method-assign]
