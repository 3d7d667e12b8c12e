"""The part of warming up in which the store looks at itself: what was asked for, and what became of what is gone."""

from collections.abc import Callable
from typing import Final

import numpy as np

from kvproto.errors import Grant
from kvproto.ids import BlockKey
from kvproto.limits import KEYS_PER_FRAME, MIB
from kvstore.blocks import U8
from kvstore.insight.curves import Curves, Limits
from kvstore.insight.explain import MissQuestion, explain
from kvstore.insight.forest import grow
from kvstore.insight.looking import Looking
from kvstore.insight.reasons import SEED_WORDS
from kvstore.insight.tap import sample
from kvstore.sessions import Namespace
from kvstore.store import Store

SECOND_NS: Final = 10**9
FRAMES: Final = 4


def look_at_itself(store: Store, namespace: Namespace, pass_time: Callable[[int], None]) -> None:
    """Keys of a few frames are asked for and stored, without a client; then one is looked for that is not there."""
    watching, keys = store.watching, _keys()
    grants = np.full(KEYS_PER_FRAME, Grant.FULL, dtype=np.uint32)
    for frame in range(FRAMES):
        at = 4 * KEYS_PER_FRAME * frame
        watching.matched(namespace, keys, at, KEYS_PER_FRAME)
        watching.asked(namespace, keys, at, KEYS_PER_FRAME, 0)
        watching.reserved(namespace, keys, at, KEYS_PER_FRAME, grants)
    pass_time(SECOND_NS)
    while watching.next_ns() == 0 or watching.curves.tap.waiting:
        watching.tick(store.now_ns())
    assert watching.curves.curve(0, store.now_ns()).accesses >= FRAMES * KEYS_PER_FRAME, "curves do not work"
    assert any(report.blocks for report in watching.shadows.reports()), "shadows do not work"
    question = MissQuestion(None, namespace.digest, (BlockKey(keys[:4].tobytes()),))
    assert explain(store, question).cause == "refused", "nobody knows why a block is not there"
    _halve(keys)
    _draw(store, namespace)


def _halve(keys: U8) -> None:
    """Curves of a busy store: more is sampled than there is room for."""
    curves = Curves([7] * SEED_WORDS, 1, 0, Limits(keys=64, keys_per_tenant=64, accesses_per_s=16))
    curves.open(1, 1, MIB)
    sample(keys, 0, KEYS_PER_FRAME, 1, 0, 0, curves.tap.words)
    curves.drain(SECOND_NS)
    assert curves.curve(0, SECOND_NS).rate < Limits().first_rate, "curves keep too much"


def _draw(store: Store, namespace: Namespace) -> None:
    """A tree of what is there, which may be nothing."""
    looking = Looking(store)
    begun = looking.begin(namespace.tenant.name, namespace.digest)
    copy, _ = looking.slice(begun, 1)
    held = int(store.tables.census[namespace.number])
    assert int(grow(copy).runs.length.sum()) == copy.rows.size <= held, "prefixes are not what there is"


def _keys() -> U8:
    return np.random.default_rng(1).integers(0, 1 << 64, 4 * KEYS_PER_FRAME * FRAMES, dtype=np.uint64)
