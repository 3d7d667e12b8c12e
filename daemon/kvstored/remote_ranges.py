"""Which ranges of which objects are read for a chain. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvproto.limits import MIB
from kvstore.tier.remote_format import HEADER_BYTES
from kvstore.tier.remote_index import Stretch

PIECE_BYTES: Final = 8 * MIB  # a request; a larger block is one of its own


@dataclass(frozen=True, slots=True)
class Ask:
    """One range of one object."""

    stretch: Stretch
    first: int  # of its blocks, in the object
    stop: int
    whole: bool  # the header is read with it


def asks_of(stretches: Sequence[Stretch], block_bytes: int) -> list[Ask]:
    """In the order of the chain."""
    most = max(1, PIECE_BYTES // block_bytes)
    asks = []
    for stretch in stretches:
        stop = stretch.skip + stretch.count
        firsts = range(stretch.skip, stop, most)
        asks += [Ask(stretch, first, min(first + most, stop), whole=first == 0) for first in firsts]
    return asks


def bytes_of(ask: Ask, block_bytes: int) -> int:
    """So many bytes it is."""
    return (ask.stop - ask.first) * block_bytes + (HEADER_BYTES if ask.whole else 0)
