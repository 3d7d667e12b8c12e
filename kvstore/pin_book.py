"""Pins as a successor finds them: a table of records that survives a warm restart, `kill -9` too. Owner thread.

    [head: name u8, records ever used u8] [record] [record] ...

    record   number, deadline (CLOCK_MONOTONIC), ttl u8; key of the deepest block 32 bytes; namespace, blocks u4;
             flags u1: 1 refreshed by use, 2 what lies on disk is wanted in DRAM; owner 128 bytes; XXH3-64 of all that
             u8                                                                                  number 0: nobody's
             an owner that is longer is cut, and XXH3-128 of it follows: names are told apart by their ends, too

A record is written when its pin begins, moves its deadline or is cut short, and wiped when it is over: whenever the
daemon ends, the table says what was pinned then, or does not say it at all. Where the deepest block was dropped and the
daemon is killed before it has looked at its pins, a few ticks later, a successor cannot find the pin, and what comes
before that block is pinned no more; once DELETE or clear is answered, it has looked. Whoever holds the table is the
same host since the same boot, so its clock goes on. A record that is torn or not of ours is nobody's.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import xxhash

from kvproto.limits import PIN_TTL_NS_MAX, PINS_PER_TENANT, TENANTS
from kvstore.ports import Bytes

_RECORD: Final = struct.Struct("<QQQ32sIIB128s")
_SUM: Final = struct.Struct("<Q")
_HEAD: Final = struct.Struct("<8sQ")
_NAME: Final = b"pins   1"
_REFRESH: Final = 1
_TO_DRAM: Final = 2
_RECORDS: Final = TENANTS * PINS_PER_TENANT
_RECORD_BYTES: Final = _RECORD.size + _SUM.size
OWNER_BYTES: Final = 128
BOOK_BYTES: Final = _HEAD.size + _RECORDS * _RECORD_BYTES  # 54 MiB; untouched until needed


@dataclass(frozen=True, slots=True)
class Saved:
    """One pin as it was written down; `place` is where."""

    place: int
    number: int
    deadline_ns: int
    ttl_ns: int
    key: bytes  # of its deepest block
    namespace: int
    count: int
    refresh: bool
    owner: str
    to_dram: bool = False  # what of it lies on disk is wanted in DRAM


class PinBook:
    """Those of one store."""

    def __init__(self, table: Bytes) -> None:
        self._view = memoryview(table)  # type: ignore[arg-type]  # an array is a buffer
        self._free: list[int] = []
        self._used = 0  # places that were ever taken

    def read(self) -> list[Saved] | None:
        """What a former life left, by number, each in its place until it is wiped. None: it is no book of ours."""
        name, used = _HEAD.unpack_from(self._view, 0)
        if not used and name == bytes(8):
            return []
        if name != _NAME or used > _RECORDS:
            return None
        found = sorted(self._whole(used), key=lambda saved: saved.number)
        once = {saved.number: saved for saved in found}
        taken = {saved.place for saved in once.values()}
        self._used = used
        self._free = [place for place in range(used - 1, -1, -1) if place not in taken]
        return list(once.values())

    def _whole(self, used: int) -> Iterator[Saved]:
        for place in range(used):
            at = _at(place)
            number, deadline_ns, ttl_ns, key, namespace, count, flags, owner = _RECORD.unpack_from(self._view, at)
            if not number or not count or not 0 < ttl_ns <= PIN_TTL_NS_MAX:
                continue
            if _SUM.unpack_from(self._view, at + _RECORD.size) != (self._sum(at),):
                continue
            name = _read_owner(owner)
            refresh, to_dram = bool(flags & _REFRESH), bool(flags & _TO_DRAM)
            yield Saved(place, number, deadline_ns, ttl_ns, key, namespace, count, refresh, name, to_dram)

    def write(self, place: int, saved: Saved) -> None:
        """Say this of a pin, in its place."""
        at, owner = _at(place), written_owner(saved.owner).encode()
        _RECORD.pack_into(
            self._view, at, saved.number, saved.deadline_ns, saved.ttl_ns, saved.key, saved.namespace, saved.count,
            saved.refresh * _REFRESH | saved.to_dram * _TO_DRAM, owner,
        )  # fmt: skip
        _SUM.pack_into(self._view, at + _RECORD.size, self._sum(at))

    @property
    def full(self) -> bool:
        """Is no place left? Pins that wait for the disk have theirs beside all those that tenants may have."""
        return not self._free and self._used >= _RECORDS

    def take(self) -> int:
        """A place for one pin more, unless it is `full`."""
        if self._free:
            return self._free.pop()
        assert not self.full, "nobody looked whether there is room"
        self._used += 1
        _HEAD.pack_into(self._view, 0, _NAME, self._used)
        return self._used - 1

    def wipe(self, place: int) -> None:
        """That pin is over."""
        at = _at(place)
        self._view[at : at + _RECORD_BYTES] = bytes(_RECORD_BYTES)
        self._free.append(place)

    def _sum(self, at: int) -> int:
        return xxhash.xxh3_64_intdigest(self._view[at : at + _RECORD.size])


def written_owner(owner: str) -> str:
    """As `Saved` has it when it is read again, however often it was written and read since."""
    name = owner.encode()
    if len(name) <= OWNER_BYTES:
        return owner
    ending = "#" + xxhash.xxh3_128_hexdigest(name)
    return name[: OWNER_BYTES - len(ending)].decode(errors="ignore") + ending


def _read_owner(written: bytes) -> str:
    return written.rstrip(b"\0").decode("utf-8", errors="replace")


def _at(place: int) -> int:
    return _HEAD.size + place * _RECORD_BYTES
