"""The compiled tables against plain Python: the hash, the index, the order of the leaf list, and bounded steps."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.audit import EXACT_ORDER, audit
from kvstore.blocks import Index
from tests.core import MS, Client, Core, chain, key_of, words

MASK = (1 << 64) - 1


def siphash_reference(seed: bytes, message: bytes, compressions: int, finalizations: int) -> int:
    """SipHash-c-d as its paper has it (Aumasson and Bernstein, 2012), on bytes."""

    def left(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (64 - bits))) & MASK

    def turn(times: int) -> None:
        for _ in range(times):
            v[0] = (v[0] + v[1]) & MASK
            v[1] = left(v[1], 13) ^ v[0]
            v[0] = left(v[0], 32)
            v[2] = (v[2] + v[3]) & MASK
            v[3] = left(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & MASK
            v[3] = left(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & MASK
            v[1] = left(v[1], 17) ^ v[2]
            v[2] = left(v[2], 32)

    k0, k1 = int.from_bytes(seed[:8], "little"), int.from_bytes(seed[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]
    whole = len(message) // 8 * 8
    tail = message[whole:] + bytes(7 - len(message) % 8) + bytes([len(message) & 0xFF])
    for at in range(0, whole + 8, 8):
        word = int.from_bytes((message[:whole] + tail)[at : at + 8], "little")
        v[3] ^= word
        turn(compressions)
        v[0] ^= word
    v[2] ^= 0xFF
    turn(finalizations)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_reference_of_siphash_gives_the_value_that_its_paper_publishes() -> None:
    assert siphash_reference(bytes(range(16)), bytes(range(15)), 2, 4) == 0xA129CA6149BE45E5


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(seed=st.binary(min_size=16, max_size=16), message=st.binary(min_size=40, max_size=40))
def test_siphash_agrees_with_its_reference(seed: bytes, message: bytes) -> None:
    found = blocks.siphash(*np.frombuffer(seed + message, dtype=np.uint64))
    assert int(found) == siphash_reference(seed, message, 1, 3)


# -- index ------------------------------------------------------------------------------------------------------


class Keys:
    """The index of one tenant against a dict, without slots and trees."""

    def __init__(self, rows: int, buckets: int, seed: int = 1) -> None:
        core = Core(arenas=1, arena_bytes=rows * PAGE_BYTES)
        self.tables = core.store.tables
        shape = np.array([8, 0, 0, seed, seed + 1], dtype=np.uint64)
        self.index = Index(np.zeros(buckets, dtype=np.uint32), shape)
        self.expected: dict[bytes, int] = {}

    def insert(self, key: bytes, row: int) -> None:
        """A new key."""
        self.tables.blocks[row]["key"] = words([key])
        self.tables.blocks[row]["namespace"] = 1
        blocks._insert(self.tables, self.index, row)
        self.expected[key] = row

    def remove(self, key: bytes) -> None:
        """A key that is there."""
        blocks._remove(self.tables, self.index, self.expected.pop(key))

    def find(self, key: bytes, namespace: int = 1) -> int:
        """Its row, or 0."""
        return int(blocks.find_one(self.tables, self.index, namespace, words([key]), 0))

    def longest(self) -> int:
        """The longest chain of a bucket."""
        following = self.tables.blocks["chain"].tolist()
        longest = 0
        for head in self.index.heads[self.index.heads != 0].tolist():
            length, row = 0, head
            while row:
                length, row = length + 1, following[row]
            longest = max(longest, length)
        return longest


def test_the_index_agrees_with_a_dict_while_it_grows_to_100_000_keys_and_shrinks() -> None:
    rng = random.Random(7)
    keys = Keys(rows=120_000, buckets=1 << 18)
    names = [rng.randbytes(32) for _ in range(100_000)]
    for row, key in enumerate(names, start=1):
        keys.insert(key, row)
    assert int(keys.index.shape[2]) == 100_000
    assert int(keys.index.shape[0] + keys.index.shape[1]) >= 100_000, "a bucket a block"
    assert keys.longest() < 12
    assert all(keys.find(key) == row for key, row in keys.expected.items())
    assert not any(keys.find(rng.randbytes(32)) for _ in range(10_000))
    assert not any(keys.find(key, namespace=2) for key in names[:1000])
    gone = rng.sample(names, 90_000)
    for key in gone:
        keys.remove(key)
    assert not any(keys.find(key) for key in gone)
    assert all(keys.find(key) == row for key, row in keys.expected.items())
    assert int(keys.index.shape[2]) == 10_000


def test_every_insert_splits_at_most_one_bucket() -> None:
    keys = Keys(rows=3000, buckets=1 << 14)
    sizes = []
    for row in range(1, 2500):
        keys.insert(key_of(row), row)
        sizes.append(int(keys.index.shape[0] + keys.index.shape[1]))
    assert all(0 <= after - before <= 1 for before, after in pairwise(sizes))


def test_an_index_at_its_largest_takes_more_keys_into_longer_chains() -> None:
    keys = Keys(rows=300, buckets=32)
    for row in range(1, 257):
        keys.insert(key_of(row), row)
    assert int(keys.index.shape[0] + keys.index.shape[1]) == 32
    assert all(keys.find(key) == row for key, row in keys.expected.items())


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=1, max_size=120), seed=st.integers(0, 1 << 32)
)
def test_any_sequence_of_inserts_and_removals_agrees_with_a_dict(steps: list[tuple[bool, int]], seed: int) -> None:
    keys = Keys(rows=64, buckets=64, seed=seed)
    free = list(range(1, 65))
    for adds, number in steps:
        key = key_of(number)
        if adds and key not in keys.expected:
            keys.insert(key, free.pop())
        elif not adds and key in keys.expected:
            free.append(keys.expected[key])
            keys.remove(key)
        assert [keys.find(key_of(each)) for each in range(41)] == [
            keys.expected.get(key_of(each), 0) for each in range(41)
        ]


def test_tenants_have_seeds_of_their_own() -> None:
    core = Core()
    one, two = core.client("one"), core.client("two")
    assert one.session.tenant.index.shape[3:].tolist() != two.session.tenant.index.shape[3:].tolist()


# -- leaf list --------------------------------------------------------------------------------------------------


def leaves(core: Core, client: Client) -> list[int]:
    """When each listed block was last touched, from the oldest on."""
    found, row = [], int(core.store.tables.pools[client.open().pool.number]["oldest"][0])
    while row:
        found.append(int(core.store.tables.blocks[row]["touched"]))
        row = int(core.store.tables.blocks[row]["newer"])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_relisting_puts_a_block_where_its_last_touch_belongs(seed: int) -> None:
    rng = random.Random(seed)
    core = Core(arenas=1, arena_bytes=256 * PAGE_BYTES)
    client = core.client(ring_pages=256)
    namespace, keys = client.open(), chain(120, "parents")
    for key in keys:
        core.clock.advance(MS)
        client.put(namespace, [key])
    children = [key_of(("child", i)) for i in range(120)]
    for parent, child in rng.sample(list(zip(keys, children, strict=True)), 120):
        core.clock.advance(MS)
        client.put(namespace, [child], parent)
    for child in rng.sample(children, 60):  # their parents become leaves again, each as old as it is
        client.delete(namespace, [child])
        ages = leaves(core, client)
        assert ages == sorted(ages)
    assert len(leaves(core, client)) == 120
    audit(core.store)


def test_relisting_among_very_many_leaves_is_approximate_and_keeps_them_all() -> None:
    core = Core(arenas=1, arena_bytes=4096 * PAGE_BYTES)
    client = core.client(ring_pages=512)
    namespace, keys = client.open(), chain(1500, "flat")
    for key in keys:
        core.clock.advance(MS)
        client.put(namespace, [key])
    middle = keys[750]
    client.put(namespace, chain(1, "child"), parent=middle)
    client.delete(namespace, chain(1, "child"))
    ages = leaves(core, client)
    assert len(ages) == 1500 > EXACT_ORDER
    assert sum(before > after for before, after in pairwise(ages)) <= 1
    audit(core.store)


# -- what an audit is worth -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row", "field", "change"),
    [
        ("blocks", 2, "holds", 1),
        ("blocks", 2, "parent", 2),
        ("blocks", 2, "flags", 1),
        ("blocks", 3, "slot", 1),
        ("blocks", 3, "state", 1),
        ("blocks", 1, "first_child", 1),
        ("blocks", 1, "chain", 1),
        ("blocks", 2, "namespace", 1),
        ("slots", 1, "block", 1),
        ("arenas", 0, "used", 1),
        ("arenas", 0, "held", 1),
        ("arenas", 0, "open", 1),
        ("arenas", 0, "draining", 1),
        ("pools", 0, "blocks", 1),
        ("pools", 0, "listed", 1),
        ("pools", 0, "oldest", 1),
        ("pools", 0, "newest", 1),
        ("pools", 0, "filled", 1),
        ("pools", 0, "members", 1),
        ("blocks", 3, "queue", 1),
    ],
)
def test_an_audit_finds_a_flipped_field(table: str, row: int, field: str, change: int) -> None:
    core = Core(arenas=1)
    client = core.client()
    client.put(client.open(), chain(3))
    audit(core.store)
    getattr(core.store.tables, table)[row][field] ^= change
    with pytest.raises((AssertionError, KeyError, IndexError)):
        audit(core.store)
