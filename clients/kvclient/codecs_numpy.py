"""The encodings of `kvkernels.encodings` for an engine's process: the same bytes, by NumPy and faster.

The definition there makes whole arrays of floats; here a block goes through in pieces that stay in a core's cache, in
buffers that each thread makes once. NumPy gives the GIL back while it works, and asks for it again after every step: in
a process whose other threads are busy in Python that wait is the price, and grows with the number of pieces.

Nothing here trusts encoded bytes: they may lie in a slot that is given to another block meanwhile. What comes out is
then wrong, and the lease says so; nothing is read or written beyond the arrays that were passed. Any thread.
"""

import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvkernels.aligned import Bytes
from kvkernels.encodings import (
    BOOK_BYTES,
    E4M3,
    ESCAPE,
    ESCAPES,
    FP8_MOST,
    GROUP,
    HALF_MOST,
    INT8_MOST,
    LEAST_SCALE,
    TILE,
    TILE_TAIL_BYTES,
    Encoding,
    EncodingError,
    Floats,
    Values,
    codebook_of,
    encoded_bytes,
)

CHUNK: Final = 1 << 17  # values at a time: 512 KiB as floats; a multiple of a tile
_U: Final = np.uint32
_ROUND: Final = np.float32(12582912.0)  # 1.5 * 2**23: a float next to it has no fraction, and ties went to even
_INFINITY: Final = {False: 0x7F80, True: 0x7C00}  # its bits, by whether values are halves
_NORMAL_E4M3: Final = _U(0x3C800000)  # 2**-6, the smallest normal one
_STEPS: Final = np.arange(ESCAPES)

_own = threading.local()


class _Room:
    """What one piece needs, of one thread."""

    def __init__(self, values: int) -> None:
        self.values = values
        self.wide = np.empty(values, np.uint32)
        self.more = np.empty(values, np.uint32)
        self.narrow = np.empty(values, np.uint16)
        self.other = np.empty(values, np.uint16)
        self.small = np.empty(values, np.uint8)


def _room(values: int) -> _Room:
    found: _Room | None = getattr(_own, "room", None)
    if found is None or found.values < values:
        found = _own.room = _Room(max(values, CHUNK))
    return found


def encode(encoding: Encoding, source: Values, target: Bytes, row: int, *, half: bool) -> bool:
    """As `kvkernels.encodings.encode`: False if the block is unfit, and `target` is then undefined."""
    _check(encoding, source, target, row, half=half)
    with np.errstate(all="ignore"):
        if encoding is Encoding.BF16_FIXED:
            return _encode_fixed(source, target)
        if encoding is Encoding.INT4_G64:
            return _encode_int4(source, target, half=half)
        return _encode_rows(encoding, source, target, row, half=half)


def decode(encoding: Encoding, encoded: Bytes, target: Values, row: int, *, half: bool) -> None:
    """As `kvkernels.encodings.decode`. Raises EncodingError for what is no block."""
    _check(encoding, target, encoded, row, half=half)
    with np.errstate(all="ignore"):
        if encoding is Encoding.BF16_FIXED:
            _decode_fixed(encoded, target)
        elif encoding is Encoding.INT4_G64:
            _decode_int4(encoded, target, half=half)
        else:
            _decode_rows(encoding, encoded, target, row, half=half)


def _check(encoding: Encoding, values: Values, encoded: Bytes, row: int, *, half: bool) -> None:
    wanted = encoded_bytes(encoding, values.size, row)
    if encoded.size != wanted:
        raise EncodingError(f"{encoded.size} bytes for {values.size} values as {encoding}, not {wanted}")
    if half and encoding is Encoding.BF16_FIXED:
        raise EncodingError("bf16-fixed takes bfloat16 only")


def _widen(bits: Values, room: _Room, *, half: bool) -> "tuple[NDArray[np.uint32], Floats]":
    """The values as floats in `room.wide`: as bits and as numbers."""
    wide = room.wide[: bits.size]
    floats = wide.view(np.float32)
    if half:
        np.copyto(floats, bits.view(np.float16))
    else:
        np.copyto(wide, bits)
        np.left_shift(wide, 16, out=wide)
    return wide, floats


