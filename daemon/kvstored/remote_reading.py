"""Reading a chain from the far side. Threads of the remote tier; no store here.

    a seeker   Seek -> names tell where the chain lies (remote_holdings.py) -> Asks, some at a time -> Pieces, in turn
    readers    Ask -> its bytes -> decoded -> compared with its object's header, whole keys and checksums

Whatever is not what it should be is a miss: the object is never looked at again, and counted.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from math import inf
from typing import Any, Final, TypeAlias

import numpy as np
import xxhash

from kvkernels.planes import PlanesError, unpack
from kvstore.tier.format import Codec
from kvstore.tier.remote_format import HEADER_BYTES, NO_PARENT, ObjectHeader, is_encoded
from kvstore.tier.remote_index import Stretch
from kvstore.tier.remote_orders import Bytes, Piece, Seek
from kvstored.remote_calls import StrangeError
from kvstored.remote_holdings import DamagedError, Holdings
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_port import AbsentError, RemoteError
from kvstored.remote_ranges import Ask, asks_of, batches_of

log = logging.getLogger(__name__)

BATCHES: Final = 3  # of objects of one block: one is read, one waits, one is compared


@dataclass(frozen=True, slots=True)
class Got:
    """What came of an ask: verified blocks, fewer than were asked for if the chain ends here."""

    piece: Piece
    whole: bool
    read_bytes: int
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """Where a chain goes on: what to ask for, and the block behind that."""

    asks: list[Ask]
    blocks: int
    stop: int


Block: TypeAlias = tuple[Bytes, int]  # as it is when nothing encodes it, and its checksum
Running: TypeAlias = "deque[tuple[Ask, Future[Got]]]"


class Reading:
    """One host's reads. Any thread."""

    def __init__(self, holdings: Holdings, readers: Pool, window: int, budget: Budget) -> None:
        """`window`: requests of one seek at a time."""
        self._holdings = holdings
        self._readers = readers
        self._window = max(1, window - 1)  # one looks where the chain goes on
        self._budget = budget

    # -- a seeker ------------------------------------------------------------------------------------------------

    def seek(self, seek: Seek, deliver: Callable[[Piece], None]) -> None:
        """Bring what there is, piece by piece."""
        digests = self._holdings.allowed(seek.place, seek.keys)
        if len(digests) <= seek.start or not self._is_allowed_behind(seek):
            return
        if seek.wished:
            self._holdings.doubt(seek.place, digests[seek.start :])
        try:
            self._bring(seek, digests, deliver)
        except RemoteError as error:
            log.debug("remote: a chain was not read: %s", error)

    def _is_allowed_behind(self, seek: Seek) -> bool:
        """Was nothing deleted of what comes before it? What continued that is still over there, as it was then."""
        if not self._holdings.has_deleted(seek.place):
            return True
        if seek.before is None and seek.start:
            seek.continues = seek.keys[0]
            return False
        seek.before = seek.before or ()  # only a root, unless the owner has looked up more
        return len(self._holdings.allowed(seek.place, seek.before)) == len(seek.before)

    def _bring(self, seek: Seek, digests: Sequence[bytes], deliver: Callable[[Piece], None]) -> None:
        """Several asks at a time, handed on in order; over at the first that did not come whole.

        Where the chain goes on is looked up meanwhile. Raises RemoteError.
        """
        looking: Future[Found] | None = self._look(seek, digests, seek.start)
        asks: deque[Ask] = deque()
        running: Running = deque()
        first_s = inf
        try:
            while (asks or running or looking) and not seek.over:
                if looking is not None and (looking.done() or not (asks or running)):
                    found = looking.result()
                    seek.found += found.blocks
                    asks += found.asks
                    looking = self._look(seek, digests, found.stop) if found.blocks else None
                if not self._begin(seek, asks, running):
                    return
                if not running or not _came(running[0][1], looking):
                    continue
                got = running[0][1].result()
                first_s = min(first_s, got.began_s)
                seek.read_bytes += got.read_bytes
                seek.read_s = max(seek.read_s, got.ended_s - first_s)
                if got.piece.contents:
                    got.piece.taken_bytes = running.popleft()[0].taken_bytes
                    deliver(got.piece)
                if not got.whole:
                    return
        finally:
            for ask, future in running:
                if future.cancel():
                    ask.opening.fail(CancelledError())
                future.add_done_callback(lambda _, size=ask.taken_bytes: self._budget.give(size))  # type: ignore[misc]

    def _begin(self, seek: Seek, asks: deque[Ask], running: Running) -> bool:
        """As many as there is room for; False: there will be none."""
        window = BATCHES if self._holdings.far.most_blocks == 1 else self._window
        while asks and len(running) < window:
            if not self._budget.take(asks[0].taken_bytes, wait=not running):
                return bool(running)
            ask = asks.popleft()
            running.append((ask, self._readers.submit(self._read, seek, ask)))
        return True

    def _look(self, seek: Seek, digests: Sequence[bytes], at: int) -> "Future[Found] | None":
        return self._readers.submit(self._find, seek, digests, at) if at < len(digests) else None

    # -- readers -------------------------------------------------------------------------------------------------

    def _find(self, seek: Seek, digests: Sequence[bytes], at: int) -> Found:
        """Where the chain goes on from block `at`; if that cannot be found out, it ends there."""
        holdings = self._holdings
        try:
            stretches = holdings.follow(seek.place, digests, at, seek.block_bytes)
        except RemoteError as error:
            log.debug("remote: a chain was not looked up: %s", error)
            stretches = []
        if not stretches:
            return Found([], 0, at)
        stop = stretches[-1].at + stretches[-1].count
        if holdings.far.most_blocks == 1:
            return Found(batches_of(stretches, seek.block_bytes), stop - at, stop)
        asks: list[Ask] = []
        for stretch in stretches:
            header = None
            if is_encoded(stretch.name):
                header = self._header_of(seek, stretch)
                if header is None:
                    return Found(asks, stretch.at - at, stretch.at)
            asks += asks_of(stretch, seek.block_bytes, header)
        return Found(asks, stop - at, stop)

    def _header_of(self, seek: Seek, stretch: Stretch) -> ObjectHeader | None:
        """Of an object whose header must be known before its blocks are read; None: it is not to be had.

        It says how much is read, so it is looked at before.
        """
        holdings, name = self._holdings, stretch.name
        try:
            header = holdings.remembered(name) or holdings.read_header(name)
            _check_header(seek, stretch, header)
        except AbsentError:
            holdings.absent(name)
        except DamagedError as error:
            holdings.damaged(name, str(error))
        except StrangeError:
            holdings.strange(name)
        except RemoteError as error:
            log.debug("remote: a header was not read: %s", error)
        else:
            return header
        return None

    def _read(self, seek: Seek, ask: Ask) -> Got:
        """Raises RemoteError."""
        try:
            got = self._read_many(seek, ask) if self._holdings.far.most_blocks == 1 else self._read_one(seek, ask)
        except BaseException as error:
            ask.opening.fail(error)
            raise
        self._holdings.used([stretch.name for stretch in ask.stretches[: len(got.piece.contents)]])
        return got

    def _read_one(self, seek: Seek, ask: Ask) -> Got:
        holdings, name = self._holdings, ask.stretch.name
        found: list[Block] = []
        parent, read_bytes, began_s = NO_PARENT, 0, time.monotonic()
        ended_s = began_s
        try:
            content = holdings.far.get_range(name, *ask.range(seek.block_bytes))
            read_bytes, ended_s = content.size, time.monotonic()
            header, found = self._verified(seek, ask, content)
            parent = header.parent
            if len(found) == ask.stretch.blocks:  # all of it, in one
                holdings.sound(name)
        except AbsentError:
            if ask.opening.blame():
                holdings.absent(name)
        except StrangeError:
            if ask.opening.blame():
                holdings.strange(name)
        except DamagedError as error:
            if ask.opening.blame():
                holdings.damaged(name, str(error))
        except CancelledError:
            pass  # who was to bring the header has told why there is none
        return Got(_piece(seek, ask.at, parent, found), len(found) == ask.blocks, read_bytes, began_s, ended_s)

    def _read_many(self, seek: Seek, ask: Ask) -> Got:
        holdings = self._holdings
        parent, blocks = NO_PARENT, list[Block]()
        began_s = time.monotonic()
        objects: list[Bytes | None] = []
        names = [stretch.name for stretch in ask.stretches]
        try:
            objects = holdings.far.get_many(names, HEADER_BYTES + seek.block_bytes)
        except StrangeError:
            for name in names:
                holdings.strange(name)
        ended_s = time.monotonic()
        for stretch, content in zip(ask.stretches, objects, strict=False):
            if content is None:
                holdings.absent(stretch.name)
                break
            try:
                header = holdings.parse(stretch.name, content[:HEADER_BYTES])
                found = _compared(seek, stretch, content[HEADER_BYTES:], header, 0, 1)
            except DamagedError as error:
                holdings.damaged(stretch.name, str(error))
                break
            holdings.sound(stretch.name)
            parent = parent if blocks else header.parent
            blocks += found
        read_bytes = sum(content.size for content in objects if content is not None)
        return Got(_piece(seek, ask.at, parent, blocks), len(blocks) == ask.blocks, read_bytes, began_s, ended_s)

    def _verified(self, seek: Seek, ask: Ask, content: Bytes) -> tuple[ObjectHeader, list[Block]]:
        """Blocks whose every byte is what was written. Raises DamagedError, RemoteError, CancelledError."""
        holdings, name = self._holdings, ask.stretch.name
        if ask.header is None and not ask.first:
            header = holdings.parse(name, content[:HEADER_BYTES])
            ask.opening.set(header)
            return header, _compared(seek, ask.stretch, content[HEADER_BYTES:], header, ask.first, ask.stop)
        known = ask.header or (holdings.remembered(name) if ask.leads else ask.opening.wait())
        header = known or holdings.read_header(name)
        try:
            found = _compared(seek, ask.stretch, content, header, ask.first, ask.stop)
        except DamagedError:
            if known is None:
                raise
            # The object may have gone and come back since, with bytes that another host has computed.
            holdings.forget_header(name)
            header = holdings.read_header(name)
            if ask.header is not None and header != ask.header:  # what lies there now lies elsewhere in it
                return header, []
            found = _compared(seek, ask.stretch, content, header, ask.first, ask.stop)
        ask.opening.set(header)
        return header, found


