"""Amounts for people."""


def size(size_bytes: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    scaled = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if scaled < 1023.95 or unit == "TiB":
            break
        scaled /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{scaled:,.1f} {unit}"


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A number of things: `1 block`, `2,000 blocks`; `nouns` where more of them are not called so with an s."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def span(seconds: float) -> str:
    """A length of time for people, in its two largest units: `3 h 12 min`."""
    whole = int(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{whole} s"
