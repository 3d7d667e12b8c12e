"""What status says of segments that a start could not read: nobody is told to remove what is their own."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvstored.index_marks import OWED
from tests.integration.test_drive_absent import warnings
from tests.integration.test_drive_back import RAW, disk, start_and_read, stored
from tests.node import Node, census, put_roots, roots, until


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(segment="8MiB") as node:
        node.start(*RAW)
        yield node


def lost(node: Node) -> Any:
    """The tier, in a life that begins without an index."""
    node.start(*RAW)
    assert until(lambda: disk(node)["index_state"] == "lost" and disk(node)["state"] == "serving")
    return disk(node)


def test_with_a_note_that_is_damaged(node: Node) -> None:
    keys = stored(node)
    node.kill()
    files = sorted(map(str, node.disks[0].glob("segments/*.seg")))
    note = node.run / OWED
    note.write_bytes(b"{}")
    for _ in range(2):
        tier = lost(node)
        assert (tier["foreign_files"], tier["foreign"]) == (0, [])
        assert (tier["unread_segments"], tier["unread"]) == (len(files), files)
        index, unread = warnings(node)
        assert index.startswith(f"the index on disk is lost ({note} is not what was written (")
        assert index.endswith(": a restart alone changes nothing")
        assert unread.startswith(f"{len(files)} files among the segments could not be read in this life, such as ")
        assert "by hand" not in index + unread
        node.kill()
    note.unlink()
    ns = start_and_read(node)
    assert census(ns, keys).hits == set(keys), "it was left alone"
    assert disk(node)["unread_segments"] == 0
    assert warnings(node) == []


def test_once_blocks_of_their_tenant_are_deleted_they_are_listed_no_more(node: Node) -> None:
    keys = stored(node)
    node.kill()
    (node.run / OWED).write_bytes(b"{}")
    assert lost(node)["unread_segments"]
    ns = node.namespace()
    put_roots(ns, roots("later", 3), durable=False)
    ns.delete(keys[:1])
    assert disk(node)["unread_segments"] == 0
    assert len(warnings(node)) == 1
