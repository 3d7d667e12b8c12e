"""Frames of mode daemon: an engine's memory on a GPU, and what the daemon copies into it and out of it.

WIRE.md draws every byte. Building and parsing only; `parse_*` look at every length, count and number before anything is
made of it, and raise ProtocolError or LimitError. What a handle opens is found out by `kvkernels.device.sharing`. Any
thread.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from kvproto.errors import LimitError, ProtocolError
from kvproto.frames import Flag, Head, Verb, build, require_body
from kvproto.limits import FRAME_BYTES, KEY_BYTES, KEYS_PER_FRAME, LAYER_GROUPS, LEASE_WAIT_NS_MAX

ATTACH_HEAD: Final = struct.Struct("<16sIIIIQ")  # device, handles, pieces, blocks, zero, bytes of a piece
HANDLE_ITEM: Final = struct.Struct("<QBB6x64s")  # bytes that it opens, via, length of its text, text
PIECE_ITEM: Final = struct.Struct("<I4xQQ")  # which handle, offset, stride
LOAD_HEAD: Final = struct.Struct("<IIQI4x")  # namespace, memory, wait ns, layer groups
SAVE_HEAD: Final = struct.Struct("<IIII32s")  # namespace, memory, recompute us a block, until ms, parent key
TRANSFER_BODY: Final = struct.Struct("<Q")
LOADED_BODY: Final = struct.Struct("<QIIB7x")  # transfer, blocks, groups that are there, state
IDENTITY_BYTES: Final = 16
TEXT_BYTES: Final = 64
NO_END: Final = (1 << 63) - 1  # the deadline of a SAVE that has none
UNTIL_NS_MAX: Final = 1 << 50  # how far off one may be: 13 days, of the 24 in which 32 bits of milliseconds are plain
_MS: Final = 10**6
_SPAN_MS: Final = 1 << 32


class Opens(IntEnum):
    """How a handle travels."""

    IPC = 1  # by its text
    DESCRIPTOR = 2  # by the next of the descriptors that come with the frame


class State(IntEnum):
    """Of a transfer."""

    MOVING = 0  # the daemon writes to the pages
    DONE = 1
    CANCELLED = 2
    FAILED = 3  # of the device; and nothing is written any more


class Fate(IntEnum):
    """What became of one block of a SAVE. Those up to DRAINING are `Grant` by name and number, but for the first."""

    SAVED = 0
    KNOWN = 1
    PENDING = 2
    NO_PARENT = 3
    FULL = 4
    BUSY = 5
    QUOTA = 6
    DRAINING = 7
    DISCARDED = 8  # dropped or deleted meanwhile
    DEVICE = 9  # could not be read
    CANCELLED = 10


class SharedHandle(NamedTuple):
    """What opens one allocation of the engine's."""

    whole_bytes: int
    opens: Opens
    text: bytes = b""


class Piece(NamedTuple):
    """Of every page: in the memory of which handle, from where on, how many bytes apart."""

    handle: int
    offset: int
    stride: int


class Attach(NamedTuple):
    """An engine's pages: `blocks` of them, each of `len(pieces)` pieces of `piece_bytes`."""

    identity: bytes  # of the device: 16 bytes
    handles: Sequence[SharedHandle]
    pieces: Sequence[Piece]
    piece_bytes: int
    blocks: int


class Load(NamedTuple):
    """Where the blocks of a chain are to go. `keys_at`: offset of the keys."""

    namespace: int
    memory: int
    wait_ns: int
    groups: int
    pages: tuple[int, ...]
    keys_at: int


class Save(NamedTuple):
    """Where the blocks of a chain are. The parent's key lies right before `pages_at` and counts if there is one."""

    namespace: int
    memory: int
    recompute_us: int
    parent: bytes | None
    pages: tuple[int, ...]
    keys_at: int
    until_ms: int  # see `deadline_of`


class Loaded(NamedTuple):
    """How far a LOAD has come: the first `groups` layer groups of its first `blocks` blocks are there."""

    transfer: int
    blocks: int
    groups: int
    state: State


