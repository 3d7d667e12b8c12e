"""The scheduler's half of the vLLM connector over a daemon that answers what and when the test says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from kvclient.flows import NO_MATCH
from kvclient.integrations.vllm_scheduler import Scheduler
from kvclient.integrations.vllm_settings import Settings
from kvclient.results import Match, Tiers

TOKENS = 16  # of a block


@dataclass
class Daemon:
    """A client, and the one namespace of the engine's only rank."""

    blocks: int = 0  # of every chain that are there,
    disk: int = 0  # and of these on disk
    answer_s: float = 0.0  # how long it takes, by the clock
    now_s: float = 1000.0  # that the test sets
    asked: int = 0
    prefetches: int = 0

    def match(self, _shards: Sequence[Any], keys: Sequence[bytes]) -> Match:
        """A lookup."""
        self.asked += 1
        self.now_s += self.answer_s
        blocks = min(self.blocks, len(keys))
        return replace(NO_MATCH, blocks=blocks, tiers=Tiers(dram=blocks - self.disk, disk=self.disk))

    def prefetch(self, _keys: Sequence[bytes], *, deadline_s: float) -> Any:
        """From disk."""
        assert deadline_s > 0
        self.prefetches += 1
        return SimpleNamespace(cancel=lambda: None)


def scheduler_of(daemon: Daemon, **settings: Any) -> Scheduler:
    """One whose daemon that is."""
    client: Any = daemon
    return Scheduler(client, [client], TOKENS, 1 << 20, Settings(**settings))


def request_of(name: str, blocks: int, **more: Any) -> Any:
    """What is read of a request of vLLM: one of so many whole blocks, and a token."""
    plain = {"num_tokens": blocks * TOKENS + 1, "num_computed_tokens": 0, "kv_transfer_params": None}
    hashes = [f"{name} {number}".encode().ljust(32, b".") for number in range(blocks)]
    return SimpleNamespace(**({"request_id": name, "block_hashes": hashes} | plain | more))
