"""Mode daemon, the client's side of the wire: requests, and transfers under way. No I/O, threads or clock.

    LoadCall, SaveCall --MOVING--> a Transfer of the session --LOADED, SAVED--> over
                                          |  `--CANCELLED--------------------> over
                                          `--the session ends----------------> broken: its pages may be written to yet

Guarded like the session.
"""

import os
import re
import select
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvclient.calls import Call
from kvclient.ledger import Watcher
from kvproto import device_frames, frames
from kvproto.device_frames import Attach, Fate, State
from kvproto.errors import KvError, ProtocolError
from kvproto.frames import Head, Verb

if TYPE_CHECKING:
    from kvclient.protocol import Session

_FDINFO_BYTES: Final = 4096  # a few lines
_PID: Final = re.compile(r"^Pid:\s+(-?[0-9]+)$", re.MULTILINE)


class Pidfd:
    """A process, by a descriptor of ours that lives as long as this."""

    def __init__(self, fd: int) -> None:
        """A copy of `fd`. Raises OSError."""
        self._fd = os.dup(fd)

    def exited(self, timeout_s: float = 0.0) -> bool:
        """Has it, with all its memory? Waits so long."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(max(0, int(timeout_s * 1000))))

    def is_same(self, other: "Pidfd") -> bool:
        """Are both one process for sure? By number only while it is there, and in our own pid namespace or below."""
        inode = self._inode()
        if inode is not None:
            return inode == other._inode()  # noqa: SLF001  of the same kind
        mine, theirs = self._pid(), other._pid()  # noqa: SLF001  as above
        return mine == theirs and mine > 0

    def _inode(self) -> int | None:
        """Which no other process has since boot, whoever looks; None before Linux 6.9: one for all."""
        anonymous = os.eventfd(0)
        try:
            shared = os.fstat(anonymous).st_dev
        finally:
            os.close(anonymous)
        mine = os.fstat(self._fd)
        return None if mine.st_dev == shared else mine.st_ino

    def _pid(self) -> int:
        try:
            with open(f"/proc/self/fdinfo/{self._fd}", encoding="ascii") as file:  # noqa: PTH123  once a reconnect
                found = _PID.search(file.read(_FDINFO_BYTES))
        except OSError:
            return -1
        return int(found[1]) if found else -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class Transfer:
    """A LOAD or SAVE, from before it is asked for until its pages are free again. `targets`: pages it writes to."""

    def __init__(self, session: "Session", pages: Sequence[int], *, loads: bool, groups: int = 1) -> None:
        self.session = session
        self.daemon = session.daemon  # whose exit ends it, whatever becomes of the session
        self.pages = tuple(pages)
        self.loads = loads
        self.groups = groups
        self.number = 0  # until MOVING
        self.blocks: int | None = None  # of a LOAD, once it is known how many are there
        self.groups_done = 0
        self.named_ns = 0  # when that was heard,
        self.heard_ns = 0  # and the last word of it
        self.state = State.MOVING
        self.fates: list[Fate] = []  # of a SAVE
        self.cancelled = False  # the daemon was told
        self._watchers: list[Moved] = []

    @property
    def over(self) -> bool:
        """Has the daemon said that nothing more is written, or read?"""
        return self.state is not State.MOVING

    @property
    def broken(self) -> bool:
        """Its session is over, and it was not: nobody will say how it ended."""
        return self.session.over and not self.over

    def loaded(self, blocks: int, groups: int, state: State) -> None:
        """LOADED."""
        if blocks > len(self.pages) or groups > self.groups or groups < self.groups_done:
            raise ProtocolError(f"LOADED says {blocks} blocks of {len(self.pages)}, {groups} groups of {self.groups}")
        if state is State.DONE and blocks and groups != self.groups:
            raise ProtocolError("LOADED says that it is done, and not all groups are there")
        self.heard_ns = self.session.heard_ns
        if self.blocks is None:
            self.named_ns = self.heard_ns
        self.blocks, self.groups_done, self.state = blocks, groups, state
        self._notify()

    def saved(self, fates: list[Fate]) -> None:
        """SAVED."""
        if len(fates) != len(self.pages):
            raise ProtocolError(f"SAVED speaks of {len(fates)} blocks, not {len(self.pages)}")
        self.fates, self.state = fates, State.DONE
        self._notify()

    def end(self, state: State) -> None:
        """It never began, or CANCELLED says that nothing of it is under way."""
        if not self.over:
            self.state = state
            self._notify()

    def lose(self) -> None:
        """The session is over."""
        self._notify()

    def has(self, groups: int) -> bool:
        """Are so many groups there, or is there nothing to wait for any more?"""
        return self.over or self.broken or (self.blocks is not None and self.groups_done >= groups)

    def _notify(self) -> None:
        for watcher in [each for each in self._watchers if self.has(each.groups)]:
            self._watchers.remove(watcher)
            watcher.finish()

    def watch(self, watcher: "Moved") -> None:
        """Have it told."""
        if self.has(watcher.groups):
            watcher.finish()
        else:
            self._watchers.append(watcher)

    def leave(self, watcher: "Moved") -> None:
        """No more."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)


