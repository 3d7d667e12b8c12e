"""The kinds of numbers that travel, so that a type checker tells them apart."""

from typing import NewType

BlockKey = NewType("BlockKey", bytes)  # 32 bytes, chained over the prefix
NamespaceDigest = NewType("NamespaceDigest", bytes)  # 32 bytes, over the canonical identity
NamespaceNumber = NewType("NamespaceNumber", int)  # daemon's short name of a namespace, never reused in one life
SessionId = NewType("SessionId", int)
ArenaId = NewType("ArenaId", int)  # never reused in one life of the daemon
LeaseId = NewType("LeaseId", int)
TicketId = NewType("TicketId", int)
