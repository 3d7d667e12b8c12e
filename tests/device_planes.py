"""Byte planes on every device: a part of device_suite.py, whose fixtures it uses."""

import numpy as np
import pytest

from kvkernels import planes
from kvkernels.device.paged import Paged, low_plane_at, planes_bytes
from kvkernels.device.pages import Pages
from kvkernels.device.port import Device, Direction, Stream, UnfitError
from kvkernels.device.tables import Tables
from tests.device_kit import KIB, EngineMemory, Host


class PlanesSuite:
    """Needs `device`, `stream` and `tables`."""

    @pytest.mark.parametrize("ids", [[], [5], [6, 0, 3, 1]])
    @pytest.mark.parametrize("page_bytes", [4112, 8192])
    def test_pages_become_the_planes_of_the_reference_and_pages_again(
        self, device: Device, stream: Stream, tables: Tables, ids: list[int], page_bytes: int
    ) -> None:
        engine = EngineMemory(device, stream, layers=3, blocks=7, page_bytes=page_bytes)
        pairs, low_at = 3 * page_bytes // 2, low_plane_at(3 * page_bytes)
        stride = (planes_bytes(3 * page_bytes) + 31) // 16 * 16
        room, paged = Host(device, max(1, len(ids)) * stride), Paged(device, tables)
        where, high, low = (
            device.reach(room.address, room.bytes.size),
            np.zeros(pairs, np.uint8),
            np.zeros(pairs, np.uint8),
        )
        paged.split(stream, engine.pages, ids, where, stride).event.wait()
        blocks = room.bytes.reshape(-1, stride)
        for number, page in enumerate(ids):
            planes.split(engine.block(page).view(np.uint16), high, low)
            assert np.array_equal(blocks[number, :pairs], high)
            assert np.array_equal(blocks[number, low_at : low_at + pairs], low)
            assert not np.array_equal(high, low)
            assert not blocks[number, low_at + pairs :].any(), "written behind a block"
        blocks[:, :low_at] ^= 0xFF
        paged.join(stream, engine.pages, ids, where, stride).event.wait()
        after = engine.read(stream)
        for page in range(7):
            changed = np.uint16(0xFF00 if page in ids else 0)
            wanted = engine.block(page).view(np.uint16) ^ changed
            assert np.array_equal(engine.block(page, after).view(np.uint16), wanted)
        engine.close()

    @pytest.mark.parametrize("length", [0, 1, 2, 31, 4095, 5000])
    def test_blocks_of_any_length_become_planes_and_blocks_again(
        self, device: Device, stream: Stream, tables: Tables, length: int
    ) -> None:
        count, apart = 3, 8192
        made, source, target = (
            device.allocate(2 * count * apart),
            Host(device, count * apart),
            Host(device, count * apart),
        )
        source.bytes[:] = np.random.default_rng(length).integers(0, 256, count * apart, dtype=np.uint8)
        split = made.address + count * apart
        stream.copy(Direction.TO_DEVICE, [(made.address, source.address, count * apart)])
        stream.copy(Direction.TO_DEVICE, [(split, target.address, count * apart)])  # zeros
        paged, pages = Paged(device, tables), Pages((made.address,), (apart,), length, count)
        paged.split(stream, pages, range(count), split, apart).event.wait()
        stream.copy(Direction.TO_HOST, [(target.address, split, count * apart)])
        stream.copy(Direction.TO_DEVICE, [(made.address, target.address, count * apart)])  # anything else
        stream.synchronize()
        plain, found = source.bytes.reshape(count, apart)[:, :length], target.bytes.reshape(count, apart)
        low_at = low_plane_at(length)
        assert np.array_equal(found[:, : length // 2], plain[:, 1::2])
        assert np.array_equal(found[:, low_at : planes_bytes(length)], plain[:, 0::2])
        assert not found[:, planes_bytes(length) :].any(), "written behind a block"
        wanted = found.copy()
        wanted[:, :length] = plain
        paged.join(stream, pages, range(count), split, apart).event.wait()
        stream.copy(Direction.TO_HOST, [(target.address, made.address, count * apart)])
        stream.synchronize()
        assert np.array_equal(found, wanted)
        if length > 1:
            found[0, length - 1] ^= 1
            assert not np.array_equal(found, wanted), "this comparison finds nothing out"
        device.free(made)

    def test_a_hundred_thousand_blocks_become_planes_in_one_batch(
        self, device: Device, stream: Stream, tables: Tables
    ) -> None:
        count, page_bytes = 100_000, 16
        engine = EngineMemory(device, stream, layers=2, blocks=count, page_bytes=page_bytes, apart_bytes=0)
        ids = np.random.default_rng(6).permutation(count)
        room, paged = Host(device, count * 32), Paged(device, tables)
        where = device.reach(room.address, count * 32)
        paged.split(stream, engine.pages, ids.tolist(), where, 32).event.wait()
        before = engine.all().reshape(2, count, page_bytes)
        whole, stored = before[:, ids].transpose(1, 0, 2).reshape(count, 32), room.bytes.reshape(count, 32)
        assert np.array_equal(stored[:, :16], whole[:, 1::2])
        assert np.array_equal(stored[:, 16:], whole[:, 0::2])
        assert not np.array_equal(stored[:, :16], stored[:, 16:])
        others = np.roll(ids, 1)
        paged.join(stream, engine.pages, others.tolist(), where, 32).event.wait()
        after = engine.read(stream).reshape(2, count, page_bytes)
        assert np.array_equal(after[:, others], before[:, ids])
        assert not np.array_equal(after, before)
        engine.close()

    def test_what_cannot_become_planes_is_told(self, device: Device, stream: Stream, tables: Tables) -> None:
        made, paged = device.allocate(64 * KIB), Paged(device, tables)
        at, there = made.address, made.address + 32 * KIB
        two = (at, at + 8 * KIB)
        for pages, ids, address, stride in (
            (Pages(two, (64, 64), 40, 2), [0], there, 96),  # a value would lie in two pieces, or an access
            (Pages((at + 8,), (64,), 32, 2), [0], there, 64),
            (Pages((at,), (40,), 32, 2), [0], there, 64),
            (Pages((at,), (64,), 32, 2), [2], there, 64),
            (Pages((at,), (64,), 32, 2), [0], there + 8, 64),
            (Pages((at,), (64,), 32, 2), [0], there, 40),
            (Pages((at,), (64,), 50, 2), [0], there, 48),  # the planes take 57
        ):
            with pytest.raises(UnfitError):
                paged.split(stream, pages, ids, address, stride)
            with pytest.raises(UnfitError):
                paged.join(stream, pages, ids, address, stride)
        paged.split(stream, Pages((at,), (64,), 50, 2), [0, 1], there, 64).event.wait()
        device.free(made)
