"""`connect` and the client that it returns."""

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from kvclient import flows
from kvclient.checks import amount, name_of, whole
from kvclient.codecs import RAW, Codec, codec_of, is_text
from kvclient.connection import Connection
from kvclient.hints import Program, Run, Workflow
from kvclient.namespace import Namespace, matching
from kvclient.results import Advice, Match, Status
from kvclient.steps import Steps
from kvclient.swap_budget import Budget
from kvproto.errors import Code, UsageError
from kvproto.frames import Hello, Mode, Role
from kvproto.identity import NamespaceIdentity
from kvproto.limits import NAME_BYTES, RING_BYTES_MAX

if TYPE_CHECKING:
    from kvclient.attached import AttachedMemory
    from kvclient.swapping import Swapper
    from kvkernels.device.pages import Pages

CHUNK_BYTES_MAX: Final = 1 << 30  # of a swap: nobody pre-empts one
_OFFERS: Final = {
    "copy": (Mode.COPY,),
    "direct": (Mode.DIRECT, Mode.COPY),
    "ring": (Mode.RING, Mode.COPY),
    "daemon": (Mode.DAEMON, Mode.COPY),
    "auto": (Mode.DIRECT, Mode.COPY),
}


def connect(
    runtime_dir: str | os.PathLike[str] | None = None,
    *,
    name: str = "",
    tenant: str = "",
    timeout_s: float = 1.0,
    ring_bytes: int = 0,
    role: Role = Role.ENGINE,
    mode: str = "copy",
) -> "Client":
    """A client of the daemon at `runtime_dir` (where None looks: `kvclient.paths`).

    An absent daemon is no error: the client keeps trying in the background and its calls miss meanwhile. `name` is
    for the daemon's lists; `tenant` one of those that the daemon allows this user; `timeout_s` how long a plain call
    may wait; `ring_bytes` the size of the store ring, 0 for the daemon's default. Waits at most `timeout_s`.

    `mode`, how bytes come and go: "copy", by way of a ring; "direct", a store goes straight into the tenant's memory,
    one copy instead of two, where the operator marks the tenant as trusting; "ring", as copy, with a buffer of this
    process in between; "daemon", as copy, and beside that the daemon itself copies between its memory and that of a GPU
    which `Client.attach` hands it; "auto", the fastest that may be had on a CPU. What may not be had becomes "copy":
    `Client.status` says which one it is, whether it `fell_back`, and in `notes` why.

    Raises UsageError for unfit arguments, RefusedError if a daemon is there and will not have this client.
    """
    hello = hello_of(name, tenant, ring_bytes, role, mode)
    timeout_ns = flows.nanoseconds("timeout_s", timeout_s, least_ns=1)
    connection = Connection(runtime_dir, hello, timeout_ns)
    connection.mode_wished = mode
    connection.start()
    return Client(connection)


