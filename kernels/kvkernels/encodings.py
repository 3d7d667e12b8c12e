"""Encodings of fixed size for blocks of 16-bit values: what a block takes is known before it is encoded.

So an encoded block has a slot of its own size in every tier, and a GPU writes it where it will lie. This file is the
definition, in NumPy: the compiled versions (`encodings_compiled`) and the CUDA ones (`cuda/encodings.cu`) give the same
bytes. Values are bfloat16 or IEEE half; N of them in a block, R in a row (one token of one head).

    int8        N x int8 | N/R x f32 scale                           x = q * scale, scale = largest / 127
    fp8         N x e4m3 | N/R x f32 scale                           x = q * scale, scale = largest / 448
    int4-g64    N/2 x two nibbles | N/64 x (f16 step, f16 low)       x = low + q * step, 64 neighbours a group
    bf16-fixed  16 B codebook | N x sign, mantissa | N/2 x two codes | of each tile its escapes:
                u32 count, 64 x u16 place, 64 x u8 exponent

Nibbles: byte j of a group (of a tile) holds value j below and value j + half of the group's (tile's) length above.
`bf16-fixed` is lossless. Its codebook are the 15 exponents that are most frequent among some 8,192 values, evenly
taken; the 16th code says that the exponent stands among the tile's escapes. The others are lossy: only by explicit
request.

Unfit, and not stored: for a lossy encoding a block with a NaN or an infinity, and for `int4-g64` one with values beyond
what a half holds; for `bf16-fixed` one with more escapes than fit a tile of 4,096 values.
"""

from enum import StrEnum
from typing import Final, TypeAlias

import numpy as np

from kvkernels.aligned import Bytes

Values: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint16]]"  # as bits
Floats: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"

GROUP: Final = 64
TILE: Final = 4096
ESCAPES: Final = 64  # of a tile
ESCAPE: Final = 15  # the code that says so
BOOK_BYTES: Final = 16
SAMPLES: Final = 8192  # values that tell the codebook, about
TILE_TAIL_BYTES: Final = 4 + 3 * ESCAPES
INT8_MOST: Final = np.float32(127)
FP8_MOST: Final = np.float32(448)
LEAST_SCALE: Final = np.float32(2.0**-126)  # rows below it are zeros: their scale has no reciprocal
HALF_MOST: Final = np.float32(65504)


class Encoding(StrEnum):
    """How a block is kept."""

    INT8 = "int8"
    FP8 = "fp8"
    INT4_G64 = "int4-g64"
    BF16_FIXED = "bf16-fixed"

    @property
    def is_lossless(self) -> bool:
        """Does every bit come back?"""
        return self is Encoding.BF16_FIXED


class EncodingError(ValueError):
    """A shape that an encoding does not take, or bytes that are none of its blocks."""


def encoded_bytes(encoding: Encoding, values: int, row: int) -> int:
    """Bytes of a block of so many values. Raises EncodingError for a shape that it does not take."""
    if values <= 0 or row <= 0 or values % row:
        raise EncodingError(f"{values} values in rows of {row}")
    if encoding in (Encoding.INT8, Encoding.FP8):
        if values % 4:
            raise EncodingError(f"{values} values: {encoding} takes a multiple of 4")
        return values + values // row * 4
    if encoding is Encoding.INT4_G64:
        if values % GROUP:
            raise EncodingError(f"{values} values: int4-g64 takes a multiple of {GROUP}")
        return values // 2 + values // GROUP * 4
    if values % 8:
        raise EncodingError(f"{values} values: bf16-fixed takes a multiple of 8")
    return BOOK_BYTES + values + values // 2 + -(-values // TILE) * TILE_TAIL_BYTES


