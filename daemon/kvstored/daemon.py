"""The process put together: memory, store, leaf threads, hot socket, control socket, and the loop that turns them."""

import gc
import logging
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from kvproto.errors import Code
from kvstore.announcing import Announcing
from kvstore.insight.misses import Misses, loaded
from kvstore.rules import Rule, Rules
from kvstore.store import Limits, Store
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.remote_writing import RemoteAdmission
from kvstored import __version__
from kvstored.admin import Admin
from kvstored.admin_access import Access
from kvstored.admin_audit import Audit
from kvstored.admin_gate import Gate
from kvstored.admin_quotas import key_of
from kvstored.admin_remote import remote_report
from kvstored.admin_tokens import TokenSocket
from kvstored.block_events import BlockEvents
from kvstored.block_events_numbers import Numbers
from kvstored.chronicle import Chronicle
from kvstored.config import Config, Loaded
from kvstored.control import ControlServer
from kvstored.control_kinds import group_of
from kvstored.control_port import AdminPort
from kvstored.control_tls import RemoteControl, door_of
from kvstored.devices import make_devices
from kvstored.door import Door, for_tenants
from kvstored.events import Events, Kind
from kvstored.host_limits import too_tight
from kvstored.hot import SOCKET_NAME, HotServer
from kvstored.http_address import OFF, address_of
from kvstored.index import Index
from kvstored.keep import RETRY_S, kept_descriptors
from kvstored.leaf import LeafThreads
from kvstored.loop import Loop
from kvstored.memory import HostMemory
from kvstored.metrics import Metrics
from kvstored.placement import Placement, Topology, plan
from kvstored.processes import HostProcesses
from kvstored.remote import RemoteLimits, RemoteThreads
from kvstored.remote_backends import open_backend
from kvstored.remote_port import RemoteError
from kvstored.service import LINGER_S, Pulse, Service
from kvstored.standing import Ending, standing, unfinished
from kvstored.tracing import Tracing, make_tracing
from kvstored.workers import HostWorkers

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_AROUND_NS = 10**9
CONTROL_GRACE_S = 1.0
SAY_S = 1.0  # for what is still to be said to the keeper and to systemd
DESCRIPTORS_APART = 96  # tables, sockets, gRPC, and a few sessions
# A thread that holds the GIL gives it up this soon when the owner thread wants it. The default of 5 ms is a hundred
# round trips.
SWITCH_INTERVAL_S = 50e-6


class HostClock:
    """`kvstore.ports.Clock` of a real host."""

    def now_ns(self) -> int:
        """See the port."""
        return time.monotonic_ns()

    def wall_s(self) -> int:
        """See the port."""
        return int(time.time())


class HostRandomness:
    """`kvstore.ports.Randomness` of a real host."""

    def word(self) -> int:
        """See the port."""
        return secrets.randbits(64)


