"""One block in two places of the index: its drive was gone for a while, and it was written again elsewhere."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.tier.format import CHUNK_SLOTS, RECORD
from kvstored.index_marks import write_store
from kvstored.index_rebuild import Records, doubled
from tests.core import Core, chain
from tests.drive import FakeDrive
from tests.segments import STORE, Block, block, facts, facts_of, make_segment, opened
from tests.unit.test_disk import SLOTS, begin, fetch, make, successor
from tests.unit.test_disk import put as store
from tests.unit.test_disk_lost import bring_back, lose, segment_of

Place = tuple[int, int]
Rule = Callable[[dict[int, Records]], dict[int, Any]]

OLD, NEW = block(1, 1, 5, generation=10), block(1, 2, 3, generation=10)
OTHERS = [block(2, 1, 6), block(3, 2, 4)]


def committed(directory: Path, blocks: Sequence[Block]) -> None:
    """Segments 1 and 2, with these blocks in their headers and in the index."""
    for segment in (1, 2):
        make_segment(directory, segment, 60, [each for each in blocks if each.header.segment == segment])
    write_store(directory, STORE)
    with opened(directory) as start:
        assert start.commit(blocks)


def records_of(blocks: Sequence[Block], touched_s: Sequence[int]) -> dict[int, Records]:
    records = {number: np.zeros(CHUNK_SLOTS, RECORD) for number in (1, 2)}
    for each, at_s in zip(blocks, touched_s, strict=True):
        record = records[each.header.segment][each.header.slot : each.header.slot + 1]
        record["key"] = np.frombuffer(each.header.key, "<u8")
        record["generation"], record["namespace"], record["touched_s"] = each.header.generation, 1, at_s
    return records


def slots_of(found: dict[int, Any]) -> dict[int, list[int]]:
    return {number: sorted(slots.tolist()) for number, slots in found.items()}


def test_of_one_block_in_two_places_the_newer_one_counts(tmp_path: Path) -> None:
    committed(tmp_path, [OLD, NEW, *OTHERS])
    for _ in range(2):
        with opened(tmp_path) as start:
            assert start.loaded.rebuilt == ""
            assert facts(start.loaded) == facts_of([NEW, *OTHERS])


def test_two_blocks_of_one_key_are_for_the_daemon_to_judge(tmp_path: Path) -> None:
    """The control."""
    both = [OLD, block(1, 2, 3, generation=11), *OTHERS]
    committed(tmp_path, both)
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of(both)


def test_the_one_that_was_touched_later_is_the_newer_one() -> None:
    assert slots_of(doubled(records_of([OLD, NEW], [7, 7]))) == {1: [5]}
    assert slots_of(doubled(records_of([OLD, NEW], [7, 8]))) == {1: [5]}
    assert slots_of(doubled(records_of([OLD, NEW], [8, 7]))) == {2: [3]}, "a slot that was free in an older segment"


def test_a_place_that_cannot_be_used_takes_no_other_away() -> None:
    records = records_of([OLD, NEW], [7, 7])
    assert doubled(records, without=[2]) == {}
    assert slots_of(doubled(records)) == {1: [5]}, "the control"


def test_other_blocks_are_not_doubled() -> None:
    assert doubled({}) == {}
    assert doubled(records_of([OLD, *OTHERS], [7, 7, 7])) == {}
    assert doubled(records_of([OLD, block(9, 2, 3, generation=10)], [7, 7])) == {}


def test_a_million_records_are_looked_through_in_no_time() -> None:
    rng = np.random.default_rng(1)
    records = {number: np.zeros(1000, RECORD) for number in range(1000)}
    for each, generations in zip(records.values(), np.split(rng.permutation(1_000_000), 1000), strict=True):
        each["generation"] = generations + 1
    begin_s = time.process_time()
    assert doubled(records) == {}
    assert time.process_time() - begin_s < 0.5  # 0.02 s
    records[0]["key"] = records[1]["key"] = 3
    records[1]["generation"] = records[0]["generation"]
    assert slots_of(doubled(records)) == {0: list(range(1000))}


def known_twice() -> tuple[Core, bytes, list[bytes], bytes]:
    """A block whose segment vanished and is back, and which was written again meanwhile: the core, that block, what
    continues it where it was, and what continues it where it is.
    """
    core = make(arenas=3)
    client, namespace = begin(core)
    above, former = chain(1, "above"), [chain(1, f"former {i}")[0] for i in range(SLOTS)]
    store(client, namespace, above)
    store(client, namespace, chain(SLOTS - 1, "fill"))
    for key in former:
        store(client, namespace, [key], above[0])
    old = segment_of(core, namespace, above[0])
    assert segment_of(core, namespace, former[0]) != old
    kept = lose(core, old)
    later = chain(1, "later")
    store(client, namespace, later, above[0])
    assert segment_of(core, namespace, above[0]) not in {old, segment_of(core, namespace, former[0])}
    bring_back(core, old, kept)
    return core, above[0], former, later[0]


def reading(monkeypatch: pytest.MonkeyPatch, forget: Rule) -> list[Place]:
    """The next life is told what the index says but for what `forget` gives: these places."""
    whole = FakeDrive.found
    places: list[Place] = []

    def found(drive: FakeDrive) -> Any:
        segments, *more = whole(drive)
        records = {each.segment: each.records for each in segments if isinstance(each.records, np.ndarray)}
        for number, slots in forget(records).items():
            records[number][slots] = np.zeros((), RECORD)
            places.extend((number, slot) for slot in slots.tolist())
        return segments, *more

    monkeypatch.setattr(FakeDrive, "found", found)
    return places


def newer(records: dict[int, Records]) -> dict[int, Any]:
    """Not those that a start takes, but the others."""
    for number, slots in doubled(records).items():
        records[number]["touched_s"][slots] += 3600
    return doubled(records)


@pytest.mark.parametrize("rule", [doubled, newer])
def test_what_continues_it_is_served_wherever_it_was(monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    core, above, former, later = known_twice()
    places = reading(monkeypatch, rule)
    after = successor(core)
    assert len(places) == 1
    client = after.client()
    namespace = client.open()
    for key in [*former, later]:
        assert fetch(client, namespace, [above, key]) == 2
    assert after.store.disk.recovered.orphans == 0
    after.work_all()
    segment, slot = places[0]
    assert all((each.segment, each.slot) != places[0] for each in after.drive.headers()), "erased"
    index = np.frombuffer(after.drive.chunks[segment, slot // CHUNK_SLOTS], RECORD)
    assert not index["generation"][slot % CHUNK_SLOTS], "and forgotten"


def test_without_that_one_of_both_takes_its_children_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    core, *_ = known_twice()
    reading(monkeypatch, lambda _: {})
    assert successor(core).store.disk.recovered.orphans > 1