def encode(encoding: Encoding, source: Values, target: Bytes, row: int, *, half: bool) -> bool:
    """Encode a block; False if it is unfit, and `target` is then undefined. `half`: IEEE half, not bfloat16.

    `target` has exactly `encoded_bytes`. Raises EncodingError for another size.
    """
    _check(encoding, source, target, row, half=half)
    if encoding is Encoding.BF16_FIXED:
        return _encode_fixed(source, target)
    values = floats_of(source, half=half)
    if not np.isfinite(values).all():
        return False
    if encoding is Encoding.INT4_G64:
        return _encode_int4(values, target)
    rows = values.reshape(-1, row)
    scales, inverses = _scales(rows, INT8_MOST if encoding is Encoding.INT8 else FP8_MOST)
    scaled = rows * inverses
    codes = np.rint(scaled).astype(np.int8).view(np.uint8) if encoding is Encoding.INT8 else _to_e4m3(scaled)
    target[: source.size] = codes.ravel()
    target[source.size :] = scales.view(np.uint8).ravel()
    return True


def decode(encoding: Encoding, encoded: Bytes, target: Values, row: int, *, half: bool) -> None:
    """Restore a block. Raises EncodingError for what is none."""
    _check(encoding, target, encoded, row, half=half)
    if encoding is Encoding.BF16_FIXED:
        _decode_fixed(encoded, target)
        return
    if encoding is Encoding.INT4_G64:
        values = _decode_int4(encoded, target.size)
    else:
        codes, scales = encoded[: target.size], encoded[target.size :].view(np.float32)
        plain = codes.view(np.int8).astype(np.float32) if encoding is Encoding.INT8 else E4M3[codes]
        values = (plain.reshape(-1, row) * scales[:, None]).ravel()
    target[:] = bits_of(values, half=half)


