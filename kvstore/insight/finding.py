"""Whole keys of a namespace by their first digits, a slice of rows at a time: people do not type 64 of them.

Owner thread. 8,192 rows and one beginning take 0.2 ms, also where all keys begin alike; nothing is held between two
slices.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvproto.ids import BlockKey
from kvproto.limits import KEYS_PER_BEGINNING
from kvstore import blocks
from kvstore.blocks import U8
from kvstore.insight.forest import LIVE_STATES, SLICE_ROWS

BEGINNINGS_A_LOOK: Final = 8
_WORD_DIGITS: Final = 16  # of a key, in hex: what one comparison looks at


def keys_in_slice(
    tables: blocks.Tables, number: int, start: int, beginnings: Sequence[str]
) -> tuple[list[list[BlockKey]], int]:
    """Of the rows from `start` on those of namespace `number`: keys that begin so, for each of `beginnings`.

    These are up to `BEGINNINGS_A_LOOK`, in lower-case hex. Of many keys that begin alike, one more than are listed.
    Also returns where to go on; 0: that was all.
    """
    unused = int(tables.book[blocks.UNUSED_ROW])
    stop = min(start + SLICE_ROWS, unused)
    table = tables.blocks[start:stop]
    rows = np.flatnonzero((table["namespace"] == number) & LIVE_STATES[table["state"]])
    keys = table["key"][rows]
    words = keys.byteswap()  # as their digits are read
    found = []
    for beginning in beginnings[:BEGINNINGS_A_LOOK]:
        chosen = np.arange(rows.size)
        for at in range(0, len(beginning), _WORD_DIGITS):
            chosen = chosen[_begins(words[chosen, at // _WORD_DIGITS], beginning[at : at + _WORD_DIGITS])]
        found.append([BlockKey(keys[at].tobytes()) for at in chosen[: KEYS_PER_BEGINNING + 1].tolist()])
    return found, (stop if stop < unused else 0)


def _begins(words: U8, digits: str) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    same: np.ndarray[tuple[int], np.dtype[np.bool_]]
    same = words >> np.uint64(4 * (_WORD_DIGITS - len(digits))) == np.uint64(int(digits, 16))
    return same
