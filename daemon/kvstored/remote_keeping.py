"""Writing a run to the far side. Threads of the remote tier; no store here.

Keep -> copied out of DRAM and compared -> what is there already is left out -> encoded where that pays
     -> objects -> ledger
"""

import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

import numpy as np

from kvkernels.copyhash import copy_and_hash
from kvkernels.planes import pack
from kvstore.tier.format import Codec
from kvstore.tier.remote_format import HEADER_BYTES, ObjectHeader, marks_in, name_of, pack_header
from kvstore.tier.remote_index import Run
from kvstore.tier.remote_orders import Bytes, Keep
from kvstored.remote_calls import NotAskedError
from kvstored.remote_holdings import UNSETTLED, Holdings
from kvstored.remote_port import FullError, RefusedError, RemoteError, TooLargeError
from kvstored.remote_removals import Doubt

IN_USE: Final = "what would leave for it was used not long ago"
IN_USE_S: Final = 1800  # so long: three times as long as a use may wait to be noted
CHANCES: Final = 256  # objects that were used since their last turn are passed over, before one goes all the same
DELETED: Final = "it was deleted, and is not written there again"
SHARE_PACKED: Final = 0.9  # of its bytes: what saves less is not worth decoding


class Ended(Enum):
    """How a write has."""

    WRITTEN = auto()
    THERE = auto()  # already
    REFUSED = auto()  # or not even asked for
    IN_DOUBT = auto()  # no answer, or one that makes no sense