class Client:
    """One session with the daemon, renewed by itself when it breaks. Any thread; not in a forked child.

    A context manager; without one call `close`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._budget = Budget()
        self._swappers: list[Swapper] = []

    @property
    def connected(self) -> bool:
        """Whether there is a session right now. Raises ForkError."""
        return self._connection.connected

    @property
    def status(self) -> Status:
        """Where this client stands, and if it has no session, why not. Also after `close`."""
        return self._connection.status()

    @property
    def timeout_s(self) -> float:
        """How long a plain call may wait, as `connect` was told."""
        return self._connection.timeout_ns / 1e9

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for a session; whether there is one."""
        return self._connection.wait_connected(timeout_s)

    def namespace(
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
    ) -> Namespace:
        """Blocks are shared by those whose namespaces agree in every one of these. `tp` and `pp` are (rank, size).

        `codec`: how blocks lie in the store: "raw"; "bf16-fixed", which gives every bit back; or one of "int8", "fp8",
        "int4-g64", which change values and want `lossy`. Callers have blocks of `block_bytes` in any case, and the
        store holds `identity.block_bytes`. With a codec `dtype` is "bfloat16" or "float16", and `block_shape` that of a
        block, of which the last axis (head_dim) shares a scale; "int8" and "fp8" cannot do without. `accelerate`:
        "numba" encodes several times faster, where it is installed; the first block has it compiled, or
        `codec.warm_up()` before. A codec that an identity names (with a "/") moves its blocks as they lie, encoded.
        "auto" measures, and takes what is fastest over a link of `link_bytes_per_s` (this host's memory unless told),
        lossless unless `lossy`: "raw" where the link outruns any codec. Engines that come to different codecs share
        nothing; `codec.encoding` says which it is, None for raw.

        Raises UsageError for what cannot be a namespace, or not with the daemon that is connected.
        """
        identity, encoding = encoded_identity(
            model=model, engine=engine, layout=layout, dtype=dtype, block_tokens=block_tokens,
            block_bytes=block_bytes, revision=revision, adapter=adapter, tp=tp, pp=pp,
            codec=codec, block_shape=block_shape, lossy=lossy, accelerate=accelerate, link_bytes_per_s=link_bytes_per_s,
        )  # fmt: skip
        namespace = Namespace(self._connection, identity, encoding)
        namespace.open()
        return namespace

    def attach(self, place: Any, pages: "Pages") -> "AttachedMemory":
        """Hand an engine's KV memory to the daemon, in mode "daemon": it copies itself, by `ns.load` and `ns.save`.

        `place` is what the `device` of one of the layers' tensors is, `pages` what `kvkernels.device.pages.pages_of`
        makes of `kvclient.devices.port_of(place)` and of these tensors. The memory must have been made to be shared
        (torch's is, by IPC). Without a session right now it is
        attached as soon as it is used. Raises UsageError; AttachError where the daemon cannot or will not have it:
        another device, a handle that cannot be opened, a session in another mode.
        """
        from kvclient.attached import attach  # noqa: PLC0415  an engine on CPU loads nothing of devices

        return attach(self._connection, place, pages)

    def swapper(
        self, namespace: Namespace, memory: "AttachedMemory | Pages", place: Any = None, chunk_bytes: int = 4 << 20
    ) -> "Swapper":
        """Move contexts between an engine's pages and a namespace in chunks, beside its forward passes (`tick`).

        `memory`: what `attach` gave, in mode "daemon"; or `Pages`, whose `place` is what the `device` of a tensor is,
        or None for memory of the host (`kvclient.swap_ways.host_pages`). A page is a block. It ends with the client.
        Raises UsageError.
        """
        from kvclient.swap_ways import way_of  # noqa: PLC0415  an engine that swaps nothing loads nothing of it
        from kvclient.swapping import Swapper  # noqa: PLC0415  as above

        if whole("chunk_bytes", chunk_bytes, least=1) > CHUNK_BYTES_MAX:
            raise UsageError(f"chunk_bytes must be at most {CHUNK_BYTES_MAX}, not {chunk_bytes}")
        namespace.target_for(self._connection)
        way = way_of(namespace, memory, place)
        made = Swapper(namespace, way, self._budget, self._connection.check, chunk_bytes)
        self._swappers = [*(each for each in self._swappers if not each.closed), made]
        return made

    def tick(self, forward_s: float, advice: Advice | None = None) -> float:
        """An iteration of the engine begins, whose forward pass takes about `forward_s` seconds. Never waits.

        Grants swaps the bytes that move unnoticed meanwhile, never more than the `advice` of `Namespace.advise` says,
        and returns how many. A `forward_s` of 0 says that nothing is computed until the next tick: no limit then,
        however late it comes, unless advice has one. Without ticks, and from a quarter of a second or eight passes
        after the last one, swaps have 1 GiB a second. Raises UsageError.
        """
        limit_bytes = (advice.swap_budget_bytes or None) if advice is not None else None  # 0: nobody knows
        granted = self._budget.tick(amount("forward_s", forward_s), time.monotonic(), limit_bytes)
        for swapper in self._swappers:
            swapper.wake()
        return granted

    def match(self, namespaces: Sequence[Namespace], keys: Sequence[bytes]) -> Match:
        """What all of these namespaces (1 to 64 of this client, one a rank) have of a chain, in one round trip.

        `blocks`: the run that each of them has; `tiers.disk`: of these, what lies on disk alone in any of them;
        `pending`: blocks right after the run that each has or is about to have. `load_seconds` and `recompute_seconds`
        are those of the slowest, since ranks work side by side. Takes no lease: it may be gone at once. Of a daemon
        that is older than this question, one round trip a namespace. Raises UsageError.
        """
        return self._connection.run(matching(self._connection, namespaces, keys))

    def program(self, id: str, idle_s: float | None = None) -> Program:  # noqa: A002
        """A program (an agent, a conversation) that uses prefixes again and again, for hints: a context manager.

        Other clients of the tenant may speak of the same one by its `id`. It is over once nothing was said of it for
        `idle_s` seconds (an hour by default). Never waits. Raises UsageError.
        """
        return Program(self._connection, id, idle_s)

    def workflow(self, name: str, steps: Steps) -> Workflow:
        """A graph of steps, each a `Step` or a dict like it; `run` begins an execution of it. Never waits.

        Raises UsageError for what is no description. What is one and makes no sense (a cycle without an exit, chances
        that do not add up to 1) is refused later: see `refusals`.
        """
        return Workflow(self._connection, name, steps)

    def run(self, id: str) -> Run:  # noqa: A002
        """To speak of a run that another client of the tenant has begun, or will. Never waits. Raises UsageError."""
        return Run(self._connection, name_of("id", id), None)

    @property
    def refusals(self) -> list[tuple[Code, str]]:
        """Hints and timings that the daemon did not take, why, and which: the last 64, the newest at the end."""
        with self._connection.guard():
            return self._connection.refusals.last()

    def ping(self) -> float | None:
        """An empty round trip in seconds; None if no answer came in time."""
        deadline_ns = time.monotonic_ns() + self._connection.timeout_ns
        return self._connection.run(flows.ping(self._connection.session(), deadline_ns))

    def close(self) -> None:
        """End the session. Calls in other threads miss; views and arrays made from leases stay safe to touch."""
        swappers, self._swappers = self._swappers, []
        for swapper in swappers:
            swapper.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hello_of(name: str, tenant: str, ring_bytes: int, role: Role, mode: str = "copy") -> Hello:
    """What this client says of itself. Raises UsageError."""
    for what, text in (("name", name), ("tenant", tenant)):
        if not isinstance(text, str) or len(text.encode()) > NAME_BYTES:
            raise UsageError(f"{what} must be a string of at most {NAME_BYTES} bytes, not {text!r}")
    if isinstance(ring_bytes, bool) or not isinstance(ring_bytes, int) or not 0 <= ring_bytes <= RING_BYTES_MAX:
        raise UsageError(f"ring_bytes must be a whole number up to {RING_BYTES_MAX}, not {ring_bytes!r}")
    if mode not in _OFFERS:
        raise UsageError(f"mode is one of {', '.join(_OFFERS)}, not {mode!r:.40}")
    modes = _OFFERS[mode] if role is Role.ENGINE else _OFFERS["copy"]
    return Hello(name, tenant, Role(role), modes, ring_bytes)


