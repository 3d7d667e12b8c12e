"""The codec `bf16-planes+zstd`: lossless for every length, and nothing but PlanesError for what is not a frame."""

import random
import subprocess
import sys

import numpy as np
import pytest

from kvkernels.aligned import PAGE_BYTES, Bytes, aligned
from kvkernels.planes import HEAD, PlanesError, pack, pack_reference, unpack, unpack_reference
from kvproto import limits

PLENTY = 1 << 40


def bf16(count: int, seed: int = 1) -> Bytes:
    """Values as a cache holds them: normal, in bfloat16."""
    wide = np.random.default_rng(seed).standard_normal(count, dtype=np.float32).view(np.uint32)
    return (wide >> 16).astype(np.uint16).view(np.uint8)


def noise(length: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def packed(source: Bytes) -> Bytes:
    done = pack(source, PLENTY)
    assert done is not None
    content, stored_bytes = done
    return content[:stored_bytes]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 4095, 4096, 4097, 100_000, 131_073, 2 << 20])
@pytest.mark.parametrize("kind", ["values", "noise", "zeros"])
def test_a_block_of_any_length_comes_back_as_it_was(length: int, kind: str) -> None:
    source = {"values": bf16(length)[:length], "noise": noise(length), "zeros": np.zeros(length, np.uint8)}[kind]
    done = pack(source, PLENTY)
    assert done is not None
    content, stored_bytes = done
    assert content.ctypes.data % PAGE_BYTES == 0
    assert content.size % PAGE_BYTES == 0
    assert 0 <= content.size - stored_bytes < PAGE_BYTES
    assert not content[stored_bytes:].any(), "padded with zeros"
    room = np.full(length + 2, 0xA5, np.uint8)
    unpack(content[:stored_bytes], room[1:-1])
    assert np.array_equal(room[1:-1], source)
    assert room[0] == room[-1] == 0xA5


@pytest.mark.parametrize("length", [1, 2, 3, 1000, 1001])
def test_the_planes_are_those_of_the_reference(length: int) -> None:
    source = noise(length)
    high, low, last = pack_reference(source.tobytes())
    assert unpack_reference(high, low, last) == source.tobytes()
    frame = packed(source).tobytes()
    assert frame[HEAD.size :] == high + low, "noise is stored as it is"
    assert frame[7:8] == (last or b"\0")
    assert len(last) == frame[6]


def test_bf16_values_shrink_by_a_quarter_and_noise_does_not() -> None:
    values = bf16(1 << 20)
    assert packed(values).size < 0.75 * values.size
    assert packed(noise(1 << 20)).size == (1 << 20) + HEAD.size


def test_what_does_not_fit_is_not_packed() -> None:
    values = bf16(1 << 16)
    stored_bytes = packed(values).size
    assert pack(values, stored_bytes) is not None
    for most_bytes in (stored_bytes - 1, 1 << 16, HEAD.size, HEAD.size - 1, 0):
        assert pack(values, most_bytes) is None
    assert pack(noise(1 << 20), (1 << 20) * 9 // 10) is None


def test_every_flipped_bit_of_a_small_frame_is_an_error_or_stays_inside_the_target() -> None:
    frame = packed(bf16(300))
    for bit in range(8 * frame.size):
        damaged = frame.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        room = np.full(600 + 2 * PAGE_BYTES, 0xA5, np.uint8)
        try:
            unpack(damaged, room[PAGE_BYTES : PAGE_BYTES + 600])
        except PlanesError:
            pass
        else:
            assert bit // 8 == 7 or bit // 8 >= HEAD.size, "all of the head is checked but the spare byte"
        assert (room[:PAGE_BYTES] == 0xA5).all()
        assert (room[PAGE_BYTES + 600 :] == 0xA5).all()


def test_a_frame_cut_short_or_drawn_out_is_an_error() -> None:
    frame, target = packed(bf16(300)), np.empty(600, np.uint8)
    for length in range(frame.size):
        with pytest.raises(PlanesError):
            unpack(frame[:length], target)
    with pytest.raises(PlanesError):
        unpack(np.concatenate([frame, np.zeros(1, np.uint8)]), target)


@pytest.mark.parametrize("length", [0, 1, 598, 599, 601, 602])
def test_a_frame_of_a_block_of_another_length_is_an_error(length: int) -> None:
    with pytest.raises(PlanesError):
        unpack(packed(bf16(300)), np.empty(length, np.uint8))


def test_a_frame_that_promises_more_than_its_plane_allocates_nothing() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))
    for pairs in (100, 1 << 20):  # without and with room for the window that it asks for
        head = HEAD.pack(b"KVPL", 1, 0, 0, 0, 2 * pairs, len(bomb), pairs)
        with pytest.raises(PlanesError, match="promises 1073741824"):
            unpack(np.frombuffer(head + bomb + bytes(pairs), np.uint8), np.empty(2 * pairs, np.uint8))


def test_random_bytes_are_never_a_frame() -> None:
    chance = random.Random(7)
    target = np.empty(64, np.uint8)
    for _ in range(2000):
        junk = b"KVPL" * chance.randrange(2) + chance.randbytes(chance.randrange(120))
        with pytest.raises(PlanesError):
            unpack(np.frombuffer(junk, np.uint8), target)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 1 << 20])
def test_aligned_buffers_are_whole_pages_on_a_page_boundary(length: int) -> None:
    assert PAGE_BYTES == limits.PAGE_BYTES
    buffer = aligned(length)
    assert buffer.ctypes.data % PAGE_BYTES == 0
    assert buffer.size % PAGE_BYTES == 0
    assert length <= buffer.size < length + PAGE_BYTES


def test_importing_the_codec_does_not_load_zstandard() -> None:
    code = "import sys, kvkernels.planes, kvkernels.libc; sys.exit('zstandard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
