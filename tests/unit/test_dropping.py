"""Rules of deleting and clearing, and that neither stalls anybody nor loses a row."""

import pytest

from kvproto.errors import Grant, Outcome
from kvproto.limits import PAGE_BYTES
from kvstore.report import ClearReport, ClearScope
from kvstore.sessions import Namespace
from kvstore.sweeps import SLICE_STEPS
from tests.core import ARENA_BYTES, BLOCK_BYTES, SECOND, Client, Core, chain, value_of, words

SLOTS = ARENA_BYTES // PAGE_BYTES
DEEP = SLICE_STEPS + 1000  # more blocks than one slice drops or counts


def clear(core: Core, scope: ClearScope, *, dry_run: bool = False) -> list[ClearReport]:
    """A list that holds the report once it has come."""
    reports: list[ClearReport] = []
    core.store.clear(scope, reports.append, dry_run=dry_run)
    return reports


def deep(core: Core, client: Client, namespace: Namespace, count: int = DEEP) -> list[bytes]:
    """A stored chain longer than a slice."""
    keys = chain(count, "deep")
    for start in range(0, count, 512):
        parent = keys[start - 1] if start else None
        client.put(namespace, keys[start : start + 512], parent)
    assert client.match(namespace, keys[-1:]) == 1
    return keys


def roomy() -> tuple[Core, Client, Namespace]:
    """A store for deep chains."""
    core = Core(arenas=2, arena_bytes=4096 * PAGE_BYTES)
    client = core.client(ring_pages=512)
    return core, client, client.open()


# -- DELETE -----------------------------------------------------------------------------------------------------


def test_delete_while_leased_is_out_of_the_index_at_once_and_freed_by_the_last_release() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(SLOTS)
    client.put(namespace, keys)
    first, second = client.lease(namespace, keys), client.lease(namespace, keys[:1])
    assert client.delete(namespace, keys) == [SLOTS]
    assert client.match(namespace, keys) == 0
    assert client.ask(namespace, keys[3:]) is None
    core.audit()
    assert client.put(namespace, chain(1, "new")) == [Grant.FULL]
    assert [client.read(namespace, first, i) for i in range(SLOTS)] == [value_of(key, BLOCK_BYTES) for key in keys]
    client.release(first)
    core.audit()
    assert client.put(namespace, chain(SLOTS, "new")) == [Grant.GRANTED] * (SLOTS - 1) + [Grant.FULL]
    assert client.read(namespace, second) == value_of(keys[0], BLOCK_BYTES)
    client.release(second)
    assert core.store.tables.book[2] == SLOTS - 1
    core.audit()


def test_a_deleted_key_can_be_stored_again_at_once_while_the_old_bytes_are_still_read() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.put(namespace, keys)
    old = client.lease(namespace, keys)
    client.delete(namespace, keys)
    answer = client.reserve(namespace, keys)[0]
    client.write(namespace, answer.page, value_of(keys[0], BLOCK_BYTES, version=1))
    client.commit([answer.ticket])
    core.finish_all()
    new = client.lease(namespace, keys)
    assert client.read(namespace, old) == value_of(keys[0], BLOCK_BYTES)
    assert client.read(namespace, new) == value_of(keys[0], BLOCK_BYTES, version=1)
    core.audit()


def test_delete_takes_all_that_continues_a_block_and_nothing_else() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(4)
    client.put(namespace, keys)
    client.put(namespace, chain(3, "branch"), parent=keys[2])
    client.put(namespace, chain(3, "other"), parent=keys[0])
    assert client.delete(namespace, [keys[1], keys[1], keys[3]]) == [6]
    assert client.match(namespace, keys) == 1
    assert client.match(namespace, chain(3, "branch")) == 0
    assert client.match(namespace, chain(3, "other")) == 3
    assert client.delete(namespace, [keys[1]]) == [0]
    core.audit()


def test_delete_discards_what_is_being_written() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(3)
    tickets = client.begin(namespace, keys)
    client.commit(tickets[1:])
    assert client.delete(namespace, keys[:1]) == [3]
    core.audit()
    client.commit(tickets[:1])
    core.finish_all()
    assert [client.outcome(ticket) for ticket in tickets] == [Outcome.DISCARDED] * 3
    assert core.store.tables.book[2] == 0
    core.audit()


