"""A daemon's control side in memory: an owner with a real thread, and an admin port that holds a few blocks."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from kvproto.ids import BlockKey, NamespaceDigest
from kvstore.report import (
    ClearReport,
    ClearScope,
    ConfigValue,
    Counters,
    DaemonReport,
    DiskCounters,
    DiskReport,
    DriveReport,
    NamespaceReport,
    PolicyChange,
    PolicyReport,
    RestartReport,
    ScrubReport,
    SessionReport,
    TenantReport,
    TierReport,
)
from kvstore.rules import Rule, Tier
from kvstored.control import AdminPort, RefusedError

T = TypeVar("T")

MIB = 1 << 20
BLOCK_BYTES = 2 * MIB
DIGEST_A = NamespaceDigest(bytes.fromhex("abcdef01" * 8))
DIGEST_B = NamespaceDigest(bytes.fromhex("abcdef02" * 8))
KEYS = tuple(BlockKey(bytes([number]) * 32) for number in range(1, 6))


class ThreadOwner:
    """Keeps the promise of `kvstored.control.Owner`: one thread, in order, what timed out unbegun never runs."""

    def __init__(self, port: AdminPort) -> None:
        self.asked = threading.Event()
        self._questions: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._port = port
        self._thread = threading.Thread(target=self._run, name="owner")
        self._thread.start()

    def ask(self, question: Callable[[AdminPort], T], timeout_s: float) -> T:
        self.asked.set()
        answer: Future[T] = Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question(self._port))
                except Exception as error:  # noqa: BLE001  it belongs to the one who asked
                    answer.set_exception(error)

        self._questions.put(run)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, the owner thread is held up and answers nothing."""
        held, free = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            free.wait()

        self._questions.put(hold)
        held.wait()
        try:
            yield
        finally:
            free.set()

    def stop(self) -> None:
        self._questions.put(None)
        self._thread.join()

    def _run(self) -> None:
        while question := self._questions.get():
            question()


def disk_tier() -> TierReport:
    return TierReport(
        name="disk", capacity_bytes=1024 * MIB, assigned_bytes=64 * MIB, used_bytes=3 * BLOCK_BYTES, blocks=3, arenas=2,
        arena_bytes=32 * MIB, populated_bytes=0, locked_bytes=0, stale_bytes=0,
    )  # fmt: skip


def drive_report(directory: str, **others: object) -> DriveReport:
    well = DriveReport(
        directory=directory, state="ok", reason="", direct=True, segments=1, free_bytes=900 * MIB,
        capacity_bytes=4096 * MIB, read_bytes=5 * MIB, written_bytes=7 * MIB, errors=0, damaged=0,
    )  # fmt: skip
    return replace(well, **others)  # type: ignore[arg-type]


def disk_report() -> DiskReport:
    return DiskReport(
        state="serving", index_state="ready", index_reason="", rebuild_done_slots=0, rebuild_total_slots=0, rebuilt="",
        recovered_blocks=2, orphan_blocks=1, recovered_segments=1, surplus_segments=0, unknown_segments=0,
        useless_records=0, foreign_files=1, foreign=("/mnt/a/segments/notes.txt",), admission="second_touch",
        codec="auto", queued_chains=4, running_bytes=2 * MIB,
        counters=DiskCounters(**{one.name: number for number, one in enumerate(fields(DiskCounters), start=2001)}),
        drives=(drive_report("/mnt/a/kv"), drive_report("/mnt/b/kv", state="full", reason="no space", direct=False)),
    )  # fmt: skip


def restart_report() -> RestartReport:
    return RestartReport(
        began="warm", reason="", found_blocks=1234, kept_blocks=1200, withheld_slots=3, unverified_blocks=300,
        verified_blocks=900, verify_faults=0, keeper="systemd",
    )  # fmt: skip


@dataclass
class Chain:
    """The blocks of one tenant's namespace, each continuing the one before it."""

    tenant: str
    digest: NamespaceDigest
    keys: list[BlockKey]
    leased: int = 0
    pending: int = 0


