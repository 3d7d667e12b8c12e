"""Deliberate bugs, and the tests that must notice each of them.

A mutant is one small replacement in one file. It is planted in a copy of the tree, never in the tree itself, and the
tests that it names run there; `python -m tests.mutants NAME ...` does that by hand.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.harness import ROOT

SOURCES = ("proto", "kernels", "kvstore", "daemon", "clients")  # imported from the copy, not from where it is installed
COPIED = (*SOURCES, "bench", "tests", "pyproject.toml")
PASSED, FAILED = 0, 1  # exit codes of pytest; another one says that the tests did not run
PATIENCE_S = 900.0  # compiled code is compiled anew where the bug is in it

SIMULATION = "tests/sim/test_sim.py::test_no_seed_breaks_a_promise"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug: `old`, which is there exactly once, becomes `new`."""

    name: str
    path: str
    old: str
    new: str
    breaks: str
    caught_by: tuple[str, ...]  # of the suite; at least one test of these must fail


MUTANTS = (
    # -- index -------------------------------------------------------------------------------------------------------
    Mutant(
        "a-key-without-its-namespace", "kvstore/blocks.py",
        'key[2] == k2 and key[3] == k3 and row["namespace"] == namespace:', "key[2] == k2 and key[3] == k3:",
        "blocks of one namespace are found in another", ("tests/unit/test_blocks.py", SIMULATION),
    ),
    Mutant(
        "a-chunk-of-the-index-believed", "kvstore/tier/format.py",
        "    if _SUM.unpack_from(value, len(records)) != (xxhash.xxh3_64_intdigest(records),):\n", "    if False:\n",
        "a damaged index is taken for the truth", ("tests/unit/test_format.py",),
    ),
    Mutant(
        "an-index-behind-its-time-believed", "daemon/kvstored/index_marks.py",
        '        raise DamagedError("the last sequence has another magic")\n    return int(sequence)',
        '        raise DamagedError("the last sequence has another magic")\n    return 0',
        "the commit before the last is taken for the last", ("tests/fault/test_index_damage.py",),
    ),
    Mutant(
        "names-of-another-store", "kvstore/tier/commits.py",
        "        self._next_name = max(self._next_name, number + 1)\n", "",
        "one number in the index stands for two namespaces", ("tests/unit/test_disk.py", SIMULATION),
    ),
    # -- leases --------------------------------------------------------------------------------------------------------
    Mutant(
        "a-lapsed-lease-renewed", "kvstore/leasing.py",
        "        if lease is None or lease.deadline_ns < now_ns:\n", "        if lease is None:\n",
        "a client goes on reading what may be another block by now", ("tests/unit/test_leases.py", SIMULATION),
    ),
    Mutant(
        "a-lease-that-ends-early", "kvstore/leasing.py",
        "in self.expiring.due(now_ns, DUE_A_TICK):", "in self.expiring.due(now_ns + 10**9, DUE_A_TICK):",
        "slots are used again while they are being read", ("tests/unit/test_leases.py",),
    ),
    Mutant(
        "a-deleted-block-held-by-renewing", "kvstore/leasing.py",
        "lease.deadline_ns and not dropped.any():", "lease.deadline_ns:",
        "memory that was given up is kept for as long as a client likes",
        ("tests/unit/test_leases.py", "tests/unit/test_promises.py", SIMULATION),
    ),
    Mutant(
        "a-lease-that-holds-nothing", "kvstore/blocks.py",
        '_hold(t, np.int64(run[i]))\n            row["lease_until_ns"] = max(row["lease_until_ns"], until)\n',
        'row["lease_until_ns"] = max(row["lease_until_ns"], until)\n',
        "leased blocks are evicted", ("tests/unit/test_leases.py",),
    ),
    # -- slots, arenas and spans that are used again -------------------------------------------------------------------
    Mutant(
        "a-ticket-used-twice", "kvstore/reserving.py",
        "        if ticket is None or ticket.state is TicketState.COPYING:\n", "        if ticket is None:\n",
        "a span is copied while it is another block's", ("tests/unit/test_store.py",),
    ),
    Mutant(
        "a-lapsed-ticket-published", "kvstore/reserving.py",
        "            if ticket.state is TicketState.LAPSED:\n", "            if False:\n",
        "a late writer's bytes land in a slot that is another's", ("tests/unit/test_store.py",),
    ),
    Mutant(
        "a-dead-writer-published", "kvstore/reserving.py",
        "            self._discard(session.tenant, ticket.block)  # whoever wrote it is gone\n", "            pass\n",
        "blocks of a client that died in the middle become visible", ("tests/unit/test_store.py",),
    ),
    Mutant(
        "spans-that-overlap", "kvstore/ring.py",
        "            self._starts[i] += fits * span_pages\n",
        "            self._starts[i] += fits * span_pages - (fits > 1)\n",
        "two blocks of one ring are written over each other", ("tests/unit/test_ring.py",),
    ),
    Mutant(
        "an-arena-handed-on-unpunched", "kvstore/arenas.py",
        "elif pool.tenant is wanted_by.tenant and not self._written_to:\n", "elif not self._written_to:\n",
        "one tenant's bytes lie in another tenant's maps", ("tests/unit/test_arenas.py",),
    ),
    Mutant(
        "a-slot-free-before-its-writer-is-gone", "kvstore/reserving.py",
        "            if ticket.session.owner is None:\n", "            if True:\n",
        "a client in mode direct writes into a slot that is another's", ("tests/unit/test_writers.py",),
    ),
    # -- checksums -----------------------------------------------------------------------------------------------------
    Mutant(
        "a-block-read-unchecked", "daemon/kvstored/drive_work.py",
        "    if xxhash.xxh3_64_intdigest(payload[:block_bytes]) != order.checksum:\n",
        "    if False:\n", "flipped bits on disk are served", ("tests/unit/test_drive.py",),
    ),
    Mutant(
        "a-block-in-anothers-place", "daemon/kvstored/drive_work.py",
        "    return header if found == wanted else", "    return header if found[4:] == wanted[4:] else",
        "a write that went astray is served", ("tests/unit/test_drive.py",),
    ),
    Mutant(
        "a-packed-block-unchecked", "daemon/kvstored/drive_work.py",
        "    if xxhash.xxh3_64_intdigest(stored.data) != header.stored_checksum:\n", "    if False:\n",
        "a damaged packed block reaches the codec", ("tests/unit/test_drive.py",),
    ),
    Mutant(
        "kept-memory-unchecked", "daemon/kvstored/leaf.py",
        "                good = xxhash.xxh3_64_intdigest(one.content) == one.order.checksum",
        "                good = bool(xxhash.xxh3_64_intdigest(one.content))",
        "what changed while no daemon ran is served", ("tests/integration/test_warm_restart.py",),
    ),
    # -- recovery ------------------------------------------------------------------------------------------------------
    Mutant(
        "a-torn-row-believed", "kvstore/blocks.py",
        '        good = good and row["seal"] == seal_of(t, block)\n', "",
        "a row that was half written is served after a restart", ("tests/unit/test_restart.py",),
    ),
    Mutant(
        "slots-not-withheld", "kvstore/restart.py",
        "                if blocks.withhold(self._tables, row, pool_of, slots_of, shift):\n                    chain",
        "                if False:\n                    chain",
        "what clients of a former life read is written over", ("tests/unit/test_restart.py", SIMULATION),
    ),
    Mutant(
        "orphans-kept", "kvstore/restart.py",
        '        tables.blocks["parent"][gone] = 0\n        tables.blocks["writer"][gone] = blocks.BROKEN\n', "",
        "blocks are served whose beginning is another chain's", ("tests/unit/test_restart.py", SIMULATION),
    ),
    Mutant(
        "durable-though-the-sync-failed", "kvstore/tier/commits.py",
        "        if order.failed:\n            covered = ", "        if False:\n            covered = ",
        "a flush promises what a loss of power takes", ("tests/unit/test_disk_syncs.py", SIMULATION),
    ),
    Mutant(
        "what-a-failed-sync-may-have-lost", "kvstore/tier/disk.py",
        "            if order.doubted:\n", "            if False:\n",
        "a write that was not heard of yet is called durable by the next sync", ("tests/unit/test_disk_syncs.py",),
    ),
    Mutant(
        "deleted-before-it-is-erased", "kvstore/tier/erasure.py",
        "        if mine:\n            self._waiters", "        if False:\n            self._waiters",
        "what was deleted comes back with a rebuilt index", ("tests/unit/test_disk.py",),
    ),
    Mutant(
        "a-place-that-the-index-still-knows", "kvstore/tier/commits.py",
        "        self._erased.append((disk, ", "        self._free(disk)\n        _ = ((disk, ",
        "what nobody knows of outlives a delete, and comes back with a rebuilt index", ("tests/unit/test_disk.py",),
    ),
    Mutant(
        "durable-gives-way-to-begun", "kvstore/blocks.py",
        " or t.blocks[block][\"state\"] == WRITING)\n", ")\n",
        "a start drops what is durable for what somebody has only begun to store", ("tests/unit/test_disk.py",),
    ),
    Mutant(
        "durable-gives-way-to-new", "kvstore/tier/disk.py",
        "int(tables.book[blocks.GENERATION])  # of this life\n", "1 << 62\n",
        "a start drops what is durable for what was stored meanwhile and is not", ("tests/unit/test_disk.py",),
    ),
    Mutant(
        "evicted-and-not-erased", "kvstore/blocks.py",
        "    if row[\"state\"] == DISK:\n        _part(t, block)\n        give_to_erase(t, block)\n", "",
        "the same, of a place whose block gave way", ("tests/unit/test_disk.py",),
    ),
    Mutant(
        "a-damaged-place-used-again", "kvstore/tier/loading.py",
        "                self._erasure.quarantined.add(place)\n", "                pass\n",
        "blocks are written where the drive has lost one", ("tests/unit/test_disk.py",),
    ),
    # -- remote tier ---------------------------------------------------------------------------------------------------
    Mutant(
        "what-changed-while-it-was-copied", "kvstore/reserving.py",
        "        elif ticket.checksum not in {None, checksum}:\n", "        elif False:\n",
        "an engine that writes late has other bytes served", ("tests/unit/test_remote.py",),
    ),
    Mutant(
        "a-cut-object-counts", "kvstore/tier/remote_index.py",
        "if block_bytes is None or fits(name, object_bytes, block_bytes):", "if True:",
        "what was cut short over there is taken for being there", ("tests/unit/test_remote_looking.py",),
    ),
    Mutant(
        "moved-without-a-look", "clients/kvctl/move.py",
        "(min(moved.blocks, told.looked), told.there)", "(min(moved.blocks, told.there), told.there)",
        "the only copy leaves this host while the one over there is damaged", ("tests/integration/test_kvctl_move.py",),
    ),
    Mutant(
        "no-second-chance-over-there", "daemon/kvstored/remote_keeping.py",
        "if chances and holdings.uses.take(", "if not chances and holdings.uses.take(",
        "what is used all the time leaves the remote tier first", ("tests/unit/test_remote_clock.py",),
    ),
    # -- quotas --------------------------------------------------------------------------------------------------------
    Mutant(
        "a-flood-of-tickets", "kvstore/reserving.py",
        "        session.tenant.in_flight += granted.size\n", "        session.tenant.in_flight += 0\n",
        "one tenant has as much on its way as it likes", ("tests/unit/test_quotas.py",),
    ),
)  # fmt: skip


