"""Objects whose blocks are encoded as on disk: as small, found by name, compared with what they were before."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Final

import numpy as np
import pytest
import xxhash

from kvkernels.planes import pack
from kvstore.tier.format import Codec, FormatError
from kvstore.tier.remote_format import (
    ENCODED_VERSION,
    FORMAT_VERSION,
    HEADER_BYTES,
    NO_PARENT,
    ObjectHeader,
    is_encoded,
    marks_in,
    name_of,
    pack_header,
    parse_header,
)
from kvstore.tier.remote_index import Known
from kvstore.tier.remote_orders import Bytes, Keep, Piece, Seek
from tests.core import chain
from tests.s3 import S3Server
from tests.unit.remote_kit import NOBODY, PLACE, Kit, kit

BLOCK_BYTES: Final = 32 << 10
PIECES: Final = 5  # blocks that are 8 MiB together, and so of several requests


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def one(s3: S3Server) -> Iterator[Kit]:
    with kit(s3) as jobs:
        yield jobs


def block_of(number: int, block_bytes: int = BLOCK_BYTES, *, noise: bool = False) -> Bytes:
    """Values as of a model, in bfloat16: they shrink; noise does not."""
    random = np.random.default_rng(number)
    if noise:
        return random.integers(0, 256, block_bytes, dtype=np.uint8)
    words = random.standard_normal(block_bytes // 2).astype(np.float32).view(np.uint32) >> 16
    return words.astype(np.uint16).view(np.uint8)


def keep(to: Kit, keys: Sequence[bytes], contents: Sequence[Bytes], codec: Codec = Codec.BF16_PLANES_ZSTD) -> Keep:
    """Write these as a run."""
    size = contents[0].size
    arena = np.concatenate(contents)
    to.jobs.keeping.view = lambda _arena: arena
    order = Keep(
        NOBODY, PLACE, NO_PARENT, tuple(keys), list(range(len(keys))), [1] * len(keys),
        [xxhash.xxh3_64_intdigest(content.tobytes()) for content in contents],
        [(1, number * size) for number in range(len(keys))], size, codec=codec,
    )  # fmt: skip
    to.jobs.begin_keep(order)
    to.jobs.keep(order, lambda _: None)
    return order


def bring(to: Kit, keys: Sequence[bytes], start: int = 0, block_bytes: int = BLOCK_BYTES) -> list[bytes]:
    """What comes of a chain, in order and without a gap."""
    got: list[bytes] = []

    def take(piece: Piece) -> None:
        assert piece.at == start + len(got)
        got.extend(block.tobytes() for block in piece.contents)
        to.jobs.reading._budget.give(piece.taken_bytes)

    to.jobs.seek(Seek(NOBODY, PLACE, tuple(keys), start, block_bytes, 0), take)
    return got


def test_blocks_that_shrink_lie_there_smaller_and_come_back_as_they_were(one: Kit, s3: S3Server) -> None:
    keys, contents = chain(8), [block_of(number) for number in range(8)]
    order = keep(one, keys, contents)
    assert order.stored == 8
    (whole,) = s3.objects.values()
    assert len(whole) < 0.85 * 8 * BLOCK_BYTES
    assert len(whole) == HEADER_BYTES + sum(order.packed), "what was gained is told"
    assert one.jobs.holdings.ledger.total_bytes == len(whole), "what it takes there is what counts"
    with kit(s3) as other:
        assert bring(other, keys) == [content.tobytes() for content in contents]
        assert bring(other, keys, 5) == [content.tobytes() for content in contents[5:]]
        assert bring(other, keys) != [block_of(number + 1).tobytes() for number in range(8)], "the control"


def test_where_nothing_shrinks_or_nobody_asks_the_object_is_as_ever(one: Kit, s3: S3Server) -> None:
    noise, values = [block_of(n, noise=True) for n in range(3)], [block_of(n) for n in range(3)]
    assert keep(one, chain(3, "noise"), noise).packed == [BLOCK_BYTES] * 3
    keep(one, chain(3, "raw"), values, Codec.RAW)
    assert not any(is_encoded(name) for name in s3.objects)
    assert all(parse_header(content[:HEADER_BYTES]).stored == () for content in s3.objects.values())
    assert {content[8] for content in s3.objects.values()} == {FORMAT_VERSION}, "which earlier daemons read, too"
    assert bring(one, chain(3, "noise")) == [content.tobytes() for content in noise]


def test_a_run_may_hold_blocks_of_both_kinds(one: Kit, s3: S3Server) -> None:
    keys, contents = chain(6), [block_of(number, noise=number % 2 == 1) for number in range(6)]
    keep(one, keys, contents)
    (whole,) = s3.objects.values()
    header = parse_header(whole[:HEADER_BYTES])
    assert [codec for codec, _ in header.stored] == [Codec.BF16_PLANES_ZSTD, Codec.RAW] * 3
    with kit(s3) as other:
        for start in range(6):
            assert bring(other, keys, start) == [content.tobytes() for content in contents[start:]]


def test_a_large_one_is_read_in_parts(one: Kit, s3: S3Server) -> None:
    size = (8 << 20) // 2
    keys, contents = chain(PIECES), [block_of(number, size) for number in range(PIECES)]
    keep(one, keys, contents)
    s3.requests.clear()
    with kit(s3) as other:
        assert bring(other, keys, block_bytes=size) == [content.tobytes() for content in contents]
    assert s3.count("GET") == 1 + -(-PIECES // 2), "the header, and two blocks at a time"


def test_one_that_another_host_wrote_raw_is_not_written_again(one: Kit, s3: S3Server) -> None:
    keys, contents = chain(4), [block_of(number) for number in range(4)]
    keep(one, keys, contents, Codec.RAW)
    with kit(s3) as other:
        assert keep(other, keys, contents).stored == 4
        assert other.jobs.holdings.seen.skipped == 4
    assert len(s3.objects) == 1


def test_what_was_deleted_or_is_too_much_goes_though_it_is_encoded(one: Kit, s3: S3Server) -> None:
    keys, contents = chain(4), [block_of(number) for number in range(4)]
    keep(one, keys, contents)
    one.forget(keys[2:3])
    assert not s3.objects
    assert bring(one, keys) == []


def test_one_flipped_bit_of_an_encoded_object_is_a_miss(one: Kit, s3: S3Server) -> None:
    keys, contents = chain(4), [block_of(number) for number in range(4)]
    keep(one, keys, contents)
    (name,) = s3.objects
    whole, random = s3.objects[name], Random(8)
    for trial in range(200):
        at = random.randrange(len(whole))
        s3.objects[name] = whole
        s3.flip(name, at)
        one.jobs.holdings.known = Known()
        one.jobs.holdings.forget_header("")
        got = bring(one, keys)
        assert got == [], f"byte {at} was flipped, {len(got)} blocks came"
        assert one.jobs.holdings.seen.damaged == trial + 1
    s3.objects[name] = whole
    one.jobs.holdings.known = Known()
    one.jobs.holdings.forget_header("")
    assert bring(one, keys) == [content.tobytes() for content in contents]


def test_a_header_that_promises_larger_blocks_has_nothing_read(one: Kit, s3: S3Server) -> None:
    """What it says is how much would be asked for, and how much memory that takes."""
    keys, size = chain(4), 1 << 30
    keep(one, keys, [block_of(number) for number in range(4)])
    (name,) = s3.objects
    stored = ((Codec.BF16_PLANES_ZSTD, size - 1),) * 4
    lie = pack_header(ObjectHeader(PLACE, NO_PARENT, tuple(keys), (1, 2, 3, 4), size, stored))
    s3.objects[name] = lie + s3.objects[name][HEADER_BYTES:]
    s3.requests.clear()
    with kit(s3) as other:
        assert bring(other, keys) == []
        assert other.jobs.holdings.seen.damaged == 1
    assert s3.count("GET") == 1, "its header"


def test_one_that_came_back_with_other_bytes_is_no_damaged_one(one: Kit, s3: S3Server) -> None:
    """Who knows the former one's header reads where nothing lies any more: a miss now, and a hit when it asks again."""
    keys = chain(4)
    keep(one, keys, [block_of(number) for number in range(4)])
    with kit(s3) as reader:
        assert len(bring(reader, keys)) == 4
        s3.objects.clear()
        later = [block_of(number + 9) for number in range(4)]
        with kit(s3) as other:
            keep(other, keys, later)
        got = bring(reader, keys) or bring(reader, keys)
        assert got == [content.tobytes() for content in later]
        assert reader.jobs.holdings.seen.damaged == 0


