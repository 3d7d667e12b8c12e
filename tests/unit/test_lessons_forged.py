"""What a former life hands over may be damaged, or forged: what cannot be is refused, and nothing else is lost."""

import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from kvproto.policy_frames import Tier
from kvstore.hints.gaps import Gaps
from kvstore.hints.limits import NAME_CHARS, SECOND_NS
from kvstore.hints.refusal import Refusal, Refused
from kvstore.learned import _HEAD, _RECORD, SEQUENCE_MAX, Learned, Thing
from tests.core import Core, chain
from tests.unit.test_lessons import gaps, learn
from tests.unit.test_restart import successor

Content = bytes
SEEDS = range(400)


def knows() -> tuple[Core, dict[str, Content]]:
    """A store that has learned something of everything, and what of."""
    core = Core(arenas=2)
    learn(core)
    namespace = next(iter(core.store.namespaces.values()))
    for number in range(20):
        core.store.costing.report_load(namespace, Tier.DRAM, (1 << 20) + 1000 * number, 0.001)
        core.store.costing.report_load(namespace, Tier.DISK, (1 << 20) + 1000 * number, 0.002)
    for number in range(60):  # more than there is room for
        core.client("a").put(namespace, chain(1, f"pushes {number}"))
        core.store.tick()
    contents = {thing.name: thing.content_of() for thing in core.store.lessons.things()}
    contents["reads"] = contents["way/1/a"]
    assert {name.split("/")[0] for name in contents} >= {"gaps", "profile", "way", "reads", "reuse"}
    return core, contents


def written(sequence: int, records: dict[str, Content]) -> bytes:
    """A half of the table as `Learned` has it, and whole."""
    body = b"".join(_RECORD.pack(len(name.encode()), 0, len(c)) + name.encode() + c for name, c in records.items())
    digest = xxhash.xxh3_64(body)
    digest.update(_HEAD.pack(sequence, len(body), 0))
    return _HEAD.pack(sequence, len(body), digest.intdigest()) + body


def summed(content: Content) -> Content:
    """With the checksum that it should have at its end."""
    return content[:-8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(content[:-8]))


