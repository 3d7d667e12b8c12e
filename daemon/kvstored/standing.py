"""How the daemon stands, in a line of words for an operator; and whether it may end yet. Owner thread."""

import logging

from kvproto.limits import GIB
from kvstore.store import Store
from kvstore.survey import dram_blocks, used_bytes

log = logging.getLogger(__name__)


class Ending:
    """A stop that has been asked for: what has begun is finished, and nothing new begins."""

    def __init__(self, store: Store, wait_s: float, now_ns: int) -> None:
        self._store = store
        self._deadline_ns = now_ns + int(wait_s * 1e9)
        store.draining = True

    def over(self, now_ns: int) -> bool:
        """Is everything finished, or patience at its end?"""
        left = unfinished(self._store)
        if left and now_ns < self._deadline_ns:
            return False
        log.log(logging.WARNING if left else logging.INFO, "stop: %s", left or "everything is finished")
        return True

    @property
    def deadline_ns(self) -> int:
        """When patience is at its end."""
        return self._deadline_ns


def unfinished(store: Store) -> str:
    """What would be lost, or not be answered, if the daemon ended now; empty if nothing would."""
    disk = store.disk
    tickets = sum(len(session.tickets) for session in store.sessions.values())
    works = store.limits.disk.disk_bytes > 0 and disk.demotion.enabled
    writes = len(disk.demotion.running) + disk.demotion.waiting + (not disk.commits.clean) if works else 0
    drops = store.sweeper.jobs.queued or (works and not disk.erasure.idle)
    parts = (
        (tickets, f"{tickets} blocks are being stored"),
        (writes, f"{writes} batches are on their way to disk"),
        (drops, "blocks are being dropped"),
    )
    return ", ".join(text for there, text in parts if there)


def standing(store: Store, sessions: int) -> str:
    """How the daemon stands, on one line: what it holds, and whether it helps."""
    limits, tally = store.limits, store.tally
    held = f"{used_bytes(store) / GIB:.1f} of {limits.dram_bytes / GIB:.1f} GiB in {dram_blocks(store)} blocks"
    asked = tally.lease_hits + tally.lease_misses
    share = f"{100 * tally.lease_hits / asked:.0f} % of the blocks asked for were there" if asked else "nothing asked"
    state = "draining" if store.draining else "serving"
    return f"{state}: {held}, {sessions} sessions, {share}"
