"""What the store and its clients rely on in memory: memfds and the simulation's arrays keep to it alike."""

import fcntl
import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from kvkernels import libc
from kvproto.limits import PAGE_BYTES
from kvstore.ports import Bytes, Memory
from kvstored.keep import NoKeeper
from kvstored.memory import HostMemory
from kvstored.regions import make_region
from tests.fakes import FakeMemory

ARENA_BYTES = 16 * PAGE_BYTES
WAIT_S = 10.0  # for what comes at once unless something is broken


class Subject(Protocol):
    """A memory, with the eyes of the daemon and of a client."""

    memory: Memory

    def view(self, arena: int) -> Bytes:
        """The daemon's writable map."""

    def map(self, arena: int) -> Bytes:
        """A client's map, which outlives the arena."""

    def read_late(self, arena: int, mapped: Bytes, offset: int) -> int:
        """A client reads through a map of an arena that was given up."""

    def wait_punched(self) -> int:
        """The arena whose punch ends next."""


class HostSubject:
    """Memfds, with a memory thread that really runs."""

    def __init__(self) -> None:
        self._punched: queue.Queue[int] = queue.Queue()
        self.host = HostMemory(4, ARENA_BYTES, prefault=False, lock=False, punched=self._punched.put)
        self.memory: Memory = self.host
        self.host.start()
        self._maps: list[int] = []

    def view(self, arena: int) -> Bytes:
        return self.host.view(arena)

    def map(self, arena: int) -> Bytes:
        fd = self.host.open_read_only(arena)
        address = libc.map_shared(fd, ARENA_BYTES, writable=False)
        os.close(fd)
        self._maps.append(address)
        return libc.bytes_at(address, ARENA_BYTES)

    def read_late(self, arena: int, mapped: Bytes, offset: int) -> int:
        return int(mapped[offset])

    def wait_punched(self) -> int:
        return self._punched.get(timeout=WAIT_S)

    def close(self) -> None:
        self.host.stop()
        for address in self._maps:
            libc.unmap(address, ARENA_BYTES)


class FakeSubject:
    """Arrays."""

    def __init__(self) -> None:
        self.fake = FakeMemory()
        self.memory: Memory = self.fake

    def view(self, arena: int) -> Bytes:
        return self.fake.view(arena)

    def map(self, arena: int) -> Bytes:
        return self.fake.map(arena)

    def read_late(self, arena: int, mapped: Bytes, offset: int) -> int:
        self.fake.read_late(arena, offset)
        return int(mapped[offset])

    def wait_punched(self) -> int:
        return self.fake.finish_punch()

    def close(self) -> None:
        pass


