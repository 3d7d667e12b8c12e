"""The commands of kvctl.

Exit codes:

     0  done
     1  refused: by the daemon, or by you at the prompt; doctor: a check failed; scrub --wait: found damage
     2  usage: the command line is wrong, or a clear was neither confirmed nor told --yes
     3  no daemon is reachable
     4  no such tenant or namespace
     5  timed out
    78  configuration: the runtime directory can never hold a socket

Answers go to stdout, as tables or (-o json) as one object with "version": 1; questions and errors to stderr. The
options before the command may also be written after it.
"""

import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Final, ParamSpec, TypeAlias

import typer
from rich.console import RenderableType
from rich.text import Text

from kvctl import costs as cost_tables
from kvctl import hints, insight, pins, render, service
from kvctl import quotas as quota_tables
from kvctl.client import ControlClient, Exit, KvctlError, find_socket
from kvctl.doctor import Check, DaemonFacts, Verdict, examine
from kvctl.host import Host, LinuxHost, Listener, package_version
from kvctl.scope import PREFIX_DIGITS, Scope, parse
from kvctl.scrub import follow, parse_rate
from kvproto import control_pb2 as pb
from kvproto.sizes import UNITS_SAID

__all__ = ["app", "globals_first", "main"]

P = ParamSpec("P")

app = typer.Typer(
    name="kvctl",
    help="Watch and steer a kvstored daemon.",
    epilog="Exit codes: 0 done, 1 refused or (doctor) a check failed or (scrub --wait) damage was found, 2 usage, "
    "3 no daemon reachable, 4 no such tenant or namespace, 5 timed out, 78 configuration.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


policy_app = typer.Typer(rich_markup_mode=None)
app.add_typer(policy_app, name="policy")
service_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The daemon as a service of systemd.")
app.add_typer(service_app, name="service")


class Output(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Globals:
    """The options before the command."""

    runtime_dir: Path | None
    output: Output
    timeout_s: float

    def socket(self) -> Path:
        """Where the daemon should be. Raises KvctlError."""
        return find_socket(self.runtime_dir, os.environ, Path.home())

    def connect(self) -> ControlClient:
        """A client to use in a `with`. Raises KvctlError."""
        return ControlClient(self.socket(), self.timeout_s)

    def show(self, name: str, body: render.Json, table: RenderableType) -> None:
        """Print an answer to stdout."""
        if self.output is Output.JSON:
            typer.echo(render.as_json(name, body))
        else:
            render.console().print(table)


# What several commands take: a chain, in a namespace of a tenant; or a tenant alone.
Keys: TypeAlias = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys of a chain in hex, the first block first.")
]
Tokens: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Instead of keys: a JSON list of token ids; - for stdin.")
]
Extra: TypeAlias = Annotated[
    str, typer.Option(metavar="HEX", help="What else the keys depend on, as given to block_keys.")
]
Digest: TypeAlias = Annotated[
    str | None, typer.Option(metavar="DIGEST", help=f"Its digest, or {PREFIX_DIGITS} or more of its first digits.")
]
Owner: TypeAlias = Annotated[str | None, typer.Option(metavar="NAME", help="Whose namespace it is.")]
OnlyOf: TypeAlias = Annotated[str | None, typer.Option(metavar="NAME", help="Only this tenant's.")]

# Written before the command or after it: name, and whether a value follows.
_GLOBAL_OPTIONS: Final = {"--runtime-dir": True, "-o": True, "--output": True, "--timeout": True, "--version": False}


def main() -> None:
    """The console script."""
    app(args=globals_first(sys.argv[1:]), prog_name="kvctl")


