"""`ns.load`, `ns.start_load`, `ns.save`: what the daemon copies into attached memory and out of it (mode daemon).

    load   attach, unless it is -> LOAD -> MOVING -> LOADED, group of layers by group -> LoadResult
    save   attach, unless it is -> SAVE -> MOVING -> SAVED -> StoreResult; what was BUSY is asked for again

What a caller does not wait for any more is cancelled, and the cancel is waited for. A daemon that stands still hears of
no cancel, and finds the SAVE when it goes on: so that says until when what it reads may be stored (the checksum is of
what was read, whatever that is by then), and nobody who waits for it leaves before, unless it is over.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from kvclient import flows
from kvclient.attached import AttachedMemory, AttachedPages, is_settled
from kvclient.connection import Connection
from kvclient.copying import WithdrawnError
from kvclient.devices import stream_of
from kvclient.flows import Flow, Target
from kvclient.ledger import Pause
from kvclient.results import LoadResult, Reason, Refused, StoreResult
from kvclient.storing import NAP_NS, NAP_NS_MAX
from kvclient.transfers import LoadCall, Moved, SaveCall, Transfer, TransferCall
from kvkernels.device.port import DeviceError
from kvproto.device_frames import UNTIL_NS_MAX, Fate, State
from kvproto.errors import AttachError, Code, LimitError, UsageError
from kvproto.frames import RECOMPUTE_US_MAX
from kvproto.limits import KEYS_PER_FRAME, LAYER_GROUPS, LEASE_WAIT_NS_MAX

if TYPE_CHECKING:
    from kvclient.protocol import Session

_REASONS: Final = {
    Fate.PENDING: Reason.PENDING,
    Fate.NO_PARENT: Reason.NO_PARENT,
    Fate.FULL: Reason.FULL,
    Fate.BUSY: Reason.BUSY,
    Fate.QUOTA: Reason.QUOTA,
    Fate.DRAINING: Reason.DRAINING,
    Fate.DISCARDED: Reason.DISCARDED,
    Fate.DEVICE: Reason.DEVICE,
    Fate.CANCELLED: Reason.TIMED_OUT,
}
_clock = time.monotonic_ns


class Loading:
    """A `load` under way, of at most 1,024 blocks. Any thread."""

    def __init__(
        self, memory: AttachedMemory, connection: Connection, transfer: Transfer | None, why: Reason | None
    ) -> None:
        self._memory = memory
        self._connection = connection
        self._transfer = transfer
        self._why = why

    @property
    def blocks(self) -> int | None:
        """How many of the blocks are there; None while that is not known. Good to use is what `wait` says has come."""
        return 0 if self._transfer is None else self._transfer.blocks

    @property
    def done(self) -> bool:
        """Is it over, and are its pages the caller's again? Never waits."""
        if self._transfer is None:
            return True
        self._connection.catch_up()
        return is_settled(self._transfer)

    @property
    def broken(self) -> bool:
        """Has its session ended before it did, so that no `wait` waits any more? `result` settles it. Never waits."""
        return self._transfer is not None and self._transfer.broken

    @property
    def heard_s(self) -> tuple[float, float]:
        """When it was heard how many blocks are there, and the last word so far; seconds of CLOCK_MONOTONIC."""
        transfer = self._transfer
        return (0.0, 0.0) if transfer is None else (transfer.named_ns / 1e9, transfer.heard_ns / 1e9)

    def wait(self, groups: int, timeout_s: float = 1.0) -> bool:
        """Are the first `groups` groups of layers of `blocks` blocks there? Waits so long."""
        transfer = self._transfer
        if transfer is None:
            return False
        if not 1 <= groups <= transfer.groups:
            raise UsageError(f"group {groups} of {transfer.groups}")
        self._connection.run(_moved(transfer, groups, _clock() + flows.nanoseconds("timeout_s", timeout_s)))
        return transfer.groups_done >= groups and bool(transfer.blocks)

    def result(self, timeout_s: float = 5.0) -> LoadResult:
        """How it ended. What is not over by then is cancelled, and that is waited for as long as a plain call may."""
        transfer = self._transfer
        if transfer is None:
            return LoadResult(0, reason=self._why)
        until_ns = _clock() + flows.nanoseconds("timeout_s", timeout_s)
        self._connection.run(_moved(transfer, transfer.groups + 1, until_ns))
        reason = self._why or (Reason.UNREACHABLE if transfer.broken else Reason.TIMED_OUT)
        self._memory.settle_one(transfer, self._connection.timeout_ns)
        if transfer.state is State.DONE:
            return LoadResult(transfer.blocks or 0)
        if transfer.state is State.FAILED and reason is Reason.TIMED_OUT:
            reason = Reason.DEVICE
        return LoadResult(0, settled=is_settled(transfer), reason=reason)

    def cancel(self) -> LoadResult:
        """As `result`, without waiting for it to be there."""
        return self.result(0.0)


