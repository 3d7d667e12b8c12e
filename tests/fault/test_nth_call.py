"""Fault 12: the n-th system call on the disk fails, once, for every n: the tier degrades, and heals.

A daemon stores, flushes, evicts, promotes and deletes, is killed, and does so again in a second life. In one of the two
a call of its own, of its index child or of LMDB fails (`tests/failing.py`). A third life looks at what is left.
Bytes follow from key and version, and a chain that was deleted is stored in its next version: an older one is wrong.
"""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvproto import control_pb2, control_pb2_grpc
from tests.failing import FAILS, Failing, Fault, Hit, Page, has_compiler
from tests.figures import Recorder
from tests.node import Node, Slot, chain, fetch, until, value, values

BLOCK_BYTES = 400_000
BLOCKS = 4  # of a chain
CHAINS = 10  # more than DRAM holds
LIVES = 2  # in which calls may fail
FLUSH_S = 10.0
PARTS = 4  # of the long form, which may run beside each other
ERRNOS = (errno.EIO, errno.ENOSPC, errno.EROFS)
LOOKS = {"close", "read", "pread", "stat", "statvfs", "list"}  # these change nothing: EIO alone
# One of each kind that matters most, by life; how often a kind is called is not the same in each run.
FAST = (
    (0, Fault("open", 2, errno.EIO)), (0, Fault("pwrite", 9, errno.ENOSPC)), (0, Fault("sync", 12, errno.EIO)),
    (1, Fault("pread", 8, errno.EIO)),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Daemons of this file are forked off one process, with a library that has calls fail."""
    if not has_compiler():
        pytest.skip("no gcc: calls of the index child can only be reached from a library")
    prepared, before = Failing(tmp_path_factory.mktemp("failing")), DaemonProcess.starter
    DaemonProcess.starter = prepared
    try:
        yield
    finally:
        DaemonProcess.starter = before
        prepared.end()


@dataclass
class Chain:
    """What its owner knows of one."""

    name: str
    version: int = 0
    durable: bool = False
    stored: bool = False

    @property
    def keys(self) -> list[bytes]:
        """Of its blocks."""
        return chain(f"nth-{self.name}", BLOCKS)


@dataclass
class Case:
    """Three lives of one daemon, in one of which a call fails."""

    node: Node
    page: Page
    fault: Fault | None = None
    counts: list[dict[str, int]] = field(default_factory=list)  # of calls, by life
    hit: Hit | None = None  # what the call that failed was about
    refused: bool = False  # the daemon would not begin with that
    partial: bool = (
        False  # a call failed while this life read what lies on disk: some of it may be missed until the next
    )
    slots: dict[bytes, Slot] = field(default_factory=dict)  # all that ever was on disk
    chains: dict[str, Chain] = field(default_factory=dict)
    deleted: list[Chain] = field(default_factory=list)
    tries: int = 0

    def run(self, life: int) -> None:
        """`life` is the one with the fault."""
        for number in range(LIVES):
            self._begin(self.fault if number == life else None)
            self._work(number)
            self._end()
        self._begin(None)
        self._look_at_all()
        self._end()

    # -- lives ---------------------------------------------------------------------------------------------------

    def _begin(self, fault: Fault | None) -> None:
        self.page.plant(fault)
        try:
            self.node.start("--keep", "false", "--disk-admission", "all", "--disk-codec", "raw")
        except RuntimeError:  # said, and over with the next start
            assert self.page.hit(), self._explain()
            assert "Traceback" not in self.node.log(), self._explain()
            self.refused = True
            self.hit = self.page.hit()
            self.page.plant(None)
            self.node.start("--keep", "false", "--disk-admission", "all", "--disk-codec", "raw")
        # What lies on disk is there once the index was read.
        durable = [one for one in self.chains.values() if one.durable]
        if durable:
            until(lambda: all(self._ns.match(one.keys).blocks == BLOCKS for one in durable), 2.0)
        self.partial = self.page.hit() is not None

    def _end(self) -> None:
        self.node.assert_alive()
        self.slots |= self.node.slots()
        self.counts.append(self.page.counts())
        self.hit = self.hit or self.page.hit()
        self.node.kill()
        log = self.node.log()
        assert "Traceback" not in log, self._explain()

    def _work(self, life: int) -> None:
        self._look_at_all()
        for number in range(CHAINS):  # the first of them leave DRAM
            self._store(f"{life}-{number}")
        for number in range(3):
            self._look_at(self.chains[f"{life}-{number}"])
        for number in (3, 4):
            self._delete(self.chains[f"{life}-{number}"])
        self._store(f"{life}-3")  # in its next version
        self._heal(life)
        self._look_at_all()

    def _heal(self, life: int) -> None:
        def durable() -> bool:
            self.tries += 1
            return self._store(f"{life}-heal-{self.tries}")

        assert until(durable, pause_s=0.1), f"it does not heal; {self._explain()}"

    # -- verbs ---------------------------------------------------------------------------------------------------

    @property
    def _ns(self) -> kvclient.Namespace:
        return self.node.namespace(BLOCK_BYTES)

    def _store(self, name: str) -> bool:
        """A store and a read right after it do not depend on the disk. True if it became durable."""
        one, ns = self.chains.setdefault(name, Chain(name)), self._ns
        one.stored = True
        ns.flush(0.0)  # forget what was stored before: the next one speaks of this chain alone
        stored = ns.store(one.keys, values(one.keys, BLOCK_BYTES, one.version), wait=True, space_s=FLUSH_S)
        assert stored.accepted == BLOCKS, (stored, self._explain())
        assert self._found(one) == set(one.keys), f"{name} is not in DRAM; {self._explain()}"
        one.durable = ns.flush(FLUSH_S).durable == BLOCKS
        return one.durable

    def _delete(self, one: Chain) -> None:
        assert self._ns.delete(one.keys[:1]) >= one.durable, self._explain()
        assert not self._found(one), f"{one.name} was deleted; {self._explain()}"
        self.deleted.append(Chain(one.name, one.version))
        one.version, one.durable, one.stored = one.version + 1, False, False

    def _look_at_all(self) -> None:
        for one in self.chains.values():
            self._look_at(one)

    def _look_at(self, one: Chain) -> None:
        """What is durable is there, but for what the failing call was about."""
        found = self._found(one)
        assert one.stored or not found, f"{one.name} was deleted and is back; {self._explain()}"
        if one.durable and len(found) < BLOCKS:
            hit = self.hit or self.page.hit()
            assert hit is not None, f"{one.name} has gone; {self._explain()}"
            if self.partial and not self._gave_way(one):
                return
            if not self._was_hit(one, hit):  # a miss for now at most, unless it gave way where no segment could be made
                assert until(lambda: len(self._found(one)) == BLOCKS or self._gave_way(one), 5.0), (
                    f"{one.name} has gone; {self._explain()}"
                )
            one.durable = False  # counted once

    def _found(self, one: Chain) -> set[bytes]:
        """Every block that is there is what was stored last."""
        blocks = fetch(self._ns, one.keys, FLUSH_S).blocks
        for key, block in zip(one.keys, blocks, strict=False):
            assert np.array_equal(block, value(key, BLOCK_BYTES, one.version)), f"{one.name}; {self._explain()}"
            assert not np.array_equal(block, value(key, BLOCK_BYTES, one.version + 1)), "the control is equal as well"
        return set(one.keys[: len(blocks)])

    def _was_hit(self, one: Chain, hit: Hit) -> bool:
        self.slots |= self.node.slots()
        places = [self.slots[key] for key in one.keys if key in self.slots]
        return any(
            place.path.name == hit.path.name and place.offset < hit.end and hit.offset < place.offset + place.slot_bytes
            for place in places
        )

    def _gave_way(self, one: Chain) -> bool:
        with grpc.insecure_channel(f"unix:{self.node.run}/control.sock") as channel:
            request = control_pb2.ExplainMissRequest(keys=one.keys)
            return bool(control_pb2_grpc.ControlStub(channel).ExplainMiss(request).cause == "evicted")

    def _explain(self) -> str:
        return f"{self.fault}, {self.hit or self.page.hit()}\n{self.node.log()[-3000:]}"


def run(fault: Fault | None, life: int = 0) -> Case:
    """All lives of one case."""
    print("case", life, fault)
    with Node(dram="12MiB", size="192MiB", segment="8MiB") as node, pytest.MonkeyPatch.context() as environment:
        file = node.home / "page"
        environment.setenv(FAILS, str(file))
        case = Case(node, Page(file, node.disks[0]), fault)
        case.run(life)
        return case


def fail_each(cases: Sequence[tuple[int, Fault]], record_property: Recorder) -> None:
    """Each of these faults, once."""
    done = [run(fault, life) for life, fault in cases]
    failed = [case for case in done if case.hit is not None]
    record_property("calls_failed", len(failed))
    record_property("starts_refused", sum(case.refused for case in done))
    # Threads and timers: not each run has as many calls as the one that was counted.
    assert len(failed) >= 0.9 * len(cases), f"{len(failed)} of {len(cases)} calls were reached"


def counted() -> list[dict[str, int]]:
    """How many calls of each kind there are in each life, without a fault."""
    case = run(None)
    assert case.hit is None
    assert all(one.durable for one in case.chains.values() if one.stored), "a sound disk loses nothing"
    print(case.counts)
    return case.counts[:LIVES]


def test_a_call_of_each_kind_fails(record_property: Recorder) -> None:
    fail_each(FAST, record_property)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_call_fails_in_three_ways(part: int, record_property: Recorder) -> None:
    lives = counted()
    record_property("calls_counted", sum(sum(counts.values()) for counts in lives))  # of all parts
    every = [
        (life, Fault(call, nth, number))
        for life, counts in enumerate(lives)
        for call, count in counts.items()
        for nth in range(1 + part, count + 1, PARTS)
        for number in (ERRNOS[:1] if call in LOOKS else ERRNOS)
    ]
    fail_each(every, record_property)
