"""A namespace of a client: the verbs on chains of blocks. `fetch` and `store` are the two flows to read first.

fetch   check the keys -> flows.fetch (LEASE) -> Lease: copy_to, views, release
store   check keys and buffers -> storing.store (RESERVE, copy, COMMIT) -> StoreResult
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvclient import flows, storing
from kvclient.buffers import readable
from kvclient.calls import Part
from kvclient.connection import Connection
from kvclient.lease import Lease
from kvclient.ledger import Ledger
from kvclient.results import FlushResult, Match, StoreResult
from kvproto.errors import UsageError
from kvproto.frames import Role
from kvproto.identity import NamespaceIdentity
from kvproto.ids import BlockKey
from kvproto.keys import block_keys

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from kvclient.protocol import Session

_clock = time.monotonic_ns


class Verbs:
    """The verbs as flows, arguments checked: what the blocking and the asyncio flavour share."""

    def __init__(self, identity: NamespaceIdentity, role: Role, timeout_ns: int) -> None:
        self.identity = identity
        self._role = role
        self._timeout_ns = timeout_ns
        self._target = flows.Target(identity.canonical(), identity.block_bytes)
        self._tally = Ledger()
        self._flushed = FlushResult(0, 0, 0, 0)

    def keys(self, token_ids: "ArrayLike", extra: bytes = b"") -> list[BlockKey]:
        """Keys of the full blocks of a token sequence, each chained over all tokens before it. No daemon needed.

        `extra` is what the bytes depend on besides the namespace and the tokens: a tenant's salt, image digests.
        """
        return block_keys(token_ids, self.identity.block_tokens, extra)

    def _fetching(
        self, session: "Session | None", keys: Sequence[bytes], wait_s: float, ttl_s: float
    ) -> flows.Flow[list[Part]]:
        joined = flows.join_keys(keys)
        wait_ns = flows.nanoseconds("wait_s", wait_s)
        ttl_ns = flows.nanoseconds("ttl_s", ttl_s, least_ns=1)
        return flows.fetch(
            session, _clock, self._target, joined, wait_ns=wait_ns, ttl_ns=ttl_ns, timeout_ns=self._timeout_ns
        )

    def _storing(
        self,
        session: "Session | None",
        keys: Sequence[bytes],
        buffers: object,
        *,
        parent: bytes | None,
        wait: bool,
        space_s: float,
    ) -> flows.Flow[StoreResult]:
        flows.join_keys(keys)
        flows.join_keys(() if parent is None else (parent,))
        source = readable(buffers, len(keys), self.identity.block_bytes)
        space_ns = flows.nanoseconds("space_s", space_s)
        if self._role is not Role.ENGINE:
            raise UsageError("only engines store: connect with role ENGINE")
        return storing.store(
            session, _clock, self._target, self._tally,
            keys=keys, source=source, parent=parent,
            wait=wait, timeout_ns=self._timeout_ns, space_ns=space_ns,
        )  # fmt: skip

    def _flushing(self, timeout_s: float) -> flows.Flow[FlushResult]:
        deadline_ns = _clock() + flows.nanoseconds("timeout_s", timeout_s)
        total = yield from flows.flush(self._tally, deadline_ns)
        before, self._flushed = self._flushed, total
        return FlushResult(
            total.visible - before.visible,
            total.durable - before.durable,
            total.failed - before.failed,
            total.pending,
        )

    def _matching(self, session: "Session | None", keys: Sequence[bytes]) -> flows.Flow[Match]:
        return flows.match(session, self._target, flows.join_keys(keys), _clock() + self._timeout_ns)

    def _deleting(self, session: "Session | None", keys: Sequence[bytes]) -> flows.Flow[int]:
        return flows.delete(session, self._target, flows.join_keys(keys), _clock() + self._timeout_ns)

    def _opening(self, session: "Session | None") -> flows.Flow[object]:
        if session is None:
            return None
        return (yield from flows.open_namespace(session, self._target, _clock() + self._timeout_ns))


class Namespace(Verbs):
    """Made by `Client.namespace`. Any thread. No verb raises because a daemon is missing, none waits past its time.

    Every verb raises UsageError for arguments that no daemon could accept, ForkError and ClosedError where the client
    cannot be used any more.
    """

    def __init__(self, connection: Connection, identity: NamespaceIdentity) -> None:
        super().__init__(identity, connection.hello.role, connection.timeout_ns)
        self._connection = connection

    def fetch(self, keys: Sequence[bytes], wait_s: float = 1.0, ttl_s: float = 5.0) -> Lease:
        """Hold the lead run of this chain for `ttl_s` seconds of reading; a context manager.

        `wait_s`: how long to wait for blocks that this client has stored and that are not visible yet. Takes at most
        `wait_s` and the client's timeout; a daemon that does not answer is a lease of 0 blocks.
        """
        connection = self._connection
        parts = connection.run(self._fetching(connection.session(), keys, wait_s, ttl_s))
        return Lease(connection, parts, self.identity.block_bytes)

    def store(
        self,
        keys: Sequence[bytes],
        buffers: object,
        parent: bytes | None = None,
        wait: bool = False,
        space_s: float = 1.0,
    ) -> StoreResult:
        """Store the blocks of a chain: one object of exactly `block_bytes` bytes a key, or one array of them all.

        `parent`: key of the block before the first, None at the start of a sequence. Returns when the daemon has
        accepted them, with `wait` when they are visible (what is not in time is refused as TIMED_OUT). Waits up to
        `space_s` for room in the ring and up to the client's timeout for answers, each in all; copying comes on top.
        """
        connection = self._connection
        return connection.run(
            self._storing(connection.session(), keys, buffers, parent=parent, wait=wait, space_s=space_s)
        )

    def flush(self, timeout_s: float) -> FlushResult:
        """Wait until every block accepted through this object is visible (and, with a disk tier, durable) or failed."""
        self._connection.check()
        return self._connection.run(self._flushing(timeout_s))

    def match(self, keys: Sequence[bytes]) -> Match:
        """How much of this chain is there, and what loading it would cost. Takes no lease: it may be gone at once."""
        return self._connection.run(self._matching(self._connection.session(), keys))

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget these blocks and all that continue them; how many that were. Leases taken before stay good."""
        return self._connection.run(self._deleting(self._connection.session(), keys))

    def open(self) -> None:
        """Make the namespace known to the daemon, which the first verb does otherwise.

        Raises UsageError if it finds it impossible: a block larger than its arenas.
        """
        self._connection.run(self._opening(self._connection.session()))
