"""A drive is not mounted when the daemon starts: nothing is made beneath, the rest serves, and what lay there is kept.

No test mounts anything but the last ones: where a directory is remembered to lie on a folder that is no mount point,
its drive is not mounted. Those also have drives that are read-only, or answer nobody.
"""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvclient
from kvstored.index_marks import OWED
from kvstored.mounts import MOUNTS, read_points, write_points
from kvstored.owed import read_owed
from tests.integration.test_drive_back import RAW, disk, start_and_read, stored
from tests.integration.test_kvctl_acting import body, kvctl
from tests.integration.test_metrics import scrape
from tests.node import Node, census, put_roots, roots, until

ROOT = Path(__file__).parents[2]
PROBED_S = 25.0  # a drive that is gone is tried every 10 s


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(disks=2, segment="8MiB") as node:
        node.start(*RAW)
        yield node


def unmount(node: Node, number: int) -> Path:
    """As after a start of the host that left this drive out: its mount point is an empty folder. Where the drive is."""
    drive, away = node.disks[number], node.home / f"away-{number}"
    drive.rename(away)
    drive.mkdir()
    write_points(node.run / MOUNTS, {drive: drive})
    return away


def mount(node: Node, number: int, away: Path) -> None:
    """It is back, as it was."""
    (node.run / MOUNTS).unlink()
    node.disks[number].rmdir()  # empty: nothing was made there
    away.rename(node.disks[number])


def keys_on(node: Node, number: int) -> set[bytes]:
    """Keys of blocks that lie in one directory."""
    return {key for key, slot in node.slots().items() if slot.path.is_relative_to(node.disks[number])}


def warnings(node: Node) -> list[str]:
    """What status warns of."""
    found: list[str] = body(kvctl(node, "-o", "json", "status"), "status")["warnings"]
    return found


