"""What the remote tier's threads do, put together: read (`remote_reading.py`), write (`remote_keeping.py`), and forget.

Forget  nothing of it is read from now on -> objects that hold some of it are deleted, until that has worked
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from kvstore.tier.remote_format import key_digest
from kvstore.tier.remote_orders import Bytes, Forget, ForgetAll
from kvstored.remote_calls import FarSide, StrangeError
from kvstored.remote_holdings import NAMES, DamagedError, Holdings
from kvstored.remote_keeping import Keeping
from kvstored.remote_ledger import Ledger
from kvstored.remote_looking import look
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_port import AbsentError
from kvstored.remote_reading import Reading
from kvstored.remote_removals import Doubt, Removal, holding

LISTS: Final = 16  # of what may be deleted in a turn, one key: it costs a listing


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
        self.look = partial(look, self.holdings, self.reading, budget)
        self.keep = self.keeping.keep
        self.begin_keep = self.keeping.begin

    # -- what was dropped ------------------------------------------------------------------------------------------

    def announce(self, forget: Forget | ForgetAll) -> None:
        """What is being written of this namespace may have been dropped. Owner thread; waits for nobody."""
        epochs = self.holdings.epochs
        if isinstance(forget, Forget):
            epochs.dropped(forget.place.prefix, forget.keys)
        else:
            epochs.all_dropped()

    def note_ahead(self, forget: Forget | ForgetAll) -> None:
        """While the ledger is read, as `meanwhile` of that."""
        if isinstance(forget, Forget):
            digests = [key_digest(forget.place, key) for key in forget.keys]
            self.holdings.ledger.note_ahead(forget.place.prefix, digests)
        elif forget.prefix:
            self.holdings.ledger.note_ahead(forget.prefix, [])

    def resume(self) -> None:
        """Go on removing what former lives have not finished."""
        holdings = self.holdings
        with holdings.lock:
            for prefix in holdings.ledger.clearing():
                holdings.removals.add(Removal(prefix))
            for prefix in holdings.ledger.closed_namespaces():  # a kill may have come before that was to be cleared
                holdings.close(prefix)
            for prefix, digests in holdings.ledger.debts().items():
                holdings.removals.add(Removal(prefix, tuple(digests), holdings.ledger.when))
            self._close_overflowed()

    def begin_forget(self, forget: Forget) -> Removal:
        """From now on nothing of it is read or written. Returns what is to be removed, and waits in turn."""
        holdings, prefix = self.holdings, forget.place.prefix
        digests = tuple(key_digest(forget.place, key) for key in forget.keys)
        with holdings.lock:
            if not digests:
                return self._begin_clear(prefix, closing=forget.too_many)
            removal = Removal(prefix, digests, holdings.ledger.delete_keys(prefix, digests))
            if not holdings.removals.add(removal):
                holdings.ledger.overflowed.add(prefix)
            self._close_overflowed()
        return removal

    def begin_forget_all(self, forget: ForgetAll) -> None:
        """From now on nothing below it is read or written."""
        holdings = self.holdings
        with holdings.lock:
            prefixes = [one for one in holdings.ledger.namespaces() if forget.covers(one)]
            for prefix in [forget.prefix] if forget.prefix else prefixes:
                self._begin_clear(prefix)

    def _begin_clear(self, prefix: str, *, closing: bool = False) -> Removal:
        holdings = self.holdings
        removal = Removal(prefix)
        if closing:
            holdings.close(prefix)
        else:
            holdings.ledger.begin_clear(prefix)
            holdings.known.forget_all(prefix)
            holdings.removals.add(removal)
        return removal

    def _close_overflowed(self) -> None:
        ledger = self.holdings.ledger
        while ledger.overflowed:
            self.holdings.close(ledger.overflowed.pop())

    # -- and what of it lies over there ------------------------------------------------------------------------------

    def forget(self, forget: Forget) -> None:
        """Delete what holds some of it. Raises RemoteError: it must be tried again."""
        place = forget.place
        self.remove(Removal(place.prefix, tuple(key_digest(place, key) for key in forget.keys)))

    def remove(self, order: Removal | Doubt, most: int | None = None) -> bool:
        """Delete what holds some of it; False: so much that it is others' turn.

        Raises RemoteError: it must be tried again, and goes on where it was.
        """
        holdings = self.holdings
        if isinstance(order, Doubt):
            holdings.settle(order)
            return True
        if not order.digests:
            return holdings.clear(order.prefix, most)
        begin = order.done
        stop = len(order.digests) if most is None else min(len(order.digests), begin + max(1, most // LISTS))
        try:
            self._remove_keys(order, stop)
        finally:
            if order.when and order.done > begin:
                with holdings.lock:
                    holdings.ledger.settle(order.prefix, order.digests[begin : order.done], order.when)
        return order.done == len(order.digests)

    def _remove_keys(self, order: Removal, stop: int) -> None:
        """Of its keys up to `stop`. Raises RemoteError."""
        holdings, prefix = self.holdings, order.prefix
        if holdings.far.most_blocks == 1:  # names follow from keys, whoever wrote it
            while some := order.digests[order.done : min(stop, order.done + NAMES)]:
                holdings.remove([f"{prefix}{digest.hex()}/1." for digest in some])
                order.done += len(some)
            return
        self._remove_own(order)
        for digest in order.digests[order.done : stop]:
            holdings.remove_below(f"{prefix}{digest.hex()}/", twice=False)
            order.done += 1

    def _remove_own(self, order: Removal) -> None:
        """Of what this host has written, also what has some of it further inside. Raises RemoteError."""
        holdings = self.holdings
        if order.mine is None:
            with holdings.lock:
                mine = holdings.ledger.below(order.prefix)
            order.mine = deque(holding(mine, order.prefix, order.digests))
        digests = frozenset(order.digests) if order.mine else frozenset()
        while order.mine:
            name, sure = order.mine[0]
            if sure or self._holds(name, digests):
                holdings.remove([name])
            order.mine.popleft()

    def _holds(self, name: str, digests: frozenset[bytes]) -> bool:
        """Does it? Of 262,144 keys two have the same letters in names. Raises RemoteError."""
        holdings = self.holdings
        try:
            header = holdings.remembered(name) or holdings.read_header(name)
        except (AbsentError, DamagedError, StrangeError):  # then there is nothing to keep
            return True
        return not digests.isdisjoint(key_digest(header.place, key) for key in header.keys)
