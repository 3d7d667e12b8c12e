"""Compile the store's table code before anybody waits for it, by living a short life with it.

Takes about a minute the first time after an installation and 0.6 s from numba's cache afterwards; of that, `first` is
what a start waits for, and the rest follows when clients are served. It is a self-test as well: a store, a fetch, an
eviction that do not come out as they must stop the start.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import numba
import numpy as np
import xxhash
from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]  # numba brings it, without types

from kvproto.errors import Grant
from kvproto.identity import NamespaceIdentity
from kvproto.ids import BlockKey
from kvproto.limits import MIB
from kvstore import blocks
from kvstore.blocks import U8
from kvstore.policies import Chosen, Tier
from kvstore.policy import Rule
from kvstore.report import ClearReport, ClearScope
from kvstore.sessions import Lease, Namespace, Session
from kvstore.store import ITEM, Limits, Store
from kvstored.compiled import check_cache
from kvstored.warmup_disk import live_with_disk
from kvstored.warmup_hints import expect
from kvstored.warmup_insight import look_at_itself
from kvstored.warmup_world import Clock, Memory, Outbox, Randomness

log = logging.getLogger(__name__)


LATER_S = 2.0


def warm_up() -> None:
    """Run every verb once. Raises AssertionError if this build does not work on this machine, and ConfigError if what
    is kept of it can be somebody else's.
    """
    check_cache()
    first(disk=True)()
    _note_all_is_compiled()


def first(*, disk: bool) -> Callable[[], None]:
    """What clients need at once, with a disk tier or without. Returns the rest. Raises AssertionError."""
    begun = time.monotonic()
    kept = _mark().exists()
    if not kept:
        log.info("compiling, since nothing is kept from an earlier start: about a minute or two")
    clock, store, session, namespace = _begin()
    if disk:
        live_with_disk()
    if kept:  # what is left is only loaded, and nobody waits for it
        _log_ready(begun)
    else:
        log.info("half of it is compiled: seconds=%.2f", time.monotonic() - begun)

    def rest() -> None:
        _live_on(clock, store, session, namespace)
        if not disk:
            live_with_disk()
        if not kept:
            _log_ready(begun)

    return rest


def _log_ready(begun: float) -> None:
    log.info("compiled code ready: seconds=%.2f", time.monotonic() - begun)


def first_and_rest_later(*, disk: bool) -> Timer:
    """`first`; and the rest once the timer is started. Where not all is known to be in numba's cache, all at once:
    compiling in the middle of serving would stall clients for seconds."""
    rest = first(disk=disk)
    if not _mark().exists():
        rest()
        _note_all_is_compiled()
        rest = _nothing
    timer = Timer(LATER_S, rest)
    timer.daemon = True
    return timer


def _mark() -> Path:
    """A file beside numba's cache that stands for all of this code, compiled for this processor by these versions."""
    source = Path(blocks.__file__).parent
    files = (*sorted(source.rglob("*.py")), *sorted(Path(__file__).parent.glob("warmup*.py")))
    facts = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    made_by = (sys.version, numba.__version__, get_host_cpu_name())
    digest = xxhash.xxh3_64_hexdigest(repr((made_by, facts)).encode())
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or source / "__pycache__")
    return folder / f"kvstored-{digest}.compiled"


def _note_all_is_compiled() -> None:
    with suppress(OSError):  # then the next start does all at once, too
        _mark().touch()


def _nothing() -> None:
    pass


