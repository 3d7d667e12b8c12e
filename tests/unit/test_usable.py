"""What consumers of hashes are told where several namespaces of one model have the same keys: what all ranks have."""

from collections import Counter
from random import Random
from typing import Final

import pytest

from kvproto.identity import NamespaceIdentity
from kvproto.limits import PAGE_BYTES
from kvstore import announcing, blocks
from kvstore.announcing import IN_REMOTE, Announcing, Told
from kvstore.beyond import Beyond
from kvstore.evicting import evict
from kvstore.report import ClearScope
from kvstore.rules import Tier
from kvstore.sessions import Namespace
from kvstore.tier.remote_format import TENANT_DIGEST_BYTES, Place
from tests.core import BLOCK_BYTES, Client, Core, chain
from tests.unit.test_announcing import IN_DRAM, ON_DISK, disk

TIERS: Final = (IN_DRAM, ON_DISK, int(IN_REMOTE))


def rank(client: Client, number: int, of: int = 2, layout: str = "l", model: str = "m") -> Namespace:
    identity = NamespaceIdentity(model, "e", layout, "bf16", 16, BLOCK_BYTES, tp_rank=number, tp_size=of)
    return client.store.open(client.session, identity)


def beyond_of(namespace: Namespace) -> Place:
    """Where it lies beyond the host."""
    return Place(namespace.tenant.name.encode().ljust(TENANT_DIGEST_BYTES, b"."), namespace.digest)


class Consumer:
    """Counts, as llm-d's indexer and Dynamo's router do; for one that keeps a set no count may ever be but 0 and 1."""

    def __init__(self, core: Core, *, by_model: bool = True) -> None:
        self.core = core
        self.beyond = Beyond()
        self.counts: Counter[tuple[str, str, bytes, int]] = Counter()
        self.by_model = by_model
        self.cleared = self.changes = 0
        self.announcing = Announcing(core.store, (1, 2), self.tell, self.beyond, by_model=by_model)
        core.store.forgotten = self.announcing.forgotten

    def tell(self, told: Told) -> bool:
        if told.cleared:
            self.cleared += 1
            self.counts = Counter({name: count for name, count in self.counts.items() if name[0] != told.cleared})
        for change in told.changes:
            place = told.places[int(change["namespace"])]
            was, now = int(change["usable_was"]), int(change["usable_now"])
            self.changes += 1
            for tier in TIERS:
                name = place.tenant, place.model if self.by_model else "", change["key"].tobytes(), tier
                if now & ~was & tier:
                    assert not self.counts[name], "told twice"
                    self.counts[name] = 1
                if was & ~now & tier:
                    assert self.counts[name] == 1, "taken back and was not told"
                    self.counts[name] = 0
        return True

    def look(self, passes: int = 2) -> None:
        until = self.announcing.passes + passes
        while self.announcing.passes < until:
            self.announcing.look(self.announcing.due_ns)

    def has(self, *keys: bytes, tier: int = IN_DRAM) -> list[bool]:
        found = {name[2] for name, count in self.counts.items() if count and name[3] == tier}
        return [key in found for key in keys]

    def told(self) -> set[tuple[str, str, bytes, int]]:
        return {name for name, count in self.counts.items() if count}

    def truth(self) -> set[tuple[str, str, bytes, int]]:
        """As the tables have it, by brute force."""
        registry = self.core.store.registry
        held: dict[int, set[tuple[bytes, int]]] = {space.number: set() for space in registry.namespaces.values()}
        table = self.core.store.tables.blocks
        for row in range(1, int(self.core.store.tables.book[blocks.UNUSED_ROW])):
            one = table[row]
            if one["state"] in (blocks.RESIDENT, blocks.KEPT):
                held[int(one["namespace"])].add((one["key"].tobytes(), IN_DRAM))
            there = one["state"] in (blocks.RESIDENT, blocks.KEPT, blocks.DISK, blocks.LOADING)
            if there and one["disk"] and not one["flags"] & blocks.SAVING:
                held[int(one["namespace"])].add((one["key"].tobytes(), ON_DISK))
        for number, far in self.beyond._spaces.items():
            held[number] |= {(key, int(IN_REMOTE)) for key in far.there}
        forms: dict[tuple[str, str, str, int], list[int]] = {}
        for space in registry.namespaces.values():
            identity = space.identity
            of = space.tenant.name, identity.model, identity.layout, identity.tp_size
            forms.setdefault(of, []).append(space.number)
        found = set()
        for (tenant, model, _, _), numbers in forms.items():
            for key, tier in set.intersection(*(held[number] for number in numbers)):
                found.add((tenant, model if self.by_model else "", key, tier))
        return found


