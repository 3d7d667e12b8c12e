"""What blocks cost this daemon's clients, to load and to compute: who reports it, and who asks. Owner thread; no clock.

    REPORT prefill -> profile of the namespace ----> RESERVE: what each new block costs, for eviction and admission
    REPORT load    -> ways of the tenant ----------> MATCH: load_ns, recompute_ns     ADVISE     pins around tools
    reads of disk  -> the daemon's own way --------> admission to disk; MATCH, where the tenant reported none
    LEASE hits     -> `Saved` of namespace and tenant: compute that was not repeated, by the costs of rows

Whatever a tenant reports moves its own answers and nobody else's: profiles are of its namespaces, ways are its own,
and only the daemon's own reads decide what is worth its disk.

What blocks cost stays with their rows, over a warm restart too; profiles and ways are told to a successor (`take_over`,
`take_over_way`).
"""

from collections.abc import Iterable, Iterator
from math import isnan
from typing import Final

import numpy as np

from kvproto.frames import UNKNOWN_NS
from kvproto.limits import MIB, PROFILES_PER_TENANT
from kvproto.policy_frames import UNKNOWN, Advised, Choice, Question, Tier
from kvstore.blocks import U1, U4, Tables
from kvstore.cost import PREFILL_SECONDS_MAX, Bandwidth, PrefillProfile, Refusal, load_seconds, refusal_of
from kvstore.hints import intercept
from kvstore.hints.programs import Costs
from kvstore.savings import Prices, prices_of, root_seconds, seconds_of_code, seconds_of_codes
from kvstore.sessions import Namespace, Tenant

READ_BYTES: Final = 4 * MIB  # of one call to disk (tier/loading.py): blocks share what a call costs
BELIEVED: Final = 3  # reports of a tenant's loads from which on MATCH goes by them: one slow one alone says nothing
QUEUED: Final = 16  # reports after which most of the mean is theirs
_NOBODY_KNOWS: Final = (UNKNOWN_NS, UNKNOWN_NS)
_NO_PROFILE: Final = PrefillProfile(1)  # that of a namespace nobody has reported on; never reported to
_CHOICES: Final = {
    intercept.Choice.PRESERVE: Choice.PRESERVE,
    intercept.Choice.SWAP: Choice.SWAP,
    intercept.Choice.DISCARD: Choice.DISCARD,
}


