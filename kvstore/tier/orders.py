"""What the disk tier asks of the world: orders that threads carry out and hand back with an outcome.

The owner thread makes an order and forgets it; whoever carries it out sets `outcome` and returns the same object.
Until then whatever it names (row, slot, arena) stays as it is. A batch is a list of orders of one kind, all in one
segment, in order of their slots.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from kvstore.tier.format import Codec, Header

if TYPE_CHECKING:
    from kvstore.sessions import Namespace


class Outcome(Enum):
    """How an order ended."""

    OPEN = 0  # not carried out yet
    DONE = 1
    DAMAGED = 2  # what was read is not what was written: a checksum, a place, a generation differs
    FAILED = 3  # the system refused: I/O error, read-only, no space
    GONE = 4  # the segment is not there any more


@dataclass(slots=True, eq=False)
class Packed:
    """A block made smaller, in memory of the packer's."""

    codec: Codec
    stored_bytes: int
    stored_checksum: int
    content: object  # an aligned buffer, padded to whole pages; opaque to the core


@dataclass(slots=True, eq=False)
class Pack:
    """Try to make one block smaller. DONE with `packed` None: it does not pay."""

    row: int
    generation: int
    arena: int
    arena_offset: int
    block_bytes: int
    codec: Codec
    packed: Packed | None = None
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class Load:
    """Read one block into its slot in DRAM, and verify every byte of it."""

    row: int
    namespace: "Namespace"
    key: bytes
    generation: int
    checksum: int
    segment: int
    slot: int
    slot_bytes: int  # on disk
    arena: int
    arena_offset: int
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class Verify:
    """Hash a block that a former daemon left in DRAM, and compare."""

    row: int
    checksum: int
    arena: int
    arena_offset: int
    block_bytes: int
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class Save:
    """Write one block, header first, from its slot in DRAM or from what was packed."""

    row: int
    header: Header
    slot_bytes: int  # on disk
    arena: int
    arena_offset: int
    packed: Packed | None = None
    doubted: bool = False  # a sync failed meanwhile, and has perhaps lost it
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class Erase:
    """Overwrite a slot's header, for good: durable before this is DONE."""

    segment: int
    slot: int
    slot_bytes: int
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class MakeSegment:
    """Preallocate a segment file and write its superblock. The maker chooses the directory."""

    segment: int
    slot_bytes: int
    tenant: str
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class DropSegment:
    """Remove a segment file."""

    segment: int
    outcome: Outcome = Outcome.OPEN


WHOLE = -1  # in place of a slot: all of a segment
EVERY = (-1, WHOLE)  # in place of a place: every segment of a tenant


@dataclass(slots=True, eq=False)
class Owe:
    """Note, elsewhere than on its drive, what is to be erased should it be seen again. Durable before this is DONE."""

    places: set[tuple[int, int]]  # segment and slot, or `WHOLE`; or `EVERY`
    tenant: str  # empty, with `EVERY`: of all tenants
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class Name:
    """A namespace for the index: `number` stands for it in records, for good."""

    number: int
    tenant: str
    canonical: bytes


@dataclass(slots=True, eq=False)
class Commit:
    """Make everything durable: sync these segments, then write these chunks to the index in one transaction."""

    segments: tuple[int, ...]
    chunks: list[tuple[int, int, bytes]]  # segment, chunk, CHUNK_SLOTS records
    names: list[Name]
    dropped: list[int]  # segments that are no more
    failed: set[int] = field(default_factory=set)  # segments whose sync failed: what was written there may be lost
    outcome: Outcome = Outcome.OPEN


@dataclass(slots=True, eq=False)
class Found:
    """A segment that was there at start, with its records in slot order (`format.RECORD`)."""

    segment: int
    slot_bytes: int
    slots: int
    tenant: str
    records: object  # ndarray of RECORD, read-only


Order: TypeAlias = Pack | Load | Verify | Save | Erase | MakeSegment | DropSegment | Owe | Commit