def test_a_block_is_told_when_the_last_rank_has_it_and_taken_back_when_the_first_loses_it() -> None:
    core = Core()
    consumer, client = Consumer(core), core.client()
    ranks, keys = [rank(client, number) for number in range(2)], chain(3)
    client.put(ranks[0], keys)
    consumer.look()
    assert consumer.has(*keys) == [False] * 3, "one rank's are no use"
    client.put(ranks[1], keys[:2])
    consumer.look()
    assert consumer.has(*keys) == [True, True, False]
    client.delete(ranks[0], keys[1:])
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [True, False, False]
    client.delete(ranks[1], keys)
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [False] * 3
    assert not consumer.cleared


def test_what_all_ranks_change_between_two_looks_is_told_once() -> None:
    core = Core()
    consumer, client = Consumer(core), core.client()
    ranks, keys = [rank(client, number, 4) for number in range(4)], chain(3)
    for one in ranks:
        client.put(one, keys)
    consumer.look()
    assert consumer.has(*keys) == [True] * 3
    for one in ranks:
        client.delete(one, keys)
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [False] * 3


def test_of_two_forms_of_a_model_one_is_enough() -> None:
    core = Core()
    consumer, client = Consumer(core), core.client()
    alone, keys = rank(client, 0, 1, "other"), chain(1)
    ranks = [rank(client, number) for number in range(2)]
    for one in (alone, *ranks):
        client.put(one, keys)
    consumer.look()
    client.delete(alone, keys)
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [True], "the two ranks have it"
    client.put(alone, keys)
    client.delete(ranks[0], keys)
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [True]
    client.delete(alone, keys)
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [False], "one rank alone"


def test_tenants_and_models_are_told_apart_unless_all_models_have_one_name() -> None:
    for by_model in (True, False):
        core = Core()
        consumer, client = Consumer(core, by_model=by_model), core.client()
        first, second = rank(client, 0, 1, model="first"), rank(client, 0, 1, model="second")
        other = rank(core.client("two"), 0, 1, model="first")
        (key,) = chain(1)
        for one in (first, second):
            client.put(one, [key])
        consumer.look()
        assert len(consumer.told()) == (2 if by_model else 1)
        client.delete(first, [key])
        core.settle()
        consumer.look()
        assert [name[:2] for name in consumer.told()] == [(first.tenant.name, "second" if by_model else "")]
        assert other.tenant is not first.tenant


def test_a_rank_that_comes_late_has_all_of_its_tenant_told_anew() -> None:
    core = Core()
    consumer, client = Consumer(core), core.client()
    first, keys = rank(client, 0), chain(3)
    client.put(first, keys)
    consumer.look()
    assert consumer.has(*keys) == [True] * 3, "it is the only one here: the others may be of another host"
    second = rank(client, 1)
    consumer.look()
    assert consumer.has(*keys) == [False] * 3
    assert consumer.cleared == 1
    client.put(second, keys)
    consumer.look()
    assert consumer.has(*keys) == [True] * 3
    rank(client, 0, 1, "another form")
    consumer.look()
    assert consumer.cleared == 1, "the control"


def test_what_was_made_void_in_one_word_makes_nothing_usable_until_it_is_told_again() -> None:
    core = Core()
    consumer, client = Consumer(core), core.client()
    alone, ranks, keys = rank(client, 0, 1, "other"), [rank(client, number) for number in range(2)], chain(1)
    for one in (ranks[0], alone, ranks[1]):  # in the order of their rows
        client.put(one, keys)
    consumer.look()
    consumer.announcing.tell_anew(client.session.tenant.name)
    assert consumer.has(*keys) == [False]
    consumer.look()
    assert consumer.has(*keys) == [True]
    client.delete(alone, keys)
    core.settle()
    consumer.look()
    assert consumer.has(*keys) == [True]


