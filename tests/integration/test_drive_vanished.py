"""A second drive goes while the daemon runs and is back at the next start: what nobody deleted is served again.

The index is as that life has left it. Where it is made anew is in `test_drive_back`.
"""

import shutil
from collections.abc import Callable, Iterator

import pytest

from kvstored.index_marks import OWED
from tests.integration.test_drive_absent import keys_on
from tests.integration.test_drive_back import RAW, bring_back, disk, lose, start_and_read, stored
from tests.node import Node, census, put_roots, roots, until


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(disks=2, segment="8MiB") as node:
        node.start(*RAW)
        yield node


def forgotten(node: Node) -> bool:
    """Has the daemon emptied what went?"""
    return bool(disk(node)["drives"][1]["segments"] == 0)


@pytest.mark.parametrize("end", [Node.stop, Node.kill])
def test_what_nobody_deleted_is_served_again(node: Node, end: Callable[[Node], None]) -> None:
    keys = set(stored(node))
    there = keys_on(node, 1) & keys
    assert there
    kept = lose(node, 1)
    assert until(lambda: forgotten(node))
    ns = node.namespace()
    assert census(ns, sorted(keys)).hits == keys - there
    later = roots("later", 40)
    put_roots(ns, later)  # durable, with what the index is told of the drive that is gone
    end(node)
    bring_back(node, 1, kept)
    ns = start_and_read(node)
    assert disk(node)["rebuilt"] == ""
    assert census(ns, sorted(keys) + later).hits == keys | set(later)
    assert not (node.run / OWED).exists(), "nobody deleted anything"


def test_after_a_life_without_it_too(node: Node) -> None:
    keys = set(stored(node))
    there = keys_on(node, 1) & keys
    kept = lose(node, 1)
    ns = node.namespace()
    put_roots(ns, roots("later", 40))
    node.kill()
    ns = start_and_read(node)  # an empty folder in its place: what was there is gone, as far as anybody can tell
    assert census(ns, sorted(keys)).hits == keys - there
    more = roots("more", 80)
    put_roots(ns, more)
    node.kill()
    shutil.rmtree(node.disks[1])
    kept.rename(node.disks[1])
    assert census(start_and_read(node), sorted(keys - there)).hits == keys - there


def test_what_was_deleted_meanwhile_is_not(node: Node) -> None:
    keys = set(stored(node))
    there = sorted(keys_on(node, 1) & keys)
    kept = lose(node, 1)
    node.namespace().delete(there[:1])
    later = roots("later", 40)
    put_roots(node.namespace(), later)
    node.kill()
    bring_back(node, 1, kept)
    for _ in range(2):
        ns = start_and_read(node)
        assert not census(ns, there[:1]).hits
        assert census(ns, later).hits == set(later), "the control"
        node.kill()
    node.drop_index()
    assert not census(start_and_read(node), there[:1]).hits


def test_what_was_stored_anew_meanwhile_is_served_as_it_is_now(node: Node) -> None:
    keys = set(stored(node))
    there = sorted(keys_on(node, 1) & keys)
    kept = lose(node, 1)
    assert until(lambda: forgotten(node))
    put_roots(node.namespace(), there[:5], version=1)
    node.kill()
    bring_back(node, 1, kept)
    for _ in range(2):
        ns = start_and_read(node)
        assert census(ns, there[:5], version=1).hits == set(there[:5])
        assert census(ns, there[5:]).hits == set(there[5:])
        node.kill()
        node.drop_index()
