"""DELETE, clear, and arenas that change hands: what the store forgets because somebody says so. Owner thread.

The top of what is dropped is cut off index and tree at once, so that none of it hits again; what hangs below follows in
slices (`sweeps.py`). The answer comes when nothing is left, on disk neither (`tier/erasure.py`), and pins that covered
some of it have been cut short: otherwise a successor would look for them in vain.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from kvproto.limits import NAMESPACES
from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import U8, Tables
from kvstore.ports import Clock
from kvstore.quotas import Shares
from kvstore.registry import Registry
from kvstore.report import ClearReport, ClearScope
from kvstore.room import Room, make_room
from kvstore.sessions import Namespace, Pool, Tenant
from kvstore.sweeps import Clear, Count, Done, Sweep, Sweeper
from kvstore.tier.disk import Disk


class Dropping:
    """What is dropped by name; `Sweeper` does it."""

    def __init__(
        self, tables: Tables, clock: Clock, registry: Registry, arenas: Arenas, sweeper: Sweeper, disk: Disk,
        shares: Shares,
    ) -> None:  # fmt: skip
        """`shares`: of DRAM."""
        self._shares = shares
        self._tables = tables
        self._clock = clock
        self._registry = registry
        self._arenas = arenas
        self._sweeper = sweeper
        self._jobs = sweeper.jobs
        self._disk = disk
        self.pinned_arena: Callable[[Pool], int | None] = lambda _pool: None  # `PinnedArenas.one_for`
        self.when_cut: Callable[[Tenant | None, Callable[[], None]], None] = lambda _tenant, act: act()  # `Pinning`
        self.has_far_side: Callable[[], bool] = lambda: False  # `Remote.on`

    # -- blocks that a client names ------------------------------------------------------------------------------

    def delete(self, namespace: Namespace, keys: U8, at: int, count: int, done: Done) -> None:
        """Forget blocks and all that continues them. They never hit again; `done(blocks)` when nothing is left.

        While the index on disk is still being read, that is when it has been: what it knows of them goes too.
        """
        tenant, answer = namespace.tenant, done
        if self._disk.opening:
            copied = keys[at : at + 4 * count].copy()

            def answer(dropped: int) -> None:
                def again() -> None:
                    self.delete(namespace, copied, 0, count, lambda more: done(dropped + more))

                if not self._disk.when_serving(again):
                    again()
        else:
            self._disk.closed.give_up(tenant.name)

        tops = []
        for i in range(count):
            block = blocks.find_one(self._tables, tenant.index, namespace.number, keys, at + 4 * i)
            if block:
                blocks.begin_sweep(self._tables, tenant.index, block)
                tops.append(block)

        def swept(dropped: int) -> None:
            self._when_gone(tenant, lambda: answer(dropped))

        self._sweeper.begin(Sweep(self._tables, tenant, tops, swept))

    def _when_gone(self, tenant: Tenant | None, answer: Callable[[], None]) -> None:
        """Answer when nothing is left of what was dropped: in the tables, on disk, and in what is written of pins."""
        erased = partial(self._disk.when_erased, partial(self.when_cut, tenant, answer), tenant)
        self._jobs.when_swept(tenant, erased)

    # -- whatever an operator names ------------------------------------------------------------------------------

    def clear(self, scope: ClearScope, done: Callable[[ClearReport], None], *, dry_run: bool) -> None:
        """Drop or only count what a scope names; `done` hears what there was. Raises KeyError for names that nobody
        knows and of which nothing can lie where nobody looks.
        """
        if self._disk.opening and not dry_run:
            self._disk.when_serving(lambda: self._clear_late(scope, done))
            return
        try:
            chosen = self._chosen(scope)
        except KeyError:
            if not self._may_lie_unseen(scope):
                raise
            self._clear_unseen(scope, done, dry_run=dry_run)
            return
        if not dry_run:
            self._disk.closed.give_up(scope.tenant)
        wanted = np.zeros(NAMESPACES, dtype=np.uint32)
        wanted[[namespace.number for namespace in chosen]] = 1

        def drop(counted: int, counted_bytes: int, leased: int, pending: int) -> None:
            report = ClearReport(counted, counted_bytes, leased, pending, dry_run)

            def answer(_dropped: int = 0) -> None:
                self._when_gone(None, lambda: done(report))

            if dry_run:
                done(report)
            elif scope.keys:
                self._drop_tops(chosen, scope.keys, answer)
            else:
                self._jobs.queue(Clear(self._tables, self._arenas, wanted, answer))

        tops = (row for namespace in chosen for row in self._rows(namespace, scope.keys))
        self._sweeper.begin(Count(self._tables, self._arenas, wanted, tops if scope.keys else None, drop))

    def _clear_late(self, scope: ClearScope, done: Callable[[ClearReport], None]) -> None:
        try:
            self.clear(scope, done, dry_run=False)
        except KeyError:  # nobody knows of it, neither here nor on disk, as far as keys open it
            self._clear_unseen(scope, done, dry_run=False)

    def _may_lie_unseen(self, scope: ClearScope) -> bool:
        """May there be something of what nobody knows here: on disk, or beyond this host, where keys mean nothing
        without the namespace?
        """
        if self.has_far_side():
            return not scope.keys
        return scope.digest is None and (self._disk.opening or self._disk.closed.may_have(scope.tenant))

    def _clear_unseen(self, scope: ClearScope, done: Callable[[ClearReport], None], *, dry_run: bool) -> None:
        report = ClearReport(0, 0, 0, 0, dry_run)
        if dry_run:
            done(report)
            return
        if scope.digest is None:  # else all that is hidden of everybody, or of a tenant, would go for a typing error
            self._disk.closed.give_up(scope.tenant)
        self._when_gone(None, lambda: done(report))

    def _chosen(self, scope: ClearScope) -> list[Namespace]:
        if scope.tenant is not None and scope.tenant not in self._registry.tenants:
            raise KeyError(f"no tenant is called {scope.tenant}")
        chosen = [
            namespace
            for (tenant, digest), namespace in self._registry.namespaces.items()
            if scope.tenant in (None, tenant.name) and scope.digest in (None, digest)
        ]
        if scope.digest is not None and not chosen:
            raise KeyError(f"no namespace {scope.digest.hex()}")
        return chosen

    def _rows(self, namespace: Namespace, keys: Sequence[bytes]) -> Iterator[int]:
        """Rows of those keys that are there when their turn comes: a row that was found earlier may be another's."""
        for key in dict.fromkeys(keys):
            words = np.frombuffer(key, dtype=np.uint64).copy()  # read-only arrays would be compiled for apart
            row = blocks.find_one(self._tables, namespace.tenant.index, namespace.number, words, 0)
            if row:
                yield row

    def _drop_tops(self, chosen: list[Namespace], keys: Sequence[bytes], done: Done) -> None:
        if not chosen:
            done(0)
        for namespace in chosen:
            tops = []
            for row in self._rows(namespace, keys):
                blocks.begin_sweep(self._tables, namespace.tenant.index, row)
                tops.append(row)
            self._jobs.queue(Sweep(self._tables, namespace.tenant, tops, done if namespace is chosen[-1] else None))

    # -- arenas --------------------------------------------------------------------------------------------------

    def make_room(self, pool: Pool, exhausted: bool) -> Room:
        """What a pool without a free slot is to do (`room.py`); an arena that must give way begins to be drained.

        `exhausted`: nothing in the pool can be evicted.
        """
        now_ns = self._clock.now_ns()
        room, position = make_room(self._arenas, self._tables, self._shares, pool, now_ns, exhausted=exhausted)
        if room in {Room.FULL, Room.QUOTA}:
            given_up = self._arenas.lost_to_writers(pool.tenant)
            given_up = self.pinned_arena(pool) if given_up is None else given_up
            if given_up is not None:
                room, position = Room.RECYCLE, given_up
        if room not in {Room.RECYCLE, Room.RETURN}:
            return room
        if room is Room.RETURN:  # it may hold what the caller has in hand, so it is drained later
            self._arenas.drain(position, None)
            left = not exhausted and blocks.next_victim(self._tables, pool.number)
            return Room.EVICT if left else Room.BUSY
        self._arenas.drain(position, pool)
        others = self._jobs.queued  # may take away what the caller has in hand
        self._sweeper.work()
        return Room.MADE if not others and int(self._tables.pools[pool.number]["open"]) else Room.BUSY
