"""The encodings of `encodings.py` for a processor: the same bytes, compiled.

Imports numba, so engines must not unless their users ask for it.

Loops are written so that they become vector instructions: sizes are compared as integers, halves of a group lie apart,
rounding adds 1.5 * 2**23. All functions release the GIL; any thread. Compiled on first use, and then kept on disk.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from kvkernels.aligned import Bytes
from kvkernels.encodings import (
    BOOK_BYTES,
    E4M3,
    ESCAPE,
    ESCAPES,
    GROUP,
    SAMPLES,
    TILE,
    TILE_TAIL_BYTES,
    Encoding,
    EncodingError,
    Values,
    encoded_bytes,
)

_F, _U, _H = np.float32, np.uint32, np.uint16
_ROUND: Final = _F(12582912.0)  # 1.5 * 2**23: a float next to it has no fraction, and ties went to even
_LEAST: Final = _F(2.0**-126)
_WIDER: Final = _F(2.0**112)  # between the exponents of a float and of a half
_LEAST_HALF: Final = _F(2.0**-14)  # that is normal
_HALF_MOST: Final = _F(65504)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    jitted: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")(function)
    return jitted


# -- 16 bits and floats --------------------------------------------------------------------------------------------


@_compiled
def _widen_bf16(bits: Any) -> Any:
    return _U(_U(bits) << _U(16)).view(_F)


@_compiled
def _narrow_bf16(value: Any) -> Any:
    wide = _U(_F(value).view(_U))
    return _H(_U(wide + _U(0x7FFF) + _U(_U(wide >> _U(16)) & _U(1))) >> _U(16))


@_compiled
def _widen_half(bits: Any) -> Any:
    size = _F(_U(_U(_U(bits) & _U(0x7FFF)) << _U(13)).view(_F)) * _WIDER
    return _U(_U(_F(size).view(_U)) | _U(_U(_U(bits) & _U(0x8000)) << _U(16))).view(_F)


@_compiled
def _narrow_half(value: Any) -> Any:
    wide = _U(_F(value).view(_U))
    size = min(_F(_U(wide & _U(0x7FFFFFFF)).view(_F)), _HALF_MOST)
    bits = _U(_F(size).view(_U))
    normal = _U(_U(bits + _U(0xFFF) + _U(_U(bits >> _U(13)) & _U(1))) >> _U(13)) - _U(112 << 10)
    small = _U(_U(_F(_F(size * _F(16777216.0)) + _ROUND).view(_U)) & _U(0x7FFF))
    return _H(_U(_U(small if size < _LEAST_HALF else normal) | _U(_U(wide >> _U(16)) & _U(0x8000))))


@_compiled
def _nearest_e4m3(value: Any) -> Any:
    wide = _U(_F(value).view(_U))
    size = _U(wide & _U(0x7FFFFFFF))
    normal = _U(_U(size + _U(0x7FFFF) + _U(_U(size >> _U(20)) & _U(1))) >> _U(20)) - _U(960)
    plain = _F(size.view(_F))
    small = _U(_U(_F(_F(plain * _F(512)) + _ROUND).view(_U)) & _U(0xFF))
    code = small if size < _U(0x3C800000) else normal
    return np.uint8(_U(min(_U(code), _U(0x7E))) | _U(_U(wide >> _U(24)) & _U(0x80)))


class _Rows(NamedTuple):
    """What goes by whether values are bfloat16 or halves."""

    encode_int8: Callable[..., Any]
    decode_int8: Callable[..., Any]
    encode_fp8: Callable[..., Any]
    decode_fp8: Callable[..., Any]
    encode_int4: Callable[..., Any]
    decode_int4: Callable[..., Any]


def _rows(widen: Callable[..., Any], narrow: Callable[..., Any], infinity: int) -> _Rows:  # noqa: C901, PLR0915  a list of them
    """`infinity`: its bits; what is not below them is not finite."""
    most_bits = _H(infinity)

    @_compiled
    def scale_of(values: Any, most: Any) -> Any:
        """Of a row; negative if it is not finite."""
        largest = _H(0)
        for i in range(values.size):
            largest = max(largest, _H(values[i] & _H(0x7FFF)))
        if largest >= most_bits:
            return _F(-1)
        scale = _F(widen(largest)) / most
        return scale if scale >= _LEAST else _F(0)

    @_compiled
    def encode_int8(source: Any, codes: Any, scales: Any, row: Any) -> Any:
        for r in range(scales.size):
            values, its = source[r * row : (r + 1) * row], codes[r * row : (r + 1) * row]
            scale = scale_of(values, _F(127))
            if scale < 0:
                return False
            scales[r] = scale
            inverse = _F(1) / scale if scale > 0 else _F(0)
            for i in range(row):
                its[i] = np.int8(_F(_F(_F(widen(values[i])) * inverse) + _ROUND).view(_U))
        return True

    @_compiled
    def decode_int8(codes: Any, scales: Any, target: Any, row: Any) -> None:
        for r in range(scales.size):
            its, values, scale = codes[r * row : (r + 1) * row], target[r * row : (r + 1) * row], scales[r]
            for i in range(row):
                values[i] = narrow(_F(_F(its[i]) * scale))

    @_compiled
    def encode_fp8(source: Any, codes: Any, scales: Any, row: Any) -> Any:
        for r in range(scales.size):
            values, its = source[r * row : (r + 1) * row], codes[r * row : (r + 1) * row]
            scale = scale_of(values, _F(448))
            if scale < 0:
                return False
            scales[r] = scale
            inverse = _F(1) / scale if scale > 0 else _F(0)
            for i in range(row):
                its[i] = _nearest_e4m3(_F(_F(widen(values[i])) * inverse))
        return True

    @_compiled
    def decode_fp8(codes: Any, scales: Any, table: Any, target: Any, row: Any) -> None:
        for r in range(scales.size):
            its, values, scale = codes[r * row : (r + 1) * row], target[r * row : (r + 1) * row], scales[r]
            for i in range(row):
                values[i] = narrow(_F(table[its[i]] * scale))

    @_compiled
    def encode_int4(source: Any, nibbles: Any, steps: Any) -> Any:
        half = GROUP // 2
        plain = np.empty(GROUP, dtype=np.float32)
        for g in range(steps.shape[0]):
            values, its = source[g * GROUP : (g + 1) * GROUP], nibbles[g * half : (g + 1) * half]
            least, most = np.int16(0x7FFF), np.int16(-0x8000)
            for i in range(GROUP):
                bits = np.int16(values[i])
                ordered = np.int16(bits ^ np.int16(np.int16(bits >> np.int16(15)) & np.int16(0x7FFF)))
                least, most = min(least, ordered), max(most, ordered)
                plain[i] = widen(values[i])
            if most >= most_bits or ~least >= most_bits:
                return False
            low = _F(widen(_H(least ^ np.int16(np.int16(least >> np.int16(15)) & np.int16(0x7FFF)))))
            high = _F(widen(_H(most ^ np.int16(np.int16(most >> np.int16(15)) & np.int16(0x7FFF)))))
            low = _F(low + _F(0))  # minus zero is zero
            if max(-low, high) > _HALF_MOST or _F(high - low) > _HALF_MOST:
                return False
            low_bits = _narrow_half(low)
            start = _F(_widen_half(low_bits))
            extent = _F(high - start)
            step_bits = _narrow_half(_F((extent if extent > 0 else _F(0)) / _F(15)))  # `max` may give minus zero
            step = _F(_widen_half(step_bits))
            inverse = _F(1) / step if step > 0 else _F(0)
            steps[g, 0], steps[g, 1] = step_bits, low_bits
            for i in range(half):
                first = min(max(_F(_F(plain[i] - start) * inverse), _F(0)), _F(15))
                second = min(max(_F(_F(plain[i + half] - start) * inverse), _F(0)), _F(15))
                below = _U(_U(_F(first + _ROUND).view(_U)) & _U(15))
                above = _U(_U(_F(second + _ROUND).view(_U)) & _U(15))
                its[i] = np.uint8(_U(below | _U(above << _U(4))))
        return True

    @_compiled
    def decode_int4(nibbles: Any, steps: Any, target: Any) -> None:
        half = GROUP // 2
        for g in range(steps.shape[0]):
            its, values = nibbles[g * half : (g + 1) * half], target[g * GROUP : (g + 1) * GROUP]
            step, low = _F(_widen_half(steps[g, 0])), _F(_widen_half(steps[g, 1]))
            for i in range(half):
                values[i] = narrow(_F(low + _F(_F(its[i] & 15) * step)))
                values[i + half] = narrow(_F(low + _F(_F(its[i] >> 4) * step)))

    return _Rows(encode_int8, decode_int8, encode_fp8, decode_fp8, encode_int4, decode_int4)


_BF16: Final = _rows(_widen_bf16, _narrow_bf16, 0x7F80)
_HALF: Final = _rows(_widen_half, _narrow_half, 0x7C00)


# -- bf16-fixed ----------------------------------------------------------------------------------------------------


@_compiled
def _codebook(source: Any, book: Any) -> None:
    counts = np.zeros(256, dtype=np.int64)
    for i in range(0, source.size, source.size // SAMPLES | 1):
        counts[(source[i] >> 7) & 0xFF] += 1
    for code in range(ESCAPE):
        best = 0
        for exponent in range(256):
            if counts[exponent] > counts[best]:
                best = exponent
        book[code] = best
        counts[best] = -1
    book[ESCAPE] = 0


@_compiled
def _encode_fixed(source: Any, target: Any) -> Any:
    size = source.size
    _codebook(source, target[:BOOK_BYTES])
    code_of = np.full(256, ESCAPE, dtype=np.uint8)
    for code in range(ESCAPE):
        code_of[target[code]] = code
    plain = target[BOOK_BYTES : BOOK_BYTES + size]
    for i in range(size):
        plain[i] = np.uint8(_H(_H(_H(source[i] >> _H(8)) & _H(0x80)) | _H(source[i] & _H(0x7F))))
    nibbles = target[BOOK_BYTES + size : BOOK_BYTES + size + size // 2]
    tails = target[BOOK_BYTES + size + size // 2 :]
    tails[:] = 0
    for tile in range((size + TILE - 1) // TILE):
        values = source[tile * TILE : min(size, (tile + 1) * TILE)]
        half = values.size // 2
        its = nibbles[tile * (TILE // 2) : tile * (TILE // 2) + half]
        escapes = 0
        for i in range(half):
            below, above = code_of[(values[i] >> 7) & 0xFF], code_of[(values[i + half] >> 7) & 0xFF]
            its[i] = below | (above << 4)
            escapes += (below == ESCAPE) + (above == ESCAPE)
        if escapes and not _note_escapes(values, code_of, tails[tile * TILE_TAIL_BYTES :], escapes):
            return False
    return True


@_compiled
def _note_escapes(values: Any, code_of: Any, tail: Any, escapes: Any) -> Any:
    if escapes > ESCAPES:
        return False
    tail[:4].view(np.uint32)[0] = escapes
    places, exponents = tail[4 : 4 + 2 * ESCAPES].view(np.uint16), tail[4 + 2 * ESCAPES :]
    found = 0
    for i in range(values.size):
        exponent = (values[i] >> 7) & 0xFF
        if code_of[exponent] == ESCAPE:
            places[found], exponents[found] = i, exponent
            found += 1
    return True


@_compiled
def _decode_fixed(encoded: Any, target: Any) -> Any:
    size = target.size
    book = encoded[:BOOK_BYTES]
    plain = encoded[BOOK_BYTES : BOOK_BYTES + size]
    nibbles = encoded[BOOK_BYTES + size : BOOK_BYTES + size + size // 2]
    tails = encoded[BOOK_BYTES + size + size // 2 :]
    shifted = np.empty(16, dtype=np.uint16)
    for code in range(16):
        shifted[code] = _H(book[code]) << 7
    for tile in range((size + TILE - 1) // TILE):
        begin = tile * TILE
        values = target[begin : min(size, begin + TILE)]
        signs = plain[begin : begin + values.size]
        half = values.size // 2
        its = nibbles[begin // 2 : begin // 2 + half]
        for i in range(half):
            values[i] = _H(_H(_H(signs[i] & 0x80) << 8) | shifted[its[i] & 15] | _H(signs[i] & 0x7F))
        for i in range(half):
            value = signs[i + half]
            values[i + half] = _H(_H(_H(value & 0x80) << 8) | shifted[its[i] >> 4] | _H(value & 0x7F))
        tail = tails[tile * TILE_TAIL_BYTES : (tile + 1) * TILE_TAIL_BYTES]
        count = tail[:4].view(np.uint32)[0]
        if count > ESCAPES:
            return False
        places, exponents = tail[4 : 4 + 2 * ESCAPES].view(np.uint16), tail[4 + 2 * ESCAPES :]
        for k in range(count):
            if places[k] >= values.size:
                return False
            values[places[k]] = _H(_H(values[places[k]] & _H(0x807F)) | _H(_H(exponents[k]) << _H(7)))
    return True


# -- what callers see ----------------------------------------------------------------------------------------------


def encode(encoding: Encoding, source: Values, target: Bytes, row: int, *, half: bool) -> bool:
    """As `encodings.encode`."""
    _check(encoding, source, target, row, half=half)
    if encoding is Encoding.BF16_FIXED:
        return bool(_encode_fixed(source, target))
    rows, size = _HALF if half else _BF16, source.size
    if encoding is Encoding.INT4_G64:
        return bool(rows.encode_int4(source, target[: size // 2], target[size // 2 :].view(np.uint16).reshape(-1, 2)))
    scales = target[size:].view(np.float32)
    if encoding is Encoding.INT8:
        return bool(rows.encode_int8(source, target[:size].view(np.int8), scales, row))
    return bool(rows.encode_fp8(source, target[:size], scales, row))


def decode(encoding: Encoding, encoded: Bytes, target: Values, row: int, *, half: bool) -> None:
    """As `encodings.decode`."""
    _check(encoding, target, encoded, row, half=half)
    rows, size = _HALF if half else _BF16, target.size
    if encoding is Encoding.BF16_FIXED:
        if not _decode_fixed(encoded, target):
            raise EncodingError("a tile with escapes that it cannot have")
    elif encoding is Encoding.INT4_G64:
        rows.decode_int4(encoded[: size // 2], encoded[size // 2 :].view(np.uint16).reshape(-1, 2), target)
    elif encoding is Encoding.INT8:
        rows.decode_int8(encoded[:size].view(np.int8), encoded[size:].view(np.float32), target, row)
    else:
        rows.decode_fp8(encoded[:size], encoded[size:].view(np.float32), E4M3, target, row)


def _check(encoding: Encoding, values: Values, encoded: Bytes, row: int, *, half: bool) -> None:
    wanted = encoded_bytes(encoding, values.size, row)
    if encoded.size != wanted:
        raise EncodingError(f"{encoded.size} bytes for {values.size} values as {encoding}, not {wanted}")
    if half and encoding is Encoding.BF16_FIXED:
        raise EncodingError("bf16-fixed takes bfloat16 only")
