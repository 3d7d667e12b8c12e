"""A connector that lies, for the controls of equality tests: what it loads is not what was stored.

`kv_connector_extra_config` says how: `lie = "zeros"` fills every loaded block with zeros and calls it good, `lie =
"short"` says that only the first half of what was asked for was there.
"""

from typing import Any

import torch

from kvclient.integrations import vllm as real
from kvclient.integrations.vllm_jobs import LoadJob
from kvclient.integrations.vllm_worker import Worker
from kvclient.namespace import Namespace


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
        worker, lie = self._worker, self._lie
        assert worker is not None
        honest = worker._copy

        def copy(job: LoadJob, namespace: Namespace, wait_s: float) -> int:
            good = honest(job, namespace, wait_s)
            if lie == "short":
                return good // 2
            for tensor in kv_caches.values():
                tensor[list(job.block_ids)] = 0
            return good

        assert isinstance(worker, Worker)
        worker._copy = copy  # type: ignore[method-assign]
