"""`kvctl events`: a line each."""

import time
from typing import Final

from rich.console import Console
from rich.text import Text

from kvctl.client import printable
from kvproto import control_pb2 as pb

__all__ = ["KINDS", "tell"]

KINDS: Final = ("daemon", "traffic", "evict", "fault", "pin", "tier", "client", "admin")


def tell(event: pb.Event, console: Console) -> None:
    """Print it; and before it, how many are missing."""
    if event.lost:
        console.print(Text(f"... {event.lost:,} events are not remembered any more", style="dim"))
    at = time.strftime("%m-%d %H:%M:%S", time.localtime(event.unix_s))
    whose = f"{printable(event.tenant)}: " if event.tenant else ""
    line = Text(f"{event.number:>6} {at} {printable(event.kind):<7} {whose}{printable(event.text)}")
    if event.warning:
        line.stylize("yellow")
    console.print(line, soft_wrap=True)