def _begin() -> tuple[Clock, Store, Session, Namespace]:
    clock = Clock()
    store = Store(Limits(2 * MIB, MIB), clock, Randomness(), Memory(), Outbox())
    session = store.attach("warm-up", MIB)
    namespace = store.open(session, NamespaceIdentity("warm-up", "-", "-", "-", 1, MIB // 4))
    for first in (0, 8, 16):  # three chains of four: eight slots, so the last evicts
        _store(store, session, namespace, _chain(first))
    assert store.tally.evicted == 4, "eviction does not work"
    _fetch(store, session, namespace, _chain(16))
    return clock, store, session, namespace


def _live_on(clock: Clock, store: Store, session: Session, namespace: Namespace) -> None:
    expect(store, session, namespace, _chain(16))
    deleted: list[int] = []
    store.delete(namespace, _chain(16), 0, 1, deleted.append)
    assert deleted == [4], "deletion does not work"
    _abandon(store, session, namespace, _chain(24))
    _clear(store, namespace)
    _recycle(store, session, namespace)
    look_at_itself(store, namespace, clock.advance)
    store.exited(session)


def _chain(first: int) -> U8:
    return np.arange(4 * first, 4 * first + 16, dtype=np.uint64)


def _store(store: Store, session: Session, namespace: Namespace, keys: U8) -> None:
    items = np.zeros(4, dtype=ITEM)
    store.reserve(session, namespace, keys, 0, 4, None, items)
    assert (items["grant"] == Grant.GRANTED).all(), "reservation does not work"
    for copy in store.commit(session, items["ticket"].tolist()):
        store.copied(copy.ticket, 1)
    store.flush_outcomes(session)


def _fetch(store: Store, session: Session, namespace: Namespace, keys: U8) -> None:
    locations = np.zeros(8, dtype=np.uint32)
    assert store.match(namespace, keys, 0, 4).dram == 4, "match does not work"
    lease = store.lease(session, namespace, 1, keys, 0, 4, 10**9, 0, locations, 0)
    assert isinstance(lease, Lease), "lease does not work"
    assert lease.count == 4, "lease does not work"
    store.renew(session, lease.number, 2 * 10**9)
    store.release(session, [lease.number])


def _abandon(store: Store, session: Session, namespace: Namespace, keys: U8) -> None:
    """A chain that is reserved and never written: pending, then gone, and its tickets are worth nothing."""
    items = np.zeros(4, dtype=ITEM)
    store.reserve(session, namespace, keys, 0, 4, None, items)
    assert store.match(namespace, keys, 0, 4).pending == 4, "pending blocks do not show"
    tickets = items["ticket"].tolist()
    store.abort(session, tickets[:1])
    store.commit(session, tickets[1:])
    assert store.tally.discarded == 3, "what follows an aborted block is not discarded"
    assert store.match(namespace, keys, 0, 4).pending == 0, "aborting does not work"


def _clear(store: Store, namespace: Namespace) -> None:
    keys = (BlockKey(_chain(0)[:4].tobytes()), BlockKey(_chain(8)[:4].tobytes()))
    for scope in (ClearScope(digest=namespace.digest, keys=keys), ClearScope(digest=namespace.digest)):
        reports: list[ClearReport] = []
        for dry_run in (True, False):
            store.clear(scope, reports.append, dry_run=dry_run)
        while len(reports) < 2:
            store.tick()
        assert reports[0].blocks == reports[1].blocks, "clear does not do what it says"
    assert store.tables.book[blocks.ROWS] == 0, "blocks are left over"


def _recycle(store: Store, session: Session, namespace: Namespace) -> None:
    """Another slot size needs memory: an arena is drained for it."""
    for first in (0, 8):
        _store(store, session, namespace, _chain(first))
    other = store.open(session, NamespaceIdentity("warm-up", "-", "-", "-", 1, MIB // 2))
    store.reserve(session, other, _chain(16), 0, 1, None, np.zeros(1, dtype=ITEM))
    store.tick()
    assert store.arenas.recycled == 1, "recycling does not work"
    arena = next(place for place, row in enumerate(store.tables.arenas) if int(row["pool"]) == other.pool.number + 1)
    for rule in (Rule.DENSITY, Rule.LRU):
        store.choose_rule(Chosen(Tier.DRAM, None, rule))
        store.tick()
        assert float(blocks.least_worth(store.tables, other.pool.number)) >= 0.0, "worth is not worth anything"
        assert float(blocks.arena_worth(store.tables, arena)) >= 0.0, "an arena's worth is not worth anything"
