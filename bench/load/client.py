"""One client of the load: it stores, fetches and compares, pins, deletes, stalls, and comes and goes.

The bytes of a block follow from its key, so that any client can check any other's, and that of another key is the
control. What a client asks for is drawn from a seed; what it gets depends on all others.
"""

import hashlib
import os
import random
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Final

import numpy as np
from numpy.typing import NDArray

import kvclient
from bench.load.board import Board, Line, Verb, asking

Bytes = NDArray[np.uint8]

BLOCK_BYTES: Final = (12_000, 100_000)  # two sizes of slots, so that arenas change hands
STEMS: Final = 6  # prefixes that chains of a tenant share
CHAINS: Final = 160  # of a tenant and block size
STEM_BLOCKS: Final = 4
CHAIN_BLOCKS: Final = 12  # at most, the stem among them
TIMEOUT_S: Final = 2.0  # of a plain call
WAIT_S: Final = 0.2  # of a fetch
SPACE_S: Final = 0.5  # of a store, for room
FLUSH_S: Final = 2.0
TTL_S: Final = 1.0  # of leases and pins
THINK_S: Final = 0.04  # on average, between two calls
# What is asked for, and how often of a hundred times.
HABITS: Final = {
    "fetch": 44, "store": 24, "match": 10, "flush": 2, "pin": 3, "prefetch": 4, "delete": 2, "renew": 3, "ping": 3,
    "agent": 3, "leave": 1, "keep": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """What a process of clients needs to know."""

    runtime_dir: str
    board: str
    trouble: str  # a folder: what went wrong there, a file each
    tenants: tuple[str, ...]
    uids: tuple[int, ...]  # of them; empty: this user is all of them
    seed: int


class WrongBytesError(Exception):
    """A hit was not what was stored."""


def run_process(place: Place, tenant: int, first: int, count: int, life: int) -> None:
    """`count` clients of one tenant, from number `first` on; until they are killed."""
    if place.uids:
        os.setgroups([])
        os.setgid(place.uids[tenant])
        os.setuid(place.uids[tenant])
    threads = [
        Thread(target=_live, args=(place, place.tenants[tenant], number, life), daemon=True)
        for number in range(first, first + count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _live(place: Place, tenant: str, number: int, life: int) -> None:
    try:
        Client(place, tenant, number, life).live()
    except Exception:  # noqa: BLE001  whatever it is, it is to be seen
        line = Board(Path(place.board)).lines[number]
        line["failed"] += 1
        Path(place.trouble, f"{number}-{life}").write_text(traceback.format_exc())


class Client:
    """One of them. Its own thread."""

    def __init__(self, place: Place, tenant: str, number: int, life: int) -> None:
        self._place = place
        self._tenant = tenant
        self._random = random.Random(f"{place.seed}/{number}/{life}")
        self._board = Board(Path(place.board))
        self._line: Line = self._board.lines[number]
        self._line["verb"] = Verb.NOTHING
        self._name = f"load-{number}"
        self._kept: kvclient.Lease | None = None
        self._connect()

    def live(self) -> None:
        """Ask for ever."""
        names, weights = list(HABITS), list(HABITS.values())
        while True:
            time.sleep(self._random.expovariate(1 / THINK_S))
            self._line["connected"] = self._client.connected
            (name,) = self._random.choices(names, weights)
            getattr(self, f"_{name}")()

    def _connect(self) -> None:
        with asking(self._line, Verb.CONNECT, 3 * TIMEOUT_S):
            while True:
                try:
                    self._client = kvclient.connect(
                        self._place.runtime_dir, name=self._name, tenant=self._tenant, timeout_s=TIMEOUT_S
                    )
                    break
                except kvclient.RefusedError:  # of one user, 64 may be connected: those who were killed still are
                    time.sleep(THINK_S)
            self._namespaces = [self._namespace(size) for size in BLOCK_BYTES]

    def _namespace(self, block_bytes: int) -> kvclient.Namespace:
        return self._client.namespace(
            model="m", engine="load", layout="flat", dtype="uint8", block_bytes=block_bytes
        )  # fmt: skip

    def _some(self) -> tuple[kvclient.Namespace, list[bytes]]:
        """A namespace and a chain; some chains are asked for much more often than others."""
        ns = self._random.choice(self._namespaces)
        which = min(CHAINS - 1, int(self._random.paretovariate(0.35)) - 1)
        return ns, chain(self._tenant, ns.identity.block_bytes, which)

    # -- what it does --------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        ns, keys = self._some()
        block_bytes = ns.identity.block_bytes
        targets = np.zeros((len(keys), block_bytes), dtype=np.uint8)
        with asking(self._line, Verb.FETCH, WAIT_S + TIMEOUT_S):
            lease = ns.fetch(keys, wait_s=WAIT_S, ttl_s=TTL_S)
            whole = lease.expected == 0 or lease.copy_to(targets[: lease.expected])
        with lease:
            good = lease.expected if whole else lease.blocks if lease.valid() else 0
            disk = lease.tiers.disk
        if lease.expected and not good:
            self._line["lapsed"] += 1
        self._compare(keys[:good], targets[:good])
        self._line["hits"] += good
        self._line["disk_hits"] += disk
        self._line["misses"] += len(keys) - good

    def _compare(self, keys: Sequence[bytes], found: Bytes) -> None:
        for index, key in enumerate(keys):
            wanted = value(key, found.shape[1])
            if not np.array_equal(found[index], wanted):
                self._line["wrong"] += 1
                raise WrongBytesError(f"{key.hex()} of {self._tenant}, {np.flatnonzero(found[index] != wanted)[:5]}")
            if np.array_equal(found[index], value(key[::-1], found.shape[1])):
                raise WrongBytesError("the control is equal as well: this comparison finds nothing out")
        self._line["compared_bytes"] += found.size

    def _store(self) -> None:
        ns, keys = self._some()
        blocks = [value(key, ns.identity.block_bytes) for key in keys]
        with asking(self._line, Verb.STORE, SPACE_S + 2 * TIMEOUT_S):
            result = ns.store(keys, blocks, space_s=SPACE_S, wait=self._random.random() < 0.3)
        self._line["stored"] += result.accepted
        self._line["known"] += result.known
        self._line["refused"] += len(result.refused)

    def _match(self) -> None:
        ns, keys = self._some()
        with asking(self._line, Verb.MATCH, TIMEOUT_S):
            ns.match(keys)

    def _flush(self) -> None:
        ns, _ = self._some()
        with asking(self._line, Verb.FLUSH, FLUSH_S + 2 * TIMEOUT_S):
            self._line["durable"] += ns.flush(FLUSH_S).durable

    def _pin(self) -> None:
        ns, keys = self._some()
        with asking(self._line, Verb.PIN, TIMEOUT_S):
            pinned = ns.pin(keys, ttl_s=TTL_S)
        if self._random.random() < 0.5:
            with asking(self._line, Verb.UNPIN, TIMEOUT_S):
                ns.unpin(pinned)

    def _prefetch(self) -> None:
        ns, keys = self._some()
        with asking(self._line, Verb.PREFETCH, TIMEOUT_S):
            prefetch = ns.prefetch(keys, deadline_s=TTL_S)
        if self._random.random() < 0.3:
            prefetch.cancel()

    def _delete(self) -> None:
        ns, keys = self._some()
        with asking(self._line, Verb.DELETE, TIMEOUT_S):
            ns.delete([self._random.choice(keys)])

    def _renew(self) -> None:
        """Reads slowly, and sometimes too slowly."""
        ns, keys = self._some()
        with asking(self._line, Verb.FETCH, WAIT_S + TIMEOUT_S):
            lease = ns.fetch(keys, wait_s=0.0, ttl_s=0.3)
        with lease:
            time.sleep(self._random.uniform(0.0, 0.4))
            with asking(self._line, Verb.RENEW, 2 * TIMEOUT_S):
                lease.renew(TTL_S)
            found = [np.frombuffer(view, dtype=np.uint8).copy() for view in lease.views]
            valid = lease.valid()
        if valid and found:
            self._compare(keys[: len(found)], np.stack(found))
            self._line["hits"] += len(found)
        elif found:
            self._line["lapsed"] += 1

    def _keep(self) -> None:
        """Holds a lease for longer than it was promised, and gives it back whenever."""
        ns, keys = self._some()
        with asking(self._line, Verb.FETCH, WAIT_S + TIMEOUT_S):
            self._kept = ns.fetch(keys, wait_s=0.0, ttl_s=TTL_S)  # the one before goes without a word

    def _ping(self) -> None:
        with asking(self._line, Verb.PING, TIMEOUT_S):
            self._client.ping()

    def _agent(self) -> None:
        ns, keys = self._some()
        with self._client.program(f"{self._name}-{self._random.randrange(4)}") as program:
            program.context(ns, keys)
            program.tool_started("tool", expected_s=0.2)
            if self._random.random() < 0.8:
                program.tool_finished()

    def _leave(self) -> None:
        self._client.close()
        self._connect()


# -- chains and bytes --------------------------------------------------------------------------------------------------


@cache
def chain(tenant: str, block_bytes: int, which: int) -> list[bytes]:
    """Keys of one chain."""

    def key(name: str, index: int) -> bytes:
        return hashlib.sha256(f"{tenant}/{block_bytes}/{name}/{index}".encode()).digest()

    stem = [key(f"stem-{which % STEMS}", index) for index in range(STEM_BLOCKS)]
    length = 1 + which * 7 % (CHAIN_BLOCKS - STEM_BLOCKS)
    return stem + [key(f"chain-{which}", index) for index in range(length)]


# Once, before processes are forked and become users who perhaps cannot read what Python would load for it.
_NOISE: Final = np.random.default_rng(1).integers(0, 256, max(BLOCK_BYTES) + (1 << 20), dtype=np.uint8)


def value(key: bytes, block_bytes: int) -> Bytes:
    """The bytes that belong to a key: noise from a place of its own, and the key in every page."""
    start = int.from_bytes(key[:4], "little") % (1 << 20)
    block = _NOISE[start : start + block_bytes].copy()
    pages = block[: block_bytes // 4096 * 4096].reshape(-1, 4096)
    pages[:, :32] = np.frombuffer(key, dtype=np.uint8)
    return block
