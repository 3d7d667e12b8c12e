"""`kvctl scrub`: have all that lies in a tier read and verified, and watch."""

import time
from typing import Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.render import console, size
from kvproto import control_pb2 as pb
from kvproto.sizes import parse_bytes, quoted

__all__ = ["follow", "parse_rate"]

PAUSE_S: Final = 0.5  # between two looks
LINE_S: Final = 10.0  # between two lines of progress, where there is no terminal to draw a bar on
RATE_MAX: Final = 1 << 62  # bytes a second; the daemon takes far less


def parse_rate(text: str) -> int:
    """Bytes a second of "100MiB", "100MiB/s" or "104857600"; 0 for no limit. Raises KvctlError."""
    try:
        rate = parse_bytes(text.strip().removesuffix("/s"))
    except ValueError:
        rate = -1
    if not 0 <= rate <= RATE_MAX:
        what = "--rate takes bytes a second, such as 100MiB, or 0 for no limit"
        raise KvctlError(Exit.USAGE, f"{quoted(text)} is not a rate; {what}")
    return rate


def follow(client: ControlClient, report: pb.ScrubResponse, tier: str = "disk") -> pb.ScrubResponse:
    """Wait for the end of a scrub of a tier; stderr shows how far it is: a bar on a terminal, else a line now and then.

    Raises KvctlError, also if another one takes its place: nobody then knows what this one would have found.
    """
    begun_s = report.started_unix_s
    with _bar() as progress:
        task = progress.add_task("scrub", total=None, read="", damaged="")
        next_line_s = time.monotonic() + LINE_S
        while True:
            damaged = f"{report.damaged:,} damaged" if report.damaged else ""
            progress.update(
                task,
                completed=report.done_blocks,
                total=max(report.total_blocks, report.done_blocks),
                read=size(report.done_bytes),
                damaged=damaged,
            )
            if not report.running:
                return report
            if progress.disable and time.monotonic() >= next_line_s:
                next_line_s += LINE_S
                typer.echo(_line(report), err=True)
            try:
                time.sleep(PAUSE_S)
            except KeyboardInterrupt:
                text = "no longer waiting; the scrub goes on: see `kvctl scrub --status`"
                raise KvctlError(Exit.REFUSED, text) from None
            report = client.scrub(pb.ScrubRequest(tier=tier))
            if report.started_unix_s != begun_s:
                text = "another scrub has taken the place of this one; follow it with `kvctl scrub --status --wait`"
                raise KvctlError(Exit.REFUSED, text)


def _line(report: pb.ScrubResponse) -> str:
    damaged = f", {report.damaged:,} damaged" if report.damaged else ""
    return f"scrub: {report.done_blocks:,} of {report.total_blocks:,} blocks, {size(report.done_bytes)}{damaged}"


def _bar() -> Progress:
    shown = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[read]}"),
        TextColumn("{task.fields[damaged]}"),
        TimeRemainingColumn(),
        console=shown,
        disable=not shown.is_terminal,
        transient=True,
    )
