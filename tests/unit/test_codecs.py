"""Codecs of the client without a daemon: the bytes of the definition, heads, what fits which blocks, and what pays."""

import sys
from itertools import count

import numpy as np
import pytest

from kvclient import codecs, codecs_numpy
from kvclient.codecs import HEAD_BYTES, Codec, Speed, choose, codec_of, measure, pays
from kvkernels import encodings
from kvkernels.encodings import BOOK_BYTES, ESCAPE, ESCAPES, TILE, Encoding, Values, encoded_bytes
from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity
from tests.values import COUNT, as_bf16, as_half, shapes_of_values

ROW = 128
LOSSY = [encoding for encoding in Encoding if not encoding.is_lossless]
EVERY = [(encoding, half) for encoding in Encoding for half in (False, True) if not (half and encoding.is_lossless)]


def codec(name: str, values: int = COUNT, dtype: str = "bfloat16", row: int = ROW, accelerate: str = "") -> Codec:
    made = codec_of(
        name, dtype=dtype, block_bytes=2 * values, block_shape=(values // row, row), lossy=True, accelerate=accelerate
    )
    assert made is not None
    return made


def plain(values: Values) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return values.view(np.uint8)


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [codecs_numpy.CHUNK, TILE])
@pytest.mark.parametrize(("encoding", "half"), EVERY)
def test_bytes_are_those_of_the_definition(
    encoding: Encoding, half: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs_numpy, "CHUNK", chunk)
    for name, values in shapes_of_values().items():
        bits = as_half(values) if half else as_bf16(values)
        size = encoded_bytes(encoding, bits.size, ROW)
        wanted, found = np.full(size, 1, np.uint8), np.full(size, 2, np.uint8)
        fits = encodings.encode(encoding, bits, wanted, ROW, half=half)
        assert codecs_numpy.encode(encoding, bits, found, ROW, half=half) == fits, name
        if not fits:
            continue
        assert np.array_equal(wanted, found), f"{name}: byte {np.flatnonzero(wanted != found)[0]}"
        back, ours = np.zeros(bits.size, np.uint16), np.ones(bits.size, np.uint16)
        encodings.decode(encoding, wanted, back, ROW, half=half)
        codecs_numpy.decode(encoding, found, ours, ROW, half=half)
        assert np.array_equal(back, ours), name
        if name == "normal":
            found[BOOK_BYTES] ^= 0x55
            codecs_numpy.decode(encoding, found, ours, ROW, half=half)
            assert not np.array_equal(back, ours), "this comparison finds nothing out"


@pytest.mark.parametrize("odd", [0x7FC0, 0x7F80, 0xFF80, 0xFFFF])
@pytest.mark.parametrize("at", [0, 7, COUNT - 1])
def test_nan_and_infinity_are_unfit_but_without_loss(odd: int, at: int) -> None:
    bits = as_bf16(shapes_of_values()["normal"]).copy()
    bits[at] = odd
    for encoding in Encoding:
        made = codec(encoding)
        target, back = np.zeros(made.stored_bytes, np.uint8), np.zeros(COUNT, np.uint16)
        assert made.encode(plain(bits), target) == encoding.is_lossless
        if encoding.is_lossless:
            assert made.decode(target, plain(back))
            assert np.array_equal(back, bits)
    half = as_half(shapes_of_values()["normal"]).copy()
    half[at] = 0x7C00
    for encoding in LOSSY:
        made = codec(encoding, dtype="float16")
        assert not made.encode(plain(half), np.zeros(made.stored_bytes, np.uint8))


def test_too_many_rare_exponents_are_unfit_and_as_many_as_fit_are_not() -> None:
    bits = np.full(2 * TILE, 0x3F80, np.uint16)
    for number, exponent in enumerate(range(100, 115)):
        bits[number::ESCAPE] = exponent << 7
    made, rare = codec("bf16-fixed", bits.size), TILE + 5 + np.arange(ESCAPES + 1) * 61
    target, back = np.zeros(made.stored_bytes, np.uint8), np.zeros_like(bits)
    bits[rare[:-1]] = 200 << 7
    assert made.encode(plain(bits), target)
    assert made.decode(target, plain(back))
    assert np.array_equal(back, bits)
    bits[rare] = 200 << 7
    assert not made.encode(plain(bits), target)


@pytest.mark.parametrize("accelerate", ["", "numba"])
@pytest.mark.parametrize("name", Encoding)
def test_memory_at_an_odd_address_is_as_good(name: str, accelerate: str) -> None:
    bits = as_bf16(shapes_of_values()["channels of many scales"])
    made = codec(name, accelerate=accelerate)
    even, odd = np.zeros((2, made.stored_bytes), np.uint8)
    source = np.zeros(2 * COUNT + 1, np.uint8)[1:]
    source[:] = plain(bits)
    assert source.ctypes.data % 2 == 1
    assert made.encode(plain(bits), even)
    assert made.encode(source, odd)
    assert np.array_equal(even, odd)
    target, wanted = np.zeros(2 * COUNT + 1, np.uint8)[1:], np.zeros(2 * COUNT, np.uint8)
    assert made.decode(odd, target)
    assert made.decode(even, wanted)
    assert np.array_equal(target, wanted)
    assert wanted.any()


