"""`kvctl evict`: room in a tier, made by what its rule would give up first; and `kvctl audit`: who did what."""

import time
from typing import Annotated, Final

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvctl import render, values
from kvctl.amounts import counted
from kvctl.asking import DryRun, Yes, ask, concerned, need_terminal
from kvctl.client import Exit, KvctlError, printable
from kvctl.program import Continuing, OfNamespace, OfTenant, command, globals_of
from kvctl.render import size
from kvctl.scope import Scope, parse
from kvproto import control_pb2 as pb
from kvproto.sizes import UNITS_SAID, parse_bytes

ACTS: Final = 512  # that the daemon remembers


@command("evict", short="Make room in a tier.")
def evict(
    context: typer.Context,
    *,
    tenant: OfTenant = None,
    namespace: OfNamespace = None,
    key: Continuing = None,
    everything: Annotated[bool, typer.Option("--all", help="Of all tenants.")] = False,
    tier: Annotated[
        str,
        typer.Option(
            metavar="TIER",
            autocompletion=values.one_of(values.TIERS),
            help="dram: what lies on disk too stays there; or disk.",
        ),
    ] = "dram",
    room: Annotated[
        str | None,
        typer.Option(
            "--bytes", metavar="BYTES", help=f"So much, beyond what is free already: 4GiB ({UNITS_SAID}). Else all."
        ),
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Make room in a tier: the longest unused blocks leave it. What is leased or pinned stays, unlike with clear.

    Exits with 1 if less than --bytes could leave.
    """
    chosen = globals_of(context)
    scope = parse(tenant, namespace, key or (), everything=everything)
    wanted = 0 if room is None else _bytes(room)
    need_terminal("evict", yes=yes, dry_run=dry_run)
    with chosen.connect() as client:
        scope = scope.resolved(client)
        if not (yes or dry_run):
            told = client.evict(_request(scope, tier, wanted, dry_run=True))
            if told.blocks:
                what = concerned(client, scope.tenant, scope.digest)
                ask(
                    "Evict them?",
                    "nothing was evicted; answer y, or give --yes, to evict",
                    _said(told, scope, tier),
                    what,
                    client=client,
                )
        report = client.evict(_request(scope, tier, wanted, dry_run=dry_run))
        parts = [_said(report, scope, tier)]
        if dry_run:
            parts.append(Text(str(concerned(client, scope.tenant, scope.digest))))
    chosen.show("evict", render.plain(report), Group(*parts))
    if report.bytes < wanted:
        raise typer.Exit(Exit.REFUSED)


@command("audit", short="Who changed what here.")
def audit(
    context: typer.Context,
    *,
    most: Annotated[int, typer.Option("--last", "-n", min=1, max=ACTS, help="So many at most.")] = 20,
) -> None:
    """Who changed what here, the newest at the end. The daemon's audit file has more."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report = client.acts(pb.ListActsRequest(most=most))
    chosen.show("audit", render.plain(report), acts(report))


def _request(scope: Scope, tier: str, wanted: int, *, dry_run: bool) -> pb.EvictRequest:
    asked = scope.request(dry_run=dry_run)
    kind = asked.WhichOneof("scope")
    assert kind is not None, "a scope always names something"
    request = pb.EvictRequest(dry_run=dry_run, tier=tier, bytes=wanted, **{kind: getattr(asked, kind)})
    if asked.HasField("tenant"):
        request.tenant = asked.tenant
    return request


def _bytes(text: str) -> int:
    try:
        found = parse_bytes(text)
    except ValueError as error:
        raise KvctlError(Exit.USAGE, f"--bytes: {error}") from None
    if not 0 < found < 1 << 63:
        raise KvctlError(Exit.USAGE, "--bytes takes a size above 0; leave it out to evict all that may go")
    return found


def _said(report: pb.EvictResponse, scope: Scope, tier: str) -> Text:
    verb = "would evict" if report.dry_run else "evicted"
    left = f"{counted(report.blocks, 'block')} from {printable(tier)}, {size(report.bytes)}"
    lines = [f"{verb} {left}: {printable(str(scope))}"]
    lost = report.blocks - report.kept_blocks
    other = "on disk" if tier == "dram" else "in memory"
    if report.blocks:
        gone = "would be gone" if report.dry_run else "gone"
        lines.append(f"of these {report.kept_blocks:,} still {other}, {lost:,} {gone}")
    if report.held_blocks:
        ends = counted(report.held_blocks, "block stays", "blocks stay")
        lines.append(f"{ends}, with all that leads there: {report.pinned_blocks:,} pinned, "
                     f"{report.held_blocks - report.pinned_blocks:,} leased or on their way")  # fmt: skip
    return Text("\n".join(lines))


def acts(report: pb.ListActsResponse) -> RenderableType:
    """`kvctl audit`."""
    if not report.acts:
        return Text("nothing was changed here yet")
    table = render._table("when\nby", "verb\nof what", ">blocks\nbytes", "outcome")  # noqa: SLF001
    for act in report.acts:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(act.unix_s))
        table.add_row(
            f"{when}\n{_who(act)}", f"{printable(act.verb)}\n{printable(act.scope)}",
            f"{act.blocks:,}\n{size(act.bytes)}", printable(act.outcome),
        )  # fmt: skip
    return table


def _who(act: pb.Act) -> str:
    if act.uid < 0:
        return printable(act.who) or "unknown"
    return f"uid {act.uid} pid {act.pid}"