Frame = bytes | bytearray | memoryview


# -- from the client --------------------------------------------------------------------------------------------------


def build_attach(request: int, attach: Attach, releases: Sequence[int] = ()) -> bytes:
    """ATTACH. Raises LimitError for pages of too many pieces for a frame."""
    head = ATTACH_HEAD.pack(
        attach.identity, len(attach.handles), len(attach.pieces), attach.blocks, 0, attach.piece_bytes
    )
    handles = (HANDLE_ITEM.pack(each.whole_bytes, each.opens, len(each.text), each.text) for each in attach.handles)
    body = head + b"".join(handles) + b"".join(PIECE_ITEM.pack(*piece) for piece in attach.pieces)
    frame = build(Verb.ATTACH, request, body, releases=releases)
    if len(frame) > FRAME_BYTES:
        raise LimitError(
            f"pages of {len(attach.pieces)} pieces in {len(attach.handles)} allocations do not fit a frame"
        )
    return frame


def parse_attach(frame: Frame, head: Head) -> Attach:
    """As it was said; whether it makes sense is for who opens it."""
    if head.body_bytes < ATTACH_HEAD.size:
        raise ProtocolError("ATTACH is cut short")
    identity, handles, pieces, blocks, _, piece_bytes = ATTACH_HEAD.unpack_from(frame, head.body)
    if handles > FRAME_BYTES or pieces > FRAME_BYTES:  # before they are multiplied
        raise LimitError(f"ATTACH of {handles} handles and {pieces} pieces")
    require_body(head, ATTACH_HEAD.size + handles * HANDLE_ITEM.size + pieces * PIECE_ITEM.size)
    at = head.body + ATTACH_HEAD.size
    body = bytes(frame[at : head.body + head.body_bytes])
    cut = handles * HANDLE_ITEM.size
    return Attach(
        identity,
        [_handle(*item) for item in HANDLE_ITEM.iter_unpack(body[:cut])],
        [Piece._make(item) for item in PIECE_ITEM.iter_unpack(body[cut:])],
        piece_bytes,
        blocks,
    )


def _handle(whole_bytes: int, opens: int, text_bytes: int, text: bytes) -> SharedHandle:
    if opens not in Opens._value2member_map_ or text_bytes > TEXT_BYTES:
        raise ProtocolError(f"a handle of kind {opens} with a text of {text_bytes} bytes")
    return SharedHandle(whole_bytes, Opens(opens), text[:text_bytes])


def build_load(
    request: int, namespace: int, memory: int, pages: Sequence[int], keys: bytes, *, wait_ns: int, groups: int,
    releases: Sequence[int] = (),
) -> bytes:  # fmt: skip
    """LOAD: copy what is there of this chain into these pages, a page a key."""
    body = LOAD_HEAD.pack(namespace, memory, wait_ns, groups) + _packed(pages) + keys
    return build(Verb.LOAD, request, body, count=len(pages), releases=releases)


def parse_load(frame: Frame, head: Head) -> Load:
    """LOAD, every number within its limits."""
    pages, keys_at = _pages(frame, head, LOAD_HEAD.size)
    namespace, memory, wait_ns, groups = LOAD_HEAD.unpack_from(frame, head.body)
    if wait_ns > LEASE_WAIT_NS_MAX or not 1 <= groups <= LAYER_GROUPS:
        raise LimitError(f"a LOAD that waits {wait_ns} ns, in {groups} groups of layers")
    return Load(namespace, memory, wait_ns, groups, pages, keys_at)


def build_save(
    request: int, namespace: int, memory: int, pages: Sequence[int], keys: bytes, *, parent: bytes | None,
    recompute_us: int = 0, until_ns: int = NO_END, releases: Sequence[int] = (),
) -> bytes:  # fmt: skip
    """SAVE: store this chain out of these pages, a page a key. `until_ns`: what is read later is not to be stored."""
    until_ms = 0 if until_ns == NO_END else until_ns // _MS % _SPAN_MS or _SPAN_MS - 1  # 0 says none
    head = SAVE_HEAD.pack(namespace, memory, recompute_us, until_ms, parent or bytes(KEY_BYTES))
    body = head + _packed(pages) + keys
    flags = Flag.HAS_PARENT if parent is not None else 0
    return build(Verb.SAVE, request, body, count=len(pages), flags=flags, releases=releases)


