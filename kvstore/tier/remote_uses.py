"""Which blocks were used since they were looked at last: the bits of the clock by which objects over there leave.

    leased   -> the owner sets a bit for each block of the run that is over there, once a turn
    no room  -> whoever is to delete the oldest object takes its first block's bit: was it set, the object goes behind
                all others, and the owner sets bits anew in the next turn

A turn is a sixteenth of all objects, taken or gone, so that what is in use is seen before its turn to go comes again.

A bit is found by 21 bits of the block's digest, which are in the names of objects that begin with it. Blocks that share
one, 5 % of them with 100,000 in use, cost a turn of an object that nobody uses, and no more.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.blocks import U4
from kvstore.tier.remote_format import marks_of

PLACES: Final = 1 << 21
TURNS: Final = 16  # while all objects have had their turn to go once
_HEX: Final = 6  # digits of a digest that are looked at: 24 bits


class Uses:
    """2 MiB. Any thread; two at a time lose a use at the worst."""

    def __init__(self) -> None:
        self.turn = 0  # grows with bits that are taken
        self.step = 1  # objects of a turn
        self._taken = 0  # in this turn
        self._used: npt.NDArray[np.uint8] = np.zeros(PLACES, dtype=np.uint8)

    def use(self, places: U4) -> None:
        """These blocks are used."""
        self._used[places] = 1

    def used(self, name: str) -> None:
        """So is the object's first block."""
        self._used[place_in(name)] = 1

    def take(self, name: str, objects: int) -> bool:
        """Was the object's first block used since this was asked last? `objects`: there are so many. Its users lock."""
        place = place_in(name)
        self.step = max(1, objects // TURNS)
        if not self._used.item(place):
            return False
        self._used[place] = 0
        self._taken += 1
        if self._taken >= self.step:  # behind that: who sees the new turn sets the bit again
            self.turn, self._taken = self.turn + 1, 0
        return True


def place_of_digest(digest: bytes) -> int:
    """Where the bit of a key of this digest is."""
    return int.from_bytes(digest[:3]) % PLACES


def place_in(name: str) -> int:
    """Where that of the first block of an object is; any, where the name is none of ours."""
    folder = name[: name.rfind("/")]
    return int(folder[folder.rfind("/") + 1 :][:_HEX], 16) % PLACES if marks_of(name) else 0