# -- heads, and bytes that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Encoding)
def test_a_block_of_another_codec_type_row_or_version_is_none(name: str) -> None:
    bits = as_bf16(shapes_of_values()["normal"])
    made = codec(name)
    stored, back = np.zeros(made.stored_bytes, np.uint8), np.zeros_like(bits)
    assert made.encode(plain(bits), stored)
    assert made.decode(stored, plain(back))
    for at in range(HEAD_BYTES):
        stored[at] ^= 1
        assert not made.decode(stored, plain(back)), f"byte {at}"
        stored[at] ^= 1
    assert made.decode(stored, plain(back)), "the control"
    if name in ("int8", "fp8"):
        assert not codec(name, dtype="float16").decode(stored, plain(back))
        other = codec("fp8" if name == "int8" else "int8")
        assert other.stored_bytes == made.stored_bytes
        assert not other.decode(stored, plain(back))


@pytest.mark.parametrize("accelerate", ["", "numba"])
def test_damaged_escapes_are_told_and_write_nowhere_else(accelerate: str) -> None:
    bits = as_bf16(shapes_of_values()["normal"])
    made = codec("bf16-fixed", accelerate=accelerate)
    stored, room = np.zeros(made.stored_bytes, np.uint8), np.full(2 * COUNT + 256, 7, np.uint8)
    assert made.encode(plain(bits), stored)
    tail = stored[-(4 + 3 * ESCAPES) :]  # of the last tile, which is a short one
    for escapes, place in ((ESCAPES + 1, 0), (2**32 - 1, 0), (1, TILE), (1, 65535), (1, COUNT % TILE)):
        tail[:4].view(np.uint32)[0] = escapes
        tail[4:6].view(np.uint16)[0] = place
        assert not made.decode(stored, room[: 2 * COUNT])
        assert (room[2 * COUNT :] == 7).all()
    tail[4:6].view(np.uint16)[0] = COUNT % TILE - 1
    assert made.decode(stored, room[: 2 * COUNT]), "the control: a place that there is"


@pytest.mark.parametrize("name", Encoding)
def test_any_bytes_behind_a_right_head_are_decoded_or_refused(name: str) -> None:
    made, random = codec(name), np.random.default_rng(3)
    stored = np.zeros(made.stored_bytes, np.uint8)
    assert made.encode(np.zeros(2 * COUNT, np.uint8), stored)
    target = np.zeros(2 * COUNT, np.uint8)
    for _ in range(20):
        stored[HEAD_BYTES:] = random.integers(0, 256, stored.size - HEAD_BYTES, dtype=np.uint8)
        assert made.decode(stored, target) == (name != "bf16-fixed")