@pytest.fixture(params=[HostSubject, FakeSubject], ids=["host", "fake"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """One of the two."""
    made: HostSubject | FakeSubject = request.param()
    yield made
    made.close()


def test_a_table_is_zeroed_writable_and_as_large_as_asked(subject: Subject) -> None:
    first, second = subject.memory.table("first", 100_000), subject.memory.table("second", 64)
    assert (first.size, second.size) == (100_000, 64)
    assert first.dtype == np.uint8
    assert not first.any()
    first.view(np.uint64)[:] = 7
    assert not second.any()


def test_a_huge_table_costs_nothing_until_it_is_written(subject: Subject) -> None:
    before = _resident_bytes()
    table = subject.memory.table("huge", 1 << 32)
    table[1 << 31] = 1
    assert table.size == 1 << 32
    assert _resident_bytes() - before < 64 << 20


def test_a_new_arena_reads_zeros_and_shares_nothing_with_another(subject: Subject) -> None:
    assert subject.memory.new_arena(1, ARENA_BYTES)
    assert subject.memory.new_arena(2, ARENA_BYTES)
    assert subject.view(1).size == ARENA_BYTES
    assert not subject.view(1).any()
    subject.view(1)[:] = 9
    assert not subject.view(2).any()


def test_a_client_sees_what_the_daemon_writes(subject: Subject) -> None:
    subject.memory.new_arena(1, ARENA_BYTES)
    mapped = subject.map(1)
    subject.view(1)[PAGE_BYTES : PAGE_BYTES + 3] = (1, 2, 3)
    assert mapped[PAGE_BYTES : PAGE_BYTES + 4].tolist() == [1, 2, 3, 0]


def test_a_punched_arena_reads_zeros_through_maps_that_were_kept(subject: Subject) -> None:
    subject.memory.new_arena(1, ARENA_BYTES)
    subject.memory.new_arena(2, ARENA_BYTES)
    mapped, other = subject.map(1), subject.map(2)
    subject.view(1)[:] = 9
    subject.view(2)[:] = 8
    subject.memory.punch_arena(1)
    assert subject.wait_punched() == 1
    assert not mapped.any()
    assert (other == 8).all()


def test_punches_end_in_the_order_in_which_they_were_begun(subject: Subject) -> None:
    for arena in (1, 2, 3):
        subject.memory.new_arena(arena, ARENA_BYTES)
    for arena in (2, 3, 1):
        subject.memory.punch_arena(arena)
    assert [subject.wait_punched() for _ in range(3)] == [2, 3, 1]


def test_a_punched_arena_holds_nothing_until_a_late_reader_brings_pages_back(subject: Subject) -> None:
    subject.memory.new_arena(1, ARENA_BYTES)
    mapped = subject.map(1)
    subject.view(1)[:] = 9
    subject.memory.punch_arena(1)
    subject.wait_punched()
    assert subject.memory.held_bytes(1) == 0
    assert subject.read_late(1, mapped, 5 * PAGE_BYTES) == 0
    assert PAGE_BYTES <= subject.memory.held_bytes(1) <= ARENA_BYTES
    assert subject.read_late(1, mapped, 5 * PAGE_BYTES + 1) == 0
    assert PAGE_BYTES <= subject.memory.held_bytes(1) <= ARENA_BYTES


def test_a_punched_arena_can_be_closed_and_its_id_is_unknown_then(subject: Subject) -> None:
    subject.memory.new_arena(1, ARENA_BYTES)
    mapped = subject.map(1)
    subject.memory.punch_arena(1)
    subject.wait_punched()
    subject.memory.close_arena(1)
    assert not mapped.any()
    with pytest.raises((KeyError, AssertionError)):
        subject.view(1)
    assert subject.memory.new_arena(2, ARENA_BYTES)
    assert not subject.view(2).any()


def test_refused_memory_is_an_answer_and_not_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    host = HostSubject()
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert not host.memory.new_arena(1, ARENA_BYTES)
    assert "Too many open files" in host.host.faults[0]
    monkeypatch.undo()
    assert host.memory.new_arena(1, ARENA_BYTES)
    host.close()
    refusals = iter([True, False])
    fake = FakeMemory(refuses=lambda: next(refusals))
    assert not fake.new_arena(1, ARENA_BYTES)
    assert fake.new_arena(1, ARENA_BYTES)


# Over a restart: memfds only


class RecordingKeeper(NoKeeper):
    """Holds duplicates, and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, int] = {}
        self.told: list[str] = []

    def keep(self, name: str, fd: int) -> None:
        self.told.append(f"keep {name}")
        self.held[name] = os.dup(fd)

    def forget(self, name: str) -> None:
        self.told.append(f"forget {name}")
        if name in self.held:
            os.close(self.held.pop(name))

    def copies(self) -> dict[str, int]:
        """What a successor is given."""
        return {name: os.dup(fd) for name, fd in self.held.items()}


class Lives:
    """Memories of one daemon after another, with the same keeper."""

    def __init__(self) -> None:
        self.keeper = RecordingKeeper()
        self.punched: queue.Queue[int] = queue.Queue()
        self._hosts: list[HostMemory] = []

    def next(self, fds: dict[str, int] | None = None, *, arena_bytes: int = ARENA_BYTES) -> HostMemory:
        """A memory that has adopted what the keeper holds, and does not run yet."""
        host = HostMemory(4, arena_bytes, prefault=True, lock=False, punched=self.punched.put, keeper=self.keeper)
        self.keeper.told.clear()
        host.adopt(self.keeper.copies() if fds is None else fds)
        self._hosts.append(host)
        return host

    def close(self) -> None:
        for host in self._hosts:
            host.stop()
        for fd in self.keeper.held.values():
            os.close(fd)


@pytest.fixture
def lives() -> Iterator[Lives]:
    """Nothing kept yet."""
    made = Lives()
    yield made
    made.close()


def test_a_kept_table_and_arena_are_as_they_were_left(lives: Lives) -> None:
    first = lives.next()
    first.table("blocks", 5000)[:3] = (1, 2, 3)
    assert first.new_arena(7, ARENA_BYTES)
    first.view(7)[:] = 9
    second = lives.next()
    kept = second.kept_table("blocks")
    assert kept is not None
    assert kept[:4].tolist() == [1, 2, 3, 0]
    assert second.kept_table("slots") is None
    assert second.kept_arenas() == {7}
    assert second.table("blocks", 5000)[:4].tolist() == [1, 2, 3, 0]
    second.take_arena(7)
    assert (second.kept_table("blocks"), second.kept_arenas()) == (None, frozenset())
    assert (second.view(7) == 9).all()
    second.view(7)[0] = 8
    assert first.view(7)[0] == 8
    second.drop_kept()
    assert lives.keeper.told == []
    assert sorted(lives.keeper.held) == ["arena-7", "table-blocks"]


def test_an_arena_is_kept_once_assigned_and_forgotten_before_it_is_punched(lives: Lives) -> None:
    host = lives.next()
    host.start()
    assert host.new_arena(1, ARENA_BYTES)
    assert host.new_arena(2, ARENA_BYTES)
    assert lives.keeper.told == ["keep arena-1", "keep arena-2"]
    host.punch_arena(1)
    assert lives.keeper.told[2:] == ["forget arena-1"]
    assert lives.punched.get(timeout=WAIT_S) == 1
    host.close_arena(1)
    assert sorted(lives.keeper.held) == ["arena-2"]


def test_an_arena_that_was_taken_back_can_be_punched_and_read_only_to_clients(lives: Lives) -> None:
    lives.next().new_arena(1, ARENA_BYTES)
    host = lives.next()
    host.take_arena(1)
    host.start()
    fd = host.open_read_only(1)
    with pytest.raises(PermissionError):
        libc.map_shared(fd, ARENA_BYTES, writable=True)
    os.close(fd)
    host.punch_arena(1)
    assert lives.punched.get(timeout=WAIT_S) == 1
    assert host.held_bytes(1) == 0
    host.close_arena(1)
    assert lives.keeper.held == {}


def test_a_table_of_another_size_starts_anew_under_its_name(lives: Lives) -> None:
    lives.next().table("blocks", 5000)[:] = 1
    host = lives.next()
    assert not host.table("blocks", 5001).any()
    assert lives.keeper.told == ["forget table-blocks", "keep table-blocks"]
    assert os.fstat(lives.keeper.held["table-blocks"]).st_size == 5001


def test_what_is_dropped_is_forgotten_and_ids_start_anew(lives: Lives) -> None:
    first = lives.next()
    first.table("blocks", 5000)[:] = 1
    for arena in (1, 2, 3):
        assert first.new_arena(arena, ARENA_BYTES)
        first.view(arena)[:] = 9
    host = lives.next()
    assert host.populated_bytes == 3 * ARENA_BYTES
    host.drop_kept()
    assert host.populated_bytes == 0
    assert lives.keeper.held == {}
    assert not host.table("blocks", 5000).any()
    assert host.new_arena(1, ARENA_BYTES)
    assert not host.view(1).any()


def test_an_id_that_was_kept_is_not_made_anew_by_accident(lives: Lives) -> None:
    lives.next().new_arena(1, ARENA_BYTES)
    with pytest.raises(AssertionError, match="drop it first"):
        lives.next().new_arena(1, ARENA_BYTES)


def test_spares_are_made_for_what_was_not_kept_only(lives: Lives) -> None:
    first = lives.next()
    for arena in (1, 2, 3):
        assert first.new_arena(arena, ARENA_BYTES)
    host = lives.next()
    for arena in (1, 2):
        host.take_arena(arena)
    host.drop_kept()
    host.start()
    while host.populated_bytes < 4 * ARENA_BYTES:
        assert not host.faults
        os.sched_yield()
    host.stop()
    assert host.populated_bytes == 4 * ARENA_BYTES
    assert len(host._spare) == 2


def test_of_kept_arenas_too_it_is_known_how_much_lies_in_huge_pages(lives: Lives) -> None:
    arena_bytes = 2 * libc.HUGE_PAGE_BYTES
    first = lives.next(arena_bytes=arena_bytes)
    for arena in (1, 2, 3):
        assert first.new_arena(arena, arena_bytes)
    _settle(first, 4 * arena_bytes)
    if first.huge_bytes < 4 * arena_bytes:
        pytest.skip("this kernel makes no huge pages for shared memory, or has none left")
    second = lives.next(arena_bytes=arena_bytes)
    for arena in (1, 2):
        second.take_arena(arena)
    second.drop_kept()
    _settle(second, 4 * arena_bytes)
    assert second.huge_bytes == 4 * arena_bytes, "two that were kept, and two spares"
    second.punch_arena(1)
    assert lives.punched.get(timeout=WAIT_S) == 1
    _settle(second, 4 * arena_bytes)
    assert second.huge_bytes == 4 * arena_bytes, "a spare has come in its place, and nothing is counted twice"


def _settle(host: HostMemory, populated_bytes: int) -> None:
    """Run until so much is populated and the memory thread waits for work."""
    if not host._thread.is_alive():
        host.start()
    deadline = time.monotonic() + WAIT_S
    while host.populated_bytes < populated_bytes or host._unknown or host._cold or host._making:
        assert not host.faults
        assert time.monotonic() < deadline, "memory is not populated"
        os.sched_yield()


def test_arenas_of_another_size_are_not_taken_back(lives: Lives) -> None:
    lives.next().new_arena(1, ARENA_BYTES)
    host = lives.next(arena_bytes=2 * ARENA_BYTES)
    assert host.kept_arenas() == frozenset()
    assert lives.keeper.told == ["forget arena-1"]
    assert host.new_arena(1, 2 * ARENA_BYTES)


@pytest.mark.parametrize("wrong", ["unsealed", "half sealed", "read-only", "mode", "pipe", "file", "empty", "name"])
def test_what_this_daemon_would_not_have_made_is_closed_and_forgotten(lives: Lives, tmp_path: Path, wrong: str) -> None:
    region = make_region("made", ARENA_BYTES)
    fd, name = os.dup(region.fd), "arena-1"
    if wrong in {"unsealed", "half sealed", "empty"}:
        fd = os.memfd_create("made", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 0 if wrong == "empty" else ARENA_BYTES)
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | (fcntl.F_SEAL_SHRINK if wrong == "empty" else 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0 if wrong == "unsealed" else seals)
        name = "table-a" if wrong == "empty" else name
    elif wrong == "read-only":
        fd = os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY)
    elif wrong == "mode":
        os.fchmod(fd, 0o666)
    elif wrong == "pipe":
        fd, _ = os.pipe()
    elif wrong == "file":
        (tmp_path / "file").write_bytes(bytes(ARENA_BYTES))
        (tmp_path / "file").chmod(0o600)
        fd = os.open(tmp_path / "file", os.O_RDWR)
    else:
        name = "sessions"
    host = lives.next({name: fd})
    assert (host.kept_arenas(), host.kept_table("a")) == (frozenset(), None)
    assert lives.keeper.told == [f"forget {name}"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_of_another_user_is_not_taken_back(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.next().new_arena(1, ARENA_BYTES)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert lives.next().kept_arenas() == frozenset()
    assert lives.keeper.told == ["forget arena-1"]


def test_one_and_the_same_memory_under_two_names_is_taken_back_once(lives: Lives) -> None:
    lives.next().new_arena(1, ARENA_BYTES)
    fds = lives.keeper.copies()
    host = lives.next(fds | {"arena-2": os.dup(fds["arena-1"])})
    assert host.kept_arenas() == {1}
    assert lives.keeper.told == ["forget arena-2"]


def test_rings_are_never_kept(lives: Lives) -> None:
    host = lives.next()
    host.start()
    ring = make_region("kvstored-ring", ARENA_BYTES)
    host.fault_in(ring)
    host.drop(ring)
    assert lives.keeper.told == []


def test_a_thousand_arenas_asked_for_at_once_are_all_faulted_in() -> None:
    """The memory thread once went a level deeper for each."""
    host = HostMemory(1024, PAGE_BYTES, prefault=True, lock=False, punched=lambda _: None)
    for arena in range(1, 1025):
        assert host.new_arena(arena, PAGE_BYTES)
    host.start()
    while host.populated_bytes < 1024 * PAGE_BYTES:
        assert host._thread.is_alive()
        os.sched_yield()
    host.stop()
    for arena in range(1, 1025):
        os.close(host._arenas[arena].fd)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
