"""A disk that lies: flipped bits, slots in each other's place, files cut, swapped or gone, an index that is not to be
believed, no space. Real daemons on real files: no wrong byte, no death, and a floor of hits each time."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import xxhash

from kvproto.limits import MIB
from kvstore.tier.format import HEADER_BYTES, pack_header_into
from tests.core import Core, chain
from tests.figures import Recorder
from tests.integration.test_kvctl_acting import body, kvctl
from tests.integration.test_metrics import scrape
from tests.node import Node, Slot, census, put_roots, roots, spoil_index, until, value
from tests.segments import flip, patch
from tests.unit.test_disk import begin, make, put

SEED = 20_261_120
BLOCK_BYTES = 12_000  # a slot of four pages, and bytes in the last one that do not count
BLOCKS = 700
KEYS = roots("golden", BLOCKS)
small_node = partial(Node, segment="8MiB", size="64MiB", dram="16MiB")
Damage = Callable[[Node, Random], set[bytes]]


@pytest.fixture(scope="module")
def golden() -> Iterator[Path]:
    """The directory of a dead daemon: `BLOCKS` chains of one block, in two segments, and an index of them."""
    with small_node() as node:
        node.start("--disk-admission", "none", "--disk-codec", "raw")
        put_roots(node.namespace(BLOCK_BYTES), KEYS)
        assert node.slots().keys() == set(KEYS)
        node.kill()
        yield node.disks[0]


@contextmanager
def copy_of(golden: Path) -> Iterator[Node]:
    with small_node() as node:
        shutil.copytree(golden, node.disks[0])
        yield node


def suffer(golden: Path, damage: Damage, seed: int, *, running: bool = False, index: bool = True) -> set[bytes]:
    """Damage a copy, read everything: all that was damaged is a miss, and nothing else. Returns what was damaged."""
    print("seed", seed)
    with copy_of(golden) as node:
        random = Random(seed)
        lost = set() if running else damage(node, random)
        if not index:
            node.drop_index()
        node.start("--disk-admission", "none")
        ns = node.namespace(BLOCK_BYTES)
        if running:
            assert until(lambda: all(ns.match([key]).tiers.disk for key in KEYS))
            lost = damage(node, random)
        else:
            sound = [key for key in KEYS if key not in lost]
            assert until(lambda: all(ns.match([key]).blocks for key in sound[:: len(sound) // 50]))
        told = census(ns, KEYS)
        assert told.hits >= set(KEYS) - lost, f"{len(set(KEYS) - lost - told.hits)} sound blocks are not served"
        assert not told.hits & lost, "damage was not found"
        assert told.disk == len(told.hits), "nothing of this lay in DRAM"
        again = census(ns, sorted(lost)[:50])
        assert not again.hits, "what was found damaged stays a miss"
        node.assert_alive()
        return lost


# -- bits and places -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """How many blocks suffer what. Each suffers once."""

    flipped: int = 0  # one bit, of every second one's header, of the payload of the others
    misdirected: int = 0  # overwritten by another's whole slot
    swapped: int = 0  # pairs that changed places
    stale: int = 0  # an earlier version in its right place, sound in itself: only the index can tell
    untouched: int = 0  # control: a bit that does not count, behind the payload in its last page

    def __call__(self, node: Node, random: Random) -> set[bytes]:
        """Do it; the blocks that are lost by it."""
        slots = sorted(node.slots().values(), key=lambda slot: slot.header.key)
        random.shuffle(slots)
        chosen = iter(slots)
        lost: set[bytes] = set()
        for number in range(self.flipped):
            slot = next(chosen)
            in_payload = 8 * HEADER_BYTES + random.randrange(8 * slot.header.stored_bytes)
            bit = in_payload if number % 2 else random.randrange(8 * HEADER_BYTES)
            flip(slot.path, 8 * slot.offset + bit)
            lost.add(slot.header.key)
        for _ in range(self.misdirected):
            source, target = next(chosen), next(chosen)
            patch(target.path, target.offset, content_of(source))
            lost.add(target.header.key)
        for _ in range(self.swapped):
            one, other = next(chosen), next(chosen)
            first, second = content_of(one), content_of(other)
            patch(one.path, one.offset, second)
            patch(other.path, other.offset, first)
            lost |= {one.header.key, other.header.key}
        for _ in range(self.stale):
            slot = next(chosen)
            patch(slot.path, slot.offset, earlier_content(slot))
            lost.add(slot.header.key)
        for _ in range(self.untouched):
            slot = next(chosen)
            end = HEADER_BYTES + slot.header.stored_bytes
            flip(slot.path, 8 * (slot.offset + end) + random.randrange(8 * (slot.slot_bytes - end)))
        return lost


def content_of(slot: Slot) -> bytes:
    """The whole slot."""
    with slot.path.open("rb") as file:
        file.seek(slot.offset)
        return file.read(slot.slot_bytes)


def earlier_content(slot: Slot) -> bytes:
    """What a slot may have held before: the same key in the same place, of the generation before, with other bytes."""
    payload = value(slot.header.key, slot.header.block_bytes, version=1).tobytes()
    checksum = xxhash.xxh3_64_intdigest(payload)
    page = bytearray(HEADER_BYTES)
    header = replace(
        slot.header, generation=slot.header.generation - 1, checksum=checksum, stored_checksum=checksum
    )  # fmt: skip
    pack_header_into(memoryview(page), header)
    return bytes(page) + payload


@pytest.mark.parametrize(
    ("running", "index"), [(False, True), (False, False), (True, True)], ids=["stopped", "no-index", "running"]
)
def test_flipped_bits_misdirected_and_stale_slots_are_found(golden: Path, running: bool, index: bool) -> None:
    stale = 60 if index else 0
    mix = Mix(flipped=250, misdirected=75, swapped=50, stale=stale, untouched=40)
    assert len(suffer(golden, mix, SEED, running=running, index=index)) == 425 + stale


def test_without_an_index_an_earlier_version_is_believed(golden: Path) -> None:
    """The control of the stale slots: sound in themselves, and refused for what the index says and nothing else."""
    with copy_of(golden) as node:
        old = sorted(Mix(stale=60)(node, Random(SEED)))
        node.drop_index()
        node.start("--disk-admission", "none")
        ns = node.namespace(BLOCK_BYTES)
        assert until(lambda: all(ns.match([key]).blocks for key in KEYS))
        assert census(ns, old, lambda _key: 1).hits == set(old)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_100_000_flipped_bits_are_found(golden: Path, record_property: Recorder) -> None:
    mix = Mix(flipped=500, untouched=20)
    found = [suffer(golden, mix, SEED + i, running=i % 2 == 0, index=i % 4 != 1) for i in range(200)]
    assert sum(map(len, found)) == 100_000
    record_property("flips", sum(map(len, found)))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_10_000_misdirected_slots_are_found(golden: Path, record_property: Recorder) -> None:
    mix = Mix(misdirected=200, swapped=100)
    found = [suffer(golden, mix, SEED + i, running=i % 2 == 0, index=i % 4 != 1) for i in range(25)]
    assert sum(map(len, found)) == 10_000
    record_property("slots", sum(map(len, found)))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_10_000_stale_slots_are_found(golden: Path, record_property: Recorder) -> None:
    found = [suffer(golden, Mix(stale=500, untouched=20), SEED + i, running=i % 2 == 0) for i in range(20)]
    assert sum(map(len, found)) == 10_000
    record_property("slots", sum(map(len, found)))


def test_a_slot_that_went_back_in_time_is_a_miss(golden: Path) -> None:
    """Writes that the drive has swallowed: the right key in the right place, of a generation that was deleted."""
    with copy_of(golden) as node:
        node.start("--disk-admission", "none")
        ns, old = node.namespace(BLOCK_BYTES), KEYS[:200]
        assert until(lambda: all(ns.match([key]).blocks for key in KEYS))
        before = [(slot, content_of(slot)) for slot in node.slots().values() if slot.header.key in old]
        assert ns.delete(old) == 200
        put_roots(ns, old, version=1)
        for slot, content in before:
            patch(slot.path, slot.offset, content)
        told = census(ns, KEYS, lambda key: 1 if key in old else 0)
        assert told.hits >= set(KEYS[200:]), "the others do not suffer"
        node.restart("--disk-admission", "none")
        ns = node.namespace(BLOCK_BYTES)
        assert until(lambda: all(ns.match([key]).blocks for key in KEYS[200:]))
        assert census(ns, KEYS[200:400]).hits == set(KEYS[200:400])
        census(ns, old, version=1)


# -- files -----------------------------------------------------------------------------------------------------------


def spoil_files(node: Node) -> tuple[set[bytes], list[Path]]:
    """Cut one segment in two, put strangers beside. Returns the blocks in the part that is lost, and the strangers."""
    first, second = node.segments()
    cut = first.stat().st_size // 2
    lost = {key for key, slot in node.slots().items() if slot.path == first and slot.offset + slot.slot_bytes > cut}
    os.truncate(first, cut)
    folder = first.parent
    strangers = [folder / "00000077.seg", folder / "00000003.seg", folder / "00000004.seg", folder / "notes.txt"]
    strangers[0].write_bytes(b"not a segment" * 1000)
    with second.open("rb") as file:
        page = bytearray(file.read(HEADER_BYTES))
    strangers[1].write_bytes(page + bytes(HEADER_BYTES))  # the right store under another number
    page[100] ^= 1
    strangers[2].write_bytes(page)
    strangers[3].write_text("mine")
    return lost, strangers


@pytest.mark.parametrize("index", [True, False], ids=["index", "no-index"])
def test_cut_and_foreign_segment_files_cost_only_what_they_held(golden: Path, index: bool) -> None:
    with copy_of(golden) as node:
        lost, strangers = spoil_files(node)
        assert 50 < len(lost) < 400
        contents = [path.read_bytes() for path in strangers]
        if not index:
            node.drop_index()
        node.start("--disk-admission", "none")
        ns = node.namespace(BLOCK_BYTES)
        sound = sorted(set(KEYS) - lost)
        assert until(lambda: all(ns.match([key]).blocks for key in sound[:50]))
        assert census(ns, sound).hits == set(sound)
        assert not census(ns, sorted(lost)[:20]).hits
        new = roots("after", 500)
        put_roots(ns, new)
        assert len(census(ns, new).hits) == 500
        assert [path.read_bytes() for path in strangers] == contents, "what is not ours is left alone"
        node.assert_alive()


def test_segment_files_removed_or_cut_under_a_running_daemon(golden: Path) -> None:
    with copy_of(golden) as node:
        node.start("--disk-admission", "none")
        ns = node.namespace(BLOCK_BYTES)
        assert until(lambda: all(ns.match([key]).blocks for key in KEYS))
        third = roots("third", 500)
        put_roots(ns, third)
        slots, (first, second, last) = node.slots(), node.segments()
        on_first, on_second, on_third = (
            [key for key in (*KEYS, *third) if slots[key].path == path] for path in (first, second, last)
        )
        assert len(census(ns, on_first[:50]).hits) == 50
        first.unlink()
        census(ns, on_first)  # an open file stays readable; whatever comes is compared
        assert census(ns, on_second[:50]).hits == set(on_second[:50])
        os.truncate(second, HEADER_BYTES)
        assert not census(ns, on_second[100:160]).hits
        assert census(ns, on_third).hits == set(on_third), "a cut file does not take sound ones along"
        new = roots("after", 50)
        put_roots(ns, new, durable=False)
        assert census(ns, new).hits == set(new), "DRAM serves whatever happens to the disk"
        node.assert_alive()
        node.restart("--disk-admission", "none")
        ns = node.namespace(BLOCK_BYTES)
        assert until(lambda: all(ns.match([key]).blocks for key in on_third))
        census(ns, KEYS[::10])
        assert census(ns, on_third).hits == set(on_third)


# -- the index -------------------------------------------------------------------------------------------------------


def test_an_index_damaged_between_lives_costs_no_block(golden: Path) -> None:
    check_index_damage(golden, range(2))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_an_index_damaged_in_500_ways_costs_no_block(golden: Path, record_property: Recorder) -> None:
    check_index_damage(golden, range(2, 502))
    record_property("damaged", 500)


def check_index_damage(golden: Path, turns: Sequence[int]) -> None:
    for turn in turns:
        with copy_of(golden) as node:
            how = spoil_index(node, Random(SEED + turn))
            print("seed", SEED + turn, how)
            node.start("--disk-admission", "none")
            ns = node.namespace(BLOCK_BYTES)
            assert until(lambda: all(ns.match([key]).blocks for key in KEYS)), how  # noqa: B023  used in this turn
            assert len(census(ns, KEYS[::7]).hits) == len(KEYS[::7])


# -- what was deleted ------------------------------------------------------------------------------------------------


def test_what_was_deleted_never_comes_back_in_any_later_life() -> None:
    check_deletes([("cold", ""), ("warm", "gone"), ("warm", "")], SEED)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_was_deleted_never_comes_back_in_200_lives(record_property: Recorder) -> None:
    random = Random(SEED)
    check_deletes([(random.choice(["cold", "warm"]), random.choice(["", "gone", "spoilt"])) for _ in range(200)], SEED)
    record_property("lives", 200)


def check_deletes(lives: Sequence[tuple[str, str]], seed: int) -> None:
    """In each life some blocks are deleted before they are durable, some after; then it is killed at once."""
    print("seed", seed)
    random, deleted, stay = Random(seed), list[bytes](), list[bytes]()
    with small_node() as node:
        node.start("--keep", "true", "--disk-admission", "all")
        for turn, (kept, index) in enumerate(lives):
            ns = node.namespace(BLOCK_BYTES)
            flushed, fresh = roots(f"flushed-{turn}", 60), roots(f"fresh-{turn}", 40)
            put_roots(ns, flushed)
            for number in range(0, 40, 4):  # some are on their way to disk, some have just come there
                put_roots(ns, fresh[number : number + 4], durable=False)
                doomed = [*fresh[number : number + 4], *flushed[number // 4 :: 20]]
                assert ns.delete(random.sample(doomed, len(doomed))) == len(doomed)
                deleted += doomed
            stay += [key for key in flushed if key not in set(deleted)]
            node.kill()
            if index == "gone":
                node.drop_index()
            elif index == "spoilt":
                spoil_index(node, random)
            node.start("--keep", "true" if kept == "warm" else "false", "--disk-admission", "all")
            ns = node.namespace(BLOCK_BYTES)
            recent = stay[-200:]
            assert until(lambda: all(ns.match([key]).blocks for key in recent)), (kept, index)  # noqa: B023
            told = census(ns, deleted[-400:])
            assert not told.hits, f"{len(told.hits)} deleted blocks came back, {kept}, index {index or 'intact'}"
            assert census(ns, recent).hits == set(recent)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_delete_while_the_disk_opens_holds_afterwards(warm: bool) -> None:
    core = make(arenas=2)
    client, namespace = begin(core)
    put(client, namespace, chain(6))
    core.work_all()
    later = Core(
        2, disk=core.store.limits.disk, drive=core.drive.successor(), clock=core.clock, first_generation=1000,
        memory=core.memory.successor() if warm else None,
    )  # fmt: skip
    client = later.client()
    namespace = client.open()
    answers = client.delete(namespace, chain(6)[:1])
    assert not answers, "nobody knows yet what lies on disk"
    assert client.match(namespace, chain(6)) == 0, "what is in DRAM goes at once"
    later.open_disk()
    later.settle()
    assert len(answers) == 1
    assert answers[0] >= 6
    assert client.match(namespace, chain(6)) == 0, "it comes back"


def test_a_recycled_arena_costs_no_durable_block() -> None:
    core = make(arenas=2)
    client, small = begin(core)
    for name in range(4):
        put(client, small, chain(8, name))
    big = client.open(block_bytes=5000, model="big")
    for name in range(3):
        client.put(big, chain(4, f"big-{name}"))  # BUSY at first: an arena is being drained
        core.settle()
    assert [client.match(small, chain(8, name)) for name in range(4)] == [8] * 4


# -- space -----------------------------------------------------------------------------------------------------------


@contextmanager
def small_file_system(node: Node) -> Iterator[bool]:
    """The node's disk is a file system of 40 MiB. False: without root none can be made."""
    node.disks[0].mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "kvstored-test", str(node.disks[0])],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        yield False
        return
    try:
        yield True
    finally:
        if node.daemon is not None:
            node.daemon.kill()
        subprocess.run(["umount", "-l", str(node.disks[0])], check=True)


