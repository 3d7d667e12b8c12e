"""What the remote tier's threads know together, behind one lock: what lies over there, what this host has written, what
must not come back, and which objects are not what they should be. Any thread; who asks the far side holds no lock.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.tier.format import FormatError
from kvstore.tier.remote_format import HEADER_BYTES, ObjectHeader, Place, key_digest, parse_header, runs_prefix
from kvstore.tier.remote_index import AHEAD, Known, Stretch, follow
from kvstored.remote_calls import FarSide
from kvstored.remote_ledger import Ledger
from kvstored.remote_port import Bytes, RemoteError
from kvstored.remote_removals import Epochs

log = logging.getLogger(__name__)

LISTED: Final = 1000  # runs that begin with one block: of more, the rest is not looked at
HEADERS: Final = 512  # remembered


@dataclass(slots=True)
class Seen:
    """Totals."""

    damaged: int = 0  # objects that are not what they should be
    absent: int = 0  # objects that were gone when they were to be read
    skipped: int = 0  # blocks that somebody had written already
    removed: int = 0  # objects, for quota and deletes
    changed: int = 0  # blocks that were not what they should be in DRAM


class DamagedError(Exception):
    """An object is not what it should be."""


class Holdings:
    """One host's."""

    def __init__(self, far: FarSide, ledger: Ledger) -> None:
        self.far = far
        self.ledger = ledger
        self.seen = Seen()
        self.known = Known()
        self.epochs = Epochs()
        self.lock = threading.Lock()  # for all of these
        self.gone: Callable[[Sequence[str]], None] = lambda _names: None  # hears of objects that are there no more
        self._headers: OrderedDict[str, ObjectHeader] = OrderedDict()

    # -- what lies over there --------------------------------------------------------------------------------------

    def follow(self, place: Place, digests: Sequence[bytes], start: int) -> list[Stretch]:
        """The next stretches of a chain; none: it ends here. Raises RemoteError."""
        single = self.far.most_blocks == 1
        ahead = AHEAD if single else 1
        lookups = follow(self.known, place, digests, start, time.monotonic_ns(), most=ahead, ahead=ahead)
        while True:
            with self.lock:
                try:
                    prefixes = next(lookups)
                except StopIteration as stop:
                    found: list[Stretch] = stop.value
                    return found
            if single:
                names = [f"{prefix}1." for prefix in prefixes]
                there = self.far.exists_many(names)
                listings = [[(name, 0)] if is_there else [] for name, is_there in zip(names, there, strict=True)]
            else:
                listings = [
                    [(one.name, one.object_bytes) for one in self.far.listing(prefix, LISTED)] for prefix in prefixes
                ]
            with self.lock:
                for prefix, listed in zip(prefixes, listings, strict=True):
                    self.known.learn(prefix, listed, time.monotonic_ns())

    def doubt(self, place: Place, digests: Sequence[bytes]) -> None:
        """That some of these are not there is not believed any more."""
        with self.lock:
            self.known.doubt(runs_prefix(place, digest) for digest in digests)

    def allowed(self, place: Place, keys: Sequence[bytes]) -> list[bytes]:
        """Digests of keys up to the first that was deleted; none while the namespace is being cleared."""
        digests = [key_digest(place, key) for key in keys]
        prefix = place.prefix
        with self.lock:
            if self.ledger.is_clearing(prefix):
                return []
            if not self.ledger.deleted:
                return digests
            for number, digest in enumerate(digests):
                if self.ledger.is_deleted(prefix, digest):
                    return digests[:number]
        return digests

    # -- headers ---------------------------------------------------------------------------------------------------

    def remembered(self, name: str) -> ObjectHeader | None:
        """An object's header as it was read earlier: the object may have gone and come back since."""
        with self.lock:
            return self._headers.get(name)

    def read_header(self, name: str) -> ObjectHeader:
        """Ask for it. Raises RemoteError, DamagedError."""
        return self.parse(name, self.far.get_range(name, 0, HEADER_BYTES))

    def parse(self, name: str, page: Bytes) -> ObjectHeader:
        """From what was read, and remember it. Raises DamagedError."""
        try:
            header = parse_header(page.tobytes())
        except FormatError as error:
            raise DamagedError(str(error)) from error
        with self.lock:
            self._headers[name] = header
            if len(self._headers) > HEADERS:
                self._headers.popitem(last=False)
        return header

    def forget_header(self, name: str) -> None:
        """It may be another one by now; empty: all of them."""
        with self.lock:
            if name:
                self._headers.pop(name, None)
            else:
                self._headers.clear()

    # -- what is not there, or not as it should be -------------------------------------------------------------------

    def absent(self, name: str) -> None:
        """An object was gone when it was to be read."""
        with self.lock:
            self.seen.absent += 1
            self.known.forget(name)
        self.gone([name])

    def damaged(self, name: str, reason: str) -> None:
        """An object is not what it should be: nobody looks at it again."""
        with self.lock:
            self.seen.damaged += 1
            self._headers.pop(name, None)
            self.known.quarantine(name)
        self.gone([name])
        log.warning("remote: damaged object, never read again: name=%s reason=%s", name, reason)

    def remove(self, names: Sequence[str]) -> None:
        """Delete these. Raises RemoteError."""
        if not names:
            return
        self.far.delete(names)
        with self.lock:
            self.seen.removed += len(names)
            for name in names:
                self.ledger.removed(name)
                self.known.forget(name)
                self._headers.pop(name, None)
        self.gone(names)

    def clear(self, prefix: str) -> None:
        """Delete all of a namespace's objects. Raises RemoteError: it must be tried again."""
        before: list[str] = []
        while self.far.most_blocks > 1 and (names := [one.name for one in self.far.listing(prefix, LISTED)]):
            if names == before:
                raise RemoteError("what was deleted is still there")
            self.remove(names)
            before = names
        with self.lock:
            mine = self.ledger.below(prefix)
        self.remove(mine)
        with self.lock:
            self.ledger.end_clear(prefix)