class Costing:
    """All timings of one store."""

    def __init__(self, tables: Tables) -> None:
        self.heard = False  # was anything timed yet?
        self.disk = Bandwidth()  # the daemon's own reads, whoever they were for
        self._costs = tables.blocks["cost"]
        self._parents = tables.blocks["parent"]
        self._ways: dict[Tenant, tuple[Bandwidth, Bandwidth, Bandwidth]] = {}  # by Tier
        self._queued_s: dict[Tenant, float] = {}
        self._profiled: dict[Tenant, dict[Namespace, None]] = {}  # those with a profile, reported last at the end

    # -- timings -------------------------------------------------------------------------------------------------

    def report_prefill(self, namespace: Namespace, cached: int, new: int, seconds: float) -> Refusal | None:
        """An engine has computed `new` tokens behind `cached` ones. Refused: it cannot be true, and nothing changes."""
        profile = namespace.profile or PrefillProfile(namespace.identity.block_tokens)
        refusal = profile.report(cached, new, seconds)
        if refusal is not None:
            return refusal
        mine = self._profiled.setdefault(namespace.tenant, {})
        mine.pop(namespace, None)
        mine[namespace] = None
        namespace.profile = profile
        if len(mine) > PROFILES_PER_TENANT:
            self.forget(next(iter(mine)))
        self.heard = True
        return None

    def report_load(self, namespace: Namespace, tier: int, load_bytes: int, seconds: float) -> Refusal | None:
        """An engine has loaded so many bytes from a tier (`Tier`). Refused: it cannot be true, and nothing changes."""
        if tier not in Tier._value2member_map_:
            return Refusal.ABSURD
        way = Bandwidth() if namespace.tenant not in self._ways else self._ways[namespace.tenant][tier]
        refusal = way.took(load_bytes, seconds)
        if refusal is not None:
            return refusal
        if namespace.tenant not in self._ways:
            ways = (Bandwidth(), Bandwidth(), Bandwidth())
            self._ways[namespace.tenant] = (*ways[:tier], way, *ways[tier + 1 :])  # type: ignore[assignment]
        self.heard = True
        return None

    def report_queue(self, namespace: Namespace, seconds: float) -> Refusal | None:
        """A request waited so long to be scheduled. Its tenant's mean of the last ones is Continuum's T (gaps.py)."""
        refusal = refusal_of(seconds, 0.0, PREFILL_SECONDS_MAX)
        if refusal is None:
            former = self._queued_s.get(namespace.tenant)
            self._queued_s[namespace.tenant] = seconds if former is None else former + (seconds - former) / QUEUED
        return refusal

    def read(self, read_bytes: int, seconds: float) -> None:
        """The daemon has read from disk; what took no time by the clock says nothing."""
        self.heard |= self.disk.took(read_bytes, seconds) is None

    def forget(self, namespace: Namespace) -> None:
        """Its profile gives way, or its number goes to another."""
        namespace.profile = None
        self._profiled.get(namespace.tenant, {}).pop(namespace, None)

    def take_over(self, namespace: Namespace, profile: PrefillProfile) -> bool:
        """What a former life had learned of a namespace; those reported on last come first, as `profiled` has them.

        False, and not taken: this life knows better, or the tenant has as many as it may.
        """
        mine = self._profiled.get(namespace.tenant, {})
        if namespace.profile is not None or len(mine) >= PROFILES_PER_TENANT or not profile.reports:
            return False
        assert profile.block_tokens == namespace.identity.block_tokens, "a profile of other blocks"
        self._profiled[namespace.tenant] = {namespace: None, **mine}
        namespace.profile = profile
        self.heard = True
        return True

    def profiled(self, tenant: Tenant) -> list[Namespace]:
        """Its namespaces that somebody has reported on, the latest first."""
        return list(reversed(self._profiled.get(tenant, {})))

    def way(self, tenant: Tenant, tier: Tier) -> Bandwidth:
        """What loading takes: as the tenant has reported; of disk else as the daemon's own reads say."""
        ways = self._ways.get(tenant)
        way = ways[tier] if ways else None
        if way is not None and way.reports:
            return way
        return self.disk if tier is Tier.DISK else way or _NO_WAY

    def ways(self, tenants: Iterable[Tenant]) -> Iterator[tuple[Tenant | None, Tier, Bandwidth]]:
        """All that was measured: by the daemon itself (no tenant), and by these tenants."""
        if self.disk.reports:
            yield None, Tier.DISK, self.disk
        for tenant in tenants:
            for tier, way in zip(Tier, self._ways.get(tenant, ()), strict=False):
                if way.reports:
                    yield tenant, tier, way

    def take_over_way(self, tenant: Tenant | None, tier: Tier, way: Bandwidth) -> bool:
        """What a former life had measured, as `ways` gives it. False, and not taken: this life has measured it."""
        if tenant is None:
            taken = tier is Tier.DISK and not self.disk.reports
            self.disk = way if taken else self.disk
        else:
            ways = self._ways.get(tenant, (Bandwidth(), Bandwidth(), Bandwidth()))
            taken = not ways[tier].reports
            if taken:
                self._ways[tenant] = (*ways[:tier], way, *ways[tier + 1 :])  # type: ignore[assignment]
        self.heard |= taken
        return taken

    # -- MATCH ---------------------------------------------------------------------------------------------------

    def estimate(self, namespace: Namespace, run: U4, found: int, on_disk: int) -> tuple[int, int]:
        """Nanoseconds of loading and of computing a run of `found` blocks; UNKNOWN_NS each. Ask only if `heard`."""
        if not found:
            return _NOBODY_KNOWS
        ways = self._ways.get(namespace.tenant)
        if ways is None:
            dram, disk = _NO_WAY, self.disk
        else:
            _, dram, disk = ways
            dram = dram if dram.reports >= BELIEVED else _NO_WAY
            disk = disk if disk.reports >= BELIEVED else self.disk
        block_bytes = namespace.identity.block_bytes
        load_s = load_seconds(dram, (found - on_disk) * block_bytes, disk, on_disk * block_bytes)
        profile = namespace.profile
        if profile is None:
            return _ns(load_s), UNKNOWN_NS
        recompute_s = None
        if self._parents.item(run.item(0)):
            # A chain that is asked for in pieces, and this one is not at its root. Its rows know better where it lies.
            recompute_s = self._run_seconds(run, found)
        if recompute_s is None:
            recompute_s = profile.seconds(0, found * profile.block_tokens)
        return _ns(load_s), _ns(recompute_s)

    def _run_seconds(self, run: U4, found: int) -> float | None:
        """What computing a run saves or costs, by its rows: along a chain prices grow evenly. None: nobody knows."""
        first, last = self._costs.item(run.item(0)), self._costs.item(run.item(found - 1))
        if first and last:
            return found * 0.5 * (seconds_of_code(first) + seconds_of_code(last))
        return None

    def row_seconds(self, row: int) -> float:
        """What computing the block in a row takes; 0.0: nobody knows."""
        code = self._costs.item(row)
        return seconds_of_code(code) if code else 0.0

    # -- RESERVE -------------------------------------------------------------------------------------------------

    def prices(self, namespace: Namespace, previous: int, said_ns: int) -> tuple[float, float]:
        """Of a chain behind row `previous` (0: the root): seconds of its first block, and what each next adds to it.

        What the client says with this RESERVE, `said_ns` a block, wins; 0: nothing. 0.0: nobody knows.
        """
        if said_ns or namespace.profile is None:
            return (said_ns or namespace.recompute_ns) * 1e-9, 0.0
        return prices_of(namespace.profile, self._costs.item(previous) if previous else 0)

    # -- LEASE ---------------------------------------------------------------------------------------------------

    def leased(self, namespace: Namespace, run: U4, found: int) -> None:
        """A run was leased from DRAM: nobody computes it again."""
        namespace.tenant.saved.dram_bytes += found * namespace.identity.block_bytes
        seconds = self._run_seconds(run, found)
        if seconds is None:
            if namespace.profile is None:
                self._unpriced(namespace, found)
                return
            seconds = root_seconds(namespace.profile, found)  # at least: nothing lies before the root
        ours, mine = namespace.saved, namespace.tenant.saved
        ours.dram_seconds += seconds
        mine.dram_seconds += seconds
        ours.blocks += found
        mine.blocks += found

    def leased_beyond(self, namespace: Namespace, rows: U4, on_disk: U1) -> None:
        """A run was leased, and has come, of which some blocks lay on disk."""
        codes = self._costs[rows]
        seconds, known = seconds_of_codes(codes), codes != 0
        if not known.all():
            profile = namespace.profile
            first, slope = prices_of(profile, 0) if profile else Prices(0.0, 0.0)
            seconds = np.where(known, seconds, first + slope * np.arange(rows.size))
        unpriced = 0 if namespace.profile else int(rows.size - np.count_nonzero(known))
        disk_seconds = float(seconds[on_disk != 0].sum())
        block_bytes, from_disk = namespace.identity.block_bytes, int(np.count_nonzero(on_disk))
        namespace.tenant.saved.disk_bytes += from_disk * block_bytes
        namespace.tenant.saved.dram_bytes += (int(rows.size) - from_disk) * block_bytes
        dram_seconds = float(seconds.sum()) - disk_seconds
        for saved in (namespace.saved, namespace.tenant.saved):
            saved.dram_seconds += dram_seconds
            saved.disk_seconds += disk_seconds
            saved.blocks += rows.size
            saved.unpriced_blocks += unpriced

    def _unpriced(self, namespace: Namespace, found: int) -> None:
        for saved in (namespace.saved, namespace.tenant.saved):
            saved.blocks += found
            saved.unpriced_blocks += found

    # -- admission to disk ---------------------------------------------------------------------------------------

    def block_seconds(self, namespace: Namespace, rows: U4) -> float | None:
        """What one of these blocks costs to compute, on average: as clients said last, or as rows and profile have it.

        None: nobody knows.
        """
        if namespace.recompute_ns:
            return namespace.recompute_ns * 1e-9
        codes = self._costs[rows]
        known = np.count_nonzero(codes)
        if known:
            return float(seconds_of_codes(codes).sum()) / int(known)
        return prices_of(namespace.profile, 0).first_seconds if namespace.profile else None

    def worth_writing(self, namespace: Namespace, rows: U4) -> bool:
        """Are these blocks faster to read from disk than to compute, as far as anybody knows?"""
        computing_s = self.block_seconds(namespace, rows)
        together = max(1, READ_BYTES // namespace.slot_bytes)
        reading_s = self.disk.load_seconds(together * namespace.slot_bytes)
        return computing_s is None or reading_s is None or reading_s / together < computing_s

    # -- programs and requests that wait -------------------------------------------------------------------------

    def costs_of(self, namespace: Namespace, first_block: int, last_block: int) -> Costs:
        """What losing blocks `first_block` to `last_block` (not included) from DRAM costs; 0: nobody knows."""
        load_bytes = (last_block - first_block) * namespace.identity.block_bytes
        load_s = self.way(namespace.tenant, Tier.DISK).load_seconds(load_bytes)
        recompute_s = (namespace.profile or _NO_PROFILE).recompute_seconds_of_blocks(first_block, last_block)
        known = [seconds for seconds in (load_s, recompute_s) if seconds is not None]
        queue_ns = _ns(self._queued_s.get(namespace.tenant, 0.0))
        return Costs(queue_ns=queue_ns, reload_ns=_ns(min(known)) if known else 0)

    def advise(self, namespace: Namespace, question: Question) -> Advised | Refusal:
        """What to do with the context of a request that waits for a tool (hints/intercept.py).

        Where the question is NaN: bytes a token are those of the namespace's blocks; nothing else runs, and no time
        has passed; the engine's next pass takes as long as the profile says. Only `tokens` must be known.
        """
        identity, profile = namespace.identity, namespace.profile or _NO_PROFILE
        counts = (_or(question.running_tokens, 0.0), _or(question.batch_tokens, 0.0), _or(question.chunk_tokens, 0.0))
        for count in (question.tokens, *counts):
            refusal = refusal_of(count, 0, intercept.RUNNING_TOKENS_MAX)  # or it could not be made whole
            if refusal is not None:
                return refusal
        running, batch, chunk = map(int, counts)
        asked = intercept.Interception(
            int(question.tokens),
            _or(question.token_bytes, identity.block_bytes / identity.block_tokens),
            running,
            _or(question.elapsed_s, 0.0),
            None if isnan(question.expected_s) else question.expected_s,
            None if isnan(question.forward_s) else question.forward_s,
            batch,
            chunk,
        )
        advice = intercept.advise(asked, profile, self.way(namespace.tenant, Tier.DRAM))
        if isinstance(advice, Refusal):
            return advice
        forward_s = profile.seconds(0, batch) if asked.forward_seconds is None else asked.forward_seconds
        return Advised(
            _CHOICES[advice.choice],
            advice.waste_preserve,
            _or_unknown(advice.waste_swap),
            _or_unknown(advice.waste_discard),
            _or_unknown(forward_s),
            advice.swap_budget_bytes,
        )


_NO_WAY: Final = Bandwidth()  # that of a tenant which has reported no loads; never reported to


def _ns(seconds: float | None) -> int:
    """For the wire, whatever came of timings from outside."""
    return UNKNOWN_NS if seconds is None else int(min(seconds * 1e9, UNKNOWN_NS >> 1))


def _or(value: float, otherwise: float) -> float:
    return otherwise if isnan(value) else value


def _or_unknown(value: float | None) -> float:
    return UNKNOWN if value is None else value
