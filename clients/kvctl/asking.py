"""Before something is taken away: what is concerned is shown, and somebody is asked.

--dry-run    shows, and changes nothing
--yes        does not ask
neither      asks, on a terminal; elsewhere the command is refused before anything is done
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvctl.amounts import counted
from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.render import console, size
from kvproto import control_pb2 as pb

__all__ = ["Concerned", "DryRun", "Yes", "ask", "concerned", "need_terminal"]

Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")]

PINS_LISTED: Final = 512  # by the daemon


@dataclass(frozen=True, slots=True)
class Concerned:
    """What a command would take something away from, beside blocks."""

    pins: int
    pinned_bytes: int  # what several pins cover counts for each
    leases: int
    clients: int
    more: bool  # there are more pins than the daemon lists
    pinned_blocks: int = 0  # what several pins cover counts for each; 0 where more pins cover some than are listed
    missing: tuple[int, ...] = ()  # of the pins that were named, those that are not listed

    def __str__(self) -> str:
        least = "at least " if self.more else ""
        held = f" in {counted(self.pinned_blocks, 'block')}" if self.pinned_blocks else ""
        pins = f"{least}{counted(self.pins, 'pin')} ({size(self.pinned_bytes)}{held})"
        leases = counted(self.leases, "running lease")
        return f"concerned: {pins}, {leases}, {counted(self.clients, 'client')}"


def concerned(
    client: ControlClient, tenant: str | None = None, digest: str | None = None, numbers: Collection[int] = ()
) -> Concerned:
    """Pins and leases of a tenant (None: of all); of one namespace its pins, or only those with these `numbers`.

    Leases are not told apart by namespace. Raises KvctlError.
    """
    listed = client.pins(pb.ListPinsRequest(tenant=tenant))
    pins = [
        pin
        for pin in listed.pins
        if digest in (None, pin.namespace_digest) and (not numbers or pin.pin in numbers)
    ]  # fmt: skip
    sessions = [one for one in client.clients().clients if tenant in (None, one.tenant)]
    whole = digest is None and not numbers
    return Concerned(
        pins=listed.pins_total if whole else len(pins),
        pinned_bytes=sum(one.used_bytes for one in listed.budgets) if whole else sum(pin.bytes for pin in pins),
        leases=sum(one.leases for one in sessions),
        clients=len(sessions),
        more=not whole and listed.pins_total > len(listed.pins),
        pinned_blocks=0 if listed.pins_total > len(listed.pins) else sum(pin.blocks for pin in pins),
        missing=tuple(number for number in dict.fromkeys(numbers) if number not in {pin.pin for pin in pins}),
    )


def need_terminal(what: str, *, yes: bool, dry_run: bool, look: str = "--dry-run") -> None:
    """Raises KvctlError with USAGE where nobody could be asked. `look`: what shows without changing anything."""
    if not (yes or dry_run or sys.stdin.isatty()):
        raise KvctlError(Exit.USAGE, f"there is no terminal to ask on; give --yes to {what}, or {look} to look")


def ask(question: str, untouched: str, *shown: RenderableType | Concerned, client: ControlClient | None = None) -> None:
    """Show what is concerned, and whose it is (`client`: of which daemon), and ask.

    Without a yes, raises KvctlError with REFUSED that says what is `untouched`.
    """
    parts: list[RenderableType] = [] if client is None else [Text(f"daemon: {client.daemon}", overflow="fold")]
    parts += [Text(str(one)) if isinstance(one, Concerned) else one for one in shown]
    console(stderr=True).print(Group(*parts))
    typer.echo(f"{question} [y/N] ", err=True, nl=False)  # typer.confirm would write to stdout, where answers go
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise KvctlError(Exit.REFUSED, untouched)
