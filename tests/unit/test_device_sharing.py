"""An engine's pages, opened by another device object as a daemon would: what is there, and nothing beyond."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvkernels import libc
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.pages import BLOCKS_MAX, pages_of
from kvkernels.device.port import Handle, HandleError, Via, WrongDeviceError
from kvkernels.device.sharing import PiecePlace, SharedPages, open_pages, share_pages

BLOCKS, PIECE, LAYERS = 5, 64, 3


@pytest.fixture
def engine() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    made.close()


@pytest.fixture
def daemon() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    made.close()


def close(handles: tuple[Handle, ...]) -> None:
    for handle in handles:
        if handle.fd >= 0:
            os.close(handle.fd)


@pytest.mark.parametrize("via", [Via.DESCRIPTOR, Via.IPC])
@pytest.mark.parametrize("whole", [False, True])
def test_the_other_side_sees_the_same_pages(engine: Emulation, daemon: Emulation, via: Via, *, whole: bool) -> None:
    if whole:  # all layers in one allocation
        memory = EmulatedTensor.zeros(engine, (LAYERS, BLOCKS, PIECE), share=via)
        layers = [memory[layer] for layer in range(LAYERS)]
    else:
        layers = [EmulatedTensor.zeros(engine, (BLOCKS, PIECE), share=via) for _ in range(LAYERS)]
    values = np.random.default_rng(1).integers(0, 256, (LAYERS, BLOCKS, PIECE), dtype=np.uint8)
    for layer, value in zip(layers, values, strict=True):
        layer.array[:] = value
    pages = pages_of(engine, layers)
    shared = share_pages(engine, pages)
    assert len(shared.handles) == (1 if whole else LAYERS)
    opened = open_pages(daemon, shared)
    close(shared.handles)
    assert opened.pages.block_bytes == pages.block_bytes
    assert set(opened.pages.bases).isdisjoint(pages.bases)
    for number in range(BLOCKS):
        moves = opened.pages.moves_out([number], [0])
        assert np.array_equal(
            np.concatenate([libc.bytes_at(at, length) for _, at, length in moves]), values[:, number].ravel()
        )
    libc.bytes_at(opened.pages.bases[1] + 2 * opened.pages.strides[1], PIECE)[:] = 9
    assert (layers[1].array[2] == 9).all()
    assert not (layers[1].array[3] == 9).all()
    opened.close()
    opened.close()


GOOD = SharedPages(
    (Handle(Via.DESCRIPTOR, "", 4096, 0, 4096),), (PiecePlace(0, 3520, 128), PiecePlace(0, 0, 128)), PIECE, BLOCKS
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"handles": ()},
        {"pieces": ()},
        {"handles": GOOD.handles * 254},
        {"blocks": 0},
        {"blocks": 33},
        {"blocks": BLOCKS_MAX + 1},
        {"blocks": 1 << 62},
        {"piece_bytes": 0},
        {"piece_bytes": -64},
        {"piece_bytes": 72},
        {"piece_bytes": 4096},
        {"pieces": (PiecePlace(1, 0, 128),)},
        {"pieces": (PiecePlace(-1, 0, 128),)},
        {"pieces": (PiecePlace(0, -64, 128),)},
        {"pieces": (PiecePlace(0, 8, 128),)},
        {"pieces": (PiecePlace(0, 0, 48),)},
        {"pieces": (PiecePlace(0, 0, -128),)},
        {"pieces": (PiecePlace(0, 0, 132),)},
        {"pieces": (PiecePlace(0, 4096 - 64, 128),)},
        {"pieces": (PiecePlace(0, 3536, 128),)},  # 3,520 is the last that fits
        {"pieces": (PiecePlace(0, 0, 1 << 60),)},
        {"handles": (replace(GOOD.handles[0], offset=16),)},
        {"handles": (replace(GOOD.handles[0], length=8192),)},
        {"handles": (replace(GOOD.handles[0], length=1 << 60, whole_bytes=1 << 60),)},
        {"handles": (replace(GOOD.handles[0], fd=0),)},
    ],
)
def test_what_makes_no_sense_opens_nothing(engine: Emulation, daemon: Emulation, wrong: dict[str, Any]) -> None:
    made = engine.allocate(4096, Via.DESCRIPTOR)
    handle = engine.export(made.address, 4096)

    def real(given: Handle) -> Handle:
        return replace(given, identity=handle.identity, fd=handle.fd if given.fd < 0 else given.fd)

    def with_descriptor(shared: SharedPages) -> SharedPages:
        return replace(shared, handles=tuple(real(each) for each in shared.handles))

    with pytest.raises(HandleError):
        open_pages(daemon, with_descriptor(replace(GOOD, **wrong)))
    assert not daemon._allocations.all()
    opened = open_pages(daemon, with_descriptor(GOOD))
    assert len(daemon._allocations.all()) == 1
    opened.close()
    os.close(handle.fd)


def test_one_bad_handle_leaves_none_open(engine: Emulation, daemon: Emulation) -> None:
    made = engine.allocate(4096, Via.DESCRIPTOR)
    good = engine.export(made.address, 4096)
    elsewhere = replace(good, identity="0" * 32)
    with pytest.raises(WrongDeviceError):
        open_pages(daemon, replace(GOOD, handles=(good, elsewhere)))
    assert not daemon._allocations.all()
    os.close(good.fd)


def test_memory_that_was_not_made_to_be_shared_is_told(engine: Emulation) -> None:
    with pytest.raises(HandleError):
        share_pages(engine, pages_of(engine, [EmulatedTensor.zeros(engine, (BLOCKS, PIECE))]))
