"""LOAD and SAVE in the store: what is held while it is copied, and what becomes of blocks that are not."""

import numpy as np

from kvproto.device_frames import Fate
from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore.moving import Held, Saving
from kvstore.sessions import Namespace
from tests.core import BLOCK_BYTES, SECOND, Client, Core, chain, value_of, words

MANY = 200  # chains of one block, more than DRAM has slots


def hold(client: Client, namespace: Namespace, keys: list[bytes]) -> Held:
    held = client.store.moving.lease(client.session, namespace, 1, words(keys), 0, len(keys), 0)
    assert isinstance(held, Held)
    client.core.audit()
    return held


def content(core: Core, held: Held) -> list[bytes]:
    return [core.memory.view(arena)[at : at + BLOCK_BYTES].tobytes() for arena, at, _, _ in held.places]


def crowd_out(client: Client, namespace: Namespace) -> None:
    for number in range(MANY):
        client.put(namespace, chain(1, f"crowd-{number}"))


def finish(core: Core, saving: Saving, *, good: bool = True) -> int:
    """Copy one slice as a thread would, a block's key as its bytes. How many blocks."""
    granted = core.store.moving.reserve(saving)
    for index, copy in granted:
        slot = core.memory.view(copy.arena)[copy.target_offset :][:BLOCK_BYTES]
        slot[:32] = saving.keys[4 * (index + 1) : 4 * (index + 2)].view(np.uint8)
        core.store.moving.copied(saving, copy.ticket, 7 if good else None, Fate.DEVICE)
        core.audit()
    return len(granted)


def test_what_is_copied_stays_when_it_is_deleted_and_its_session_is_gone() -> None:
    core = Core()
    client, other = core.client(), core.client()
    namespace = client.open()
    keys, control = chain(3), chain(3, "control")
    client.put(namespace, keys)
    client.put(namespace, control)
    held = hold(client, namespace, keys)
    released = hold(client, namespace, control)
    places = content(core, held), content(core, released)
    core.store.moving.give_back(released)
    assert places[0] == [value_of(key, BLOCK_BYTES) for key in keys]
    assert not client.session.leases  # nothing that a client could give back
    client.store.delete(namespace, words(keys), 0, 3, lambda _: None)
    core.store.exited(client.session)
    core.pass_time(120 * SECOND)
    crowd_out(other, other.open())
    assert content(core, held) == places[0]
    assert content(core, released) != places[1]  # the control: slots that nobody held are others' now
    core.store.moving.give_back(held)
    core.settle()
    crowd_out(other, other.open())
    assert content(core, held) != places[0]
    core.audit()


def test_a_chain_that_is_not_there_holds_nothing() -> None:
    core = Core()
    client = core.client()
    held = hold(client, client.open(), chain(2))
    assert held.places == []
    core.store.moving.give_back(held)
    core.audit()


def test_a_save_goes_on_where_the_ring_had_no_more_room() -> None:
    core = Core()
    client = core.client(ring_pages=4)
    namespace = client.open()
    keys = chain(10)
    saving = core.store.moving.save(client.session, namespace, None, words(keys))
    slices = [finish(core, saving) for _ in range(4)]
    assert slices == [4, 4, 2, 0]
    assert saving.fates == [Fate.SAVED] * 10
    assert client.match(namespace, keys) == 10
    assert not client.session.tickets
    assert client.session.outcomes == []  # of tickets that no client knows nothing is said
    again = core.store.moving.save(client.session, namespace, keys[1], words([*keys[2:], *chain(1, "b")]))
    assert finish(core, again) == 1
    assert again.fates == [Fate.KNOWN] * 8 + [Fate.SAVED]


def test_what_could_not_be_copied_is_never_there_nor_what_follows_it() -> None:
    core = Core()
    client = core.client(ring_pages=4)
    namespace = client.open()
    keys = chain(6)
    saving = core.store.moving.save(client.session, namespace, None, words(keys))
    finish(core, saving, good=False)
    assert finish(core, saving) == 0
    assert saving.fates == [Fate.DEVICE] * 4 + [Fate.NO_PARENT] * 2
    assert client.match(namespace, keys) == 0
    assert client.put(namespace, keys) == [Grant.GRANTED] * 4 + [Grant.BUSY] * 2
    core.audit()


def test_a_save_of_a_session_that_is_gone_ends_without_a_trace() -> None:
    core = Core()
    client, other = core.client(ring_pages=4), core.client()
    namespace = client.open()
    keys = chain(4)
    saving = core.store.moving.save(client.session, namespace, None, words(keys))
    granted = core.store.moving.reserve(saving)
    core.store.exited(client.session)
    core.settle()
    for _, copy in granted:
        core.store.moving.copied(saving, copy.ticket, 7)
    core.settle()
    core.audit()
    assert client.session.number not in core.store.sessions
    assert other.match(other.open(), keys) == 0


def test_full_draining_and_unknown_parents_are_told_by_name() -> None:
    core = Core(arenas=1, arena_bytes=4 * PAGE_BYTES)
    client = core.client()
    namespace = client.open()
    held = chain(4)
    client.put(namespace, held)
    kept = hold(client, namespace, held)
    full = core.store.moving.save(client.session, namespace, None, words(chain(3, "b")))
    assert core.store.moving.reserve(full) == []
    assert full.fates == [Fate.FULL, Fate.NO_PARENT, Fate.NO_PARENT]
    core.store.moving.give_back(kept)
    lost = core.store.moving.save(client.session, namespace, b"?" * 32, words(chain(2, "b")))
    assert core.store.moving.reserve(lost) == []
    assert lost.fates == [Fate.NO_PARENT] * 2
    core.store.draining = True
    late = core.store.moving.save(client.session, namespace, None, words(chain(2, "b")))
    assert core.store.moving.reserve(late) == []
    assert late.fates == [Fate.DRAINING, Fate.NO_PARENT]
