"""Layouts of engines' tensors, on real torch tensors: pieces are where the bytes of a block are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvkernels import libc
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.pages import PIECES_MAX, Pages, pages_of
from kvkernels.device.port import UnfitError, WrongDeviceError

BLOCKS, TOKENS, HEADS, DIM, LAYERS = 6, 4, 3, 16, 5


class AnyMemory(Emulation):
    """Takes the memory of torch's CPU tensors for its own."""

    def check(self, address: int, length: int) -> None:
        assert address > 0
        assert length > 0


def numbered(*shape: int) -> torch.Tensor:
    """Every value is another one."""
    count = int(np.prod(shape))
    return torch.arange(count, dtype=torch.int32).reshape(shape)


def block_at(pages: Pages, number: int) -> "np.ndarray[Any, Any]":
    """What lies where the pieces say."""
    found = [
        libc.bytes_at(base + number * stride, pages.piece_bytes)
        for base, stride in zip(pages.bases, pages.strides, strict=True)
    ]
    return np.concatenate(found).view(np.int32)


def layers_of(make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    return [make() + 100_000 * layer for layer in range(LAYERS)]


# A layout: the tensors, options, and of each tensor the values of a page in the order of memory.
Case = tuple[list[torch.Tensor], dict[str, int], Callable[[torch.Tensor, int], torch.Tensor], int]


def cases() -> dict[str, Case]:
    nhd = layers_of(lambda: numbered(BLOCKS, TOKENS, HEADS, DIM))
    hnd = layers_of(lambda: numbered(BLOCKS, HEADS, TOKENS, DIM))
    stacked = layers_of(lambda: numbered(2, BLOCKS, TOKENS, HEADS, DIM))
    inside = layers_of(lambda: numbered(BLOCKS, 2, TOKENS, HEADS, DIM))
    outermost = layers_of(lambda: numbered(HEADS, BLOCKS, TOKENS, DIM))
    flat = layers_of(lambda: numbered(BLOCKS * TOKENS, HEADS, DIM))
    apart = [
        one
        for pair in zip(nhd, layers_of(lambda: numbered(BLOCKS, TOKENS, HEADS, DIM) + 7), strict=True)
        for one in pair
    ]
    whole = numbered(BLOCKS, LAYERS, 2, TOKENS, HEADS, DIM)
    views = [whole[:, layer] for layer in range(LAYERS)]
    seen_otherwise = [one.permute(0, 2, 1, 3) for one in nhd]
    padded = layers_of(lambda: numbered(BLOCKS, TOKENS, HEADS, DIM + 4))
    return {
        "NHD": (nhd, {}, lambda tensor, page: tensor[page], LAYERS),
        "HND": (hnd, {}, lambda tensor, page: tensor[page], LAYERS),
        "keys and values stacked": (stacked, {"block_axis": 1}, lambda tensor, page: tensor[:, page], 2 * LAYERS),
        "keys and values in a block": (inside, {}, lambda tensor, page: tensor[page], LAYERS),
        "keys and values apart": (apart, {}, lambda tensor, page: tensor[page], 2 * LAYERS),
        "heads outermost": (outermost, {"block_axis": 1}, lambda tensor, page: tensor[:, page], HEADS * LAYERS),
        "all layers in a block": ([whole], {}, lambda tensor, page: tensor[page], 1),
        "views of that": (views, {}, lambda tensor, page: tensor[page], 1),
        "tokens": (
            flat, {"page_tokens": TOKENS}, lambda tensor, page: tensor[page * TOKENS : (page + 1) * TOKENS], LAYERS,
        ),
        "permuted": (seen_otherwise, {}, lambda tensor, page: tensor.permute(0, 2, 1, 3)[page], LAYERS),
        "padded rows": (
            [one[..., :DIM] for one in padded], {}, lambda tensor, page: tensor[page], LAYERS * TOKENS * HEADS,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_pieces_are_where_the_bytes_are(name: str) -> None:
    tensors, options, page_of, pieces = cases()[name]
    pages = pages_of(AnyMemory(), tensors, **options)
    assert (pages.blocks, len(pages.bases)) == (BLOCKS, pieces)
    for page in range(BLOCKS):
        wanted = torch.cat([page_of(tensor, page).reshape(-1) for tensor in tensors]).numpy()
        assert np.array_equal(block_at(pages, page), wanted)
        assert not np.array_equal(block_at(pages, (page + 1) % BLOCKS), wanted)
    assert pages.block_bytes == wanted.nbytes


def test_neighbours_that_go_different_ways_stay_apart() -> None:
    whole = numbered(32, 16)
    tensors = [torch.as_strided(whole, (4, 16), (64, 1), 0), torch.as_strided(whole, (4, 16), (32, 1), 16)]
    pages = pages_of(AnyMemory(), tensors)
    assert len(pages.bases) == 2
    for page in range(4):
        assert np.array_equal(block_at(pages, page), torch.cat([one[page] for one in tensors]).numpy())


def test_moves_are_what_kernels_do() -> None:
    pages = pages_of(AnyMemory(), layers_of(lambda: numbered(BLOCKS, TOKENS, HEADS, DIM)))
    out = np.zeros((2, pages.block_bytes // 4), np.int32)
    moves = pages.moves_out([4, 1], [int(row.ctypes.data) for row in out])
    for target, source, length in moves:
        libc.bytes_at(target, length)[:] = libc.bytes_at(source, length)
    assert np.array_equal(out[0], block_at(pages, 4))
    assert np.array_equal(out[1], block_at(pages, 1))
    assert pages.moves_in([4, 1], [int(row.ctypes.data) for row in out]) == [
        (source, target, length) for target, source, length in moves
    ]
    with pytest.raises(UnfitError):
        pages.moves_in([BLOCKS], [0])


@pytest.mark.parametrize(
    ("tensors", "options", "why"),
    [
        ([], {}, "no tensors"),
        ([torch.zeros(0, 16, dtype=torch.uint8)], {}, "empty"),
        ([torch.zeros(4, 16, dtype=torch.uint8)], {"block_axis": 2}, "dimension 2"),
        ([torch.zeros(4, 24, dtype=torch.uint8)], {}, "multiples of 16"),
        ([torch.zeros(4, 33, dtype=torch.uint8)[:, 1:]], {}, "multiples of 16"),
        ([torch.zeros(4, 64, dtype=torch.uint8)[:, ::2]], {}, "multiples of 16"),
        ([torch.zeros(1, 16, dtype=torch.uint8).expand(4, 16)], {}, "overlaps"),
        ([torch.zeros(4, 1, dtype=torch.uint8).expand(4, 16)], {}, "overlaps"),
        ([torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(5, 16, dtype=torch.uint8)], {}, "blocks"),
        ([torch.zeros(6, 16, dtype=torch.uint8)], {"page_tokens": 4}, "6 tokens in pages of 4"),
        ([torch.zeros(1, 2 * PIECES_MAX + 2, 17, dtype=torch.uint8)[:, :, :16]], {}, "pieces"),
    ],
)
def test_what_kernels_cannot_take_is_told(tensors: list[torch.Tensor], options: dict[str, int], why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        pages_of(AnyMemory(), tensors, **options)


def test_tensors_of_another_device_are_told() -> None:
    device, other = Emulation(), Emulation(1)
    here, there = EmulatedTensor.zeros(device, (4, 32)), EmulatedTensor.zeros(other, (4, 32))
    assert pages_of(device, [here, here[:, :]]).blocks == 4
    with pytest.raises(WrongDeviceError):
        pages_of(device, [here, there])
    with pytest.raises(WrongDeviceError):
        pages_of(device, [torch.zeros(4, 32, dtype=torch.uint8)])
    device.close()
    other.close()


@pytest.mark.parametrize(
    "wrong", [[True, False, True], np.array([True]), [1.0, 2.0], np.array([1.9]), ["1"], [None], [1 << 70], [np.nan]]
)
def test_page_numbers_are_whole_numbers(wrong: Any) -> None:
    """A mask would name the pages 0 and 1."""
    with pytest.raises(UnfitError, match="page"):
        Pages((0,), (64,), 64, 4).ids(wrong)


@pytest.mark.parametrize(
    "right", [[3, 1], (3, 1), np.array([3, 1], np.uint8), np.array([3, 1]), torch.tensor([3, 1]), [np.int32(3), 1]]
)
def test_page_numbers_come_in_many_forms(right: Any) -> None:
    pages = Pages((0,), (64,), 64, 4)
    assert pages.ids(right).tolist() == [3, 1]
    assert pages.ids(right).dtype == np.int64
    assert pages.ids(range(4)).tolist() == [0, 1, 2, 3]
    assert not pages.ids([]).size