def test_a_deep_chain_is_dropped_in_slices_and_delete_is_answered_after_the_last() -> None:
    core, client, namespace = roomy()
    keys = deep(core, client, namespace)
    answers = client.delete(namespace, keys[:1])
    assert not answers
    assert client.match(namespace, keys) == 0
    assert core.store.tables.book[2] > 0, "all at once is too long a step"
    core.audit()
    before = int(core.store.tables.book[2])
    while not answers:
        core.store.tick()
        assert before - int(core.store.tables.book[2]) <= SLICE_STEPS
        before = int(core.store.tables.book[2])
    assert answers == [DEEP]
    assert core.store.tables.book[2] == 0
    core.audit()


def test_what_is_stored_under_a_chain_that_is_being_dropped_goes_with_it() -> None:
    core, client, namespace = roomy()
    keys = deep(core, client, namespace)
    answers = client.delete(namespace, keys[:1])
    tickets = client.begin(namespace, chain(2, "late"), parent=keys[-1])
    client.commit(tickets[:1])
    core.settle()
    assert answers == [DEEP + 2]
    client.commit(tickets[1:])
    core.finish_all()
    assert [client.outcome(ticket) for ticket in tickets] == [Outcome.DISCARDED] * 2
    core.audit()
    assert core.store.tables.book[2] == 0


def test_delete_is_answered_only_when_nothing_below_it_hits_any_more_though_another_cut_it_off_first() -> None:
    core = Core(slice_steps=1)
    client, writer = core.client(), core.client()
    namespace, keys = client.open(), chain(8)
    client.put(namespace, keys[:3])
    ticket = writer.begin(writer.open(), keys[:4])
    client.put(namespace, keys[4:], parent=keys[3])
    answers = client.delete(namespace, keys[:1])
    writer.store.abort(writer.session, ticket)  # cuts the end of the chain off before the sweep gets there
    while not answers:
        assert client.match(namespace, keys) == 0
        core.store.tick()
    assert [client.match(namespace, [key]) for key in keys] == [0] * 8
    core.audit()


# -- clear ------------------------------------------------------------------------------------------------------


def scopes(core: Core) -> tuple[Client, Client, Namespace, Namespace, Namespace]:
    """Two tenants; the first has two namespaces, with five blocks each."""
    one, two = core.client("one"), core.client("two")
    a, b, c = one.open(model="a"), one.open(model="b"), two.open(model="a")
    for client, namespace in ((one, a), (one, b), (two, c)):
        client.put(namespace, chain(5))
    return one, two, a, b, c


@pytest.mark.parametrize(
    ("scope", "left"),
    [
        ("everything", (0, 0, 0)),
        ("tenant", (0, 0, 5)),
        ("namespace", (0, 5, 0)),
        ("both", (0, 5, 5)),
        ("keys", (2, 5, 5)),
    ],
)
def test_clear_drops_what_every_part_of_its_scope_names(scope: str, left: tuple[int, int, int]) -> None:
    core = Core(arenas=8)
    one, two, a, b, c = scopes(core)
    meant = {
        "everything": ClearScope(),
        "tenant": ClearScope(tenant="one"),
        "namespace": ClearScope(digest=a.identity.digest()),
        "both": ClearScope(tenant="one", digest=a.identity.digest()),
        "keys": ClearScope("one", a.identity.digest(), tuple(chain(5)[2:3])),  # type: ignore[arg-type]
    }[scope]
    there = 15 - sum(left)
    (dry,) = clear(core, meant, dry_run=True)
    assert (dry.blocks, dry.bytes, dry.dry_run) == (there, there * PAGE_BYTES, True)
    assert (one.match(a, chain(5)), one.match(b, chain(5)), two.match(c, chain(5))) == (5, 5, 5)
    core.audit()
    (real,) = clear(core, meant)
    assert (real.blocks, real.bytes, real.dry_run) == (there, there * PAGE_BYTES, False)
    assert (one.match(a, chain(5)), one.match(b, chain(5)), two.match(c, chain(5))) == left
    core.audit()
    assert core.store.tables.book[2] == sum(left)