def snapshot(folder: Path) -> dict[Path, Any]:
    """What would change if anything in it did."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def test_without_its_second_drive_the_rest_serves_and_all_is_back_with_it(node: Node) -> None:
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 1) & keys
    assert there
    assert keys - there
    away = unmount(node, 1)
    before = snapshot(away)

    ns = start_and_read(node)
    drives = disk(node)["drives"]
    assert [drive["state"] for drive in drives] == ["ok", "gone"]
    reason = f"its drive is not mounted at {node.disks[1]}"
    assert drives[1]["reason"] == reason
    assert f"disk {node.disks[1]} is gone ({reason}); " in "".join(warnings(node))
    assert reason in kvctl(node, "-o", "json", "doctor")[1]
    assert census(ns, sorted(keys)).hits == keys - there
    later = roots("later", 40)
    put_roots(ns, later)  # and they are durable
    again = sorted(there)[:3]
    put_roots(ns, again, version=1)
    assert list(node.disks[1].iterdir()) == []
    node.kill()
    assert snapshot(away) == before, "the control: it was not there to be written to"

    mount(node, 1, away)
    ns = start_and_read(node)
    assert [drive["state"] for drive in disk(node)["drives"]] == ["ok", "ok"]
    assert census(ns, sorted(keys - set(again)) + later).hits == (keys - set(again)) | set(later)
    assert census(ns, again, version=1).hits == set(again), "what was stored since then"
    assert not (node.run / OWED).exists(), "nobody deleted anything"


def test_what_was_deleted_while_a_drive_was_not_mounted_stays_deleted(node: Node) -> None:
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 1) & keys
    away = unmount(node, 1)
    ns = start_and_read(node)
    deleted = sorted(there)[:1]
    ns.delete(deleted)
    put_roots(ns, roots("later", 40))
    node.kill()
    kept = shutil.copytree(node.disks[0] / "index", node.home / "index")
    mount(node, 1, away)
    ns = start_and_read(node)
    assert census(ns, sorted(keys)).hits == keys - there, "nobody could tell where it lay there; and the control"
    node.kill()
    for index in (kept, None):  # as it was when nobody had forgotten anything, or none
        node.drop_index()
        if index is not None:
            index.rename(node.disks[0] / "index")
        assert not census(start_and_read(node), deleted).hits
        node.kill()


def test_what_was_deleted_is_noted_though_the_drive_is_mounted_before_the_next_start(node: Node) -> None:
    """In the life that began without it what lies there is missed, and is owed by who deletes."""
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 1) & keys
    away = unmount(node, 1)
    ns = start_and_read(node)
    # A link that leads elsewhere is another directory than the one that was remembered.
    node.disks[1].rmdir()
    node.disks[1].symlink_to(away)
    assert until(lambda: disk(node)["drives"][1]["state"] == "ok", PROBED_S)
    assert not census(ns, sorted(there)).hits
    put_roots(ns, roots("later", 80))
    assert keys_on(node, 1) - there, "it is written to"
    ns.delete(sorted(there)[:1])
    node.kill()
    ns = start_and_read(node)
    assert not census(ns, sorted(there)[:1]).hits
    assert census(ns, roots("later", 80)).hits == set(roots("later", 80)), "the control"


def test_without_its_first_drive_it_serves_from_memory_and_makes_nothing(node: Node) -> None:
    keys = stored(node)
    node.kill()
    away = unmount(node, 0)
    before = snapshot(node.disks[1]), snapshot(away)

    node.start(*RAW)
    reason = f"{node.disks[0]}: its drive is not mounted at {node.disks[0]}"
    assert until(lambda: disk(node)["state"] == "off")
    assert disk(node)["index_reason"] == reason
    assert any(warning.startswith(f"the disk tier is off ({reason}): ") for warning in warnings(node))
    ns = node.namespace()
    later = roots("later", 10)
    put_roots(ns, later, durable=False)
    assert census(ns, later).hits == set(later)
    assert not census(ns, keys[:5]).hits
    node.stop()
    assert list(node.disks[0].iterdir()) == []
    assert (snapshot(node.disks[1]), snapshot(away)) == before

    mount(node, 0, away)
    assert census(start_and_read(node), keys).hits == set(keys)


def test_what_was_deleted_without_its_first_drive_stays_deleted(node: Node) -> None:
    """Nobody knows then what lies where: all of who deletes goes with the next start that sees it."""
    keys = stored(node)
    node.kill()
    away = unmount(node, 0)
    node.start(*RAW)
    assert until(lambda: disk(node)["state"] == "off")
    node.namespace().delete(keys[:1])
    assert read_owed(node.run / OWED).tenants
    node.kill()
    kept = shutil.copytree(node.home / "away-0" / "index", node.home / "index")
    mount(node, 0, away)
    ns = start_and_read(node)
    assert not census(ns, keys).hits
    assert not read_owed(node.run / OWED).tenants, "it is done"
    later = roots("later", 40)
    put_roots(ns, later)
    node.kill()
    node.drop_index()
    ns = start_and_read(node)
    assert not census(ns, keys).hits, "nor by what headers say"
    assert census(ns, later).hits == set(later), "the control"
    node.kill()
    node.drop_index()
    kept.rename(node.disks[0] / "index")
    assert not census(start_and_read(node), keys).hits, "nor by an index that knows of no DELETE"


def test_what_is_stored_after_a_delete_without_a_drive_is_durable_in_every_life(node: Node) -> None:
    """The note is of what was hidden: not of what was stored since, whether the drive is back or not."""
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 1) & keys
    away = unmount(node, 1)
    node.drop_index()
    ns = start_and_read(node)
    ns.delete(sorted(keys - there)[:1])
    later = roots("later", 40)
    put_roots(ns, later)
    for _ in range(2):
        node.kill()
        ns = start_and_read(node)
        assert census(ns, later).hits == set(later)
    node.kill()
    mount(node, 1, away)
    for _ in range(2):
        ns = start_and_read(node)
        assert census(ns, later).hits == set(later)
        assert not census(ns, sorted(there)).hits
        assert read_owed(node.run / OWED).tenants == {}
        node.kill()


def with_directories(node: Node, *numbers: int) -> kvclient.Namespace:
    """Another life, with these in that order."""
    node.start(*RAW, "--disk", ":".join(str(node.disks[number]) for number in numbers))
    assert until(lambda: disk(node)["state"] == "serving")
    return node.namespace()


def test_a_delete_is_not_forgotten_while_the_directory_is_not_configured(node: Node) -> None:
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 0) & keys
    away = unmount(node, 0)
    node.start(*RAW)
    assert until(lambda: disk(node)["state"] == "off")
    node.namespace().delete(sorted(keys))
    node.kill()
    assert not census(with_directories(node, 1), sorted(keys)).hits
    node.kill()
    mount(node, 0, away)
    assert not census(with_directories(node, 0, 1), sorted(there)).hits


def test_what_is_deleted_while_a_drive_is_away_is_noted_though_nobody_knows_of_it(node: Node) -> None:
    """It was never committed, and the index that knew of it is lost."""
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 1) & keys
    away = unmount(node, 1)
    shutil.rmtree(node.disks[0] / "index")
    shutil.rmtree(node.disks[0] / "segments")
    ns = start_and_read(node)
    ns.delete(sorted(there))
    node.kill()
    mount(node, 1, away)
    for _ in range(2):
        assert not census(start_and_read(node), sorted(there)).hits
        node.kill()


def test_no_store_is_begun_on_a_new_first_drive_while_the_second_is_away(node: Node) -> None:
    """Or all that lies on the second would be a stranger's for good."""
    keys = set(stored(node))
    node.kill()
    there = keys_on(node, 1) & keys
    away = unmount(node, 1)
    shutil.rmtree(node.disks[0])
    node.start(*RAW)
    assert until(lambda: disk(node)["state"] == "off")
    assert "no store is begun while there may be one already" in disk(node)["index_reason"]
    node.stop()
    mount(node, 1, away)
    assert census(start_and_read(node), sorted(there)).hits == there


