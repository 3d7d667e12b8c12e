"""A daemon's control side in memory: an owner with a real thread, and an admin port that holds a few blocks."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeVar

from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.limits import KEYS_PER_FRAME
from kvproto.policy_frames import Fetching, Partial, Pinned
from kvstore.evicting import EvictReport
from kvstore.handing_over import HandOverReport
from kvstore.hints.report import GuidingReport, HintCounters, ProgramReport, WorkflowReport, WorkflowRunReport
from kvstore.insight.advise import Sizes
from kvstore.insight.explain import Elsewhere, Explanation, MissQuestion
from kvstore.insight.looking import Looking
from kvstore.quotas import Choice, Quota
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
from kvstore.report_costs import CostsReport, NamespaceCosts, PrefillReport, RunReport, WayReport
from kvstore.report_pins import PinBudget, PinCounters, PinReport, PinsReport
from kvstore.report_quotas import CLASS_FIELDS, QuotaChange, QuotaReport
from kvstore.rules import Rule, Tier
from kvstore.watching import Observed
from kvstored.admin_evict import EvictWish, Walked
from kvstored.admin_pins import PrefixWish, Unpinned
from kvstored.admin_quotas import QuotaWish
from kvstored.admin_routing import Routing
from kvstored.control_port import AdminPort, RefusedError
from tests.core import Core

T = TypeVar("T")

MIB = 1 << 20
BLOCK_BYTES = 2 * MIB
DIGEST_A = NamespaceDigest(bytes.fromhex("abcdef01" * 8))
DIGEST_B = NamespaceDigest(bytes.fromhex("abcdef02" * 8))
KEYS = tuple(BlockKey(bytes([number]) * 32) for number in range(1, 6))


class ThreadOwner:
    """Keeps the promise of `kvstored.control_port.Owner`: one thread, in order, what timed out unbegun never runs."""

    def __init__(self, port: AdminPort) -> None:
        self.asked = threading.Event()
        self.gave_up = threading.Event()  # somebody who asked does not wait any more
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
            self.gave_up.set()
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
        unread_segments=2, unread=("/mnt/a/segments/00000007.seg",),
        drives=(drive_report("/mnt/a/kv"), drive_report("/mnt/b/kv", state="full", reason="no space", direct=False)),
    )  # fmt: skip


def restart_report() -> RestartReport:
    return RestartReport(
        began="warm", reason="", found_blocks=1234, kept_blocks=1200, withheld_slots=3, unverified_blocks=300,
        verified_blocks=900, verify_faults=0, keeper="systemd",
    )  # fmt: skip


def namespace_costs(tenant: str, digest: NamespaceDigest) -> NamespaceCosts:
    return NamespaceCosts(
        tenant=tenant, digest=digest.hex(), model="meta-llama/Llama-3.1-8B-Instruct", block_tokens=16,
        block_bytes=BLOCK_BYTES, prefill_reports=321, pass_s=0.0125, token_s=4.5e-5, pair_s=2e-9, block_s=0.0,
        saved_dram_s=38.0, saved_disk_s=3.2, hit_blocks=12_345, unpriced_blocks=67,
        prefills=(PrefillReport(0, 512, 0.035), PrefillReport(0, 4096, 0.21), PrefillReport(65_536, 512, 0.102)),
        runs=(RunReport(1024, 2.5e-3, 0.0, 0.0591),),
    )  # fmt: skip


def explanation() -> Explanation:
    return Explanation(
        tenant="research", digest=DIGEST_A.hex(), asked=1, found=0, on_disk=0, state="miss", key="", cause="evicted",
        tier="dram", rule="density", age_s=64.0, known_s=3600.0,
        elsewhere=(Elsewhere("web", DIGEST_B.hex(), ("revision: a / b",)),), sentences=("Gone.", "For good."),
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
    scrubbed_tier: Tier = Tier.DISK
    decayed: bool = False
    scopes: list[ClearScope] = field(default_factory=list)
    rules: dict[tuple[Tier, str], Rule] = field(default_factory=dict)
    observed: Observed = field(default_factory=lambda: Observed("", False, Sizes(MIB), None, 0, 0, 0, "lru", (), 0.0))
    explanation: Explanation = field(default_factory=explanation)
    questions: list[MissQuestion] = field(default_factory=list)
    whole: int = 0  # blocks of any chain that are there, all questions together
    chosen: dict[str, Choice] = field(default_factory=dict)
    wishes: list[PrefixWish] = field(default_factory=list)
    unpinned: list[tuple[int, ...]] = field(default_factory=list)

    @cached_property
    def looking(self) -> Looking:
        return Looking(Core(arenas=1).store)  # which has nothing

    @cached_property
    def routing(self) -> Routing:
        return Routing(Core(arenas=1).store)

    def status(self) -> DaemonReport:
        self._check()
        return DaemonReport(
            version="0.1.0", pid=4242, uid=self.uid, started_unix_s=1.7e9, uptime_s=11_530.5,
            runtime_dir=self.runtime_dir,
            serving=not self.draining, draining=self.draining, isolation="enforced", warnings=self.warnings,
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
                stale_bytes=0, blocks=self._blocks(name), sessions=1, dram_guaranteed_bytes=512 * MIB,
                dram_max_bytes=768 * MIB if name == "web" else None, disk_assigned_bytes=32 * MIB,
                disk_guaranteed_bytes=64 * MIB, disk_max_bytes=None, pinned_bytes=BLOCK_BYTES, in_flight=3, refused=17,
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

    def evict(self, wish: EvictWish, *, dry_run: bool) -> "Future[EvictReport]":
        self._check()
        if wish.tier is Tier.DISK and not self.disk:
            raise RefusedError("there is no disk tier to evict from; give kvstored --disk and --disk-size")
        counted = self.clear(wish.scope, dry_run=True).result()
        blocks = min(counted.blocks, -(-wish.wanted_bytes // BLOCK_BYTES) or counted.blocks)
        chains = [chain for chain in self.chains if wish.scope.tenant in (None, chain.tenant)] if not dry_run else []
        for chain in chains:
            del chain.keys[max(0, len(chain.keys) - blocks) :]
        answer: Future[EvictReport] = Future()
        answer.set_result(EvictReport(blocks, blocks * BLOCK_BYTES, 0, counted.leased_blocks, 0, dry_run))
        return answer

    def walk(self, tenant: str, digest: NamespaceDigest, after: int) -> Walked:
        self._check()
        mine = [chain for chain in self.chains if (chain.tenant, chain.digest) == (tenant, digest)]
        if not mine:
            raise KeyError(f"no namespace of {tenant} has the digest {digest.hex()}")
        keys = mine[0].keys[after : after + 2]
        parents = [bytes(32), *mine[0].keys][after : after + len(keys)]
        more = after + len(keys) < len(mine[0].keys)
        return Walked(b"identity", b"".join(keys), b"".join(parents), after + len(keys) if more else 0)

    def drain(self, *, on: bool) -> None:
        self._check()
        self.before_drain()
        self.draining = on

    def scrub(self, *, start: bool, rate: int | None, tier: Tier = Tier.DISK) -> ScrubReport:
        self._check()
        self.scrubbed_tier = tier
        if self.disk is None and tier is Tier.DISK:
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

    def costs(self, tenant: str | None, digest: NamespaceDigest | None) -> CostsReport:
        self._check()
        chains = [chain for chain in self.chains if tenant in (None, chain.tenant) and digest in (None, chain.digest)]
        if not chains:
            raise KeyError("no namespace is like that")
        return CostsReport(
            tuple(namespace_costs(chain.tenant, chain.digest) for chain in chains if chain.keys), 7,
            (WayReport("", "disk", 9, 5e-4, 2e9), WayReport("research", "dram", 3, 1e-5, 0.0)),
        )  # fmt: skip

    def advise(self, tenant: str | None) -> Observed:
        self._check()
        if tenant is not None and not any(chain.tenant == tenant for chain in self.chains):
            raise KeyError(f"no tenant is called {tenant}")
        return replace(self.observed, tenant=tenant or "")

    def explain_miss(self, question: MissQuestion) -> Explanation:
        self._check()
        self.questions.append(question)
        asked = len(question.keys)
        found = min(asked, max(0, self.whole - KEYS_PER_FRAME * (len(self.questions) - 1)))
        if found == asked:
            return replace(self.explanation, asked=asked, found=found, state="hit", cause="", key="", sentences=())
        return replace(self.explanation, asked=asked, found=found, key=question.keys[found].hex())

    def pins(self, tenant: str | None) -> PinsReport:
        self._check()
        if tenant == "web":
            return PinsReport((), 0, (), PinCounters(*[0] * 15))
        if tenant not in (None, "research"):
            raise KeyError(f"no tenant is called {tenant}")
        pins = (
            PinReport(7, "research", "ab" * 32, 40, 40 * BLOCK_BYTES, 12.5, True, "program:agent-1"),
            PinReport(9, "research", "cd" * 32, 3, 3 * BLOCK_BYTES, 3000.0, False, ""),
        )
        counters = PinCounters(11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22 * MIB, 23 * MIB, 24 * MIB, 25)
        return PinsReport(pins, 600, (PinBudget("research", 600, 64 * MIB, 128 * MIB),), counters)

    def pin(self, wish: PrefixWish) -> Pinned:
        self._check()
        if wish.tenant not in (None, "research"):
            raise KeyError(f"no tenant is called {wish.tenant}")
        self.wishes.append(wish)
        return Pinned(17, 4 * BLOCK_BYTES, 0, 4, Partial.ABSENT)

    def prefetch(self, wish: PrefixWish) -> Fetching:
        self._check()
        self.wishes.append(wish)
        return Fetching(7, 5, 3)

    def hand_over(self, wish: PrefixWish, *, dry_run: bool) -> HandOverReport:
        self._check()
        if not dry_run:
            self.wishes.append(wish)
        looked = 5 if wish.looked_ns else 0
        return HandOverReport(8, 8 * BLOCK_BYTES, 5, 0 if dry_run else 3, remote=True, dry_run=dry_run, looked=looked)

    def unpin(self, tenant: str, numbers: Sequence[int]) -> Unpinned:
        self._check()
        if tenant != "research":
            raise KeyError(f"no tenant is called {tenant}")
        unknown = tuple(number for number in dict.fromkeys(numbers) if number not in (7, 9))
        self.unpinned.append(tuple(number for number in numbers if number not in unknown))
        return Unpinned(len(self.unpinned[-1]) if numbers else 600, unknown)

    def guiding(self, tenant: str | None) -> GuidingReport:
        self._check()
        if tenant not in (None, "research"):
            raise KeyError(f"no tenant is called {tenant}")
        programs = (
            ProgramReport("research", "agent-2", "thinking", "", 0.0, 0, 0, 0, 0, 0.0),
            ProgramReport("research", "agent-1", "in tool", "web search", 12.5, 3, 40, 32, 32 * BLOCK_BYTES, 107.5),
        )
        workflows = (WorkflowReport("research", "report", 7, 4, 2),)
        runs = (WorkflowRunReport("research", "run-1", "report", ("market", "press"), ("merge",), 3),)
        return GuidingReport(HintCounters(1234, 5, 678, 90, 1, 23), programs, 600, workflows, runs, 2)

    def policies(self, tier: Tier | None, tenant: str | None) -> tuple[PolicyReport, ...]:
        self._check()
        whose = [""] + [name for _, name in self.rules if name] if tenant is None else [tenant]
        return tuple(self._policy(one, name) for one in self._tiers(tier, tenant) for name in whose)

    def set_policy(
        self, tier: Tier | None, tenant: str | None, rule: Rule | None, *, dry_run: bool
    ) -> tuple[PolicyChange, ...]:
        self._check()
        if rule is None:
            self._tiers(tier, tenant)
            gone = {one for one in self.rules if tier in (None, one[0]) and tenant in (None, one[1])}
            former = {one: self._policy(*one) for one in sorted(gone)}
            self.rules = self.rules if dry_run else {one: its for one, its in self.rules.items() if one not in gone}
            return tuple(
                PolicyChange(replace(one, rule=Rule.LRU.value, chosen=False), one.rule) for one in former.values()
            )
        before = {one: self._policy(one, tenant or "") for one in self._tiers(tier, tenant)}
        if not dry_run:
            self.rules |= {(one, tenant or ""): rule for one in before}
        return tuple(PolicyChange(replace(one, rule=rule.value, chosen=True), one.rule) for one in before.values())

    def quotas(self, tenant: str | None) -> tuple[QuotaReport, ...]:
        self._check()
        names = dict.fromkeys(chain.tenant for chain in self.chains)
        if tenant not in (None, *names):
            raise KeyError(f"no tenant is called {tenant}")
        return tuple(self._quota(name, self.chosen.get(name)) for name in names if tenant in (None, name))

    def set_quota(self, wish: QuotaWish, *, dry_run: bool) -> QuotaChange:
        (former,) = self.quotas(wish.tenant)
        after = wish.on(self.chosen.get(wish.tenant, {}))
        if (after.get("dram_guaranteed_bytes") or 0) > 1024 * MIB:
            raise RefusedError("dram_guaranteed_bytes: there is not so much; ask for less")
        if not dry_run:
            self.chosen = {name: one for name, one in self.chosen.items() if name != wish.tenant}
            self.chosen |= {wish.tenant: after} if after else {}
        return QuotaChange(self._quota(wish.tenant, after), former)

    def _quota(self, name: str, chosen: Choice | None) -> QuotaReport:
        quota = Quota(**(chosen or {}))  # type: ignore[arg-type]  # nothing is configured
        asked = quota.dram_guaranteed_bytes
        guaranteed = 512 * MIB if asked is None else asked // (64 * MIB) * 64 * MIB
        most = quota.dram_max_bytes
        return QuotaReport(
            name, bool(chosen), guaranteed, asked,
            None if most is None else min(most // (64 * MIB) * 64, 2048) * MIB, 0, quota.disk_guaranteed_bytes,
            quota.disk_max_bytes, quota.pin_share, int(quota.pin_share * guaranteed), quota.in_flight, most,
            quota.disk_max_bytes, **{name: getattr(quota, name) for name in CLASS_FIELDS},
            chosen_fields=tuple(name.replace("in_flight", "in_flight_max") for name in chosen or ()),
        )  # fmt: skip

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
