"""What encoding a block takes on one core, against copying as many bytes, in turn: more than a cache holds of either.

A share is memcpy's seconds over the codec's, for the same bytes of the plain block. On a processor; what a GPU does is
for `bench gpu` to say. `client_X` is what an engine's process has unless its user asks for numba: NumPy, with the head.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from bench.harness import Findings, say
from kvclient.codecs import Speed, choose, codec_of
from kvkernels import encodings_compiled
from kvkernels.aligned import Bytes, aligned
from kvkernels.encodings import Encoding, Values, bits_of, encoded_bytes
from kvkernels.planes import join, split

BLOCK_BYTES = 2 << 20
ROW = 128
BLOCKS = 64  # 128 MiB
LINKS_GB_PER_S = (0.2, 1, 3, 10)  # a shared network's drive, two local ones, memory
Work = Callable[[], None]


def run(*, quick: bool) -> Findings:
    """All figures of `codec`. Needs 1 GiB of memory."""
    rounds = 3 if quick else 15
    source = values_like_kv(4 if quick else BLOCKS)
    target = [np.empty_like(block) for block in source]
    encoded = [aligned(BLOCK_BYTES) for _ in source]
    seconds: dict[str, list[float]] = {}

    def copy() -> None:
        for into, block in zip(target, source, strict=True):
            np.copyto(into, block)

    works: dict[str, Work] = {"memcpy": copy} | planes_of(source, encoded, target)
    for encoding in Encoding:
        works |= encodings_of(encoding, source, encoded, target)
        works |= client_of(encoding, source, target)
    for number in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if number:  # the first one compiles
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
            check(name, source, target)
        say(f"codec: {number} of {rounds}")
    total = len(source) * BLOCK_BYTES
    copying = median(seconds["memcpy"])
    results: Findings = {"gpu": "not measured"}
    for name, each in seconds.items():
        results[f"{name}_gb_per_s"] = total / median(each) / 1e9
        if name != "memcpy":
            results[f"{name}_over_memcpy"] = copying / median(each)
    results |= choices(results)
    for encoding in Encoding:
        size = encoded_bytes(encoding, BLOCK_BYTES // 2, ROW)
        results[f"{named(encoding)}_ratio"] = BLOCK_BYTES / size
    return results


def client_of(encoding: Encoding, source: Sequence[Values], target: Sequence[Values]) -> dict[str, Work]:
    """Each way, as a client does it."""
    codec = codec_of(encoding, dtype="bfloat16", block_bytes=BLOCK_BYTES, block_shape=(BLOCK_BYTES // 2 // ROW, ROW),
                     lossy=True)  # fmt: skip
    assert codec is not None
    encoded = [aligned(codec.stored_bytes)[: codec.stored_bytes] for _ in source]

    def into() -> None:
        for block, room in zip(source, encoded, strict=True):
            assert codec.encode(block.view(np.uint8), room), "unfit"

    def out() -> None:
        for block, room in zip(target, encoded, strict=True):
            assert codec.decode(room, block.view(np.uint8)), "none of the codec"

    return {f"client_{named(encoding)}_in": into, f"client_{named(encoding)}_out": out}


def choices(results: Findings) -> Findings:
    """What `kvclient.codecs.choose` makes of these figures, for links of some speeds and ten loads a store."""

    def speed(who: str, encoding: Encoding) -> Speed:
        figures = [results[f"{who}{named(encoding)}_{way}_gb_per_s"] for way in ("in", "out")]
        into, out = (float(figure) * 1e9 for figure in figures if isinstance(figure, float))
        return Speed(encoding, BLOCK_BYTES / encoded_bytes(encoding, BLOCK_BYTES // 2, ROW), into, out)

    found: Findings = {}
    for who in ("", "client_"):
        speeds = [speed(who, encoding) for encoding in Encoding]
        for link in LINKS_GB_PER_S:
            for kind, lossy in (("lossless", False), ("lossy", True)):
                found[f"{who}choice_{kind}_at_{link}_gb_per_s"] = choose(link * 1e9, speeds, lossy=lossy, loads=10)
    return found


def check(name: str, source: Sequence[Values], target: Sequence[Values]) -> None:
    """Outside every clock: what is lossless came back, and nothing is left for the next look to find."""
    if name in {"planes_out", "bf16_fixed_out", "client_bf16_fixed_out"}:
        for into, block in zip(target, source, strict=True):
            assert np.array_equal(into, block), f"{name} lost something"
    for into in target:
        into[:] = 0


def named(encoding: Encoding) -> str:
    """In a figure's name."""
    return encoding.value.replace("-", "_")


def values_like_kv(blocks: int) -> list[Values]:
    """bfloat16 of a normal distribution whose channels have scales of their own. Synthetic, and called so."""
    random = np.random.default_rng(0)
    channels = np.exp(random.standard_normal(ROW) / 2).astype(np.float32)
    rows = random.standard_normal((BLOCK_BYTES // 2 // ROW, ROW), dtype=np.float32) * channels
    one = bits_of(rows.ravel(), half=False)
    return [np.roll(one, 1009 * number) for number in range(blocks)]


def planes_of(source: Sequence[Values], encoded: Sequence[Bytes], target: Sequence[Values]) -> dict[str, Work]:
    """High and low bytes apart, and together again."""
    half = BLOCK_BYTES // 2

    def into() -> None:
        for block, room in zip(source, encoded, strict=True):
            split(block, room[:half], room[half:])

    def out() -> None:
        for block, room in zip(target, encoded, strict=True):
            join(room[:half], room[half:], block)

    return {"planes_in": into, "planes_out": out}


def encodings_of(
    encoding: Encoding, source: Sequence[Values], encoded: Sequence[Bytes], target: Sequence[Values]
) -> dict[str, Work]:
    """Each way."""
    size = encoded_bytes(encoding, BLOCK_BYTES // 2, ROW)

    def into() -> None:
        for block, room in zip(source, encoded, strict=True):
            assert encodings_compiled.encode(encoding, block, room[:size], ROW, half=False), "unfit"

    def out() -> None:
        for block, room in zip(target, encoded, strict=True):
            encodings_compiled.decode(encoding, room[:size], block, ROW, half=False)

    return {f"{named(encoding)}_in": into, f"{named(encoding)}_out": out}
