"""A drive goes, something is deleted, and the drive is back as it was: what was deleted is not."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvclient
from kvstored.index_marks import OWED
from tests.integration.test_kvctl_acting import body, kvctl
from tests.node import Node, census, put_roots, roots, until

COUNT = 150  # more than one segment holds, or two drives would have one of them
RAW = ("--disk-admission", "none", "--disk-codec", "raw", "--keep", "false")


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with Node(disks=getattr(request, "param", 1), segment="8MiB") as node:
        node.start(*RAW)
        yield node


def disk(node: Node) -> Any:
    """What status says of the tier."""
    return body(kvctl(node, "-o", "json", "status"), "status")["disk"]


def lose(node: Node, number: int) -> Path:
    """The drive goes, and the daemon has noticed. Where its contents are kept."""
    drive, kept = node.disks[number], node.home / f"kept-{number}"
    shutil.copytree(drive, kept)
    drive.rename(node.home / f"away-{number}")
    assert until(lambda: disk(node)["drives"][number]["state"] == "gone")
    return kept


def bring_back(node: Node, number: int, kept: Path) -> None:
    """As it was when it went."""
    shutil.rmtree(node.disks[number], ignore_errors=True)
    kept.rename(node.disks[number])


def start_and_read(node: Node) -> kvclient.Namespace:
    """Another life, which has read what lies on disk."""
    node.start(*RAW)
    assert until(lambda: disk(node)["state"] == "serving")
    return node.namespace()


def stored(node: Node) -> list[bytes]:
    """Keys of blocks that lie on disk alone."""
    keys = roots("e", COUNT)
    put_roots(node.namespace(), keys)
    node.kill()
    assert census(start_and_read(node), keys[:1]).disk == 1
    return keys[1:]


LONG = pytest.mark.long
DRIVES = pytest.mark.parametrize(
    ("node", "number"),
    [pytest.param(1, 0, id="one"), pytest.param(2, 0, id="first", marks=LONG), pytest.param(2, 1, id="second")],
    indirect=["node"],
)


@pytest.mark.parametrize("end", [pytest.param(Node.stop, marks=LONG), Node.kill])
@DRIVES
def test_what_was_deleted_while_its_drive_was_gone_stays_deleted(
    node: Node, number: int, end: Callable[[Node], None]
) -> None:
    keys = stored(node)
    kept = lose(node, number)
    node.namespace().delete(keys)
    end(node)
    bring_back(node, number, kept)
    if number:
        node.drop_index()  # or it says what is gone
    assert not census(start_and_read(node), keys).hits
    end(node)
    (node.run / OWED).unlink()
    node.drop_index()
    assert not census(start_and_read(node), keys).hits, "noted, and erased as well"


@DRIVES
def test_what_nobody_deleted_is_back_with_its_drive(node: Node, number: int) -> None:
    """The control."""
    keys = stored(node)
    kept = lose(node, number)
    node.kill()
    bring_back(node, number, kept)
    node.drop_index()
    assert census(start_and_read(node), keys).hits == set(keys)


def test_with_a_note_that_is_damaged_nothing_is_taken_over(node: Node) -> None:
    keys = stored(node)
    node.kill()
    (node.run / OWED).write_bytes(b"{}")
    node.start(*RAW)
    assert until(lambda: disk(node)["index_state"] == "lost")
    assert "nobody knows what was deleted" in disk(node)["index_reason"]
    assert not census(node.namespace(), keys).hits
    node.kill()
    (node.run / OWED).unlink()
    assert census(start_and_read(node), keys).hits == set(keys), "it was left alone"
