"""`kvctl events`: a line each."""

import textwrap
import time
from typing import Final

from rich.console import Console
from rich.text import Text

from kvctl.client import printable
from kvctl.fitting import width_of
from kvproto import control_pb2 as pb

NARROW: Final = 72  # columns; below that, neither numbers nor dates are told
__all__ = ["KINDS", "tell"]

KINDS: Final = ("daemon", "traffic", "evict", "fault", "pin", "tier", "client", "admin")


def tell(event: pb.Event, console: Console) -> None:
    """Print it; and before it, how many are missing."""
    if event.lost:
        most = "at most " if event.lost_at_most else ""
        console.print(Text(f"... {most}{event.lost:,} events are not remembered any more", style="dim"))
    width = width_of(console)
    narrow = width is not None and width < NARROW
    at = time.strftime("%H:%M:%S" if narrow else "%m-%d %H:%M:%S", time.localtime(event.unix_s))
    whose = f"{printable(event.tenant)}: " if event.tenant else ""
    begin = f"{at} {printable(event.kind):<7} " if narrow else f"{event.number:>6} {at} {printable(event.kind):<7} "
    text = begin + whose + printable(event.text)
    if width is not None:  # below itself, where it is longer than a line
        text = textwrap.fill(text, max(width, len(begin) + 10), subsequent_indent=" " * len(begin))
    line = Text(text)
    if event.warning:
        line.stylize("yellow")
    console.print(line, soft_wrap=True)