class Daemon:
    """One daemon's life: `serve` returns when `stop` was called or a termination signal came."""

    def __init__(self, loaded: Loaded, loop: Loop, index: Index | None = None, service: Service | None = None) -> None:
        """`index` is running already, so that it reads while the rest is being loaded. Raises OSError."""
        service = service or Service()
        config = loaded.config
        self._config = config
        self._loop = loop
        _raise_descriptor_limit(config.dram_bytes // config.arena_bytes, config.disk_bytes // config.segment_bytes)
        self._listener = service.listener
        self._notifier = service.notifier
        kept, self._keeper = kept_descriptors(
            config.runtime_dir, os.environ, self._notifier, keep=config.keep, patience_s=config.keep_patience_s,
            passed=service.kept,
        )  # fmt: skip
        self._leaf = LeafThreads(config.leaf_threads, self._loop.wake)
        self._memory = HostMemory(
            config.dram_bytes // config.arena_bytes,
            config.arena_bytes,
            prefault=config.prefault,
            lock=config.lock,
            punched=lambda arena: self._loop.call(lambda: self._store.arena_punched(arena)),
            keeper=self._keeper,
            huge=config.huge_pages,
            placement=Placement(plan(config.numa, Topology.read())),
        )
        self._memory.advice = too_tight(config.dram_bytes)
        self._memory.adopt(kept)
        self._workers = HostWorkers(config, self._memory, self._leaf, index, loop.wake)
        self._devices, without = make_devices(config.gpu_devices, config.gpu_hbm_bytes, self._loop.wake)
        self._memory.faults += without
        self._hot = HotServer(config, self._loop, self._memory, self._leaf, self._devices)
        limits = Limits(
            config.dram_bytes,
            config.arena_bytes,
            ticket_ttl_ns=int(config.ticket_ttl_s * 1e9),
            lease_ttl_ns_max=int(config.lease_ttl_max_s * 1e9),
            disk=_disk_limits(config),
            rules=Rules(Rule(config.policy_dram), Rule(config.policy_disk)),
            curves=config.insight_curves,
            scrub_bytes_per_s=config.dram_scrub_rate,
            scrub_all=config.dram_scrub == "all",
            quotas=config.quotas(),
            hbm=config.hbm_capacity(),
            tenants=tuple(tenant.name for tenant in config.tenants),
            first_generation=time.time_ns() // 1000,  # grows over all lives, or the index says what was given
        )
        self._store = Store(
            limits, HostClock(), HostRandomness(), self._memory, self._hot, self._workers, self._memory,
            HostProcesses(loop),
        )  # fmt: skip
        log.info(
            "memory: warm=%s kept=%d lost=%d withheld=%d %s",
            self._store.kept.warm, self._store.kept.blocks, self._store.kept.lost, self._store.kept.withheld,
            self._store.kept.reason,
        )  # fmt: skip
        if self._store.kept.pins or self._store.kept.pins_lost:
            log.info("pins: kept=%d lost=%d", self._store.kept.pins, self._store.kept.pins_lost)
        for fault in self._store.kept.faults:
            log.warning("learned anew after a warm restart: %s", fault)
        if self._store.quotas.forgotten:
            names = ",".join(f"{tenant}.{key_of(field)}" for tenant, field in self._store.quotas.forgotten)
            log.warning("quotas: %s were chosen and do not hold any more: the configuration leaves no room", names)
        self._hot.store = self._hot.clients.store = self._store
        self._store.leasing.cut = self._hot.devices.cut
        self._hot.devices.begin(self._store)
        self._admin = Admin(loaded, self._store, self._hot, self._memory, hands=self._workers, keeper=self._keeper)
        self._audit = Audit(config.state_dir)
        self._events = Events()
        self._chronicle = Chronicle(self._store, self._events, self._admin.disk, self._admin.warnings)
        self._hot.clients.came, self._hot.clients.went = self._chronicle.came, self._chronicle.went
        self._audit.heard = self._chronicle.acted
        self._block_events, self._announcing = self._make_block_events(config)
        self._control, self._others = self._make_control(config)
        self._metrics = self._make_metrics(config)
        self._tracing: Tracing | None = None
        if config.trace_otlp != OFF:
            self._tracing = make_tracing(config.trace_otlp, config.trace_one_in, __version__)
            self._tracing.install(self._hot, self._workers)
        self._remote = self._make_remote(config)
        self._look_around_ns = 0
        self._pulse = Pulse(service, self._standing)
        self._stop_asked = 0  # times
        self._ending: Ending | None = None

    def _make_control(self, config: Config) -> tuple[ControlServer, tuple[TokenSocket | ControlServer, ...]]:
        """The control socket, and what goes with it: tokens, and a socket for everybody where that is wanted."""
        admin_gid = group_of(config.admin_group)
        access = Access(os.geteuid(), admin_gid, config.tenants_of)
        door = Door(mode=0o600 if admin_gid is None else 0o660, gid=admin_gid, gate=Gate(access, self._audit))
        others: list[TokenSocket | ControlServer] = [TokenSocket(access, config.runtime_dir)]
        if config.tenant_control:
            everybody = for_tenants(Gate(access, self._audit, open_to_all=True))
            others.append(
                ControlServer(self, config.runtime_dir, everybody, self._audit, block_events=self._block_events)
            )
        control = ControlServer(self, config.runtime_dir, door, self._audit, self._events, self._block_events)
        files = config.control_tls()
        if files is not None:
            remote = door_of(Gate(access, self._audit))
            others.append(
                RemoteControl(
                    self,
                    config.control_listen,
                    files,
                    remote,
                    self._audit,
                    self._events,
                    control.announce,
                    self._block_events,
                )
            )
        return control, tuple(others)

    def _make_block_events(self, config: Config) -> tuple[BlockEvents | None, Announcing | None]:
        """None: nobody is to be told where blocks lie. Raises OSError."""
        if config.events_listen == OFF:
            return None, None
        events = BlockEvents(
            config.events(), group_of(config.admin_group), lambda: self._loop.call(announcing.room),
            Numbers(config.state_dir), lambda tenant: self._loop.call(lambda: announcing.tell_anew(tenant)),
        )  # fmt: skip
        seeds = [HostRandomness().word() for _ in range(2)]
        announcing = Announcing(self._store, seeds, events.tell, by_model=config.events().has("model"))
        self._store.forgotten = announcing.forgotten
        self._admin.routing.announcing, self._admin.routing.events = announcing, events.tally
        return events, announcing

    def _make_remote(self, config: Config) -> RemoteThreads | None:
        """None: nothing is kept beyond this host."""
        address = config.remote_address()
        if address is None:
            return None
        try:
            backend = open_backend(address, config.remote_deadline_s)
        except RemoteError as error:
            log.error("remote tier off: %s", error)  # noqa: TRY400  it says all
            return None
        limits = RemoteLimits(config.remote_bytes, config.remote_connections, config.state_dir)
        remote = RemoteThreads(backend, limits, self._memory.view, self._leaf, self._loop.wake)
        if self._announcing is not None:
            self._store.remote.beyond = self._announcing.beyond
        self._store.begin_remote(remote, RemoteAdmission(config.remote_admission))
        self._admin.remote = lambda: remote_report(self._store, remote, config.remote_url)
        self._admin.routing.remote = self._admin.remote
        return remote

    def _make_metrics(self, config: Config) -> Metrics | None:
        """None: nobody is to be told. Raises OSError."""
        address = address_of(config.metrics_listen)
        if address is None:
            return None
        misses = Misses(self._store, loaded)
        metrics = Metrics(
            address, self._loop, lambda: self._admin.snapshot(misses), lambda: self._control.serving
        )  # fmt: skip
        self._store.watching.missed = misses.missed
        self._hot.notes = metrics.timings.by_verb()
        self._workers.timings = metrics.timings
        return metrics

    def ask(self, question: Callable[[AdminPort], T], timeout_s: float) -> T:
        """`kvstored.control_port.Owner`. Any other thread."""
        return self._loop.ask(lambda: question(self._admin), timeout_s)

    def stop(self) -> None:
        """End `serve` once what has begun is finished, or `daemon.stop_within` is over; asked again, now.

        Any thread, and signal handlers.
        """
        self._stop_asked += 1
        if self._stop_asked > 1:
            self._loop.stop()
        else:
            self._loop.wake()

    def serve(self, announce: Callable[[], None]) -> None:
        """Serve until told to stop; `announce` is called once clients can connect. The caller holds `only_one`.

        Raises OSError if the runtime directory cannot be used.
        """
        with ExitStack() as stack:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            if self._tracing is not None:
                stack.callback(self._tracing.close)
            gc.collect()
            gc.freeze()  # what start-up made stays; a full collection then has little to walk
            gc.enable()
            self._memory.start()
            stack.callback(self._memory.stop)
            self._leaf.start()
            stack.callback(self._leaf.stop)
            for device in self._devices:
                device.start()
                stack.callback(device.stop)
            self._workers.start()
            stack.callback(self._workers.stop)
            if self._remote is not None:
                self._remote.start()
                stack.callback(self._remote.stop)
            self._hot.clients.listen(self._config.runtime_dir / SOCKET_NAME, self._listener)
            stack.callback(self._hot.clients.close, Code.SHUTTING_DOWN, "the daemon is shutting down")
            stack.callback(self._audit.stop, SAY_S)
            if self._block_events is not None:
                self._block_events.start()
                stack.callback(self._block_events.stop)
            for other in self._others:
                other.start()
                stack.callback(other.stop, CONTROL_GRACE_S)
            self._control.start()
            stack.callback(self._control.stop, CONTROL_GRACE_S)
            if self._metrics is not None:
                self._metrics.start()
                stack.callback(self._metrics.stop)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.stop())
            self._keeper.flush(SAY_S)
            announce()
            self._notifier.notify("READY=1")
            self._chronicle.begin(__version__)
            self._loop.run(self._turn)
            self._store.learned.save()
            self._store.pinning.note_all()
            self._keeper.flush(SAY_S)  # nothing is forgotten: a successor takes it
            self._notifier.flush(SAY_S)

    def _turn(self) -> int:
        """What events have brought about, what time has, and when to look again (ns)."""
        self._hot.finish_copies()
        self._hot.devices.finish()
        self._workers.finish(self._store)
        if self._remote is not None:
            self._remote.finish(self._store)
        now_ns = time.monotonic_ns()
        soonest_ns = self._store.next_tick_ns()
        if soonest_ns is not None and soonest_ns <= now_ns:
            self._store.tick()
            soonest_ns = self._store.next_tick_ns()
        if self._look_around_ns <= now_ns:
            self._hot.clients.look_around(now_ns)
            self._workers.look_around()
            self._chronicle.look(now_ns)
            if self._metrics is not None:
                self._metrics.look_around()
            self._keeper.flush()  # this is how a dead keeper is noticed
            self._look_around_ns = now_ns + LOOK_AROUND_NS
        if self._announcing is not None:
            self._announcing.look(now_ns)
        if self._pulse.due_ns <= now_ns:
            self._pulse.beat(now_ns)
        if self._stop_asked:
            end_ns = self._end(now_ns)
            soonest_ns = end_ns if soonest_ns is None else min(soonest_ns, end_ns)
        if self._keeper.pending or self._notifier.pending:
            self._keeper.flush()
            self._notifier.flush()
            soonest_ns = min(soonest_ns or 1 << 62, now_ns + int(RETRY_S * 1e9))
        alone_ns = min(self._look_around_ns, self._pulse.due_ns)
        if self._announcing is not None:
            alone_ns = min(alone_ns, self._announcing.due_ns)
        return alone_ns if soonest_ns is None else min(soonest_ns, alone_ns)

    def _standing(self) -> str:
        """For `systemctl status`."""
        if self._ending is not None:
            return f"stopping: {unfinished(self._store) or 'everything is finished'}"
        return standing(self._store, len(self._hot.clients.connections))

    def _end(self, now_ns: int) -> int:
        """Go on with a stop; when to look at it again (ns) at the latest."""
        if self._ending is None:
            wait_s = self._config.stop_within_s
            self._ending = Ending(self._store, wait_s, now_ns)
            self._admin.ending = True
            self._control.announce(serving=False)
            self._events.say(Kind.DAEMON, "stopping: nothing new begins")
            self._notifier.notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round((wait_s + LINGER_S) * 1e6)}")
            self._pulse.say(self._standing())
        if self._ending.over(now_ns):
            self._loop.stop()
        return self._ending.deadline_ns


def _disk_limits(config: Config) -> DiskLimits:
    if not config.disk_directories:
        return DiskLimits(codec=Wish(config.disk_codec))  # for a remote tier
    return DiskLimits(
        config.disk_bytes // config.segment_bytes * config.segment_bytes,
        config.segment_bytes,
        Admission(config.disk_admission),
        config.disk_write_rate,
        Wish(config.disk_codec),
        config.disk_scrub_rate,
    )


def _raise_descriptor_limit(arenas: int, segments: int) -> None:
    """An arena and a session each take a descriptor or two. Raises OSError where the limit allows not even few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = arenas + segments + DESCRIPTORS_APART
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise OSError(
            f"{arenas} arenas and {segments} segments need {wanted} descriptors, and the limit is {hard}: "
            "raise it, or take larger ones"
        )
    log.debug("descriptors: limit raised from %d to %d", soft, hard)
