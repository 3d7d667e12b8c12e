"""Sizes and durations as operators write and read them: in the configuration, its environment and flags, for kvctl.

    KiB, MiB, GiB, TiB    powers of 1,024; so are bare K, M, G, T
    kB, MB, GB, TB        powers of 1,000
    B, or nothing         bytes

One parser for all of them, so that a size means the same wherever it is written.
"""

import re
from fractions import Fraction
from typing import Final

from kvproto.limits import GIB, KIB, MIB

# Binary units ascend, for `format_bytes`.
BINARY_UNITS: Final = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": KIB * GIB}
BYTE_UNITS: Final = (
    BINARY_UNITS
    | {"K": KIB, "M": MIB, "G": GIB, "T": KIB * GIB}
    | {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
)
SECOND_UNITS: Final = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
UNITS_SAID: Final = "1K is 1KiB, 1,024 bytes; 1kB is 1,000; so with M, G and T"  # for help

# A number and a unit. Eighteen digits hold any size that fits a signed 64-bit file offset, and convert cheaply.
_QUANTITY: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "1GiB", "1.5 MB" or "4096" (no unit means bytes).

    Case counts, but for kB: "Gib" is a gigabit to some, a typing error to others. Raises ValueError with a reason fit
    for an operator.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{quoted(text)} is not a size; write a number and a unit, such as "1GiB"')
    unit_bytes = BYTE_UNITS.get(match[2] or "B")
    if unit_bytes is None:
        raise ValueError(f"{quoted(match[2])} is not a unit of size; one of {', '.join(BYTE_UNITS)}")
    size_bytes = Fraction(match[1]) * unit_bytes
    if size_bytes.denominator != 1:
        raise ValueError(f"{quoted(text)} is not a whole number of bytes")
    return size_bytes.numerator


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as "500ms", "30s", "5m" or "1h"; a unit is needed. Raises ValueError."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{quoted(text)} is not a duration; write a number and a unit, such as "30s"')
    unit_s = SECOND_UNITS.get(match[2])
    if unit_s is None:
        raise ValueError(f"{quoted(match[2])} is not a unit of time; one of {', '.join(SECOND_UNITS)}")
    return float(Fraction(match[1]) * unit_s)


def format_bytes(size_bytes: int) -> str:
    """The size in the largest binary unit that shows it exactly: 67108864 is "64MiB", 1000 is "1000B"."""
    fitting = [unit for unit, unit_bytes in BINARY_UNITS.items() if size_bytes % unit_bytes == 0]
    unit = fitting[-1] if size_bytes else "B"
    return f"{size_bytes // BINARY_UNITS[unit]}{unit}"


def quoted(text: str) -> str:
    """Text of an operator as it appears in a message: on one line, escaped, and not endless."""
    return repr(text if len(text) <= 64 else f"{text[:61]}...")
