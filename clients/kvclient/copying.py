"""Moving bytes between addresses, without the GIL."""

import ctypes
from collections.abc import Iterable
from typing import NamedTuple


class Move(NamedTuple):
    """Bytes to move, from address to address."""

    target: int
    source: int
    bytes: int


def moves_of(targets: Iterable[int], sources: Iterable[int], block_bytes: int) -> list[Move]:
    """The moves for blocks of one size; blocks that lie next to each other on both sides become one move."""
    moves: list[Move] = []
    first_target = first_source = 0
    next_target = next_source = -1
    for target, source in zip(targets, sources, strict=False):
        if target != next_target or source != next_source:
            if next_target >= 0:
                moves.append(Move(first_target, first_source, next_target - first_target))
            first_target, first_source = target, source
            next_target, next_source = target, source
        next_target += block_bytes
        next_source += block_bytes
    if next_target >= 0:
        moves.append(Move(first_target, first_source, next_target - first_target))
    return moves


def copy(moves: Iterable[Move]) -> None:
    """Do it. The caller vouches for the addresses. A call costs 0.4 us and lets other threads run meanwhile."""
    memmove = ctypes.memmove
    for target, source, length in moves:
        memmove(target, source, length)
