"""What the vLLM connector counts, in vLLM's log line and among vLLM's metrics.

    vllm:kvstored_load_blocks_total{outcome}       loaded, failed (then computed), dropped (the request was over)
    vllm:kvstored_save_blocks_total{outcome}       saved, known (they were there), refused
    vllm:kvstored_transfer_bytes_total{direction}  load, save
    vllm:kvstored_transfer_seconds_total{direction}
    vllm:kvstored_hit_tokens_total                 found in the store, to be loaded
    vllm:kvstored_lookups_total, vllm:kvstored_lookup_seconds_total
    vllm:kvstored_pinned_bytes_total

Each has vLLM's own labels besides. The scheduler's and the workers' counts come together as one dict of totals, by
name, of an interval.
"""

from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

_BLOCKS: Final = "what became of blocks that were to be"
# Name, label, help; what is counted by the label's value ("" without a label).
COUNTERS: Final[tuple[tuple[str, str, str, Mapping[str, str]], ...]] = (
    ("load_blocks", "outcome", f"{_BLOCKS} loaded",
     {"loaded": "loaded_blocks", "failed": "failed_blocks", "dropped": "dropped_blocks"}),
    ("save_blocks", "outcome", f"{_BLOCKS} saved",
     {"saved": "saved_blocks", "known": "known_blocks", "refused": "refused_blocks"}),
    ("transfer_bytes", "direction", "bytes that were copied", {"load": "loaded_bytes", "save": "saved_bytes"}),
    ("transfer_seconds", "direction", "time of loads and saves", {"load": "load_seconds", "save": "save_seconds"}),
    ("hit_tokens", "", "tokens that were found and are loaded", {"": "hit_tokens"}),
    ("lookups", "", "lookups of the scheduler", {"": "lookups"}),
    ("lookup_seconds", "", "time that the scheduler waited for lookups", {"": "lookup_seconds"}),
    ("pinned_bytes", "", "memory pinned for finished requests", {"": "pinned_bytes"}),
)  # fmt: skip


class KvstoredStats(KVConnectorStats):
    """Totals of an interval, by name."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Begin anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both together."""
        names = self.data | other.data
        return KvstoredStats({name: self.data.get(name, 0) + other.data.get(name, 0) for name in names})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        shown: dict[str, int | float] = {}
        for name, value in self.data.items():
            if name.endswith("_bytes"):
                shown[f"{name.removesuffix('_bytes')} MiB"] = round(value / (1 << 20), 1)
            elif name.endswith("_seconds"):
                shown[f"{name.removesuffix('_seconds')} ms"] = round(value * 1e3, 2)
            else:
                shown[name.replace("_", " ")] = int(value)
        return shown

    def is_empty(self) -> bool:
        """Did nothing happen?"""
        return not self.data


class KvstoredMetrics(KVConnectorPromMetrics):
    """The same as counters of vLLM's registry, one child an engine and label value, all there from the start."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._children: dict[int, dict[str, Any]] = {engine: {} for engine in per_engine_labelvalues}
        make = metric_types[Counter]
        for name, label, text, counted in COUNTERS:
            labels = [*labelnames, label] if label else labelnames
            counter = make(
                name=f"vllm:kvstored_{name}", documentation=f"KV store of the host: {text}", labelnames=labels
            )
            for engine, values in per_engine_labelvalues.items():
                for value, source in counted.items():
                    children = self._children[engine]
                    children[source] = counter.labels(*values, *([value] if label else []))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the totals of an interval."""
        children = self._children.get(engine_idx, {})
        for name, value in transfer_stats_data.items():
            if name in children and value > 0:
                children[name].inc(value)
