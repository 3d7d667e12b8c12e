"""The index file: an LMDB environment, and what makes its lies visible. Only ever used in the index child.

    D0/index/data.mdb db "chunks": segment, chunk -> 56 records, checksum
                      db "names":  number -> tenant, digest, canonical form, checksum
                      db "meta":   "state" -> State, checksum

LMDB notices no damage: flipped bits give other values, other places, or fewer entries, and can make it take the
commit before the last for the last. So every value has its checksum; `State` counts the entries and has an exclusive
or over a hash of each entry's key and checksum; and the file `last` knows the sequence that `State`
must have reached. It is written after each transaction without a sync of its own: after a power loss it may be behind,
never ahead.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import lmdb
import xxhash

from kvstored.index_marks import INDEX_VERSION, MAP_BYTES, DamagedError, seal, unseal, write_last
from kvstored.index_wire import CHUNK_KEY, Change

# Set aside behind what is written, and again when half of it is used: what fills the file system then stops no commit
# before there are 15,000 to 30,000 blocks more. Other drives go on, and what lies there is durable by this index alone.
RESERVE_BYTES: Final = 4 << 20

DATA: Final = "data.mdb"

_SUM: Final = struct.Struct("<Q")
_STATE: Final = struct.Struct("<IIIIQQQ16s")


# What LMDB says of a file that is not as it left it; what it says of a full disk or an I/O error is not among them.
DAMAGE: Final = (
    DamagedError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError,
    lmdb.IncompatibleError, lmdb.NotFoundError, lmdb.BadDbiError, lmdb.CursorFullError, lmdb.PageFullError,
    lmdb.BadValsizeError, lmdb.BadTxnError, lmdb.ProblemError,
)  # fmt: skip


def entry_hash(key: bytes, value: bytes | memoryview) -> int:
    """What an entry adds to `State.digest`: its key, and its value by its checksum."""
    return xxhash.xxh3_64_intdigest(key + bytes(value[-_SUM.size :]))


@dataclass(frozen=True, slots=True)
class State:
    """What the index says of itself."""

    store: bytes
    sequence: int = 0  # transactions so far
    chunks: int = 0
    names: int = 0
    digest: int = 0
    highest: int = 0  # generation that was ever in it

    def pack(self) -> bytes:
        """Its value in LMDB."""
        return seal(
            _STATE.pack(INDEX_VERSION, self.chunks, self.names, 0, self.sequence, self.digest, self.highest, self.store)
        )

    @classmethod
    def parse(cls, value: bytes | None) -> "State":
        """Raises DamagedError, also for one of another version: headers say the same."""
        inner = unseal(value or b"")
        if len(inner) != _STATE.size:
            raise DamagedError(f"a state of {len(inner)} bytes")
        version, chunks, names, _, sequence, digest, highest, store = _STATE.unpack(inner)
        if version != INDEX_VERSION:
            raise DamagedError(f"it is of version {version}, and this is version {INDEX_VERSION}")
        return cls(store, sequence, chunks, names, digest, highest)


class IndexFile:
    """An open index. One at a time in one process: the child holds a lock that keeps others out."""

    def __init__(self, folder: Path, map_bytes: int = MAP_BYTES, *, create: bool = False, sync: bool = True) -> None:
        """Raises lmdb.Error."""
        self._folder = folder
        self.env = lmdb.open(
            str(folder), map_size=map_bytes, max_dbs=3, create=create, lock=False, sync=sync, metasync=sync, mode=0o600
        )
        self.chunks = self.env.open_db(b"chunks", create=create)
        self.names = self.env.open_db(b"names", create=create)
        self.meta = self.env.open_db(b"meta", create=create)

    def close(self) -> None:
        """Unmap it: nothing of it stays in memory."""
        self.env.close()

    def state(self, txn: "lmdb.Transaction[bytes]") -> State:
        """Raises DamagedError."""
        return State.parse(txn.get(b"state", db=self.meta))

    def start(self, store: bytes) -> None:
        """First transaction of a new index."""
        with self.env.begin(write=True) as txn:
            txn.put(b"state", State(store).pack(), db=self.meta)
        write_last(self._folder, 0)

    def write(self, change: Change) -> None:
        """One transaction, durable at the end if `sync`. Raises lmdb.Error, OSError, DamagedError."""
        while True:
            try:
                sequence = self._write(change)
            except lmdb.MapFullError:
                self.env.set_mapsize(self.env.info()["map_size"] * 2)
                continue
            write_last(self._folder, sequence)
            return

    def reserve(self) -> None:
        """Have the file system keep room for what comes, as far as it can."""
        used_bytes = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        with suppress(OSError), (self._folder / DATA).open("r+b") as file:
            if os.fstat(file.fileno()).st_size < used_bytes + RESERVE_BYTES // 2:
                os.posix_fallocate(file.fileno(), 0, used_bytes + RESERVE_BYTES)

    def _write(self, change: Change) -> int:
        with self.env.begin(write=True) as txn:
            state = self.state(txn)
            chunks, names, digest = state.chunks, state.names, state.digest
            for segment in change.dropped:
                cursor = txn.cursor(db=self.chunks)
                there = cursor.set_range(CHUNK_KEY.pack(segment, 0))
                while there and CHUNK_KEY.unpack(key := cursor.key())[0] == segment:
                    digest ^= entry_hash(key, cursor.value())
                    chunks -= 1
                    there = cursor.delete() and bool(cursor.key())
                cursor.close()
            for db, entries in ((self.chunks, change.chunks), (self.names, change.names)):
                for key, value in entries:
                    old = txn.get(key, db=db)
                    if old is not None:
                        digest ^= entry_hash(key, old)
                    elif db is self.chunks:
                        chunks += 1
                    else:
                        names += 1
                    digest ^= entry_hash(key, value)
                    txn.put(key, value, db=db)
            new = replace(
                state, sequence=state.sequence + 1, chunks=chunks, names=names, digest=digest,
                highest=max(state.highest, change.highest),
            )  # fmt: skip
            txn.put(b"state", new.pack(), db=self.meta)
        return new.sequence


@contextmanager
def open_index(folder: Path, map_bytes: int = MAP_BYTES, *, create: bool = False) -> Iterator[IndexFile]:
    """Open, and unmap in any case. Raises lmdb.Error, DamagedError."""
    file = folder / DATA
    if file.exists() and not file.is_file():  # LMDB would wait for a pipe
        raise DamagedError("data.mdb is not a regular file")
    index = IndexFile(folder, map_bytes, create=create)
    try:
        yield index
    finally:
        index.close()
