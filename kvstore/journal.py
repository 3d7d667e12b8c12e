"""What a successor must know of a store besides its tables: who the numbers in them are. A table of its own that
survives with them.

    [half in use u8] [half 0: records] [half 1: records]       record: length u4, XXH3-64 of the text u8, text (JSON)

Records are only ever added. A half that is full is written anew, shorter, into the other one, and the first word then
says so: whoever dies in between leaves one that is whole.
"""

import json
import struct
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import xxhash

from kvstore.ports import Bytes

JOURNAL_BYTES: Final = 64 << 20  # untouched until needed; 64,000 namespaces of 400 bytes fit a half
Record: TypeAlias = list[int | str]  # kind, then what belongs to it

_HEAD = struct.Struct("<IQ")
_START: Final = 8


class Journal:
    """One store's. Owner thread."""

    def __init__(self, table: Bytes, snapshot: Callable[[], Sequence[Record]]) -> None:
        """`snapshot` says everything anew, for a half that is full."""
        self._table = table
        self._snapshot = snapshot
        self._half_bytes = (table.size - _START) // 2
        self._half = 0
        self._end = 0
        self._begun = False

    def begin(self, records: Sequence[Record]) -> None:
        """Say this and forget what was said before."""
        self._write_half(records)
        self._begun = True

    def add(self, record: Record) -> None:
        """Say one thing more. Nothing before `begin`, which says all that is known by then: until it has, the half in
        use is the former life's, for another successor if this one dies on the way.
        """
        if self._begun and not self._append(record):
            self._write_half(self._snapshot())

    def _write_half(self, records: Sequence[Record]) -> None:
        other = 1 - int(self._table[0] & 1)
        self._half, self._end = other, 0
        at = _START + other * self._half_bytes
        self._table[at : at + _HEAD.size] = 0
        for record in records:
            fits = self._append(record)
            assert fits, "a journal holds all that a store may have"
        self._table[0] = other

    def _append(self, record: Record) -> bool:
        text = json.dumps(record, separators=(",", ":")).encode()
        at = _START + self._half * self._half_bytes + self._end
        if self._end + 2 * _HEAD.size + len(text) > self._half_bytes:
            return False
        after = at + _HEAD.size + len(text)
        self._table[after : after + _HEAD.size] = 0  # whatever lay there is no record
        self._write(at + _HEAD.size, text)
        self._write(at, _HEAD.pack(len(text), xxhash.xxh3_64_intdigest(text)))
        self._end += _HEAD.size + len(text)
        return True

    def _write(self, at: int, content: bytes) -> None:
        memoryview(self._table)[at : at + len(content)] = content  # type: ignore[arg-type]


def read_journal(table: Bytes) -> list[Record]:
    """All records that are whole, up to the first that is not."""
    half_bytes = (table.size - _START) // 2
    at = _START + int(table[0] & 1) * half_bytes
    end = at + half_bytes
    records: list[Record] = []
    while at + _HEAD.size <= end:
        length, checksum = _HEAD.unpack(table[at : at + _HEAD.size].tobytes())
        text = table[at + _HEAD.size : at + _HEAD.size + length].tobytes()
        if not length or at + _HEAD.size + length > end or xxhash.xxh3_64_intdigest(text) != checksum:
            break
        try:
            record = json.loads(text)
        except ValueError:
            break
        if not isinstance(record, list):
            break
        records.append(record)
        at += _HEAD.size + length
    return records
