"""What the store says of costs: plain values, safe to hand to another thread. 0.0 seconds: nobody knows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What a namespace's profile says that an engine needs for `new_tokens` behind `cached_tokens`."""

    cached_tokens: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """Two ways to the first `tokens` of a prompt: loading them from a tier, or computing them."""

    tokens: int
    dram_s: float
    disk_s: float
    recompute_s: float


@dataclass(frozen=True, slots=True)
class NamespaceCosts:
    """What is known of one namespace. A prefill takes pass_s + token_s * new + pair_s * new * (cached + new / 2)."""

    tenant: str
    digest: str  # hex
    model: str
    block_tokens: int
    block_bytes: int
    prefill_reports: int
    pass_s: float
    token_s: float
    pair_s: float
    block_s: float  # what its clients said last that a block costs; 0.0: nothing
    saved_dram_s: float  # compute saved, since the daemon started
    saved_disk_s: float
    hit_blocks: int
    unpriced_blocks: int  # of them: nobody had said what they cost
    prefills: tuple[PrefillReport, ...]  # empty without reports
    runs: tuple[RunReport, ...]


@dataclass(frozen=True, slots=True)
class WayReport:
    """What loading from a tier takes: as a tenant reported it, or (no tenant) by the daemon's own reads."""

    tenant: str
    tier: str
    reports: int
    call_s: float
    bytes_per_s: float  # 0.0: calls cost all that there is


@dataclass(frozen=True, slots=True)
class CostsReport:
    """Everything of `kvctl costs`."""

    namespaces: tuple[NamespaceCosts, ...]  # those that were reported on last
    more: int  # namespaces that were reported on, and are not among them
    ways: tuple[WayReport, ...]
