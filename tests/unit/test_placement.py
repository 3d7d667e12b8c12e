"""Arenas on NUMA nodes: the kernel's own where it has one node, a simulated topology where several are wanted."""

import mmap
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest

from kvkernels import libc, numa
from kvproto.limits import MIB
from kvstored.config import ConfigError, load
from kvstored.huge_pages import huge_bytes_of
from kvstored.memory import HostMemory
from kvstored.placement import NoSuchNodeError, Placement, Topology, numa_kind, plan, spread

HERE = Topology.read()


def topology(folder: Path, *, memory: str = "", online: str = "", allowed: str = "") -> Topology:
    """Of a host that says so."""
    for name, text in (("has_memory", memory), ("online", online)):
        if text:
            (folder / name).write_text(text + "\n")
    (folder / "status").write_text(f"Name:\tx\nMems_allowed_list:\t{allowed}\n" if allowed else "Name:\tx\n")
    return Topology.read(folder, folder / "status")


@pytest.mark.parametrize(
    ("memory", "online", "allowed", "nodes"),
    [
        ("0-1", "0-2", "", (0, 1)),
        ("", "0,2-3", "", (0, 2, 3)),
        ("0-3", "0-3", "1-2", (1, 2)),
        ("", "", "", (0,)),
        ("0-zz", "", "0", (0,)),
    ],
)
def test_nodes_are_those_with_memory_that_this_process_may_use(
    tmp_path: Path, memory: str, online: str, allowed: str, nodes: tuple[int, ...]
) -> None:
    assert topology(tmp_path, memory=memory, online=online, allowed=allowed).nodes == nodes


@pytest.mark.parametrize(
    ("wish", "nodes", "planned"),
    [
        ("auto", (0,), ()),
        ("auto", (0, 1), (0, 1)),
        ("interleave", (0,), (0,)),
        ("off", (0, 1), ()),
        ("1", (0, 1), (1,)),
        ("2,0", (0, 1, 2), (0, 2)),
        ("0-2", (0, 1, 2), (0, 1, 2)),
    ],
)
def test_a_plan_is_for_nodes_that_are_there(wish: str, nodes: tuple[int, ...], planned: tuple[int, ...]) -> None:
    assert plan(numa_kind().parse(wish), Topology(nodes)) == planned
    assert spread(planned) == (",".join(map(str, planned)) or "off")


def test_a_node_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(NoSuchNodeError, match="on node 3; it has that of 0, 1"):
        plan("1,3", Topology((0, 1)))
    with pytest.raises(ConfigError, match=r"flag --numa: there is no memory for this process on node 900"):
        load(None, {"HOME": "/x"}, {"--numa": "900"})
    with pytest.raises(ConfigError, match="is not auto, interleave, off, or numbers of nodes"):
        load(None, {"HOME": "/x"}, {"--numa": "everywhere"})


