"""Which blocks lie where, told to others as changes: stored, gone, in another tier, cleared. Off unless wanted.

    block table --- `look`, a slice of rows a time ---> what is known of each row ---> changes, to `tell`
    beyond.py, what is known to lie beyond this host -----------------------------------^

Nothing on the way of a store or a lease knows of this. Rows are compared with what was told of them before: so all that
ever moves a block (eviction, deletion, a scrub, a restart) is seen, whoever does it, and what cannot be told in time
waits in the table itself: no queue can overrun. A block that comes and goes between two looks was never there.

A key is told once for each tier that it comes into, and once for each that it leaves, wherever its row is: what moved
to a row that is looked at before its former one is found by its key (`heads`), and is told as being where it was: who
reads the table slice by slice (`there`) meanwhile would not come across it. Owner thread. A slice of 8,192 rows
that are as they were takes 0.05 ms, 100 new blocks 0.1 ms; all rows are looked at ten times a second, or 800,000 of
them a second, which is half a percent of a core.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvproto.limits import KEY_BYTES, NAMESPACES
from kvstore import blocks
from kvstore.beyond import Beyond
from kvstore.blocks import DISK, FREE, KEPT, LOADING, RESIDENT, SAVING, U4, U8, Rows, compiled, siphash
from kvstore.report import ClearScope
from kvstore.sessions import Namespace, Tenant
from kvstore.store import Store
from kvstore.usable import Forms, Kin, usable

Number: TypeAlias = Any
IN_DRAM: Final = np.uint8(1)
ON_DISK: Final = np.uint8(2)
IN_REMOTE: Final = np.uint8(4)  # in no row: `beyond.py`
SLICE_ROWS: Final = 8192
CHANGES: Final = 512  # of one look, at most: 0.5 ms
BEYOND: Final = 128  # of those, of what lies beyond this host
THERE_ROWS: Final = 1024  # that are told at a time where each must be looked for beyond this host as well
PACE_NS: Final = 10**7  # from look to look while a pass goes on
REST_NS: Final = 10**8  # from the end of a pass to the next one
CLEARING_NS: Final = 5 * 10**9
BUCKETS_MOST: Final = 1 << 20
STEPS: Final = 1 << 14  # rows of equal keys that are looked at in one look: 1 ms
FORGOTTEN_MOST: Final = 512  # rows that are looked at one by one: 1 ms, and 10 ms to find them among a million

# What was told of a row last. `tiers` 0: nothing, and then it is in no chain.
TOLD: Final = np.dtype(
    [
        ("key", "<u8", (4,)), ("generation", "<u8"), ("next", "<u4"), ("epoch", "<u4"), ("namespace", "<u2"),
        ("tiers", "u1"), ("_", "u1"), ("__", "<u4"),
    ]
)  # fmt: skip
CHANGE: Final = np.dtype(
    [
        ("key", "<u8", (4,)), ("parent", "<u8", (4,)), ("namespace", "<u4"), ("was", "u1"), ("now", "u1"),
        ("usable_was", "u1"), ("usable_now", "u1"),  # by all ranks: `usable.py`. Of the remote tier only what changes
    ]
)  # fmt: skip
Changes: TypeAlias = npt.NDArray[np.void]

assert FREE == 0


@compiled
def _tiers(row: Number) -> Number:
    """Where the block of a row can be had."""
    state = row["state"]
    tiers = np.uint8(0)
    if state in (RESIDENT, KEPT):
        tiers |= IN_DRAM
    elif state not in (DISK, LOADING):
        return tiers
    if row["disk"] and not row["flags"] & SAVING:
        tiers |= ON_DISK
    return tiers


@compiled
def _chain_of(heads: U4, seeds: U8, owner: Number, key: Number) -> Number:
    """One for a key in all namespaces of a tenant, so that its ranks are found together."""
    hashed = siphash(seeds[0], seeds[1], key[0], key[1], key[2], key[3], np.uint64(owner))
    return np.int64(hashed & np.uint64(heads.size - 1))


@compiled
def _unlink(told: Rows, told_of: U4, heads: U4, seeds: U8, kin: Kin, row: Number) -> None:
    chain = _chain_of(heads, seeds, kin[told[row]["namespace"]]["owner"], told[row]["key"])
    told[row]["tiers"] = 0
    told_of[told[row]["namespace"]] -= np.uint32(1)
    at = np.int64(heads[chain])
    if at == row:
        heads[chain] = told[row]["next"]
        return
    while np.int64(told[at]["next"]) != row:
        at = np.int64(told[at]["next"])
    told[at]["next"] = told[row]["next"]


@compiled
def _take_from(
    told: Rows, told_of: U4, heads: U4, seeds: U8, kin: Kin, epochs: U4, namespace: Number, key: Number
) -> Number:
    """What was told of a key as that of another row, which is forgotten; 0: nothing."""
    at = np.int64(heads[_chain_of(heads, seeds, kin[namespace]["owner"], key)])
    while at:
        one = told[at]
        its = one["key"]
        same = its[0] == key[0] and its[1] == key[1] and its[2] == key[2] and its[3] == key[3]
        if same and one["namespace"] == namespace:
            tiers = one["tiers"] if one["epoch"] == epochs[namespace] else np.uint8(0)
            _unlink(told, told_of, heads, seeds, kin, at)
            return tiers
        at = np.int64(one["next"])
    return np.uint8(0)


@compiled
def told_tiers(told: Rows, heads: U4, seeds: U8, kin: Kin, epochs: U4, namespace: Number, key: Number) -> Number:
    """What was told of a key as that of some row and still holds; 0: nothing."""
    at = np.int64(heads[_chain_of(heads, seeds, kin[namespace]["owner"], key)])
    while at:
        one = told[at]
        its = one["key"]
        same = its[0] == key[0] and its[1] == key[1] and its[2] == key[2] and its[3] == key[3]
        if same and one["namespace"] == namespace:
            return one["tiers"] if one["epoch"] == epochs[namespace] else np.uint8(0)
        at = np.int64(one["next"])
    return np.uint8(0)


@compiled
def _note(
    changes: Changes,
    at: Number,
    told: Rows,
    heads: U4,
    seeds: U8,
    kin: Kin,
    epochs: U4,
    key: Number,
    parent: Number,
    namespace: Number,
    was: Number,
    now: Number,
) -> Number:
    """Returns how many rows were looked at."""
    change = changes[at]
    first = np.int64(heads[_chain_of(heads, seeds, kin[namespace]["owner"], key)])
    before, after, steps = usable(told, first, epochs, kin, np.int64(namespace), key, np.uint8(was), np.uint8(now))
    for word in range(4):
        change["key"][word] = key[word]
        change["parent"][word] = parent[word]
    change["namespace"] = namespace
    change["was"] = was
    change["now"] = now
    change["usable_was"] = before
    change["usable_now"] = after
    return steps


@compiled
def compare(
    rows: Rows,
    told: Rows,
    told_of: U4,
    heads: U4,
    seeds: U8,
    kin: Kin,
    epochs: U4,
    doomed: U8,
    start: Number,
    stop: Number,
    changes: Changes,
) -> tuple[Number, Number]:
    """Note what has changed in rows `start` to `stop`; how far it came, and how many changes there are.

    `doomed`: by namespace, up to which generation all blocks are as good as dropped.
    It stops early where `changes` might not hold those of one more row, which are two at most, and where many rows have
    the same key.
    """
    count = steps = 0
    for row in range(start, stop):
        block, known = rows[row], told[row]
        now = _tiers(block)
        if now and block["generation"] <= doomed[block["namespace"]]:
            now = np.uint8(0)
        if not now and not known["tiers"]:
            continue
        valid = known["tiers"] and known["epoch"] == epochs[known["namespace"]]
        same = known["tiers"] and now and known["generation"] == block["generation"]
        if valid and same and now == known["tiers"]:
            continue
        if count + 2 > changes.size or steps > STEPS:
            return row, count
        if valid and same:
            steps += _note(
                changes, count, told, heads, seeds, kin, epochs, block["key"], rows[block["parent"]]["key"],
                block["namespace"], known["tiers"], now,
            )  # fmt: skip
            count += 1
            known["tiers"] = now
            continue
        if known["tiers"]:
            if valid:
                steps += _note(
                    changes, count, told, heads, seeds, kin, epochs, known["key"], rows[0]["key"],
                    known["namespace"], known["tiers"], np.uint8(0),
                )  # fmt: skip
                count += 1
            _unlink(told, told_of, heads, seeds, kin, row)
        if now:
            namespace, key = np.int64(block["namespace"]), block["key"]
            was = _take_from(told, told_of, heads, seeds, kin, epochs, namespace, key)
            for word in range(4):
                known["key"][word] = key[word]
            known["generation"] = block["generation"]
            known["namespace"] = namespace
            known["epoch"] = epochs[namespace]
            known["tiers"] = now
            told_of[namespace] += np.uint32(1)
            chain = _chain_of(heads, seeds, kin[namespace]["owner"], key)
            known["next"] = heads[chain]
            heads[chain] = row
            steps += _note(
                changes, count, told, heads, seeds, kin, epochs, key, rows[block["parent"]]["key"], namespace, was, now
            )
            count += 1
    return stop, count


@dataclass(frozen=True, slots=True)
class Place:
    """Whose blocks changes are about."""

    tenant: str
    digest: str
    model: str
    adapter: str
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Told:
    """What was found at one look (`CHANGE`, in order; `places` by namespace), or that all of a tenant's is gone."""

    changes: Changes
    places: Mapping[int, Place]
    cleared: str = ""