def test_objects_of_one_block_are_never_encoded(one: Kit, s3: S3Server) -> None:
    one.far.most_blocks = 1
    keys, contents = chain(3), [block_of(number) for number in range(3)]
    assert keep(one, keys, contents).stored == 3
    assert not any(is_encoded(name) for name in s3.objects)
    assert bring(one, keys) == [content.tobytes() for content in contents]


def test_names_and_headers_say_that_blocks_are_encoded() -> None:
    keys = chain(3)
    small = pack(block_of(1), BLOCK_BYTES)
    assert small is not None
    stored = ((Codec.BF16_PLANES_ZSTD, small[1]), (Codec.RAW, BLOCK_BYTES), (Codec.BF16_PLANES_ZSTD, 7))
    header = ObjectHeader(PLACE, NO_PARENT, tuple(keys), (1, 2, 3), BLOCK_BYTES, stored)
    page = pack_header(header)
    assert parse_header(page) == header
    assert page[8] == ENCODED_VERSION
    assert header.ends[-1] == HEADER_BYTES + small[1] + BLOCK_BYTES + 7
    name, raw = name_of(PLACE, keys, encoded=True), name_of(PLACE, keys)
    assert (is_encoded(name), is_encoded(raw)) == (True, False)
    folder = name[: name.rfind("/") + 1]
    assert marks_in(name, folder) == marks_in(raw, folder) != None  # noqa: E711  both, and there are some
    assert not name.removeprefix(folder).partition(".")[0].isdecimal(), "earlier daemons take it for none of theirs"
    for codec, stored_bytes in ((2, 7), (Codec.RAW, 7), (Codec.BF16_PLANES_ZSTD, BLOCK_BYTES), (1, 0)):
        wrong = ((codec, stored_bytes), *stored[1:])
        with pytest.raises(FormatError):
            parse_header(pack_header(ObjectHeader(PLACE, NO_PARENT, tuple(keys), (1, 2, 3), BLOCK_BYTES, wrong)))  # type: ignore[arg-type]
