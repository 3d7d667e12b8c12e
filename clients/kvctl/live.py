"""Commands that go on: `top` draws what happens until somebody stops it, `events` tells it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Annotated, Final

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from kvctl import events as happenings
from kvctl import render, top, values
from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.program import NUMBER_MAX, Globals, Output, command, globals_of
from kvproto import control_pb2 as pb

KINDS: Final = ", ".join(happenings.KINDS)
_AGAIN: Final = (Exit.UNREACHABLE, Exit.TIMED_OUT)  # a daemon that is restarted comes back


@command("top", short="What the daemon does now.")
def show_top(
    context: typer.Context,
    *,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, max=3600.0, metavar="SECONDS", help="From sample to sample.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One page, of one interval.")] = False,
    count: Annotated[
        int, typer.Option("--count", "-n", min=0, metavar="N", help="So many samples; 0: until Ctrl-C.")
    ] = 0,
) -> None:
    """What the daemon does now: tiers, hit rate, bytes a second, tenants, clients.

    On a terminal a page that is drawn anew; else a line a sample, or with -o json an object a line.
    """
    chosen = globals_of(context)
    samples = _samples(chosen, interval, 1 if once else count)
    try:
        if chosen.output is Output.JSON:
            for one in samples:
                if isinstance(one, top.Figures):
                    typer.echo(render.as_json_line("top", top.body(one)))
        elif once:
            render.console().print(next(top.page(one) for one in samples if isinstance(one, top.Figures)))
        elif render.console().is_terminal:
            _draw(samples)
        else:
            for one in samples:
                typer.echo(top.line(one) if isinstance(one, top.Figures) else one)
    except KeyboardInterrupt:
        return


def _samples(chosen: Globals, interval_s: float, count: int) -> Iterator[top.Figures | str]:
    """Figures of one interval after the other; in between a sentence, while there is no daemon to ask.

    Raises KvctlError if there is none at the beginning.
    """
    given, due_s = 0, time.monotonic()
    with ExitStack() as open_clients:
        client: ControlClient | None
        client = open_clients.enter_context(chosen.connect())
        last = top.sample(client)
        while not count or given < count:
            due_s = max(due_s + interval_s, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))
            try:
                if client is None:
                    client = open_clients.enter_context(chosen.connect())
                now = top.sample(client)
            except KvctlError as error:
                if error.code not in _AGAIN:
                    raise
                open_clients.close()
                client = None
                yield str(error)
                continue
            figures, last = top.between(last, now), now
            if figures is not None:  # else another daemon has answered: rates begin anew
                given += 1
                yield figures


def _draw(samples: Iterable[top.Figures | str]) -> None:
    shown: RenderableType = Text("looking ...")
    with Live(shown, console=render.console(), screen=True, auto_refresh=False) as live:
        for one in samples:
            live.update(top.page(one) if isinstance(one, top.Figures) else Text(one, style="yellow"), refresh=True)


@command("events", short="What happened since the daemon began.")
def show_events(
    context: typer.Context,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            "-k",
            metavar="KIND",
            autocompletion=values.one_of(happenings.KINDS),
            help=f"Only these: {KINDS}. Repeatable.",
        ),
    ] = None,
    last: Annotated[
        int, typer.Option("--last", "-n", min=0, max=8192, metavar="N", help="So many at most; 0: all.")
    ] = 0,
    after: Annotated[
        int,
        typer.Option("--after", min=0, max=NUMBER_MAX, metavar="NUMBER", help="Only those with larger numbers."),
    ] = 0,
    warnings: Annotated[bool, typer.Option("--warnings", help="Only what should not be.")] = False,
) -> None:
    """What happened since the daemon began, as far as it is remembered: 1,024 events of each kind.

    With -o json one object, or with --follow an object a line.
    """
    chosen = globals_of(context)
    request = pb.WatchEventsRequest(follow=follow, kinds=kind or (), last=last, after=after, warnings=warnings)
    with chosen.connect() as client:
        said = (one for one in client.events(request) if one.warning or not warnings)  # older daemons tell of all
        try:
            if chosen.output is Output.JSON and not follow:
                typer.echo(render.as_json("events", [render.plain(event) for event in said]))
                return
            for event in said:
                if chosen.output is Output.JSON:
                    typer.echo(render.as_json_line("event", render.plain(event)))
                else:
                    happenings.tell(event, render.console())
        except KeyboardInterrupt:
            return
    if follow:
        raise KvctlError(Exit.UNREACHABLE, "the daemon ended; see its log")
