"""How long a map lives, and who populates it."""

import errno
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvclient.mapping import STEP_BYTES, HostMemory, Mapping
from kvkernels import libc
from kvproto.errors import ProtocolError
from kvproto.limits import MIB

MAP_BYTES = 4 * MIB


@pytest.fixture
def fd() -> Iterator[int]:
    number = os.memfd_create("test-map")
    os.ftruncate(number, MAP_BYTES)
    os.pwrite(number, b"first", 0)
    os.pwrite(number, b"last", MAP_BYTES - 4)
    yield number
    os.close(number)


def is_mapped(address: int) -> bool:
    starts = [line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if "test-map" in line]
    return f"{address:x}" in [start.lstrip("0") for start in starts]


def test_a_map_goes_with_its_last_view_and_says_so(fd: int) -> None:
    said: list[str] = []
    mapping = Mapping(fd, MAP_BYTES, writable=False, unmapped=lambda: said.append("unmapped"))
    address = mapping.address
    view = mapping.view[0:5]
    array = np.frombuffer(mapping.view, np.uint8)[-4:]
    del mapping
    assert (bytes(view), bytes(array), is_mapped(address)) == (b"first", b"last", True)
    view.release()
    assert (bytes(array), is_mapped(address), said) == (b"last", True, [])
    del array
    assert (is_mapped(address), said) == (False, ["unmapped"])


def test_nothing_is_left_for_the_garbage_collector(fd: int) -> None:
    gc.disable()
    try:
        mapping = Mapping(fd, MAP_BYTES, writable=True)
        address = mapping.address
        assert is_mapped(address)
        del mapping
        assert not is_mapped(address)
    finally:
        gc.enable()


def test_an_arena_cannot_be_written_through_its_views(fd: int) -> None:
    mapping = HostMemory().map_arena(fd, MAP_BYTES, lambda: None)
    with pytest.raises(TypeError):
        mapping.view[0] = 1
    assert not np.frombuffer(mapping.view, np.uint8).flags.writeable
    ring = HostMemory().map_ring(fd, MAP_BYTES)
    ring.view[0:5] = b"FIRST"
    assert bytes(mapping.view[0:5]) == b"FIRST"


def test_memory_smaller_than_promised_is_not_mapped(fd: int) -> None:
    with pytest.raises(ProtocolError):
        Mapping(fd, MAP_BYTES + 1, writable=False)
    with pytest.raises(ProtocolError):
        Mapping(fd, 0, writable=False)


def test_what_cannot_be_mapped_is_an_error_of_the_system() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises((OSError, ProtocolError)):
            Mapping(reader, 4096, writable=False)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_has_no_map_and_unmaps_nothing(fd: int) -> None:
    mapping = Mapping(fd, MAP_BYTES, writable=True)
    address = mapping.address
    child = os.fork()
    if child == 0:
        absent = not is_mapped(address)
        # Something else at that place, which letting go of the parent's map must not take away.
        other = libc._libc.mmap(address, MAP_BYTES, 3, 0x1 | 0x100000, fd, 0)
        del mapping
        kept = other == address and is_mapped(address)
        os._exit(0 if absent and kept else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_mapped(address)


class Recording(HostMemory):
    """Says who populated which step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, bool]] = []
        self.main = threading.get_ident()
        self.done = threading.Semaphore(0)

    def _populate_step(self, mapping: Mapping, step: int) -> None:
        claimed = step in mapping.cold
        super()._populate_step(mapping, step)
        if claimed:
            self.steps.append((step, threading.get_ident() == self.main))
            self.done.release()


def test_a_map_is_populated_in_the_background_the_wanted_places_first(fd: int) -> None:
    os.ftruncate(fd, 16 * STEP_BYTES)
    memory = Recording()
    mapping = memory.map_arena(fd, 16 * STEP_BYTES, lambda: None)
    memory.warm([(mapping, 9 * STEP_BYTES), (mapping, 3 * STEP_BYTES - 1)], 2)
    for _ in range(16):
        assert memory.done.acquire(timeout=20)
    assert not mapping.cold
    assert [step for step, _ in memory.steps] == [9, 2, 3, 0, 1, *range(4, 9), *range(10, 16)]
    assert not any(by_caller for _, by_caller in memory.steps)


def test_a_copy_populates_what_nobody_has_begun(fd: int) -> None:
    memory = Recording()
    mapping = memory.map_arena(fd, MAP_BYTES, lambda: None)
    memory.populate(mapping, 0, 1)
    memory.populate(mapping, 0, STEP_BYTES)
    assert memory.steps == [(0, True)]
    memory.populate(mapping, STEP_BYTES - 1, 2)
    assert memory.steps == [(0, True), (1, True)]


def test_an_arena_that_was_taken_back_is_not_populated(fd: int) -> None:
    memory = Recording()
    gone, kept = (memory.map_arena(fd, MAP_BYTES, lambda: None) for _ in range(2))
    gone.gone = True
    memory.warm([(gone, 0), (kept, 0)], 1)
    for _ in range(len(kept.cold)):
        assert memory.done.acquire(timeout=20)
    assert not kept.cold
    assert gone.cold


def test_a_kernel_without_populate_is_no_trouble(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, length: int, advice: int) -> None:
        if advice in {libc.MADV_POPULATE_READ, libc.MADV_POPULATE_WRITE}:
            raise OSError(errno.EINVAL, "not before Linux 5.14")

    memory = HostMemory()
    mapping = memory.map_arena(fd, MAP_BYTES, lambda: None)
    monkeypatch.setattr(libc, "advise", refuse)
    memory.populate(mapping, 0, 1)
    assert not mapping.cold
    again = memory.map_arena(fd, MAP_BYTES, lambda: None)
    memory.warm([(again, 0)], 1)
    assert not again.cold
    assert bytes(again.view[0:5]) == b"first"