# -- which blocks a codec takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"lossy": False}, "lossy=True"),
        ({"dtype": "float32"}, "dtype bfloat16 or float16"),
        ({"name": "int7"}, "one of raw, int8"),
        ({"name": "bf16-fixed", "dtype": "float16"}, "bfloat16 only"),
        ({"block_shape": None}, "needs block_shape"),
        ({"block_shape": (4, 64)}, "256 values"),
        ({"block_shape": ()}, "positive whole numbers"),
        ({"block_shape": (4, -128)}, "positive whole numbers"),
        ({"block_shape": (4, 1.5)}, "whole numbers"),
        ({"block_bytes": 1025}, "16-bit values"),
        ({"block_bytes": True}, "16-bit values"),
        ({"block_bytes": 6, "block_shape": (1, 3)}, "multiple of 4"),
        ({"name": "int4-g64", "block_bytes": 192, "block_shape": None}, "multiple of 64"),
        ({"name": "bf16-fixed", "block_bytes": 12, "block_shape": None}, "multiple of 8"),
        ({"accelerate": "cuda"}, "'numba' or nothing"),
        ({"name": "raw", "accelerate": "numba"}, "only copied"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(wrong: dict[str, object], why: str) -> None:
    right: dict[str, object] = {
        "name": "int8", "dtype": "bfloat16", "block_bytes": 1024, "block_shape": (4, 128), "lossy": True,
    }  # fmt: skip
    made = codec_of(**right)  # type: ignore[arg-type]
    assert made is not None
    assert made.plain_bytes == 1024
    with pytest.raises(UsageError, match=why):
        codec_of(**(right | wrong))  # type: ignore[arg-type]


def test_lossless_needs_no_word_and_no_shape_and_raw_is_no_codec() -> None:
    made = codec_of("bf16-fixed", dtype="bfloat16", block_bytes=1024)
    assert made is not None
    assert made.text == "bf16-fixed/1 512 bfloat16"
    for raw in ("raw", ""):
        assert codec_of(raw, dtype="anything", block_bytes=1025) is None


def test_without_numba_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvkernels.encodings_compiled", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(UsageError, match="accelerate='numba'"):
        codec("int8", accelerate="numba")
    codec("int8")


def test_texts_differ_wherever_bytes_do() -> None:
    texts = {
        codec("int8").text, codec("fp8").text, codec("int8", dtype="float16").text, codec("int8", row=64).text,
        codec("int8", values=1024).text, codec("int4-g64").text, codec("bf16-fixed").text,
    }  # fmt: skip
    assert len(texts) == 7
    assert codec("int4-g64", row=64).text == codec("int4-g64").text, "rows are nothing to it"
    assert all(codecs.is_text(text) for text in texts)
    assert not any(codecs.is_text(name) for name in codecs.NAMES)


# -- the identity ------------------------------------------------------------------------------------------------------


def test_a_raw_namespace_is_named_as_it_always_was() -> None:
    raw = NamespaceIdentity("m", "e", "l", "bfloat16", 16, 4096)
    assert raw.digest().hex() == "e43d593d9158d58d1f96f1b5beb8743bfdbb8b9c892440675b84cbcca026f243"
    assert b"codec" not in raw.canonical()
    assert NamespaceIdentity.from_canonical(raw.canonical()) == raw


def test_a_codec_is_part_of_the_name_and_nothing_is_written_in_two_ways() -> None:
    coded = NamespaceIdentity("m", "e", "l", "bfloat16", 16, 4096, codec=codec("int8").text)
    assert NamespaceIdentity.from_canonical(coded.canonical()) == coded
    assert coded.digest() != NamespaceIdentity("m", "e", "l", "bfloat16", 16, 4096).digest()
    raw = NamespaceIdentity("m", "e", "l", "bfloat16", 16, 4096).canonical()
    for more in (b"\x05\x00codec\x00\x00", b"\x05\x00codec", b"\x05\x00kodec\x01\x00x", b"\x00"):
        with pytest.raises(UsageError):
            NamespaceIdentity.from_canonical(raw + more)
    NamespaceIdentity.from_canonical(raw + b"\x05\x00codec\x01\x00x")  # the control
    with pytest.raises(UsageError, match="codec must be a string"):
        NamespaceIdentity("m", "e", "l", "bfloat16", 16, 4096, codec=8)  # type: ignore[arg-type]


# -- which one pays ----------------------------------------------------------------------------------------------------

GB = 1e9
FAST = [
    Speed("int8", 1.94, 12 * GB, 15 * GB), Speed("int4-g64", 3.55, 6 * GB, 12 * GB),
    Speed("bf16-fixed", 1.29, 2 * GB, 3 * GB),
]  # fmt: skip


def test_a_codec_is_chosen_where_it_pays() -> None:
    assert choose(0.4 * GB, FAST) == "bf16-fixed"
    assert choose(0.6 * GB, FAST) == "raw", "2 x 2.4 GB/s over 0.6 x 1.29 / 0.29 = 2.7 GB/s"
    assert choose(1 * GB, FAST, lossy=True) == "int4-g64"
    assert choose(50 * GB, FAST, lossy=True) == "raw"
    assert choose(1 * GB, [], lossy=True) == "raw"
    assert choose(0.1 * GB, [Speed("raw", 1, GB, GB)]) == "raw"


def test_more_loads_a_store_favour_what_decodes_fast() -> None:
    slow_in = [Speed("bf16-fixed", 1.29, 0.5 * GB, 10 * GB)]
    assert choose(1 * GB, slow_in, loads=1) == "raw"
    assert choose(1 * GB, slow_in, loads=100) == "bf16-fixed"


def test_one_way_it_is_the_rule_of_the_ratio() -> None:
    link, ratio = 2 * GB, 1.94
    border = link * ratio / (ratio - 1)
    for speed in (0.99 * border, 1.01 * border):
        chosen = choose(link, [Speed("int8", ratio, speed, GB)], lossy=True, loads=0)
        assert (chosen == "int8") == pays(link, ratio, speed) == (speed > border)
    assert not pays(link, 1.0, 1e15)


@pytest.mark.parametrize(("link", "loads"), [(0, 1), (-1, 1), (float("nan"), 1), (1, -1)])
def test_impossible_links_are_refused(link: float, loads: float) -> None:
    with pytest.raises(UsageError, match="bytes a second"):
        choose(link, FAST, loads=loads)


def test_speeds_come_of_the_clock() -> None:
    ticks = count()
    speeds = measure(2 * TILE, ROW, clock=lambda: float(next(ticks)))
    assert [speed.codec for speed in speeds] == [encoding.value for encoding in Encoding]
    assert all(speed.encode_bytes_per_s == speed.decode_bytes_per_s == 4 * 2 * TILE for speed in speeds)
    assert choose(1.0, speeds, lossy=True) == "int4-g64"