def parse_save(frame: Frame, head: Head) -> Save:
    """SAVE."""
    pages, keys_at = _pages(frame, head, SAVE_HEAD.size)
    namespace, memory, recompute_us, until_ms, parent = SAVE_HEAD.unpack_from(frame, head.body)
    rooted = parent if head.flags & Flag.HAS_PARENT else None
    return Save(namespace, memory, recompute_us, rooted, pages, keys_at, until_ms)


def deadline_of(save: Save, now_ns: int) -> int:
    """Until when what a SAVE reads is good, on the clock of `now_ns`: of all that 32 bits can mean, the nearest."""
    if not save.until_ms:
        return NO_END
    now_ms = now_ns // _MS
    away_ms = (save.until_ms - now_ms + _SPAN_MS // 2) % _SPAN_MS - _SPAN_MS // 2
    return (now_ms + away_ms) * _MS


def _packed(pages: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(pages)}I{4 * (len(pages) % 2)}x", *pages)


def _pages(frame: Frame, head: Head, fixed_bytes: int) -> tuple[tuple[int, ...], int]:
    count = head.count
    if not 1 <= count <= KEYS_PER_FRAME:
        raise LimitError(f"{count} keys in a frame that holds 1 to {KEYS_PER_FRAME}")
    pages_bytes = 4 * (count + count % 2)
    require_body(head, fixed_bytes + pages_bytes + KEY_BYTES * count)
    pages_at = head.body + fixed_bytes
    return struct.unpack_from(f"<{count}I", frame, pages_at), pages_at + pages_bytes


def build_transfer(verb: Verb, request: int, transfer: int, releases: Sequence[int] = ()) -> bytes:
    """CANCEL_TRANSFER; MOVING and CANCELLED."""
    return build(verb, request, TRANSFER_BODY.pack(transfer), releases=releases)


def parse_transfer(frame: Frame, head: Head) -> int:
    """The number in one of these."""
    number: int = TRANSFER_BODY.unpack_from(frame, require_body(head, TRANSFER_BODY.size))[0]
    return number


# -- from the daemon --------------------------------------------------------------------------------------------------


def build_loaded(loaded: Loaded) -> bytes:
    """LOADED, unasked."""
    return build(Verb.LOADED, 0, LOADED_BODY.pack(*loaded))


def parse_loaded(frame: Frame, head: Head) -> Loaded:
    """LOADED."""
    transfer, blocks, groups, state = LOADED_BODY.unpack_from(frame, require_body(head, LOADED_BODY.size))
    if state not in State._value2member_map_ or blocks > KEYS_PER_FRAME or groups > LAYER_GROUPS:
        raise ProtocolError(f"LOADED says {blocks} blocks, {groups} groups, state {state}")
    return Loaded(transfer, blocks, groups, State(state))


def build_saved(transfer: int, fates: Sequence[int]) -> bytes:
    """SAVED, unasked: a `Fate` a key."""
    return build(Verb.SAVED, 0, TRANSFER_BODY.pack(transfer) + _packed(fates), count=len(fates))


def parse_saved(frame: Frame, head: Head) -> tuple[int, list[Fate]]:
    """SAVED."""
    count = head.count
    at = require_body(head, TRANSFER_BODY.size + 4 * (count + count % 2))
    (transfer,) = TRANSFER_BODY.unpack_from(frame, at)
    fates = struct.unpack_from(f"<{count}I", frame, at + TRANSFER_BODY.size)
    if any(fate not in Fate._value2member_map_ for fate in fates):
        raise ProtocolError("SAVED says what cannot become of a block")
    return transfer, [Fate(fate) for fate in fates]
