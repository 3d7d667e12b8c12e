"""Commands that change something: what is kept, for whom, by which rule; and the service itself."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from kvctl import insight, pins, render, service, values
from kvctl import quotas as quota_tables
from kvctl.asking import Concerned, DryRun, Yes, ask, concerned, need_terminal
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.program import (
    Continuing,
    Digest,
    Extra,
    Globals,
    Keys,
    OfNamespace,
    OfTenant,
    OnlyTier,
    Owner,
    Tokens,
    command,
    globals_of,
    policy_app,
    service_app,
)  # fmt: skip
from kvctl.render import size
from kvctl.scope import Scope, parse
from kvctl.scrub import follow, parse_rate
from kvproto import control_pb2 as pb
from kvproto.sizes import UNITS_SAID


@command("quota", usage=quota_tables.USAGE, short="What tenants are promised, and may have at most.")
def quota(
    context: typer.Context,
    tenant: quota_tables.Tenant = None,
    words: quota_tables.Words = None,
    *,
    yes: Yes = False,
    dry_run: quota_tables.DryRun = False,
) -> None:
    """What tenants are promised of memory and disk, and the most that they may have.

    A change is of the keys that are named. It counts from the next allocation on, holds over warm restarts and wins
    over the configuration, until a cold start; all other keys follow the configuration. `reset` goes back to it, for
    the keys that are named or for all. What takes something from any tenant, as a larger guarantee may from others,
    is shown and asked about first. Where a later configuration leaves no room for a chosen guarantee, that one goes,
    the last first, and `kvctl status` says so.
    """
    chosen = globals_of(context)
    request = quota_tables.wish(tenant, words or (), dry_run=dry_run)
    with chosen.connect() as client:
        if request is None:
            reports = client.quotas(pb.GetQuotasRequest(tenant=tenant)).quotas
            chosen.show("quotas", [render.plain(one) for one in reports], quota_tables.quotas(reports))
        else:
            cut = [] if yes and not dry_run else _cuts(client, request)
            if cut and not dry_run:
                need_terminal("cut the quota", yes=yes, dry_run=dry_run)
                ask("Change it?", "the quota stays; answer y, or give --yes, to change it", *cut, client=client)
            report = client.set_quota(request)
            below = cut[1:] if dry_run else []
            chosen.show("quota", render.plain(report), Group(quota_tables.quota_changes(report), *below))


@command("clear", short="Drop blocks of a tenant, a namespace or a prefix.")
def clear(
    context: typer.Context,
    *,
    tenant: OfTenant = None,
    namespace: OfNamespace = None,
    key: Continuing = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything, of all tenants.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Drop blocks: all, a tenant's, a namespace's or a prefix's.

    Shows what it will drop, then asks. Leased blocks leave the index at once; their memory follows when the last
    reader is done. What lies in the remote tier is removed by and by, whoever wrote it: with --all for all hosts.
    """
    chosen = globals_of(context)
    scope = parse(tenant, namespace, key or (), everything=everything)
    need_terminal("clear", yes=yes, dry_run=dry_run)
    with chosen.connect() as client:
        scope = scope.resolved(client)
        if not (yes or dry_run):
            told = client.clear(scope.request(dry_run=True))
            if told.blocks or told.pending_blocks or told.HasField("remote_objects"):
                what = _holders(client, scope)
                untouched = "nothing was dropped; answer y, or give --yes, to clear"
                ask("Drop them?", untouched, render.clearing(told, str(scope)), *what, client=client)
        report = client.clear(scope.request(dry_run=dry_run))
        parts = [render.clearing(report, str(scope))]
        if dry_run:
            parts += [Text(str(one)) for one in _holders(client, scope)]
    chosen.show("clear", render.plain(report), Group(*parts))


def _holders(client: ControlClient, scope: Scope) -> list[Concerned]:
    """Who holds some of what a scope names; nobody where only the remote tier may know of it."""
    try:
        return [concerned(client, scope.tenant, scope.digest)]
    except KvctlError as error:
        if error.code is not Exit.NOT_FOUND:
            raise
        return []