def _narrow(room: _Room, target: Values, *, half: bool) -> None:
    """The nearest 16-bit values of the floats in `room.wide`, which are used up."""
    wide = room.wide[: target.size]
    if half:
        floats = wide.view(np.float32)
        np.clip(floats, -HALF_MOST, HALF_MOST, out=floats)
        np.copyto(target.view(np.float16), floats, casting="same_kind")
        return
    more = room.more[: target.size]
    np.right_shift(wide, 16, out=more)
    np.bitwise_and(more, 1, out=more)
    np.add(more, 0x7FFF, out=more)
    np.add(wide, more, out=wide)
    np.right_shift(wide, 16, out=wide)
    np.copyto(target, wide, casting="unsafe")


# -- rows with a scale -------------------------------------------------------------------------------------------------


def _encode_rows(encoding: Encoding, source: Values, target: Bytes, row: int, *, half: bool) -> bool:
    size, step = source.size, max(1, CHUNK // row) * row
    room = _room(step)
    scales = target[size:].view(np.float32)
    most = INT8_MOST if encoding is Encoding.INT8 else FP8_MOST
    for first in range(0, size, step):
        values = source[first : first + step]
        sizes = room.narrow[: values.size]
        np.bitwise_and(values, 0x7FFF, out=sizes)
        largest = np.maximum.reduce(sizes.reshape(-1, row), axis=1)
        if largest.max() >= _INFINITY[half]:
            return False
        scale = _as_floats(largest, half=half) / most
        scale[scale < LEAST_SCALE] = 0
        scales[first // row : first // row + scale.size] = scale
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)
        wide, floats = _widen(values, room, half=half)
        rows = floats.reshape(-1, row)
        np.multiply(rows, inverse[:, None], out=rows)
        codes = target[first : first + values.size]
        if encoding is Encoding.INT8:
            np.add(floats, _ROUND, out=floats)
            np.copyto(codes, wide, casting="unsafe")  # the lowest byte of each
        else:
            _to_e4m3(wide, values, codes, room)
    return True


def _as_floats(bits: "NDArray[np.uint16]", *, half: bool) -> Floats:
    if half:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << _U(16)).view(np.float32)


def _to_e4m3(wide: "NDArray[np.uint32]", values: Values, codes: Bytes, room: _Room) -> None:
    """Nearest codes of the scaled floats whose bits are in `wide`; their signs are those of `values`."""
    rounded = room.more[: wide.size]
    np.bitwise_and(wide, 0x7FFFFFFF, out=wide)
    np.right_shift(wide, 20, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, wide, out=rounded)
    np.add(rounded, _U(0x7FFFF), out=rounded)
    np.right_shift(rounded, 20, out=rounded)
    np.subtract(rounded, _U(960), out=rounded)  # of what is not normal any number, which the next lines replace
    odd = np.flatnonzero(wide < _NORMAL_E4M3)
    if odd.size:
        rounded[odd] = np.rint(wide[odd].view(np.float32) * np.float32(512)).astype(np.uint32)
    np.minimum(rounded, 0x7E, out=rounded)
    np.copyto(codes, rounded, casting="unsafe")
    signs = room.narrow[: wide.size]
    np.right_shift(values, 8, out=signs)
    np.bitwise_and(signs, 0x80, out=signs)
    small = room.small[: wide.size]
    np.copyto(small, signs, casting="unsafe")
    np.bitwise_or(codes, small, out=codes)


