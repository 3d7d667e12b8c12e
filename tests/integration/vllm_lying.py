"""A connector that lies, for the controls of equality tests: what it loads is not what was stored, or comes too late.

`kv_connector_extra_config` says how, in `lie`:

    zeros      every loaded block is filled with zeros and called good, layer by layer too, and beside the forward
    short      the second half of what was asked for is filled with zeros, and said not to be there
    lapse      no block is copied before its lease is over
    late       layer by layer, and beside the forward: the last layer is zeros, and filled when the lease is over, in
               the middle of the forward
    held PATH  half of the blocks are copied, PATH is made, and nothing more is copied while PATH is there
"""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvclient.copying import Move
from kvclient.integrations import vllm as real
from kvclient.integrations import vllm_early
from kvclient.integrations.vllm_copies import copy_pieces
from kvclient.integrations.vllm_jobs import LoadJob
from kvclient.integrations.vllm_worker import Worker
from kvclient.lease import Lease
from kvclient.namespace import Namespace
from kvkernels.libc import Addresses

PATIENCE_S = 30.0
PAUSE_S = 0.001


class LyingConnector(real.KvstoredConnector):
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._lie = extra.pop("lie", None) or getattr(vllm_config, "kvstored_lie", None)
        vllm_config.kvstored_lie = self._lie
        super().__init__(vllm_config, role, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """As it is, and the worker's copying spoilt."""
        super().register_kv_caches(kv_caches)
        worker = self._worker
        assert isinstance(worker, Worker)
        lie, _, path = str(self._lie).partition(" ")
        if lie in {"zeros", "short"}:
            caches = list(kv_caches.values())
            worker._copy = _spoilt(worker._copy, caches, lie)  # type: ignore[method-assign]
            worker._early.end = _spoilt_early(worker._early.end, caches, lie)  # type: ignore[method-assign]
            if lie == "zeros":
                setattr(vllm_early, "copy_pieces", _zeros)  # noqa: B010 -- which mypy would not have
        elif lie == "lapse":
            _before_copying(lambda lease, _: _until(lambda: time.monotonic_ns() > lease.deadline_ns))
        elif lie == "held":
            _before_copying(lambda lease, targets: _half(lease, targets, Path(path)))
        elif lie == "late":
            _late_beside(worker._early)
        if worker._layers is not None:
            _spoil_layers(worker._layers, lie)


def _spoilt(honest: Callable[[LoadJob, Namespace, float], int], caches: list[torch.Tensor], lie: str) -> Any:
    def copy(job: LoadJob, namespace: Namespace, wait_s: float) -> int:
        return _spoil(job, honest(job, namespace, wait_s), caches, lie)

    return copy


def _spoilt_early(honest: Callable[[LoadJob], tuple[int, float] | None], caches: list[torch.Tensor], lie: str) -> Any:
    def end(job: LoadJob) -> tuple[int, float] | None:
        ended = honest(job)
        return None if ended is None else (_spoil(job, ended[0], caches, lie), ended[1])

    return end


def _spoil(job: LoadJob, good: int, caches: list[torch.Tensor], lie: str) -> int:
    """How many blocks are said to be good."""
    kept = good // 2 if lie == "short" else 0
    for tensor in caches:
        tensor[list(job.block_ids[kept:])] = 0
    return kept or good


def _spoil_layers(layers: Any, lie: str) -> None:
    honest, fill = layers.copy, layers._fill

    def copy(moves: list[Move]) -> None:
        honest(moves)
        layers.lie_copied += 1
        last = layers.lie_copied == len(layers._order)
        if lie == "late" and last:
            _until(lambda: time.monotonic_ns() > layers.lie_until_ns)
        if lie == "zeros" or (lie == "late" and last):
            for target, _, length in moves:
                ctypes.memset(target, 0, length)

    def filled(loads: Any) -> None:
        layers.lie_copied, layers.lie_until_ns = 0, max(each.lease.deadline_ns for each in loads)
        fill(loads)

    layers.copy, layers._fill = copy, filled


def _before_copying(act: Callable[[Lease, Any], None]) -> None:
    honest, honest_parts = Lease.copy_to, Lease.copyings

    def copy_to(lease: Lease, targets: Any) -> bool:
        act(lease, targets)
        return honest(lease, targets)

    def copyings(lease: Lease, targets: Any, parts: int = 1) -> list[Callable[[], None]]:
        act(lease, targets)
        return honest_parts(lease, targets, parts)

    Lease.copy_to, Lease.copyings = copy_to, copyings  # type: ignore[method-assign, assignment]
    Lease.sources = lambda _: []  # type: ignore[method-assign, assignment]  # so that these are all there is


def _zeros(targets: Addresses, _sources: Addresses) -> None:
    for address, length in targets.tolist():
        ctypes.memset(address, 0, length)


def _late_beside(early: Any) -> None:
    """Whoever copies it, the last part comes when the leases of this step are over."""
    last = early._columns[0].max()  # where the memory of one layer begins

    def copy_late(targets: Addresses, sources: Addresses) -> None:
        if (targets[:, 0] < last).all():
            copy_pieces(targets, sources)
            return
        leases = [begun.lease for begun in (*early._begun.values(), *early._beside)]
        _until(lambda: time.monotonic_ns() > max(lease.deadline_ns for lease in leases))
        _zeros(targets, sources)

    setattr(vllm_early, "copy_pieces", copy_late)  # noqa: B010 -- as above


def _half(lease: Lease, targets: Any, path: Path) -> None:
    views = lease.views_of(range(len(targets) // 2))
    for view, pieces in zip(views, targets.addresses, strict=False):
        start = 0
        for address, length in zip(pieces, targets.lengths, strict=True):
            ctypes.memmove(address, bytes(view[start : start + length]), length)
            start += length
    path.touch()
    _until(lambda: not path.exists())


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < give_up:
        time.sleep(PAUSE_S)
