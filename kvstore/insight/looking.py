"""Blocks as they stand: a page of a namespace's, or those of one prefix with who keeps and reads them.

Owner thread. Each function does about a millisecond of work and says where to go on; nothing is held meanwhile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from kvproto.ids import BlockKey, NamespaceDigest
from kvstore import blocks
from kvstore.blocks import U4
from kvstore.insight.finding import keys_in_slice
from kvstore.insight.forest import LIVE_STATES, SLICE_ROWS, Part, slice_of, tags_of
from kvstore.pins import Held
from kvstore.sessions import Lease, Namespace
from kvstore.store import Store

LIST_MOST: Final = 1024  # blocks of a page, in looks of
LISTED_A_LOOK: Final = 256
KEYS_A_LOOK: Final = 256  # 0.6 ms
KEEPERS_A_LOOK: Final = 128  # pins or leases: 0.6 ms where each pin covers 1,024 blocks
KEEPERS_LISTED: Final = 64

_STATES: Final = {
    blocks.WRITING: "writing",
    blocks.RESIDENT: "resident",
    blocks.KEPT: "unverified",
    blocks.LOADING: "loading",
    blocks.DISK: "on disk",
}
_IN_DRAM: Final = (blocks.RESIDENT, blocks.KEPT)


class SeveralError(ValueError):
    """More than one namespace could be meant."""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block; all but `key` and `state` is empty of one that is absent."""

    key: bytes
    state: str  # "absent", "writing", "resident", "unverified", "loading" or "on disk"
    in_dram: bool = False
    on_disk: bool = False
    age_s: float = 0.0  # since it was used last, as far as its row remembers
    hits: int = 0  # likewise
    pins: int = 0  # that cover it
    holds: int = 0
    leased_s: float = 0.0
    parent: bytes = b""
    slot_bytes: int = 0
    in_hbm: bool = False  # a copy lies in memory of a GPU


@dataclass(frozen=True, slots=True)
class Begun:
    """A namespace that is going to be looked at."""

    number: int
    tenant: str
    digest: str
    block_tokens: int
    slot_bytes: int
    now_ns: int
    start_row: int = 0


@dataclass(frozen=True, slots=True)
class Keeper:
    """A pin or a lease that has a part of a prefix. `number`: of the pin, or of the session that has the lease."""

    number: int
    blocks: int
    left_s: float
    owner: str = ""