# Python runs it at the start of each daemon: what was given up is tried again every second.
AGAIN_SOON = """
import sys
if sys.orig_argv[1:3] == ["-m", "kvstored"]:
    from kvstore.tier import segments
    from kvstored import drive_health
    drive_health.PROBE_NS = segments.REFUSED_NS = 10**9
"""


def works(node: Node, name: object) -> bool:
    """Can blocks be made durable?"""
    ns, keys = node.namespace(BLOCK_BYTES), roots(name, 5)
    put_roots(ns, keys, durable=False)
    assert census(ns, keys).hits == set(keys), "a store does not depend on the disk"
    # Waiting matters: who asks and stores without a pause keeps the writes waiting behind the stores.
    return ns.flush(1.0).failed == 0 and node.slots().keys() >= set(keys)


def test_no_space_no_writing_no_folder_degrade_and_heal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(AGAIN_SOON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    check_space()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_space_no_writing_no_folder_degrade_and_heal_in_their_own_time() -> None:
    check_space()


def seen(node: Node) -> tuple[str, list[str], float]:
    """What an operator sees of the drive: its state, what is wrong with it, and the metric."""
    said = body(kvctl(node, "-o", "json", "status"), "status")
    (drive,) = said["disk"]["drives"]
    wrong = [text for text in said["warnings"] if text.startswith(f"disk {drive['directory']} is ")]
    return drive["state"], wrong, scrape(metrics_of(node))[f"kvstored_drive_up{{directory={drive['directory']}}}"]


def metrics_of(node: Node) -> Path:
    return node.home / "metrics.sock"


def shows(node: Node, state: str, remedy: str) -> bool:
    """Is the drive seen to be in this state, with a warning that says what to do? What is scraped is a second old."""
    told, wrong, up = seen(node)
    return (told, up) == (state, 0.0) and len(wrong) == 1 and f" is {state} (" in wrong[0] and remedy in wrong[0]


def test_a_first_drive_without_room_stops_no_other() -> None:
    """What fills it is not ours: what lies on the other one is durable by the index on the first."""
    with Node(disks=2, segment="8MiB") as node, small_file_system(node) as small:
        if not small:
            pytest.skip("needs root: no file system of its own can be made")
        node.start("--disk-admission", "all", "--disk-codec", "raw")
        ns = node.namespace(BLOCK_BYTES)
        put_roots(ns, KEYS[:10])
        with (node.disks[0] / "filler").open("wb") as filler:
            while (free_bytes := shutil.disk_usage(node.disks[0]).free) > 0:
                with suppress(OSError):
                    os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, free_bytes)
        put_roots(ns, KEYS[10:200])
        assert shutil.disk_usage(node.disks[0]).free == 0
        node.restart()
        node.await_disk(ns, KEYS[:1])
        assert census(ns, KEYS[:200]).hits == set(KEYS[:200])