def globals_first(arguments: Sequence[str]) -> list[str]:
    """The command line with the global options moved to its front, where the parser wants them."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif _GLOBAL_OPTIONS.get(word):
            front += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word.partition("=")[0] in _GLOBAL_OPTIONS or re.match("-o.", word):
            front.append(word)
        else:
            rest.append(word)
    return front + rest


def reporting(function: Callable[P, None]) -> Callable[P, None]:
    """The same, but a KvctlError becomes a sentence on stderr and an exit code."""

    @wraps(function)
    def reported(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            function(*arguments, **options)
        except KvctlError as error:
            typer.echo(f"kvctl: {error}", err=True)
            raise typer.Exit(error.code) from None

    return reported


def command(name: str, on: typer.Typer = app) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Registers a command that is `reporting`."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        return on.command(name)(reporting(function))

    return register


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvctl {package_version('kvstored')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    runtime_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="KVSTORED_RUNTIME_DIR",
            metavar="DIR",
            help="The daemon's directory. Else /run/kvstored, $XDG_RUNTIME_DIR/kvstored or "
            "~/.local/state/kvstored/run, whichever has a control.sock.",
        ),
    ] = None,
    output: Annotated[Output, typer.Option("-o", "--output", help="For people, or one JSON object.")] = Output.TABLE,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.01, max=3600.0, metavar="SECONDS", help="The longest wait.")
    ] = 10.0,
    version: Annotated[  # noqa: ARG001  its callback does the work
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Watch and steer a kvstored daemon."""
    context.obj = Globals(runtime_dir, output, timeout_s)


@command("status")
def status(context: typer.Context) -> None:
    """The daemon on one page: tiers, tenants, warnings."""
    chosen = _globals(context)
    with chosen.connect() as client:
        report = client.status()
    chosen.show("status", render.plain(report), cost_tables.below(render.status(report), report.tenants))


@command("stats")
def stats(context: typer.Context) -> None:
    """Counters since the daemon started."""
    chosen = _globals(context)
    with chosen.connect() as client:
        report, whose = client.statistics().counters, client.tenants().tenants
    chosen.show("counters", render.plain(report), cost_tables.below(render.counters(report), whose))


@command("namespaces")
def namespaces(context: typer.Context) -> None:
    """Namespaces that hold blocks or that a client has open."""
    chosen = _globals(context)
    with chosen.connect() as client:
        reports = client.namespaces().namespaces
    chosen.show("namespaces", [render.plain(one) for one in reports], render.namespaces(reports))


@command("tenants")
def tenants(context: typer.Context) -> None:
    """Tenants: what each has of memory and disk, and may have."""
    chosen = _globals(context)
    with chosen.connect() as client:
        reports = client.tenants().tenants
    chosen.show("tenants", [render.plain(one) for one in reports], quota_tables.tenants(reports))


@command("quota")
def quota(
    context: typer.Context,
    tenant: quota_tables.Tenant = None,
    words: quota_tables.Words = None,
    *,
    dry_run: quota_tables.DryRun = False,
) -> None:
    """What tenants are promised of memory and disk, and the most that they may have.

    A change counts from the next allocation on, holds over warm restarts and wins over the configuration, until a cold
    start. `reset` goes back to the configuration.
    """
    chosen = _globals(context)
    request = quota_tables.wish(tenant, words or (), dry_run=dry_run)
    with chosen.connect() as client:
        if request is None:
            reports = client.quotas(pb.GetQuotasRequest(tenant=tenant)).quotas
            chosen.show("quotas", [render.plain(one) for one in reports], quota_tables.quotas(reports))
        else:
            report = client.set_quota(request)
            chosen.show("quota", render.plain(report), quota_tables.quota_changes(report))


@command("clients")
def clients(context: typer.Context) -> None:
    """Connected clients."""
    chosen = _globals(context)
    with chosen.connect() as client:
        reports = client.clients().clients
    chosen.show("clients", [render.plain(one) for one in reports], render.clients(reports))


@command("config")
def config(context: typer.Context) -> None:
    """Every setting with its origin."""
    chosen = _globals(context)
    with chosen.connect() as client:
        settings = client.config().settings
    chosen.show("config", [render.plain(one) for one in settings], render.config(settings))


@command("clear")
def clear(
    context: typer.Context,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only what this tenant holds.")] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST", help=f"Only this namespace: its digest, or {PREFIX_DIGITS} or more of its first digits."
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX", help="Only blocks that continue this key, itself included. Repeatable."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything, of all tenants.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be dropped, and drop nothing.")] = False,
) -> None:
    """Drop blocks: all, a tenant's, a namespace's or a prefix's.

    Shows what it will drop, then asks. Leased blocks leave the index at once; their memory follows when the last
    reader is done.
    """
    chosen = _globals(context)
    scope = parse(tenant, namespace, key or (), everything=everything)
    if not (yes or dry_run or sys.stdin.isatty()):
        raise KvctlError(Exit.USAGE, "there is no terminal to ask on; give --yes to clear, or --dry-run to look")
    with chosen.connect() as client:
        scope = scope.resolved(client)
        if not (yes or dry_run):
            _confirm(client.clear(scope.request(dry_run=True)), scope)
        report = client.clear(scope.request(dry_run=dry_run))
    chosen.show("clear", render.plain(report), render.clearing(report, str(scope)))


