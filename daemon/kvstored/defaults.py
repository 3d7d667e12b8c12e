"""What is said of defaults, in help and manual pages: the same on every host."""

from pathlib import Path
from typing import Any

from kvstored.settings import Basis, Setting


def default_words(setting: Setting[Any]) -> str:
    """One sentence."""
    small = Basis({"HOME": "/a"}, 1 << 33, 2, 1 << 30, 1 << 24, 1 << 34, runtime_dir=Path("/a/run"))
    large = Basis({"HOME": "/b"}, 1 << 40, 64, 1 << 38, 1 << 30, 1 << 43, runtime_dir=Path("/b/run"))
    one, other = (setting.default(basis) for basis in (small, large))
    if (one, other) == (small.runtime_dir, large.runtime_dir):
        return "Default: $STATE_DIRECTORY, which systemd sets, else the runtime directory."
    if one != other:
        return "Default: by the host, see kvctl config."
    shown = setting.kind.show(one)
    return f"Default: {shown}." if shown else "Default: none."
