"""A namespace of a client: the verbs on chains of blocks. `fetch` and `store` are the two flows to read first.

fetch   check the keys -> flows.fetch (LEASE) -> Lease: copy_to, views, release
store   check keys and buffers -> storing.store (RESERVE, copy, COMMIT) -> StoreResult
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kvclient import flows, storing
from kvclient.buffers import readable
from kvclient.connection import Connection
from kvclient.endpoint import Endpoint
from kvclient.lease import Lease
from kvclient.policy import PolicyVerbs, Prefetch
from kvclient.results import Advice, Deleted, FlushResult, LoadResult, Match, PinInfo, PinResult, StoreResult
from kvclient.stream import Part
from kvproto.errors import UsageError
from kvproto.frames import RECOMPUTE_US_MAX, Role
from kvproto.identity import NamespaceIdentity
from kvproto.ids import BlockKey
from kvproto.keys import block_keys
from kvproto.limits import NAMESPACES_PER_MATCH
from kvproto.retention import Retention

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from kvclient.attached import AttachedPages
    from kvclient.codecs import Codec
    from kvclient.moving import Loading
    from kvclient.protocol import Session

_clock = time.monotonic_ns


class Verbs(PolicyVerbs):
    """The verbs as flows, arguments checked: what the blocking and the asyncio flavour share."""

    def __init__(self, endpoint: Endpoint, identity: NamespaceIdentity, codec: "Codec | None" = None) -> None:
        super().__init__(endpoint, identity)
        self.codec = codec  # with which blocks are encoded on the way; None: they go as they are
        if codec is not None:
            self.block_bytes = codec.plain_bytes
        self._role = endpoint.hello.role
        self._seen = self._failed = 0  # of the tickets of `_tally`, what the last flush has told

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
        recompute_s: float | None,
        stream: object = None,
    ) -> flows.Flow[StoreResult]:
        flows.join_keys(keys)
        flows.join_keys(() if parent is None else (parent,))
        source = readable(buffers, len(keys), self.block_bytes, stream)
        if self.codec is not None and source.device is not None:
            from kvclient.codecs_device import check_fits  # noqa: PLC0415  an engine on CPU never needs it

            check_fits(self.codec)
        space_ns = flows.nanoseconds("space_s", space_s)
        recompute_us = 0 if recompute_s is None else max(1, flows.nanoseconds("recompute_s", recompute_s) // 1000)
        if self._role is not Role.ENGINE:
            raise UsageError("only engines store: connect with role ENGINE")
        return storing.store(
            session, _clock, self._target, self._tally,
            keys=keys, source=source, parent=parent,
            wait=wait, timeout_ns=self._timeout_ns, space_ns=space_ns,
            recompute_us=min(recompute_us, RECOMPUTE_US_MAX), codec=self.codec,
        )  # fmt: skip

    def _flushing(self, session: "Session | None", timeout_s: float) -> flows.Flow[FlushResult]:
        until_ns = _clock() + flows.nanoseconds("timeout_s", timeout_s)
        total = yield from flows.flush(
            session, _clock, self._target, self._tally,
            seen=self._seen, until_ns=until_ns, timeout_ns=self._timeout_ns,
        )  # fmt: skip
        seen, self._seen = self._seen, total.visible
        failed, self._failed = self._failed, total.failed
        disk = total.disk
        return FlushResult(
            visible=total.visible - seen,
            durable=disk.durable,
            failed=total.failed - failed + disk.failed,
            pending=total.out + disk.pending,
            evicted=disk.evicted,
        )

    def target_for(self, endpoint: Endpoint) -> flows.Target:
        """As flows of a client need it. Raises UsageError in the hands of another client."""
        if endpoint is not self._endpoint:
            raise UsageError("a client can only ask about namespaces of its own")
        return self._target

    def _matching(self, session: "Session | None", keys: Sequence[bytes]) -> flows.Flow[Match]:
        return flows.match(session, self._target, flows.join_keys(keys), _clock() + self._timeout_ns)

    def _deleting(self, session: "Session | None", keys: Sequence[bytes]) -> flows.Flow[Deleted]:
        return flows.delete(session, _clock, self._target, flows.join_keys(keys), self._timeout_ns)

    def _opening(self, session: "Session | None") -> flows.Flow[object]:
        if session is None:
            return None
        return (yield from flows.open_namespace(session, self._target, _clock() + self._timeout_ns))


def matching(endpoint: Endpoint, namespaces: Sequence[Verbs], keys: Sequence[bytes]) -> flows.Flow[Match]:
    """`Client.match` as a flow, arguments checked."""
    joined = flows.join_keys(keys)
    if not isinstance(namespaces, Sequence) or not all(isinstance(namespace, Verbs) for namespace in namespaces):
        raise UsageError(f"namespaces must be a sequence of namespaces, not {namespaces!r:.200}")
    if not 1 <= len(namespaces) <= NAMESPACES_PER_MATCH:
        raise UsageError(f"a chain is looked up in 1 to {NAMESPACES_PER_MATCH} namespaces, not {len(namespaces)}")
    targets = [namespace.target_for(endpoint) for namespace in namespaces]
    return flows.match_all(endpoint.session(), targets, joined, _clock() + endpoint.timeout_ns)


class Namespace(Verbs):
    """Made by `Client.namespace`. Any thread. No verb raises because a daemon is missing, none waits past its time.

    Every verb raises UsageError for arguments that no daemon could accept, ForkError and ClosedError where the client
    cannot be used any more.
    """

    def __init__(self, connection: Connection, identity: NamespaceIdentity, codec: "Codec | None" = None) -> None:
        super().__init__(connection, identity, codec)
        self._connection = connection

    def encoded_by(self, codec: "Codec") -> "Namespace":
        """The same namespace, named by a codec's text, for blocks as they are before that codec encodes them.

        Raises UsageError unless it is the one that the identity names.
        """
        if (codec.text, codec.stored_bytes) != (self.identity.codec, self.identity.block_bytes):
            raise UsageError(f"the namespace is of codec {self.identity.codec!r}, and not of {codec.text!r}")
        return Namespace(self._connection, self.identity, codec)

    def fetch(self, keys: Sequence[bytes], wait_s: float = 1.0, ttl_s: float = 5.0) -> Lease:
        """Hold the lead run of this chain for `ttl_s` seconds of reading; a context manager.

        Returns as soon as the daemon says what is there. Blocks that it has to read from disk first come while the
        lease is used: `Lease` says how. `wait_s`: how long, from this call on, to wait for those, and for blocks that
        this client has stored and that are not visible yet. The call takes at most `wait_s` and the client's timeout;
        a daemon that does not answer is a lease of 0 blocks.
        """
        connection = self._connection
        parts = connection.run(self._fetching(connection.session(), keys, wait_s, ttl_s))
        return Lease(connection, parts, self.identity.block_bytes, self.codec)

    def start_fetch(self, keys: Sequence[bytes], wait_s: float = 1.0, ttl_s: float = 5.0) -> Callable[[], Lease]:
        """As `fetch` for a caller who has something else to do until the daemon has answered: ask now, wait later.

        Call what is returned, once and in any case: it gives the lease, which is to be released. `wait_s` and the
        client's timeout count from now.
        """
        connection = self._connection
        finish = connection.run_later(self._fetching(connection.session(), keys, wait_s, ttl_s))
        return lambda: Lease(connection, finish(), self.identity.block_bytes, self.codec)

    def store(
        self,
        keys: Sequence[bytes],
        buffers: object,
        parent: bytes | None = None,
        wait: bool = False,
        space_s: float = 1.0,
        recompute_s: float | None = None,
        stream: object = None,
    ) -> StoreResult:
        """Store the blocks of a chain: one object of exactly `block_bytes` bytes a key, or one array of them all.

        `parent`: key of the block before the first, None at the start of a sequence. Returns when the daemon has
        accepted them, with `wait` when they are visible (what is not in time is refused as TIMED_OUT). Waits up to
        `space_s` for room in the ring and up to the client's timeout for answers, each in all; copying comes on top.
        `recompute_s`: how long computing one of the blocks anew would take, if that is known; it is worth as much.
        Tensors may be on a GPU, all on one. Then `stream` is the one whose work so far they are the outcome of; the
        bytes are out of them when this returns.
        """
        connection = self._connection
        return connection.run(
            self._storing(
                connection.session(), keys, buffers,
                parent=parent, wait=wait, space_s=space_s, recompute_s=recompute_s, stream=stream,
            )
        )  # fmt: skip

    def load(
        self,
        keys: Sequence[bytes],
        pages: "AttachedPages",
        wait_s: float = 1.0,
        timeout_s: float = 5.0,
        stream: object = None,
    ) -> LoadResult:
        """Have the daemon copy what is there of this chain into pages of attached memory (mode daemon), a page a key.

        `pages`: `memory[ids]` of what `Client.attach` gave. `wait_s`: how long blocks may take that come from disk
        first, or that this client is still storing. The call takes `timeout_s` at most, and up to the client's timeout
        twice more where it cancels what is not over by then. `stream`: an engine's stream that may still read the
        pages; it is waited for. Of a daemon that is not there nothing is loaded. Raises UsageError.
        """
        from kvclient import moving  # noqa: PLC0415  an engine on CPU loads nothing of devices

        return moving.load(
            self._connection, self._plain(), keys, pages, wait_s=wait_s, timeout_s=timeout_s, stream=stream
        )

    def start_load(
        self,
        keys: Sequence[bytes],
        pages: "AttachedPages",
        wait_s: float = 1.0,
        groups: int = 1,
        stream: object = None,
    ) -> "Loading":
        """As `load`, of up to 1,024 blocks, and returns at once: the result says which `groups` of layers are there."""
        from kvclient import moving  # noqa: PLC0415  see above

        return moving.start_load(
            self._connection, self._plain(), keys, pages, wait_s=wait_s, groups=groups, stream=stream
        )

    def save(
        self,
        keys: Sequence[bytes],
        pages: "AttachedPages",
        parent: bytes | None = None,
        timeout_s: float = 5.0,
        space_s: float = 1.0,
        recompute_s: float | None = None,
        stream: object = None,
    ) -> StoreResult:
        """Have the daemon store the blocks of a chain out of pages of attached memory (mode daemon), a page a key.

        Returns when they are visible; what is not by `timeout_s` is cancelled and refused as TIMED_OUT, which takes up
        to the client's timeout more, and what the daemon would read later it does not store. Where the result is not
        `settled`, the pages stay as they are until `AttachedMemory.settle` has said True: a daemon of before that rule
        may still store what it reads, and none loads into them. Waits up to `space_s` for room. `stream`: the one whose
        work so far they are the outcome of; it is waited for first. Else as `store`. Raises UsageError.
        """
        from kvclient import moving  # noqa: PLC0415  see above

        saved = moving.save(
            self._connection, self._plain(), keys, pages,
            parent=parent, timeout_s=timeout_s, space_s=space_s, recompute_s=recompute_s, stream=stream,
        )  # fmt: skip
        with self._connection.guard():
            self._tally.published += saved.accepted  # `flush` is to make them durable, too
        return saved

    def _plain(self) -> flows.Target:
        """For the daemon's own copies. Raises UsageError where a codec is between pages and blocks."""
        if self.codec is not None:
            raise UsageError("the daemon copies blocks as they are: not in a namespace with a codec")
        return self._target

    def flush(self, timeout_s: float = 30.0) -> FlushResult:
        """Wait until every block accepted through this object is visible and, with a disk tier, durable, or has failed.

        Takes at most `timeout_s` and the client's timeout. Nothing is known to be durable that is not counted so.
        """
        self._connection.check()
        return self._connection.run(self._flushing(self._connection.session(), timeout_s))

    def match(self, keys: Sequence[bytes]) -> Match:
        """How much of this chain is there, and what loading it would cost. Takes no lease: it may be gone at once."""
        return self._connection.run(self._matching(self._connection.session(), keys))

    def delete(self, keys: Sequence[bytes]) -> Deleted:
        """Forget these blocks and all that continue them; how many that were. Leases taken before stay good.

        The result also says of how many `keys` nobody has answered: the daemon is away, or a drive of it hangs. Each
        1,024 keys may take the client's time limit.
        """
        return self._connection.run(self._deleting(self._connection.session(), keys))

    def pin(
        self,
        keys: Sequence[bytes],
        ttl_s: float | None = None,
        tier: str = "dram",
        refresh: bool = True,
        retention: Retention | str | None = None,
    ) -> PinResult:
        """Keep the lead run of this chain in a tier, or above, for `ttl_s` seconds or a `retention` ("5m", "1h").

        One of the two must be said; a day is the most. With `refresh` a use moves the deadline. Pins live in a budget
        of the tenant: the result says how much is pinned, and why not all. Without an answer in time that is nothing.
        What was stored through this object just before, and is not visible yet, is waited for.
        """
        connection = self._connection
        flow = self._pinning(connection.session(), keys, ttl_s, tier, refresh=refresh, retention=retention)
        return connection.run(flow)

    def unpin(self, pins: PinResult | Iterable[int]) -> int:
        """End these pins before their time: what `pin` gave, or numbers. How many there were."""
        return self._connection.run(self._unpinning(self._connection.session(), pins))

    def pins(self) -> list[PinInfo]:
        """The pins of this tenant in this namespace, the oldest first."""
        return self._connection.run(self._listing(self._connection.session()))

    def prefetch(self, keys: Sequence[bytes], tier: str = "dram", deadline_s: float = 5.0) -> Prefetch:
        """Have the lead run of this chain in a tier within `deadline_s` seconds (an hour at most), if there is room.

        Returns as soon as the daemon says what is there and what will come; `cancel` the result if it is not needed.
        `tier`: "dram", "disk", "hbm", or "remote": written there at once, for another host (see `handing_over`).
        What this host has not is looked for in the remote tier, if there is one, even if it was not there a moment ago.
        """
        return self._connection.run(self._prefetching(self._connection.session(), keys, tier, deadline_s))

    def expect(self, keys: Sequence[bytes], seconds: float | str | None = None, source: str = "client") -> None:
        """When these blocks are needed next: in so many `seconds`, or "soon", "later" or "hardly"; None: forget it.

        A hint: what `source` says counts for as much as it has turned out to be true. Of a longer chain the first
        1,024 keys. Waits only where the namespace is not open in this session yet.
        """
        self._connection.run(self._expecting(keys, seconds, source))

    def advise(
        self,
        tokens: int,
        elapsed_s: float,
        running: int,
        *,
        token_bytes: float | None = None,
        expected_s: float | None = None,
        forward_s: float | None = None,
        batch_tokens: int = 0,
        chunk_tokens: int = 0,
    ) -> Advice | None:
        """What to do with the `tokens` of a request that has waited for a tool for `elapsed_s`; None without an answer.

        `running`: tokens of the requests that run meanwhile; `token_bytes`: of accelerator memory, as in a block unless
        told; `expected_s`: how long the tool takes in all; `forward_s`: how long the next iteration takes, else what is
        known of its `batch_tokens` new tokens; `chunk_tokens`: recomputed in pieces of so many, 0 for at once. Ask
        again as time passes. Also raises UsageError for numbers that the daemon finds impossible.
        """
        connection = self._connection
        return connection.run(
            self._advising(
                connection.session(), tokens, elapsed_s, running,
                token_bytes=token_bytes, expected_s=expected_s, forward_s=forward_s,
                batch_tokens=batch_tokens, chunk_tokens=chunk_tokens,
            )
        )  # fmt: skip

    def open(self) -> None:
        """Make the namespace known to the daemon, which the first verb does otherwise.

        Raises UsageError if it finds it impossible: a block larger than its arenas.
        """
        self._connection.run(self._opening(self._connection.session()))
