"""The tiers in memory of GPUs, between the store that decides and the threads that copy. Owner thread.

promotions   copied up: behind a LOAD, and what `HbmTiers` wants there
lowering     last copies of blocks, back into DRAM
"""

from collections.abc import Callable, Sequence

from kvstore.moving import Held
from kvstore.sessions import Namespace
from kvstore.store import Store
from kvstore.tier.hbm import Copy, Hbm
from kvstored.device_lowering import Lowering
from kvstored.device_promoting import Promotions
from kvstored.device_work import DeviceThreads, Done, Work
from kvstored.memory import HostMemory


class HbmVerbs:
    """Of all devices; those without a tier do nothing here."""

    def __init__(
        self, threads: Sequence[DeviceThreads], store: Callable[[], Store], host: HostMemory,
        put: Callable[[DeviceThreads, Work, Callable[[Done], None]], None], give_back: Callable[[Held], None],
    ) -> None:  # fmt: skip
        self._threads = threads
        self._store = store
        self._give_back = give_back
        self._lifted: dict[Held, Hbm] = {}  # those that are not behind a LOAD
        self.promotions = Promotions(host, put, self._let_go, self._call)
        self._lowering = Lowering(store, threads, host, put)

    def begin(self, store: Store) -> None:
        """The store is there: it hears of the tiers, and has blocks copied there and back from now on."""
        tiers = [threads.hbm for threads in self._threads if threads.hbm is not None]
        if not tiers:
            return
        store.hbm.carry, store.hbm.lower = self._carry, self._lowering.lower
        store.matching.above = store.hbm.above
        store.hear_misses(store.hbm.missed)
        for hbm in tiers:
            store.hbm.join(hbm)

    def settle(self, threads: DeviceThreads, namespace: Namespace) -> None:
        """An engine has memory for these blocks on that GPU."""
        if threads.tier is not None:
            self._store().hbm.settle(namespace, threads.tier)

    def look(self, threads: DeviceThreads) -> None:
        """If the GPU is lost, its tier is."""
        if threads.lost and threads.hbm is not None:
            self._store().hbm.lose(threads.hbm)

    def _call(self, hbm: Hbm, copies: Sequence[Copy], namespace: Namespace) -> None:
        self._store().hbm.call(hbm, copies, namespace)

    def _carry(self, hbm: Hbm, namespace: Namespace, held: Held) -> None:
        threads = next(each for each in self._threads if each.hbm is hbm)
        self._lifted[held] = hbm
        self.promotions.promote(threads, held, namespace)

    def _let_go(self, held: Held) -> None:
        self._give_back(held)
        hbm = self._lifted.pop(held, None)
        if hbm is not None:
            self._store().hbm.carried(hbm)