def test_the_order_of_directories_may_change_and_change_back(node: Node) -> None:
    """An index that was left in a directory does not know of what came since."""
    keys = set(stored(node))
    node.kill()
    for turn, numbers in enumerate([(1, 0), (0, 1), (1,), (0, 1), (0,), (0,), (0, 1)]):
        ns = with_directories(node, *numbers)
        here = keys & {key for number in numbers for key in keys_on(node, number)}
        assert census(ns, sorted(here)).hits == here, turn
        deleted = min(here)
        ns.delete([deleted])
        more = roots(f"turn {turn}", 150 if numbers == (0,) else 20)  # and segments are made
        put_roots(ns, more)
        keys = (keys - {deleted}) | set(more)
        node.kill()
    assert census(with_directories(node, 0, 1), sorted(keys)).hits == keys


def over_real_mounts() -> None:
    """Lives of a daemon whose second directory is mounted, and is not. In a mount namespace of its own."""
    with Node(disks=2, segment="8MiB") as node:
        drive, point = node.home / "drive", node.disks[1]
        for folder in (drive, point):
            folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(drive))
        _run("mount", "--bind", str(drive), str(point))
        node.start(*RAW)
        keys = set(stored(node))
        there = keys_on(node, 1) & keys
        assert there
        assert read_points(node.run / MOUNTS)[point] == point
        reason = f"its drive is not mounted at {point}"

        node.kill()
        _run("umount", str(point))
        ns = start_and_read(node)
        assert disk(node)["drives"][1]["reason"] == reason
        assert census(ns, sorted(keys)).hits == keys - there
        assert list(point.iterdir()) == []
        _run("mount", "--bind", str(drive), str(point))
        assert until(lambda: disk(node)["drives"][1]["state"] == "ok", PROBED_S)
        node.kill()
        assert census(start_and_read(node), sorted(keys)).hits == keys
        _run("umount", "-l", str(point))  # while it is used
        assert until(lambda: disk(node)["drives"][1]["reason"] == reason)
        assert list(point.iterdir()) == []
        node.kill()
        _run("umount", str(drive))