def start_load(
    connection: Connection, target: Target, keys: Sequence[bytes], pages: AttachedPages, *,
    wait_s: float, groups: int, stream: object,
) -> Loading:  # fmt: skip
    """`Namespace.start_load`."""
    joined = flows.join_keys(keys)
    wait_ns = min(flows.nanoseconds("wait_s", wait_s), LEASE_WAIT_NS_MAX)
    memory = _check(connection, keys, pages)
    most = min(LAYER_GROUPS, len(memory.pages.bases))
    if not isinstance(groups, int) or not 1 <= groups <= most:
        raise UsageError(f"groups must be 1 to {most}, not {groups!r}")
    if not 1 <= len(keys) <= KEYS_PER_FRAME:
        raise UsageError(f"1 to {KEYS_PER_FRAME} blocks at a time, not {len(keys)}")
    if len({*pages.ids}) < len(pages.ids):
        raise UsageError("a page is named twice")
    _await_stream(memory, stream)
    deadline_ns = _clock() + connection.timeout_ns
    attached = _attached(memory, deadline_ns)
    if isinstance(attached, Reason):
        return Loading(memory, connection, None, attached)
    session, number = attached
    transfer = Transfer(session, pages.ids, loads=True, groups=groups)

    def flow() -> Flow[Reason | None]:
        opened = yield from flows.open_namespace(session, target, deadline_ns)
        if opened is None:
            transfer.end(State.FAILED)
            return Reason.UNREACHABLE
        call = LoadCall(session, transfer, opened.number, number, joined, wait_ns, deadline_ns)
        return (yield from _ask(memory, call))

    why = connection.run(flow())
    return Loading(memory, connection, transfer, why)


def load(
    connection: Connection, target: Target, keys: Sequence[bytes], pages: AttachedPages, *,
    wait_s: float, timeout_s: float, stream: object,
) -> LoadResult:  # fmt: skip
    """`Namespace.load`."""
    _check(connection, keys, pages)
    until_ns = _clock() + flows.nanoseconds("timeout_s", timeout_s)
    blocks = 0
    while blocks < len(keys):
        some = slice(blocks, blocks + KEYS_PER_FRAME)
        left_s = max(0.0, (until_ns - _clock()) / 1e9)
        part = start_load(
            connection, target, keys[some], pages.memory[pages.ids[some]],
            wait_s=min(wait_s, left_s), groups=1, stream=stream,
        ).result(left_s)  # fmt: skip
        blocks += part.blocks
        if part.blocks < len(keys[some]):
            return LoadResult(blocks, part.settled, part.reason)
    return LoadResult(blocks)


