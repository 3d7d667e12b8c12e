"""Why a prefix missed: where its lead run ends, and what is known of the block that is not there.

    lead run -> first block that is missing -> ghosts and departures, the last of them -> a cause, with a sentence
                                            -> namespaces that have it, and the fields in which they differ

Departures are noted to 8.6 s, and of evictions it is known to a second when they were. Which of both was last is often
known better than that: a ghost says when its block came or was used last. One that was there after it was deleted, or
damaged, has come again since, so its eviction is what happened last; and where it was used after its pin had ended,
that pin is no reason any more.

Looks only, and touches nothing: asking moves no block in its queue. Owner thread, bounded: 1,024 keys, all namespaces
of a tenant and 1,024 of others looked over, of which 128 that hold something are searched; about half a millisecond.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Final

import numpy as np

from kvproto.identity import NamespaceIdentity
from kvproto.ids import BlockKey, NamespaceDigest
from kvstore import blocks
from kvstore.blocks import U8
from kvstore.insight.reasons import STEP_NS, Cause, Place
from kvstore.policies import tier_of
from kvstore.rules import Tier
from kvstore.sessions import Namespace, Pool
from kvstore.store import Store

LISTED: Final = 1024  # namespaces looked over, where no tenant is named
SEARCHED: Final = 128  # of those, searched for the key
NAMED: Final = 4  # of those that could be meant
ELSEWHERE: Final = 8  # of those that have it, named

_SAID: Final = {
    Cause.DELETED: "A client deleted it",
    Cause.CLEARED: "An operator cleared it",
    Cause.OPERATOR: "An operator evicted it",
    Cause.CORRUPT: "Dropped, because it was not what had been written",
    Cause.DISK_LOST: "Lost with its place on disk",
    Cause.REFUSED: "Refused when it came: there was no room",
    Cause.ABANDONED: "Never whole: its writer left or took too long",
    Cause.DRAINING: "Refused when it came: the daemon was draining",
    Cause.UNUSED: "Dropped, because nobody had used it for longer than its tenant's quota says",
    Cause.LIMIT: "Refused when it came: it was more than its tenant, or its client's ring, may have",
}
# What was there then was there no more.
_GONE: Final = (Cause.DELETED, Cause.CLEARED, Cause.UNUSED, Cause.CORRUPT, Cause.DISK_LOST)
_BECAUSE: Final = {
    Cause.PIN_EXPIRED: ", after its pin had ended",
    Cause.QUOTA: ", when memory of its tenant went to others",
}


@dataclass(frozen=True, slots=True)
class MissQuestion:
    """A chain of 1 to 1,024 keys, and where to look for it. None: wherever that is plain."""

    tenant: str | None
    digest: NamespaceDigest | None
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A namespace that has the block, and the fields in which its identity differs: `name: here / there`."""

    tenant: str
    digest: str
    differs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of a chain."""

    tenant: str
    digest: str  # of the namespace, as 64 hex digits
    asked: int
    found: int  # blocks of its lead run, on disk too
    on_disk: int  # of those, on disk alone
    state: str  # "hit", "writing" or "miss"
    key: str  # the first that is missing, in hex; empty: none is
    cause: str  # of a miss, as `Cause` names it
    tier: str  # that it left: "dram", "disk" or empty
    rule: str  # that evicted it, or empty
    age_s: float  # how long ago; -1: nobody knows
    known_s: float  # how far back departures of it would be remembered
    elsewhere: tuple[Elsewhere, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Left:
    """One trace of a block that left."""

    at_ns: int
    cause: Cause
    tier: str = ""
    rule: str = ""
    used_ns: int = -1  # when it came or was used last; -1: nobody knows


def explain(store: Store, question: MissQuestion) -> Explanation:
    """Raises KeyError for an unknown tenant or namespace, ValueError where it has to be named."""
    keys = np.frombuffer(b"".join(question.keys), dtype=np.uint64).copy()
    namespace = _namespace(store, question, keys)
    found, on_disk, writing = _lead_run(store, namespace, keys)
    key: U8 = keys[4 * found : 4 * found + 4].copy()
    if not key.size:
        sentences: tuple[str, ...] = (f"All {found} blocks are there{_on_disk(on_disk)}.",)
        return _explanation(namespace, question, found, on_disk, "hit", sentences)
    begins = f"{found} of {len(question.keys)} blocks are there{_on_disk(on_disk)}; the next one is not: "
    if writing:
        return _explanation(namespace, question, found, on_disk, "writing", (begins + "it is being written.",))
    left, known_ns = _why(store, namespace, key)
    others, whole = _elsewhere(store, namespace, key)
    now_ns = store.now_ns()
    sentences = (begins + key.tobytes().hex()[:16] + ".", *_say(store, namespace, left, known_ns, now_ns))
    sentences += tuple(_say_elsewhere(one) for one in others)
    if not whole:
        sentences += ("There are more namespaces than were searched for it.",)
    return _explanation(
        namespace, question, found, on_disk, "miss", sentences, left, (now_ns - known_ns) / 1e9, others, now_ns
    )  # fmt: skip


def _explanation(
    namespace: Namespace, question: MissQuestion, found: int, on_disk: int, state: str, sentences: tuple[str, ...],
    left: _Left | None = None, known_s: float = 0.0, others: tuple[Elsewhere, ...] = (), now_ns: int = 0,
) -> Explanation:  # fmt: skip
    cause = left.cause if left else Cause.NEVER
    return Explanation(
        tenant=namespace.tenant.name,
        digest=namespace.digest.hex(),
        asked=len(question.keys),
        found=found,
        on_disk=on_disk,
        state=state,
        key=question.keys[found].hex() if state != "hit" else "",
        cause=cause.name.lower() if state == "miss" else "",
        tier=left.tier if left else "",
        rule=left.rule if left else "",
        age_s=max(0.0, (now_ns - left.at_ns) / 1e9) if left else -1.0,
        known_s=known_s,
        elsewhere=others,
        sentences=sentences,
    )


# -- where it is ------------------------------------------------------------------------------------------------


def _namespace(store: Store, question: MissQuestion, keys: U8) -> Namespace:
    if question.tenant is not None and question.tenant not in store.tenants:
        raise KeyError(f"no tenant is called {question.tenant}")
    tenants = [one for name, one in store.tenants.items() if question.tenant in (None, name)]
    if question.digest is not None:
        named = [
            store.namespaces[one, question.digest] for one in tenants if (one, question.digest) in store.namespaces
        ]
        if not named:
            raise KeyError(f"no namespace has the digest {question.digest.hex()}; it was never opened here")
    elif question.tenant is not None:
        named = store.registry.of(store.tenants[question.tenant])
    else:
        named = list(islice(store.namespaces.values(), LISTED))
    if not named:
        raise KeyError("no namespace was opened here yet")
    if len(named) == 1:
        return named[0]
    holding = _holding(store, named)
    having = (one for one in holding[:SEARCHED] if blocks.find_one(store.tables, one.tenant.index, one.number, keys, 0))
    runs = [(_lead_run(store, one, keys)[0], one) for one in islice(having, ELSEWHERE)]
    return max(runs, key=lambda run: run[0])[1] if runs else _lost_by(store, named, keys[:4].copy())


def _lost_by(store: Store, named: list[Namespace], key: U8) -> Namespace:
    """The one that a key left last. Raises ValueError where nobody remembers it of any, and names some."""
    left = [(trace.at_ns, one) for one in named[:SEARCHED] if (trace := _why(store, one, key)[0]) is not None]
    if left:
        return max(left, key=lambda found: found[0])[1]
    some = ", ".join(f"{one.digest.hex()} ({one.tenant.name}, {one.identity.model})" for one in named[:NAMED])
    meant = f"{len(named)} namespaces could be meant; name one, and its tenant if several have it"
    raise ValueError(f"{meant}; `kvctl namespaces` lists those that have blocks. For example: {some}")


def _holding(store: Store, namespaces: list[Namespace]) -> list[Namespace]:
    """Those of some that hold any blocks."""
    held = store.tables.census[[one.number for one in namespaces]].tolist() if namespaces else []
    return [one for one, count in zip(namespaces, held, strict=True) if count]


def _lead_run(store: Store, namespace: Namespace, keys: U8) -> tuple[int, int, bool]:
    """How long the lead run is, how much of it lies on disk alone, and whether what follows is being written."""
    count, run = keys.size // 4, np.zeros(keys.size // 4, dtype=np.uint32)
    tables, index, number = store.tables, namespace.tenant.index, namespace.number
    found, stop = blocks.match_run(tables.blocks, *index, number, keys, 0, count, run)
    on_disk = 0
    if stop and tables.blocks["state"][stop] != blocks.WRITING:
        found, on_disk, stop = blocks.extend_run(tables, index, number, keys, 0, count, found, run)
    return int(found), int(on_disk), bool(stop)


def _elsewhere(store: Store, namespace: Namespace, key: U8) -> tuple[tuple[Elsewhere, ...], bool]:
    """Other namespaces that have a key, those of the same tenant first; and whether all were searched."""
    mine = [one for one in store.registry.of(namespace.tenant) if one is not namespace]
    listed = islice(store.namespaces.values(), LISTED)
    wanted = _holding(store, [*mine, *(one for one in listed if one.tenant is not namespace.tenant)])
    having = (
        one for one in wanted[:SEARCHED] if blocks.find_one(store.tables, one.tenant.index, one.number, key, 0)
    )  # fmt: skip
    named = tuple(
        Elsewhere(one.tenant.name, one.digest.hex(), _differs(namespace, one)) for one in islice(having, ELSEWHERE)
    )
    return named, len(wanted) <= SEARCHED and len(store.namespaces) <= LISTED


def _differs(here: Namespace, there: Namespace) -> tuple[str, ...]:
    differing = [
        f"{field.name}: {getattr(here.identity, field.name)} / {getattr(there.identity, field.name)}"
        for field in fields(NamespaceIdentity)
        if getattr(here.identity, field.name) != getattr(there.identity, field.name)
    ]
    if here.tenant is not there.tenant:
        differing.insert(0, f"tenant: {here.tenant.name} / {there.tenant.name}")
    return tuple(differing)


# -- how it left ------------------------------------------------------------------------------------------------


def why_gone(store: Store, namespace: Namespace, key: U8) -> tuple[Cause, str]:
    """How a key (four words) that is not there left, and which tier; `NEVER` and "" where nobody knows."""
    left, _ = _why(store, namespace, key)
    return (left.cause, left.tier) if left else (Cause.NEVER, "")


def _why(store: Store, namespace: Namespace, key: U8) -> tuple[_Left | None, int]:
    """The latest trace of a key that left, and since when one would be remembered."""
    departures = store.watching.departures
    noted, now_ns = departures.of(namespace.number, key), store.now_ns()
    noted_ns = (now_ns // STEP_NS - round(noted.age_s * 1e9 / STEP_NS)) * STEP_NS  # then, or less than a step later
    traces = list(_evictions(store, namespace, key, noted.cause, noted_ns))
    came_again = noted.cause in _GONE and any(left.used_ns >= noted_ns for left in traces)
    if noted.cause not in (Cause.NEVER, Cause.PIN_EXPIRED) and not came_again:
        tier = {Place.NONE: "", Place.DRAM: "dram", Place.DISK: "disk"}[noted.place]
        at_ns = now_ns - int(noted.age_s * 1e9)
        traces.append(_Left(min(now_ns, at_ns + STEP_NS // 2), noted.cause, tier))
    known_ns = max(
        departures.known_ns(namespace.tenant, namespace.number, key, pool.number) for pool in _pools(store, namespace)
    )
    if noted.cause is Cause.NEVER:
        known_ns = max(known_ns, now_ns - int(noted.age_s * 1e9) - STEP_NS)
    return max(traces, key=lambda left: left.at_ns, default=None), known_ns


def _pools(store: Store, namespace: Namespace) -> Sequence[Pool]:
    """Those that may have had a block of a namespace."""
    on_disk = store.disk.segments.pools.items() if store.limits.disk.disk_bytes else ()
    return [namespace.pool, *(pool for (tenant, _), pool in on_disk if tenant is namespace.tenant)]


def _evictions(store: Store, namespace: Namespace, key: U8, noted: Cause, noted_ns: int) -> Iterator[_Left]:
    """Ghosts of a key, without those that the eviction by an operator that is noted has left."""
    departures, tenant = store.watching.departures, namespace.tenant
    by_operator_ns = noted_ns + STEP_NS if noted is Cause.OPERATOR else -1
    for pool in _pools(store, namespace):
        turn = departures.ghost(tenant, namespace.number, key, pool.number)
        if turn < 0 or departures.latest_ns(turn) <= by_operator_ns:
            continue
        tier, at_ns = tier_of(pool), departures.time_of(turn)
        used_ns = departures.used_ns(tenant, namespace.number, key, pool.number)
        given_ns = departures.gave_way_ns(tenant, turn) if tier is Tier.DRAM else 0
        if given_ns:
            yield _Left(given_ns, Cause.QUOTA, tier.value, used_ns=used_ns)
            continue
        rule = departures.rule_at(pool.number, turn, store.policies.rule_of(tier, tenant.name).value)
        unpinned = noted is Cause.PIN_EXPIRED and used_ns < noted_ns + STEP_NS
        yield _Left(at_ns, Cause.PIN_EXPIRED if unpinned else Cause.EVICTED, tier.value, rule, used_ns)


# -- in words ---------------------------------------------------------------------------------------------------


def _say(store: Store, namespace: Namespace, left: _Left | None, known_ns: int, now_ns: int) -> Iterator[str]:
    cleared_ns = store.watching.departures.cleared_ns(namespace.number)
    if left is not None:
        said = _SAID.get(left.cause, "Evicted")
        where = f" from {'DRAM' if left.tier == 'dram' else 'disk'}" if left.tier else ""
        rule = f" by {left.rule}" if left.rule else ""
        yield f"{said}{where}{rule}, about {_ago((now_ns - left.at_ns) / 1e9)} ago{_BECAUSE.get(left.cause, '')}."
        if cleared_ns > left.at_ns:  # of what that dropped nothing is noted by key
            ago = _ago((now_ns - cleared_ns) / 1e9)
            yield f"All of its namespace was cleared after that, {ago} ago: if it had come again, that was it."
        return
    yield f"Not stored in the last {_ago((now_ns - known_ns) / 1e9)}, as far as is remembered."
    dropped_ns = store.watching.departures.dropped_ns(namespace.number)
    if cleared_ns:
        yield f"All of its namespace was cleared {_ago((now_ns - cleared_ns) / 1e9)} ago; that may have been it."
    if dropped_ns:
        yield (
            f"Blocks of its namespace were dropped {_ago((now_ns - dropped_ns) / 1e9)} ago, with all that continued "
            "them; that may have been it."
        )
    began = _ago((now_ns - store.watching.departures.began_ns) / 1e9)
    kept = f"kept {store.kept.blocks} blocks" if store.kept.warm else f"was empty: {store.kept.reason}"
    yield f"The daemon began {began} ago, and its memory {kept}."


def _say_elsewhere(one: Elsewhere) -> str:
    differs = ", ".join(one.differs) or "nothing"
    return f"It is there in the namespace {one.digest[:12]} of {one.tenant}; what differs (here / there): {differs}."


def _on_disk(count: int) -> str:
    return f", {count} of them on disk" if count else ""


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0.0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