def over_read_only_drives() -> None:
    """Lives of a daemon one of whose drives is mounted read-only, as after an error of its file system."""
    with Node(disks=2, segment="8MiB") as node:
        for drive in node.disks:
            drive.mkdir()
            _run("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(drive))
        node.start(*RAW)
        keys = set(stored(node))
        there = keys_on(node, 1) & keys
        assert there
        node.kill()

        drive = node.disks[1]
        _run("mount", "-o", "remount,ro", str(drive))
        before = snapshot(drive)
        ns = start_and_read(node)
        assert [each["state"] for each in disk(node)["drives"]] == ["ok", "gone"]
        assert f"disk {drive} is gone (" in "".join(warnings(node))
        assert "ead-only file system" in disk(node)["drives"][1]["reason"]
        assert census(ns, sorted(keys)).hits == keys - there
        put_roots(ns, roots("later", 20))
        assert snapshot(drive) == before
        _run("mount", "-o", "remount,rw", str(drive))
        assert until(lambda: disk(node)["drives"][1]["state"] == "ok", PROBED_S)
        node.kill()
        ns = start_and_read(node)
        assert census(ns, sorted(keys)).hits == keys
        node.kill()

        drive = node.disks[0]
        _run("mount", "-o", "remount,ro", str(drive))
        before = snapshot(drive)
        node.start(*RAW)
        assert until(lambda: disk(node)["state"] == "off")
        reason = f"{drive}: its drive cannot be used: read-only file system ({drive}/lock)"
        assert disk(node)["index_reason"] == reason
        assert any(warning.startswith(f"the disk tier is off ({reason}): ") for warning in warnings(node))
        later = roots("memory", 10)
        put_roots(node.namespace(), later, durable=False)
        assert census(node.namespace(), later).hits == set(later)
        node.stop()
        assert snapshot(drive) == before
        _run("mount", "-o", "remount,rw", str(drive))
        assert census(start_and_read(node), sorted(keys)).hits == keys
        node.kill()
        for drive in node.disks:
            _run("umount", "-l", str(drive))


def over_a_dead_mount() -> None:
    """A start whose second directory is a mount point that answers nobody."""
    with Node(disks=2, segment="8MiB") as node:
        node.start(*RAW)
        keys = set(stored(node))
        there = keys_on(node, 1) & keys
        node.kill()
        point = node.disks[1]
        c = ctypes.CDLL(None, use_errno=True)
        fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
        assert c.mount(b"dead", str(point).encode(), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
        os.close(fuse)
        ns = start_and_read(node)
        why = os.strerror(errno.ENOTCONN).lower()
        assert disk(node)["drives"][1]["reason"] == f"its drive cannot be used: {why} ({point})"
        assert census(ns, sorted(keys)).hits == keys - there
        _run("umount", "-l", str(point))
        assert until(lambda: disk(node)["drives"][1]["state"] == "ok", PROBED_S)
        node.kill()
        assert census(start_and_read(node), sorted(keys)).hits == keys


def over_an_error_of_a_file_system() -> None:
    """A life in which one of two drives turns read-only, as Linux has it after an error."""
    with Node(disks=2, segment="8MiB") as node:
        drive, image, metrics = node.disks[1], node.home / "image", node.home / "metrics.sock"
        drive.mkdir()
        _run("truncate", "-s", "256M", str(image))
        _run("mkfs.ext4", "-q", str(image))
        _run("mount", "-o", "loop,errors=remount-ro", str(image), str(drive))
        with Path("/proc/mounts").open(encoding="ascii") as mounts:
            device = next(line.split()[0] for line in mounts if line.split()[1] == str(drive))
        node.start(*RAW)
        keys = set(stored(node))
        there = keys_on(node, 1) & keys
        assert there
        node.kill()
        node.start(*RAW, "--metrics-listen", str(metrics))
        ns = node.namespace()
        assert until(lambda: disk(node)["state"] == "serving")
        up = f"kvstored_drive_up{{directory={drive}}}"
        assert scrape(metrics)[up] == 1.0, "the control"

        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("once")
        more = iter(range(10**6))

        def is_seen() -> bool:
            put_roots(ns, roots(f"more-{next(more)}", 20), durable=False)
            ns.flush(0.2)
            return bool(disk(node)["drives"][1]["state"] == "read-only")

        assert until(is_seen, PROBED_S)
        assert any(f"disk {drive} is read-only (" in warning for warning in warnings(node))
        assert until(lambda: scrape(metrics)[up] == 0.0)
        assert disk(node)["state"] == "serving"
        assert census(ns, sorted(there)).disk == len(there), "it can be read"

        def goes_on() -> bool:
            """On the other drive, once this one's places have been given up."""
            put_roots(ns, roots(f"other-{next(more)}", 20), durable=False)
            return ns.flush(5.0).durable == 20

        assert until(goes_on, PROBED_S)
        node.kill()
        _run("umount", str(drive))
        subprocess.run(["e2fsck", "-fy", str(image)], check=False, capture_output=True)  # 1: it has mended something
        _run("mount", "-o", "loop", str(image), str(drive))
        node.start(*RAW, "--metrics-listen", str(metrics))
        assert until(lambda: disk(node)["state"] == "serving")
        assert census(node.namespace(), sorted(keys)).hits == keys
        assert scrape(metrics)[up] == 1.0
        assert not any("is read-only" in warning for warning in warnings(node))
        node.kill()
        _run("umount", "-l", str(drive))


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, and unshare, to mount anything"
)
@pytest.mark.parametrize(
    "lives", [over_real_mounts, over_read_only_drives, over_a_dead_mount, over_an_error_of_a_file_system]
)
def test_a_drive_that_is_mounted_and_unmounted_for_real(lives: Callable[[], None]) -> None:
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"nothing can be mounted here: {tried.stderr.strip()}")
    if lives is over_a_dead_mount and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse here")
    if lives is over_an_error_of_a_file_system and not (
        shutil.which("mkfs.ext4") and Path("/dev/loop-control").exists()
    ):
        pytest.skip("no ext4 can be made in a file here")
    code = f"from tests.integration.test_drive_absent import {lives.__name__} as run; run()"
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
