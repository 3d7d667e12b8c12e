"""What the remote tier asks of its threads, and what they bring back. Plain records.

Seek  ---> where a chain goes on over there ---> Piece, Piece, ... in order ---> the Seek itself, over
Look  ---> read back and compared ---> the Look itself, over
Keep  ---> copied out of DRAM, compared (`copied`) ---> written ---> the Keep itself, over
Forget --> nothing of it is read any more (`forgot`), and what is known of it is deleted; ForgetAll --> the same
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvstore.tier.format import Codec
from kvstore.tier.remote_format import ALL_PREFIX, TENANT_DIGEST_BYTES, Place, tenant_prefix
from kvstore.tier.remote_uses import Uses

if TYPE_CHECKING:
    from kvstore.sessions import Copy, Namespace

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(slots=True, eq=False)
class Seek:
    """Bring what a chain has over there from block `start` on."""

    namespace: "Namespace"
    place: Place
    keys: tuple[bytes, ...]  # from wherever the request began
    start: int
    block_bytes: int
    asked_ns: int
    moment: int = 0  # of `Beyond`, when it was made
    wished: bool = False  # somebody wants it fetched: that it was not there is not believed without asking
    since: int = 0  # of `There`, when it was made
    before: tuple[bytes, ...] | None = None  # what the first key continues, up to the root; None: nobody has looked
    continues: bytes = b""  # what may come back depends on what is before this block: ask again with that
    found: int = 0  # blocks that names told of
    over: bool = False  # nobody wants the rest of it: no further piece is to be read
    late: int = 0  # pieces of it that wait for room
    read_bytes: int = 0  # all that was read of it
    read_s: float = 0.0  # from the first request until the last one was answered: they run side by side


@dataclass(slots=True, eq=False)
class Piece:
    """Blocks `at..` of a chain, each compared with its checksum.

    Where they lie may still be written to by an engine that is not what it should be: they are compared once more
    when they have been copied.
    """

    seek: Seek
    at: int
    parent: bytes  # of the first of them where `at` is 0, as its object says; NO_PARENT: a chain begins there
    contents: list[Bytes]
    checksums: list[int]  # of each of them
    left: int = 0  # blocks whose bytes are still being copied
    taken_bytes: int = 0  # of what may be on its way at a time
    tries: int = 0


@dataclass(slots=True, eq=False)
class Look:
    """Read back what should be there of a chain from `seek.start` on, believing nothing; its bytes go nowhere."""

    seek: Seek
    rows: list[int]
    generations: list[int]
    whole: int = 0  # the first so many are as they should be
    why: str = ""  # the next one may be, too: what kept us from reading it


@dataclass(slots=True, eq=False)
class Keep:
    """Write a run. Rows are held until it is `copied`."""

    namespace: "Namespace"
    place: Place
    parent: bytes
    keys: tuple[bytes, ...]
    rows: list[int]
    generations: list[int]
    checksums: list[int]
    sources: list[tuple[int, int]]  # arena, offset
    block_bytes: int
    copied: bool = False
    stored: int = 0  # so many of the first blocks are over there now
    failed: str = ""
    never: int | None = None  # from this block on there is no use in trying again
    epoch: tuple[int, int] = (0, 0)  # what had been dropped when it was made
    moment: int = 0  # of `Beyond`, then
    codec: Codec = Codec.RAW  # for blocks that it makes smaller, where objects may hold several
    again: bool = False  # it was there, and has gone: nothing that is in use leaves for it
    packed: list[int] = field(default_factory=list)  # what each block that was tried takes with it


@dataclass(slots=True, eq=False)
class Forget:
    """What was dropped: keys of a namespace and what continues them, or (no keys) all of it."""

    namespace: "Namespace"
    place: Place
    keys: tuple[bytes, ...]
    too_many: bool = False  # keys, more than can be noted: it is closed until all of it is gone


@dataclass(frozen=True, slots=True)
class ForgetAll:
    """All was dropped: of a tenant, of a namespace, or of everybody, whether anybody has opened it here or not."""

    tenant: bytes | None = None  # digest; None: of all
    namespace: bytes | None = None  # digest; None: all

    @property
    def prefix(self) -> str:
        """What names of all its objects begin with; empty: there are several such, of a namespace of any tenant."""
        if self.tenant is None:
            return "" if self.namespace else ALL_PREFIX
        return Place(self.tenant, self.namespace).prefix if self.namespace else tenant_prefix(self.tenant)

    def covers(self, prefix: str) -> bool:
        """Is a namespace some of it?"""
        if self.tenant is None and self.namespace is not None:
            return prefix.endswith(Place(bytes(TENANT_DIGEST_BYTES), self.namespace).prefix.rsplit("/", 2)[-2] + "/")
        return prefix.startswith(self.prefix)


RemoteOrder = Seek | Keep | Forget | ForgetAll


class RemoteWorkers(Protocol):
    """Threads that talk to the far side. Owner thread; nothing here waits."""

    uses: Uses

    def submit(self, order: RemoteOrder) -> bool:
        """Have it carried out; False: too much waits already, or the far side does not answer: it is dropped."""

    def look(self, order: Look) -> bool:
        """Have it looked at; False: the far side does not answer."""

    def reading(self) -> bool:
        """Is there any use in asking for what is over there?"""

    def writing(self) -> bool:
        """Is there any use in writing?"""

    def room_again(self, object_bytes: int) -> bool:
        """May what was removed for room be written again: does nothing leave for it that was used not long ago?"""

    def carry(self, copies: "list[tuple[Copy, Bytes]]") -> None:
        """Have leaf threads copy these blocks to their slots, each from its source."""

    def landed(self, piece: Piece) -> None:
        """The bytes of a piece are needed no more."""

    def objects(self, below: ForgetAll) -> int:
        """How many objects of this host are over there of that, as far as it knows."""

    def changed(self) -> None:
        """A block was not what it had been compared with when it had been copied."""
