"""`kvstore.ports.Processes`: one suite for the real thing and the fake."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol

import pytest

from kvstore.ports import Processes
from kvstore.sessions import Process
from kvstored import processes
from kvstored.loop import Loop
from kvstored.peer import Peer
from kvstored.processes import HostProcesses, process_of
from tests.fakes import FakeProcesses


class Host(Protocol):
    """Processes, and a way to begin and end one."""

    processes: Processes

    def begin(self) -> Process: ...
    def end(self, process: Process) -> None: ...
    def close(self) -> None: ...


class RealHost:
    """Children of this process."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.processes: Processes = HostProcesses(self.loop)
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def begin(self) -> Process:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.children[child.pid] = child
        pidfd = os.pidfd_open(child.pid)
        process = process_of(Peer(child.pid, 0, 0, pidfd))
        elsewhere = process_of(Peer(0, 0, 0, pidfd))  # as the kernel says of another pid namespace
        os.close(pidfd)
        assert process is not None
        assert elsewhere is None
        return process

    def end(self, process: Process) -> None:
        child = self.children.pop(process.pid)
        child.kill()
        child.wait()
        assert child.stdin is not None
        child.stdin.close()
        turns = iter((0, 0))  # when to look again

        with suppress(StopIteration):
            self.loop.run(lambda: next(turns))

    def close(self) -> None:
        for pid in list(self.children):
            self.end(Process(pid, 0))
        self.loop.close()


class FakeHost:
    """The fake, and who is in it."""

    def __init__(self) -> None:
        self.fake = FakeProcesses()
        self.processes: Processes = self.fake
        self.begun = 0

    def begin(self) -> Process:
        self.begun += 1
        process = Process(self.begun, 1)
        self.fake.living.add(process)
        return process

    def end(self, process: Process) -> None:
        self.fake.end(process)

    def close(self) -> None:
        pass


class HidingHost(RealHost):
    """One whose /proc shows nobody, as `hidepid=` has it for processes of other users."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(processes, "_start_of", lambda _pid: None)

    def close(self) -> None:
        self.patch.undo()
        super().close()


@contextmanager
def made(kind: type[RealHost] | type[FakeHost]) -> Iterator[Host]:
    host = kind()
    try:
        yield host
    finally:
        host.close()


def pidfds_have_inodes() -> bool:
    """Of their own: Linux 6.9 and later."""
    one, other = os.pidfd_open(os.getpid()), os.pidfd_open(os.getppid())
    try:
        return os.fstat(one).st_ino != os.fstat(other).st_ino
    finally:
        os.close(one)
        os.close(other)


NEEDS_INODES = pytest.mark.skipif(not pidfds_have_inodes(), reason="Linux before 6.9: pidfds have one inode for all")


@pytest.fixture(params=[RealHost, pytest.param(HidingHost, marks=NEEDS_INODES), FakeHost])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with made(request.param) as one:
        yield one


def test_who_lives_is_watched_until_it_is_gone(host: Host) -> None:
    gone: list[str] = []
    one, other = host.begin(), host.begin()
    assert host.processes.watch(one, lambda: gone.append("one"))
    assert host.processes.watch(other, lambda: gone.append("other"))
    assert gone == []
    host.end(one)
    assert gone == ["one"]
    host.end(other)
    assert gone == ["one", "other"]


def test_who_is_gone_is_not_there(host: Host) -> None:
    one = host.begin()
    host.end(one)
    assert not host.processes.watch(one, lambda: None)


def test_another_process_with_the_same_number_is_not_the_same(host: Host) -> None:
    one = host.begin()
    assert not host.processes.watch(replace(one, start=one.start - 1), lambda: None)


def test_who_was_numbered_elsewhere_is_taken_to_live() -> None:
    with made(RealHost) as host:
        one = host.begin()
        host.end(one)
        assert host.processes.watch(replace(one, space=one.space ^ 1), lambda: None)


@NEEDS_INODES
def test_who_was_known_by_start_time_is_waited_for_where_that_is_hidden_and_the_other_way_round() -> None:
    """The unit's ProtectProc= may change between two lives of the daemon; both have slots to withhold."""
    with made(RealHost) as seeing:
        one = seeing.begin()
        with made(HidingHost) as hiding:
            other = hiding.begin()
            assert other.start > one.start
            gone: list[str] = []
            assert hiding.processes.watch(one, lambda: gone.append("one"))
            assert seeing.processes.watch(other, lambda: gone.append("other"))
            hiding.end(other)
        assert not seeing.processes.watch(other, lambda: None)


def test_nobody_is_told_apart_where_neither_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_start_of", lambda _pid: None)
    shared = os.eventfd(0)  # an older kernel's pidfd is of the same file system
    try:
        assert process_of(Peer(os.getpid(), 0, 0, shared)) is None
    finally:
        os.close(shared)
