"""Numbers by which a client and its daemon call the same trace, without a word of it on the wire.

Both know the session's number, the clock that WELCOME has told, and the lease's number, which counts upwards in its
session: what follows from these three names one lease of one life of one daemon, and nothing else.
"""

import struct
from hashlib import blake2b
from typing import Final, NamedTuple

ONE_IN_MAX: Final = 1_000_000
_KNOWN: Final = struct.Struct("<QQQ")


class TraceIds(NamedTuple):
    """Of one lease. None is 0."""

    trace: int  # 128 bits
    client: int  # 64 bits: the span of the whole fetch, by the client
    lease: int  # 64 bits: that of the daemon's part


def trace_ids(session: int, welcomed_ns: int, lease: int) -> TraceIds:
    """The same on both sides."""
    digest = blake2b(_KNOWN.pack(session, welcomed_ns, lease), digest_size=32, person=b"kvstored-trace").digest()
    trace, client, part = digest[:16], digest[16:24], digest[24:]
    return TraceIds(*((int.from_bytes(some, "little") | 1) for some in (trace, client, part)))


def sampled(ids: TraceIds, one_in: int) -> bool:
    """Is this one of the traces that are kept, one in so many? Both sides agree wherever they are told the same."""
    return ids.trace // 2 % one_in == 0