@command("drain")
def drain(context: typer.Context) -> None:
    """Refuse new blocks from now on; stored ones are still served."""
    _drain(_globals(context), on=True)


@command("undrain")
def undrain(context: typer.Context) -> None:
    """Take new blocks again."""
    _drain(_globals(context), on=False)


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
            help=f"A second at most: 100MiB ({UNITS_SAID}); 0: as fast as it goes. Else disk.scrub_rate.",
        ),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Start nothing: say how far it is.")] = False,
) -> None:
    """Read and verify all that lies on disk. What has decayed becomes a miss."""
    chosen = _globals(context)
    if status and rate is not None:
        raise KvctlError(Exit.USAGE, "--status starts nothing, so that --rate means nothing; leave one of them out")
    request = pb.ScrubRequest(start=not status, rate_bytes_per_s=None if rate is None else parse_rate(rate))
    with chosen.connect() as client:
        report = client.scrub(request)
        if wait:
            report = follow(client, report)
    chosen.show("scrub", render.plain(report), render.scrub(report))
    if wait and report.damaged:
        raise typer.Exit(Exit.REFUSED)


@command("costs")
def costs(
    context: typer.Context,
    namespace: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAMESPACE]",
            help=f"Its digest, or {PREFIX_DIGITS} or more of its first digits. Else those reported on last.",
        ),
    ] = None,
    *,
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only what this tenant's clients reported.")
    ] = None,
) -> None:
    """What prefills and loads take, as clients report them, and how much computing was saved."""
    chosen = _globals(context)
    with chosen.connect() as client:
        report = client.costs(cost_tables.request(client, namespace, tenant))
    chosen.show("costs", render.plain(report), cost_tables.costs(report))


@command("advise")
def advise(
    context: typer.Context,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only what this tenant asks for.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, as -o json.")] = False,
) -> None:
    """What more memory, less of it or another rule would bring, by what was asked for in the last hours."""
    chosen = _globals(context, json=json)
    with chosen.connect() as client:
        report = client.advise(insight.advise_request(tenant))
    chosen.show("advise", render.plain(report), insight.advice(report))


@command("explain-miss")
def explain_miss(
    context: typer.Context,
    key: Keys = None,
    *,
    tokens: Tokens = None,
    extra: Extra = "",
    namespace: Digest = None,
    tenant: Owner = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, as -o json.")] = False,
) -> None:
    """Why a prefix missed: the first block that is not there, and what became of it."""
    chosen = _globals(context, json=json)
    asked = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        report = asked.ask(client)
    chosen.show("explain-miss", render.plain(report), insight.explanation(report))


