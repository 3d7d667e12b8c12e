"""What the owner thread answers to the control socket (`control_port.AdminPort`)."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Final

from kvproto.ids import NamespaceDigest
from kvproto.limits import MIB, PAGE_BYTES
from kvproto.policy_frames import Fetching, Pinned
from kvstore import survey
from kvstore.evicting import EvictReport
from kvstore.handing_over import HandOverReport
from kvstore.hints.report import GuidingReport
from kvstore.insight.looking import Looking
from kvstore.insight.misses import Misses
from kvstore.quotas import QuotaError
from kvstore.report import (
    ClearReport,
    ClearScope,
    ConfigValue,
    Counters,
    DaemonReport,
    DiskReport,
    NamespaceReport,
    NodeReport,
    PolicyChange,
    PolicyReport,
    RemoteReport,
    ScrubReport,
    SessionReport,
    TenantReport,
    TierReport,
)
from kvstore.report_costs import CostsReport
from kvstore.report_pins import PinsReport, pins_report
from kvstore.report_quotas import QuotaChange, QuotaReport
from kvstore.rules import Rule, Tier
from kvstore.store import Store
from kvstore.tier.disk import DiskState
from kvstored import __version__, threads
from kvstored.admin_costs import costs_report
from kvstored.admin_disk import Hands, disk_report, disk_warnings
from kvstored.admin_evict import EvictWish, Walked, evict, walk
from kvstored.admin_hints import guiding_report
from kvstored.admin_insight import CurvesOffError, Explanation, MissQuestion, Observed, explain_miss, observe
from kvstored.admin_pins import PrefixWish, Unpinned, hand_over, pin, prefetch, unpin
from kvstored.admin_policy import policy_reports, reset_policy, set_policy
from kvstored.admin_quotas import QuotaWish, key_of, quota_reports, quota_warnings, set_quota
from kvstored.admin_remote import remote_warnings
from kvstored.admin_routing import Routing
from kvstored.admin_writers import writer_warnings
from kvstored.config import Loaded
from kvstored.connection import Connection
from kvstored.control_port import AmbiguousError, RefusedError
from kvstored.hot import HotServer
from kvstored.keep import FdKeeper, Keeper, NoKeeper
from kvstored.key_file import CIPHER
from kvstored.memory import HostMemory
from kvstored.metrics_snapshot import Snapshot, take_snapshot
from kvstored.notify import SystemdKeeper
from kvstored.placement import spread
from kvstored.units import NO_FILE

log = logging.getLogger(__name__)

SCRUB_RATE: Final = 10 * MIB  # where neither the caller nor the configuration says one
DRAM_SCRUB_RATE: Final = 100 * MIB


class Admin:
    """Owner thread only."""

    def __init__(
        self, loaded: Loaded, store: Store, hot: HotServer, memory: HostMemory, *, hands: Hands | None = None,
        keeper: Keeper | None = None,
    ) -> None:  # fmt: skip
        """`hands` is looked at anew for each answer; `keeper` holds memory for the next life."""
        self.looking = Looking(store)
        self.routing = Routing(store)
        self._loaded = loaded
        self._store = store
        self._hot = hot
        self._memory = memory
        self._hands = hands
        self._keeper: Keeper = NoKeeper() if keeper is None else keeper
        self._configured = frozenset(tenant.name for tenant in loaded.config.tenants)
        self.remote: Callable[[], RemoteReport | None] = lambda: None  # how the remote tier stands
        self.ending = False  # a stop has been asked for, and nobody can take it back
        self._started_unix_s = time.time()
        self._started_ns = time.monotonic_ns()

    def status(self) -> DaemonReport:
        """See the port."""
        disk = self._disk() if self._store.limits.disk.disk_bytes else None
        return DaemonReport(
            version=__version__,
            pid=os.getpid(),
            uid=os.geteuid(),
            started_unix_s=self._started_unix_s,
            uptime_s=(time.monotonic_ns() - self._started_ns) / 1e9,
            runtime_dir=str(self._loaded.config.runtime_dir),
            serving=not (self._store.draining or self.ending),
            draining=self._store.draining,
            isolation=self._isolation(),
            warnings=tuple(self._warnings(disk)),
            tiers=(self._dram(),) if disk is None else (self._dram(), survey.disk_tier(self._store)),
            tenants=self.tenants(),
            counters=self.counters(),
            sessions=len(self._hot.clients.connections),
            namespaces=len(self.namespaces()),
            disk=disk,
            restart=survey.restart_report(self._store, _keeper_kind(self._keeper)),
            remote=self.remote(),
            devices=self._hot.devices.report(),
        )

    def snapshot(self, misses: Misses) -> Snapshot:
        """What the metrics are made of: as `status`, without what takes long where there are many namespaces."""
        disk = self._disk() if self._store.limits.disk.disk_bytes else None
        tiers = (self._dram(),) if disk is None else (self._dram(), survey.disk_tier(self._store))
        snapshot = take_snapshot(self._store, misses, self._configured, tiers, disk, len(list(self._warnings(disk))))
        return replace(snapshot, remote=self.remote(), devices=self._hot.devices.report(), events=self.routing.events())

    def disk(self) -> DiskReport | None:
        """As `status` has it; None without a disk tier."""
        return self._disk() if self._store.limits.disk.disk_bytes else None

    def warnings(self, disk: DiskReport | None) -> tuple[str, ...]:
        """As `status` has them."""
        return tuple(self._warnings(disk))

    def _isolation(self) -> str:
        peers = [connection.peer.isolation for connection in self._hot.clients.connections.values()]
        return "accident only" if "accident only" in peers else "enforced"

    def _dram(self) -> TierReport:
        store, memory = self._store, self._memory
        arena_bytes = store.limits.arena_bytes
        serving = store.arenas.serving()
        return TierReport(
            name="dram",
            capacity_bytes=store.arenas.positions * arena_bytes,
            assigned_bytes=serving * arena_bytes,
            used_bytes=survey.used_bytes(store),
            blocks=survey.dram_blocks(store),
            arenas=serving,
            arena_bytes=arena_bytes,
            populated_bytes=memory.populated_bytes,
            locked_bytes=memory.locked_bytes,
            stale_bytes=store.arenas.stale_bytes(),
            huge_bytes=memory.huge_bytes,
            nodes=tuple(NodeReport(node, held) for node, held in sorted(memory.placement.lie.items())),
            numa=spread(memory.placement.nodes),
        )

    def _disk(self) -> DiskReport:
        encryption = "" if self._loaded.config.disk_key_file == NO_FILE else CIPHER
        return disk_report(self._store, self._hands, encryption)

    def _warnings(self, disk: DiskReport | None) -> Iterator[str]:
        """Each names what is wrong and, after a semicolon, what to do."""
        yield from self._memory.faults
        if self._memory.advice:
            yield self._memory.advice
        yield from self._keeper.faults
        yield from threads.ended()
        yield from writer_warnings(self._store)
        yield from quota_warnings(self._store)
        yield from self._hot.devices.warnings()
        remote = self.remote()
        if remote is not None:
            yield from remote_warnings(remote)
        if disk is not None:
            yield from disk_warnings(disk, self._hands.loaded if self._hands else None)

    def counters(self) -> Counters:
        """See the port."""
        report = self._store.tally.report(self._store.arenas.recycled)
        return replace(report, evicted=report.evicted + self._store.streams.evicted)  # what comes from disk evicts too

    def namespaces(self) -> tuple[NamespaceReport, ...]:
        """See the port."""
        return survey.namespace_reports(self._store)

    def tenants(self) -> tuple[TenantReport, ...]:
        """See the port."""
        return survey.tenant_reports(self._store, {tenant.name: tenant.uids for tenant in self._loaded.config.tenants})

    def clients(self) -> tuple[SessionReport, ...]:
        """See the port."""
        return tuple(
            _session_report(connection) for connection in self._hot.clients.connections.values() if connection.session
        )

    def config(self) -> tuple[ConfigValue, ...]:
        """See the port."""
        return self._loaded.values

    def clear(self, scope: ClearScope, *, dry_run: bool) -> "Future[ClearReport]":
        """See the port."""
        answer: Future[ClearReport] = Future()
        self._store.clear(scope, answer.set_result, dry_run=dry_run)
        announcing = self.routing.announcing
        if announcing is not None and not dry_run and not answer.done():
            swept = announcing.clearing(scope, self._store.now_ns())
            answer.add_done_callback(lambda _: swept())
        return answer

    def evict(self, wish: EvictWish, *, dry_run: bool) -> "Future[EvictReport]":
        """See the port."""
        self._tiers(wish.tier)
        if wish.tier is Tier.DISK and self._store.disk.state is not DiskState.SERVING:
            text = f"disk is {self._store.disk.state.value}"
            raise RefusedError(f"{text}; try again once `kvctl status` calls it serving")
        return evict(self._store, wish, dry_run=dry_run)

    def walk(self, tenant: str, digest: NamespaceDigest, after: int) -> Walked:
        """See the port."""
        return walk(self._store, tenant, digest, after)

    def drain(self, *, on: bool) -> None:
        """See the port."""
        if self.ending:
            raise RefusedError("the daemon is stopping, and takes no new blocks any more; start it again for that")
        self._store.draining = on

    def scrub(self, *, start: bool, rate: int | None, tier: Tier = Tier.DISK) -> ScrubReport:
        """See the port."""
        if tier is Tier.DRAM:
            scrubbing = self._store.scrubbing
            if start:
                least = self._loaded.config.dram_scrub_rate or DRAM_SCRUB_RATE
                scrubbing.begin(least if rate is None else rate, everything=True)
            return scrubbing.report()
        disk = self._store.disk
        if not self._store.limits.disk.disk_bytes:
            raise RefusedError("there is no disk tier to scrub; give kvstored --disk and --disk-size")
        if start:
            if disk.state is not DiskState.SERVING:
                raise RefusedError(f"disk is {disk.state.value}; try again once `kvctl status` calls it serving")
            disk.scrub.begin((self._loaded.config.disk_scrub_rate or SCRUB_RATE) if rate is None else rate)
        return disk.scrub.report()

    def costs(self, tenant: str | None, digest: NamespaceDigest | None) -> CostsReport:
        """See the port."""
        return costs_report(self._store, tenant, digest)

    def quotas(self, tenant: str | None) -> tuple[QuotaReport, ...]:
        """See the port."""
        return quota_reports(self._store, self._configured, tenant)

    def set_quota(self, wish: QuotaWish, *, dry_run: bool) -> QuotaChange:
        """See the port."""
        try:
            return set_quota(self._store, self._configured, wish, dry_run=dry_run)
        except QuotaError as error:
            raise RefusedError(f"{key_of(error.field)}: {error}; `kvctl quota` shows what all have") from None

    def advise(self, tenant: str | None) -> Observed:
        """See the port."""
        try:
            return observe(self._store, tenant)
        except CurvesOffError as error:
            raise RefusedError(str(error)) from None

    def explain_miss(self, question: MissQuestion) -> Explanation:
        """See the port."""
        try:
            return explain_miss(self._store, question)
        except ValueError as error:
            raise AmbiguousError(str(error)) from None

    def pins(self, tenant: str | None) -> PinsReport:
        """See the port."""
        return pins_report(self._store, tenant)

    def pin(self, wish: PrefixWish) -> Pinned:
        """See the port."""
        try:
            return pin(self._store, wish)
        except ValueError as error:
            raise AmbiguousError(str(error)) from None

    def prefetch(self, wish: PrefixWish) -> Fetching:
        """See the port."""
        try:
            return prefetch(self._store, wish)
        except ValueError as error:
            raise AmbiguousError(str(error)) from None

    def hand_over(self, wish: PrefixWish, *, dry_run: bool) -> HandOverReport:
        """See the port."""
        try:
            return hand_over(self._store, wish, dry_run=dry_run)
        except ValueError as error:
            raise AmbiguousError(str(error)) from None

    def unpin(self, tenant: str, numbers: Sequence[int]) -> Unpinned:
        """See the port."""
        found = unpin(self._store, tenant, numbers)
        log.info("unpinned: tenant=%s pins=%d unknown=%d", tenant, found.ended, len(found.unknown))
        return found

    def guiding(self, tenant: str | None) -> GuidingReport:
        """See the port."""
        return guiding_report(self._store, tenant)

    def policies(self, tier: Tier | None, tenant: str | None) -> tuple[PolicyReport, ...]:
        """See the port."""
        tiers = self._tiers(tier)
        self._check_tenant(tenant)
        return policy_reports(self._store, tiers, tenant)

    def set_policy(
        self, tier: Tier | None, tenant: str | None, rule: Rule | None, *, dry_run: bool
    ) -> tuple[PolicyChange, ...]:
        """See the port."""
        tiers = self._tiers(tier)
        self._check_tenant(tenant)
        if rule is None:
            return reset_policy(self._store, tiers, tenant, dry_run=dry_run)
        return set_policy(self._store, tiers, tenant, rule, dry_run=dry_run)

    def _tiers(self, tier: Tier | None) -> tuple[Tier, ...]:
        """Those that are meant and that there are. Raises RefusedError."""
        there = (Tier.DRAM, Tier.DISK) if self._store.limits.disk.disk_bytes else (Tier.DRAM,)
        if tier not in (None, *there):
            raise RefusedError("there is no disk tier to evict from; give kvstored --disk and --disk-size")
        return there if tier is None else (tier,)

    def _check_tenant(self, tenant: str | None) -> None:
        """Raises KeyError for one that was never here, and is not configured."""
        if tenant is not None and not self._store.registry.knows(tenant) and tenant not in self._configured:
            raise KeyError(f"no tenant is called {tenant}")


def _keeper_kind(keeper: Keeper) -> str:
    if isinstance(keeper, SystemdKeeper):
        return "systemd"
    return "fd-keeper" if isinstance(keeper, FdKeeper) else "none"


def _session_report(connection: Connection) -> SessionReport:
    session = connection.session
    assert session is not None
    ring_bytes = session.ring.pages * PAGE_BYTES  # in mode direct no ring: so much may be on its way
    return SessionReport(
        session=session.number,
        name=connection.name,
        role=connection.role,
        mode=connection.mode,
        tenant=session.tenant.name,
        pid=connection.peer.pid,
        uid=connection.peer.uid,
        isolation=connection.peer.isolation,
        connected_s=(time.monotonic_ns() - connection.connected_ns) / 1e9,
        ring_bytes=ring_bytes,
        ring_used_bytes=ring_bytes - session.ring.free_pages * PAGE_BYTES,
        tickets=len(session.tickets),
        leases=len(session.leases),
        arenas_mapped=len(session.arenas),
        namespaces=len(session.namespaces),
        requests=connection.requests,
    )