def test_clear_counts_what_is_leased_and_what_is_being_written() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(6)
    client.put(namespace, keys[:4])
    held = client.lease(namespace, keys[:3])
    tickets = client.begin(namespace, keys)
    for scope in (ClearScope(), ClearScope(None, namespace.identity.digest(), (keys[0],))):  # type: ignore[arg-type]
        (report,) = clear(core, scope, dry_run=True)
        assert (report.blocks, report.leased_blocks, report.pending_blocks) == (6, 1, 2)
    clear(core, ClearScope())
    assert client.match(namespace, keys) == 0
    assert client.read(namespace, held) == value_of(keys[0], BLOCK_BYTES)
    client.commit(tickets)
    assert [client.outcome(ticket) for ticket in tickets] == [Outcome.DISCARDED] * 2
    client.release(held)
    assert core.store.tables.book[2] == 0
    core.audit()


def test_clear_of_names_that_nobody_has_is_an_error() -> None:
    core = Core()
    for scope in (ClearScope(tenant="nobody"), ClearScope(digest=bytes(32))):  # type: ignore[arg-type]
        with pytest.raises(KeyError):
            clear(core, scope)


def test_clear_of_one_key_named_twice_drops_it_once() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(3)
    client.put(namespace, keys)
    twice = (keys[1], keys[1])
    (report,) = clear(core, ClearScope(None, namespace.identity.digest(), twice))  # type: ignore[arg-type]
    core.settle()
    assert report.blocks == 2
    assert client.match(namespace, keys) == 1
    core.audit()


def test_a_count_that_is_interrupted_by_a_delete_above_it_ends() -> None:
    core, client, namespace = roomy()
    keys = deep(core, client, namespace)
    scope = ClearScope(None, namespace.identity.digest(), (keys[0],))  # type: ignore[arg-type]
    reports = clear(core, scope, dry_run=True)
    assert not reports, "all at once is too long a step"
    core.audit()
    client.delete(namespace, keys[100:101])
    core.audit()
    core.settle()
    assert 100 <= reports[0].blocks <= DEEP
    assert client.match(namespace, keys[:100]) == 100
    assert core.store.tables.book[2] == 100
    core.audit()


def test_a_count_goes_on_where_it_stopped_whatever_the_shape_of_the_tree() -> None:
    core, client, namespace = roomy()
    keys = deep(core, client, namespace, SLICE_STEPS // 2)
    for i in range(0, len(keys), 64):
        client.put(namespace, chain(8, f"branch {i}"), parent=keys[i])
        client.put(namespace, chain(8, f"twig {i}"), parent=keys[i])
    there = int(core.store.tables.book[2])
    scope = ClearScope(None, namespace.identity.digest(), (keys[0],))  # type: ignore[arg-type]
    for dry_run in (True, False):
        reports = clear(core, scope, dry_run=dry_run)
        core.audit()
        core.settle()
        assert reports[0].blocks == there
        core.audit()
    assert core.store.tables.book[2] == 0


def test_a_clear_never_drops_the_block_that_took_the_place_of_a_counted_one() -> None:
    core, client, namespace = roomy()
    other = core.client("other", ring_pages=512)
    keys = deep(core, client, namespace)
    single = chain(1, "single")
    client.put(namespace, single)
    scope = ClearScope("t", namespace.identity.digest(), (keys[0], *single))  # type: ignore[arg-type]
    reports = clear(core, scope)  # counts the deep chain first
    assert not reports
    client.store.detach(client.session)
    row = core.row(namespace, single[0])
    core.store.delete(namespace, words(single), 0, 1, lambda _: None)
    foreign = other.open()
    other.put(foreign, chain(1, "foreign"))
    core.settle()
    assert reports
    assert other.fetch(foreign, chain(1, "foreign")) == 1, f"row {row} was dropped from another tenant"
    core.audit()


def test_a_clear_of_everything_takes_slices_and_leaves_what_is_newer() -> None:
    core, client, namespace = roomy()
    deep(core, client, namespace)
    other = client.open(model="other")
    reports = clear(core, ClearScope(digest=namespace.identity.digest()))
    steps = 0
    while not reports:
        core.store.tick()
        core.audit()
        steps += 1
    assert steps >= 2
    assert core.store.tables.book[2] == 0
    client.put(other, chain(3))
    core.pass_time(SECOND)
    assert client.fetch(other, chain(3)) == 3
