"""ATTACH and DETACH: memory of engines in our hands, until nothing is copied there any more. Owner thread.

A client that comes again is answered when nothing of former sessions of its process is under way: that is its fence,
should a session have broken while copies were.
"""

import logging
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvkernels.device.port import Handle, Via
from kvkernels.device.sharing import PiecePlace, SharedPages
from kvproto import device_frames, frames
from kvproto.device_frames import Opens
from kvproto.errors import AttachError, Code, KvError, LimitError, ProtocolError, UsageError
from kvproto.frames import Head, Mode, Verb
from kvproto.limits import HANDLES_ATTACHED, HANDLES_PER_SESSION, HANDLES_PER_UID, MEMORIES_PER_SESSION
from kvstore.sessions import Session
from kvstored.connection import Connection
from kvstored.descriptors import closing
from kvstored.device_records import Memory, Mover
from kvstored.device_work import Closing, DeviceThreads, Done, Opening, Work
from kvstored.processes import identity_of

_VIAS: Final = {Opens.IPC: Via.IPC, Opens.DESCRIPTOR: Via.DESCRIPTOR}
log = logging.getLogger(__name__)

Put = Callable[[DeviceThreads, Work, Callable[[Done], None]], None]
Send = Callable[[Mover, bytes], None]


@dataclass(slots=True, eq=False)
class _Attaching:
    """An ATTACH that is not answered yet."""

    mover: Mover
    memory: Memory
    request: int
    fds: list[int]


