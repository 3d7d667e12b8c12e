"""A lease: the lead run of a chain, held still while this process reads it."""

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvclient import buffers, flows
from kvclient.calls import Part
from kvclient.connection import Connection
from kvclient.copying import Move, copy, moves_of
from kvclient.results import Tiers
from kvproto.errors import UsageError


class Held:
    """What a lease is, whichever way its copies run. Threads may share one."""

    def __init__(self, parts: Sequence[Part], block_bytes: int) -> None:
        self._parts = parts
        self._block_bytes = block_bytes
        self._views: tuple[memoryview, ...] | None = None
        self._released = False
        self.blocks = sum([part.blocks for part in parts])  # length of the lead run; 0 for a miss

    @property
    def tiers(self) -> Tiers:
        """Which tiers the blocks are read from."""
        return Tiers(dram=self.blocks)

    @property
    def deadline_ns(self) -> int:
        """When the daemon may take the first of the blocks away, in nanoseconds of CLOCK_MONOTONIC.

        0 where there is nothing to take away: for a miss, and after `release`.
        """
        return min((part.deadline_ns for part in self._parts), default=0)

    @property
    def views(self) -> tuple[memoryview, ...]:
        """Read-only and zero-copy, one a block, for use inside the context.

        After the last use ask `valid()`: past the deadline the bytes may be another block's. A view that outlives
        the context, or an array made from one, is safe to touch for as long as it is kept, but what it shows is
        no longer promised. Raises UsageError outside the context.
        """
        self._check()
        if self._released:
            raise UsageError("the views of a lease are for use inside its context")
        if self._views is None:
            block_bytes = self._block_bytes
            self._views = tuple(
                part.arenas[arena].view[slot * part.slot_bytes : slot * part.slot_bytes + block_bytes]
                for part in self._parts
                for arena, slot in zip(part.places[::2], part.places[1::2], strict=True)
            )
        return self._views

    def valid(self) -> bool:
        """Whether everything read so far was read in time: not released, and no deadline passed."""
        self._check()
        now_ns = time.monotonic_ns()
        return not self._released and all(now_ns < part.deadline_ns for part in self._parts)

    def release(self) -> None:
        """Give the blocks back, with the next frame that this client sends. Any number of times."""
        if self._released:
            return
        self._released = True
        parts, self._parts = self._parts, ()
        for part in parts:
            part.session.releases.append(part.lease)
        for view in self._views or ():
            with contextlib.suppress(BufferError):  # the caller made something from it, which keeps the map
                view.release()
        self._views = None

    def _check(self) -> None:
        """Raises ForkError where the maps behind this do not exist."""
        raise NotImplementedError

    def _moves_to(self, targets: object) -> tuple[list[Move], object]:
        """The moves, and what must stay alive until they are made. Raises UsageError for unfit targets."""
        parts = self._parts
        memory = buffers.writable(targets, self.blocks, self._block_bytes)
        sources: list[int] = []
        for part in parts:
            bases = {arena: mapping.address for arena, mapping in part.arenas.items()}
            slot_bytes = part.slot_bytes
            places = iter(part.places)
            sources += [bases[arena] + slot * slot_bytes for arena, slot in zip(places, places, strict=True)]
        return moves_of(memory.addresses, sources, self._block_bytes), (parts, memory.owners)


class Lease(Held):
    """What `Namespace.fetch` returns: a context manager that releases on the way out."""

    def __init__(self, connection: Connection, parts: Sequence[Part], block_bytes: int) -> None:
        super().__init__(parts, block_bytes)
        self._connection = connection

    def copy_to(self, targets: object) -> bool:
        """Copy the first blocks into `targets`; False if the lease lapsed meanwhile, and then the bytes are no good.

        `targets`: one writable C-contiguous object of exactly `block_bytes` a block (ndarray, CPU tensor, buffer), at
        most `blocks` of them, or one array or tensor whose first dimension is the blocks. Raises UsageError, before
        the first byte moves, for anything else.
        """
        moves, owners = self._moves_to(targets)
        if not self.valid():
            return False
        copy(moves)
        del owners  # the maps and the targets were needed until here
        return self.valid()

    def renew(self, ttl_s: float) -> bool:
        """Keep the blocks for `ttl_s` seconds from now; False if they may be gone already, or no answer comes."""
        ttl_ns = flows.nanoseconds("ttl_s", ttl_s, least_ns=1)
        if not self.valid():
            return False
        deadline_ns = time.monotonic_ns() + self._connection.timeout_ns
        return self._connection.run(flows.renew(self._parts, ttl_ns, deadline_ns)) and self.valid()

    def _check(self) -> None:
        self._connection.check_fork()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
