"""What the owner thread answers to the control socket (`control.AdminPort`)."""

import os
import time
from concurrent.futures import Future

from kvstore import survey
from kvstore.report import (
    ClearReport,
    ClearScope,
    ConfigValue,
    Counters,
    DaemonReport,
    NamespaceReport,
    SessionReport,
    TenantReport,
    TierReport,
)
from kvstore.store import Store
from kvstored import __version__
from kvstored.config import Loaded
from kvstored.connection import Connection
from kvstored.hot import HotServer
from kvstored.memory import HostMemory


class Admin:
    """Owner thread only."""

    def __init__(self, loaded: Loaded, store: Store, hot: HotServer, memory: HostMemory) -> None:
        self._loaded = loaded
        self._store = store
        self._hot = hot
        self._memory = memory
        self._started_unix_s = time.time()
        self._started_ns = time.monotonic_ns()

    def status(self) -> DaemonReport:
        """See the port."""
        return DaemonReport(
            version=__version__,
            pid=os.getpid(),
            uid=os.geteuid(),
            started_unix_s=self._started_unix_s,
            uptime_s=(time.monotonic_ns() - self._started_ns) / 1e9,
            runtime_dir=str(self._loaded.config.runtime_dir),
            serving=True,
            draining=self._store.draining,
            isolation=self._isolation(),
            warnings=tuple(self._memory.faults),
            tiers=(self._dram(),),
            tenants=self.tenants(),
            counters=self.counters(),
            sessions=len(self._hot.connections),
            namespaces=len(self.namespaces()),
        )

    def _isolation(self) -> str:
        peers = [connection.peer.isolation for connection in self._hot.connections.values()]
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
            blocks=int(store.tables.book[2]),
            arenas=serving,
            arena_bytes=arena_bytes,
            populated_bytes=memory.populated_bytes,
            locked_bytes=memory.locked_bytes,
            stale_bytes=store.arenas.stale_bytes(),
        )

    def counters(self) -> Counters:
        """See the port."""
        return self._store.tally.report(self._store.arenas.recycled)

    def namespaces(self) -> tuple[NamespaceReport, ...]:
        """See the port."""
        return survey.namespace_reports(self._store)

    def tenants(self) -> tuple[TenantReport, ...]:
        """See the port."""
        return survey.tenant_reports(self._store, {tenant.name: tenant.uids for tenant in self._loaded.config.tenants})

    def clients(self) -> tuple[SessionReport, ...]:
        """See the port."""
        return tuple(_session_report(connection) for connection in self._hot.connections.values() if connection.session)

    def config(self) -> tuple[ConfigValue, ...]:
        """See the port."""
        return self._loaded.values

    def clear(self, scope: ClearScope, *, dry_run: bool) -> "Future[ClearReport]":
        """See the port."""
        answer: Future[ClearReport] = Future()
        self._store.clear(scope, answer.set_result, dry_run=dry_run)
        return answer

    def drain(self, *, on: bool) -> None:
        """See the port."""
        self._store.draining = on


def _session_report(connection: Connection) -> SessionReport:
    session = connection.session
    assert session is not None
    ring_bytes = connection.ring.region_bytes if connection.ring else 0
    page_bytes = ring_bytes // session.ring.pages if session.ring.pages else 0
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
        ring_used_bytes=ring_bytes - session.ring.free_pages * page_bytes,
        tickets=len(session.tickets),
        leases=len(session.leases),
        arenas_mapped=len(session.arenas),
        namespaces=len(session.namespaces),
        requests=connection.requests,
    )
