"""Codecs: blocks of 16-bit values that lie encoded in DRAM and on disk, so that the store holds more of them.

    shape = (32, 2, 8, 16, 128)  # layers, keys and values, heads, tokens, head_dim
    ns = client.namespace(..., dtype="bfloat16", block_bytes=2 << 20, codec="int8", block_shape=shape, lossy=True)

`store` encodes into the ring (in mode direct into the slot itself), `copy_to` decodes into the caller's memory; the
daemon sees bytes like any others, and its checksums are of those. The codec is part of the namespace, and so nobody
takes an encoded block for another one; a head in front of each says once more what it is:

    "KVCB" | version u8 | codec u8 | values u8 (1 bfloat16, 2 float16) | 0 | values of a row u32 | 0 u32 | values u64
    zeros up to 64 bytes, and then what `kvkernels/encodings.py` draws

`raw` is no codec at all. Only `bf16-fixed` is lossless; others must be asked for with `lossy=True`. A block that its
codec cannot take (NaN or infinity in a lossy one, too many rare exponents in `bf16-fixed`) is not stored, nor is what
continues it: `Reason.UNFIT`. A slot has the size of an encoded block, so there is no room for it as it is.
"""

import importlib
import math
import operator
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, cast

import numpy as np

from kvkernels.aligned import Bytes
from kvkernels.encodings import Encoding, EncodingError, Values, bits_of, encoded_bytes
from kvproto.errors import UsageError

RAW: Final = "raw"
NAMES: Final = (RAW, *(encoding.value for encoding in Encoding))
DTYPES: Final = {"bfloat16": 1, "float16": 2}
ACCELERATORS: Final = {"": "kvclient.codecs_numpy", "numba": "kvkernels.encodings_compiled"}
VERSION: Final = 1
HEAD_BYTES: Final = 64  # a cache line: what follows begins where vector instructions like it
_HEAD: Final = struct.Struct("<4sBBBxIIQ")
_MAGIC: Final = b"KVCB"
_NUMBERS: Final = {Encoding.INT8: 1, Encoding.FP8: 2, Encoding.INT4_G64: 3, Encoding.BF16_FIXED: 4}  # never reused
_WITH_ROWS: Final = frozenset({Encoding.INT8, Encoding.FP8})


class _Way(Protocol):
    """Who encodes: `codecs_numpy`, or the compiled ones."""

    def encode(self, encoding: Encoding, source: Values, target: Bytes, row: int, *, half: bool) -> bool:
        """False: unfit."""

    def decode(self, encoding: Encoding, encoded: Bytes, target: Values, row: int, *, half: bool) -> None:
        """Raises EncodingError."""