@command("pins")
def show_pins(
    context: typer.Context,
    *,
    tenant: OnlyOf = None,
) -> None:
    """What is pinned, until when, and what of it budgets allow; and what came of prefetches."""
    chosen = _globals(context)
    with chosen.connect() as client:
        report = client.pins(pb.ListPinsRequest(tenant=tenant))
    chosen.show("pins", render.plain(report), pins.pins(report))


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
    chosen = _globals(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        answers = pins.pin(client, chain, ttl.seconds, on_disk=on_disk, refresh=refresh)
    chosen.show("pin", {"pins": [render.plain(one) for one in answers]}, pins.pinned(answers))
    if not any(one.blocks for one in answers):
        raise typer.Exit(Exit.REFUSED)


@command("prefetch")
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
    chosen = _globals(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        report = pins.prefetch(client, chain, within)
    text = f"{report.there:,} blocks are in memory, {report.coming:,} are to come"
    chosen.show("prefetch", render.plain(report), Text(text))


@command("unpin")
def unpin(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose pins.")],
    numbers: Annotated[list[int] | None, typer.Argument(metavar="[PIN]...", help="As `kvctl pins` lists them.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All pins of the tenant.")] = False,
) -> None:
    """End pins of a tenant. What they kept stays until something else needs the room."""
    chosen = _globals(context)
    if bool(numbers) == every:
        raise KvctlError(Exit.USAGE, "name pins, or say --all; kvctl pins lists them")
    if any(not 0 < number < 1 << 64 for number in numbers or ()):
        raise KvctlError(Exit.USAGE, "a pin is a number from 1 to 2^64 - 1; kvctl pins lists them")
    with chosen.connect() as client:
        report = client.unpin(pb.UnpinRequest(tenant=tenant, pins=numbers or ()))
    chosen.show("unpin", render.plain(report), Text(f"{report.ended:,} pin{'' if report.ended == 1 else 's'} ended"))


@command("programs")
def programs(
    context: typer.Context,
    *,
    tenant: OnlyOf = None,
) -> None:
    """Programs of agents: what each waits for, and what of its context is pinned meanwhile."""
    chosen = _globals(context)
    with chosen.connect() as client:
        report = client.programs(pb.ListProgramsRequest(tenant=tenant))
    chosen.show("programs", render.plain(report), hints.programs(report))


@command("workflows")
def workflows(
    context: typer.Context,
    *,
    tenant: OnlyOf = None,
) -> None:
    """Workflows, and how far the latest runs of them have come."""
    chosen = _globals(context)
    with chosen.connect() as client:
        report = client.workflows(pb.ListWorkflowsRequest(tenant=tenant))
    chosen.show("workflows", render.plain(report), hints.workflows(report))


@policy_app.callback(invoke_without_command=True)
@reporting
def policy(context: typer.Context) -> None:
    """Who is evicted first: the rule of each tier, and of each tenant that has one of its own.

    Rules: lru, second_touch, pgdsf, lfu, s3fifo, arc, density. ARCHITECTURE.md says what each does.
    """
    if context.invoked_subcommand is not None:
        return
    chosen = _globals(context)
    with chosen.connect() as client:
        reports = client.policies().policies
    chosen.show("policies", [render.plain(one) for one in reports], render.policies(reports))


@command("set", on=policy_app)
def set_policy(
    context: typer.Context,
    rule: Annotated[str, typer.Argument(metavar="RULE", help="lru, second_touch, pgdsf, lfu, s3fifo, arc or density.")],
    *,
    tier: Annotated[str | None, typer.Option(metavar="TIER", help="Only dram, or only disk. Else every tier.")] = None,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this tenant's blocks. Else all without a rule of their own."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
) -> None:
    """Evict by another rule from now on.

    It holds over warm restarts and wins over the configuration, until a cold start.
    """
    chosen = _globals(context)
    with chosen.connect() as client:
        report = client.set_policy(pb.SetPolicyRequest(tier=tier, tenant=tenant, rule=rule, dry_run=dry_run))
    chosen.show("policy", render.plain(report), render.policy_changes(report))


@command("install", on=service_app)
def install_service(
    context: typer.Context,
    *,
    disk: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder of the disk tier, to be made writable. Repeatable."),
    ] = None,
    start: Annotated[bool, typer.Option("--now", help="Enable and (re)start it, too; memory is kept.")] = False,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For packages: below this folder, and run nothing.")
    ] = None,
    daemon: Annotated[Path | None, typer.Option(metavar="PATH", help="Else the kvstored beside this kvctl.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Put units, user, folders and configuration in place. Once more after an upgrade.

    Configuration that is there is kept; units are replaced: what this host wants otherwise belongs into a drop-in.
    """
    chosen = _globals(context)
    done = service.install(root=root, daemon=daemon, disks=disk or (), start=start, dry_run=dry_run)
    chosen.show("service", *service.shown(*done, dry_run=dry_run))


@command("ping")
def ping(
    context: typer.Context,
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=100_000, help="Round trips.")] = 10,
) -> None:
    """Round trips to the daemon's owner thread and back, over gRPC."""
    chosen = _globals(context)
    with chosen.connect() as client:
        client.ping()  # the first one makes the connection
        trips_ms, owner_ms = [], []
        for _ in range(count):
            start_s = time.perf_counter()
            answer = client.ping()
            trips_ms.append((time.perf_counter() - start_s) * 1e3)
            owner_ms.append(answer.owner_s * 1e3)
    body = {
        "count": count,
        "min_ms": min(trips_ms),
        "median_ms": statistics.median(trips_ms),
        "max_ms": max(trips_ms),
        "owner_median_ms": statistics.median(owner_ms),
    }
    text = "{count} round trips: min {min_ms:.3f} ms, median {median_ms:.3f} ms, max {max_ms:.3f} ms; "
    text += "waiting for the owner thread: median {owner_median_ms:.3f} ms"
    chosen.show("ping", body, text.format(**body))


@command("doctor")
def doctor(
    context: typer.Context,
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="KVSTORED_DISK",
            metavar="DIR",
            help="A directory that is to become one of the disk tier. Repeatable.",
        ),
    ] = None,
) -> None:
    """Check this machine and the daemon on it, with remedies."""
    chosen = _globals(context)
    checks = _examine(chosen, LinuxHost(), _folders(map(str, disk or ())))
    failed = any(check.verdict is Verdict.FAIL for check in checks)
    found: list[render.Json] = [
        {"name": one.name, "verdict": one.verdict.value, "found": one.found, "remedy": one.remedy} for one in checks
    ]
    body: render.Json = {"ok": not failed, "checks": found}
    chosen.show("doctor", body, render.checks(checks))
    if failed:
        raise typer.Exit(Exit.REFUSED)


def _globals(context: typer.Context, *, json: bool = False) -> Globals:
    assert isinstance(context.obj, Globals)
    return replace(context.obj, output=Output.JSON) if json else context.obj


def _confirm(report: pb.ClearResponse, scope: Scope) -> None:
    """Show what a clear would drop, and ask, if it would drop anything. Raises KvctlError with REFUSED."""
    render.console(stderr=True).print(render.clearing(report, str(scope)))
    if not (report.blocks or report.pending_blocks):
        return
    typer.echo("Drop them? [y/N] ", err=True, nl=False)  # typer.confirm would write to stdout, where answers go
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise KvctlError(Exit.REFUSED, "nothing was dropped; answer y, or give --yes, to clear")


def _drain(chosen: Globals, *, on: bool) -> None:
    with chosen.connect() as client:
        client.drain(on=on)
    text = "draining: new blocks are refused, stored ones are served" if on else "serving: new blocks are taken again"
    chosen.show("draining", on, text)


def _examine(chosen: Globals, host: Host, disks: Sequence[str]) -> list[Check]:
    try:
        socket = chosen.socket()
    except KvctlError as error:
        # An explicit directory that cannot work is a finding; that the usual places are empty is none.
        where, trouble = (None, "") if chosen.runtime_dir is None else (str(chosen.runtime_dir), str(error))
        return examine(host, where, None, trouble, disks)
    try:
        with ControlClient(socket, chosen.timeout_s) as client:
            daemon = _facts(client)
    except KvctlError as error:
        gone = host.listener(str(socket)) in (Listener.MISSING, Listener.STALE)
        return examine(host, str(socket.parent), None, "" if gone else str(error), disks)
    return examine(host, str(socket.parent), daemon, "", disks)


def _folders(given: Iterable[str]) -> tuple[str, ...]:
    """Without what says that there are none, as the daemon does."""
    return tuple(folder for folder in given if folder not in ("", ".", "none"))


def _facts(client: ControlClient) -> DaemonFacts:
    report = client.status()
    settings = {one.name: one.value for one in client.config().settings}
    dram = next((tier for tier in report.tiers if tier.name == "dram"), pb.Tier())
    disk = next((tier for tier in report.tiers if tier.name == "disk"), pb.Tier())
    return DaemonFacts(
        version=report.version,
        pid=report.pid,
        uid=report.uid,
        draining=report.draining,
        capacity_bytes=dram.capacity_bytes,
        populated_bytes=dram.populated_bytes,
        locked_bytes=dram.locked_bytes,
        locks=settings.get("dram.lock") != "false",
        warnings=tuple(report.warnings),
        disks=_folders(settings.get("disk.directories", "none").split(os.pathsep)),
        disk_bytes=disk.capacity_bytes,
        disk_assigned_bytes=disk.assigned_bytes,
        keeper=report.restart.keeper or "none",
    )
