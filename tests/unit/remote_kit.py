"""Jobs of the remote tier against a server over a real socket, without a daemon around them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import xxhash

from kvproto.limits import MIB
from kvstore.sessions import Namespace
from kvstore.tier.remote_format import NO_PARENT, Place, tenant_digest
from kvstore.tier.remote_orders import Bytes, Forget, Keep, Piece, Seek
from kvstored.remote_address import RemoteAddress
from kvstored.remote_calls import FarSide
from kvstored.remote_jobs import Jobs
from kvstored.remote_ledger import Ledger
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_s3 import S3Backend
from tests.core import chain, key_of, value_of
from tests.node import PATIENCE_S
from tests.s3 import S3Server

BLOCK_BYTES = 4096
PLACE = Place(tenant_digest("t"), key_of("namespace"))
NOBODY = cast(Namespace, None)  # threads carry it, and never look at it


@dataclass
class Kit:
    """One host's jobs."""

    s3: S3Server
    far: FarSide
    jobs: Jobs

    def keep(self, keys: Sequence[bytes], place: Place = PLACE, version: int = 0, parent: bytes = NO_PARENT) -> Keep:
        """Write a run whose bytes follow from its keys."""
        contents = [value_of(key, BLOCK_BYTES, version) for key in keys]
        arena = np.frombuffer(b"".join(contents), dtype=np.uint8)
        self.jobs.keeping.view = lambda _arena: arena
        keep = Keep(
            NOBODY, place, parent, tuple(keys), list(range(len(keys))), [1] * len(keys),
            [xxhash.xxh3_64_intdigest(content) for content in contents],
            [(1, i * BLOCK_BYTES) for i in range(len(keys))], BLOCK_BYTES,
        )  # fmt: skip
        self.jobs.begin_keep(keep)
        copied: list[Keep] = []
        self.jobs.keep(keep, copied.append)
        assert copied == [keep], "memory is let go of once, whatever happens"
        return keep

    def seek(self, keys: Sequence[bytes], start: int = 0, place: Place = PLACE) -> list[Bytes]:
        """What comes of a chain from block `start` on; each piece must go on where the last one ended."""
        seek = Seek(NOBODY, place, tuple(keys), start, BLOCK_BYTES, 0)
        got: list[Bytes] = []

        def take(piece: Piece) -> None:
            assert piece.at == start + len(got), "a gap"
            got.extend(piece.contents)
            self.jobs.reading._budget.give(piece.taken_bytes)

        self.jobs.seek(seek, take)
        return got

    def forget(self, keys: Sequence[bytes], place: Place = PLACE) -> None:
        """What the thread that forgets does."""
        forget = Forget(NOBODY, place, tuple(keys))
        self.jobs.announce(forget)
        self.jobs.begin_forget(forget)
        self.jobs.forget(forget)

    def assert_blocks(self, got: Sequence[Bytes], keys: Sequence[bytes]) -> None:
        """These and no others; a control differs."""
        assert [block.tobytes() for block in got] == [value_of(key, BLOCK_BYTES) for key in keys]
        assert not keys or got[0].tobytes() != value_of(keys[0], BLOCK_BYTES, 1)


def read_ledger(folder: Path | None) -> Ledger:
    """As a daemon's thread makes it."""
    ledger = Ledger(folder)
    ledger.read()
    return ledger


@contextmanager
def kit(
    s3: S3Server,
    folder: Path | None = None,
    *,
    quota_bytes: int = 1 << 40,
    deadline_s: float = PATIENCE_S,
    prefix: str = "k",
    bucket: str = S3Server.bucket,
) -> Iterator[Kit]:
    """One host's jobs on a bucket."""
    address = RemoteAddress("s3", bucket, prefix, s3.endpoint)
    far = FarSide(S3Backend(address, deadline_s, s3.environ))
    readers = Pool(4, "read")
    readers.start()
    empty = np.zeros(0, dtype=np.uint8)
    jobs = Jobs(
        far,
        read_ledger(folder),
        lambda _arena: empty,
        readers,
        window=4,
        budget=Budget(64 * MIB),
        quota_bytes=quota_bytes,
    )
    try:
        yield Kit(s3, far, jobs)
    finally:
        readers.stop()


__all__ = ["BLOCK_BYTES", "PLACE", "Kit", "chain", "kit", "read_ledger"]
