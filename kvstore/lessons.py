"""What is worth telling a successor (`learned.py`): how long tools and prefills take, and when blocks are used again.

    gaps/TENANT          `hints/gaps.py`, by tool
    profile/NAMESPACE    `cost.py`, by number: a successor goes on with the same ones
    way/TIER/TENANT      `cost.py`: what loads of a tier took, by a tenant's reports
    reads                the same of the daemon's own reads of disk
    reuse/POOL           of a pool in DRAM that goes by DENSITY: counts by class and age, and the mean cost of a block
    turns                `insight/departures.py`: when there had been how many evictions

Names are taken apart here and nowhere else, and every one of them checks the content that it is given; what is refused
is counted, and learned anew.
"""

import struct
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import numpy as np

from kvproto.limits import POOLS
from kvproto.policy_frames import Tier
from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import REUSE, Tables
from kvstore.cost import Bandwidth, PrefillProfile
from kvstore.costing import Costing
from kvstore.guiding import Guiding
from kvstore.insight.departures import Turns
from kvstore.learned import Thing
from kvstore.registry import Registry
from kvstore.sessions import Tenant
from kvstore.tier.format import FormatError

_REUSE_HEAD: Final = struct.Struct(
    "<dII"
)  # mean cost of a block in seconds' code, counts since they were halved, layout
_LAYOUT: Final = 1  # what the queues mean: 32 classes without words, 10 for each of 7
_TIERS: Final = {f"{tier:d}": tier for tier in Tier}
_COUNTS: Final = REUSE["again"].shape
_DIGITS: Final = 9  # of a number in a name
_COUNT_MAX: Final = 1e9  # far beyond what is ever counted


class Lessons:
    """Those of one store. Owner thread."""

    def __init__(
        self, tables: Tables, registry: Registry, arenas: Arenas, costing: Costing, guiding: Guiding, turns: Turns
    ) -> None:
        self._tables = tables
        self._registry = registry
        self._arenas = arenas
        self._costing = costing
        self._guiding = guiding
        self._turns = turns

    def things(self) -> Iterator[Thing]:
        """All that was learned so far, each looked up when it is its turn: tenants and pools come and go meanwhile.

        From one to the next takes 0.2 ms at most.
        """
        for tenant in list(self._registry.tenants.values()):
            yield Thing(f"gaps/{tenant.name}", self._guiding.lessons(tenant), partial(self._guiding.export, tenant))
            for namespace in self._costing.profiled(tenant):
                profile = namespace.profile
                if profile is not None:
                    yield Thing(f"profile/{namespace.number}", (namespace, profile.reports), profile.to_bytes)
            for whose, tier, way in self._costing.ways([tenant]):
                if whose is not None:
                    yield Thing(f"way/{tier:d}/{tenant.name}", way.reports, way.to_bytes)
        pools = self._tables.pools[:POOLS]
        for number in np.flatnonzero(pools["rule"] == blocks.DENSITY).tolist():
            if number in self._arenas.by_number and int(pools["rule"][number]) == blocks.DENSITY:
                version = (float(pools["clock"][number]), int(pools["news"][number]))
                yield Thing(f"reuse/{number}", version, partial(self._reuse, number))
        if self._costing.disk.reports:
            yield Thing("reads", self._costing.disk.reports, self._costing.disk.to_bytes)
        if self._turns.seen:
            yield Thing("turns", self._turns.seen, self._turns.to_bytes)

    def take_over(self, learned: Mapping[str, bytes]) -> int:
        """Go on from what a former life had learned. Returns how much of it was taken: what is not of the forms above
        is not, and the rest is all the same.
        """
        return sum(self._take(name, content) for name, content in learned.items())

    def _take(self, name: str, content: bytes) -> bool:
        """One thing, by its name."""
        if name == "turns":
            return self._turns.take_over(content)
        if name == "reads":
            return self._take_way(None, Tier.DISK, content)
        kind, _, whose = name.partition("/")
        if kind == "gaps":
            return self._guiding.take_over(whose, content) is None
        if kind == "way":
            number, _, named = whose.partition("/")
            tenant, tier = self._registry.tenants.get(named), _TIERS.get(number)
            return tenant is not None and tier is not None and self._take_way(tenant, tier, content)
        if kind == "profile":
            return self._take_profile(_number(whose), content)
        return kind == "reuse" and self._take_reuse(_number(whose), content)

    def _take_profile(self, number: int, content: bytes) -> bool:
        namespace = self._registry.by_number.get(number)
        if namespace is None:
            return False
        try:
            profile = PrefillProfile.from_bytes(content)
        except FormatError:
            return False
        if profile.block_tokens != namespace.identity.block_tokens:
            return False
        return self._costing.take_over(namespace, profile)

    def _take_way(self, tenant: Tenant | None, tier: Tier, content: bytes) -> bool:
        """None: the daemon's own."""
        try:
            way = Bandwidth.from_bytes(content)
        except FormatError:
            return False
        return self._costing.take_over_way(tenant, tier, way)

    def _reuse(self, number: int) -> bytes:
        pool, reuse = self._tables.pools[number], self._tables.reuse[number]
        head = _REUSE_HEAD.pack(float(pool["clock"]), int(pool["news"]), _LAYOUT)
        return b"".join((head, reuse["again"].tobytes(), reuse["gone"].tobytes()))

    def _take_reuse(self, number: int, content: bytes) -> bool:
        if number >= POOLS or number not in self._arenas.by_number:
            return False
        if int(self._tables.pools[number]["rule"]) != blocks.DENSITY:
            return False
        count = _COUNTS[0] * _COUNTS[1]
        if len(content) != _REUSE_HEAD.size + 8 * count:
            return False
        clock, news, layout = _REUSE_HEAD.unpack_from(content)
        counts = np.frombuffer(content, np.float32, offset=_REUSE_HEAD.size).reshape(2, *_COUNTS)
        if layout != _LAYOUT or not 0 <= clock <= 65535 or not ((counts >= 0) & (counts < _COUNT_MAX)).all():  # nor NaN
            return False
        self._tables.pools[number]["clock"], self._tables.pools[number]["news"] = clock, news
        self._tables.reuse[number]["again"], self._tables.reuse[number]["gone"] = counts
        blocks.reindex(self._tables, number)
        return True


def _number(written: str) -> int:
    """As `things` writes it; -1: it is none, or none that anything here has."""
    return int(written) if len(written) <= _DIGITS and written.isascii() and written.isdigit() else -1
