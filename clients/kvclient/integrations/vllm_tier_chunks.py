"""The second tier's blocks, which vLLM calls chunks: which of them the daemon has, into the first tier and out of it.

A model with several kinds of KV memory has a group of layers for each kind, and a group a namespace of its own. Of a
group that looks at everything (`whole`) a prefix is stored as a chain, so that eviction begins at its end, and what
comes after the first hole is of no use. Of the others (a sliding window, a recurrent state) vLLM stores only the last
few chunks of a prompt: each is a chain of its own, and is looked up by itself, the last one first.

Imports nothing of vLLM. Whatever goes wrong with the daemon is a chunk that is not there.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvclient.namespace import Namespace
from kvclient.results import Reason
from kvproto.errors import KvError

_clock = time.monotonic

SILENCE_S: Final = 1.0  # how long a daemon that has not answered is left alone
SOON_S: Final = 0.05  # how long a load waits for what is in memory
READ_S: Final = 30.0  # how long a lease is held for copying
SPACE_S: Final = 1.0  # how long a store waits for room in the ring
HOLES: Final = 8  # in what a load was promised; past that the rest is computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of one group, and where it lies in the first tier."""

    name: bytes  # vLLM's key: hash and group
    group: int
    key: bytes  # vLLM's hash: 32 bytes
    end: int  # tokens of its request up to its end
    parent: bytes | None = None  # key of the chunk before it, where that is known
    row: int = -1


@dataclass(frozen=True, slots=True)
class Group:
    """Layers with one kind of KV memory."""

    quick: Namespace  # of a client that waits for no answer for long
    patient: Namespace
    tokens: int  # of a chunk
    whole: bool  # does a token look at all tokens before it?


class Chunks:
    """All groups of an engine. Lookups, loads and stores each in a thread of their own; none raises."""

    def __init__(
        self, groups: Mapping[int, Group], rows: NDArray[np.int8], *, disk_wait_s: float, patience_s: float
    ) -> None:
        """`rows`: the first tier, [chunks, bytes of a chunk]. `patience_s`: for quick namespaces, and for a lookup."""
        self._groups = groups
        self._rows: NDArray[np.int8] | None = rows
        self._disk_wait_s = disk_wait_s
        self._patience_s = patience_s
        self._silent_until = 0.0

    @property
    def silent(self) -> bool:
        """Has the daemon not answered a moment ago?"""
        return _clock() < self._silent_until

    def forget_memory(self) -> None:
        """The first tier goes away; no load or store runs or will."""
        self._rows = None

    # -- lookups -------------------------------------------------------------------------------------------------

    def present(self, asked: Iterable[Chunk]) -> set[bytes]:
        """The names of those chunks of one request that are there, as far as they are of use and asked for in time."""
        until = _clock() + self._patience_s
        found: set[bytes] = set()
        useless_from: float = float("inf")  # tokens
        groups = list(_by_group(asked))
        for number, chunks in sorted(groups, key=lambda each: not self._groups[each[0]].whole):
            group = self._groups[number]
            if group.whole:
                blocks = self._match(group, chunks)
                found.update(chunk.name for chunk in chunks[:blocks])
                if blocks < len(chunks):
                    useless_from = min(useless_from, chunks[blocks].end - group.tokens)
                continue
            wanted = [chunk for chunk in reversed(chunks) if chunk.end - group.tokens < useless_from]
            while wanted and _clock() < until:
                blocks = self._match(group, wanted)
                found.update(chunk.name for chunk in wanted[:blocks])
                wanted = wanted[blocks + 1 :]
        return found

    def _match(self, group: Group, chunks: Sequence[Chunk]) -> int:
        """How many of these from the front are there."""
        if self.silent:
            return 0
        began = _clock()
        try:
            return group.quick.match([chunk.key for chunk in chunks]).blocks
        except KvError:  # such as blocks too large for this daemon
            return 0
        finally:
            self._note(_clock() - began >= self._patience_s)

    def _note(self, unanswered: bool) -> None:
        if unanswered:
            self._silent_until = _clock() + SILENCE_S

    # -- loads ---------------------------------------------------------------------------------------------------

    def load(self, chunks: Iterable[Chunk]) -> set[bytes]:
        """Fill their rows. The names of those that are filled and right; the rows of others may hold anything.

        All of it waits for disk no longer than one request may.
        """
        until = _clock() + self._disk_wait_s
        good: set[bytes] = set()
        for number, mine in _by_group(chunks):
            wanted = mine
            for _ in range(HOLES):
                if not wanted:
                    break
                filled = self._fill(self._groups[number], wanted, until)
                good.update(chunk.name for chunk in wanted[:filled])
                wanted = wanted[filled + 1 :]
        return good

    def _fill(self, group: Group, chunks: Sequence[Chunk], until: float) -> int:
        """How many of these from the front are filled; what is on disk is waited for `until` then."""
        if self.silent:
            return 0
        keys = [chunk.key for chunk in chunks]
        began = _clock()
        try:
            match = group.quick.match(keys)
            self._note(_clock() - began >= self._patience_s)
            if not match.blocks:
                return 0
            wait_s = max(0.0, until - _clock()) if match.tiers.disk else SOON_S
            with group.patient.fetch(keys[: match.blocks], wait_s=wait_s, ttl_s=READ_S) as lease:
                if lease.expected == 0:
                    return 0
                if lease.copy_to(self._rows_of(chunks[: lease.expected])):
                    return lease.expected
                blocks = lease.blocks  # what came of a load that broke off
                return blocks if lease.valid() else 0
        except KvError:
            return 0

    def _rows_of(self, chunks: Sequence[Chunk]) -> list[Any]:
        assert self._rows is not None
        return [self._rows[chunk.row] for chunk in chunks]

    # -- stores --------------------------------------------------------------------------------------------------

    def store(self, chunks: Iterable[Chunk]) -> int:
        """Store these. How many are in the store now, or will be in a moment."""
        stored = 0
        for number, mine in _by_group(chunks):
            group = self._groups[number]
            for run in _runs(mine) if group.whole else ([chunk] for chunk in mine):
                if not self.silent:
                    stored += self._store_run(group, run)
        return stored

    def _store_run(self, group: Group, run: Sequence[Chunk]) -> int:
        """A run each of which continues the one before; behind its parent, and if that is not there without one."""
        keys, rows = [chunk.key for chunk in run], self._rows_of(run)
        parents = (run[0].parent, None) if group.whole and run[0].parent else (None,)
        kept = 0
        try:
            for parent in parents:
                result = group.patient.store(keys, rows, parent=parent, space_s=SPACE_S)
                kept = result.accepted + result.known + result.reasons[Reason.PENDING]
                self._note(result.reasons[Reason.TIMED_OUT] > 0)
                if not (result.refused and result.refused[0].index == 0 and Reason.NO_PARENT in result.reasons):
                    break
        except KvError:
            return 0
        return kept


def _by_group(chunks: Iterable[Chunk]) -> Iterator[tuple[int, list[Chunk]]]:
    """Each group's, in the order in which they lie in the prompt."""
    for number, mine in groupby(sorted(chunks, key=lambda chunk: (chunk.group, chunk.end)), lambda chunk: chunk.group):
        yield number, list(mine)


def _runs(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Stretches in which each continues the one before."""
    run: list[Chunk] = []
    for chunk in chunks:
        if run and chunk.parent != run[-1].key:
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run