def floats_of(bits: Values, *, half: bool) -> Floats:
    """The values that 16 bits stand for."""
    if half:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bits_of(values: Floats, *, half: bool) -> Values:
    """The nearest 16-bit values, ties to even; finite ones only."""
    if half:
        return np.clip(values, -HALF_MOST, HALF_MOST).astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    # The largest float is nearer to infinity than to the largest bfloat16.
    rounded = (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def _check(encoding: Encoding, values: Values, encoded: Bytes, row: int, *, half: bool) -> None:
    wanted = encoded_bytes(encoding, values.size, row)
    if encoded.size != wanted:
        raise EncodingError(f"{encoded.size} bytes for {values.size} values as {encoding}, not {wanted}")
    if half and encoding is Encoding.BF16_FIXED:
        raise EncodingError("bf16-fixed takes bfloat16 only")


# -- rows with a scale ---------------------------------------------------------------------------------------------


def _scales(rows: Floats, most: np.float32) -> tuple[Floats, Floats]:
    """Scale of each row, and its reciprocal; both 0 for a row of nothing."""
    scales = (np.abs(rows).max(axis=1, keepdims=True) / most).astype(np.float32)
    scales[scales < LEAST_SCALE] = 0
    with np.errstate(divide="ignore"):
        inverses = np.where(scales > 0, np.float32(1) / scales, np.float32(0)).astype(np.float32)
    return scales, inverses


def _e4m3_table() -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    table = np.zeros(256, dtype=np.float32)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        table[code] = -size if code & 0x80 else size
    table[[0x7F, 0xFF]] = 0  # NaN, which is never written
    return table


E4M3: Final = _e4m3_table()


def _to_e4m3(values: Floats) -> Bytes:
    """Nearest, ties to even; the largest is 448."""
    wide = np.ascontiguousarray(values).view(np.uint32)
    sizes = wide & np.uint32(0x7FFFFFFF)
    normal = (sizes + np.uint32(0x7FFFF) + ((sizes >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    small = np.rint(np.abs(values) * np.float32(512)).astype(np.uint32)
    codes = np.where(sizes < np.uint32(0x3C800000), small, normal - np.uint32(960))  # 2**-6; 120 << 3
    signs = (wide >> np.uint32(24)) & np.uint32(0x80)
    whole: Bytes = (np.minimum(codes, np.uint32(0x7E)) | signs).astype(np.uint8)
    return whole


# -- int4 ----------------------------------------------------------------------------------------------------------


def _encode_int4(values: Floats, target: Bytes) -> bool:
    groups = values.reshape(-1, GROUP)
    low, high = groups.min(axis=1) + np.float32(0), groups.max(axis=1)  # minus zero is zero
    if max(-low.min(), high.max()) > HALF_MOST or (high - low).max() > HALF_MOST:
        return False
    lows = low.astype(np.float16)
    start = lows.astype(np.float32)
    steps = (np.maximum(high - start, np.float32(0)) / np.float32(15)).astype(np.float16)
    step = steps.astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(step > 0, np.float32(1) / step, np.float32(0)).astype(np.float32)
    codes = np.clip(np.rint((groups - start[:, None]) * inverse[:, None]), 0, 15).astype(np.uint8)
    nibbles = values.size // 2
    target[:nibbles] = (codes[:, : GROUP // 2] | (codes[:, GROUP // 2 :] << 4)).ravel()
    target[nibbles:] = np.stack([steps, lows], axis=1).view(np.uint8).ravel()
    return True


def _decode_int4(encoded: Bytes, values: int) -> Floats:
    nibbles = encoded[: values // 2].reshape(-1, GROUP // 2)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
    step, low = encoded[values // 2 :].view(np.float16).reshape(-1, 2).astype(np.float32).T
    decoded: Floats = (low[:, None] + codes * step[:, None]).ravel()
    return decoded


# -- bf16-fixed ----------------------------------------------------------------------------------------------------


def codebook_of(source: Values) -> Bytes:
    """The 15 most frequent exponents of the sample, of equally frequent ones the lower ones, and a zero."""
    step = source.size // SAMPLES | 1  # odd, or it would meet the same channel again and again
    counts = np.bincount((source[::step] >> 7) & 0xFF, minlength=256)
    book = np.zeros(BOOK_BYTES, dtype=np.uint8)
    book[:ESCAPE] = np.argsort(-counts, kind="stable")[:ESCAPE]
    return book


def _encode_fixed(source: Values, target: Bytes) -> bool:
    size = source.size
    exponents = ((source >> 7) & 0xFF).astype(np.uint8)
    book = codebook_of(source)
    code_of = np.full(256, ESCAPE, dtype=np.uint8)
    code_of[book[:ESCAPE]] = np.arange(ESCAPE, dtype=np.uint8)
    codes = code_of[exponents]
    target[:BOOK_BYTES] = book
    target[BOOK_BYTES : BOOK_BYTES + size] = ((source >> 8) & 0x80 | source & 0x7F).astype(np.uint8)
    nibbles, tails = _parts(target, size)
    tails[:] = 0
    for number, tail in enumerate(tails):
        its = codes[number * TILE : (number + 1) * TILE]
        half = its.size // 2
        nibbles[number * TILE // 2 : number * TILE // 2 + half] = its[:half] | (its[half:] << 4)
        places = np.flatnonzero(its == ESCAPE)
        if places.size > ESCAPES:
            return False
        tail[:4].view(np.uint32)[0] = places.size
        tail[4 : 4 + 2 * ESCAPES].view(np.uint16)[: places.size] = places
        tail[4 + 2 * ESCAPES :][: places.size] = exponents[number * TILE + places]
    return True


def _decode_fixed(encoded: Bytes, target: Values) -> None:
    book = encoded[:BOOK_BYTES].astype(np.uint16)
    plain = encoded[BOOK_BYTES : BOOK_BYTES + target.size].astype(np.uint16)
    nibbles, tails = _parts(encoded, target.size)
    for number, tail in enumerate(tails):
        its = target[number * TILE : (number + 1) * TILE]
        half = its.size // 2
        packed = nibbles[number * TILE // 2 : number * TILE // 2 + half]
        exponents = book[np.concatenate([packed & 15, packed >> 4])]
        count = int(tail[:4].view(np.uint32)[0])
        places = tail[4 : 4 + 2 * ESCAPES].view(np.uint16)[:count]
        if count > ESCAPES or (places >= its.size).any():
            raise EncodingError(f"a tile with {count} escapes")
        exponents[places] = tail[4 + 2 * ESCAPES :][:count]
        bits = plain[number * TILE : number * TILE + its.size]
        its[:] = (bits & 0x80) << 8 | exponents << 7 | bits & 0x7F


def _parts(encoded: Bytes, values: int) -> tuple[Bytes, "np.ndarray[tuple[int, int], np.dtype[np.uint8]]"]:
    """Where the codes lie, and the escapes of each tile."""
    begin = BOOK_BYTES + values
    end = begin + values // 2
    return encoded[begin:end], encoded[end:].reshape(-1, TILE_TAIL_BYTES)
