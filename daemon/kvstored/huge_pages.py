"""How much of this process's shared memory is mapped in huge pages, as the kernel says. Any thread."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

SMAPS: Final = Path("/proc/self/smaps")
LINE_BYTES: Final = 8192  # of it: a path of 4 KiB, and what stands before that

_MAP: Final = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")
_HUGE: Final = re.compile(rb"ShmemPmdMapped: +(\d+) kB")


def huge_bytes_of(maps: Sequence[tuple[int, int]], smaps: Path = SMAPS) -> list[int]:
    """Bytes in huge pages of each map (address, bytes); zeros where the kernel does not say.

    It walks the page tables of the whole process: a millisecond for each GiB in small pages. Ask once for many maps.
    """
    found = dict.fromkeys(maps, 0)
    starts = {address: (address, map_bytes) for address, map_bytes in maps}
    try:
        with smaps.open("rb") as file:
            for start, huge_bytes in _huge_maps(iter(lambda: file.readline(LINE_BYTES), b"")):
                if start in starts:  # an arena has one map of its own
                    found[starts[start]] = huge_bytes
    except OSError:
        pass
    return [found[one] for one in maps]


def _huge_maps(lines: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """Address and bytes in huge pages of each map that has any. Line by line, so that other threads run meanwhile."""
    start = 0
    for line in lines:
        if beginning := _MAP.match(line):
            start = int(beginning[1], 16)
        elif (held := _HUGE.match(line)) and held[1] != b"0":
            yield start, int(held[1]) * 1024
