"""The kernels that split blocks into byte planes and join them: on a processor they give the bytes of the reference."""

import ctypes
import os

import numpy as np
import pytest

from kvkernels import libc, planes
from kvkernels.aligned import Bytes, aligned
from kvkernels.device.paged import low_plane_at, planes_bytes
from tests.unit.cuda_kit import Engine, PagesOf, on_a_processor, run
from tests.values import as_bf16, shapes_of_values


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    """The kernels, for a processor."""
    return on_a_processor()


def planes_of(block: Bytes) -> tuple[Bytes, Bytes]:
    """High and low plane by the reference; the last byte of an odd length is a low one."""
    pairs = block.size // 2
    high, low = np.zeros(pairs, np.uint8), np.zeros(block.size - pairs, np.uint8)
    planes.split(block[: 2 * pairs].view(np.uint16), high, low[:pairs])
    low[pairs:] = block[2 * pairs :]
    return high, low


def check_planes(emulated: ctypes.CDLL, engine: Engine, block_bytes: int, block: int = 64) -> None:
    """All blocks of an engine: split as the reference splits them, and joined again, with nothing written beside."""
    whole = engine.take() if engine.count else np.zeros((0, block_bytes), np.uint8)
    stride = (planes_bytes(block_bytes) + 79) // 16 * 16
    stored, low_at = np.full((engine.count, stride), 0xDD, np.uint8), low_plane_at(block_bytes)
    assert low_at % 16 == 0
    run(emulated, "split_planes", engine, stored, block=block)
    for found, plain in zip(stored, whole, strict=True):
        high, low = planes_of(plain)
        assert np.array_equal(found[: high.size], high)
        assert np.array_equal(found[low_at : low_at + low.size], low)
        assert (found[high.size : low_at] == 0xDD).all(), "written between the planes"
        assert (found[low_at + low.size :] == 0xDD).all(), "written behind a block"
    stored[:, : block_bytes // 2] ^= 0x80
    wanted = whole.copy()
    wanted[:, 1::2] ^= 0x80
    engine.memory[:] = 0xEE
    run(emulated, "join_planes", engine, stored, block=block)
    if not engine.count:
        assert (engine.memory == 0xEE).all(), "written where there is no block"
        return
    assert np.array_equal(engine.take(), wanted)
    assert np.array_equal(wanted, whole) == (block_bytes < 2), "this comparison finds nothing out"
    assert (engine.outside == 0xEE).all(), "written outside its pages"


@pytest.mark.parametrize("ids", [[], [4], [8, 0, 3, 1]])
@pytest.mark.parametrize(
    "length", [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64, 1000, 1001, 4095, 4096, 4097, 4128, 12_305]
)
def test_blocks_of_any_length_become_planes_and_blocks_again(
    emulated: ctypes.CDLL, length: int, ids: list[int]
) -> None:
    engine = Engine(1, length, ids, apart_bytes=48 + -length % 16)
    if ids:
        engine.put(np.random.default_rng(length).integers(0, 256, (len(ids), length), dtype=np.uint8))
    check_planes(emulated, engine, length)


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize(("pieces", "piece_bytes"), [(2, 16), (3, 48), (2, 4096), (3, 4112), (5, 12304), (64, 256)])
def test_pages_become_planes_and_pages_again(emulated: ctypes.CDLL, pieces: int, piece_bytes: int, block: int) -> None:
    """Pieces that are odd multiples of 16 begin in the middle of an access of the planes."""
    engine = Engine(pieces, piece_bytes, [6, 1, 7])
    engine.put(np.random.default_rng(5).integers(0, 256, (3, pieces * piece_bytes), dtype=np.uint8))
    check_planes(emulated, engine, pieces * piece_bytes, block)


@pytest.mark.parametrize("odd", [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0x0001])
def test_planes_keep_what_is_not_finite(emulated: ctypes.CDLL, odd: int) -> None:
    values = as_bf16(shapes_of_values()["normal"])[:3000].copy()
    values[[0, 777, 2999]] = odd
    engine = Engine(1, 6000, [2], apart_bytes=16)
    engine.put(values.view(np.uint8).reshape(1, -1))
    check_planes(emulated, engine, 6000)


def test_a_hundred_thousand_blocks_become_planes(emulated: ctypes.CDLL) -> None:
    count = 100_000
    ids = np.random.default_rng(6).permutation(count)
    engine = Engine(2, 16, [0], room=count, apart_bytes=0)
    engine.memory[: 32 * count] = np.random.default_rng(7).integers(0, 256, 32 * count, dtype=np.uint8)
    before = engine.memory[: 32 * count].copy()
    engine.point_at(ids)
    stored = np.zeros((count, 32), np.uint8)
    run(emulated, "split_planes", engine, stored)
    whole = before.reshape(2, count, 16)[:, ids].transpose(1, 0, 2).reshape(count, 32)
    assert np.array_equal(stored[:, :16], whole[:, 1::2])
    assert np.array_equal(stored[:, 16:], whole[:, 0::2])
    assert not np.array_equal(stored[:, 16:], stored[:, :16])
    engine.memory[: 32 * count] = 0
    run(emulated, "join_planes", engine, stored)
    assert np.array_equal(engine.memory[: 32 * count], before)
    assert before.any()


def test_planes_may_lie_far_apart(emulated: ctypes.CDLL) -> None:
    """Pages and planes at offsets of more than 32 bits: of 9 GiB only what is touched is there."""
    apart, length, whole_bytes = (1 << 32) + 64, 4128, 9 << 30
    low_at = low_plane_at(length)
    source = aligned(length)
    source[:] = np.random.default_rng(8).integers(0, 256, source.size, dtype=np.uint8)
    tables = (
        np.array([(source.ctypes.data - 99_999 * (1 << 20)) % (1 << 64)], np.uint64),
        np.array([1 << 20], np.int64),
        np.array([99_999] * 3, np.int64),
    )
    engine = Engine(1, length, [0])
    engine.pages = PagesOf(*(table.ctypes.data for table in tables), length, 1)
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, whole_bytes)
    first = libc.map_shared(fd, whole_bytes, writable=True)
    try:
        stored = np.lib.stride_tricks.as_strided(libc.bytes_at(first, whole_bytes), (3, length), (apart, 1))
        run(emulated, "split_planes", engine, stored, block=64)
        high, low = planes_of(source[:length])
        for found in stored:
            assert np.array_equal(found[: high.size], high)
            assert np.array_equal(found[low_at:], low)
            assert not np.array_equal(high, low)
        plain = source.copy()
        source[:] = 0
        run(emulated, "join_planes", engine, stored, block=64)
        assert np.array_equal(source[:length], plain[:length])
        assert not source[length:].any()
    finally:
        libc.unmap(first, whole_bytes)
        os.close(fd)