class Codec:
    """How the blocks of one namespace are kept. Any thread.

    `plain_bytes` and `stored_bytes`: of one block, in the caller's memory and in the store. `text` names it in the
    namespace's identity: equal texts are interchangeable bytes.
    """

    def __init__(self, encoding: Encoding, dtype: str, values: int, row: int, accelerate: str) -> None:
        self.encoding = encoding
        self.plain_bytes = 2 * values
        try:
            self.stored_bytes = HEAD_BYTES + encoded_bytes(encoding, values, row)
        except EncodingError as error:
            raise UsageError(f"codec {encoding}: {error}") from error
        rows = f" rows of {row}" if encoding in _WITH_ROWS else ""
        self.text = f"{encoding}/{VERSION} {values} {dtype}{rows}"
        self.row = row
        self.half = dtype == "float16"
        self._way = _way(accelerate)
        self._compiled = bool(accelerate)
        fields = _HEAD.pack(_MAGIC, VERSION, _NUMBERS[encoding], DTYPES[dtype], row if rows else 0, 0, values)
        self._head = np.frombuffer(fields.ljust(HEAD_BYTES, b"\0"), np.uint8)

    @property
    def ratio(self) -> float:
        """Bytes of a plain block over those of a stored one."""
        return self.plain_bytes / self.stored_bytes

    def warm_up(self) -> None:
        """A block there and back: what is compiled on its first use is compiled now, and never while an engine waits.

        Some seconds, or tenths of one where numba has kept it. By NumPy there is nothing to do.
        """
        if self._compiled:
            plain, stored = np.zeros(self.plain_bytes, np.uint8), np.zeros(self.stored_bytes, np.uint8)
            self.encode(plain, stored)
            self.decode(stored, plain)

    def write_head(self, target: Bytes) -> None:
        """What stands in front of each block."""
        target[:HEAD_BYTES] = self._head

    def has_head(self, encoded: Bytes) -> bool:
        """Does a block of this very codec begin like that?"""
        return bool(np.array_equal(encoded[:HEAD_BYTES], self._head))

    def encode(self, source: Bytes, target: Bytes) -> bool:
        """`plain_bytes` into `stored_bytes`; False if this codec cannot take them, and `target` is then undefined."""
        values = source.view(np.uint16)
        if self._compiled and not values.flags.aligned:  # which would have it compiled anew
            values = values.copy()
        self.write_head(target)
        return self._way.encode(self.encoding, values, target[HEAD_BYTES:], self.row, half=self.half)

    def decode(self, encoded: Bytes, target: Bytes) -> bool:
        """`stored_bytes` into `plain_bytes`; False for what is no block of this codec."""
        if not self.has_head(encoded):
            return False
        encoded, values = encoded[HEAD_BYTES:], target.view(np.uint16)
        into = values
        if self._compiled:
            # It looks at places and goes by them, which may be another block's by then: nobody changes a copy.
            encoded = encoded.copy() if self.encoding is Encoding.BF16_FIXED else encoded
            into = values if values.flags.aligned else np.empty_like(values)
        try:
            self._way.decode(self.encoding, encoded, into, self.row, half=self.half)
        except EncodingError:
            return False
        if into is not values:
            values[:] = into
        return True


def codec_of(
    name: str,
    *,
    dtype: str,
    block_bytes: int,
    block_shape: Sequence[int] | None = None,
    lossy: bool = False,
    accelerate: str = "",
) -> Codec | None:
    """The codec that a caller named; None for raw. Raises UsageError where it does not fit such blocks."""
    if name in (RAW, ""):
        if accelerate:
            raise UsageError("accelerate is for codecs: raw blocks are only copied")
        return None
    try:
        encoding = Encoding(name)
    except ValueError as error:
        raise UsageError(f"codec is one of {', '.join(NAMES)}, not {name!r:.60}") from error
    if not encoding.is_lossless and lossy is not True:
        raise UsageError(f"codec {name} changes values: say lossy=True if that is wanted")
    if dtype not in DTYPES:
        raise UsageError(f"codec {name} takes blocks of dtype {' or '.join(DTYPES)}, not {dtype!r:.60}")
    if encoding is Encoding.BF16_FIXED and dtype != "bfloat16":
        raise UsageError(f"codec {name} takes dtype bfloat16 only, not {dtype!r}")
    if isinstance(block_bytes, bool) or not isinstance(block_bytes, int) or block_bytes <= 0 or block_bytes % 2:
        raise UsageError(f"codec {name}: block_bytes must be those of 16-bit values, not {block_bytes!r}")
    values = block_bytes // 2
    shape = _shape(block_shape)
    if shape is not None and math.prod(shape) != values:
        raise UsageError(f"block_shape {shape} has {math.prod(shape)} values, and {block_bytes} bytes are {values}")
    if shape is None and encoding in _WITH_ROWS:
        raise UsageError(f"codec {name} needs block_shape: values along its last axis (head_dim) share a scale")
    return Codec(encoding, dtype, values, values if shape is None else shape[-1], accelerate)


def is_text(name: object) -> bool:
    """Is this a codec as an identity has it? Who opens a namespace by such a text gets blocks as they lie, encoded."""
    return isinstance(name, str) and "/" in name


