"""What the threads of the disk tier do with a piece of a batch. They know the bytes they are given and no state.

A piece is one kind of order. Loads and saves in one piece lie next to each other on disk: header page, payload pages,
header page, payload pages, one system call for all. If that fails, each goes by itself, so that one bad sector costs
one block. What was read is verified by another thread, so that a drive never waits for that.
"""

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, TypeVar

import numpy as np
import xxhash

from kvkernels.aligned import Bytes, aligned
from kvkernels.planes import PlanesError, pack, unpack
from kvproto.limits import PAGE_BYTES, slot_bytes_for
from kvstore.tier.format import (
    HEADER_BYTES,
    Codec,
    FormatError,
    Header,
    bound_to,
    pack_header_into,
    parse_header,
    slot_offset,
    stored_slot_bytes,
)
from kvstore.tier.orders import Erase, Load, MakeSegment, Outcome, Pack, Packed, Save, Verify
from kvstore.tier.scrub import NOWHERE
from kvstored.drive_files import CALL_BYTES, RUN_SLOTS, transfer
from kvstored.drive_keys import BlockCipher
from kvstored.drive_segments import Segment, SegmentGoneError

Arenas = Mapping[int, Bytes]
Run = TypeVar("Run", Load, Save, Erase)

# A tenth of the disk and of its bandwidth, or it is not worth 4 ms for 2 MiB on the way there and 1 ms back.
PACK_NUMERATOR, PACK_DENOMINATOR = 9, 10

_ZEROS: Final = aligned(PAGE_BYTES)
_ZEROS[:] = 0


class Came(NamedTuple):
    """A block that was read and not looked at."""

    order: Load
    page: memoryview  # its header
    payload: memoryview
    straight: bool  # the payload lies where it belongs


@dataclass(slots=True)
class Scratch:
    """What goes with one piece of work: header pages of a run, room for packed blocks, and what was read."""

    headers: Bytes = field(default_factory=lambda: aligned(RUN_SLOTS * HEADER_BYTES))
    packed: Bytes = field(default_factory=lambda: aligned(PAGE_BYTES))
    aside: Bytes = field(default_factory=lambda: aligned(PAGE_BYTES))
    plain: Bytes = field(default_factory=lambda: aligned(PAGE_BYTES))
    came: list[Came] = field(default_factory=list)
    began_ns: int = 0
    read_ns: int = 0  # when the last read had come, before it was looked at

    def plain_for(self, room_bytes: int) -> Bytes:
        """Room for one packed block that was encrypted."""
        if self.plain.size < room_bytes or self.plain.size > CALL_BYTES:
            self.plain = aligned(room_bytes)
        return self.plain[:room_bytes]

    def aside_for(self, room_bytes: int) -> Bytes:
        """Room for one block that is only looked at."""
        if self.aside.size < room_bytes or self.aside.size > CALL_BYTES:
            self.aside = aligned(room_bytes)
        return self.aside[:room_bytes]

    def header(self, number: int) -> memoryview:
        """One page."""
        return self.headers[number * HEADER_BYTES : (number + 1) * HEADER_BYTES].data

    def room(self, room_bytes: int) -> Bytes:
        """Room for packed slots; what an unusually large one took is given back afterwards."""
        if self.packed.size < room_bytes or self.packed.size > CALL_BYTES:
            self.packed = aligned(room_bytes)
        return self.packed[:room_bytes]


# -- loads -----------------------------------------------------------------------------------------------------------


def is_packed(order: Load) -> bool:
    """Does its slot hold less than the block? Then its payload is not meant for DRAM as it is."""
    return order.slot_bytes < stored_slot_bytes(order.namespace.identity.block_bytes)


def load(segment: Segment, orders: Sequence[Load], arenas: Arenas, scratch: Scratch) -> None:
    """Read blocks that lie next to each other. Those that came are OPEN still, and in `scratch` until `check`."""

    def read(fd: int, run: Sequence[Load]) -> None:
        if segment.cipher is None and not is_packed(run[0]):  # known once it is open
            _read_raw(segment, fd, run, arenas, scratch)
        else:
            _read_by_way_of_scratch(segment, fd, run, scratch)

    scratch.came.clear()
    _carry_out(segment, orders, read, "read", writing=False)
    scratch.read_ns = time.monotonic_ns()


