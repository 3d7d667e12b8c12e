"""Why LEASEs missed, counted: by what became of the first block that was not there.

A MATCH counts as a LEASE here, the first time that it misses what it asks for (`lookups.py`).

Nothing behind a missing block can be found, so its reason is the reason of all that the LEASE did not get. Asking for
it costs some 20 us, so where many LEASEs miss only every so many-th one is asked about, and stands for those before it:
the sum over all reasons is exact, the shares of the reasons are those of a sample of about `ASKED` a second.
Owner thread.
"""

from collections.abc import Callable
from typing import Final

from kvstore import blocks
from kvstore.blocks import U8
from kvstore.insight import reasons
from kvstore.insight.explain import why_gone
from kvstore.insight.reasons import Cause
from kvstore.sessions import Namespace
from kvstore.store import Store

ASKED: Final = 64  # LEASEs a second, and twice that in a second in which there are suddenly many more

ON_DISK: Final = ("on_disk", "disk")  # it is there, and the client did not wait for it
WRITING: Final = ("writing", "dram")  # it will be there
UNVERIFIED: Final = ("unverified", "dram")  # kept over a restart, and not looked at yet
CAME_BACK: Final = ("came_back", "none")  # it was stored again before anybody could ask
NOT_ASKED: Final = ("not_asked", "none")  # the daemon has just begun: `ready`
_BY_STATE: Final = {
    blocks.DISK: ON_DISK,
    blocks.LOADING: ON_DISK,
    blocks.WRITING: WRITING,
    blocks.KEPT: UNVERIFIED,
}
# Causes of which it matters where the block lay.
_TIERED: Final = (Cause.EVICTED, Cause.PIN_EXPIRED, Cause.QUOTA, Cause.CORRUPT)

Reason = tuple[str, str]  # why, and in which tier: "dram", "disk" or "none"
REASONS: Final[tuple[Reason, ...]] = (
    ON_DISK,
    WRITING,
    UNVERIFIED,
    CAME_BACK,
    NOT_ASKED,
    *(
        (cause.name.lower(), tier)
        for cause in Cause
        for tier in (("dram", "disk") if cause in _TIERED else ("none",))
    ),
)  # fmt: skip


def loaded() -> bool:
    """Is the compiled code that answers in memory? Whoever needs it first waits 0.1 s; `kvstored.warmup` does."""
    return all(getattr(code, "signatures", True) for code in (blocks.find_one, blocks.siphash, reasons.look))


class Misses:
    """Blocks that were asked for and not found, by reason."""

    def __init__(self, store: Store, ready: Callable[[], bool] = lambda: True) -> None:
        """`ready`: may questions be asked by now?"""
        self.blocks: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self._store = store
        self._ready = ready
        self._begun = False
        self._every = 1  # LEASEs for one that is asked about
        self._left = 1  # LEASEs until the next one
        self._leases = 0  # in this second
        self._asked = 0
        self._unsaid = 0  # blocks whose LEASEs were not asked about, since the last that was
        self._last: Reason = REASONS[-1]

    def missed(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """A LEASE was answered without `count` blocks; the first of them has the key at `keys[at]`."""
        self._leases += 1
        self._unsaid += count
        self._left -= 1
        if self._left:
            return
        self._begun = self._begun or self._ready()
        if not self._begun:
            self._left = 1
            self._say(NOT_ASKED)
            return
        self._asked += 1
        if self._asked > ASKED:
            self._every, self._asked = 2 * self._every, self._asked // 2
        self._left = self._every
        self._say(self._reason(namespace, keys, at))

    def second_passed(self) -> None:
        """Ask so often in the next one; and leave nothing unsaid of this."""
        self._every = 1 + self._leases // ASKED
        self._left = min(self._left, self._every)
        self._leases = self._asked = 0
        self._say(self._last)

    def _say(self, reason: Reason) -> None:
        self.blocks[reason] += self._unsaid
        self._unsaid, self._last = 0, reason

    def _reason(self, namespace: Namespace, keys: U8, at: int) -> Reason:
        tables = self._store.tables
        row = int(blocks.find_one(tables, namespace.tenant.index, namespace.number, keys, at))
        if row:
            return _BY_STATE.get(int(tables.blocks["state"][row]), CAME_BACK)
        cause, tier = why_gone(self._store, namespace, keys[at : at + 4].copy())
        if cause not in _TIERED:
            return cause.name.lower(), "none"
        return cause.name.lower(), tier or "dram"
