"""Archives: what was written comes back, and what is not what was written never does."""

import io
import random
import struct
import tracemalloc

import pytest
import xxhash

from kvproto import archive
from kvproto.archive import HEAD_BYTES, RECORD_BYTES, ArchiveError, Block, Damage, Done, Events, Name, Reader, Writer
from kvproto.identity import NamespaceIdentity
from tests.core import chain, value_of

SIZE = 300
FIRST = NamespaceIdentity("m", "e", "l", "bf16", 16, SIZE)
SECOND = NamespaceIdentity("n", "e", "l", "bf16", 16, 2 * SIZE, tp_rank=1, tp_size=2)


def written() -> tuple[bytes, dict[bytes, bytes]]:
    """Two namespaces, three chains; and what each key holds."""
    file, held = io.BytesIO(), {}
    writer = Writer(file, 12, 16 * SIZE)
    for tenant, identity, names in (("alpha", FIRST, "ab"), ("beta", SECOND, "c")):
        writer.name(tenant, identity, 4 * len(names))
        for name in names:
            parent = None
            for key in chain(4, name):
                held[key] = value_of(key, identity.block_bytes)
                writer.block(key, parent, held[key])
                parent = key
    totals = writer.finish()
    assert totals == archive.Totals(2, 12, 4 * SIZE * 4)
    return file.getvalue(), held


def read(content: bytes) -> list[Events]:
    return list(Reader(io.BytesIO(content)))


def sound(events: list[Events], held: dict[bytes, bytes]) -> int:
    """How many blocks were given; each is what was written."""
    blocks = [event for event in events if isinstance(event, Block)]
    assert all(bytes(block.body) == held[block.key] for block in blocks)
    assert len({block.key for block in blocks}) == len(blocks)
    assert isinstance(events[-1], Done)
    assert events[-1].totals.blocks == len(blocks)
    return len(blocks)


def test_what_was_written_comes_back_in_its_order() -> None:
    content, held = written()
    reader = Reader(io.BytesIO(content))
    assert (reader.planned_blocks, reader.planned_bytes) == (12, 16 * SIZE)
    events = list(reader)
    assert sound(events, held) == 12
    assert [event for event in events if isinstance(event, Name)] == [Name("alpha", FIRST, 8), Name("beta", SECOND, 4)]
    blocks = [event for event in events if isinstance(event, Block)]
    assert [block.key for block in blocks] == list(held)
    assert [block.parent for block in blocks[:5]] == [None, *chain(3, "a"), None]
    assert events[-1] == Done(archive.Totals(2, 12, 4 * SIZE * 4), whole=True)


def test_every_flipped_bit_is_found_and_no_wrong_block_is_ever_given() -> None:
    content, held = written()
    rng = random.Random(7)
    places = sorted(rng.sample(range(len(content)), 1500))
    given = []
    for place in places:
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << rng.randrange(8)
        try:
            events = read(bytes(spoilt))
        except ArchiveError:
            assert place < HEAD_BYTES
            continue
        given.append(sound(events, held))
        assert any(isinstance(event, Damage) for event in events), place
        assert not events[-1].whole  # type: ignore[union-attr]
    assert max(given) == 12, "where only the end is damaged"
    assert sum(count >= 11 for count in given) > 0.7 * len(given), "one flip mostly costs one block"


def test_a_damaged_block_is_named_and_the_others_come() -> None:
    content, held = written()
    keys = list(held)
    at = content.index(held[keys[2]])
    spoilt = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    events = read(spoilt)
    (damage,) = [event for event in events if isinstance(event, Damage)]
    assert (damage.key, damage.why) == (keys[2], "a block is damaged")
    assert sound(events, held) == 11


def test_one_cut_short_anywhere_gives_what_came_before() -> None:
    content, held = written()
    before = -1
    for length in range(HEAD_BYTES, len(content), 37):
        events = read(content[:length])
        count = sound(events, held)
        assert count >= before
        before = count
        assert not events[-1].whole  # type: ignore[union-attr]
    assert before == 12
    for length in range(HEAD_BYTES):
        with pytest.raises(ArchiveError):
            read(content[:length])


def test_records_that_are_moved_doubled_or_left_out_are_found() -> None:
    content, held = written()
    size = RECORD_BYTES + SIZE
    begin = content.index(held[next(iter(held))]) - RECORD_BYTES
    first, second = content[begin : begin + size], content[begin + size : begin + 2 * size]
    rest = content[begin + 2 * size :]
    for spoilt in (second + first, first + first + second, second, first):
        events = read(content[:begin] + spoilt + rest)
        assert sound(events, held) <= 2
        assert any(isinstance(event, Damage) for event in events)
    assert sound(read(content[:begin] + first + second + rest), held) == 12, "the control"
    assert isinstance(read(content + b"x")[-2], Damage)