def _decode_rows(encoding: Encoding, encoded: Bytes, target: Values, row: int, *, half: bool) -> None:
    size, step = target.size, max(1, CHUNK // row) * row
    room = _room(step)
    scales = encoded[size:].view(np.float32)
    for first in range(0, size, step):
        values = target[first : first + step]
        codes = encoded[first : first + values.size]
        floats = room.wide[: values.size].view(np.float32)
        if encoding is Encoding.INT8:
            np.copyto(floats, codes.view(np.int8))
        else:
            np.take(E4M3, codes, out=floats, mode="clip")
        rows = floats.reshape(-1, row)
        np.multiply(rows, scales[first // row : first // row + len(rows), None], out=rows)
        _narrow(room, values, half=half)


# -- int4 --------------------------------------------------------------------------------------------------------------


def _encode_int4(source: Values, target: Bytes, *, half: bool) -> bool:
    size, middle = source.size, GROUP // 2
    room = _room(CHUNK)
    ends = target[size // 2 :].view(np.float16).reshape(-1, 2)
    for first in range(0, size, CHUNK):
        values = source[first : first + CHUNK]
        low, high = _ends(values, room, half=half)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return False
        wide, floats = _widen(values, room, half=half)
        groups = floats.reshape(-1, GROUP)
        if max(-low.min(), high.max()) > HALF_MOST or (high - low).max() > HALF_MOST:
            return False
        lows = low.astype(np.float16)
        start = lows.astype(np.float32)
        steps = (np.maximum(high - start, np.float32(0)) / np.float32(15)).astype(np.float16)
        step = steps.astype(np.float32)
        inverse = np.where(step > 0, np.float32(1) / step, np.float32(0)).astype(np.float32)
        its = ends[first // GROUP : first // GROUP + len(groups)]
        its[:, 0], its[:, 1] = steps, lows
        np.subtract(groups, start[:, None], out=groups)
        np.multiply(groups, inverse[:, None], out=groups)
        np.clip(floats, np.float32(0), np.float32(15), out=floats)
        np.add(floats, _ROUND, out=floats)
        codes = room.small[: values.size]
        np.copyto(codes, wide, casting="unsafe")
        np.bitwise_and(codes, 15, out=codes)
        pairs = codes.reshape(-1, GROUP)
        np.left_shift(pairs[:, middle:], 4, out=pairs[:, middle:])
        nibbles = target[first // 2 : (first + values.size) // 2].reshape(-1, middle)
        np.bitwise_or(pairs[:, :middle], pairs[:, middle:], out=nibbles)
    return True


def _ends(values: Values, room: _Room, *, half: bool) -> tuple[Floats, Floats]:
    """The least and the largest value of each group, not finite where the group has one that is not.

    Of whole numbers in the same order, which is twice as fast as of floats: NaN is beyond infinity there.
    """
    bits, ordered = values.view(np.int16), room.narrow[: values.size].view(np.int16)
    np.right_shift(bits, 15, out=ordered)
    np.bitwise_and(ordered, 0x7FFF, out=ordered)
    np.bitwise_xor(bits, ordered, out=ordered)
    groups = ordered.reshape(-1, GROUP)
    least, most = np.minimum.reduce(groups, axis=1), np.maximum.reduce(groups, axis=1)
    least ^= (least >> 15) & 0x7FFF
    most ^= (most >> 15) & 0x7FFF
    low, high = (_as_floats(each.view(np.uint16), half=half) for each in (least, most))
    return low + np.float32(0), high  # minus zero is zero


def _decode_int4(encoded: Bytes, target: Values, *, half: bool) -> None:
    size, middle = target.size, GROUP // 2
    room = _room(CHUNK)
    ends = encoded[size // 2 :].view(np.float16).reshape(-1, 2)
    for first in range(0, size, CHUNK):
        values = target[first : first + CHUNK]
        nibbles = encoded[first // 2 : (first + values.size) // 2].reshape(-1, middle)
        codes = room.small[: values.size].reshape(-1, GROUP)
        np.bitwise_and(nibbles, 15, out=codes[:, :middle])
        np.right_shift(nibbles, 4, out=codes[:, middle:])
        floats = room.wide[: values.size].view(np.float32)
        np.copyto(floats, codes.reshape(-1))
        step, low = ends[first // GROUP : first // GROUP + len(codes)].astype(np.float32).T
        groups = floats.reshape(-1, GROUP)
        np.multiply(groups, step[:, None], out=groups)
        np.add(groups, low[:, None], out=groups)
        _narrow(room, values, half=half)


# -- bf16-fixed --------------------------------------------------------------------------------------------------------


def _encode_fixed(source: Values, target: Bytes) -> bool:
    size = source.size
    room = _room(CHUNK)
    book = codebook_of(source)
    code_of = np.full(256, ESCAPE, dtype=np.uint8)
    code_of[book[:ESCAPE]] = np.arange(ESCAPE, dtype=np.uint8)
    target[:BOOK_BYTES] = book
    plain, nibbles = target[BOOK_BYTES : BOOK_BYTES + size], target[BOOK_BYTES + size : BOOK_BYTES + size + size // 2]
    tails = target[BOOK_BYTES + size + size // 2 :].reshape(-1, TILE_TAIL_BYTES)
    tails[:] = 0
    for first in range(0, size, CHUNK):
        values = source[first : first + CHUNK]
        count = values.size
        bits, more, codes = room.narrow[:count], room.other[:count], room.small[:count]
        np.right_shift(values, 8, out=bits)
        np.bitwise_and(bits, 0x80, out=bits)
        np.bitwise_and(values, 0x7F, out=more)
        np.bitwise_or(bits, more, out=bits)
        np.copyto(plain[first : first + count], bits, casting="unsafe")
        np.right_shift(values, 7, out=bits)
        np.bitwise_and(bits, 0xFF, out=bits)
        np.take(code_of, bits, out=codes, mode="clip")
        escapes = np.flatnonzero(codes == ESCAPE)
        if escapes.size and not _note_escapes(escapes, bits, tails[first // TILE :]):
            return False
        _pack_tiles(codes, nibbles[first // 2 : (first + count) // 2])
    return True


def _note_escapes(escapes: "NDArray[np.intp]", exponents: "NDArray[np.uint16]", tails: "NDArray[np.uint8]") -> bool:
    """Write them behind their tiles; False if they do not fit. `tails`: from that of the first value on."""
    tiles = escapes // TILE
    counts = np.bincount(tiles)
    if counts.max() > ESCAPES:
        return False
    ranks = np.arange(escapes.size) - (np.cumsum(counts) - counts)[tiles]
    its = tails[: counts.size]
    its[:, :4] = counts.astype(np.uint32)[:, None].view(np.uint8)
    its[:, 4 : 4 + 2 * ESCAPES].view(np.uint16)[tiles, ranks] = escapes % TILE
    its[:, 4 + 2 * ESCAPES :][tiles, ranks] = exponents[escapes]
    return True


def _pack_tiles(codes: Bytes, nibbles: Bytes) -> None:
    """Two codes a byte, half a tile apart; the last tile may be shorter."""
    whole = codes.size // TILE * TILE
    for part, its in ((codes[:whole], nibbles[: whole // 2]), (codes[whole:], nibbles[whole // 2 :])):
        if part.size:
            pairs = part.reshape(-1, 2, min(TILE, part.size) // 2)
            np.left_shift(pairs[:, 1], 4, out=pairs[:, 1])
            np.bitwise_or(pairs[:, 0], pairs[:, 1], out=its.reshape(pairs.shape[0], -1))


def _unpack_tiles(nibbles: Bytes, codes: Bytes) -> None:
    whole = codes.size // TILE * TILE
    for part, its in ((codes[:whole], nibbles[: whole // 2]), (codes[whole:], nibbles[whole // 2 :])):
        if part.size:
            pairs = part.reshape(-1, 2, min(TILE, part.size) // 2)
            packed = its.reshape(pairs.shape[0], -1)
            np.bitwise_and(packed, 15, out=pairs[:, 0])
            np.right_shift(packed, 4, out=pairs[:, 1])


def _decode_fixed(encoded: Bytes, target: Values) -> None:
    size = target.size
    room = _room(CHUNK)
    exponents = encoded[:BOOK_BYTES].astype(np.uint16) << np.uint16(7)
    plain = encoded[BOOK_BYTES : BOOK_BYTES + size]
    nibbles = encoded[BOOK_BYTES + size : BOOK_BYTES + size + size // 2]
    for first in range(0, size, CHUNK):
        values = target[first : first + CHUNK]
        count = values.size
        codes, bits, more = room.small[:count], room.narrow[:count], room.other[:count]
        _unpack_tiles(nibbles[first // 2 : (first + count) // 2], codes)
        np.take(exponents, codes, out=bits, mode="clip")
        np.copyto(more, plain[first : first + count])
        np.bitwise_and(more, 0x7F, out=values)
        np.bitwise_or(values, bits, out=values)
        np.bitwise_and(more, 0x80, out=more)
        np.left_shift(more, 8, out=more)
        np.bitwise_or(values, more, out=values)
    # Looked at and used in a copy: what lies in a slot may change in between.
    _restore_escapes(encoded[BOOK_BYTES + size + size // 2 :].reshape(-1, TILE_TAIL_BYTES).copy(), target)


def _restore_escapes(tails: "NDArray[np.uint8]", target: Values) -> None:
    counts = tails[:, :4].copy().view(np.uint32)[:, 0]
    if not counts.any():
        return
    if counts.max() > ESCAPES:
        raise EncodingError(f"a tile with {counts.max()} escapes")
    used = counts[:, None] > _STEPS
    tiles = np.nonzero(used)[0]
    at = tails[:, 4 : 4 + 2 * ESCAPES].view(np.uint16)[used].astype(np.intp)
    places = tiles * TILE + at
    if at.max() >= TILE or places.max() >= target.size:
        raise EncodingError(f"a tile with {counts.max()} escapes, one of them outside")
    found = tails[:, 4 + 2 * ESCAPES :][used].astype(np.uint16)
    target[places] = target[places] & np.uint16(0x807F) | found << np.uint16(7)
