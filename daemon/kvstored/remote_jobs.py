"""What the remote tier's threads do, put together: read (`remote_reading.py`), write (`remote_keeping.py`), and forget.

Forget  nothing of it is read from now on -> objects that hold some of it are deleted, until that has worked
"""

from collections.abc import Callable

from kvstore.tier.remote_format import key_digest
from kvstore.tier.remote_orders import Bytes, Forget
from kvstored.remote_calls import FarSide
from kvstored.remote_holdings import LISTED, Holdings
from kvstored.remote_keeping import Keeping
from kvstored.remote_ledger import Ledger
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_reading import Reading
from kvstored.remote_removals import Removal, holding


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
        self.holdings.epochs.dropped(forget.place.prefix)

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

    def remove(self, removal: Removal) -> None:
        """Delete what holds some of it. Raises RemoteError: it must be tried again."""
        holdings, prefix = self.holdings, removal.prefix
        if not removal.digests:
            holdings.clear(prefix)
            return
        for digest in removal.digests:
            begins = f"{prefix}{digest.hex()}/"
            if holdings.far.most_blocks == 1:
                holdings.remove([f"{begins}1."])  # there is no other, whoever wrote it
            else:
                holdings.remove([one.name for one in holdings.far.listing(begins, LISTED)])
        with holdings.lock:
            mine = holdings.ledger.below(prefix)
        holdings.remove(holding(mine, prefix, removal.digests))