class Moved(Watcher):
    """Waits until so many groups of layers are there, or the transfer is over."""

    def __init__(self, transfer: Transfer, groups: int, deadline_ns: int) -> None:
        super().__init__(deadline_ns)
        self.transfer = transfer
        self.groups = groups

    def watch(self) -> None:
        """See `Watcher`."""
        self.transfer.watch(self)

    def leave(self) -> None:
        """See `Watcher`."""
        self.transfer.leave(self)


class AttachCall(Call):
    """ATTACH -> ATTACHED. `fds` go with it, and stay the caller's. The daemon keeps it, so it is waited for again."""

    answer = Verb.ATTACHED
    patient = True  # while a former session's copies are under way
    watcher: "Answered | None" = None

    def __init__(self, session: "Session", attach: Attach, fds: Sequence[int], deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.attach = attach
        self.fds = fds
        self.memory = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return device_frames.build_attach(request, self.attach, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        self.memory = frames.parse_number(frame, head)
        if not self.memory:
            raise ProtocolError("ATTACHED without a number")

    @property
    def came(self) -> bool:
        """Is it answered, in time or later?"""
        return bool(self.memory) or self.error is not None

    def undo(self) -> None:
        """Nothing is: it is what was wanted, if late."""
        if self.watcher is not None:
            self.watcher.finish()


class Answered(Watcher):
    """Waits for the answer to an ATTACH that nobody waited for any more. One at a time."""

    def __init__(self, call: AttachCall, deadline_ns: int) -> None:
        super().__init__(deadline_ns)
        self.call = call

    def watch(self) -> None:
        """See `Watcher`."""
        self.call.watcher = self
        if self.call.came:
            self.finish()

    def leave(self) -> None:
        """See `Watcher`."""
        self.call.watcher = None


class DetachCall(Call):
    """DETACH -> DETACHED."""

    answer = Verb.DETACHED
    patient = True

    def __init__(self, session: "Session", memory: int, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.memory = memory

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return frames.build(Verb.DETACH, request, frames.NUMBER_BODY.pack(self.memory), releases=releases)

    def accept(self, frame: bytes, head: Head) -> None:
        if frames.parse_number(frame, head) != self.memory:
            raise ProtocolError("DETACHED names another memory")


class TransferCall(Call):
    """What begins a transfer -> MOVING. A caller that has left meanwhile wants it cancelled."""

    answer = Verb.MOVING

    def __init__(self, session: "Session", transfer: Transfer, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.transfer = transfer

    def accept(self, frame: bytes, head: Head) -> None:
        self.transfer.number = device_frames.parse_transfer(frame, head)
        if not self.transfer.number or self.transfer.number in self.session.transfers:
            raise ProtocolError(f"MOVING says transfer {self.transfer.number}")
        self.session.transfers[self.transfer.number] = self.transfer

    def refuse(self, error: KvError) -> None:
        super().refuse(error)
        self.transfer.end(State.FAILED)

    def undo(self) -> None:
        if not self.transfer.over:
            self.session.unwanted.append(self.transfer)


class LoadCall(TransferCall):
    """LOAD -> MOVING."""

    def __init__(
        self, session: "Session", transfer: Transfer, namespace: int, memory: int, keys: bytes, wait_ns: int,
        deadline_ns: int,
    ) -> None:  # fmt: skip
        super().__init__(session, transfer, deadline_ns)
        self.namespace, self.memory, self.keys, self.wait_ns = namespace, memory, keys, wait_ns

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return device_frames.build_load(
            request, self.namespace, self.memory, self.transfer.pages, self.keys,
            wait_ns=self.wait_ns, groups=self.transfer.groups, releases=releases,
        )  # fmt: skip


class SaveCall(TransferCall):
    """SAVE -> MOVING. What the daemon reads after the deadline, it does not store: so the caller stays until then."""

    def __init__(
        self, session: "Session", transfer: Transfer, namespace: int, memory: int, keys: bytes, parent: bytes | None,
        recompute_us: int, deadline_ns: int,
    ) -> None:  # fmt: skip
        super().__init__(session, transfer, deadline_ns)
        self.namespace, self.memory, self.keys = namespace, memory, keys
        self.parent, self.recompute_us = parent, recompute_us

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return device_frames.build_save(
            request, self.namespace, self.memory, self.transfer.pages, self.keys,
            parent=self.parent, recompute_us=self.recompute_us, until_ns=self.deadline_ns, releases=releases,
        )  # fmt: skip


class CancelCall(Call):
    """CANCEL_TRANSFER -> CANCELLED: nothing of it is under way any more."""

    answer = Verb.CANCELLED
    patient = True  # until the device has ended what it does

    def __init__(self, session: "Session", transfer: Transfer, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.transfer = transfer

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return device_frames.build_transfer(Verb.CANCEL_TRANSFER, request, self.transfer.number, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        if device_frames.parse_transfer(frame, head) != self.transfer.number:
            raise ProtocolError("CANCELLED names another transfer")
        self.session.transfers.pop(self.transfer.number, None)
        self.transfer.end(State.CANCELLED)
