"""The asyncio flavour: the same verbs as coroutines, over the same protocol and the same flows.

    client = await kvclient.aio.connect()
    ns = await client.namespace(model=..., engine=..., layout=..., dtype=...)
    async with ns.fetch(keys) as lease:
        hit = await lease.copy_to(pages)

Where a thread would wait in a property, a coroutine cannot: `lease.blocks` and `lease.views` show what has come so far,
and `await lease.complete()` waits until that is all.

What is said one way never waits, so hints and reports are plain calls here too; those that name keys may have to open
their namespace first and are awaited: `program.context`, `run.bind`, `ns.expect`.

Copies run in threads of the loop's executor; everything else in the loop that `connect` ran in, and only there. A
cancelled verb first lets a copy under way end: the memory on both sides is not the caller's again before.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Generator, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from kvclient import flows
from kvclient.aio_connection import AsyncConnection, in_thread
from kvclient.aio_hints import AsyncProgram, AsyncRun, AsyncWorkflow
from kvclient.buffers import Memory
from kvclient.checks import name_of
from kvclient.client import encoded_identity, hello_of
from kvclient.codecs import Codec
from kvclient.flows import Flow
from kvclient.lease import Held
from kvclient.namespace import Verbs, matching
from kvclient.policy import Prefetch
from kvclient.results import Advice, Deleted, FlushResult, Match, PinInfo, PinResult, Status, StoreResult
from kvclient.steps import Steps
from kvclient.stream import Part, arrive, lead_of
from kvproto.errors import Code, UsageError
from kvproto.frames import Role
from kvproto.identity import NamespaceIdentity
from kvproto.retention import Retention

_clock = time.monotonic_ns


async def connect(
    runtime_dir: str | os.PathLike[str] | None = None,
    *,
    name: str = "",
    tenant: str = "",
    timeout_s: float = 1.0,
    ring_bytes: int = 0,
    role: Role = Role.ENGINE,
    mode: str = "copy",
) -> "AsyncClient":
    """As `kvclient.connect`."""
    hello = hello_of(name, tenant, ring_bytes, role, mode)
    timeout_ns = flows.nanoseconds("timeout_s", timeout_s, least_ns=1)
    connection = AsyncConnection(runtime_dir, hello, timeout_ns)
    connection.mode_wished = mode
    await connection.start()
    return AsyncClient(connection)


class AsyncLease(Held):
    """What `AsyncNamespace.fetch` gives."""

    def __init__(
        self, connection: AsyncConnection, parts: Sequence[Part], block_bytes: int, codec: Codec | None = None
    ) -> None:
        super().__init__(connection, parts, block_bytes, codec)
        self._connection = connection

    @property
    def blocks(self) -> int:
        """Length of the lead run as far as it has come: final after `complete`, and at once if nothing is coming."""
        if not self._streaming:
            return self._blocks
        lead = lead_of(self._parts)
        if lead.coming is not None and _clock() < lead.coming.until_ns:
            return lead.blocks
        return self._after_waiting(self.expected)

    @property
    def views(self) -> tuple[memoryview, ...]:
        """As `Lease.views`, of the blocks that have come."""
        return self.views_of(range(self.blocks))

    async def complete(self) -> int:
        """Wait until no more blocks are coming, at most as long as `fetch` was told; how many there are."""
        return await self._beyond(self.expected)

    async def chunks(self) -> AsyncIterator[range]:
        """As `Lease.chunks`."""
        first = 0
        while (end := await self._beyond(first)) > first and not self._released:
            yield range(first, end)
            first = end

    async def copy_to(self, targets: object, stream: object = None) -> bool:
        """As `Lease.copy_to`, in a thread."""
        memory = self._writable(targets, stream)
        if memory.device is None:
            return await self._fill(memory)
        filled = False
        try:
            filled = await self._fill(memory)
        finally:
            arrived: list[bool] = []
            await in_thread(lambda: arrived.append(self._ended(memory)))
        return filled and arrived[0] and self.valid()

    async def _fill(self, memory: Memory) -> bool:
        wanted = memory.blocks
        watch = self._stopwatch(wanted)
        first = 0
        while first < wanted:
            end = min(await self._beyond(first), wanted)
            if not self.valid() or end <= first:
                return False
            copying = self._copying(memory, first, end)
            await in_thread(copying if watch is None else self._timed(watch, copying))
            first = end
        if watch is not None:
            self._report(watch, wanted)
        return self.valid()

    async def _beyond(self, first: int) -> int:
        """As `Lease._beyond`."""
        if not self._streaming:
            return self._blocks
        self._endpoint.check_fork()
        await self._connection.run(arrive(self._parts, first, _clock))
        return self._after_waiting(first)

    async def renew(self, ttl_s: float) -> bool:
        """As `Lease.renew`."""
        ttl_ns = flows.nanoseconds("ttl_s", ttl_s, least_ns=1)
        if not self.valid():
            return False
        deadline_ns = _clock() + self._connection.timeout_ns
        return await self._connection.run(flows.renew(self._parts, ttl_ns, deadline_ns)) and self.valid()


class Fetching:
    """A fetch under way: `async with` it, or await it and release the lease yourself."""

    def __init__(
        self, connection: AsyncConnection, flow: Flow[list[Part]], block_bytes: int, codec: Codec | None
    ) -> None:
        self._connection = connection
        self._codec = codec
        self._flow = flow
        self._block_bytes = block_bytes
        self._lease: AsyncLease | None = None
        self._begun = False

    def __await__(self) -> Generator[object, None, AsyncLease]:
        return self._fetch().__await__()

    async def __aenter__(self) -> AsyncLease:
        self._lease = await self._fetch()
        return self._lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lease is not None:
            self._lease.release()

    async def _fetch(self) -> AsyncLease:
        if self._begun:
            raise UsageError("a fetch was awaited already: its lease is what the first one gave; call fetch() again")
        self._begun = True
        return AsyncLease(self._connection, await self._connection.run(self._flow), self._block_bytes, self._codec)


class AsyncNamespace(Verbs):
    """As `Namespace`, in coroutines."""

    def __init__(self, connection: AsyncConnection, identity: NamespaceIdentity, codec: Codec | None = None) -> None:
        super().__init__(connection, identity, codec)
        self._connection = connection

    def fetch(self, keys: Sequence[bytes], wait_s: float = 1.0, ttl_s: float = 5.0) -> Fetching:
        """As `Namespace.fetch`; use with `async with`."""
        flow = self._fetching(self._connection.session(), keys, wait_s, ttl_s)
        return Fetching(self._connection, flow, self.identity.block_bytes, self.codec)

    async def store(
        self,
        keys: Sequence[bytes],
        buffers: object,
        parent: bytes | None = None,
        wait: bool = False,
        space_s: float = 1.0,
        recompute_s: float | None = None,
        stream: object = None,
    ) -> StoreResult:
        """As `Namespace.store`."""
        session = self._connection.session()
        return await self._connection.run(
            self._storing(
                session,
                keys,
                buffers,
                parent=parent,
                wait=wait,
                space_s=space_s,
                recompute_s=recompute_s,
                stream=stream,
            )
        )

    async def flush(self, timeout_s: float = 30.0) -> FlushResult:
        """As `Namespace.flush`."""
        self._connection.check()
        return await self._connection.run(self._flushing(self._connection.session(), timeout_s))

    async def match(self, keys: Sequence[bytes]) -> Match:
        """As `Namespace.match`."""
        return await self._connection.run(self._matching(self._connection.session(), keys))

    async def delete(self, keys: Sequence[bytes]) -> Deleted:
        """As `Namespace.delete`."""
        return await self._connection.run(self._deleting(self._connection.session(), keys))

    async def pin(
        self,
        keys: Sequence[bytes],
        ttl_s: float | None = None,
        tier: str = "dram",
        refresh: bool = True,
        retention: Retention | str | None = None,
    ) -> PinResult:
        """As `Namespace.pin`."""
        session = self._connection.session()
        return await self._connection.run(
            self._pinning(session, keys, ttl_s, tier, refresh=refresh, retention=retention)
        )

    async def unpin(self, pins: PinResult | Iterable[int]) -> int:
        """As `Namespace.unpin`."""
        return await self._connection.run(self._unpinning(self._connection.session(), pins))

    async def pins(self) -> list[PinInfo]:
        """As `Namespace.pins`."""
        return await self._connection.run(self._listing(self._connection.session()))

    async def prefetch(self, keys: Sequence[bytes], tier: str = "dram", deadline_s: float = 5.0) -> Prefetch:
        """As `Namespace.prefetch`."""
        return await self._connection.run(self._prefetching(self._connection.session(), keys, tier, deadline_s))

    async def expect(self, keys: Sequence[bytes], seconds: float | str | None = None, source: str = "client") -> None:
        """As `Namespace.expect`."""
        await self._connection.run(self._expecting(keys, seconds, source))

    async def advise(
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
        """As `Namespace.advise`."""
        session = self._connection.session()
        return await self._connection.run(
            self._advising(
                session, tokens, elapsed_s, running,
                token_bytes=token_bytes, expected_s=expected_s, forward_s=forward_s,
                batch_tokens=batch_tokens, chunk_tokens=chunk_tokens,
            )
        )  # fmt: skip

    async def open(self) -> None:
        """As `Namespace.open`."""
        await self._connection.run(self._opening(self._connection.session()))


class AsyncClient:
    """As `Client`, in coroutines; an asynchronous context manager."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    @property
    def connected(self) -> bool:
        """Whether there is a session right now."""
        return self._connection.connected

    @property
    def status(self) -> Status:
        """Where this client stands, and if it has no session, why not."""
        return self._connection.status()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for a session; whether there is one."""
        return await self._connection.wait_connected(timeout_s)

    async def namespace(
        self,
        *,
        model: str,
        engine: str,
        layout: str,
        dtype: str,
        block_tokens: int = 16,
        block_bytes: int = 2 << 20,
        revision: str = "",
        adapter: str = "",
        tp: tuple[int, int] = (0, 1),
        pp: tuple[int, int] = (0, 1),
        codec: str = "raw",
        block_shape: Sequence[int] | None = None,
        lossy: bool = False,
        accelerate: str = "",
        link_bytes_per_s: float | None = None,
    ) -> AsyncNamespace:
        """As `Client.namespace`. With codec "auto" a thread measures, and the loop goes on."""
        identify = partial(
            encoded_identity,
            model=model, engine=engine, layout=layout, dtype=dtype, block_tokens=block_tokens,
            block_bytes=block_bytes, revision=revision, adapter=adapter, tp=tp, pp=pp,
            codec=codec, block_shape=block_shape, lossy=lossy, accelerate=accelerate, link_bytes_per_s=link_bytes_per_s,
        )  # fmt: skip
        identity, encoding = await asyncio.to_thread(identify) if codec == "auto" else identify()
        namespace = AsyncNamespace(self._connection, identity, encoding)
        await namespace.open()
        return namespace

    async def match(self, namespaces: Sequence[AsyncNamespace], keys: Sequence[bytes]) -> Match:
        """As `Client.match`."""
        return await self._connection.run(matching(self._connection, namespaces, keys))

    def program(self, id: str, idle_s: float | None = None) -> AsyncProgram:  # noqa: A002
        """As `Client.program`."""
        return AsyncProgram(self._connection, id, idle_s)

    def workflow(self, name: str, steps: Steps) -> AsyncWorkflow:
        """As `Client.workflow`."""
        return AsyncWorkflow(self._connection, name, steps)

    def run(self, id: str) -> AsyncRun:  # noqa: A002
        """As `Client.run`."""
        return AsyncRun(self._connection, name_of("id", id), None)

    @property
    def refusals(self) -> list[tuple[Code, str]]:
        """As `Client.refusals`."""
        return self._connection.refusals.last()

    async def ping(self) -> float | None:
        """As `Client.ping`."""
        deadline_ns = _clock() + self._connection.timeout_ns
        return await self._connection.run(flows.ping(self._connection.session(), deadline_ns))

    async def close(self) -> None:
        """As `Client.close`."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