def check_space() -> None:
    """Three nodes at once, two without root, since each is tried again every ten seconds if nothing else is said."""
    with ExitStack() as stack:
        full, forbidden, gone = (stack.enter_context(small_node()) for _ in range(3))
        filler, nodes = full.disks[0] / "filler", [forbidden, gone]
        troubled = [(gone, "gone", "mount or make it again")]
        if stack.enter_context(small_file_system(full)):
            filler.write_bytes(bytes(24 * MIB))  # two segments fit, a third does not; without it, all does
            nodes.append(full)
            troubled.append((full, "full", "free space there"))
        for node in nodes:
            metrics = ("--metrics-listen", str(metrics_of(node)))
            node.start("--disk-admission", "all", "--disk-codec", "raw", *metrics)
            put_roots(node.namespace(BLOCK_BYTES), KEYS[:100])
            assert until(lambda: seen(node) == ("ok", [], 1.0)), seen(node)  # noqa: B023  used in this turn
        pid = forbidden.daemon.process.pid if forbidden.daemon else 0
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        shutil.rmtree(gone.disks[0] / "segments")
        (gone.disks[0] / "segments").write_text("a file")
        for node in nodes:
            for begin_at in range(100, 1100, 100):
                put_roots(node.namespace(BLOCK_BYTES), roots(f"more-{begin_at}", 100), durable=False)
            last = roots("more-1000", 100)
            assert len(census(node.namespace(BLOCK_BYTES), last).hits) == 100, "DRAM goes on"
            census(node.namespace(BLOCK_BYTES), KEYS[:100], wait_s=0.5)
            node.assert_alive()
        for node, state, remedy in troubled:
            assert until(lambda: shows(node, state, remedy)), seen(node)  # noqa: B023  used in this turn
        more = iter(range(10**6))

        def fails() -> bool:
            """A probe of this drive succeeds: only writes that go on keep it in its state."""
            put_roots(forbidden.namespace(BLOCK_BYTES), roots(f"fails-{next(more)}", 5), durable=False)
            return shows(forbidden, "failing", "see the kernel's log")

        assert until(fails), seen(forbidden)
        filler.unlink(missing_ok=True)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (gone.disks[0] / "segments").unlink()
        for number, node in enumerate(nodes):
            turns = iter(range(10**6))
            assert until(lambda: works(node, f"heal-{next(turns)}")), f"node {number} does not heal"  # noqa: B023
            assert until(lambda: seen(node) == ("ok", [], 1.0)), seen(node)  # noqa: B023  used in this turn
            node.assert_alive()