NAMES: dict[str, str] = {
    "profile/" + "9" * 5000: "profile/1",
    "profile/" + "1" * 10: "profile/1",
    "profile/\N{SUPERSCRIPT TWO}": "profile/1",
    "profile/1/a": "profile/1",
    "reuse/" + "9" * 5000: "reuse/0",
    "reads/9/a": "way/1/a",
    "reads/1/a": "way/1/a",
    "reads/": "way/1/a",
    "way/9/a": "way/1/a",
    "way/1/nobody": "way/1/a",
    "way/1": "way/1/a",
    "turns/x": "turns",
    "gaps": "gaps/a",
    "gaps/": "gaps/a",
    "gaps/\0": "gaps/a",
    "gaps/" + "x" * (NAME_CHARS + 1): "gaps/a",
    "gaps/nobody": "profile/1",
    "": "gaps/a",
    "/": "gaps/a",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_what_has_no_name_of_ours_is_refused_and_the_rest_is_taken(name: str) -> None:
    core, contents = knows()
    heir = Core(arenas=2, memory=core.memory.successor(), clock=core.clock)
    tenants = list(heir.store.tenants)
    rest = {"gaps/a": contents["gaps/a"]}
    content = contents.get(NAMES[name], b"\0" * 24)
    assert heir.store.lessons.take_over({name: content}) == 0
    assert heir.store.lessons.take_over(rest) == 1
    assert list(heir.store.tenants) == tenants, "nobody comes of it"
    heir.audit()


@pytest.mark.parametrize("sequence", [SEQUENCE_MAX + 1, 2**64 - 2, 2**64 - 1])
def test_a_table_of_more_rounds_than_there_can_have_been_is_damaged_and_written_anew(
    sequence: int,
) -> None:
    forged = np.frombuffer(written(sequence, {"a": b"y"}), np.uint8)
    for others in (written(6, {"a": b"x"}), b""):
        table = np.zeros(1 << 16, dtype=np.uint8)
        table[: len(others)] = np.frombuffer(others, np.uint8)
        begin = 1 << 15 if others else (1 << 15) * (sequence & 1)
        table[begin : begin + forged.size] = forged
        learned = Learned(table, lambda: [Thing("b", 1, lambda: b"z")])
        assert learned.read() == ({"a": b"x"} if others else {})
        assert learned.damaged is not bool(others)
        learned.save()
        assert Learned(table, list).read() == {"b": b"z"}


def test_a_round_that_lies_where_nobody_writes_it_is_none() -> None:
    for sequence in (8, 9):
        half = np.frombuffer(written(sequence, {"a": b"y"}), np.uint8)
        table = np.zeros(1 << 16, dtype=np.uint8)
        begin = (1 << 15) * (1 - (sequence & 1))
        table[begin : begin + half.size] = half
        learned = Learned(table, list)
        assert (learned.read(), learned.damaged) == ({}, True)


def test_a_store_that_is_handed_forged_lessons_starts_warm_without_them_and_says_so() -> None:
    core, contents = knows()
    namespace = next(iter(core.store.namespaces.values()))
    before = gaps(core)
    forged = {name: contents.get(good, b"\0" * 24) for name, good in NAMES.items()}
    table = core.memory.tables["learned"]
    for sequence in (2, 2**64 - 1):
        half = written(sequence, forged | {"gaps/a": contents["gaps/a"]})
        table[:] = 0
        begin = table.size // 2 * (sequence & 1)
        table[begin : begin + len(half)] = np.frombuffer(half, np.uint8)
        later = successor(core)
        assert later.store.kept.warm
        assert later.store.kept.blocks == core.store.tables.census[namespace.number]
        (said,) = [fault for fault in later.store.kept.faults if "lessons" in fault]
        if sequence == 2:
            assert said == f"lessons: {len(NAMES)} of {len(NAMES) + 1} do not fit any more"
            assert gaps(later) == before
        later.store.learned.save()
        later.audit()


def huge_counts(content: Content) -> Content:
    """Of the row of all tools."""
    at = 4 + 2 + 2 + 4 + 7 * 8
    return summed(content[:at] + struct.pack("<2f", 3e38, 3e38) + content[at + 8 :])


def huge_turns(content: Content) -> Content:
    """The sums over turns."""
    return summed(content[:12] + struct.pack("<7d", *[1e308] * 7) + content[68:])


def negative_turns(content: Content) -> Content:
    """The same."""
    return summed(content[:12] + struct.pack("<7d", 10, 10, -1, 1, 1, 1, 1) + content[68:])


@pytest.mark.parametrize("forge", [huge_counts, huge_turns, negative_turns])
def test_gaps_that_nobody_can_have_counted_are_refused(forge: Callable[[Content], Content]) -> None:
    _core, contents = knows()
    assert isinstance(Gaps.from_bytes(contents["gaps/a"]), Gaps)
    assert Gaps.from_bytes(forge(contents["gaps/a"])) == Refused(Refusal.DAMAGED)


def test_loads_that_nobody_can_have_reported_are_refused() -> None:
    core, contents = knows()
    good = contents["way/1/a"]
    lessons, costing = core.store.lessons, core.store.costing
    costing._ways.clear()
    reports = good.index(struct.pack("<Q", 20))
    assert lessons.take_over({"way/1/a": summed(good[:reports] + b"\xff" * 8 + good[reports + 8 :])}) == 0
    assert lessons.take_over({"way/1/a": good}) == 1


def bent(content: Content, rng: random.Random) -> Content:
    """A few places of it are otherwise, and its checksum is mostly right again."""
    numbers = [struct.pack("<d", x) for x in (1e308, -1e308, float("nan"), float("inf"), 5e-324)]
    numbers += [struct.pack("<f", x) for x in (3e38, -1.0, float("nan"))] + [b"\xff" * 8, bytes(8)]
    written = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(written))
        how = rng.randrange(4)
        if how == 0:
            written[at] = rng.choice((0, 1, 127, 128, 255))
        elif how == 1:
            at, number = at // 4 * 4, rng.choice(numbers)
            written[at : at + len(number)] = number[: len(written) - at]
        elif how == 2:
            written[at:at] = rng.randbytes(rng.randrange(40))
        elif len(written) > 60:
            del written[at : at + rng.randrange(40)]
    return summed(bytes(written)) if rng.random() < 0.9 else bytes(written)


def test_whatever_is_bent_is_refused_or_of_use_and_never_an_error() -> None:
    core, contents = knows()
    store, rng = core.store, random.Random(4)
    namespace = next(iter(store.namespaces.values()))
    taken = 0
    for name, good in contents.items():
        for _ in SEEDS:
            content = bent(good, rng)
            store.costing._ways.clear()
            store.costing._profiled.clear()
            namespace.profile = None
            if not store.lessons.take_over({name: content}):
                continue
            taken += 1
            known = Gaps.from_bytes(content) if name.startswith("gaps") else None
            if isinstance(known, Gaps):
                assert known.worth_keeping_ns("search", SECOND_NS, SECOND_NS) >= 0
                assert known.likely_ns("search") != 0
                known.observed("search", SECOND_NS)
                known.ended(3)
                assert isinstance(Gaps.from_bytes(known.to_bytes()), Gaps)
            store.costing.report_prefill(namespace, 512, 512, 0.05)
            store.costing.report_load(namespace, Tier.DRAM, 1 << 20, 0.001)
            assert all(thing.content_of() for thing in store.lessons.things())
            core.client("a").put(namespace, chain(1, f"{name}/{taken}"))
    assert taken > len(contents)
    core.audit()
