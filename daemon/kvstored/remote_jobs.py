"""What the remote tier's threads do, put together: read (`remote_reading.py`), write (`remote_keeping.py`), and forget.

Forget  nothing of it is read from now on -> objects that hold some of it are deleted, until that has worked
"""

from collections.abc import Callable

from kvstore.tier.remote_format import key_digest
from kvstore.tier.remote_orders import Bytes, Forget
from kvstored.remote_calls import FarSide
from kvstored.remote_holdings import NAMES, DamagedError, Holdings
from kvstored.remote_keeping import Keeping
from kvstored.remote_ledger import Ledger
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_port import AbsentError
from kvstored.remote_reading import Reading
from kvstored.remote_removals import Doubt, Removal, holding


class Jobs:
    """What threads do. Any thread."""

    def __init__(
        self, far: FarSide, ledger: Ledger, view: Callable[[int], Bytes], readers: Pool, *,
        window: int, budget: Budget, quota_bytes: int,
    ) -> None:  # fmt: skip
        """`view`: an arena's bytes. `window`: requests of one seek at a time."""
        self.holdings = Holdings(far, ledger)
        self.reading = Reading(self.holdings, readers, window, budget)
        self.keeping = Keeping(self.holdings, view, quota_bytes)
        self.seek = self.reading.seek
        self.keep = self.keeping.keep
        self.begin_keep = self.keeping.begin

    def announce(self, forget: Forget) -> None:
        """What is being written of this namespace may have been dropped. Owner thread; waits for nobody."""
        self.holdings.epochs.dropped(forget.place.prefix, forget.keys)

    def begin_forget(self, forget: Forget) -> Removal:
        """From now on nothing of it is read or written. Returns what is to be removed."""
        holdings, prefix = self.holdings, forget.place.prefix
        digests = [key_digest(forget.place, key) for key in forget.keys]
        with holdings.lock:
            holdings.ledger.delete_keys(prefix, digests)
            if not forget.keys:
                holdings.ledger.begin_clear(prefix)
                holdings.known.forget_all(prefix)
        return Removal(prefix, tuple(digests))

    def forget(self, forget: Forget) -> None:
        """Delete what holds some of it. Raises RemoteError: it must be tried again."""
        place = forget.place
        self.remove(Removal(place.prefix, tuple(key_digest(place, key) for key in forget.keys)))

    def remove(self, order: Removal | Doubt) -> None:
        """Delete what holds some of it. Raises RemoteError: it must be tried again, and goes on where it was."""
        holdings, prefix = self.holdings, order.prefix
        if isinstance(order, Doubt):
            holdings.settle(order)
        elif not order.digests:
            holdings.clear(prefix)
        elif holdings.far.most_blocks == 1:  # names follow from keys, whoever wrote it
            while some := order.digests[order.done : order.done + NAMES]:
                holdings.remove([f"{prefix}{digest.hex()}/1." for digest in some])
                order.done += len(some)
        else:
            for digest in order.digests[order.done :]:
                holdings.remove_below(f"{prefix}{digest.hex()}/", twice=False)
                order.done += 1
            self._remove_own(order)

    def _remove_own(self, removal: Removal) -> None:
        """Of what this host has written, also what has some of it further inside. Raises RemoteError."""
        holdings = self.holdings
        with holdings.lock:
            mine = holdings.ledger.below(removal.prefix)
        digests = frozenset(removal.digests)
        for name, sure in holding(mine, removal.prefix, removal.digests):
            if name > removal.after:
                if sure or self._holds(name, digests):
                    holdings.remove([name])
                removal.after = name

    def _holds(self, name: str, digests: frozenset[bytes]) -> bool:
        """Does it? Of 262,144 keys two have the same letters in names. Raises RemoteError."""
        holdings = self.holdings
        try:
            header = holdings.remembered(name) or holdings.read_header(name)
        except (AbsentError, DamagedError):  # then there is nothing to keep
            return True
        return not digests.isdisjoint(key_digest(header.place, key) for key in header.keys)
