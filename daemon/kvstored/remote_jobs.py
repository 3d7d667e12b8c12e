"""What the remote tier's threads do: look for a chain and read it, write a run, remove what was dropped. No store here.

    Seek    names tell where the chain lies (remote_index.py) -> ranges, several at a time -> each compared with its
            object's header, whole keys and checksums -> Piece, in order
    Keep    copied out of DRAM and compared -> what is there already is left out -> one object -> ledger
    Forget  nothing of it is read from now on -> objects that hold some of it are deleted, until that has worked

Whatever is not what it should be is a miss: the object is never looked at again, and counted.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from typing import Final

import numpy as np
import xxhash

from kvkernels.copyhash import copy_and_hash
from kvstore.tier.format import FormatError
from kvstore.tier.remote_format import (
    HEADER_BYTES,
    ObjectHeader,
    Place,
    key_digest,
    marks_in,
    name_of,
    pack_header,
    parse_header,
)
from kvstore.tier.remote_index import AHEAD, Known, Run, Stretch, follow
from kvstore.tier.remote_orders import Bytes, Forget, Keep, Piece, Seek
from kvstored.remote_calls import FarSide
from kvstored.remote_ledger import Ledger
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_port import AbsentError, RemoteError, TooLargeError
from kvstored.remote_ranges import Ask, asks_of, bytes_of
from kvstored.remote_removals import Epochs, Removal, holding

log = logging.getLogger(__name__)

Read = tuple[Bytes, float, float]  # what was read, when that began and ended (s)
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


class Jobs:
    """What threads do. Any thread."""

    def __init__(
        self, far: FarSide, ledger: Ledger, view: Callable[[int], Bytes], readers: Pool, *,
        window: int, budget: Budget, quota_bytes: int,
    ) -> None:  # fmt: skip
        """`view`: an arena's bytes. `window`: requests of one seek at a time."""
        self.seen = Seen()
        self.known = Known()
        self.ledger = ledger
        self._far = far
        self.view = view
        self._readers = readers
        self._window = window
        self._budget = budget
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._headers: OrderedDict[str, ObjectHeader] = OrderedDict()
        self._epochs = Epochs()

    # -- looking -------------------------------------------------------------------------------------------------

    def _follow(self, place: Place, digests: Sequence[bytes], start: int) -> list[Stretch]:
        """The next stretches of a chain; none: it ends here. Raises RemoteError."""
        single = self._far.most_blocks == 1
        ahead = AHEAD if single else 1
        lookups = follow(self.known, place, digests, start, time.monotonic_ns(), most=ahead, ahead=ahead)
        while True:
            with self._lock:
                try:
                    prefixes = next(lookups)
                except StopIteration as stop:
                    found: list[Stretch] = stop.value
                    return found
            if single:
                names = [f"{prefix}1." for prefix in prefixes]
                there = self._far.exists_many(names)
                listings = [[(name, 0)] if is_there else [] for name, is_there in zip(names, there, strict=True)]
            else:
                listings = [
                    [(one.name, one.object_bytes) for one in self._far.listing(prefix, LISTED)] for prefix in prefixes
                ]
            with self._lock:
                for prefix, listed in zip(prefixes, listings, strict=True):
                    self.known.learn(prefix, listed, time.monotonic_ns())

    def _allowed(self, place: Place, keys: Sequence[bytes]) -> list[bytes]:
        """Digests of keys up to the first that was deleted; none while the namespace is being cleared."""
        digests = [key_digest(place, key) for key in keys]
        prefix = place.prefix
        with self._lock:
            if self.ledger.is_clearing(prefix):
                return []
            if not self.ledger.deleted:
                return digests
            for number, digest in enumerate(digests):
                if self.ledger.is_deleted(prefix, digest):
                    return digests[:number]
        return digests

    # -- reading -------------------------------------------------------------------------------------------------

    def seek(self, seek: Seek, deliver: Callable[[Piece], None]) -> None:
        """Bring what there is, piece by piece."""
        digests = self._allowed(seek.place, seek.keys)
        if len(digests) <= seek.start:
            return
        try:
            self._bring(seek, digests, deliver)
        except RemoteError as error:
            log.debug("remote: a chain was not read: %s", error)

    def _bring(self, seek: Seek, digests: Sequence[bytes], deliver: Callable[[Piece], None]) -> None:
        """Several ranges at a time, handed on in order; over at the first that did not come whole.

        Where the chain goes on is looked up meanwhile. Raises RemoteError.
        """
        looking: Future[list[Stretch]] | None = self._look(seek, digests, seek.start)
        asks: deque[Ask] = deque()
        running: deque[tuple[Ask, Future[Read]]] = deque()
        first_s = inf
        try:
            while (asks or running or looking) and not seek.over:
                if looking is not None and (looking.done() or not (asks or running)):
                    stretches, looking = looking.result(), None
                    if stretches:
                        seek.found += sum(stretch.count for stretch in stretches)
                        asks += asks_of(stretches, seek.block_bytes)
                        looking = self._look(seek, digests, stretches[-1].at + stretches[-1].count)
                while asks and len(running) < self._window:
                    if not self._budget.take(bytes_of(asks[0], seek.block_bytes), wait=not running):
                        if not running:
                            return
                        break
                    ask = asks.popleft()
                    running.append((ask, self._readers.submit(self._read, ask, seek.block_bytes)))
                if not running:
                    continue
                ask, future = running[0]
                content, began_s, ended_s = future.result()
                piece, whole = self._checked(seek, ask, content)
                first_s = min(first_s, began_s)
                seek.read_bytes += content.size
                seek.read_s = max(seek.read_s, ended_s - first_s)
                piece.taken_bytes = bytes_of(ask, seek.block_bytes)
                running.popleft()
                deliver(piece)
                if not whole:
                    return
        except AbsentError:
            with self._lock:
                self.seen.absent += 1
                self.known.forget(ask.stretch.name)
        except DamagedError as error:
            self._damaged(ask.stretch.name, str(error))
        finally:
            for ask, future in running:
                future.cancel()
                size = bytes_of(ask, seek.block_bytes)
                future.add_done_callback(lambda _done, size=size: self._budget.give(size))  # type: ignore[misc]

    def _look(self, seek: Seek, digests: Sequence[bytes], at: int) -> "Future[list[Stretch]] | None":
        if at >= len(digests):
            return None
        return self._readers.submit(self._follow, seek.place, digests, at)

    def _read(self, ask: Ask, block_bytes: int) -> Read:
        began_s = time.monotonic()
        start = 0 if ask.whole else HEADER_BYTES + ask.first * block_bytes
        content = self._far.get_range(ask.stretch.name, start, HEADER_BYTES + ask.stop * block_bytes)
        return content, began_s, time.monotonic()

    def _checked(self, seek: Seek, ask: Ask, content: Bytes) -> tuple[Piece, bool]:
        """A piece whose every byte is what was written, and whether it is all that was asked for.

        Raises DamagedError, and RemoteError where the header must be read first.
        """
        name, block_bytes = ask.stretch.name, seek.block_bytes
        if content.size != bytes_of(ask, block_bytes):
            raise DamagedError(f"{content.size} bytes of {bytes_of(ask, block_bytes)}")
        header, remembered = self._header(name, content if ask.whole else None)
        try:
            return self._compared(seek, ask, content, header)
        except DamagedError:
            if not remembered:
                raise
        # The object may have gone and come back since, with bytes that another host has computed.
        with self._lock:
            self._headers.pop(name, None)
        return self._compared(seek, ask, content, self._header(name, None)[0])

    def _compared(self, seek: Seek, ask: Ask, content: Bytes, header: ObjectHeader) -> tuple[Piece, bool]:
        """Raises DamagedError."""
        block_bytes = seek.block_bytes
        if header.place != seek.place or header.block_bytes != block_bytes or len(header.keys) != ask.stretch.blocks:
            raise DamagedError("another object lies there")
        at = ask.stretch.at + ask.first - ask.stretch.skip
        body = content[HEADER_BYTES:] if ask.whole else content
        contents: list[Bytes] = []
        for number in range(ask.first, ask.stop):
            if header.keys[number] != seek.keys[at + len(contents)]:  # letters in the name are alike, keys are not
                if not number:
                    raise DamagedError("another object lies there")
                break
            begin = len(contents) * block_bytes
            block = body[begin : begin + block_bytes]
            if xxhash.xxh3_64_intdigest(block) != header.checksums[number]:  # type: ignore[arg-type]
                raise DamagedError(f"block {number} is not what was written")
            contents.append(block)
        piece = Piece(seek, at, header.parent, contents)
        return piece, len(contents) == ask.stop - ask.first

    def _header(self, name: str, content: Bytes | None) -> tuple[ObjectHeader, bool]:
        """An object's header, and whether it was read earlier. Raises RemoteError, DamagedError."""
        with self._lock:
            header = self._headers.get(name)
        if header is not None and content is None:
            return header, True
        page = self._far.get_range(name, 0, HEADER_BYTES) if content is None else content[:HEADER_BYTES]
        try:
            header = parse_header(page.tobytes())
        except FormatError as error:
            raise DamagedError(str(error)) from error
        with self._lock:
            self._headers[name] = header
            if len(self._headers) > HEADERS:
                self._headers.popitem(last=False)
        return header, False

    def _damaged(self, name: str, reason: str) -> None:
        with self._lock:
            self.seen.damaged += 1
            self._headers.pop(name, None)
            self.known.quarantine(name)
        log.warning("remote: damaged object, never read again: name=%s reason=%s", name, reason)

    # -- writing -------------------------------------------------------------------------------------------------

    def keep(self, keep: Keep, copied: Callable[[Keep], None]) -> None:
        """Write a run; `copied` is called as soon as DRAM is needed no more."""
        count, block_bytes = len(keep.keys), keep.block_bytes
        place = keep.place
        if len(self._allowed(place, keep.keys)) < count:  # stored again under a key that was deleted
            copied(keep)
            keep.failed = "deleted"
            return
        content = np.empty(HEADER_BYTES + count * block_bytes, dtype=np.uint8)
        good = self._copy(keep, content)
        copied(keep)
        digests = self._allowed(place, keep.keys) if good else []
        if len(digests) < count:
            keep.failed = "deleted meanwhile" if good else "changed in memory"
            return
        try:
            while stretches := self._follow(place, digests, keep.stored) if keep.stored < count else []:
                keep.stored += sum(stretch.count for stretch in stretches)
            with self._lock:
                self.seen.skipped += keep.stored
            while keep.stored < count:
                self._put(keep, content, min(count, keep.stored + self._far.most_blocks))
        except RemoteError as error:
            keep.failed = str(error)

    def _copy(self, keep: Keep, content: Bytes) -> bool:
        block_bytes = keep.block_bytes
        for number, (arena, offset) in enumerate(keep.sources):
            begin = HEADER_BYTES + number * block_bytes
            source = self.view(arena)[offset : offset + block_bytes]
            if copy_and_hash(source, content[begin : begin + block_bytes]) != keep.checksums[number]:
                with self._lock:
                    self.seen.changed += 1
                return False
        return True

    def _put(self, keep: Keep, content: Bytes, stop: int) -> None:
        """Blocks from `keep.stored` to `stop` as one object. Raises RemoteError."""
        start, block_bytes = keep.stored, keep.block_bytes
        keys = keep.keys[start:stop]
        parent = keep.keys[start - 1] if start else keep.parent
        header = ObjectHeader(keep.place, parent, keys, tuple(keep.checksums[start:stop]), block_bytes)
        # What lies before it in memory is over there by now: its place is the header's.
        begin, end = start * block_bytes, HEADER_BYTES + stop * block_bytes
        content[begin : begin + HEADER_BYTES] = np.frombuffer(pack_header(header), dtype=np.uint8)
        name, prefix = name_of(keep.place, keys), keep.place.prefix
        with self._lock:
            bad = self.known.is_bad(name)
        if bad:
            raise RemoteError("what lies there is damaged, and is not written over")
        self._make_room(end - begin)
        new = self._far.put(name, [content[begin:end]])
        with self._lock:
            dropped = self._epochs.of(prefix) != keep.epoch
            if new:
                self.ledger.wrote(name, end - begin)
            if not dropped:
                marks = marks_in(name, name[: name.rfind("/") + 1])
                assert marks is not None, "a name of our own"
                self.known.add(name[: name.rfind("/") + 1], Run(name, marks, end - begin), time.monotonic_ns())
        if dropped:  # something of this namespace was deleted while it was written: it may be this
            self._remove([name])
            raise RemoteError("deleted meanwhile")
        keep.stored = stop
        self._make_room(0)  # others write at the same time

    def _make_room(self, wanted_bytes: int) -> None:
        """Delete what was written first while there is more than the quota allows.

        Raises RemoteError: who cannot delete does not write either.
        """
        if wanted_bytes > self._quota_bytes:
            raise TooLargeError(f"{wanted_bytes} bytes are more than all that this host may keep there")
        while True:
            with self._lock:
                oldest = self.ledger.oldest()
                if oldest is None or self.ledger.total_bytes + wanted_bytes <= self._quota_bytes:
                    return
            self._remove([oldest])

    def _remove(self, names: Sequence[str]) -> None:
        """Raises RemoteError."""
        if not names:
            return
        self._far.delete(names)
        with self._lock:
            self.seen.removed += len(names)
            for name in names:
                self.ledger.removed(name)
                self.known.forget(name)
                self._headers.pop(name, None)

    # -- dropping ------------------------------------------------------------------------------------------------

    def begin_keep(self, keep: Keep) -> None:
        """What is dropped from now on may be some of it. Owner thread."""
        keep.epoch = self._epochs.of(keep.place.prefix)

    def announce(self, forget: Forget) -> None:
        """What is being written of this namespace may have been dropped. Owner thread; waits for nobody."""
        self._epochs.dropped(forget.place.prefix)

    def begin_forget(self, forget: Forget) -> Removal:
        """From now on nothing of it is read or written. Returns what is to be removed."""
        prefix = forget.place.prefix
        digests = [key_digest(forget.place, key) for key in forget.keys]
        with self._lock:
            self.ledger.delete_keys(prefix, digests)
            if not forget.keys:
                self.ledger.begin_clear(prefix)
                self.known.forget_all(prefix)
        return Removal(prefix, tuple(digests))

    def forget(self, forget: Forget) -> None:
        """Delete what holds some of it. Raises RemoteError: it must be tried again."""
        place = forget.place
        self.remove(Removal(place.prefix, tuple(key_digest(place, key) for key in forget.keys)))

    def remove(self, removal: Removal) -> None:
        """Delete what holds some of it. Raises RemoteError: it must be tried again."""
        prefix = removal.prefix
        if not removal.digests:
            self.clear(prefix)
            return
        for digest in removal.digests:
            begins = f"{prefix}{digest.hex()}/"
            if self._far.most_blocks == 1:
                self._remove([f"{begins}1."])  # there is no other, whoever wrote it
            else:
                self._remove([one.name for one in self._far.listing(begins, LISTED)])
        with self._lock:
            mine = self.ledger.below(prefix)
        self._remove(holding(mine, prefix, removal.digests))

    def clear(self, prefix: str) -> None:
        """Delete all of a namespace's objects. Raises RemoteError: it must be tried again."""
        before: list[str] = []
        while self._far.most_blocks > 1 and (names := [one.name for one in self._far.listing(prefix, LISTED)]):
            if names == before:
                raise RemoteError("what was deleted is still there")
            self._remove(names)
            before = names
        with self._lock:
            mine = self.ledger.below(prefix)
        self._remove(mine)
        with self._lock:
            self.ledger.end_clear(prefix)