class Announcing:
    """Finds what has changed, and has it told."""

    def __init__(
        self,
        store: Store,
        seeds: Sequence[int],
        tell: Callable[[Told], bool],
        beyond: Beyond | None = None,
        *,
        by_model: bool = True,
    ) -> None:
        """`tell` returns whether there is room for more; while there is none nothing is looked at. `beyond`: what is
        known of a remote tier. `by_model`: as `usable.Forms` has it.
        """
        self.beyond = beyond or Beyond()
        rows = store.tables.blocks.size
        self.due_ns = 0
        self.passes = 0  # over all rows, since the start
        self._store = store
        self._tell = tell
        self._room = True
        self._row = 1
        self._told: Rows = np.zeros(rows, dtype=TOLD)  # untouched pages cost nothing
        self._told_of: U4 = np.zeros(NAMESPACES, dtype=np.uint32)  # rows, by namespace
        self._heads: U4 = np.zeros(min(BUCKETS_MOST, 1 << (rows - 1).bit_length()), dtype=np.uint32)
        self._seeds: U8 = np.array(seeds[:2], dtype=np.uint64)
        self._epochs: U4 = np.zeros(NAMESPACES, dtype=np.uint32)
        self._doomed: U8 = np.zeros(NAMESPACES, dtype=np.uint64)
        # Until when, of which namespaces, up to what generation.
        self._sweeps: deque[tuple[int, list[int], int]] = deque()
        self._changes: Changes = np.zeros(CHANGES, dtype=CHANGE)
        self._places: dict[int, tuple[Namespace, Place]] = {}
        self._forms = Forms(store.registry, by_model=by_model)
        self._compare(0, 0)  # so that it is compiled before anybody waits
        self._tiers_of(0, bytes(KEY_BYTES))

    def room(self) -> None:
        """Whoever is told can take more again. Owner thread."""
        self._room = True

    def look(self, now_ns: int) -> None:
        """At a slice of rows, if it is time."""
        if now_ns < self.due_ns:
            return
        self.due_ns = now_ns + PACE_NS
        while self._sweeps and self._sweeps[0][0] <= now_ns:
            self._swept(self._sweeps[0])
        for tenant in self._forms.learn(self._any_told):
            self.tell_anew(tenant.name)
        if self._room:
            self._look_beyond()
        if not self._room:
            return
        unused = int(self._store.tables.book[blocks.UNUSED_ROW])
        self._row = self._compare(self._row, min(self._row + SLICE_ROWS, unused))
        if self._row >= unused:
            self._row = 1
            self.passes += 1
            self.due_ns = now_ns + REST_NS

    def clearing(self, scope: ClearScope, now_ns: int) -> Callable[[], None]:
        """An operator has begun to drop what a scope names: where that is all of a tenant, it is said in one word.

        What is still to be swept would look new, so blocks that were stored before count as gone until it is over, or
        for five seconds: others, and those that are stored meanwhile, are told as ever. Who calls says that it is over.
        """
        if scope.digest is not None:
            return lambda: None
        numbers = []
        for tenant in self._store.tenants.values():
            if scope.tenant in (None, tenant.name):
                numbers += [namespace.number for namespace in self._store.registry.of(tenant)]
                self._clear(tenant)
                for namespace in self._store.registry.of(tenant):
                    self.beyond.forget(namespace.number, said=True)
        sweep = now_ns + CLEARING_NS, numbers, int(self._store.tables.book[blocks.GENERATION]) - 1  # the next one's
        self._doomed[numbers] = sweep[2]
        self._sweeps.append(sweep)
        return partial(self._swept, sweep)

    def _swept(self, sweep: tuple[int, list[int], int]) -> None:
        """What is there of these namespaces now is told, if nobody has begun to clear them again."""
        if sweep in self._sweeps:
            self._sweeps.remove(sweep)
            left = [number for number in sweep[1] if int(self._doomed[number]) == sweep[2]]
            self._doomed[left] = 0

    def tell_anew(self, name: str) -> None:
        """Something of a tenant could not be told: all is said to be gone, and what is there is told anew."""
        tenant = self._store.tenants.get(name)
        if tenant is None:
            self._room = self._tell(Told(self._changes[:0], {}, cleared=name))
            return
        for namespace in self._store.registry.of(tenant):
            self.beyond.tell_again(namespace.number)
        self._clear(tenant)

    def forgotten(self, number: int) -> None:
        """A namespace that holds no blocks is about to give its number to another one."""
        left = int(self._told_of[number]) + self.beyond.told_of(number)
        if left > FORGOTTEN_MOST:  # one word takes less time, and all that is there is told anew
            tenant = self._store.registry.by_number[number].tenant
            self.beyond.forget(number, said=True)
            for namespace in self._store.registry.of(tenant):
                self.beyond.tell_again(namespace.number)
            self._clear(tenant, number)
        elif left:
            unused = int(self._store.tables.book[blocks.UNUSED_ROW])
            told = self._told[:unused]
            for row in np.flatnonzero((told["namespace"] == number) & (told["tiers"] != 0)).tolist():
                self._compare(row, row + 1)
            left_there = self.beyond.expel(number)
            whole = [self._whole_beyond(number, key) for key in left_there]
            self._tell_of([(number, key, IN_REMOTE, np.uint8(0)) for key in left_there], whole)
        self._places.pop(number, None)
        tenant = self._store.registry.by_number[number].tenant
        if any(map(self._any_told, self._forms.leave(number))):  # what it lacked the others may have
            self.tell_anew(tenant.name)

    def there(self, tenant: str, start: int) -> tuple[Told, int]:
        """What was told of a slice of rows from `start` (at first 1) on and still holds, as changes from nowhere, and
        where to go on; 0: that was all."""
        numbers = [one.number for one in self._namespaces_of(tenant)]
        if start < 0:  # what lies beyond this host comes behind all rows
            keys, after = self.beyond.there(numbers, -start, CHANGES)
            return self._as_told(self._made([(*one, 0, self._tiers_of(*one) | IN_REMOTE) for one in keys])), -after
        unused = int(self._store.tables.book[blocks.UNUSED_ROW])
        stop = min(start + (THERE_ROWS if self.beyond.told else SLICE_ROWS), unused)
        told = self._told[start:stop]
        valid = (told["tiers"] != 0) & (told["epoch"] == self._epochs[told["namespace"]])
        rows = np.flatnonzero(valid & np.isin(told["namespace"], numbers))
        changes: Changes = np.zeros(rows.size, dtype=CHANGE)
        for name in ("key", "namespace"):
            changes[name] = told[name][rows]
        changes["now"] = told["tiers"][rows]
        changes["now"] |= self._remote_bits(changes)
        return self._as_told(changes), (stop if stop < unused else -1 if self.beyond.told else 0)

    def _clear(self, tenant: Tenant, *more: int) -> None:
        """Say that all of a tenant's blocks are gone. `more`: numbers of namespaces that it has no longer."""
        for number in (*(namespace.number for namespace in self._store.registry.of(tenant)), *more):
            self._epochs[number] += np.uint32(1)  # nothing is told of it any more
        self._room = self._tell(Told(self._changes[:0], {}, cleared=tenant.name))

    def _namespaces_of(self, name: str) -> list[Namespace]:
        tenant = self._store.tenants.get(name)
        return self._store.registry.of(tenant) if tenant is not None else []

    def _compare(self, start: int, stop: int) -> int:
        rows = self._store.tables.blocks
        reached, count = compare(
            rows, self._told, self._told_of, self._heads, self._seeds, self._forms.kin, self._epochs, self._doomed,
            start, stop, self._changes,
        )  # fmt: skip
        if count:
            changes = self._changes[:count].copy()
            bits = self._remote_bits(changes)
            changes["was"] |= bits
            changes["now"] |= bits
            self._room = self._tell(self._as_told(changes))
        return int(reached)

    def _any_told(self, number: int) -> bool:
        return bool(self._told_of[number]) or self.beyond.told_of(number) > 0

    # -- beyond this host ----------------------------------------------------------------------------------------

    def _look_beyond(self) -> None:
        found, whole = [], []
        for number, key, there in self.beyond.take(max(1, BEYOND // self._forms.most)):
            here = self._tiers_of(number, key)
            both = here | IN_REMOTE
            found.append((number, key, here, both) if there else (number, key, both, here))
            whole.append(self._whole_beyond(number, key))  # as far as was told by now
        self._tell_of(found, whole)

    def _whole_beyond(self, number: int, key: bytes) -> bool:
        """Is a block usable from beyond this host where this namespace has it there, and only then?"""
        if any(all(self.beyond.is_told(one, key) for one in ranks) for ranks in self._forms.others(number)):
            return False
        return all(self.beyond.is_told(one, key) for one in self._forms.mates(number))

    def _tell_of(self, found: Sequence[tuple[int, bytes, Number, Number]], whole: Sequence[bool]) -> None:
        """`whole`: of each, whether for that it becomes usable from beyond this host, or ceases to be."""
        if found:
            changes = self._made(found)
            for name in ("was", "now"):
                changes[f"usable_{name}"] = np.where(whole, changes[name] & IN_REMOTE, 0)
            self._room = self._tell(self._as_told(changes))

    def _made(self, found: Sequence[tuple[int, bytes, Number, Number]]) -> Changes:
        """Of (namespace, key, was, now)."""
        changes: Changes = np.zeros(len(found), dtype=CHANGE)
        for change, (number, key, was, now) in zip(changes, found, strict=True):
            change["key"], change["namespace"] = np.frombuffer(key, dtype=np.uint64), number
            change["was"], change["now"] = was, now
        return changes

    def _tiers_of(self, number: int, key: bytes) -> Number:
        words = np.frombuffer(key, dtype=np.uint64).copy()  # read-only arrays would be compiled for apart
        return told_tiers(self._told, self._heads, self._seeds, self._forms.kin, self._epochs, np.int64(number), words)

    def _remote_bits(self, changes: Changes) -> npt.NDArray[np.uint8]:
        """Of each, whether it was told to be beyond this host as well."""
        bits = np.zeros(changes.size, dtype=np.uint8)
        if self.beyond.told:
            for at, (number, key) in enumerate(zip(changes["namespace"].tolist(), changes["key"], strict=True)):
                if self.beyond.is_told(number, key.tobytes()):
                    bits[at] = IN_REMOTE
        return bits

    def _as_told(self, changes: Changes) -> Told:
        return Told(changes, {number: self._place(number) for number in np.unique(changes["namespace"]).tolist()})

    def _place(self, number: int) -> Place:
        namespace = self._store.registry.by_number[number]
        known = self._places.get(number)
        if known is None or known[0] is not namespace:
            identity = namespace.identity
            place = Place(
                namespace.tenant.name, namespace.digest.hex(), identity.model, identity.adapter, namespace.slot_bytes
            )
            known = self._places[number] = (namespace, place)
        return known[1]
