"""Following a chain that somebody else is storing: a prefill goes on in one engine while another one takes its blocks.

    follow -> Following      `blocks`: how many are there; `chunks`: them as they come; `wait`
              Follower       one thread a namespace looks for all of them, so that no engine step waits

A look is a MATCH of the one block that is next, and of what follows once that is there. It is made every half a
millisecond while blocks come, and ever more seldom, down to every 5 ms, while none do. Where none comes for a while the
daemon is asked to fetch what is next: from its disk, or from beyond this host, where another one may be writing it.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from kvclient import flows
from kvproto.errors import KvError
from kvproto.limits import KEYS_PER_FRAME

if TYPE_CHECKING:
    from kvclient.namespace import Namespace

LOOK_S: Final = 0.0005
LOOK_S_MAX: Final = 0.005
FETCH_EACH_S: Final = 0.05  # where nothing comes
FETCH_WITHIN_S: Final = 5.0
LATE_S: Final = 1.0  # so long after its time a last look is waited for
CHAINS: Final = 64  # of one namespace: a look takes some 50 us

_log = logging.getLogger(__name__)
_clock = time.monotonic


def follow(namespace: "Namespace", keys: Sequence[bytes], deadline_s: float = 5.0) -> "Following":
    """Look for the blocks of a chain as somebody else stores them, for `deadline_s` seconds; returns at once.

    For an engine that decodes what another one is prefilling, on this host or on one with the same remote tier. Of a
    namespace 64 chains at a time; one more is over at once. Any thread. Raises UsageError.
    """
    flows.join_keys(keys)
    following = Following(namespace, keys, flows.nanoseconds("deadline_s", deadline_s, least_ns=1) / 1e9)
    with _making:
        follower = _followers.setdefault(namespace, Follower())
    follower.follow(following)
    return following


class Following:
    """One chain, until all of it is there or its time is over. Any thread; only `wait` and `chunks` wait."""

    def __init__(self, namespace: "Namespace", keys: Sequence[bytes], deadline_s: float) -> None:
        """`deadline_s`: from now on. Made by `follow`."""
        self._namespace = namespace
        self._keys = list(keys)
        self._until = _clock() + deadline_s
        self._news = threading.Condition()
        self._blocks = 0
        self._over = not self._keys
        self._nap_s = LOOK_S
        self._look_at = 0.0
        self._fetch_at = _clock() + FETCH_EACH_S

    @property
    def blocks(self) -> int:
        """How many of the first blocks have come. Some may be gone again: the lease says it."""
        return self._blocks

    @property
    def over(self) -> bool:
        """Whether no more will be looked for: all is there, time is over, it was cancelled, or the client is closed."""
        return self._over

    def wait(self, blocks: int | None = None, timeout_s: float | None = None) -> int:
        """Until so many of the first blocks are there (None: all), or no more will come; how many are there."""
        wanted = len(self._keys) if blocks is None else blocks
        left_s = max(0.0, self._until + LATE_S - _clock())
        with self._news:
            if not self._news.wait_for(
                lambda: self._over or self._blocks >= wanted, left_s if timeout_s is None else min(timeout_s, left_s)
            ):
                self._over |= _clock() >= self._until + LATE_S  # nobody looks any more
        return self._blocks

    def chunks(self) -> Iterator[range]:
        """The blocks as they come, in order: ranges of indices. Waits for the next one; ends when no more will come."""
        first = 0
        while (stop := self.wait(first + 1)) > first:
            yield range(first, stop)
            first = stop

    def cancel(self) -> None:
        """Nobody wants them any more."""
        self._end()

    def look(self, now: float) -> float:
        """Look, if it is time; when to look again. On the follower's thread."""
        late = now >= self._until
        if self._over or not (late or now >= self._look_at):
            return self._look_at
        try:
            grown = self._grown()
            if late:  # that was the last look
                self._end()
            elif not grown and now >= self._fetch_at:
                self._fetch_at = now + FETCH_EACH_S
                self._namespace.prefetch(self._next(), deadline_s=FETCH_WITHIN_S)
        except KvError as error:  # closed, or in a forked child
            _log.debug("a chain is followed no more: %s", error)
            self._end()
        else:
            self._nap_s = LOOK_S if grown else min(2 * self._nap_s, LOOK_S_MAX)
            self._look_at = _clock() + self._nap_s
        return self._look_at

    def _grown(self) -> bool:
        """Whether more has come."""
        before = self._blocks
        if self._namespace.match(self._next()[:1]).blocks:  # the next one alone: what is not there counts as missed
            found = self._namespace.match(self._next()).blocks
            with self._news:
                self._blocks += max(1, found)
                self._over |= self._blocks >= len(self._keys)
                self._news.notify_all()
        return self._blocks > before

    def _next(self) -> list[bytes]:
        return self._keys[self._blocks : self._blocks + KEYS_PER_FRAME]

    def _end(self) -> None:
        with self._news:
            self._over = True
            self._news.notify_all()


class Follower:
    """Looks for all chains that are followed in a namespace. Its thread lives as long as there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chains: list[Following] = []
        self._thread: threading.Thread | None = None
        self._stir = threading.Event()

    def follow(self, one: Following) -> None:
        """Any thread. Beyond the limit it is over at once."""
        with self._lock:
            self._chains = [chain for chain in self._chains if not chain.over]
            if len(self._chains) >= CHAINS:
                _log.warning("more than %d chains are followed; this one is not", CHAINS)
                one.cancel()
                return
            self._chains.append(one)
            if self._thread is None or not self._thread.is_alive():  # it could not be started
                self._thread = threading.Thread(target=self._run, name="kvclient-follow", daemon=True)
                self._thread.start()
        self._stir.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._chains = chains = [chain for chain in self._chains if not chain.over]
                if not chains:
                    self._thread = None
                    return
            self._stir.clear()
            again = min(chain.look(_clock()) for chain in chains)
            self._stir.wait(max(0.0, again - _clock()))


_followers: "WeakKeyDictionary[Namespace, Follower]" = WeakKeyDictionary()
_making = threading.Lock()
os.register_at_fork(after_in_child=_followers.clear)  # a child has none of their threads
