"""Encodings: the compiled ones give the bytes of the reference, errors are bounded, lossless is lossless."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkernels import encodings, encodings_compiled
from kvkernels.aligned import Bytes
from kvkernels.encodings import (
    E4M3,
    ESCAPE,
    ESCAPES,
    GROUP,
    TILE,
    Encoding,
    EncodingError,
    Floats,
    Values,
    encoded_bytes,
)
from tests.values import as_bf16, as_half, shapes_of_values

ROW = 128
LOSSY = [encoding for encoding in Encoding if not encoding.is_lossless]
# Of the largest size in a row (a group): half a step, and the rounding to 16 bits.
MOST_ERROR = {Encoding.INT8: 0.5 / 127 + 2**-8, Encoding.FP8: 2**-4 + 2**-8, Encoding.INT4_G64: 1 / 15 + 2**-7}


def encoded(values: Values, encoding: Encoding, *, half: bool = False) -> Bytes | None:
    """By both implementations, which must agree."""
    size = encoded_bytes(encoding, values.size, ROW)
    reference, ours = np.full(size, 1, np.uint8), np.full(size, 2, np.uint8)
    fits = encodings.encode(encoding, values, reference, ROW, half=half)
    assert encodings_compiled.encode(encoding, values, ours, ROW, half=half) == fits
    if not fits:
        return None
    assert np.array_equal(reference, ours), f"byte {np.flatnonzero(reference != ours)[0]} differs"
    return reference


def decoded(stored: Bytes, encoding: Encoding, count: int, *, half: bool = False) -> Values:
    """By both implementations, which must agree."""
    reference, ours = np.zeros(count, np.uint16), np.ones(count, np.uint16)
    encodings.decode(encoding, stored, reference, ROW, half=half)
    encodings_compiled.decode(encoding, stored, ours, ROW, half=half)
    assert np.array_equal(reference, ours)
    return reference


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", shapes_of_values())
@pytest.mark.parametrize("encoding", LOSSY)
def test_what_comes_back_is_near(encoding: Encoding, name: str, half: bool) -> None:
    values = shapes_of_values()[name]
    bits = as_half(values) if half else as_bf16(values)
    stored = encoded(bits, encoding, half=half)
    assert stored is not None
    before = encodings.floats_of(bits, half=half)
    after = encodings.floats_of(decoded(stored, encoding, bits.size, half=half), half=half)
    width = GROUP if encoding is Encoding.INT4_G64 else ROW
    error, size = abs(after - before).reshape(-1, width).max(axis=1), abs(before).reshape(-1, width).max(axis=1)
    smallest = 2.0**-24 if half or encoding is Encoding.INT4_G64 else 2.0**-118  # that a scale or a step can tell
    assert (error <= size * MOST_ERROR[encoding] + 16 * smallest).all()
    if name == "normal":
        stored[0] ^= 0x40
        error = abs(encodings.floats_of(decoded(stored, encoding, bits.size, half=half), half=half) - before)[:width]
        assert error.max() > size[0] * MOST_ERROR[encoding], "this comparison finds nothing out"


@settings(deadline=None)  # the first one compiles
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_no_bit_is_lost(seed: int, kinds: int) -> None:
    """bf16-fixed, over values of few and of many exponents."""
    random = np.random.default_rng(seed)
    exponents = 100 + random.integers(0, kinds, TILE + 128)
    signs, mantissas = random.integers(0, 2, exponents.size), random.integers(0, 128, exponents.size)
    bits = (signs << 15 | exponents << 7 | mantissas).astype(np.uint16)
    stored = encoded(bits, Encoding.BF16_FIXED)
    if kinds <= ESCAPE:
        assert stored is not None
    if kinds > ESCAPE + 1:
        assert stored is None
    if stored is not None:
        assert np.array_equal(decoded(stored, Encoding.BF16_FIXED, bits.size), bits)


def test_nan_and_infinity_come_back_only_without_loss() -> None:
    bits = as_bf16(np.random.default_rng(1).standard_normal(TILE).astype(np.float32))
    for odd in (0x7FC0, 0x7F80, 0xFF80, 0xFFFF):
        bits[5] = odd
        stored = encoded(bits, Encoding.BF16_FIXED)
        assert stored is not None
        assert np.array_equal(decoded(stored, Encoding.BF16_FIXED, bits.size), bits)
        assert [encoded(bits, encoding) for encoding in LOSSY] == [None] * len(LOSSY)
    half = as_half(np.ones(ROW, np.float32))
    half[3] = 0x7C00
    assert [encoded(half, encoding, half=True) for encoding in LOSSY] == [None] * len(LOSSY)


def test_as_many_escapes_as_fit_and_one_more() -> None:
    bits = as_bf16(np.ones(2 * TILE, np.float32))
    for number, exponent in enumerate(range(100, 115)):  # so many, and so often, that none is left in the codebook
        bits[number::ESCAPE] = exponent << 7
    rare = TILE + 5 + np.arange(ESCAPES + 1) * 61
    bits[rare[:-1]] = 200 << 7
    stored = encoded(bits, Encoding.BF16_FIXED)
    assert stored is not None
    assert np.array_equal(decoded(stored, Encoding.BF16_FIXED, bits.size), bits)
    bits[rare] = 200 << 7
    assert encoded(bits, Encoding.BF16_FIXED) is None


def test_values_beyond_a_half_are_unfit_for_int4() -> None:
    wide = np.zeros(ROW, np.float32)
    wide[0] = 1e5
    assert encoded(as_bf16(wide), Encoding.INT4_G64) is None
    wide[0], wide[1] = 6e4, -6e4  # each of them fits, and what lies between does not
    assert encoded(as_bf16(wide), Encoding.INT4_G64) is None
    assert encoded(as_bf16(wide), Encoding.INT8) is not None


def test_damaged_escapes_are_told() -> None:
    bits = as_bf16(np.ones(TILE, np.float32))
    good = encoded(bits, Encoding.BF16_FIXED)
    assert good is not None
    tail = good[-(4 + 3 * ESCAPES) :]
    tail[:4].view(np.uint32)[0] = ESCAPES + 1
    for implementation in (encodings, encodings_compiled):
        with pytest.raises(EncodingError, match="escapes"):
            implementation.decode(Encoding.BF16_FIXED, good, np.zeros(TILE, np.uint16), ROW, half=False)
    tail[:4].view(np.uint32)[0] = 1
    tail[4:6].view(np.uint16)[0] = TILE
    for implementation in (encodings, encodings_compiled):
        with pytest.raises(EncodingError, match="escapes"):
            implementation.decode(Encoding.BF16_FIXED, good, np.zeros(TILE, np.uint16), ROW, half=False)


@pytest.mark.parametrize("implementation", [encodings, encodings_compiled])
@pytest.mark.parametrize("encoding", Encoding)
def test_shapes_that_are_not_taken(encoding: Encoding, implementation: object) -> None:
    for values, row in (
        (0, 1),
        (128, 0),
        (128, 3),
        (4 if encoding in (Encoding.INT4_G64, Encoding.BF16_FIXED) else 6, 2),
    ):
        with pytest.raises(EncodingError, match="values"):
            encoded_bytes(encoding, values, row)
    bits, room = np.zeros(ROW, np.uint16), np.zeros(encoded_bytes(encoding, ROW, ROW) + 1, np.uint8)
    with pytest.raises(EncodingError, match="bytes for"):
        implementation.encode(encoding, bits, room, ROW, half=False)  # type: ignore[attr-defined]
    with pytest.raises(EncodingError, match="bytes for"):
        implementation.decode(encoding, room, bits, ROW, half=False)  # type: ignore[attr-defined]
    if encoding is Encoding.BF16_FIXED:
        with pytest.raises(EncodingError, match="bfloat16"):
            implementation.encode(encoding, bits, room[:-1], ROW, half=True)  # type: ignore[attr-defined]


def test_every_float_becomes_the_nearest_of_the_eight_bit_ones() -> None:
    values = np.concatenate([-E4M3[:127], E4M3[:127], np.linspace(-448, 448, 4001, dtype=np.float32)])
    rows: Floats = np.resize(values, (values.size + 7) // 8 * 8).astype(np.float32)
    row = np.concatenate([rows, np.full(8, 448, np.float32)])  # the scale is 1
    bits = as_half(row)
    exact = encodings.floats_of(bits, half=True)
    stored = np.zeros(encoded_bytes(Encoding.FP8, bits.size, bits.size), np.uint8)
    assert encodings_compiled.encode(Encoding.FP8, bits, stored, bits.size, half=True)
    found = E4M3[stored[: bits.size]]
    every = E4M3[[code for code in range(256) if code & 0x7F != 0x7F]]
    nearest = abs(exact[:, None] - every[None, :]).min(axis=1)
    assert np.array_equal(abs(found - exact), nearest)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("encoding", LOSSY)
def test_zeros_of_either_sign_are_the_same_bytes_everywhere(encoding: Encoding, half: bool) -> None:
    """`encoded` compares; all of a group may be minus zero."""
    zeros = np.random.default_rng(1).integers(0, 2, 4 * ROW).astype(np.uint16) << np.uint16(15)
    for values in (np.full(ROW, 0x8000, np.uint16), np.zeros(ROW, np.uint16), zeros):
        stored = encoded(values, encoding, half=half)
        assert stored is not None
        assert not (decoded(stored, encoding, values.size, half=half) & 0x7FFF).any()