@pytest.mark.parametrize(
    ("head", "why"),
    [(b"", "no archive"), (b"PK\x03\x04" * 40, "no archive"),
     (struct.pack("<16sIIQQ", archive.MAGIC, 2, 0, 0, 0), "version 2"),
     (struct.pack("<16sIIQQQ", archive.MAGIC, 1, 0, 0, 0, 99), "damaged"),
     (archive.MAGIC + b"\x01\0\0\0", "cut short")],
)  # fmt: skip
def test_what_is_no_archive_of_this_version_is_refused(head: bytes, why: str) -> None:
    with pytest.raises(ArchiveError, match=why):
        Reader(io.BytesIO(head))


def test_a_head_that_lies_with_a_good_sum_gives_nothing_and_takes_no_memory() -> None:
    content, held = written()
    begin = content.index(held[next(iter(held))]) - RECORD_BYTES

    def lying(at: int, kind: bytes, namespace: int, size: int, number: int) -> list[Events]:
        head = struct.pack("<4sIQ32s32s16sQ", kind, namespace, size, bytes(32), bytes(32), bytes(16), number)
        head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
        return read(content[:at] + head + content[at + RECORD_BYTES :])

    for kind, namespace, size, number in (
        (b"BLOK", 0, 1 << 62, 1), (b"BLOK", 7, SIZE, 1), (b"WHAT", 0, SIZE, 1), (b"NAME", 0, 1 << 62, 1),
        (b"NAME", 0, 10, 1), (b"DONE", 0, 1 << 62, 1), (b"BLOK", 0, SIZE, 9),
    ):  # fmt: skip
        events = lying(begin, kind, namespace, size, number)
        assert sound(events, held) == 0
        assert any(isinstance(event, Damage) for event in events)


@pytest.mark.parametrize("planned", [(0, 0), (12, 0), (0, 1 << 40), (11, 16 * SIZE), (12, 16 * SIZE - 1)])
def test_more_than_its_first_bytes_say_is_damage_and_ends_there(planned: tuple[int, int]) -> None:
    content, held = written()
    head = archive._HEAD.pack(archive.MAGIC, archive.VERSION, 0, *planned)
    events = read(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + content[HEAD_BYTES:])
    assert sound(events, held) <= planned[0]
    assert sum(len(event.body) for event in events if isinstance(event, Block)) <= planned[1]
    assert [event.why for event in events if isinstance(event, Damage)] == ["more than its first bytes say"]
    assert not events[-1].whole  # type: ignore[union-attr]


def test_fewer_than_its_first_bytes_say_are_no_damage() -> None:
    content, held = written()
    head = archive._HEAD.pack(archive.MAGIC, archive.VERSION, 0, 13, 17 * SIZE)
    events = read(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + content[HEAD_BYTES:])
    assert sound(events, held) == 12
    assert events[-1].whole  # type: ignore[union-attr]


def test_one_that_keeps_no_blocks_verifies_them_all_the_same() -> None:
    content, held = written()
    events = list(Reader(io.BytesIO(content), keeps=False))
    assert [event.key for event in events if isinstance(event, Block)] == list(held)
    assert not any(event.body for event in events if isinstance(event, Block))
    assert events[-1] == Done(archive.Totals(2, 12, 4 * SIZE * 4), whole=True)
    at = content.index(held[list(held)[2]])
    spoilt = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (damage,) = [event for event in Reader(io.BytesIO(spoilt), keeps=False) if isinstance(event, Damage)]
    assert (damage.key, damage.why) == (list(held)[2], "a block is damaged")


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("size", [archive.PIECE_BYTES - 1, archive.PIECE_BYTES, 2 * archive.PIECE_BYTES + 1])
def test_blocks_of_several_pieces_come_back(size: int, keeps: bool) -> None:
    file, body = io.BytesIO(), random.Random(size).randbytes(size)
    writer = Writer(file, 1, size)
    writer.name("t", NamespaceIdentity("m", "e", "l", "bf16", 16, size))
    writer.block(b"k" * 32, None, body)
    writer.finish()
    file.seek(0)
    _, block, done = Reader(file, keeps=keeps)
    assert isinstance(block, Block)
    assert block.body == (body if keeps else b"")
    assert done == Done(archive.Totals(1, 1, size), whole=True)


def test_a_block_that_is_said_to_be_large_takes_memory_as_it_comes() -> None:
    size = 256 << 20
    file = io.BytesIO()
    writer = Writer(file, 1, size)
    writer.name("t", NamespaceIdentity("m", "e", "l", "bf16", 16, size))
    head = archive._RECORD.pack(archive.BLOCK, 0, size, bytes(32), bytes(32), bytes(16), 1)
    file.write(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + bytes(100))
    file.seek(0)
    tracemalloc.start()
    try:
        events = list(Reader(file))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [event.why for event in events if isinstance(event, Damage)] == ["cut short within a block"]
    assert most < 2 * archive.PIECE_BYTES


@pytest.mark.parametrize("tenant", ["", "t" * 65])
def test_a_tenant_that_cannot_be_is_damage(tenant: str) -> None:
    file = io.BytesIO()
    writer = Writer(file)
    named = tenant.encode()
    writer._record(
        archive.NAMED, FIRST.digest(), bytes(32), struct.pack("<QH", 0, len(named)) + named + FIRST.canonical()
    )
    events = read(file.getvalue())
    assert [event.why for event in events if isinstance(event, Damage)] == ["a namespace that cannot be"]