def check(segment: Segment, arenas: Arenas, scratch: Scratch) -> None:
    """Verify every byte of what `load` left in `scratch`."""
    for came in scratch.came:
        header = _expected(came.page, came.order)
        if isinstance(header, str):
            why = header
        elif came.straight:
            why = _why_not_raw(header, came.order, came.payload)
        else:
            why = _place_from_scratch(segment, header, came, arenas, scratch)
        if why:
            _damaged(segment, came.order, why)
        else:
            came.order.outcome = Outcome.DONE
    scratch.came.clear()


def _read_raw(segment: Segment, fd: int, run: Sequence[Load], arenas: Arenas, scratch: Scratch) -> None:
    """Payloads go straight to where they belong."""
    buffers: list[memoryview] = []
    taken = len(scratch.came)
    for number, order in enumerate(run):
        payload_bytes = slot_bytes_for(order.namespace.identity.block_bytes)
        buffers += (scratch.header(taken + number), _target(arenas, order, payload_bytes, scratch).data)
    offset = slot_offset(run[0].slot_bytes, run[0].slot)
    segment.directory.succeeded(read_bytes=transfer(segment.directory.files.pread, fd, buffers, offset))
    for number, order in enumerate(run):
        scratch.came.append(Came(order, buffers[2 * number], buffers[2 * number + 1], straight=True))


def _why_not_raw(header: Header, order: Load, payload: memoryview) -> str:
    """Why what was read into its place is not the block, if so."""
    block_bytes = order.namespace.identity.block_bytes
    if header.codec is not Codec.RAW or header.nonce or header.stored_bytes != block_bytes:
        return "a raw block's header is of another kind"
    if xxhash.xxh3_64_intdigest(payload[:block_bytes]) != order.checksum:
        return "a block fails its checksum"
    return ""


def _read_by_way_of_scratch(segment: Segment, fd: int, run: Sequence[Load], scratch: Scratch) -> None:
    """Payloads that are packed or encrypted go to scratch memory; blocks come from there."""
    slot_bytes, taken = run[0].slot_bytes, len(scratch.came)
    room = scratch.room((taken + len(run)) * slot_bytes)[taken * slot_bytes :]
    offset = slot_offset(slot_bytes, run[0].slot)
    segment.directory.succeeded(read_bytes=transfer(segment.directory.files.pread, fd, [room.data], offset))
    for number, order in enumerate(run):
        slot = room[number * slot_bytes : (number + 1) * slot_bytes].data
        scratch.came.append(Came(order, slot[:HEADER_BYTES], slot[HEADER_BYTES:], straight=False))


def _place_from_scratch(segment: Segment, header: Header, came: Came, arenas: Arenas, scratch: Scratch) -> str:
    """Put a packed or encrypted block where it belongs; why that cannot be, if so."""
    order, payload = came.order, np.frombuffer(came.payload, dtype=np.uint8)
    target = _target(arenas, order, order.namespace.identity.block_bytes, scratch)
    if segment.cipher is None:
        return _unpack(header, payload, target)
    return _decrypt(segment.cipher, header, payload, target, scratch, packed=is_packed(order))


def _decrypt(
    cipher: BlockCipher, header: Header, payload: Bytes, target: Bytes, scratch: Scratch, *, packed: bool
) -> str:
    """Why the block cannot be had, if so."""
    raw = header.codec is Codec.RAW
    if not header.nonce or raw is packed or header.stored_bytes > payload.size:
        return "an encrypted block's header is of another kind"
    if raw and header.stored_bytes != target.size:
        return "a raw block's header is of another kind"
    stored = payload[: header.stored_bytes]
    plain = target if raw else scratch.plain_for(header.stored_bytes)
    if not cipher.decrypt(stored, plain, bound_to(header), header.nonce, header.tag):
        return "an encrypted block fails its tag"
    if not raw:
        return _grow(header, plain, target)
    return "" if xxhash.xxh3_64_intdigest(target.data) == header.checksum else "a decrypted block fails its checksum"


def _unpack(header: Header, payload: Bytes, target: Bytes) -> str:
    """Why the block cannot be had, if so."""
    if header.codec is not Codec.BF16_PLANES_ZSTD or header.nonce or header.stored_bytes > payload.size:
        return "a packed block's header is of another kind"
    stored = payload[: header.stored_bytes]
    if xxhash.xxh3_64_intdigest(stored.data) != header.stored_checksum:
        return "a packed block fails its checksum"
    return _grow(header, stored, target)