@command("drain", short="Refuse new blocks from now on.")
def drain(context: typer.Context, *, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Refuse new blocks from now on; stored ones are still served."""
    chosen = globals_of(context)
    need_terminal("drain", yes=yes, dry_run=dry_run)
    with chosen.connect() as client:
        status, what = client.status(), concerned(client)
        if dry_run:
            text = "draining already" if status.draining else "would refuse new blocks; stored ones are served"
            chosen.show("draining", status.draining, Text(f"{text}\n{what}"))
            return
        if not (yes or status.draining):
            untouched = "new blocks are taken as before; answer y, or give --yes, to drain"
            ask("Refuse new blocks?", untouched, what, client=client)
        client.drain(on=True)
    chosen.show("draining", True, Text("draining: new blocks are refused, stored ones are served"))


@command("undrain")
def undrain(context: typer.Context) -> None:
    """Take new blocks again."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        client.drain(on=False)
    chosen.show("draining", False, Text("serving: new blocks are taken again"))


@command("scrub")
def scrub(
    context: typer.Context,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay until it is done; exit with 1 if it found damage.")
    ] = False,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help=f"A second at most: 100MiB ({UNITS_SAID}); 0: as fast as it goes. Else the tier's scrub_rate.",
        ),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Start nothing: say how far it is.")] = False,
    tier: Annotated[
        str,
        typer.Option(
            metavar="TIER",
            autocompletion=values.one_of(values.TIERS),
            help="disk, or dram: what clients in mode direct have changed.",
        ),
    ] = "disk",
) -> None:
    """Read and verify all that lies in a tier. What is not what was stored becomes a miss."""
    chosen = globals_of(context)
    if status and rate is not None:
        raise KvctlError(Exit.USAGE, "--status starts nothing, so that --rate means nothing; leave one of them out")
    wished = None if rate is None else parse_rate(rate)
    request = pb.ScrubRequest(start=not status, rate_bytes_per_s=wished, tier=tier)
    with chosen.connect() as client:
        report = client.scrub(request)
        if wait:
            report = follow(client, report, tier)
    chosen.show("scrub", render.plain(report), render.scrub(report, tier))
    if wait and report.damaged:
        raise typer.Exit(Exit.REFUSED)


