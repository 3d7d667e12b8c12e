"""What a stop waits for, step by step, on a store and a drive that do only what they are told."""

from collections.abc import Iterator
from typing import Any

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstored.standing import Ending, standing, unfinished
from tests.core import SECOND, Core, chain

SEGMENT_BYTES = 18 * PAGE_BYTES


def make(**changes: Any) -> Core:
    limits = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    return Core(arenas=1, disk=limits, **changes)


def until_over(core: Core) -> Iterator[str]:
    """What is unfinished, before each order that the drive carries out, until nothing is."""
    for _ in range(1000):
        core.finish_all()
        core.store.tick()
        left = unfinished(core.store)
        yield left
        if not left:
            return
        if core.drive.waiting:
            core.work()
        else:
            core.clock.ns = max(core.clock.ns, core.store.next_tick_ns() or 0)
    raise AssertionError("it never ends")


def test_a_stop_waits_until_what_was_stored_is_durable() -> None:
    core = make()
    client = core.client()
    namespace = client.open()
    assert unfinished(core.store) == "", "the control: nothing has begun"
    client.put(namespace, chain(4))
    said = list(until_over(core))
    assert "batches are on their way to disk" in said[0]
    assert core.drive.known_blocks() == 4
    assert not core.drive.waiting


def test_a_stop_waits_until_what_was_deleted_is_erased_and_its_client_told() -> None:
    core = make()
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(4))
    core.work_all()
    answers = client.delete(namespace, chain(4))
    assert answers == [], "it takes an order of the drive"
    said = list(until_over(core))
    assert said[0] == "blocks are being dropped"
    assert answers == [4]


def test_a_stop_refuses_what_is_new_waits_for_tickets_and_no_longer_than_it_may() -> None:
    core = make()
    client = core.client()
    namespace = client.open()
    tickets = client.begin(namespace, chain(2))
    began_ns = core.clock.ns
    ending = Ending(core.store, 5.0, began_ns)
    assert standing(core.store, 1).startswith("draining: ")
    assert not ending.over(began_ns)
    assert [one.grant for one in client.reserve(namespace, chain(1, "late"))] == [Grant.DRAINING]
    assert unfinished(core.store) == "2 blocks are being stored"
    assert not ending.over(began_ns + 5 * SECOND - 1)
    assert ending.over(ending.deadline_ns)
    client.commit(tickets)
    assert unfinished(core.store), "they are being copied"
    list(until_over(core))
    assert ending.over(began_ns)
    assert client.match(namespace, chain(2)) == 2