class LostPlaceError(Exception):
    """What a mutant replaces is not there, or more than once: the source has changed, and the mutant must follow."""


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The file as the mutant has it. Raises LostPlaceError."""
    source = (root / mutant.path).read_text()
    found = source.count(mutant.old)
    if found != 1:
        raise LostPlaceError(f"{mutant.name}: {found} times in {mutant.path}: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


class Copy:
    """The tree once more, in a directory of its own: a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvm-", dir="/var/tmp")
        self.root = Path(self._folder.name)
        for name in COPIED:  # with compiled code and times, so that nothing is compiled but what changes
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=shutil.ignore_patterns("*.egg-info"))
            else:
                shutil.copy2(source, self.root / name)

    def plant(self, mutant: Mutant) -> None:
        """Have this bug here. Raises LostPlaceError."""
        (self.root / mutant.path).write_text(mutated(mutant, self.root))

    def heal(self, mutant: Mutant) -> None:
        """As it was."""
        shutil.copy2(ROOT / mutant.path, self.root / mutant.path)

    def run(self, *tests: str) -> "subprocess.CompletedProcess[str]":
        """Tests of this copy, until the first one fails. Raises subprocess.TimeoutExpired."""
        return self._python("-m", "pytest", "-x", "--no-header", "-m", "not long and not engines and not skew", *tests)

    def where(self) -> str:
        """Where tests of this copy import the store from, and the daemon."""
        script = "import kvstore, kvstored; print(kvstore.__file__, kvstored.__file__)"
        return self._python("-c", script).stdout

    def _python(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        path = os.pathsep.join(map(str, (*(self.root / name for name in SOURCES), self.root)))
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
            text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def verdict_of(copy: Copy, mutant: Mutant) -> str:
    """Empty if a test notices the bug, else what happened instead."""
    copy.plant(mutant)
    try:
        done = copy.run(*mutant.caught_by)
    finally:
        copy.heal(mutant)
    if done.returncode == FAILED:
        return ""
    how = "no test notices it" if done.returncode == PASSED else f"pytest ended with {done.returncode}"
    return f"{mutant.name}: {how}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def main() -> int:
    """Plant mutants one after the other, and say which are not noticed."""
    verdicts = []
    with Copy() as copy:
        for mutant in MUTANTS:
            if not sys.argv[1:] or mutant.name in sys.argv[1:]:
                verdicts.append(verdict_of(copy, mutant))
                print(verdicts[-1] or f"{mutant.name}: caught", flush=True)
    return int(any(verdicts))


if __name__ == "__main__":
    sys.exit(main())
