"""The names of rules and tiers: what settings, operators and the journal say. Without numba, so that whoever only wants
the words need not wait for it. `policy.py` says what each rule means.
"""

from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """By name, as operators know them."""

    LRU = "lru"
    SECOND_TOUCH = "second_touch"
    PGDSF = "pgdsf"
    LFU = "lfu"
    S3FIFO = "s3fifo"
    ARC = "arc"
    DENSITY = "density"


class Tier(StrEnum):
    """Where a pool lies."""

    DRAM = "dram"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds where nobody has chosen at run time."""

    dram: Rule = Rule.LRU
    disk: Rule = Rule.LRU


@dataclass(frozen=True, slots=True)
class Chosen:
    """A rule that somebody chose at run time. `tenant` None: for all that have none of their own."""

    tier: Tier
    tenant: str | None
    rule: Rule