class Host:
    """A kernel with several nodes: pages lie where they were wanted."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.wanted: list[tuple[int, int, int]] = []

    def prefer(self, address: int, map_bytes: int, node: int) -> None:
        if self.refuses:
            raise OSError(22, "mbind: Invalid argument")
        self.wanted.append((address, map_bytes, node))

    def nodes_of(self, addresses: Sequence[int]) -> list[int]:
        found = []
        for address in addresses:
            node = [node for start, size, node in self.wanted if start <= address < start + size]
            found.append(node[-1] if node else 0)
        return found


def populated(placement: Placement, arenas: int = 6) -> HostMemory:
    """Memory whose spares are all there."""
    memory = HostMemory(
        arenas, 4 * MIB, prefault=True, lock=False, punched=SimpleQueue[int]().put, placement=placement, huge=False
    )
    memory.start()
    settle(memory, arenas)
    for arena in range(arenas):
        assert memory.new_arena(arena, 4 * MIB)
    return memory


def settle(memory: HostMemory, arenas: int) -> None:
    """Until so many arenas are populated, and the memory thread has nothing to do."""
    idle = SimpleQueue[None]()
    while len(memory._spare) + len(memory._arenas) < arenas or memory.populated_bytes < arenas * 4 * MIB:
        memory._work.put(lambda: idle.put(None))
        idle.get(timeout=30)


def test_arenas_lie_on_each_node_in_turn_and_status_knows() -> None:
    host = Host()
    memory = populated(Placement((0, 2), host.prefer, host.nodes_of))
    assert sorted(node for _, _, node in host.wanted) == [0, 0, 0, 2, 2, 2]
    assert {size for _, size, _ in host.wanted} == {4 * MIB}
    assert memory.placement.lie == {0: 12 * MIB, 2: 12 * MIB}
    assert not memory.faults
    on_two = [number for number, region in memory._arenas.items() if region.node == 2]
    for number in on_two:
        memory.punch_arena(number)
        memory.close_arena(number)
    settle(memory, 6)
    memory.stop()
    assert [node for _, _, node in host.wanted[6:]] == [2, 2, 2], "what was given back is made anew where it is missing"
    assert memory.placement.lie == {0: 12 * MIB, 2: 12 * MIB}


def test_nobody_is_asked_where_nothing_is_wanted_and_who_cannot_place_serves_all_the_same() -> None:
    host = Host()
    memory = populated(Placement((), host.prefer, host.nodes_of), 2)
    memory.stop()
    assert not host.wanted
    assert memory.placement.lie == {0: 8 * MIB}
    refusing = Host(refuses=True)
    memory = populated(Placement((1,), refusing.prefer, refusing.nodes_of), 2)
    memory.stop()
    refused = "arenas lie wherever the kernel puts them ([Errno 22] mbind: Invalid argument); see dram.numa"
    assert memory.faults == [refused]
    assert memory.populated_bytes == 8 * MIB


def test_the_kernel_places_pages_and_says_where_they_lie() -> None:
    node = HERE.nodes[0]
    memory = populated(Placement((node,)), 2)
    memory.stop()
    if memory.faults:
        pytest.skip(f"no NUMA in this kernel: {memory.faults[0]}")
    assert memory.placement.lie == {node: 8 * MIB}
    fresh = libc.map_shared(_memfd(MIB), MIB, writable=True)
    numa.prefer(fresh, MIB, node)
    assert numa.nodes_of([fresh])[0] < 0, "the control: nothing was touched yet"
    libc.bytes_at(fresh, MIB)[0] = 1
    assert numa.nodes_of([fresh, fresh + mmap.PAGESIZE])[0] == node
    with pytest.raises(OSError, match="mbind"):
        numa.prefer(fresh, MIB, 1000)
    libc.unmap(fresh, MIB)


def _memfd(file_bytes: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, file_bytes)
    return fd


def test_what_was_looked_at_is_counted_off_again() -> None:
    placement = Placement((), nodes_of=lambda pages: [0 if page % 3 else 1 for page in range(len(pages))])
    found = placement.look(0, 11 * MIB)
    assert found == Counter({0: 7 * MIB, 1: 4 * MIB})
    placement.look(0, 2 * MIB)
    placement.gone(-1, found)
    assert placement.lie == {1: 2 * MIB}


def test_an_arena_that_is_made_while_a_spare_is_takes_the_place_of_that_spare() -> None:
    """Else the pool would be larger than it may be, by one arena, for good."""
    go_on = threading.Event()

    def prefer(address: int, map_bytes: int, node: int) -> None:
        if threading.current_thread().name == "memory":
            assert go_on.wait(30)

    before = arenas_open()
    memory = HostMemory(
        2, 4 * MIB, prefault=True, lock=False, punched=SimpleQueue[int]().put, huge=False,
        placement=Placement((0,), prefer, lambda pages: [0] * len(pages)),
    )  # fmt: skip
    memory.start()
    assert memory.new_arena(0, 4 * MIB), "the memory thread is about to make a spare, or makes one already"
    assert memory.new_arena(1, 4 * MIB)
    go_on.set()
    settle(memory, 2)
    memory.stop()
    assert arenas_open() - before == 2
    assert not memory._spare
    assert memory.populated_bytes == 8 * MIB
    assert memory.placement.lie == {0: 8 * MIB}
    assert memory.placement.wanted == {0: 2}


def arenas_open() -> int:
    """Of this process."""
    return sum(
        "kvstored-arena" in str(entry.readlink())
        for entry in list(Path("/proc/self/fd").iterdir())
        if entry.is_symlink()
    )


SMAPS = """\
7f0000000000-7f0000800000 rw-s 00000000 00:01 1  /memfd:kvstored-arena (deleted)
Rss:                8192 kB
ShmemPmdMapped:     6144 kB
VmFlags: rd wr sh
7f0000a00000-7f0000e00000 rw-s 00000000 00:01 2  /memfd:kvstored-arena (deleted)
ShmemPmdMapped:        0 kB
7f0001000000-7f0001400000 r--s 00000000 00:01 3  /memfd:another (deleted)
ShmemPmdMapped:     4096 kB
"""


def test_huge_pages_are_told_for_each_map_and_for_none_where_the_kernel_is_silent(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(SMAPS)
    maps = [(0x7F0000A00000, 4 * MIB), (0x7F0000000000, 8 * MIB), (0x7F0002000000, 4 * MIB)]
    assert huge_bytes_of(maps, smaps) == [0, 6 * MIB, 0]
    assert huge_bytes_of(maps, tmp_path / "absent") == [0, 0, 0]


def test_what_the_kernel_says_of_huge_pages_is_what_was_made(tmp_path: Path) -> None:
    fd = _memfd(8 * MIB)
    address = libc.map_shared(fd, 8 * MIB, writable=True)
    if not libc.make_huge(address, 4 * MIB):
        pytest.skip("this kernel makes no huge pages for shared memory, or has none left")
    libc.advise(address + 4 * MIB, 4 * MIB, libc.MADV_POPULATE_WRITE)
    again = libc.map_shared(fd, 8 * MIB, writable=True)
    maps = [(address, 8 * MIB), (again, 8 * MIB)]
    assert huge_bytes_of(maps) == [4 * MIB, 0], "the control: nothing of the second is mapped yet"
    libc.advise(again, 8 * MIB, libc.MADV_POPULATE_READ)
    assert huge_bytes_of(maps) == [4 * MIB, 4 * MIB]
    for one in (address, again):
        libc.unmap(one, 8 * MIB)
    os.close(fd)
