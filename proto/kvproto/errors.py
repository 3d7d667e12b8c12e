"""What can go wrong, as wire codes and as exceptions.

A **refusal** (full, busy, unknown) is a returned value (`Grant`, `Reason`), never an exception. An exception
reports misuse or a broken peer:

    KvError                          Code
    |-- UsageError                   BAD_ARGUMENT     the caller passed what no daemon could accept
    |   |-- ForkError                -                a client used in a forked child
    |   `-- ClosedError              -                a client used after close()
    |-- ProtocolError                BAD_FRAME        a frame breaks the format; the session ends
    |   |-- UnknownVerbError         UNKNOWN_VERB
    |   |-- TicketError              BAD_TICKET       foreign, invented or reused ticket
    |   |-- NamespaceError           BAD_NAMESPACE    a namespace number that this session did not open
    |   `-- LimitError               LIMIT            more keys, tickets or leases than allowed
    |-- AttachError                  DEVICE           memory of a GPU that the daemon cannot reach, or not any more
    `-- RefusedError                 REFUSED          the daemon will not serve this peer (version, tenant, uid)
"""

from enum import IntEnum
from typing import Final


class Code(IntEnum):
    """Why a session ended or a request failed; travels in GOAWAY and in answers."""

    OK = 0
    BAD_FRAME = 1
    UNKNOWN_VERB = 2
    BAD_TICKET = 3
    BAD_NAMESPACE = 4
    LIMIT = 5
    BAD_ARGUMENT = 6
    REFUSED = 7
    SLOW_READER = 8
    DRAINING = 9
    SHUTTING_DOWN = 10
    DEVICE = 11


class Grant(IntEnum):
    """The answer to one key of RESERVE."""

    GRANTED = 0
    KNOWN = 1  # already resident: nothing to copy
    PENDING = 2  # another writer holds a ticket for it; final for this store
    NO_PARENT = 3  # the block before it is neither resident, pending nor granted in this frame
    FULL = 4  # no slot can be freed: everything is leased, in flight, or another tenant's share
    BUSY = 5  # no ring space or memory this instant; worth asking again
    QUOTA = 6  # the tenant's own limit
    DRAINING = 7  # the daemon takes no new blocks


class Outcome(IntEnum):
    """What became of one committed ticket; travels in PUBLISHED."""

    PUBLISHED = 0
    STALE = 1  # the ticket had lapsed before COMMIT came
    DISCARDED = 2  # its parent failed, or its key was cleared meanwhile


class KvError(Exception):
    """Root of every error that kvstored or kvclient raises on purpose."""

    code = Code.BAD_ARGUMENT


class UsageError(KvError, ValueError):
    """The caller passed what no daemon could accept: wrong sizes, lengths, types."""


class ForkError(UsageError):
    """A client was used in a child process made by fork; connect anew there."""


class ClosedError(UsageError):
    """A client was used after `close()`."""


class ProtocolError(KvError):
    """A frame breaks the format. The session that sent it ends."""

    code = Code.BAD_FRAME


class UnknownVerbError(ProtocolError):
    """A verb that this version does not know."""

    code = Code.UNKNOWN_VERB


class TicketError(ProtocolError):
    """A ticket that this session does not hold: foreign, invented, or used twice."""

    code = Code.BAD_TICKET


class NamespaceError(ProtocolError):
    """A namespace number that this session did not open."""

    code = Code.BAD_NAMESPACE


class LimitError(ProtocolError):
    """More keys, tickets, leases or namespaces than the limits allow."""

    code = Code.LIMIT


class AttachError(KvError):
    """Memory of a GPU that the daemon cannot reach: another device, a handle that cannot be opened, a lost GPU."""

    code = Code.DEVICE


class RefusedError(KvError):
    """The daemon will not serve this peer: version, tenant or user."""

    code = Code.REFUSED


def error_for(code: Code, text: str) -> KvError:
    """The exception that stands for a wire code; `KvError` itself for codes without one of their own."""
    return _BY_CODE.get(code, KvError)(f"{text} ({code.name})")


_BY_CODE: Final[dict[Code, type[KvError]]] = {
    kind.code: kind
    for kind in (
        ProtocolError,
        UnknownVerbError,
        TicketError,
        NamespaceError,
        LimitError,
        RefusedError,
        UsageError,
        AttachError,
    )
}
