"""An engine's pages in the hands of another process: handles of the memory, and where in it the pieces lie.

What arrives is an engine's word. `open_pages` looks at every number of it before anything is opened, and every piece
lies in what its handle opens, so that whoever copies by these pages stays within the engine's own memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from kvkernels.device.pages import BLOCKS_MAX, PIECES_MAX, Pages
from kvkernels.device.port import ACCESS_BYTES, Allocation, Device, DeviceError, Handle, HandleError

HANDLES_MAX: Final = 253  # as many descriptors as one message may carry
ADDRESS_BITS: Final = 57  # no memory lies, and no stride leads, beyond


class PiecePlace(NamedTuple):
    """Where one piece of every page lies: in which handle's memory, from where on, how far apart."""

    handle: int
    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class SharedPages:
    """Pages, as they travel. The maker closes the handles' descriptors once they are sent (`close_descriptors`)."""

    handles: tuple[Handle, ...]
    pieces: tuple[PiecePlace, ...]
    piece_bytes: int
    blocks: int


class OpenedPages:
    """Another process's pages, until `close`."""

    def __init__(self, device: Device, allocations: Sequence[Allocation], pages: Pages) -> None:
        self._device = device
        self._allocations = list(allocations)
        self.pages = pages

    def close(self) -> None:
        """No copy may be under way."""
        while self._allocations:
            self._device.free(self._allocations.pop())


def share_pages(device: Device, pages: Pages) -> SharedPages:
    """For another process; one handle an allocation, however many pieces lie there. Raises HandleError."""
    handles: list[Handle] = []
    begins: list[int] = []
    pieces: list[PiecePlace] = []
    for base, stride in zip(pages.bases, pages.strides, strict=True):
        end = base + (pages.blocks - 1) * stride + pages.piece_bytes
        for number, (begin, handle) in enumerate(zip(begins, handles, strict=True)):
            if begin <= base and end <= begin + handle.whole_bytes:
                pieces.append(PiecePlace(number, base - begin, stride))
                break
        else:
            handle = device.export(base, end - base)
            begins.append(base - handle.offset)
            handles.append(replace(handle, offset=0, length=handle.whole_bytes))
            pieces.append(PiecePlace(len(handles) - 1, handle.offset, stride))
    if len(handles) > HANDLES_MAX:
        raise HandleError(f"pages in {len(handles)} allocations, more than {HANDLES_MAX}")
    return SharedPages(tuple(handles), tuple(pieces), pages.piece_bytes, pages.blocks)


def open_pages(device: Device, shared: SharedPages) -> OpenedPages:
    """As the other process meant them. Raises HandleError for what is not so, and then nothing is left open."""
    _check(shared)
    opened: list[Allocation] = []
    try:
        opened.extend(device.open(handle) for handle in shared.handles)
        bases = tuple(opened[piece.handle].address + piece.offset for piece in shared.pieces)
        if any(base % ACCESS_BYTES for base in bases):
            raise HandleError("pages at addresses that kernels do not take")
    except DeviceError:
        OpenedPages(device, opened, Pages((), (), 0, 0)).close()
        raise
    strides = tuple(piece.stride for piece in shared.pieces)
    return OpenedPages(device, opened, Pages(bases, strides, shared.piece_bytes, shared.blocks))


def _check(shared: SharedPages) -> None:
    if not 1 <= len(shared.handles) <= HANDLES_MAX or not 1 <= len(shared.pieces) <= PIECES_MAX:
        raise HandleError(f"{len(shared.handles)} handles and {len(shared.pieces)} pieces")
    if not 1 <= shared.blocks <= BLOCKS_MAX or shared.piece_bytes <= 0 or shared.piece_bytes % ACCESS_BYTES:
        raise HandleError(f"{shared.blocks} pages with pieces of {shared.piece_bytes} bytes")
    for handle in shared.handles:
        if handle.offset != 0 or handle.length != handle.whole_bytes or not 0 < handle.length < 1 << ADDRESS_BITS:
            raise HandleError(f"{handle.length} bytes at {handle.offset} of {handle.whole_bytes}")
    for number, offset, stride in shared.pieces:
        if not 0 <= number < len(shared.handles):
            raise HandleError(f"a piece in memory {number} of {len(shared.handles)}")
        if offset < 0 or stride < 0 or offset % ACCESS_BYTES or stride % ACCESS_BYTES:
            raise HandleError(f"a piece at {offset}, pages {stride} bytes apart")
        if shared.blocks > 1 and stride < shared.piece_bytes:
            raise HandleError(f"pages of {shared.piece_bytes} bytes that are {stride} apart")
        if offset + (shared.blocks - 1) * stride + shared.piece_bytes > shared.handles[number].whole_bytes:
            raise HandleError("a piece beyond the memory that its handle opens")
