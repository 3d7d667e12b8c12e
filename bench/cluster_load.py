"""What a cluster is asked for, and engines that ask: prompts that share beginnings; every byte of a hit compared."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bench.harness import Bytes
from bench.replay import mooncake
from bench.replay.models import BASE
from bench.replay.workload import Model
from kvclient import Namespace

PREFIX_BLOCKS = 16  # that prompts of a group share: a system prompt and its tools
TURN_BLOCKS = 2  # that each turn of a talk adds
TURNS = 4
WAIT_S = 0.05  # for what lies on disk, and for room

Chain = list[bytes]


def talks(groups: int, count: int, seed: int = 1) -> list[Chain]:
    """So many requests: turns of talks, each of a group that some are far likelier to belong to than others."""
    draw = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, groups + 1) ** 0.7
    weights /= weights.sum()
    begun: list[tuple[int, int, int]] = []  # group, talk, turns so far
    requests: list[Chain] = []
    for number in range(count):
        if begun and draw.random() < 0.5:
            group, talk, turn = begun.pop(int(draw.integers(len(begun))))
        else:
            group, talk, turn = int(draw.choice(groups, p=weights)), number, 0
        if turn + 1 < TURNS:
            begun.append((group, talk, turn + 1))
        own = TURN_BLOCKS * (turn + 1)
        names = [f"group {group}/{at}" for at in range(PREFIX_BLOCKS)] + [f"talk {talk}/{at}" for at in range(own)]
        requests.append([key_of(name) for name in names])
    return requests


def traced(path: Path, most: int | None = None) -> tuple[list[Chain], Model]:
    """The requests of a trace in Mooncake's format, in order, and of what model. Raises OSError and TraceError."""
    read = mooncake.read(path)
    (model,) = read.models
    return [[key_of(str(one)) for one in request.keys.tolist()] for request in read.requests[:most]], model


def key_of(name: str) -> bytes:
    """A block's."""
    return hashlib.sha256(name.encode()).digest()


def content_of(key: bytes, block_bytes: int) -> Bytes:
    """What every engine computes for it: noise that belongs to its key."""
    random = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
    return np.frombuffer(random.bytes(block_bytes), dtype=np.uint8)


@dataclass
class Seen:
    """What became of requests. Times in seconds."""

    requests: int = 0
    blocks: int = 0
    hits: int = 0  # that were not computed anew
    wrong: int = 0  # blocks of other bytes than were computed
    refused: int = 0  # that the store did not take
    longest_s: float = 0.0  # one call of the library, whatever it was
    by_host: Counter[str] = field(default_factory=Counter)  # requests
    prefill_s: float = 0.0  # that the model's profile says these prompts take where nothing is a hit,
    spent_s: float = 0.0  # and behind what was one

    @property
    def share(self) -> float:
        """Of the blocks that were wanted, those that were hits."""
        return self.hits / self.blocks if self.blocks else 0.0

    @property
    def saved(self) -> float:
        """Of the seconds of prefill, those that hits saved: as `compute_saved` of `bench replay`, by the same T."""
        return 1 - self.spent_s / self.prefill_s if self.prefill_s else 0.0

    def since(self, earlier: "Seen") -> "Seen":
        """What came after; the longest call is that of all."""
        return Seen(
            self.requests - earlier.requests, self.blocks - earlier.blocks, self.hits - earlier.hits,
            self.wrong - earlier.wrong, self.refused - earlier.refused, self.longest_s, self.by_host - earlier.by_host,
            self.prefill_s - earlier.prefill_s, self.spent_s - earlier.spent_s,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """One of a host: its name, and where its blocks are kept."""

    name: str
    namespace: Namespace


class Crowd:
    """Engines that serve requests in turn, some at a time, each where `route` says."""

    def __init__(
        self, requests: Sequence[Chain], route: Callable[[Chain], Engine], *, threads: int, model: Model = BASE
    ) -> None:
        """`model`: what a block would cost to compute; none is."""
        self.seen = Seen()
        self._model = model
        self._requests = iter(requests)
        self._route = route
        self._threads = threads
        self._lock = threading.Lock()
        self._served = threading.Condition(self._lock)
        self._trouble: list[BaseException] = []

    def serve(self, count: int, midway: Callable[[], None] | None = None) -> Seen:
        """So many of the next requests, or all that are left. What they saw; raises what an engine raised.

        `midway`: done by one more thread, while the others go on, once half of them have been served.
        """
        before = replace(self.seen, by_host=self.seen.by_host.copy())
        self.seen.longest_s = 0.0
        with self._lock:
            turn = iter([chain for _, chain in zip(range(count), self._requests, strict=False)])
        crowd = [threading.Thread(target=self._work, args=(turn,)) for _ in range(self._threads)]
        if midway is not None:
            crowd.append(threading.Thread(target=self._act, args=(midway, before.requests + count // 2)))
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()
        if self._trouble:
            raise self._trouble[0]
        return self.seen.since(before)

    def _act(self, midway: Callable[[], None], served: int) -> None:
        with self._served:
            self._served.wait_for(lambda: self.seen.requests >= served or self._trouble)
        midway()

    def _work(self, turn: Iterator[Chain]) -> None:
        try:
            while True:
                with self._lock:
                    chain = next(turn, None)
                if chain is None:
                    return
                self._serve(self._route(chain), chain)
        except BaseException as error:  # noqa: BLE001  raised again by who waits
            with self._served:
                self._trouble.append(error)
                self._served.notify_all()

    def _serve(self, engine: Engine, chain: Chain) -> None:
        """A prompt: what is there is loaded and compared, the rest is computed and stored."""
        namespace = engine.namespace
        block_bytes = namespace.block_bytes
        began = time.monotonic()
        with namespace.fetch(chain, wait_s=WAIT_S) as lease:
            found = np.zeros((lease.expected, block_bytes), dtype=np.uint8)
            whole = lease.copy_to(found)
            hits = len(found) if whole else lease.blocks if lease.valid() else 0
        fetched_s = time.monotonic() - began
        wrong = sum(not np.array_equal(found[at], content_of(key, block_bytes)) for at, key in enumerate(chain[:hits]))
        refused, stored_s = 0, 0.0
        if hits < len(chain):
            computed = [content_of(key, block_bytes) for key in chain[hits:]]
            began = time.monotonic()
            parent = chain[hits - 1] if hits else None
            stored = namespace.store(chain[hits:], computed, parent=parent, space_s=WAIT_S)
            stored_s = time.monotonic() - began
            refused = len(stored.refused)
        with self._lock:
            seen = self.seen
            seen.requests, seen.blocks, seen.hits = seen.requests + 1, seen.blocks + len(chain), seen.hits + hits
            seen.wrong, seen.refused = seen.wrong + wrong, seen.refused + refused
            seen.prefill_s += self._prefill_s(0, len(chain))
            seen.spent_s += self._prefill_s(hits, len(chain))
            seen.longest_s = max(seen.longest_s, fetched_s, stored_s)
            seen.by_host[engine.name] += 1
            self._served.notify_all()

    def _prefill_s(self, cached: int, blocks: int) -> float:
        """T of so many blocks behind so many that are there; a last block that is not whole counts as one."""
        tokens = self._model.block_tokens
        return self._model.profile.seconds(float(cached * tokens), float((blocks - cached) * tokens))