def _shape(block_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    if block_shape is None:
        return None
    try:
        shape = tuple(operator.index(axis) for axis in block_shape)
    except TypeError as error:
        raise UsageError(f"block_shape must be whole numbers, not {block_shape!r:.100}") from error
    if not shape or min(shape) < 1:
        raise UsageError(f"block_shape must be positive whole numbers, not {block_shape!r:.100}")
    return shape


def _way(accelerate: str) -> _Way:
    """Raises UsageError for what is not here. numba is only imported where it is asked for: engines may crash on it."""
    if accelerate not in ACCELERATORS:
        raise UsageError(f"accelerate is 'numba' or nothing, not {accelerate!r:.60}")
    try:
        return cast("_Way", importlib.import_module(ACCELERATORS[accelerate]))
    except (ImportError, RuntimeError) as error:  # RuntimeError: numba may write nowhere what it compiles
        raise UsageError(f"accelerate={accelerate!r}: {error}") from error


# -- which one pays ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speed:
    """What a codec was measured to do on a host: bytes of plain block a second, each way, and its ratio."""

    codec: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float


def choose(link_bytes_per_s: float, speeds: Sequence[Speed], *, lossy: bool = False, loads: float = 1.0) -> str:
    """The codec with which a store and `loads` loads over a link take the shortest time; "raw" if none helps.

    One after the other, nothing overlapping: a plain byte takes 1 / link raw, 1 / (link x ratio) + 1 / speed encoded.
    For one direction alone that is the rule that a codec pays if its speed exceeds link x ratio / (ratio - 1).
    `lossy`: those that change values count, too. Pure. What it says nothing about is that encoded blocks also take less
    room. A namespace is best given its codec by name all the same: two engines that choose differently share nothing.
    """
    if not link_bytes_per_s > 0 or not loads >= 0:
        raise UsageError(f"a link of {link_bytes_per_s} bytes a second, and {loads} loads a store")
    best, best_s = RAW, (1 + loads) / link_bytes_per_s
    for speed in speeds:
        if speed.codec == RAW or (not lossy and not Encoding(speed.codec).is_lossless):
            continue
        crossing_s = (1 + loads) / (link_bytes_per_s * speed.ratio)
        whole_s = crossing_s + 1 / speed.encode_bytes_per_s + loads / speed.decode_bytes_per_s
        if whole_s < best_s:
            best, best_s = speed.codec, whole_s
    return best


def pays(link_bytes_per_s: float, ratio: float, speed_bytes_per_s: float) -> bool:
    """Is a byte over this link sooner there encoded, one way, nothing overlapping?"""
    return ratio > 1 and speed_bytes_per_s > link_bytes_per_s * ratio / (ratio - 1)


def measure(
    block_bytes: int = 2 << 20, row: int = 128, *, accelerate: str = "",
    encodings: Sequence[Encoding] = tuple(Encoding), clock: Callable[[], float] = time.perf_counter,
) -> list[Speed]:  # fmt: skip
    """How fast each of these codecs is right here, in this thread, on bfloat16 blocks of normally distributed values.

    The best of three times four blocks each way: some tenths of a second in all. Raises UsageError.
    """
    random = np.random.default_rng(0)
    speeds = []
    for encoding in encodings:
        shape = (block_bytes // 2 // max(1, row), row)
        codec = codec_of(
            encoding, dtype="bfloat16", block_bytes=block_bytes, block_shape=shape, lossy=True, accelerate=accelerate
        )
        assert codec is not None
        values = random.standard_normal((4, block_bytes // 2), dtype=np.float32)
        plain = [bits_of(one, half=False).view(np.uint8) for one in values]
        stored = [np.zeros(codec.stored_bytes, np.uint8) for _ in plain]
        encode_s = _best(clock, partial(_each, codec.encode, plain, stored))
        decode_s = _best(clock, partial(_each, codec.decode, stored, plain))
        size = 4 * block_bytes
        speeds.append(Speed(encoding.value, codec.ratio, size / encode_s, size / decode_s))
    return speeds


def _each(work: Callable[[Bytes, Bytes], bool], sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
    for source, target in zip(sources, targets, strict=True):
        work(source, target)


def _best(clock: Callable[[], float], work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = clock()
        work()
        times.append(clock() - began)
    return max(min(times), 1e-9)
