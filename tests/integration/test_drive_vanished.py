"""A second drive goes while the daemon runs and is back at the next start: what nobody deleted is served again.

The index is as that life has left it. Where it is made anew is in `test_drive_back`.
"""

import shutil
from collections.abc import Callable, Iterator

import pytest

from kvstored.index_marks import OWED
from tests.integration.test_drive_absent import keys_on
from tests.integration.test_drive_back import RAW, bring_back, disk, lose, start_and_read, stored
from tests.node import Node, census, chain, put_roots, roots, until, value


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


def fill_up_to(node: Node, drive: int) -> None:
    """The segment that is written to next lies on this one."""
    for number in range(300):
        key = roots(f"filler {drive} {number}", 1)
        put_roots(node.namespace(), key)
        if node.slots()[key[0]].path.is_relative_to(node.disks[drive]):
            return
    raise AssertionError("no segment there")


def test_what_continues_a_block_that_was_written_again_meanwhile_is_served(node: Node) -> None:
    """A shared prefix is known in two places then, and some of what continues it was told the one, some the other."""
    ns = node.namespace()

    def store(keys: list[bytes]) -> None:
        ns.store(keys, [value(key, ns.identity.block_bytes) for key in keys], wait=True, space_s=30)
        assert ns.flush(30).pending == 0

    fill_up_to(node, 1)
    above = chain("above", 1)
    store(above)
    fill_up_to(node, 0)
    former = [chain(f"former {number}", 1) for number in range(20)]
    for key in former:
        store(above + key)
    put_roots(ns, roots("more", 60))  # or their chunk of the index is written again, with the other place
    kept = lose(node, 1)
    assert until(lambda: forgotten(node))
    later = chain("later", 1)
    store(above + later)
    assert node.slots()[above[0]].path.is_relative_to(node.disks[0]), "written again"
    node.stop()
    bring_back(node, 1, kept)
    ns = start_and_read(node)
    assert disk(node)["rebuilt"] == ""
    assert [ns.match(above + key).blocks for key in [*former, later]] == [2] * 21
    assert disk(node)["orphan_blocks"] == 0