@dataclass
class MemoryPort:
    """Two tenants, two namespaces, two drives.

    `trouble` is raised by every method, `before_drain` runs in `drain`. A scrub gets one block further whenever
    somebody looks, and finds the last one damaged if `decayed`.
    """

    chains: list[Chain] = field(
        default_factory=lambda: [
            Chain("research", DIGEST_A, list(KEYS), leased=1),
            Chain("research", DIGEST_B, list(KEYS[:2]), pending=3),
            Chain("web", DIGEST_A, list(KEYS[:1])),
        ]
    )
    draining: bool = False
    uid: int = field(default_factory=os.getuid)
    runtime_dir: str = "/run/kvstored"
    trouble: Exception | None = None
    client_name: str = "engine-0"
    warnings: tuple[str, ...] = ()
    before_drain: Callable[[], object] = bool
    disk: DiskReport | None = field(default_factory=disk_report)
    restart: RestartReport = field(default_factory=restart_report)
    scrubbed: ScrubReport = field(default_factory=ScrubReport)
    decayed: bool = False
    scopes: list[ClearScope] = field(default_factory=list)
    rules: dict[tuple[Tier, str], Rule] = field(default_factory=dict)

    def status(self) -> DaemonReport:
        self._check()
        return DaemonReport(
            version="0.1.0", pid=4242, uid=self.uid, started_unix_s=1.7e9, uptime_s=11_530.5,
            runtime_dir=self.runtime_dir,
            serving=True, draining=self.draining, isolation="enforced", warnings=self.warnings,
            tiers=(self.tier(), disk_tier()) if self.disk else (self.tier(),), tenants=self.tenants(),
            counters=self.counters(), sessions=1, namespaces=len(self.chains), disk=self.disk, restart=self.restart,
        )  # fmt: skip

    def tier(self) -> TierReport:
        return TierReport(
            name="dram", capacity_bytes=1024 * MIB, assigned_bytes=128 * MIB, used_bytes=self._blocks() * BLOCK_BYTES,
            blocks=self._blocks(), arenas=16, arena_bytes=64 * MIB, populated_bytes=256 * MIB, locked_bytes=8 * MIB,
            stale_bytes=0,
        )  # fmt: skip

    def counters(self) -> Counters:
        self._check()
        return Counters(**{one.name: number for number, one in enumerate(fields(Counters), start=1001)})

    def namespaces(self) -> tuple[NamespaceReport, ...]:
        self._check()
        return tuple(
            NamespaceReport(
                tenant=chain.tenant, digest=chain.digest.hex(), model="meta-llama/Llama-3.1-8B-Instruct",
                engine="vllm-0.11", layout="nhd", dtype="bfloat16", revision="0e9e39f", adapter="", block_tokens=16,
                block_bytes=BLOCK_BYTES, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1, slot_bytes=BLOCK_BYTES,
                blocks=len(chain.keys), bytes=len(chain.keys) * BLOCK_BYTES, sessions=1,
            )
            for chain in self.chains
        )  # fmt: skip

    def tenants(self) -> tuple[TenantReport, ...]:
        self._check()
        return tuple(
            TenantReport(
                name=name, uids=(1000, 1001), assigned_bytes=64 * MIB, used_bytes=self._blocks(name) * BLOCK_BYTES,
                stale_bytes=0, blocks=self._blocks(name), sessions=1,
            )
            for name in dict.fromkeys(chain.tenant for chain in self.chains)
        )  # fmt: skip

    def clients(self) -> tuple[SessionReport, ...]:
        self._check()
        return (
            SessionReport(
                session=7, name=self.client_name, role="engine", mode="copy", tenant="research", pid=31337, uid=1000,
                isolation="accident only", connected_s=75.25, ring_bytes=64 * MIB, ring_used_bytes=4 * MIB, tickets=2,
                leases=3, arenas_mapped=5, namespaces=2, requests=123_456,
            ),
        )  # fmt: skip

    def config(self) -> tuple[ConfigValue, ...]:
        self._check()
        return (
            ConfigValue("dram.size", "1GiB", "flag --dram", "bytes", "memory for blocks"),
            ConfigValue("dram.lock", "true", "file /etc/kvstored.toml:3", "switch", "keep blocks out of swap"),
            ConfigValue("disk.directories", "/mnt/a/kv:/mnt/b/kv", "environment KVSTORED_DISK", "paths", "blocks too"),
        )

    def clear(self, scope: ClearScope, *, dry_run: bool) -> "Future[ClearReport]":
        self._check()
        self.scopes.append(scope)
        chains = [chain for chain in self.chains if scope.tenant in (None, chain.tenant)]
        if not chains:
            raise KeyError(f"no tenant is called {scope.tenant}")
        chains = [chain for chain in chains if scope.digest in (None, chain.digest)]
        if scope.digest and not chains:
            raise KeyError(f"no namespace has the digest {scope.digest.hex()[:12]}")
        starts = {id(chain): _start(chain, scope.keys) for chain in chains}
        blocks = sum(len(chain.keys) - starts[id(chain)] for chain in chains)
        report = ClearReport(
            blocks, blocks * BLOCK_BYTES, sum(chain.leased for chain in chains), sum(chain.pending for chain in chains),
            dry_run,
        )  # fmt: skip
        if not dry_run:
            for chain in chains:
                del chain.keys[starts[id(chain)] :]
                chain.leased = chain.pending = 0
        answer: Future[ClearReport] = Future()
        answer.set_result(report)
        return answer

    def drain(self, *, on: bool) -> None:
        self._check()
        self.before_drain()
        self.draining = on

    def scrub(self, *, start: bool, rate: int | None) -> ScrubReport:
        self._check()
        if self.disk is None:
            raise RefusedError("there is no disk tier; give --disk")
        if start:
            self.scrubbed = ScrubReport(
                True, total_blocks=3, rate_bytes_per_s=MIB if rate is None else rate, started_unix_s=1.7e9
            )
        elif self.scrubbed.running:
            done = self.scrubbed.done_blocks + 1
            ended = done == self.scrubbed.total_blocks
            self.scrubbed = replace(
                self.scrubbed, running=not ended, done_blocks=done, done_bytes=done * BLOCK_BYTES,
                damaged=int(ended and self.decayed), finished_unix_s=1.7e9 + 61 if ended else 0.0,
            )  # fmt: skip
        return self.scrubbed

    def policies(self, tier: Tier | None, tenant: str | None) -> tuple[PolicyReport, ...]:
        self._check()
        whose = [""] + [name for _, name in self.rules if name] if tenant is None else [tenant]
        return tuple(self._policy(one, name) for one in self._tiers(tier, tenant) for name in whose)

    def set_policy(
        self, tier: Tier | None, tenant: str | None, rule: Rule, *, dry_run: bool
    ) -> tuple[PolicyChange, ...]:
        self._check()
        before = {one: self._policy(one, tenant or "") for one in self._tiers(tier, tenant)}
        if not dry_run:
            self.rules |= {(one, tenant or ""): rule for one in before}
        return tuple(PolicyChange(replace(one, rule=rule.value, chosen=True), one.rule) for one in before.values())

    def _policy(self, tier: Tier, tenant: str) -> PolicyReport:
        rule = self.rules.get((tier, tenant), self.rules.get((tier, ""), Rule.LRU))
        return PolicyReport(tier.value, tenant, rule.value, (tier, tenant) in self.rules, self._blocks(tenant or None))

    def _tiers(self, tier: Tier | None, tenant: str | None) -> tuple[Tier, ...]:
        if tenant is not None and not any(chain.tenant == tenant for chain in self.chains):
            raise KeyError(f"no tenant is called {tenant}")
        if tier is Tier.DISK and self.disk is None:
            raise RefusedError("there is no disk tier; give --disk")
        return (tier,) if tier else (Tier.DRAM, Tier.DISK) if self.disk else (Tier.DRAM,)

    def _check(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def _blocks(self, tenant: str | None = None) -> int:
        return sum(len(chain.keys) for chain in self.chains if tenant in (None, chain.tenant))


def _start(chain: Chain, keys: tuple[BlockKey, ...]) -> int:
    """Position of the first block that continues one of `keys`; no keys mean all of the chain."""
    found = [chain.keys.index(key) for key in keys if key in chain.keys]
    return min(found) if found else len(chain.keys) if keys else 0