def _piece(seek: Seek, at: int, parent: bytes, found: list[Block]) -> Piece:
    return Piece(seek, at, parent, [block for block, _ in found], [checksum for _, checksum in found])


def _came(first: Future[Got], looking: Future[Found] | None) -> bool:
    """Wait for the first that runs, or until it is known where the chain goes on."""
    if looking is None or first.done():
        return True
    both: list[Future[Any]] = [looking, first]
    wait(both, return_when=FIRST_COMPLETED)
    return first.done()


def _check_header(seek: Seek, stretch: Stretch, header: ObjectHeader) -> None:
    """Raises DamagedError if it is not of what the name promises."""
    same = header.place == seek.place and header.block_bytes == seek.block_bytes
    if not same or len(header.keys) != stretch.blocks:
        raise DamagedError("another object lies there")


def _compared(seek: Seek, stretch: Stretch, body: Bytes, header: ObjectHeader, first: int, stop: int) -> list[Block]:
    """Blocks `first..stop` of an object, as far as their keys are those of the chain. Raises DamagedError."""
    block_bytes = seek.block_bytes
    _check_header(seek, stretch, header)
    ends = header.ends
    if body.size != ends[stop] - ends[first]:
        raise DamagedError(f"{body.size} bytes of {ends[stop] - ends[first]}")
    at = stretch.at + first - stretch.skip
    found: list[Block] = []
    for number in range(first, stop):
        if header.keys[number] != seek.keys[at + len(found)]:  # letters in the name are alike, keys are not
            if not number:
                raise DamagedError("another object lies there")
            break
        stored = body[ends[number] - ends[first] : ends[number + 1] - ends[first]]
        block = stored if not header.stored else _decoded(header.stored[number][0], stored, block_bytes)
        if xxhash.xxh3_64_intdigest(block) != header.checksums[number]:  # type: ignore[arg-type]
            raise DamagedError(f"block {number} is not what was written")
        found.append((block, header.checksums[number]))
    return found


def _decoded(codec: Codec, stored: Bytes, block_bytes: int) -> Bytes:
    """A block as it was. Raises DamagedError."""
    if codec is Codec.RAW:
        return stored
    block = np.empty(block_bytes, dtype=np.uint8)
    try:
        unpack(stored, block)
    except PlanesError as error:
        raise DamagedError(f"it cannot be unpacked: {error}") from error
    return block
