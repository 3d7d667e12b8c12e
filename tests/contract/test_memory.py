"""What the store and its clients rely on in memory: memfds and the simulation's arrays keep to it alike."""

import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from kvkernels import libc
from kvproto.limits import PAGE_BYTES
from kvstore.ports import Bytes, Memory
from kvstored.memory import HostMemory
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


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
