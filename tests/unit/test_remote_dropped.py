"""Whatever writes, deletes, clears, failures, late landings and restarts come in whatever order: what was dropped does
not come back to the host that was told so, and in the end what lies over there is what the ledger says.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import cast

import numpy as np
import pytest

from kvproto.limits import MIB
from kvstore.tier.remote_format import OBJECT_BLOCKS
from kvstore.tier.remote_orders import Forget
from kvstored.remote_calls import FarSide
from kvstored.remote_jobs import Jobs
from kvstored.remote_ledger import Ledger
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_port import AbsentError, Bytes, Listed, RefusedError, RemoteError, UnreachableError
from kvstored.remote_removals import Removal
from tests.core import chain, value_of
from tests.s3 import S3Server
from tests.unit.remote_kit import BLOCK_BYTES, NOBODY, PLACE, Kit, read_ledger

SEEDS = 30
STEPS = 120
CHAINS = 6


class Objects:
    """`kvstored.remote_port.Backend` in memory, that fails as it is told to, and lands some writes later."""

    def __init__(self, random: Random, most_blocks: int) -> None:
        self.most_blocks = most_blocks
        self.objects: dict[str, bytes] = {}
        self.late: deque[tuple[str, bytes]] = deque()
        self.meanwhile: Callable[[], None] = lambda: None  # while something is written
        self.calm = False
        self._random = random

    def put(self, name: str, parts: Sequence[Bytes]) -> bool:
        """It may be refused, lost, land later, or be there without anybody being told."""
        content = b"".join(part.tobytes() for part in parts)
        end = "good" if self.calm else self._random.choice(["good", "good", "good", "refused", "lost", "late", "there"])
        if end == "refused":
            raise RefusedError("may not")
        self.meanwhile()
        if end in {"lost", "late"}:
            if end == "late":
                self.late.append((name, content))
            raise UnreachableError("no answer")
        new = self.objects.setdefault(name, content) is content
        if end == "there":
            raise UnreachableError("no answer")
        return new

    def replace(self, name: str, parts: Sequence[Bytes]) -> None:
        raise AssertionError("nothing is damaged here")

    def land(self) -> None:
        """The eldest of those that are late, as a bucket does it: what is there stays."""
        name, content = self.late.popleft()
        self.objects.setdefault(name, content)

    def fail(self) -> None:
        if not self.calm and self._random.random() < 0.2:
            raise UnreachableError("503")

    def get_range(self, name: str, start: int, stop: int) -> Bytes:
        """See the port."""
        if name not in self.objects:
            raise AbsentError(name)
        return np.frombuffer(self.objects[name][start:stop], dtype=np.uint8)

    def get_many(self, names: Sequence[str], object_bytes: int) -> "list[Bytes | None]":
        """See the port."""
        return [self.get_range(name, 0, object_bytes) if name in self.objects else None for name in names]

    def exists_many(self, names: Sequence[str]) -> list[bool]:
        """See the port."""
        return [name in self.objects for name in names]

    def delete(self, names: Sequence[str]) -> None:
        """See the port."""
        for name in names:
            self.fail()
            self.objects.pop(name, None)

    def listing(self, prefix: str, most: int) -> list[Listed]:
        """See the port."""
        self.fail()
        return [Listed(name, len(self.objects[name])) for name in sorted(self.objects) if name.startswith(prefix)][
            :most
        ]

    def close(self) -> None:
        """See the port."""


class World:
    """One host, life after life, and what it must not see."""

    def __init__(self, seed: int, folder: Path, most_blocks: int, readers: Pool) -> None:
        self.random = Random(seed)
        self.far = Objects(self.random, most_blocks)
        self.folder = folder
        self.readers = readers
        self.version = 0
        self.cleared = 0  # versions up to this one are gone
        self.deleted: set[bytes] = set()
        self.kept = 0
        self.depth = 0
        self.begin()

    def begin(self) -> None:
        """A life."""
        far = FarSide(self.far)
        empty = np.zeros(0, dtype=np.uint8)
        jobs = Jobs(
            far, read_ledger(self.folder), lambda _arena: empty, self.readers, window=4, budget=Budget(64 * MIB),
            quota_bytes=1 << 40,
        )  # fmt: skip
        self.kit = Kit(cast(S3Server, None), far, jobs)
        self.removals = jobs.holdings.removals
        self.removals._pause_s, self.removals._lands_s = 0.0, 3600.0
        jobs.resume()

    def heal(self) -> None:
        for breaker in (self.kit.far.reading, self.kit.far.writing, self.kit.far.deleting):
            breaker.until_ns = 0

    def keep(self) -> None:
        self.version += 1
        keys = chain(self.random.randint(1, 4), self.random.randrange(CHAINS))
        self.kept += bool(self.kit.keep(keys, version=self.version).stored)

    def drop(self) -> None:
        clear = self.random.random() < 0.5
        keys = () if clear else (self.random.choice(chain(4, self.random.randrange(CHAINS))),)
        forget = Forget(NOBODY, PLACE, keys)
        self.kit.jobs.announce(forget)
        if self.random.random() < 0.2:
            self.keep_nested()
        self.kit.jobs.begin_forget(forget)
        self.deleted.update(keys)
        if clear:
            self.cleared = self.version

    def remove(self) -> None:
        if not self.removals:
            return
        order = self.removals.next()
        assert order is not None
        try:
            if not self.kit.jobs.remove(order, self.random.choice([None, 1])) and isinstance(order, Removal):
                self.removals.goes_on(order)
        except RemoteError:
            self.removals.again(order)

    def expire(self) -> None:
        """The time of all writes that have failed is over."""
        while self.far.late:
            self.far.land()
        self.removals._first.extend(doubt for _, doubt in self.removals._later)
        self.removals._later.clear()

    def restart(self) -> None:
        if not self.depth:
            self.expire()  # what lands after its host has ended is nobody's
            while any(not isinstance(order, Removal) for order in self.removals._first):
                self.heal()
                self.remove()
            self.begin()

    def keep_nested(self) -> None:
        if self.depth < 2:
            self.depth += 1
            view = self.kit.jobs.keeping.view
            self.keep()
            self.kit.jobs.keeping.view = view
            self.depth -= 1

    def meanwhile(self) -> None:
        """Something else happens while a write is under way."""
        for _ in range(self.random.randrange(3)):
            self.random.choice([self.drop, self.remove, self.remove, self.keep_nested])()

    def see(self) -> int:
        """Nothing that was dropped comes back. Returns blocks that came."""
        seen = 0
        self.kit.jobs.holdings.known.forget_all(PLACE.prefix)
        for number in range(CHAINS):
            keys = chain(4, number)
            for key, block in zip(keys, self.kit.seek(keys), strict=False):
                assert key not in self.deleted
                versions = range(self.cleared + 1, self.version + 1)
                assert any(block.tobytes() == value_of(key, BLOCK_BYTES, version) for version in versions)
                seen += 1
        return seen

    def live(self) -> tuple[int, int]:
        """Returns writes and blocks that came back."""
        steps = [self.keep, self.keep, self.drop, self.remove, self.remove, self.remove, self.expire, self.restart]
        seen = 0
        self.far.meanwhile = self.meanwhile
        for _ in range(STEPS):
            self.heal()
            self.random.choice(steps)()
            if self.far.late and self.random.random() < 0.3:
                self.far.land()
            self.heal()
            seen += self.see()
        self.far.calm = True
        self.expire()
        for _ in range(20 * len(self.removals) + 10):
            self.heal()
            self.remove()
        return self.kept, seen


@pytest.fixture
def readers() -> Iterator[Pool]:
    made = Pool(4, "read")
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("most_blocks", [OBJECT_BLOCKS, 1])
def test_what_was_dropped_does_not_come_back_in_whatever_order_all_comes(
    tmp_path: Path, most_blocks: int, readers: Pool
) -> None:
    kept = seen = 0
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        world = World(seed, folder, most_blocks, readers)
        try:
            here = world.live()
            holdings, ledger = world.kit.jobs.holdings, world.kit.jobs.holdings.ledger
            assert not holdings.unsettled
            assert not ledger.clearing()
            assert not ledger.owed
            assert set(ledger._objects) == set(world.far.objects)
            again: Ledger = read_ledger(folder)
            assert again._objects == ledger._objects
            assert not again.clearing()
            assert not again.owed
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        kept, seen = kept + here[0], seen + here[1]
    assert kept > 5 * SEEDS, "the control: much was written"
    assert seen > 5 * SEEDS, "and came back"
