"""What the settings of the control socket are written in."""

import grp
import re
from typing import Final

from kvproto.sizes import quoted
from kvstored.units import Kind

NO_GROUP: Final = "none"
_GROUP: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?")  # as useradd(8) has it


def group_kind() -> Kind[str]:
    """Names of groups that this host knows; "none", or nothing, for no group."""

    def parse(text: str) -> str:
        if text in ("", NO_GROUP):
            return NO_GROUP
        if _GROUP.fullmatch(text) is None:
            raise ValueError(f"{quoted(text)} is not the name of a group")
        group_of(text)
        return text

    return Kind(parse, str, (str,), "the name of a group", f"a group of this host, or {NO_GROUP}")


def group_of(name: str) -> int | None:
    """The number of a group; None for no group. Raises ValueError for one that this host does not know."""
    if name == NO_GROUP:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f"this host has no group {quoted(name)}") from None
