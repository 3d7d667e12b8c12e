"""Out of an archive into a store, as any client stores: quotas hold, what is there already stays as it is.

A block is offered after its checksum was compared, in runs of chains. So an import that was ended begins anew and
passes over what is there.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from kvclient import Client, Namespace
from kvclient.results import Reason
from kvctl.archive_export import connected, namespace_of
from kvctl.archive_room import Pool
from kvctl.client import Exit, KvctlError
from kvproto.archive import Block, Damage, Done, Events, Name
from kvproto.frames import Role
from kvproto.limits import MIB, slot_bytes_for

RUN_BLOCKS: Final = 256
RUN_BYTES: Final = 32 * MIB
SPACE_S: Final = 10.0  # for room in the ring
TRIES: Final = 5  # where the store was busy
FLUSH_BYTES: Final = 256 * MIB  # made durable at a time, where there is a disk
FLUSH_S: Final = 60.0
DAMAGES_NAMED: Final = 20
_AGAIN: Final = (Reason.BUSY, Reason.TIMED_OUT, Reason.STALE, Reason.PENDING, Reason.UNREACHABLE)

Progress = Callable[[int, int], None]
Gate = Callable[[Counter[Pool], Pool, int], None]  # what was stored, and so many more: raises KvctlError to end it


@dataclass(slots=True)
class Imported:
    """What came of it, for people and programs."""

    namespaces: int = 0
    blocks: int = 0  # whole, in the archive
    bytes: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0
    known_blocks: int = 0  # were there already
    refused_blocks: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # blocks, by why they were refused
    durable_blocks: int = 0
    damaged: int = 0  # places in the archive that were passed over
    damages: list[str] = field(default_factory=list)  # the first of them
    whole: bool = False  # the archive had its end, and nothing was damaged


class Importer:
    """Takes what a `Reader` gives. A context manager; `dry_run` verifies the archive and stores nothing."""

    def __init__(
        self, runtime_dir: Path | None, tenant: str | None, progress: Progress, gate: Gate | None, *, durable: bool
    ) -> None:
        """`runtime_dir`: None to store nothing. `tenant`: whose blocks they become; None: as the archive says. `gate`:
        who is asked before anything is stored; None: nobody.
        """
        self.done = Imported()
        self.taken = Counter[Pool]()  # blocks that are new, or (on a dry run) could be
        self._runtime_dir = runtime_dir
        self._tenant = tenant
        self._progress = progress
        self._gate = gate
        self._durable = durable
        self._pool: Pool = ("", 0)
        self._block_bytes = 0
        self._clients: dict[str, Client] = {}
        self._stack = ExitStack()
        self._namespace: Namespace | None = None
        self._run: list[Block] = []
        self._unflushed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, events: Iterable[Events]) -> Imported:
        """All of an archive. Raises KvctlError where the store does not let us go on."""
        for event in events:
            match event:
                case Name():
                    self._begin(event)
                case Block():
                    self._add(event)
                case Damage():
                    self._passed_over(event)
                case Done():
                    self._offer()
                    self._flush()
                    self.done.whole = event.whole
                    self.done.blocks, self.done.bytes = event.totals.blocks, event.totals.bytes
        return self.done

    def _begin(self, name: Name) -> None:
        self._offer()
        self._flush()
        self.done.namespaces += 1
        tenant = name.tenant if self._tenant is None else self._tenant
        self._block_bytes = name.identity.block_bytes
        self._pool = (tenant, slot_bytes_for(self._block_bytes))
        if self._gate is not None:
            self._gate(self.taken, self._pool, name.planned_blocks)
        if self._runtime_dir is None:
            return
        if tenant not in self._clients:
            client = connected(self._runtime_dir, tenant, Role.ENGINE, "kvctl import")
            self._clients[tenant] = self._stack.enter_context(client)
        self._namespace = namespace_of(self._clients[tenant], name.identity)

    def _add(self, block: Block) -> None:
        run = self._run
        full = len(run) >= RUN_BLOCKS or (len(run) + 1) * self._block_bytes > RUN_BYTES
        if run and (full or block.parent != run[-1].key):
            self._offer()
        self._run.append(block)

    def _offer(self) -> None:
        """Store the run; once more what the store was too busy for."""
        run, self._run = self._run, []
        self.done.blocks += len(run)
        self.done.bytes += len(run) * self._block_bytes
        if run and self._namespace is not None:
            if self._gate is not None:
                self._gate(self.taken, self._pool, len(run))
            self._store(self._namespace, run)
        elif run:
            self.taken[self._pool] += len(run)
        self._progress(self.done.blocks, self.done.bytes)

    def _store(self, namespace: Namespace, run: list[Block]) -> None:
        whole, stored, reasons = len(run), 0, Counter[str]()
        for _ in range(TRIES):
            keys, bodies = [block.key for block in run], [block.body for block in run]
            result = namespace.store(keys, bodies, parent=run[0].parent, wait=True, space_s=SPACE_S)
            stored += result.accepted
            reasons = Counter(one.reason.value for one in result.refused)
            if Reason.DRAINING.value in reasons:
                raise KvctlError(Exit.REFUSED, "the daemon takes no new blocks; kvctl undrain ends that")
            if not result.refused or result.refused[0].reason not in _AGAIN:
                break
            run = run[result.lead :]  # of these, what was accepted is then known
        self.taken[self._pool] += stored
        self.done.stored_blocks += stored
        self.done.stored_bytes += stored * namespace.identity.block_bytes
        self.done.known_blocks += whole - stored - reasons.total()
        self.done.refused_blocks += reasons.total()
        self.done.reasons.update(reasons)
        self._unflushed += stored * namespace.identity.block_bytes
        if self._unflushed >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._durable and self._namespace is not None and self._unflushed:
            self.done.durable_blocks += self._namespace.flush(FLUSH_S).durable
        self._unflushed = 0

    def _passed_over(self, damage: Damage) -> None:
        self._offer()
        self.done.damaged += 1
        if len(self.done.damages) < DAMAGES_NAMED:
            whose = f", key {damage.key.hex()[:16]}" if damage.key else ""
            self.done.damages.append(f"at byte {damage.at:,}{whose}: {damage.why}")