class Keeping:
    """One host's writes. Any thread."""

    def __init__(self, holdings: Holdings, view: Callable[[int], Bytes], quota_bytes: int) -> None:
        """`view`: an arena's bytes. `quota_bytes`: what this host may have over there."""
        self.view = view
        self._holdings = holdings
        self._quota_bytes = quota_bytes
        self.short = False  # the last one found no room, and nothing could be deleted for it

    def has_room(self) -> bool:
        """Is there room for a write, or any use in making some? Takes no lock."""
        return not self.short or self._holdings.far.can_delete()

    def has_room_again(self, object_bytes: int) -> bool:
        """As far as is known: for what was removed for room. Takes no lock."""
        ledger = self._holdings.ledger
        return ledger.total_bytes + object_bytes <= self._quota_bytes or not self._oldest_in_use()

    def _oldest_in_use(self) -> bool:
        used_s = self._holdings.ledger.oldest_s
        return used_s > 0 and time.monotonic() - used_s < IN_USE_S

    def begin(self, keep: Keep) -> None:
        """What is dropped from now on may be some of it. Owner thread."""
        keep.epoch = self._holdings.epochs.of(keep.place.prefix)

    def keep(self, keep: Keep, copied: Callable[[Keep], None]) -> None:
        """Write a run; `copied` is called as soon as DRAM is needed no more."""
        holdings, place, count = self._holdings, keep.place, len(keep.keys)
        allowed = len(holdings.allowed(place, keep.keys))
        if allowed < count:  # stored again under a key that was deleted
            copied(keep)
            keep.failed = DELETED
            keep.never = allowed if holdings.is_deleted(place, keep.keys[allowed]) else None
            return
        content = np.empty(HEADER_BYTES + count * keep.block_bytes, dtype=np.uint8)
        good = self._copy(keep, content)
        copied(keep)
        digests = holdings.allowed(place, keep.keys) if good else []
        if len(digests) < count:
            keep.failed = "deleted meanwhile" if good else "changed in memory"
            return
        try:
            more = count
            while more and keep.stored < count:
                stretches = holdings.follow(place, digests, keep.stored, keep.block_bytes)
                more = holdings.sound_lead(stretches)
                keep.stored += more
                holdings.used([one.name for one in stretches] if more else [])
            with holdings.lock:
                holdings.seen.skipped += keep.stored
            while keep.stored < count:
                self._put(keep, content, min(count, keep.stored + holdings.far.most_blocks))
        except RemoteError as error:
            keep.failed = str(error)
            keep.never = keep.stored if isinstance(error, TooLargeError) else None

    def _copy(self, keep: Keep, content: Bytes) -> bool:
        block_bytes = keep.block_bytes
        for number, (arena, offset) in enumerate(keep.sources):
            begin = HEADER_BYTES + number * block_bytes
            source = self.view(arena)[offset : offset + block_bytes]
            if copy_and_hash(source, content[begin : begin + block_bytes]) != keep.checksums[number]:
                with self._holdings.lock:
                    self._holdings.seen.changed += 1
                return False
        return True

    def _put(self, keep: Keep, content: Bytes, stop: int) -> None:
        """Blocks from `keep.stored` to `stop` as one object. Raises RemoteError."""
        holdings, start = self._holdings, keep.stored
        keys = keep.keys[start:stop]
        stored, packed = _packed(keep, content, stop) if holdings.far.most_blocks > 1 else ((), [])
        name = name_of(keep.place, keys, encoded=bool(stored))
        with holdings.lock:
            damaged = holdings.known.was_bad(name)
        parent = keep.keys[start - 1] if start else keep.parent
        header = ObjectHeader(keep.place, parent, keys, tuple(keep.checksums[start:stop]), keep.block_bytes, stored)
        # What lies before it in memory is over there by now: its place is the header's.
        begin, end = start * keep.block_bytes, HEADER_BYTES + stop * keep.block_bytes
        content[begin : begin + HEADER_BYTES] = np.frombuffer(pack_header(header), dtype=np.uint8)
        parts = [content[begin : begin + HEADER_BYTES], *packed] if stored else [content[begin:end]]
        object_bytes = header.ends[-1]
        self._make_room(object_bytes, again=keep.again)
        noted = self._begin(keep, name, object_bytes)
        ended = Ended.IN_DOUBT
        try:
            if damaged:
                holdings.far.replace(name, parts)
            ended = Ended.WRITTEN if damaged or holdings.far.put(name, parts) else Ended.THERE
        except (NotAskedError, RefusedError, FullError, TooLargeError):
            ended = Ended.REFUSED
            raise
        finally:
            dropped = self._end(keep, name, object_bytes, ended, noted=noted)
        if dropped:
            raise RemoteError("deleted meanwhile")
        keep.stored = stop
        self._make_room(0)  # others write at the same time

    def _begin(self, keep: Keep, name: str, object_bytes: int) -> bool:
        """Note it before it is there, so that it is not forgotten, however this ends. True: it was noted earlier.

        Raises RemoteError: nothing of what is being deleted is written.
        """
        holdings, prefix = self._holdings, keep.place.prefix
        with holdings.lock:
            if holdings.ledger.is_clearing(prefix) or holdings.epochs.meet(prefix, keep.epoch, keep.keys):
                raise RemoteError("deleted meanwhile")
            if name in holdings.writing:
                raise RemoteError("it is being written already")
            holdings.writing.add(name)
            holdings.unsettled[prefix] += 1
            noted = name in holdings.ledger
            if not noted:
                holdings.ledger.wrote(name, object_bytes)
        return noted

    def _end(self, keep: Keep, name: str, object_bytes: int, ended: Ended, *, noted: bool) -> bool:
        """Was some of it dropped while it was written? Then what lies there goes, as soon as that works.

        Whoever clears the namespace waits for what is left in doubt.
        """
        holdings, prefix = self._holdings, keep.place.prefix
        doubt = Doubt(prefix, name, object_bytes, keep.keys, keep.epoch)
        with holdings.lock:
            holdings.writing.discard(name)
            dropped = holdings.epochs.meet(prefix, keep.epoch, keep.keys)
            if ended in {Ended.THERE, Ended.REFUSED} and not noted:  # somebody else's, or nobody's
                holdings.ledger.removed(name)
            if ended is Ended.WRITTEN and (noted or name not in holdings.ledger):
                # It is as new as that, or it seemed the oldest meanwhile, and had to go.
                holdings.ledger.wrote(name, object_bytes)
            there = ended in {Ended.WRITTEN, Ended.THERE}
            if (there and not dropped) or ended is Ended.REFUSED or holdings.unsettled.total() > UNSETTLED:
                holdings.settled(prefix)
            elif there:
                holdings.removals.add(doubt)
            else:
                holdings.removals.add_later(doubt)
            if there and not dropped:
                folder = name[: name.rfind("/") + 1]
                marks = marks_in(name, folder)
                assert marks is not None, "a name of our own"
                if ended is Ended.WRITTEN:
                    holdings.known.sound(name)
                holdings.known.add(folder, Run(name, marks, object_bytes), time.monotonic_ns())
        return dropped

    def _make_room(self, wanted_bytes: int, *, again: bool = False) -> None:
        """Delete what was written or used the longest ago while there is more than the quota allows.

        `again`: for what was removed for room, so that nothing that is in use goes: of more than the quota that is in
        use all the time, some stays for good, and nothing is written anew with each use. Raises RemoteError: who
        cannot delete does not write either.
        """
        holdings = self._holdings
        if wanted_bytes > self._quota_bytes:
            raise TooLargeError(f"{wanted_bytes} bytes are more than all that this host may keep there")
        chances = CHANCES
        while True:
            with holdings.lock:
                oldest = holdings.ledger.oldest()
                if oldest is None or holdings.ledger.total_bytes + wanted_bytes <= self._quota_bytes:
                    self.short = False
                    return
                if chances and holdings.uses.take(oldest, len(holdings.ledger)):
                    holdings.ledger.used([oldest], last=True)
                    chances -= 1
                    continue
                if again and self._oldest_in_use():
                    raise RemoteError(IN_USE)
            self.short = True
            holdings.remove([oldest])


def _packed(keep: Keep, content: Bytes, stop: int) -> tuple[tuple[tuple[Codec, int], ...], list[Bytes]]:
    """Blocks from `keep.stored` to `stop` encoded: codec and size of each, and their bytes. Empty: none shrinks."""
    if keep.codec is Codec.RAW:
        return (), []
    block_bytes, stored, parts = keep.block_bytes, [], []
    for number in range(keep.stored, stop):
        begin = HEADER_BYTES + number * block_bytes
        block = content[begin : begin + block_bytes]
        small = pack(block, int(SHARE_PACKED * block_bytes))
        keep.packed.append(small[1] if small else block_bytes)
        stored.append((keep.codec, small[1]) if small else (Codec.RAW, block_bytes))
        parts.append(small[0][: small[1]] if small else block)
    return (tuple(stored), parts) if any(codec is not Codec.RAW for codec, _ in stored) else ((), [])