class Looking:
    """What one store can be asked of its blocks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # -- which namespace -----------------------------------------------------------------------------------------

    def begin(self, tenant: str | None, digest: NamespaceDigest | None, key: BlockKey | None = None) -> Begun:
        """The namespace that is meant. Raises KeyError(text): there is none, or no such key; ValueError: several."""
        store = self._store
        if tenant is not None and tenant not in store.tenants:
            raise KeyError(f"no tenant is called {tenant}")
        found = [
            namespace
            for (owner, its), namespace in store.namespaces.items()
            if tenant in (None, owner.name) and digest in (None, its)
        ]
        if len(found) > 1 and digest is None:  # those that hold nothing are not meant
            found = [one for one in found if store.tables.census[one.number]] or found
        if not found:
            raise KeyError("no such namespace holds blocks or is open")
        if len(found) > 1:
            meant = f"{len(found)} namespaces could be meant; name one, and its tenant if several have it"
            raise SeveralError(f"{meant}; `kvctl namespaces` lists them")
        namespace, row = found[0], 0
        if key is not None:
            row = self._row(namespace, key)
            if not row:
                raise KeyError(f"no block of that namespace has the key {key.hex()[:16]}")
        return Begun(
            namespace.number, namespace.tenant.name, namespace.digest.hex(), namespace.identity.block_tokens,
            namespace.slot_bytes, store.now_ns(), row,
        )  # fmt: skip

    def _namespace(self, begun: Begun) -> Namespace:
        namespace = self._store.registry.by_number.get(begun.number)
        if namespace is None or namespace.digest.hex() != begun.digest or namespace.tenant.name != begun.tenant:
            raise KeyError("the namespace went away meanwhile")
        return namespace

    def _row(self, namespace: Namespace, key: bytes) -> int:
        words = np.frombuffer(key, dtype=np.uint64).copy()  # read-only arrays would be compiled for apart
        return int(blocks.find_one(self._store.tables, namespace.tenant.index, namespace.number, words, 0))

    # -- a tree --------------------------------------------------------------------------------------------------

    def slice(self, begun: Begun, start: int) -> tuple[Part, int]:
        """See `slice_of`. Raises KeyError."""
        namespace = self._namespace(begun)
        return slice_of(self._store.tables, self._store.pinning, namespace.number, start, begun.now_ns)

    def keys(self, rows: U4, tags: U4) -> list[bytes]:
        """Keys of blocks in these rows; empty where another one lies there now."""
        keys = self._store.tables.blocks["key"][rows]
        same = (tags_of(keys) == tags).tolist()
        return [key.tobytes() if mine else b"" for key, mine in zip(keys, same, strict=True)]

    def keys_beginning(self, begun: Begun, start: int, beginnings: Sequence[str]) -> tuple[list[list[BlockKey]], int]:
        """See `keys_in_slice`. Raises KeyError."""
        return keys_in_slice(self._store.tables, self._namespace(begun).number, start, beginnings)

    # -- a list --------------------------------------------------------------------------------------------------

    def page(self, begun: Begun, cursor: int, most: int) -> tuple[list[BlockReport], int]:
        """Up to `most` blocks of a slice of rows from `cursor` on, and where to go on; 0: that was all.

        Raises KeyError.
        """
        namespace, tables = self._namespace(begun), self._store.tables
        unused = int(tables.book[blocks.UNUSED_ROW])
        stop = min(cursor + SLICE_ROWS, unused)
        table = tables.blocks[cursor:stop]
        at = np.flatnonzero((table["namespace"] == namespace.number) & LIVE_STATES[table["state"]])
        chosen = (at[:most] + cursor).astype(np.uint32)
        if at.size > most:
            stop = int(chosen[-1]) + 1
        return list(self._reports(namespace, chosen)), (stop if stop < unused else 0)

    def _reports(self, namespace: Namespace, rows: U4) -> Iterator[BlockReport]:
        store = self._store
        now_ns = store.now_ns()
        found = store.tables.blocks[rows]
        keys, parents = found["key"], store.tables.blocks["key"][found["parent"]]
        pins, above = store.pinning.covering(rows).tolist(), store.hbm.above(rows).tolist()
        columns = ("state", "flags", "disk", "touched", "uses", "holds", "lease_until_ns", "parent")
        plain = zip(*(found[name].tolist() for name in columns), strict=True)
        for i, (state, flags, disk, touched, uses, holds, until_ns, parent) in enumerate(plain):
            yield BlockReport(
                key=keys[i].tobytes(),
                state=_STATES[state],
                in_dram=state in _IN_DRAM,
                on_disk=bool(disk) and not flags & int(blocks.SAVING),
                slot_bytes=namespace.slot_bytes,
                age_s=max(0, now_ns - touched) / 1e9,
                hits=max(uses & blocks.USES_MAX, 1) - 1,
                pins=pins[i],
                holds=holds,
                leased_s=max(0, until_ns - now_ns) / 1e9 if holds else 0.0,
                parent=parents[i].tobytes() if parent else b"",
                in_hbm=above[i],
            )

    # -- a prefix ------------------------------------------------------------------------------------------------

    def chain(self, begun: Begun, keys: Sequence[BlockKey]) -> tuple[list[BlockReport], list[int]]:
        """Up to `KEYS_A_LOOK` blocks by their keys, and their rows, 0 where there is none. Raises KeyError."""
        namespace = self._namespace(begun)
        rows = [self._row(namespace, key) for key in keys[:KEYS_A_LOOK]]
        there = self._reports(namespace, np.array([row for row in rows if row], dtype=np.uint32))
        asked = zip(keys[:KEYS_A_LOOK], rows, strict=True)
        return [next(there) if row else BlockReport(key, "absent") for key, row in asked], rows

    def pins(self, begun: Begun) -> list[Held]:
        """Those of its tenant, to be looked at by `pins_of`."""
        tenant = self._namespace(begun).tenant
        return [pin for pin in self._store.pinning.pins.values() if pin.tenant is tenant]

    def pins_of(self, pins: Sequence[Held], rows: frozenset[int]) -> list[Keeper]:
        """Which of up to `KEEPERS_A_LOOK` pins have which part of some rows."""
        store, found = self._store, []
        wanted = np.zeros(store.tables.blocks.size, dtype=np.bool_)  # untouched pages cost nothing
        wanted[list(rows)] = True
        for pin in pins[:KEEPERS_A_LOOK]:
            if pin.number in store.pinning.pins:
                part = int(np.count_nonzero(wanted[pin.paid]))
                left_s = max(0, store.pinning.expires_ns(pin) - store.now_ns()) / 1e9
                found += [Keeper(pin.number, part, left_s, pin.owner)] if part else []
        return found

    def leases(self) -> list[Lease]:
        """All that run, to be looked at by `leases_of`."""
        return list(self._store.leases.values())

    def leases_of(self, leases: Sequence[Lease], rows: Sequence[int]) -> list[Keeper]:
        """Which of up to `KEEPERS_A_LOOK` leases end in a prefix with these rows, and how much of it they have."""
        store, now_ns = self._store, self._store.now_ns()
        depth = {row: place for place, row in enumerate(rows, start=1) if row}
        found = []
        for lease in leases[:KEEPERS_A_LOOK]:
            part = max((depth.get(end, 0) for end in lease.ends.tolist()), default=0)
            if part and lease.number in store.leases:
                left_s = max(0, lease.deadline_ns - now_ns) / 1e9
                found.append(Keeper(lease.session.number, min(part, lease.count), left_s))
        return found


def first_of(keepers: Sequence[Keeper]) -> list[Keeper]:
    """Those that are listed: what has most of it first."""
    return list(islice(sorted(keepers, key=lambda one: (-one.blocks, one.number)), KEEPERS_LISTED))
