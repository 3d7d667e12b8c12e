"""What a store has learned outlives it, whole or not at all."""

from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from kvstore.learned import PACKED_BYTES, ROUND_NS, Learned, Thing
from kvstore.ports import Bytes

TABLE_BYTES = 1 << 16


def table() -> Bytes:
    """An empty one."""
    return np.zeros(TABLE_BYTES, dtype=np.uint8)


def of(contents: dict[str, bytes]) -> list[Thing]:
    """Things with these contents."""
    return [Thing(name, content, lambda content=content: content) for name, content in contents.items()]  # type: ignore[misc]


def test_what_was_saved_is_read() -> None:
    kept, contents = table(), {"a": b"first", "b/7": bytes(5000), "empty": b""}
    assert Learned(kept, list).read() == {}
    Learned(kept, lambda: of(contents)).save()
    assert Learned(kept, list).read() == {"a": b"first", "b/7": bytes(5000)}


def test_the_last_of_many_lives_wins() -> None:
    kept = table()
    for life in range(5):
        learned = Learned(kept, lambda life=life: of({"life": b"%d" % life}))  # type: ignore[misc]
        assert learned.read() == ({"life": b"%d" % (life - 1)} if life else {})
        learned.save()


def test_a_round_takes_a_tick_for_each_thing_and_waits_its_time() -> None:
    kept, contents = table(), {"a": b"1", "b": b"2"}
    learned = Learned(kept, lambda: of(contents))
    for now_ns in (1, ROUND_NS, ROUND_NS + 1, ROUND_NS + 2):
        learned.tick(now_ns)
        assert Learned(kept, list).read() == {}
    learned.tick(ROUND_NS + 3)
    assert Learned(kept, list).read() == contents
    contents["a"] = b"3"
    learned.tick(ROUND_NS + 4)
    assert Learned(kept, list).read()["a"] == b"1"


def test_who_dies_in_a_round_leaves_the_last_one() -> None:
    kept = table()
    Learned(kept, lambda: of({"a": b"old"})).save()
    later = Learned(kept, lambda: of({"a": b"new", "b": b"more"}))
    later.tick(1)
    later.tick(2 * ROUND_NS)
    assert Learned(kept, list).read() == {"a": b"old"}


@pytest.mark.parametrize("where", [0, 9, 17, 24, 26, 30, 33])
def test_a_flipped_byte_loses_all_of_a_round_and_nothing_more(where: int) -> None:
    kept = table()
    Learned(kept, lambda: of({"a": b"old"})).save()
    Learned(kept, lambda: of({"a": b"newer"})).save()
    used = 0 if Learned(kept, list).read() == {"a": b"newer"} else 1
    assert not used, "the second round is in half 0"
    kept[where] ^= 0x40
    assert Learned(kept, list).read() == {"a": b"old"}


def test_what_fills_more_than_half_is_packed() -> None:
    kept, contents = table(), {f"{number}": bytes([number]) * 5000 for number in range(40)}
    Learned(kept, lambda: of(contents)).save()
    assert Learned(kept, list).read() == contents


def test_what_finds_no_room_is_left_out() -> None:
    kept, noise = table(), np.random.default_rng(1).bytes(TABLE_BYTES)
    Learned(kept, lambda: of({"large": noise, "small": b"fits"})).save()
    assert Learned(kept, list).read() == {"small": b"fits"}


def test_what_has_not_changed_is_copied_and_not_asked_for() -> None:
    kept, asked = table(), []

    def thing(name: str, version: int) -> Thing:
        def content() -> bytes:
            asked.append(name)
            return f"{name} {version}".encode()

        return Thing(name, version, content)

    versions = {"a": 1, "b": 1}
    learned = Learned(kept, lambda: [thing(name, version) for name, version in versions.items()])
    for _ in range(3):
        learned.save()
        versions["b"] += 1
    assert asked == ["a", "b", "b", "b"]
    assert Learned(kept, list).read() == {"a": b"a 1", "b": b"b 3"}


def ticks_of_a_round(learned: Learned) -> int:
    """How many there are until it is over."""
    learned.tick(1)
    for tick in range(1, 100_000):
        learned.tick(2 * ROUND_NS)
        if learned._round is None:
            return tick
    raise AssertionError("a round never ends")


def test_a_tick_names_no_more_than_a_thing_however_many_there_are() -> None:
    named = 0

    def many() -> Iterator[Thing]:
        nonlocal named
        for number in range(1000):
            named += 1
            yield Thing(f"{number}", 1, lambda: b"x")

    learned = Learned(table(), many)
    learned.tick(1)
    for tick in range(1, 1001):
        learned.tick(2 * ROUND_NS)
        assert named == tick
    learned.tick(2 * ROUND_NS)
    assert len(learned.read()) == 1000


def test_what_is_large_is_packed_in_many_ticks() -> None:
    noise = np.random.default_rng(1).bytes(TABLE_BYTES // 4 + 100)
    parts = 40 * PACKED_BYTES
    contents = {"raw": noise, "long": b"a" * parts, "short": b"b"}
    kept = table()
    taken = ticks_of_a_round(Learned(kept, lambda: of(contents)))
    assert taken >= len(contents) + parts // PACKED_BYTES
    assert Learned(kept, list).read() == contents
    unpacked = ticks_of_a_round(Learned(table(), lambda: of({"long": b"a" * 5000, "short": b"b"})))
    assert unpacked == 3, "two things, and the head"


def test_a_tick_looks_at_no_more_bytes_than_its_thing_has(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    real = xxhash.xxh3_64

    class Digest:
        def __init__(self) -> None:
            self.real = real()

        def update(self, content: bytes) -> None:
            looked_at.append(len(content))
            self.real.update(content)

        def intdigest(self) -> int:
            return self.real.intdigest()

    kept, contents = table(), {f"{number}": bytes([number]) * 1000 for number in range(20)}
    learned = Learned(kept, lambda: of(contents))
    monkeypatch.setattr("kvstore.learned.xxhash.xxh3_64", Digest)
    for _ in range(2):  # the second time all of it is copied
        learned.save()
        assert len(looked_at) == 21
        assert 0 < max(looked_at) < 1100
        looked_at.clear()
    monkeypatch.undo()
    assert Learned(kept, list).read() == contents


def test_who_stops_in_the_middle_of_a_round_saves_all_the_same() -> None:
    kept, contents = table(), {"a": b"1", "b": b"2"}
    learned = Learned(kept, lambda: of(contents))
    learned.tick(1)
    learned.tick(2 * ROUND_NS)
    contents["a"] = b"3"
    learned.save()
    assert Learned(kept, list).read() == contents
    learned.tick(2 * ROUND_NS)
    assert Learned(kept, list).read() == contents, "that a new round has begun spoils nothing"


def test_a_round_is_over_once_hardly_anything_more_fits() -> None:
    asked, random = [], np.random.default_rng(1)

    def thing(number: int) -> Thing:
        def content() -> bytes:
            asked.append(number)
            return random.bytes(1000)

        return Thing(f"{number}", 1, content)

    learned = Learned(table(), lambda: map(thing, range(1000)))
    learned.save()
    assert asked == [*range(len(asked))]
    assert TABLE_BYTES // 2 // 1000 * 7 // 8 <= len(asked) <= TABLE_BYTES // 2 // 1000
    assert len(learned.read()) == len(asked)
