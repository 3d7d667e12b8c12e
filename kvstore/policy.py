"""The rules by which a pool chooses what to evict: what each is called, and means. `blocks.py` carries them out.

    rule           a block's queue             rank in it               who goes first
    lru            one for all                 last touch               the least rank
    second_touch   used once / used again      last touch               the least rank, `bonus_s` later if used again
    pgdsf          by uses x cost per byte     the pool's clock then    the least rank + worth of its queue
    lfu            by uses                     last touch               the least used queue, there the least rank
    s3fifo         small / main                when it came             small first while it has over a tenth
    arc            used once / used again      last touch               by a share that follows what comes back
    density        by uses, gap and hint       last touch or hint       the least promise a second, by uses and cost

Above any rule but density, which has its own way with them, are blocks of which something is said (hints/words.py). Of
such a block time passes the more slowly, the sooner others were used of which the same was said, compared with all the
rest of this pool: up to 16 times, or as many times faster where words turn out to be wrong. Whoever is oldest by that
measure goes first, of them and of what the rule gives up. So words are soft, expire, and have the weight that they have
earned; KVFlow, whose steps to execution they tell of, has a strict class instead.

Leaves only, whatever the rule: see blocks.py. A block's use passes to the one before it when it goes, so a prefix is
worth at least what its best continuation was.

Sources: second touch is the last-touch order of two queues, one of them a bounded time ahead. PGDSF: RAGCache (Jin et
al., 2024), `clock + uses * cost`, where cost is what computing the block took when it was not there. S3-FIFO: Yang et
al., 2023. ARC: Megiddo and Modha, 2003. What second_touch, s3fifo and arc remember of evicted blocks is in
`Tables.ghosts`.
"""

from typing import Final

import numpy as np

from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.rules import Rule

__all__ = ["TOUCH_BONUS_S", "Rule", "goes_by", "set_rule"]

# About what keeps most of those that come back: 79 % of the reuses of a public trace of conversations lie within 5
# minutes, 94 % within 10.
TOUCH_BONUS_S: Final = 450.0
_APART: Final = 1e18  # nanoseconds between two queues of `lfu`: more than any host's uptime

_NUMBERS: Final = {
    Rule.LRU: blocks.LRU,
    Rule.SECOND_TOUCH: blocks.SECOND_TOUCH,
    Rule.PGDSF: blocks.PGDSF,
    Rule.LFU: blocks.LFU,
    Rule.S3FIFO: blocks.S3FIFO,
    Rule.ARC: blocks.ARC,
    Rule.DENSITY: blocks.DENSITY,
}


def set_rule(tables: Tables, pool: int, rule: Rule, *, bonus_s: float = TOUCH_BONUS_S) -> None:
    """Have a pool evict by a rule from now on. Blocks that it has are put in order by `policies.Requeue`."""
    row = tables.pools[pool]
    row["rule"] = _NUMBERS[rule]
    row["clock"] = 0.0
    row["ghosts"] = 0.0
    row["bonus"] = _bonus(rule, bonus_s)
    row["news"] = row["left"] = row["moving"] = 0
    tables.reuse[pool]["again"][blocks.SAID :] = tables.reuse[pool]["gone"][blocks.SAID :] = 0.0  # of other meaning
    if rule is Rule.DENSITY:
        blocks.reindex(tables, pool)


def goes_by(tables: Tables, pool: int, rule: Rule) -> bool:
    """Does a pool evict by a rule already?"""
    return int(tables.pools[pool]["rule"]) == _NUMBERS[rule]


def _bonus(rule: Rule, bonus_s: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By queue, in the unit of the rule's ranks."""
    queues = np.arange(blocks.QUEUES, dtype=np.float64)
    if rule is Rule.PGDSF:
        return blocks.PGDSF_LEAST * 2.0 ** ((queues + 0.5) / blocks.PGDSF_CLASSES_AN_OCTAVE)
    if rule is Rule.LFU:
        return _APART * queues
    bonus = np.zeros(blocks.QUEUES)
    if rule is Rule.SECOND_TOUCH:
        bonus[1] = bonus_s * 1e9
    return bonus
