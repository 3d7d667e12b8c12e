"""A lease: the lead run of a chain, held still while this process reads it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from kvclient import buffers, flows
from kvclient.calls import Part
from kvclient.connection import Connection
from kvclient.copying import Move, copy, moves_of
from kvclient.endpoint import Endpoint
from kvclient.mapping import Place
from kvclient.results import Tiers
from kvproto.errors import ProtocolError, UsageError


class Held:
    """What a lease is, whichever way its copies run. Threads may share one."""

    def __init__(self, endpoint: Endpoint, parts: Sequence[Part], block_bytes: int) -> None:
        self._endpoint = endpoint
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
        self._endpoint.check_fork()
        if self._released:
            raise UsageError("the views of a lease are for use inside its context")
        if self._views is None:
            block_bytes = self._block_bytes
            self._views = tuple(mapping.view[offset : offset + block_bytes] for mapping, offset in self._places())
        return self._views

    def valid(self) -> bool:
        """Whether everything read so far was read in time: not released, and no deadline passed."""
        self._endpoint.check_fork()
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

    def _copying_to(self, targets: object) -> Callable[[], None]:
        """What copies the blocks, for any thread; it keeps alive what it needs. Raises UsageError for unfit targets."""
        memory = buffers.writable(targets, self.blocks, self._block_bytes)
        places = self._places()
        if any(part.cold for part in self._parts):
            return partial(self._copy_cold, memory, places)
        sources = [mapping.address + offset for mapping, offset in places]
        moves = moves_of(memory.addresses, sources, self._block_bytes)
        return partial(_copy, moves, memory, places)

    def _copy_cold(self, memory: buffers.Memory, places: list[Place]) -> None:
        """Copy while the maps are still being populated: block by block, doing what the helper has not got to."""
        populate = self._endpoint.memory.populate
        block_bytes = self._block_bytes
        for target, (mapping, offset) in zip(memory.addresses, places, strict=False):
            if mapping.cold:
                populate(mapping, offset, block_bytes)
            copy([(target, mapping.address + offset, block_bytes)])

    def _places(self) -> list[Place]:
        """Where the blocks lie; nowhere if the daemon named places that do not exist, and then the lease is void."""
        places: list[Place] = []
        for part in self._parts:
            try:
                places += part.places()
            except ProtocolError as error:
                part.deadline_ns = 0
                self._endpoint.distrust(part.session, str(error))
                return []
        return places


class Lease(Held):
    """What `Namespace.fetch` returns: a context manager that releases on the way out."""

    def __init__(self, connection: Connection, parts: Sequence[Part], block_bytes: int) -> None:
        super().__init__(connection, parts, block_bytes)
        self._connection = connection

    def copy_to(self, targets: object) -> bool:
        """Copy the first blocks into `targets`; False if the lease lapsed meanwhile, and then the bytes are no good.

        `targets`: one writable C-contiguous object of exactly `block_bytes` a block (ndarray, CPU tensor, buffer), at
        most `blocks` of them, or one array or tensor whose first dimension is the blocks. Raises UsageError, before
        the first byte moves, for anything else.
        """
        copying = self._copying_to(targets)
        if not self.valid():
            return False
        copying()
        return self.valid()

    def renew(self, ttl_s: float) -> bool:
        """Keep the blocks for `ttl_s` seconds from now; False if they may be gone already, or no answer comes."""
        ttl_ns = flows.nanoseconds("ttl_s", ttl_s, least_ns=1)
        if not self.valid():
            return False
        deadline_ns = time.monotonic_ns() + self._connection.timeout_ns
        return self._connection.run(flows.renew(self._parts, ttl_ns, deadline_ns)) and self.valid()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _copy(moves: list[Move], *_kept_alive: object) -> None:
    copy(moves)
