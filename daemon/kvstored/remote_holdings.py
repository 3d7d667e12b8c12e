"""What the remote tier's threads know together, behind one lock: what lies over there, what this host has written, what
must not come back, and which objects are not what they should be. Any thread; who asks the far side holds no lock.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from kvstore.tier.format import FormatError
from kvstore.tier.remote_format import HEADER_BYTES, ObjectHeader, Place, key_digest, parse_header, runs_prefix
from kvstore.tier.remote_index import AHEAD, STRANGE_NS, Known, Stretch, follow
from kvstore.tier.remote_uses import Uses
from kvstored.remote_calls import FarSide, NotAskedError
from kvstored.remote_ledger import Ledger
from kvstored.remote_port import Bytes, RemoteError
from kvstored.remote_removals import Doubt, Epochs, Removal, Removals

log = logging.getLogger(__name__)

LISTED: Final = 1000  # runs that begin with one block: of more, the rest is not looked at
HEADERS: Final = 512  # remembered
NAMES: Final = 64  # deleted in one call, where an engine has that
UNSETTLED: Final = 4096  # writes; of more, what they may have left is for the quota, or for the bucket's own rule


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
        self.uses = Uses()
        self.epochs = Epochs()
        self.removals = Removals()
        self.writing: set[str] = set()  # names
        self.unsettled: Counter[str] = Counter()  # writes by prefix: under way, or left in doubt
        self.lock = threading.Lock()  # for all of these
        self.gone: Callable[[Sequence[str]], None] = lambda _names: None  # hears of objects that are there no more
        self._headers: OrderedDict[str, ObjectHeader] = OrderedDict()

    # -- what lies over there --------------------------------------------------------------------------------------

    def follow(self, place: Place, digests: Sequence[bytes], start: int, block_bytes: int) -> list[Stretch]:
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
            cut: list[str] = []
            with self.lock:
                for prefix, listed in zip(prefixes, listings, strict=True):
                    cut += self.known.learn(prefix, listed, time.monotonic_ns(), None if single else block_bytes)
            for name in cut:
                self.damaged(name, "its length is not what its name says")

    def sound_lead(self, stretches: Sequence[Stretch]) -> int:
        """Blocks of these up to the first whose object was found damaged when it was read last."""
        with self.lock:
            return sum(one.count for one in takewhile(lambda one: not self.known.was_bad(one.name), stretches))

    def used(self, names: Sequence[str]) -> None:
        """These were read, or found where they were to be written."""
        for name in names:
            self.uses.used(name)
        with self.lock:
            self.ledger.used(names)

    def doubt(self, place: Place, digests: Sequence[bytes]) -> None:
        """That some of these are not there is not believed any more."""
        with self.lock:
            self.known.doubt(runs_prefix(place, digest) for digest in digests)

    def ask_anew(self, place: Place, digests: Sequence[bytes]) -> None:
        """Nothing that is known of these is believed any more, nor any header."""
        with self.lock:
            self.known.ask_anew(runs_prefix(place, digest) for digest in digests)
            self._headers.clear()

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

    def is_deleted(self, place: Place, key: bytes) -> bool:
        """Is it remembered as deleted?"""
        with self.lock:
            return self.ledger.is_deleted(place.prefix, key_digest(place, key))

    def has_deleted(self, place: Place) -> bool:
        """Is any key of its tenant remembered as deleted?"""
        with self.lock:
            return self.ledger.has_deleted(place.prefix)

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
            self.known.sound(name)
        self.gone([name])

    def damaged(self, name: str, reason: str) -> None:
        """An object is not what it should be: it is left alone for a while."""
        with self.lock:
            self.seen.damaged += 1
            self._headers.pop(name, None)
            self.known.quarantine(name, time.monotonic_ns())
        self.gone([name])
        log.warning("remote: damaged object, left alone for a while: name=%s reason=%s", name, reason)

    def strange(self, name: str) -> None:
        """What came in place of an object is none at all, by the far side's fault or its own: for a moment not read."""
        with self.lock:
            self.known.quarantine(name, time.monotonic_ns(), STRANGE_NS)

    def sound(self, name: str) -> None:
        """An object is what it should be."""
        if self.known.bad:
            with self.lock:
                self.known.sound(name)

    def remove(self, names: Sequence[str]) -> None:
        """Delete these, as many as can be. Raises RemoteError: some are still there."""
        at_a_time = NAMES if self.far.most_blocks == 1 else 1
        failed: RemoteError | None = None
        for at in range(0, len(names), at_a_time):
            some = names[at : at + at_a_time]
            try:
                self.far.delete(some)
            except NotAskedError as error:
                failed = failed or error
                break
            except RemoteError as error:
                failed = error
            else:
                self._removed(some)
        if failed is not None:
            raise failed

    def _removed(self, names: Sequence[str]) -> None:
        with self.lock:
            self.seen.removed += len(names)
            for name in names:
                self.ledger.removed(name)
                self.known.forget(name)
                self.known.sound(name)
                self._headers.pop(name, None)
        self.gone(names)

    def remove_below(self, prefix: str, *, twice: bool, most: int | None = None) -> bool:
        """Delete all that a listing has; False: that was `most`, and there may be more.

        `twice`: and see that it is gone. Raises RemoteError.
        """
        before: list[str] = []
        removed = 0
        while names := [one.name for one in self.far.listing(prefix, LISTED)]:
            if names == before:
                raise RemoteError("what was deleted is still there")
            if most is not None and removed >= most:
                return False
            self.remove(names)
            if len(names) < LISTED and not twice:
                break
            before, removed = names, removed + len(names)
        return True

    def clear(self, prefix: str, most: int | None = None) -> bool:
        """Delete all objects of a namespace, a tenant, or all; False: that was `most`, and there may be more.

        What the ledger knows goes first, without a listing. Raises RemoteError: it must be tried again.
        """
        with self.lock:
            clear, mine = self.ledger.last_clear(prefix), self.ledger.below(prefix)
            unsettled = any(one.startswith(prefix) for one in self.unsettled)
        self.remove(mine[:most])
        if most is not None and len(mine) > most:
            return False
        lists = self.far.most_blocks > 1
        if lists and not self.remove_below(prefix, twice=True, most=most):
            return False
        if unsettled:
            raise RemoteError("what was being written of it may still appear")
        with self.lock:
            if self.ledger.end_clear(prefix, clear, all_gone=lists) and lists:
                self.removals.forget(prefix, clear)
        return True

    def close(self, prefix: str) -> None:
        """More of it was deleted than can be noted: it is cleared, where all of it can be found. Its user locks.

        Nothing of it is read or written before that is done; where nothing is listed, before somebody clears it.
        """
        if self.ledger.close(prefix):
            self.known.forget_all(prefix)
            log.warning(
                "remote: more was deleted of namespace=%s than can be noted: it is closed until %s", prefix,
                "all of it is removed" if self.far.most_blocks > 1 else "it is cleared",
            )  # fmt: skip
        if self.far.most_blocks > 1:
            self.ledger.begin_clear(prefix)
            self.removals.forget(prefix, self.ledger.last_clear(prefix))
            self.removals.add(Removal(prefix))

    # -- writes that nobody knows the end of -------------------------------------------------------------------------

    def settle(self, doubt: Doubt) -> None:
        """What was dropped meanwhile is deleted; what did not get there is not ours. Raises RemoteError."""
        with self.lock:
            dropped = self.epochs.meet(doubt.prefix, doubt.epoch, doubt.keys)
        there = not dropped and self.far.exists_many([doubt.name])[0]
        if dropped:
            self.remove([doubt.name])
        with self.lock:
            if there and doubt.name not in self.ledger:
                self.ledger.wrote(doubt.name, doubt.object_bytes)
            elif not there:
                self.ledger.removed(doubt.name)
                self.known.forget(doubt.name)
            self.settled(doubt.prefix)

    def settled(self, prefix: str) -> None:
        """A write has ended, and everybody knows how. Its user locks."""
        self.unsettled[prefix] -= 1
        if not self.unsettled[prefix]:
            del self.unsettled[prefix]
