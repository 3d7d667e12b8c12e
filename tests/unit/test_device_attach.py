"""Memory of engines between the owner thread and those that copy: whoever is first, it is closed once."""

import gc
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import pytest

from kvkernels.device.emulation import Emulation
from kvkernels.device.port import Via
from kvproto import device_frames, frames
from kvproto.device_frames import Attach, Opens, Piece, SharedHandle
from kvproto.frames import Mode, Verb
from kvproto.limits import FRAME_BYTES, PAGE_BYTES
from kvstore.sessions import Namespace, Session
from kvstored.connection import Connection
from kvstored.device_attach import Attached
from kvstored.device_records import Memory, Mover, Transfer
from kvstored.device_work import Closing, DeviceThreads, Done, Opening, Work
from kvstored.peer import Peer
from tests.contract.test_processes import NEEDS_INODES
from tests.core import Core

Then = Callable[[Done], None]


class Owner:
    """ATTACH of one session, with nobody but the test to do the work of the threads."""

    def __init__(self, device: Emulation, session: Session, connection: Connection) -> None:
        self.device = device
        self.threads = DeviceThreads(Emulation(opens_ipc=False), lambda: None)
        self.session, self.connection = session, connection
        self.sent: list[bytes] = []
        self.works: list[tuple[Work, Then]] = []
        self._frame = bytearray(FRAME_BYTES)
        self.attached = Attached(
            [self.threads], memoryview(self._frame), lambda _, work, then: self.works.append((work, then)),
            lambda _, frame: self.sent.append(frame), lambda _: None,
        )  # fmt: skip

    def attach(self, handles: int = 1) -> None:
        """As a client asks for it, with the same memory so many times."""
        memory = self.device.allocate(PAGE_BYTES, Via.DESCRIPTOR)
        handle = self.device.export(memory.address, PAGE_BYTES)
        whole = SharedHandle(handle.whole_bytes, Opens.DESCRIPTOR)
        attach = Attach(bytes.fromhex(handle.identity), [whole] * handles, [Piece(0, 0, PAGE_BYTES)], PAGE_BYTES, 1)
        frame = device_frames.build_attach(7, attach)
        self._frame[: len(frame)] = frame
        self.connection.fds = [handle.fd, *(os.dup(handle.fd) for _ in range(handles - 1))]
        self.attached.attach(self.connection, self.session, frames.parse_head(frame, len(frame)))

    def end(self) -> None:
        """The session is over."""
        mover = self.attached.movers[self.session]
        mover.gone = True
        self.attached.part(mover)

    def work(self) -> tuple[Work, Then]:
        """What a thread does next, done, and not heard of yet."""
        work, then = self.works.pop(0)
        with closing(self.threads.device.stream()) as stream:
            assert not work.step(self.threads, stream)
        return work, then


@contextmanager
def of_one_session(device: Emulation) -> Iterator[Owner]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pidfd = os.pidfd_open(os.getpid())
    with ours, theirs, os.fdopen(pidfd):
        connection = Connection(ours, Peer(1, 1, 1, pidfd))
        connection.mode = Mode.DAEMON.name.lower()
        made = Owner(device, Core().store.attach("t", PAGE_BYTES), connection)
        yield made
        made.threads.device.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    with closing(Emulation()) as device, of_one_session(device) as made:
        yield made


@pytest.mark.parametrize("ends", ["before it is open", "when it is open", "once that is heard of"])
def test_a_session_may_end_while_its_memory_is_opened(owner: Owner, ends: str) -> None:
    gc.collect()  # of former tests
    before = maps()
    owner.attach()
    if ends == "before it is open":
        owner.end()
    opening, then = owner.work()
    assert isinstance(opening, Opening)
    if ends == "when it is open":
        owner.end()
        assert not owner.works  # the owner has not heard of it yet
    then(Done(opening, over=True))
    if ends == "once that is heard of":
        assert [frames.parse_head(frame, len(frame)).verb for frame in owner.sent] == [Verb.ATTACHED]
        owner.end()
    ending, then = owner.work()
    assert isinstance(ending, Closing)
    then(Done(ending, over=True))
    assert not owner.works
    assert not owner.attached.movers
    assert maps() == before + 1  # the engine's own


def maps() -> int:
    """Of memory of emulated devices."""
    lines = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    return sum("kvstored-emulated-device" in line for line in lines)


def test_engines_take_no_more_than_a_quarter_of_the_descriptors() -> None:
    """Else nobody else could connect, and no arena be made."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(256, 2 * len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    with closing(Emulation()) as device:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
        try:
            with of_one_session(device) as owner:
                owner.attach(most // 4 + 1)
                assert not owner.works
                owner.attach(most // 4)
                assert len(owner.works) == 1
                opening, then = owner.work()
                then(Done(opening, over=True))
                owner.end()
                owner.work()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def mover_of(owner: Owner, peer: Peer, threads: DeviceThreads) -> Mover:
    """What a session has here that has ended while something is copied to its memory."""
    connection = Connection(owner.connection.socket, peer)
    connection.mode = owner.connection.mode
    session = Core().store.attach("t", PAGE_BYTES)
    mover = owner.attached.mover(connection, session)
    memory = Memory(1, threads, 1, PAGE_BYTES, cast(Opening, None))
    mover.transfers[1] = Transfer(1, mover, memory, cast(Namespace, None), [0])
    mover.gone = True
    return mover


def held_up(owner: Owner, former: Peer, mine: Peer, *, elsewhere: bool = False) -> bool:
    """Does an ATTACH wait for that copy, and for nothing else?"""
    other = DeviceThreads(Emulation(1), lambda: None) if elsewhere else owner.threads
    mover = mover_of(owner, former, other)
    owner.connection.peer = mine
    owner.attached.movers.pop(owner.session, None)
    owner.works.clear()
    owner.attach()
    waits = not owner.works
    mover.transfers.clear()
    owner.attached.open_some()
    assert len(owner.works) == 1
    opening, then = owner.work()
    then(Done(opening, over=True))
    if elsewhere:
        other.device.close()
    return waits


def test_an_attach_waits_for_copies_of_former_sessions_of_its_process(owner: Owner) -> None:
    with os.fdopen(os.eventfd(0)) as shared:  # as an older kernel's pidfd: without an inode of its own
        fd = shared.fileno()
        assert held_up(owner, Peer(7, 1, 1, fd), Peer(7, 1, 1, fd))
        assert held_up(owner, Peer(7, 1, 1, fd), Peer(7, 1, 1, fd), elsewhere=True)
        assert not held_up(owner, Peer(8, 1, 1, fd), Peer(7, 1, 1, fd))
        # Of another pid namespace: any process of that user may be the same, and its memory is on the device.
        assert held_up(owner, Peer(0, 1, 1, fd), Peer(0, 1, 1, fd))
        assert not held_up(owner, Peer(0, 1, 1, fd), Peer(0, 1, 1, fd), elsewhere=True)
        assert not held_up(owner, Peer(0, 2, 1, fd), Peer(0, 1, 1, fd))


@NEEDS_INODES
def test_a_process_is_known_whatever_its_number(owner: Owner) -> None:
    with os.fdopen(os.pidfd_open(os.getpid())) as mine, os.fdopen(os.pidfd_open(os.getppid())) as others:
        one, other = Peer(0, 1, 1, mine.fileno()), Peer(0, 1, 1, others.fileno())
        assert held_up(owner, one, one)
        assert held_up(owner, one, one, elsewhere=True)
        assert not held_up(owner, other, one)
