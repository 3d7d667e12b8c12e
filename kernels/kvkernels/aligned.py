"""Memory that begins on a page boundary, as O_DIRECT wants it."""

from typing import Final

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

PAGE_BYTES: Final = 4096


def aligned(buffer_bytes: int) -> Bytes:
    """A buffer of whole pages, at least `buffer_bytes`; what it holds is not defined. Raises MemoryError."""
    whole_bytes = pages(buffer_bytes)
    whole = np.empty(whole_bytes + PAGE_BYTES, dtype=np.uint8)
    start = -whole.ctypes.data % PAGE_BYTES
    return whole[start : start + whole_bytes]


def pages(length_bytes: int) -> int:
    """`length_bytes` rounded up to whole pages, in bytes."""
    return -(-length_bytes // PAGE_BYTES) * PAGE_BYTES
