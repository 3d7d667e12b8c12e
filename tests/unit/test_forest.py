"""Trees of runs against a slow model of them, and the copies that they grow from against a store."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvproto.policy_frames import Tier
from kvstore import blocks
from kvstore.insight import forest
from kvstore.insight.forest import HELD, IN_DRAM, ON_DISK, PINNED, Part, choose, grow, joined, slice_of, tags_of
from tests.core import SECOND, Core, chain, words
from tests.unit.test_disk import make


@dataclass
class Run:
    """One run of the model."""

    first: int
    last: int
    parent: "Run | None"
    rows: list[int]
    below: list["Run"] = field(default_factory=list)

    @property
    def level(self) -> int:
        return self.parent.level + 1 if self.parent else 0

    @property
    def before(self) -> int:
        return self.parent.before + len(self.parent.rows) if self.parent else 0

    def all_rows(self) -> list[int]:
        return self.rows + [row for run in self.below for row in run.all_rows()]

    def hits(self, hits: dict[int, int]) -> int:
        return max(*(hits[row] for row in self.rows), sum(run.hits(hits) for run in self.below), 0)

    @property
    def longest(self) -> int:
        return max([self.before + len(self.rows), *(run.longest for run in self.below)])


def model(parents: dict[int, int], start: int = 0) -> dict[int, Run]:
    """All runs by their first row."""
    children: dict[int, list[int]] = {}
    for row, above in parents.items():
        children.setdefault(above, []).append(row)
    runs: dict[int, Run] = {}
    waiting: list[tuple[int, Run | None]] = [(row, None) for row in ([start] if start else children.get(0, []))]
    while waiting:
        first, parent = waiting.pop()
        rows = [first]
        while len(children.get(rows[-1], [])) == 1:
            rows.append(children[rows[-1]][0])
        run = runs[first] = Run(first, rows[-1], parent, rows)
        if parent:
            parent.below.append(run)
        waiting += [(row, run) for row in children.get(rows[-1], [])]
    return runs


def copy_of(parents: dict[int, int], rng: random.Random) -> Part:
    """What would have been copied of such rows, with whatever flags."""
    rows = sorted(parents)
    count = len(rows)
    return Part(
        np.array(rows, dtype=np.uint32),
        np.array([parents[row] for row in rows], dtype=np.uint32),
        np.array([row * 7 for row in rows], dtype=np.uint32),
        np.array([rng.randrange(10_000) for _ in rows], dtype=np.uint32),
        np.array([rng.randrange(31) for _ in rows], dtype=np.uint8),
        np.array([rng.randrange(16) for _ in range(count)], dtype=np.uint8),
    )


def random_parents(rng: random.Random, count: int) -> dict[int, int]:
    """Rows in no order that hang together in chains, bushes and beginnings."""
    rows = rng.sample(range(1, 4 * count), count)
    parents = {rows[0]: 0}
    for at, row in enumerate(rows[1:], start=1):
        kind = rng.random()
        parents[row] = 0 if kind < 0.05 else rows[at - 1] if kind < 0.8 else rng.choice(rows[:at])
    return parents


@pytest.mark.parametrize("seed", range(20))
def test_runs_and_their_sums_are_those_of_a_slow_model(seed: int) -> None:
    rng = random.Random(seed)
    parents = random_parents(rng, rng.randrange(1, 200))
    copy = copy_of(parents, rng)
    start = rng.choice([0, 0, *parents])
    grown, expected = grow(copy, start), model(parents, start)
    runs = grown.runs
    assert grown.changed == 0
    assert {int(copy.rows[at]) for at in runs.first} == expected.keys()
    place = {int(row): at for at, row in enumerate(copy.rows)}
    hits = {int(row): int(copy.hits[at]) for row, at in place.items()}
    depth = 0
    row = parents[start] if start else 0
    while row:
        depth, row = depth + 1, parents[row]
    for at in range(runs.first.size):
        want = expected[int(copy.rows[runs.first[at]])]
        mine = [place[one] for one in want.all_rows()]
        assert int(copy.rows[runs.last[at]]) == want.last
        assert (runs.level[at], runs.length[at], runs.blocks[at]) == (want.level, len(want.rows), len(mine))
        assert runs.before[at] == want.before + depth
        assert runs.longest[at] == want.longest + depth
        assert runs.branches[at] == len(want.below)
        assert runs.hits[at] == want.hits(hits)
        assert runs.age[at] == copy.ages[mine].min()
        for flag, sums in ((IN_DRAM, runs.dram), (ON_DISK, runs.disk), (PINNED, runs.pinned), (HELD, runs.held)):
            assert sums[at] == np.count_nonzero(copy.flags[mine] & flag)


def test_what_hangs_on_a_block_that_is_not_in_the_copy_is_left_out_and_counted() -> None:
    rng = random.Random(1)
    parents = {1: 0, 2: 1, 3: 2, 10: 99, 11: 10, 20: 21, 21: 20}  # a chain, one without its beginning, and a circle
    grown = grow(copy_of(parents, rng))
    assert grown.runs.blocks.tolist() == [3]
    assert grown.changed == 4
    assert grow(copy_of({1: 0, 2: 1}, rng)).changed == 0


def test_a_tree_of_nothing_has_nothing_and_one_of_an_absent_block_is_refused() -> None:
    nothing = copy_of({}, random.Random(1))
    assert grow(nothing).runs.first.size == 0
    assert choose(grow(nothing).runs, "blocks", 8, 8, 64) == []
    with pytest.raises(KeyError, match="went away"):
        grow(copy_of({1: 0}, random.Random(1)), 2)


@pytest.mark.parametrize("by", ["blocks", "hits", "recent"])
def test_the_best_runs_are_listed_each_behind_the_one_it_continues(by: str) -> None:
    rng = random.Random(5)
    runs = grow(copy_of(random_parents(rng, 400), rng)).runs
    worth = {"blocks": runs.blocks, "hits": runs.hits, "recent": -runs.age}[by]
    chosen = choose(runs, by, depth=3, width=4, limit=25)
    assert 4 < len(chosen) <= 25
    assert len(set(chosen)) == len(chosen)
    assert max(runs.level[chosen]) <= 3
    shown = set(chosen)
    for run in chosen:
        siblings = np.flatnonzero(runs.parent == runs.parent[run]).tolist()
        better = [one for one in siblings if worth[one] > worth[run]]
        assert len([one for one in siblings if one in shown]) <= 4
        assert set(better) <= shown, "a better one of the same branching was left out"
        assert runs.parent[run] < 0 or runs.parent[run] in shown
    for place, run in enumerate(chosen):  # before those below it
        if runs.parent[run] >= 0:
            above = next(one for one in reversed(chosen[:place]) if runs.level[one] == runs.level[run] - 1)
            assert above == runs.parent[run]


def test_limits_of_what_is_listed_hold_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grow(copy_of({row: row // 10 for row in range(1, 1000)}, random.Random(2))).runs
    assert runs.first.size == 999, "each has ten branches"
    assert len(choose(runs, "blocks", 0, 100, 100)) == 9
    assert len(choose(runs, "blocks", 8, 2, 1000)) == 2 + 4 + 8
    assert len(choose(runs, "blocks", 8, 100, 7)) == 7


def test_slices_copy_what_belongs_to_the_namespace_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "SLICE_ROWS", 5)
    core = make()
    client = core.client()
    mine, other = client.open(), client.open(model="other")
    keys = chain(12)
    client.put(mine, keys)
    client.put(other, chain(4, "b"))
    core.work_all()
    store = core.store
    client.lease(mine, keys[:3])
    store.pinning.pin(client.session.tenant, mine, words(keys), 0, 5, 60 * SECOND, Tier.DRAM)
    core.clock.advance(7 * SECOND)
    parts, start = [], 1
    while start:
        part, start = slice_of(store.tables, store.pinning, mine.number, start, core.clock.ns)
        parts.append(part)
    copy = joined(parts)
    assert len(parts) > 2
    by_key = {store.tables.blocks["key"][row].tobytes(): at for at, row in enumerate(copy.rows.tolist())}
    assert by_key.keys() == set(keys)
    at = [by_key[key] for key in keys]
    assert copy.rows[at[:-1]].tolist() == copy.parents[at[1:]].tolist()
    assert copy.tags[at].tolist() == tags_of(words(keys).reshape(-1, 4)).tolist()
    flags = copy.flags[at]
    assert np.flatnonzero(flags & PINNED).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(flags & HELD).tolist() == [2, 4], "the ends of the lease and of the pin"
    assert (flags & IN_DRAM).all()
    assert (flags & ON_DISK).all()
    assert (copy.ages == 7 * 100).all() or copy.ages.min() >= 700
    assert not np.isin(store.tables.blocks["namespace"][copy.rows], [other.number]).any()
    assert grow(copy).runs.pinned.tolist() == [5]


def test_blocks_that_are_only_on_disk_or_only_in_memory_are_told_apart() -> None:
    core = make(arenas=1)
    client = core.client()
    namespace = client.open()
    for name in range(6):  # more than fits
        client.put(namespace, chain(8, name))
        core.work_all()
    store = core.store
    copy, end = slice_of(store.tables, store.pinning, namespace.number, 1, core.clock.ns)
    assert end == 0
    states = store.tables.blocks["state"][copy.rows]
    alone = states == blocks.DISK
    assert 0 < np.count_nonzero(alone) < copy.rows.size
    assert ((copy.flags & IN_DRAM == 0) == alone).all()
    assert (copy.flags[alone] & ON_DISK).all()


def test_a_block_that_is_being_written_counts_and_a_dropped_one_does_not() -> None:
    core = Core()
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(3))
    client.begin(namespace, chain(2, "writing"))
    held = client.lease(namespace, chain(3))
    copy, _ = slice_of(core.store.tables, core.store.pinning, namespace.number, 1, core.clock.ns)
    assert copy.rows.size == 5
    core.store.delete(namespace, words(chain(3)), 0, 1, lambda _: None)
    core.settle()
    left, _ = slice_of(core.store.tables, core.store.pinning, namespace.number, 1, core.clock.ns)
    assert left.rows.size == 2, "the leased ones are doomed"
    assert (left.flags & IN_DRAM == 0).all()
    client.release(held)


def test_a_block_costs_no_more_than_it_is_said_to() -> None:
    copy = copy_of({row: row - 1 for row in range(1, 1001)}, random.Random(3))
    assert sum(column.itemsize for column in copy) == 18
    runs = grow(copy).runs
    assert sum(column.itemsize for column in runs) <= 4 * 4 + 11 * 8