def save(
    connection: Connection, target: Target, keys: Sequence[bytes], pages: AttachedPages, *,
    parent: bytes | None, timeout_s: float, space_s: float, recompute_s: float | None, stream: object,
) -> StoreResult:  # fmt: skip
    """`Namespace.save`."""
    flows.join_keys(keys)
    flows.join_keys(() if parent is None else (parent,))
    memory = _check(connection, keys, pages)
    said_us = 0 if recompute_s is None else max(1, flows.nanoseconds("recompute_s", recompute_s) // 1000)
    recompute_us = min(said_us, RECOMPUTE_US_MAX)
    until_ns = _clock() + min(flows.nanoseconds("timeout_s", timeout_s), UNTIL_NS_MAX)
    space_until_ns = _clock() + flows.nanoseconds("space_s", space_s)
    _await_stream(memory, stream)
    fates: list[Fate] = []
    why: Reason | None = None
    settled = True
    nap_ns = NAP_NS
    while len(fates) < len(keys) and why is None:
        first = len(fates)
        some = slice(first, first + KEYS_PER_FRAME)
        before = keys[first - 1] if first else parent
        try:
            with pages.gate or nullcontext():
                part, why, settled = _save_some(
                    connection, memory, target, keys[some], pages.ids[some], before, recompute_us, until_ns
                )
        except WithdrawnError:
            if not fates:
                raise
            why = Reason.TIMED_OUT
            break
        busy = part.index(Fate.BUSY) if Fate.BUSY in part else -1
        if busy >= 0 and _clock() < min(space_until_ns, until_ns) and why is None:
            part = part[:busy]
            connection.run(_nap(nap_ns))
            nap_ns = min(2 * nap_ns, NAP_NS_MAX)
        fates += part
    rest = [Refused(index, why or Reason.TIMED_OUT) for index in range(len(fates), len(keys))]
    refused = [Refused(index, _REASONS[fate]) for index, fate in enumerate(fates) if fate in _REASONS]
    return StoreResult(fates.count(Fate.SAVED), fates.count(Fate.KNOWN), tuple(refused + rest), settled)


def _save_some(
    connection: Connection, memory: AttachedMemory, target: Target, keys: Sequence[bytes], ids: Sequence[int],
    parent: bytes | None, recompute_us: int, until_ns: int,
) -> tuple[list[Fate], Reason | None, bool]:  # fmt: skip
    """What became of each of at most 1,024, or why nobody knows; whether their pages are not read any more."""
    deadline_ns = _clock() + connection.timeout_ns
    attached = _attached(memory, deadline_ns)
    if isinstance(attached, Reason):
        return [], attached, True
    session, number = attached
    transfer = Transfer(session, ids, loads=False)

    def flow() -> Flow[Reason | None]:
        opened = yield from flows.open_namespace(session, target, deadline_ns)
        if opened is None:
            transfer.end(State.FAILED)
            return Reason.UNREACHABLE
        joined = b"".join(keys)
        call = SaveCall(session, transfer, opened.number, number, joined, parent, recompute_us, until_ns)
        why = yield from _ask(memory, call)
        if why is None:
            yield Moved(transfer, transfer.groups + 1, until_ns)
        return why

    why = connection.run(flow())
    if not transfer.over:
        why = Reason.UNREACHABLE if transfer.broken else Reason.TIMED_OUT
        memory.settle_one(transfer, connection.timeout_ns)
    if transfer.fates:
        return transfer.fates, None, True
    return [], why, is_settled(transfer)


# -- of both -----------------------------------------------------------------------------------------------------------


def _check(connection: Connection, keys: Sequence[bytes], pages: AttachedPages) -> AttachedMemory:
    if not isinstance(pages, AttachedPages) or pages.memory.connection is not connection:
        raise UsageError("pages are those of memory that this client has attached: memory[ids]")
    if len(keys) != len(pages.ids):
        raise UsageError(f"{len(keys)} keys and {len(pages.ids)} pages")
    connection.check()
    return pages.memory


def _await_stream(memory: AttachedMemory, stream: object) -> None:
    """What the pages hold is there, or not read any more. Raises UsageError."""
    if stream is None:
        return
    try:
        stream_of(memory.device, stream).record().wait()
    except DeviceError as error:
        raise UsageError(f"a stream that cannot be waited for: {error}") from error


def _attached(memory: AttachedMemory, deadline_ns: int) -> "tuple[Session, int] | Reason":
    """Where it has a number, attached anew if need be. What was possible once and is refused now is a miss."""
    try:
        return memory.attach(deadline_ns) or Reason.UNREACHABLE
    except (AttachError, LimitError):
        return Reason.DEVICE


def _ask(memory: AttachedMemory, call: TransferCall) -> Flow[Reason | None]:
    """Send it; why it did not begin. Raises UsageError where it is impossible."""
    memory.begin(call.transfer)
    yield call
    if call.error is not None:
        if call.error.code is Code.BAD_ARGUMENT:
            raise UsageError(str(call.error))
        return Reason.BUSY if isinstance(call.error, LimitError) else Reason.DEVICE
    if call.lost is not None and not call.request:
        call.transfer.end(State.FAILED)  # it was never sent
    return call.lost


def _moved(transfer: Transfer, groups: int, deadline_ns: int) -> Flow[None]:
    yield Moved(transfer, groups, deadline_ns)


def _nap(nap_ns: int) -> Flow[None]:
    yield Pause(_clock() + nap_ns)
