"""Where a LOAD reads each block from, the GPU's own memory or DRAM, and what is copied up. Owner thread.

A block that is loaded out of DRAM a second time is copied into the tier on the GPU, behind that LOAD, while the LOAD's
hold still keeps it in DRAM. What was seen once is remembered for `SEEN` blocks.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvstore.moving import Held, Place
from kvstore.sessions import Namespace
from kvstore.tier.hbm import Copy, Hbm
from kvstored.device_work import DeviceThreads, Done, Promoting, Region, Work
from kvstored.memory import HostMemory

SEEN: Final = 1 << 16  # 10 MiB
AT_ONCE: Final = 256 << 20  # what one LOAD may have copied up: what others load meanwhile waits for it by turns


@dataclass(slots=True, eq=False)
class Sources:
    """Where the blocks of a LOAD lie. `copies`: those on the device, None where it is DRAM."""

    addresses: list[int]
    copies: list[Copy | None]
    regions: list[Region]


class Promotions:
    """Of all devices."""

    def __init__(
        self, host: HostMemory, put: Callable[[DeviceThreads, Work, Callable[[Done], None]], None],
        give_back: Callable[[Held], None], call: Callable[[Hbm, Sequence[Copy], Namespace], None],
    ) -> None:  # fmt: skip
        """`call`: what copies are of, told while their blocks are held."""
        self._call = call
        self._host = host
        self._put = put
        self._give_back = give_back
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()

    def sources(self, threads: DeviceThreads, held: Held) -> Sources:
        """The nearest there are. Copies are held until `loaded`."""
        begins, regions = self._arenas(held.places)
        sources = Sources([], [], regions)
        for place in held.places:
            copy = threads.tier.find(place.row, place.generation) if threads.tier is not None else None
            sources.copies.append(copy)
            at = begins[place.arena] + place.offset if copy is None else threads.hbm_address(copy)
            sources.addresses.append(at)
        return sources

    def _arenas(self, places: Sequence[Place]) -> tuple[dict[int, int], list[Region]]:
        views = {arena: self._host.view(arena) for arena in {place.arena for place in places}}
        begins = {arena: int(view.ctypes.data) for arena, view in views.items()}
        return begins, [Region(begins[arena], view.size) for arena, view in views.items()]

    def loaded(
        self, threads: DeviceThreads, held: Held, copies: Sequence[Copy | None], namespace: Namespace, *, good: bool
    ) -> None:  # fmt: skip
        """A LOAD is over: let go of what it has read, once that which is to be nearer next time is."""
        hbm = threads.hbm
        if hbm is None:
            self._give_back(held)
            return
        near = [copy for copy in copies if copy is not None]
        for copy in near:
            hbm.release(copy)
        if good and near:
            hbm.hit(len(near), namespace.identity.block_bytes, namespace.tenant)
        far = [place for place, copy in zip(held.places, copies, strict=True) if copy is None]
        new = self._reserve(threads, far, namespace) if good and not threads.lost else []
        if not new:
            self._give_back(held)
            return
        begins, regions = self._arenas([place for place, _ in new])
        places = [(threads.hbm_address(copy), begins[place.arena] + place.offset) for place, copy in new]
        work = Promoting(places, namespace.identity.block_bytes, regions)
        self._put(threads, work, partial(self._promoted, threads, held, namespace, [copy for _, copy in new], work))

    def promote(self, threads: DeviceThreads, held: Held, namespace: Namespace) -> None:
        """Have these blocks on the device, seen or not; they are held until then."""
        self._seen.update(dict.fromkeys((place.row, place.generation) for place in held.places))
        self.loaded(threads, held, [None] * len(held.places), namespace, good=True)

    def _reserve(
        self, threads: DeviceThreads, far: Sequence[Place], namespace: Namespace
    ) -> list[tuple[Place, Copy]]:  # fmt: skip
        """Room for those that are seen again; the others are seen now."""
        assert threads.hbm is not None, "nobody asks without a tier"
        new: list[tuple[Place, Copy]] = []
        for place in far:
            key = place.row, place.generation
            if key not in self._seen:
                self._seen[key] = None
                continue
            if len(new) * namespace.slot_bytes >= AT_ONCE:
                break
            copy = threads.hbm.reserve(namespace.tenant, namespace.slot_bytes, *key)
            if copy is not None:
                new.append((place, copy))
            elif not threads.hbm.has(*key):
                break  # there is no room, and none for the next either
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return new

    def _promoted(
        self, threads: DeviceThreads, held: Held, namespace: Namespace, copies: Sequence[Copy], work: Promoting,
        done: Done,
    ) -> None:  # fmt: skip
        if not done.over:
            return
        assert threads.hbm is not None, "it was there"
        for copy in copies:
            (threads.hbm.filled if work.error is None else threads.hbm.failed)(copy)
        if work.error is None:
            self._call(threads.hbm, copies, namespace)
        self._give_back(held)
