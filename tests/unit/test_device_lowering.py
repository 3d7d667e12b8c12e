"""Last copies on a GPU that go back into DRAM in slices, and what is deleted between two of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
import xxhash

from kvstore.quotas import Quota
from kvstored.device_lowering import Lowering, Returning
from kvstored.device_work import DeviceThreads, Done, Work
from kvstored.memory import HostMemory
from tests.core import BLOCK_BYTES, Core, chain, value_of
from tests.unit.test_hbms import begin, crowd_out, match, prefetch

SLICE = 2  # blocks that the tenant may have in flight


@dataclass
class Threads:
    """A GPU whose copies are carried out one by one."""

    hbm: object
    lost: str = ""
    name: str = "gpu"
    put: list[tuple[Returning, Callable[[Done], None]]] = field(default_factory=list)

    def hbm_address(self, _copy: object) -> int:
        return 0

    def carry_out(self, keys: list[bytes]) -> None:
        """One slice; `keys` in the order of the blocks."""
        work, then = self.put.pop(0)
        for block in work.blocks:
            index = next(at for at, key in enumerate(keys) if block.wanted == _checksum(key))
            block.target[:] = np.frombuffer(value_of(keys[index], BLOCK_BYTES), np.uint8)
            block.checksum = block.wanted
        then(Done(work, over=True))


def _checksum(key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(value_of(key, BLOCK_BYTES))


def lowering(core: Core) -> Threads:
    """The store lowers through the daemon's own part from now on."""
    threads = Threads(core.store.hbm.tiers[0])

    def put(_threads: DeviceThreads, work: Work, then: Callable[[Done], None]) -> None:
        assert isinstance(work, Returning)
        threads.put.append((work, then))

    host = cast("HostMemory", core.memory)
    core.store.hbm.lower = Lowering(lambda: core.store, [cast("DeviceThreads", threads)], host, put).lower
    return threads


@pytest.mark.parametrize("first", [0, 1, SLICE, 5], ids=["all", "of a slice", "between slices", "nothing"])
def test_what_is_deleted_while_it_goes_back_does_not(first: int) -> None:
    core, client, namespace, _ = begin(quota=Quota(in_flight=SLICE))
    threads = lowering(core)
    keys = chain(5)
    for before, key in zip([None, *keys], keys, strict=False):
        client.put(namespace, [key], parent=before)
    prefetch(client, namespace, keys)
    core.pass_time(1)
    assert match(client, namespace, keys) == (5, 0, 0)
    crowd_out(client, namespace)
    assert client.fetch(namespace, keys) == 0
    core.pass_time(1)
    assert len(threads.put) == 1
    if keys[first:]:
        client.delete(namespace, keys[first:])  # of those of other slices no tier knows but the one on the GPU
        core.settle()
    while threads.put:
        threads.carry_out(keys)
    core.settle()
    core.audit()
    assert client.fetch(namespace, keys) == first
    assert core.store.hbm.lowered_blocks == first
    assert core.store.hbm._lowering == 0
