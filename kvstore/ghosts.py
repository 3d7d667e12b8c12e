"""What is remembered of evicted blocks, over a warm restart. Owner thread.

Ghosts lie in a table that survives with the others (`blocks.py`), under hashes by the seeds of their tenants' indexes,
which the journal keeps, and with counts of evictions, which the book does. Nothing binds an entry to anything: it only
says what was once evicted, and one that is wrong is a wrong guess of a rule. So entries are looked at for what the
tables have room for, and nothing else.
"""

from collections.abc import Collection

import numpy as np

from kvproto.limits import POOLS
from kvstore import blocks
from kvstore.blocks import Tables

_SLICE = 1 << 20


def keep_ghosts(tables: Tables, pools: Collection[int]) -> int:
    """Forget those of no pool in DRAM, or of no queue; before rules look at any. Returns how many nobody can have made.

    Pools on disk get their numbers anew in each life, so their ghosts mean nothing in another.
    """
    if not tables.book[blocks.TURN]:  # and leave the pages of the table alone
        return 0
    known, forgotten = np.zeros(1 << 16, dtype=np.bool_), 0
    known[[pool for pool in pools if pool < POOLS]] = True
    for start in range(0, tables.ghosts.size, _SLICE):
        some = tables.ghosts[start : start + _SLICE]
        bad = np.flatnonzero(~known[some["pool"]] | (some["queue"] >= blocks.QUEUES))
        if bad.size:
            bad = bad[some["print"][bad] != 0]
            pool = some["pool"][bad]
            some["print"][bad] = 0
            forgotten += int(
                ((pool < POOLS) | (pool >= tables.pools.size) | (some["queue"][bad] >= blocks.QUEUES)).sum()
            )
    for number in pools:
        if int(tables.pools[number]["rule"]) == blocks.ARC:
            mine = tables.ghosts[(tables.ghosts["print"] != 0) & (tables.ghosts["pool"] == number)]
            second = int((mine["queue"] > 0).sum())
            tables.pools[number]["ghosts"] = (mine.size - second, second)
    return forgotten