def _grow(header: Header, stored: Bytes, target: Bytes) -> str:
    """Unpack; why not, if so."""
    try:
        unpack(stored, target)
    except PlanesError:
        return "a packed block cannot be unpacked"
    return "" if xxhash.xxh3_64_intdigest(target.data) == header.checksum else "an unpacked block fails its checksum"


def _target(arenas: Arenas, order: Load, target_bytes: int, scratch: Scratch) -> Bytes:
    """Where a block goes: its slot in DRAM, or nowhere if it is only to be verified. Those come one a batch."""
    return scratch.aside_for(target_bytes) if order.arena == NOWHERE else _slice(arenas, order, target_bytes)


def _expected(page: memoryview, order: Load) -> Header | str:
    """The header that this order looks for, or why what was found is another."""
    try:
        header = parse_header(page)
    except FormatError:
        return "a header is damaged"
    if (header.segment, header.slot) != (order.segment, order.slot):
        return "a block lies in another's place"
    namespace = order.namespace
    found = header.key, header.digest, header.tenant, header.generation, header.checksum, header.block_bytes
    wanted = (
        order.key, namespace.digest, namespace.tenant.name, order.generation, order.checksum,
        namespace.identity.block_bytes,
    )  # fmt: skip
    return header if found == wanted else "a slot holds another block"


def _damaged(segment: Segment, order: Load, why: str) -> None:
    order.outcome = Outcome.DAMAGED
    segment.directory.found_damage(why, order.segment, order.slot)


# -- saves and erases ------------------------------------------------------------------------------------------------


def save(segment: Segment, orders: Sequence[Save], arenas: Arenas, scratch: Scratch) -> None:
    """Write blocks that lie next to each other, each with its header."""
    _carry_out(segment, orders, lambda fd, run: _write(segment, fd, run, arenas, scratch), "write", writing=True)


def _write(segment: Segment, fd: int, run: Sequence[Save], arenas: Arenas, scratch: Scratch) -> None:
    buffers: list[memoryview] = []
    cipher, at = segment.cipher, 0
    room = scratch.room(sum(slot_bytes_for(order.header.stored_bytes) for order in run)) if cipher else None
    for number, order in enumerate(run):
        page, header, payload = scratch.header(number), order.header, _payload(order, arenas)
        if cipher is not None and room is not None:
            header, payload = _encrypted(cipher, header, payload, room[at : at + payload.size])
            at += payload.size
        pack_header_into(page, header)
        buffers += (page, payload.data)
    offset = slot_offset(run[0].slot_bytes, run[0].header.slot)
    segment.directory.succeeded(written_bytes=transfer(segment.directory.files.pwrite, fd, buffers, offset))
    for order in run:
        order.outcome = Outcome.DONE


def _encrypted(cipher: BlockCipher, header: Header, payload: Bytes, into: Bytes) -> tuple[Header, Bytes]:
    """A payload as it is written, whole pages, and the header that goes with it."""
    stored_bytes = header.stored_bytes
    nonce, tag = cipher.encrypt(payload[:stored_bytes], into[:stored_bytes], bound_to(header))
    into[stored_bytes:] = 0  # what lies behind the block in memory must not follow it in the clear
    checksum = xxhash.xxh3_64_intdigest(into[:stored_bytes].data)
    return replace(header, stored_checksum=checksum, nonce=nonce, tag=tag), into


def _payload(order: Save, arenas: Arenas) -> Bytes:
    payload_bytes = slot_bytes_for(order.header.stored_bytes)
    assert HEADER_BYTES + payload_bytes <= order.slot_bytes, "a block fits its slot"
    if order.packed is None:
        return _slice(arenas, order, payload_bytes)
    content = order.packed.content
    assert isinstance(content, np.ndarray), "content is what `make_smaller` left there"
    assert content.size == payload_bytes
    return content


def erase(segment: Segment, orders: Sequence[Erase]) -> None:
    """Overwrite headers, then make that durable."""
    _carry_out(segment, orders, lambda fd, run: _erase(segment, fd, run), "erase", writing=True)


def _erase(segment: Segment, fd: int, run: Sequence[Erase]) -> None:
    files = segment.directory.files
    for order in run:
        transfer(files.pwrite, fd, [_ZEROS.data], slot_offset(order.slot_bytes, order.slot))
    segment.sync_erased(fd)
    segment.directory.succeeded(written_bytes=len(run) * PAGE_BYTES)
    for order in run:
        order.outcome = Outcome.DONE