class Attached:
    """All of it. `put` has work done and calls back with each piece; `send` tells a client that may be gone."""

    def __init__(
        self, threads: Sequence[DeviceThreads], frame: memoryview, put: Put, send: Send,
        hang_up: Callable[[Connection], None],
    ) -> None:  # fmt: skip
        self.movers: dict[Session, Mover] = {}
        self._threads = threads
        self._frame = frame
        self._put = put
        self._send = send
        self._hang_up = hang_up
        self._handles_max = min(HANDLES_ATTACHED, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._attaching: list[_Attaching] = []  # those that wait for former sessions of their process

    def mover(self, connection: Connection, session: Session) -> Mover:
        """What a session has here. Raises ProtocolError unless it is in mode daemon."""
        if connection.mode != Mode.DAEMON.name.lower():
            raise ProtocolError("a verb of mode daemon, and the session is not in it")
        mover = self.movers.get(session)
        if mover is None:
            mover = self.movers[session] = Mover(connection, session, identity_of(connection.peer))
        return mover

    def attach(self, connection: Connection, session: Session, head: Head) -> None:
        """ATTACH. What is impossible is answered FAILED, with a code and why."""
        mover = self.mover(connection, session)
        attach = device_frames.parse_attach(self._frame, head)
        fds, connection.fds = connection.fds, []
        try:
            threads, shared = self._check_attach(mover, attach, fds)
        except KvError as error:
            _close(fds)
            if isinstance(error, ProtocolError) and not isinstance(error, LimitError):
                raise
            connection.send(frames.build_failure(Verb.FAILED, head.request, error.code, str(error)))
            return
        whole_bytes = sum(handle.whole_bytes for handle in attach.handles)
        memory = Memory(mover.next_memory, threads, len(attach.handles), whole_bytes, Opening(shared))
        mover.next_memory += 1
        mover.memories[memory.number] = memory
        self._end_former(mover)
        self._attaching.append(_Attaching(mover, memory, head.request, fds))
        self.open_some()

    def _check_attach(
        self, mover: Mover, attach: device_frames.Attach, fds: Sequence[int]
    ) -> tuple[DeviceThreads, SharedPages]:  # fmt: skip
        """Where it lies, and what is to be opened. Raises AttachError, LimitError, ProtocolError."""
        identity = attach.identity.hex()
        found = [threads for threads in self._threads if threads.device.properties.identity == identity]
        if not found:
            raise AttachError(f"memory of device {identity}, which is none of this daemon's")
        threads = found[0]
        if threads.lost:
            raise AttachError(f"{threads.name} is lost: {threads.lost}")
        if sum(handle.opens is Opens.DESCRIPTOR for handle in attach.handles) != len(fds):
            raise ProtocolError(f"ATTACH came with {len(fds)} descriptors")
        self._check_limits(mover, attach, threads)
        rest = iter(fds)
        handles = tuple(
            Handle(
                _VIAS[each.opens], identity, each.whole_bytes, 0, each.whole_bytes, each.text,
                next(rest) if each.opens is Opens.DESCRIPTOR else -1,
            )
            for each in attach.handles
        )  # fmt: skip
        pieces = tuple(PiecePlace(*piece) for piece in attach.pieces)
        return threads, SharedPages(handles, pieces, attach.piece_bytes, attach.blocks)

    def _check_limits(self, mover: Mover, attach: device_frames.Attach, threads: DeviceThreads) -> None:
        """Descriptors and addresses that a session, a user and all together may take."""
        if len(mover.memories) >= MEMORIES_PER_SESSION:
            raise LimitError(f"{MEMORIES_PER_SESSION} memories are attached already")
        uid, more = mover.connection.peer.uid, len(attach.handles)
        counts = {of: sum(memory.handles for memory in of.memories.values()) for of in self.movers.values()}
        of_uid = sum(count for of, count in counts.items() if of.connection.peer.uid == uid)
        for what, has, most in (
            ("this session", counts[mover], HANDLES_PER_SESSION), (f"uid {uid}", of_uid, HANDLES_PER_UID),
            ("all sessions", sum(counts.values()), self._handles_max),
        ):  # fmt: skip
            if has + more > most:
                raise LimitError(f"{has} allocations of {what} are attached already, and {more} more than {most}")
        whole_bytes = sum(handle.whole_bytes for handle in attach.handles)
        mine = sum(memory.whole_bytes for memory in mover.memories.values())
        if whole_bytes + mine > threads.device.properties.memory_bytes:
            raise LimitError(
                f"{whole_bytes + mine} bytes, and {threads.name} has {threads.device.properties.memory_bytes}"
            )

    def _end_former(self, mover: Mover) -> None:
        """Sessions of its process that the client has left, now: a LOAD they left unread must not come after this."""
        for other in [each for each in self.movers.values() if each is not mover and not each.gone]:
            if other.process == mover.process and other.connection.left:
                self._hang_up(other.connection)

    def open_some(self) -> None:
        """Whose former sessions write nothing any more."""
        former = [mover for mover in self.movers.values() if mover.gone and mover.busy]
        for attaching in [each for each in self._attaching if not any(_holds_up(mover, each) for mover in former)]:
            self._attaching.remove(attaching)
            self._put(attaching.memory.threads, attaching.memory.opening, partial(self._opened, attaching))

    def _opened(self, attaching: _Attaching, _done: Done) -> None:
        """It is open, or cannot be."""
        mover, memory, opening = attaching.mover, attaching.memory, attaching.memory.opening
        _close(attaching.fds)
        if opening.error is not None or opening.opened is None:
            del mover.memories[memory.number]
            text = f"{type(opening.error).__name__}: {opening.error}"
            self._send(mover, frames.build_failure(Verb.FAILED, attaching.request, Code.DEVICE, text))
            self.forget_if_done(mover)
            return
        memory.opened = opening.opened
        log.info(
            "memory attached: pid=%d device=%r bytes=%d pages=%d",
            mover.connection.peer.pid, memory.threads.name, memory.whole_bytes, memory.opening.shared.blocks,
        )  # fmt: skip
        self._send(mover, frames.build(Verb.ATTACHED, attaching.request, frames.NUMBER_BODY.pack(memory.number)))
        self.close_if_unused(mover, memory)

    def detach(self, connection: Connection, session: Session, head: Head) -> None:
        """DETACH, answered when the memory is closed."""
        mover = self.mover(connection, session)
        memory = mover.memories.get(frames.parse_number(self._frame, head))
        if memory is None or memory.closing:
            error = UsageError("no such memory is attached")
            connection.send(frames.build_failure(Verb.FAILED, head.request, error.code, str(error)))
            return
        memory.closing, memory.detaching = True, head.request
        self.close_if_unused(mover, memory)

    def bytes(self, threads: DeviceThreads) -> int:
        """Memory of engines on one GPU that is open here."""
        memories = [memory for mover in self.movers.values() for memory in mover.memories.values()]
        return sum(memory.whole_bytes for memory in memories if memory.threads is threads)

    def part(self, mover: Mover) -> None:
        """Its session has ended, and its transfers end: let go of its memory."""
        for attaching in [each for each in self._attaching if each.mover is mover]:
            self._attaching.remove(attaching)
            _close(attaching.fds)
            del mover.memories[attaching.memory.number]
        for memory in list(mover.memories.values()):
            memory.closing = True
            self.close_if_unused(mover, memory)
        self.forget_if_done(mover)

    def forget_if_done(self, mover: Mover) -> None:
        """Of a session that has ended, once nothing is left."""
        if mover.gone and not mover.memories and not mover.transfers:
            self.movers.pop(mover.session, None)

    def close_if_unused(self, mover: Mover, memory: Memory) -> None:
        """Let go of memory that is not wanted any more, and that nothing is copied to or from."""
        opened = memory.opened
        if memory.closing and not memory.users and opened is not None:
            memory.opened = None  # once
            self._put(memory.threads, Closing(opened), partial(self._closed, mover, memory))

    def _closed(self, mover: Mover, memory: Memory, _done: Done) -> None:
        del mover.memories[memory.number]
        if memory.detaching is not None:
            body = frames.NUMBER_BODY.pack(memory.number)
            self._send(mover, frames.build(Verb.DETACHED, memory.detaching, body))
        self.forget_if_done(mover)


def _holds_up(former: Mover, attaching: _Attaching) -> bool:
    """May it be a session of the same process, and its copies where this memory is?"""
    if former.process != attaching.mover.process:
        return False
    threads = attaching.memory.threads  # a client asks for each memory, which lies on one GPU
    return former.process > 0 or any(transfer.memory.threads is threads for transfer in former.transfers.values())


def _close(fds: list[int]) -> None:
    closing.put(fds)
    fds.clear()
