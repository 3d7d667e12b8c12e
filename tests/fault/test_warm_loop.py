"""Fault 6: a daemon is stopped, or killed, and started again on the memory that it left, again and again.

Whatever was published is asked for after each start, byte by byte; and new blocks go into the kept arenas before that.
What else a warm restart promises, and a few of them in a short time: `tests/integration/test_warm_restart.py`.
"""

from dataclasses import dataclass

import pytest

from tests.figures import Recorder
from tests.node import Node, census, put_roots, roots

BLOCK_BYTES = 64 << 10
PUBLISHED = 300  # blocks, of 512 that memory holds
FRESH = 30  # published in each life
AT_ONCE = 10  # of them before anything else is asked for
RESTARTS = 200
KEPT = {"stop": 1.0, "kill": 0.99}  # of what is published, at least


@dataclass
class Kept:
    """Over all restarts, in blocks."""

    published: int = 0
    served: int = 0
    stored_at_once: int = 0


def restart(end: str, restarts: int) -> Kept:
    """So many, each by this end of the life before."""
    total = Kept()
    with Node(disks=0, dram="32MiB") as node:
        node.start("--keep", "true")
        ns, published = node.namespace(BLOCK_BYTES), roots(("warm", end), PUBLISHED - FRESH)
        put_roots(ns, published, durable=False)
        for turn in range(restarts):
            (node.stop if end == "stop" else node.kill)()
            node.start("--keep", "true")
            ns = node.namespace(BLOCK_BYTES)
            fresh = roots(("fresh", end, turn), FRESH)
            put_roots(ns, fresh[:AT_ONCE], durable=False)
            found = census(ns, published)
            total.published += len(published)
            total.served += len(found.hits)
            total.stored_at_once += len(census(ns, fresh[:AT_ONCE]).hits)
            put_roots(ns, fresh[AT_ONCE:], durable=False)
            published += fresh
            gone, published = published[: len(published) - PUBLISHED], published[-PUBLISHED:]
            if gone:
                assert ns.delete(gone) >= len(found.hits & set(gone))
                assert not census(ns, gone).hits, "the control: what is deleted is not there"
        assert node.log().count("memory: warm=True") == restarts
    return total


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_200_warm_restarts(end: str, record_property: Recorder) -> None:
    total = restart(end, RESTARTS)
    record_property("restarts", RESTARTS)
    record_property("published_blocks", total.published)
    record_property("served_blocks", total.served)
    assert_kept(total, end, RESTARTS)


def assert_kept(total: Kept, end: str, restarts: int) -> None:
    """As much is served as is promised, and kept arenas take new blocks at once."""
    assert total.served >= KEPT[end] * total.published, total
    assert total.published >= (PUBLISHED - FRESH) * restarts
    assert total.stored_at_once == AT_ONCE * restarts