def make_segment(segment: Segment, order: MakeSegment) -> Outcome:
    """Set a segment file aside."""
    try:
        segment.make(order.slot_bytes, order.tenant)
    except (OSError, MemoryError) as error:
        segment.directory.failed("make a segment", error)
        return Outcome.FAILED
    segment.directory.succeeded(written_bytes=HEADER_BYTES)
    return Outcome.DONE


def drop_segment(segment: Segment) -> Outcome:
    """Remove a segment file."""
    try:
        segment.remove()
    except OSError as error:
        segment.directory.failed("drop a segment", error)
        return Outcome.FAILED
    return Outcome.DONE


# -- in memory only --------------------------------------------------------------------------------------------------


def verify(orders: Sequence[Verify], arenas: Arenas) -> None:
    """Compare blocks in DRAM with their checksums."""
    for order in orders:
        found = xxhash.xxh3_64_intdigest(_slice(arenas, order, order.block_bytes).data)
        order.outcome = Outcome.DONE if found == order.checksum else Outcome.DAMAGED


def make_smaller(orders: Sequence[Pack], arenas: Arenas) -> None:
    """Pack blocks, where that saves a page and a tenth."""
    for order in orders:
        assert order.codec is Codec.BF16_PLANES_ZSTD
        most_bytes = min(
            order.block_bytes * PACK_NUMERATOR // PACK_DENOMINATOR, slot_bytes_for(order.block_bytes) - PAGE_BYTES
        )
        done = pack(_slice(arenas, order, order.block_bytes), most_bytes)
        if done:
            content, stored_bytes = done
            checksum = xxhash.xxh3_64_intdigest(content[:stored_bytes].data)
            order.packed = Packed(order.codec, stored_bytes, checksum, content)
        order.outcome = Outcome.DONE


# -- shared ----------------------------------------------------------------------------------------------------------


def _carry_out(
    segment: Segment, orders: Sequence[Run], move: Callable[[int, Sequence[Run]], None], what: str, *, writing: bool
) -> None:
    """`move` all at once; after an I/O error each by itself."""
    assert all(_place(order)[0] == segment.number for order in orders)
    directory = segment.directory
    outcome = Outcome.FAILED
    try:
        with segment.opened(writing=writing) as fd:
            if not all(segment.holds(_place(order)[1], order.slot_bytes) for order in orders):
                outcome = Outcome.DAMAGED
                directory.found_damage("a segment is laid out otherwise", *_place(orders[0]))
                return
            try:
                move(fd, orders)
                outcome = Outcome.OPEN  # but for what `move` says itself: what was read is to be verified
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                if len(orders) == 1:
                    if writing or not _is_cut(segment, fd, orders[0]):
                        raise
                    outcome = Outcome.DAMAGED  # not the drive's fault: the blocks in sound files are not to suffer
                    directory.found_damage("a segment file is shorter than it was", *_place(orders[0]))
                    return
                _one_by_one(segment, orders, move, what, writing=writing)
                outcome = Outcome.OPEN
    except SegmentGoneError:
        outcome = Outcome.GONE
    except (OSError, MemoryError) as error:
        directory.failed(what, error)
    finally:
        for order in orders:
            if order.outcome is Outcome.OPEN:
                order.outcome = outcome


def _one_by_one(
    segment: Segment, orders: Sequence[Run], move: Callable[[int, Sequence[Run]], None], what: str, *, writing: bool
) -> None:
    for order in orders:
        if segment.directory.suspended and not isinstance(order, Erase):
            order.outcome = Outcome.FAILED
        else:
            _carry_out(segment, [order], move, what, writing=writing)


def _is_cut(segment: Segment, fd: int, order: Load | Save | Erase) -> bool:
    """Did somebody cut the file, so that there is nothing where this slot was?"""
    end = slot_offset(order.slot_bytes, _place(order)[1]) + order.slot_bytes
    return segment.directory.files.file_bytes(fd) < end


def _place(order: Load | Save | Erase) -> tuple[int, int]:
    """Segment and slot."""
    named = order.header if isinstance(order, Save) else order
    return named.segment, named.slot


def _slice(arenas: Arenas, order: Load | Save | Verify | Pack, slice_bytes: int) -> Bytes:
    found = arenas[order.arena][order.arena_offset : order.arena_offset + slice_bytes]
    assert found.size == slice_bytes, "a block lies inside its arena: what follows it on disk depends on that"
    return found
