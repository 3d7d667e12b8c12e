"""Checks of memory that the caller owns, and copies between addresses."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from kvclient.buffers import Scattered, readable, writable
from kvclient.copying import copy, copy_at_once, moves_of
from kvkernels import libc
from kvproto.errors import UsageError

BLOCK = 64


def at(address: int, length: int = BLOCK) -> bytes:
    return ctypes.string_at(address, length)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(range(BLOCK)),
        lambda: memoryview(bytearray(range(BLOCK))),
        lambda: np.arange(BLOCK, dtype=np.uint8),
        lambda: np.arange(BLOCK, dtype=np.uint8).view(np.float16).reshape(2, 4, 4),
        lambda: torch.arange(BLOCK, dtype=torch.uint8),
        lambda: torch.arange(BLOCK, dtype=torch.uint8).view(torch.bfloat16).reshape(4, 8),
    ],
    ids=["bytearray", "memoryview", "uint8", "float16 3-d", "tensor", "bfloat16 tensor"],
)
def test_an_address_is_where_the_bytes_are(make: Any) -> None:
    block = make()
    memory = readable([block], 1, BLOCK)
    assert at(memory.addresses[0]) == bytes(range(BLOCK))
    target = writable([block], 1, BLOCK)
    assert list(target.addresses) == list(memory.addresses)
    ctypes.memset(target.addresses[0], 7, 1)
    assert at(memory.addresses[0]) == b"\x07" + bytes(range(1, BLOCK))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytes(range(BLOCK)),
        lambda: memoryview(bytes(range(BLOCK))),
        lambda: np.frombuffer(bytes(range(BLOCK)), np.uint8),
    ],
    ids=["bytes", "memoryview", "array"],
)
def test_what_is_read_only_can_be_read_and_not_written(make: Any) -> None:
    memory = readable([make()], 1, BLOCK)
    assert at(memory.addresses[0]) == bytes(range(BLOCK))
    with pytest.raises(UsageError, match="read-only"):
        writable([make()], 1, BLOCK)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (bytes(BLOCK - 1), "63 bytes"),
        (bytes(BLOCK + 1), "65 bytes"),
        (b"", "0 bytes"),
        (np.zeros((8, 16), np.uint8)[:, ::2], "contiguous"),
        (np.zeros((8, 8), np.uint8).T[1:].T, "56 bytes"),
        (np.zeros((8, 8), np.uint8, order="F"), "contiguous"),
        (memoryview(bytearray(2 * BLOCK))[::2], "contiguous"),
        (torch.zeros(8, 8, dtype=torch.uint8).T, "contiguous"),
        (torch.zeros(BLOCK, dtype=torch.float32), "256 bytes"),
        (torch.zeros(BLOCK, dtype=torch.uint8, device="meta"), "CPU"),
        (torch.zeros(BLOCK, dtype=torch.uint8).to_sparse(), ""),
        ("x" * BLOCK, "not a buffer"),
        (None, "not a buffer"),
        (7, "not a buffer"),
    ],
)
def test_an_unfit_block_is_named_with_its_index_and_the_reason(block: Any, why: str) -> None:
    good = bytearray(BLOCK)
    with pytest.raises(UsageError, match=f"block 1: .*{why}"):
        readable([good, block], 2, BLOCK)
    with pytest.raises(UsageError, match="block 1: "):
        writable([good, block], 2, BLOCK)
    assert len(readable([good, good], 2, BLOCK).addresses) == 2


@pytest.mark.parametrize(
    "blocks", [None, 7, bytes(2 * BLOCK), bytearray(2 * BLOCK), "ab", object()], ids=lambda one: type(one).__name__
)
def test_blocks_must_come_one_by_one(blocks: Any) -> None:
    with pytest.raises(UsageError):
        readable(blocks, 2, BLOCK)


def test_the_count_must_agree() -> None:
    with pytest.raises(UsageError, match="1 buffers for 2 keys"):
        readable([bytes(BLOCK)], 2, BLOCK)
    with pytest.raises(UsageError, match="2 targets for 1 blocks"):
        writable([bytearray(BLOCK), bytearray(BLOCK)], 1, BLOCK)
    assert len(writable([bytearray(BLOCK)], 2, BLOCK).addresses) == 1


@pytest.mark.parametrize("module", ["numpy", "torch"])
def test_one_array_holds_all_blocks(module: str) -> None:
    blocks: Any = np.arange(4 * BLOCK, dtype=np.uint8).reshape(4, 8, 8)
    if module == "torch":
        blocks = torch.from_numpy(blocks)
    memory = readable(blocks, 4, BLOCK)
    assert [at(address) for address in memory.addresses] == [
        bytes(range(start, start + BLOCK)) for start in range(0, 4 * BLOCK, BLOCK)
    ]
    assert len(writable(blocks[:2], 4, BLOCK).addresses) == 2
    assert len(writable(blocks[:0], 4, BLOCK).addresses) == 0
    for wrong in (blocks[::2], blocks.reshape(2, -1), blocks[0, 0, 0]):
        with pytest.raises(UsageError):
            readable(wrong, 4, BLOCK)


def test_a_buffer_in_use_cannot_be_resized_away() -> None:
    block = bytearray(BLOCK)
    memory = writable([block], 1, BLOCK)
    with pytest.raises(BufferError):
        block.clear()
    del memory
    block.clear()


def test_blocks_side_by_side_on_both_sides_move_at_once() -> None:
    assert moves_of([0, 10, 20, 40, 50], [100, 110, 130, 140, 150], 10) == [
        (0, 100, 20),
        (20, 130, 10),
        (40, 140, 20),
    ]
    assert moves_of([0, 10], [100, 110, 120], 10) == [(0, 100, 20)]
    assert moves_of([], [100], 10) == []


@pytest.mark.parametrize("length", [1, 31, 4096, 65536, 65537])
@pytest.mark.parametrize("shift", [0, 1, 8, 16, 32, 33])
def test_a_copy_is_exact_at_every_alignment_and_touches_nothing_else(shift: int, length: int) -> None:
    source = np.random.default_rng(length).integers(0, 256, length + 64, dtype=np.uint8)
    target = np.zeros(length + 192, np.uint8)
    control = target.copy()
    start = 64 + (source.ctypes.data - target.ctypes.data) % 32 + shift
    copy([(target.ctypes.data + start, source.ctypes.data, length)])
    control[start : start + length] = source[:length]
    assert (target == control).all()
    control[start + length - 1] ^= 1
    assert not (target == control).all()


def test_tensors_whose_bytes_are_not_their_values_are_refused() -> None:
    given_back = torch.zeros(16)
    given_back.untyped_storage().resize_(0)
    tensors = [torch._neg_view(torch.ones(16)), torch.ones(8, dtype=torch.complex64).conj(), given_back]
    for tensor in tensors:
        with pytest.raises(UsageError):
            readable([tensor], 1, 64)
        with pytest.raises(UsageError):
            writable([tensor], 1, 64)
    assert readable([torch.ones(16)], 1, 64).addresses  # the plain one is fine


def test_arrays_of_objects_are_refused() -> None:
    for array in (np.array([None] * 8, dtype=object), np.zeros(8, dtype=[("a", object)])):
        with pytest.raises(UsageError, match="objects"):
            readable([array], 1, 64)
        with pytest.raises(UsageError, match="objects"):
            writable([array], 1, 64)


LENGTHS = (24, 8, 32)


def scattered(layers: "list[np.ndarray[Any, Any]]", blocks: list[int]) -> Scattered:
    """Blocks of which piece j lies in row b of layer j."""
    addresses = [[int(layer[block].ctypes.data) for layer in layers] for block in blocks]
    return Scattered(addresses, LENGTHS, layers)


@pytest.mark.parametrize("move", [copy, copy_at_once], ids=["one by one", "at once"])
def test_scattered_blocks_are_read_and_written_piece_by_piece(move: Any) -> None:
    rng = np.random.default_rng(1)
    layers = [rng.integers(0, 256, (5, length), dtype=np.uint8) for length in LENGTHS]
    whole = np.zeros((3, BLOCK), dtype=np.uint8)
    memory = readable(scattered(layers, [4, 0, 2]), 3, BLOCK)
    move(memory.moves_out([0, 2], [int(row.ctypes.data) for row in whole[1:]], BLOCK))
    assert whole[0].sum() == 0
    assert whole[1].tobytes() == b"".join(layer[4].tobytes() for layer in layers)
    assert whole[2].tobytes() == b"".join(layer[2].tobytes() for layer in layers)
    back = [np.zeros_like(layer) for layer in layers]
    memory = writable(scattered(back, [1, 3, 0]), 3, BLOCK)
    move(memory.moves_in(1, [int(row.ctypes.data) for row in whole[1:]], BLOCK))
    for new, old in zip(back, layers, strict=True):
        assert np.array_equal(new[[3, 0]], old[[4, 2]])
        assert new[[1, 2, 4]].sum() == 0, "and nowhere else"


def test_many_pieces_are_copied_at_once_and_one_by_one_where_the_kernel_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = np.random.default_rng(2).integers(0, 256, (2, 3000, 16), dtype=np.uint8)
    order = np.random.default_rng(3).permutation(3000)
    moves = [(int(target[i].ctypes.data), int(source[j].ctypes.data), 16) for i, j in enumerate(order.tolist())]
    assert not np.array_equal(target, source[order])
    assert libc.copy_pieces(moves)
    assert np.array_equal(target, source[order])
    target[:] = 0
    monkeypatch.setattr(libc, "copy_pieces", lambda moves: False)
    copy_at_once(moves)
    assert np.array_equal(target, source[order])


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (Scattered([[1, 2, 3]], (24, 8, 31), None), "pieces of"),
        (Scattered([[1, 2, 3]], (32, 0, 32), None), "pieces of"),
        (Scattered([[1, 2]], LENGTHS, None), "other than 3 pieces"),
        (Scattered([[1, 2, 3]] * 2, LENGTHS, None), "2 scattered blocks for 1"),
    ],
)
def test_scattered_blocks_that_do_not_add_up_are_refused(blocks: Scattered, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        readable(blocks, 1, BLOCK)