def identity_of(
    *,
    model: str,
    engine: str,
    layout: str,
    dtype: str,
    block_tokens: int,
    block_bytes: int,
    revision: str,
    adapter: str,
    tp: tuple[int, int],
    pp: tuple[int, int],
    codec: str = "",
) -> NamespaceIdentity:
    """The identity of a namespace. Raises UsageError."""
    for axis, pair in (("tp", tp), ("pp", pp)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UsageError(f"{axis} must be (rank, size), not {pair!r}")
    return NamespaceIdentity(
        model, engine, layout, dtype, block_tokens, block_bytes, revision, adapter, tp[0], tp[1], pp[0], pp[1], codec
    )


def encoded_identity(
    *,
    dtype: str,
    block_bytes: int,
    codec: str,
    block_shape: Sequence[int] | None,
    lossy: bool,
    accelerate: str,
    link_bytes_per_s: float | None = None,
    **fields: Any,
) -> tuple[NamespaceIdentity, Codec | None]:
    """The identity of a namespace, and what encodes its blocks, if anything here does. Raises UsageError."""
    if codec == "auto":
        from kvclient.codecs_auto import resolved  # noqa: PLC0415  who names a codec measures nothing

        codec = resolved(
            dtype=dtype, block_bytes=block_bytes, block_shape=block_shape, lossy=lossy, accelerate=accelerate,
            link_bytes_per_s=link_bytes_per_s,
        )  # fmt: skip
        accelerate = "" if codec == RAW else accelerate
    elif link_bytes_per_s is not None:
        raise UsageError(f'link_bytes_per_s is for codec "auto", not {codec!r:.60}')
    if is_text(codec):
        return identity_of(dtype=dtype, block_bytes=block_bytes, codec=codec, **fields), None
    encoding = codec_of(
        codec, dtype=dtype, block_bytes=block_bytes, block_shape=block_shape, lossy=lossy, accelerate=accelerate
    )
    if encoding is None:
        return identity_of(dtype=dtype, block_bytes=block_bytes, **fields), None
    return identity_of(dtype=dtype, block_bytes=encoding.stored_bytes, codec=encoding.text, **fields), encoding
