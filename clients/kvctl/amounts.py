"""Amounts for people."""


def size(size_bytes: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    scaled = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if scaled < 1023.95 or unit == "TiB":
            break
        scaled /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{scaled:,.1f} {unit}"