def test_what_lies_beyond_the_host_is_usable_by_all_ranks_too() -> None:
    core = Core()
    consumer, client = Consumer(core), core.client()
    ranks, keys = [rank(client, number) for number in range(2)], chain(2)
    remote = int(IN_REMOTE)
    for one in ranks:
        consumer.look()
        assert consumer.has(*keys, tier=remote) == [False] * 2
        consumer.beyond.note(one, beyond_of(one), keys)
    consumer.look()
    assert consumer.has(*keys, tier=remote) == [True] * 2
    consumer.beyond.withdraw(ranks[0].number, keys[:1])
    consumer.beyond.withdraw(ranks[1].number, keys[:1])
    consumer.look()
    assert consumer.has(*keys, tier=remote) == [False, True]
    assert consumer.told() == consumer.truth()


def test_many_rows_of_one_key_are_looked_at_a_few_at_a_time() -> None:
    count = 200  # and as many rows are looked at for each of them
    core = Core(arenas=16)
    consumer, client = Consumer(core), core.client()
    ranks, (key,) = [rank(client, number, count) for number in range(count)], chain(1)
    for one in ranks:
        client.put(one, [key])
    consumer.look()
    assert consumer.has(key) == [True]
    for one in ranks:
        client.delete(one, [key])
    core.settle()
    before = consumer.changes
    consumer.announcing.look(consumer.announcing.due_ns)
    assert 0 < consumer.changes - before < count
    consumer.look()
    assert consumer.changes - before == count
    assert consumer.told() == set()


def test_a_rank_whose_number_goes_to_another_namespace_is_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.registry.NAMESPACES_PER_TENANT", 2)
    core = Core()
    consumer, stays, goes = Consumer(core), core.client(), core.client()
    first, second, keys = rank(stays, 0), rank(goes, 1), chain(2)
    stays.put(first, keys)
    goes.put(second, keys[:1])
    consumer.look()
    assert consumer.has(*keys) == [True, False]
    goes.delete(second, keys)
    core.settle()
    core.store.detach(goes.session)
    third = rank(stays, 0, 1, "another form")
    assert third.number == second.number
    consumer.look()
    assert consumer.has(*keys) == [True, True]
    stays.put(third, chain(1, "b"))
    consumer.look()
    assert consumer.told() == consumer.truth()
    assert consumer.has(*chain(1, "b")) == [True]


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_a_consumer_ends_up_with_what_all_ranks_have(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {seed}")
    random = Random(seed)
    monkeypatch.setattr(announcing, "SLICE_ROWS", 7)
    core = Core(arenas=4, disk=disk(2) if seed % 2 else None)
    consumer = Consumer(core, by_model=seed % 3 > 0)
    clients = [core.client("one"), core.client("two")]
    forms = [(0, 2, "l"), (1, 2, "l"), (0, 1, "other"), (0, 2, "third"), (1, 2, "third")]
    late = 120 if seed % 2 else 0
    most = 0
    spaces = [[rank(client, *form) for form in (forms[:1] if late else forms)] for client in clients]
    for turn in range(400):
        which = random.randrange(2)
        client, namespace = clients[which], random.choice(spaces[which])
        if turn == late and late:
            spaces = [[rank(client, *form) for form in forms] for client in clients]
        keys = chain(random.randint(1, 4), random.randrange(4))
        place = beyond_of(namespace)
        match random.randrange(9):
            case 0 | 1 | 2 | 3:
                client.put(namespace, keys)
            case 4:
                client.delete(namespace, keys[random.randrange(len(keys)) :])
            case 5:
                evict(core.store, ClearScope(), Tier.DRAM, PAGE_BYTES, lambda _: None, dry_run=False)
            case 6:
                consumer.beyond.note(namespace, place, keys)
            case 7:
                consumer.beyond.withdraw(namespace.number, keys if random.random() < 0.9 else ())
            case 8 if random.random() < 0.2:
                scope = ClearScope(random.choice(["one", "two"]))
                core.store.clear(scope, lambda _: None, dry_run=False)
                consumer.announcing.clearing(scope, 0)
        if random.random() < 0.3:
            core.settle()
            if seed % 2:
                core.work_all()
        consumer.announcing.look(consumer.announcing.due_ns)
        most = max(most, len(consumer.told()))
    core.settle()
    consumer.look(3)
    assert consumer.told() == consumer.truth()
    assert most > 5, "the control: something was there"