@command("pin")
def pin(
    context: typer.Context,
    key: Keys = None,
    *,
    tokens: Tokens = None,
    extra: Extra = "",
    namespace: Digest = None,
    tenant: Owner = None,
    ttl: Annotated[pins.Retention, typer.Option(help="How long: five minutes or an hour.")] = pins.Retention.ONE_HOUR,
    on_disk: Annotated[bool, typer.Option("--on-disk", help="Wherever it lies will do; otherwise in memory.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="A use begins the time anew.")] = False,
) -> None:
    """Keep a prefix for a while, within its tenant's budget. `kvctl pins` lists what is kept."""
    chosen = globals_of(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        answers = pins.pin(client, chain, ttl.seconds, on_disk=on_disk, refresh=refresh)
    chosen.show("pin", {"pins": [render.plain(one) for one in answers]}, pins.pinned(answers))
    if not any(one.blocks for one in answers):
        raise typer.Exit(Exit.REFUSED)


@command("unpin")
def unpin(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", autocompletion=values.tenants, help="Whose pins.")],
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="PIN", autocompletion=values.pins, help="As `kvctl pins` lists them.")
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All pins of the tenant.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """End pins of a tenant. What they kept stays until something else needs the room.

    Exits with 4 if the tenant has no such pins; those that it has are ended.
    """
    chosen = globals_of(context)
    if tenant.isdecimal() and not numbers and not every:
        raise KvctlError(Exit.USAGE, f"whose pin {printable(tenant)}? Say `kvctl unpin TENANT {printable(tenant)}`")
    if bool(numbers) == every:
        raise KvctlError(Exit.USAGE, "name pins, or say --all; kvctl pins lists them")
    if any(not 0 < number < 1 << 64 for number in numbers or ()):
        raise KvctlError(Exit.USAGE, "a pin is a number from 1 to 2^64 - 1; kvctl pins lists them")
    need_terminal("unpin", yes=yes, dry_run=dry_run)
    with chosen.connect() as client:
        what = concerned(client, tenant, numbers=numbers or ())
        if dry_run:
            report = pb.UnpinResponse(ended=what.pins, unknown=() if what.more else what.missing)
        else:
            if what.pins and not yes:
                ask("End them?", "no pin was ended; answer y, or give --yes, to unpin", what, client=client)
            report = client.unpin(pb.UnpinRequest(tenant=tenant, pins=numbers or ()))
    pins_said = f"{report.ended:,} pin{'' if report.ended == 1 else 's'}"
    text = f"would end {pins_said}, {size(what.pinned_bytes)}\n{what}" if dry_run else f"{pins_said} ended"
    chosen.show("unpin", {**render.plain(report), "dry_run": dry_run}, Text(text))
    if report.unknown:
        raise KvctlError(Exit.NOT_FOUND, pins.unknown(tenant, report.unknown))


@command("prefetch", short="Have a prefix read from disk into memory.")
def prefetch(
    context: typer.Context,
    key: Keys = None,
    *,
    tokens: Tokens = None,
    extra: Extra = "",
    namespace: Digest = None,
    tenant: Owner = None,
    within: Annotated[float, typer.Option(min=0.001, max=3600, help="Seconds; what is late does not come.")] = 60.0,
) -> None:
    """Have a prefix read from disk into memory, as long as no client waits for reads."""
    chosen = globals_of(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        report = pins.prefetch(client, chain, within)
    text = f"{report.there:,} blocks are in memory, {report.coming:,} are to come"
    chosen.show("prefetch", render.plain(report), Text(text))


@command("set", on=policy_app)
def set_policy(
    context: typer.Context,
    rule: Annotated[
        str,
        typer.Argument(
            metavar="RULE",
            autocompletion=values.one_of(values.RULES),
            help="lru, second_touch, pgdsf, lfu, s3fifo, arc or density.",
        ),
    ],
    *,
    tier: OnlyTier = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=values.tenants,
            help="Only this tenant's blocks. Else all without a rule of their own.",
        ),
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Evict by another rule from now on. Asks if blocks go by another one then.

    It holds over warm restarts and wins over the configuration, until a cold start.
    """
    _choose_policy(
        globals_of(context), pb.SetPolicyRequest(tier=tier, tenant=tenant, rule=rule), yes=yes, dry_run=dry_run
    )


@command("reset", on=policy_app)
def reset_policy(
    context: typer.Context,
    tenant: Annotated[
        str | None,
        typer.Argument(metavar="TENANT", autocompletion=values.tenants, help="Only this one's own rule. Else all."),
    ] = None,
    *,
    tier: OnlyTier = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Go back to the configured rules, or for one tenant to the rule of all. Asks if blocks go by another one then."""
    request = pb.SetPolicyRequest(tier=tier, tenant=tenant, reset=True)
    _choose_policy(globals_of(context), request, yes=yes, dry_run=dry_run)


def _choose_policy(chosen: Globals, request: pb.SetPolicyRequest, *, yes: bool, dry_run: bool) -> None:
    trial = pb.SetPolicyRequest()
    trial.CopyFrom(request)
    trial.dry_run = True
    with chosen.connect() as client:
        what: list[Concerned] = []
        if dry_run or not yes:
            told = client.set_policy(trial)
            if any(change.policy.blocks and change.policy.rule != change.former_rule for change in told.changes):
                what = [concerned(client, request.tenant if request.HasField("tenant") else None)]
        if what and not dry_run:
            need_terminal("choose another rule", yes=yes, dry_run=dry_run)
            untouched = "the rule stays; answer y, or give --yes, to choose another one"
            ask("Evict by it?", untouched, render.policy_changes(told), *what, client=client)
        report = told if dry_run else client.set_policy(request)
        below = map(Text, map(str, what)) if dry_run else ()
    chosen.show("policy", render.plain(report), Group(render.policy_changes(report), *below))


@command("install", on=service_app)
def install_service(
    context: typer.Context,
    *,
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A folder of the disk tier, to be made writable beside those that are. Repeatable.",
        ),
    ] = None,
    no_disk: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="One that shall not be writable any more; what is in it stays. Repeatable."),
    ] = None,
    opening: Annotated[
        list[service.Opening] | None,
        typer.Option(
            "--with",
            metavar="gpu|network|direct",
            help="What the unit keeps shut: GPUs, other hosts, or mode direct before Linux 6.9. Repeatable.",
        ),
    ] = None,
    start: Annotated[bool, typer.Option("--now", help="Enable and (re)start it, too; memory is kept.")] = False,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For packages: below this folder, and run nothing.")
    ] = None,
    daemon: Annotated[Path | None, typer.Option(metavar="PATH", help="Else the kvstored beside this kvctl.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Put units, user, folders and configuration in place. Once more after an upgrade.

    Configuration, drop-ins and folders of disk that are there are kept; units are replaced: what this host wants
    otherwise belongs into a drop-in.
    """
    chosen = globals_of(context)
    done = service.install(
        root=root,
        daemon=daemon,
        disks=disk or (),
        no_disks=no_disk or (),
        openings=opening or (),
        start=start,
        dry_run=dry_run,
    )
    chosen.show("service", *service.shown(*done, dry_run=dry_run))


def _cuts(client: ControlClient, request: pb.SetQuotaRequest) -> list[Text]:
    """What is shown where any tenant would lose what it has, or is promised; else nothing. Raises KvctlError."""
    trial = pb.SetQuotaRequest()
    trial.CopyFrom(request)
    trial.dry_run = True
    told = client.set_quota(trial)
    cuts = quota_tables.cuts(told, {one.name: one for one in client.tenants().tenants})
    if not cuts:
        return []
    shown = [quota_tables.quota_changes(told)]
    for name, lines in cuts.items():
        whose = "" if name == request.tenant else f"{printable(name)}, "
        what = [*lines, str(_concerned(client, name))]
        shown.append(Text("\n".join(f"{whose}{line}" for line in what)))
    return shown


def _concerned(client: ControlClient, tenant: str) -> Concerned:
    """Nothing of one that is configured and has not come yet."""
    try:
        return concerned(client, tenant)
    except KvctlError as error:
        if error.code is not Exit.NOT_FOUND:
            raise
        return Concerned(pins=0, pinned_bytes=0, leases=0, clients=0, more=False)
