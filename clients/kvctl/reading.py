"""Commands that ask the daemon how it stands, and change nothing."""

import statistics
import time
from typing import Annotated

import typer

from kvctl import costs as cost_tables
from kvctl import hints, insight, pins, render, values
from kvctl import quotas as quota_tables
from kvctl.program import Digest, Extra, Keys, OnlyOf, Owner, Tokens, command, globals_of, policy_app, reporting
from kvctl.scope import PREFIX_DIGITS
from kvproto import control_pb2 as pb


@command("status")
def status(context: typer.Context) -> None:
    """The daemon on one page: tiers, tenants, warnings."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report = client.status()
    chosen.show("status", render.plain(report), cost_tables.below(render.status(report), report.tenants))


@command("stats")
def stats(context: typer.Context) -> None:
    """Counters since the daemon started."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report, standing = client.statistics().counters, client.status()
    disk = standing.disk.counters if standing.HasField("disk") else None
    chosen.show("counters", render.plain(report), cost_tables.below(render.counters(report, disk), standing.tenants))


@command("namespaces")
def namespaces(context: typer.Context) -> None:
    """Namespaces that hold blocks or that a client has open."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        reports = client.namespaces().namespaces
    chosen.show("namespaces", [render.plain(one) for one in reports], render.namespaces(reports))


@command("tenants")
def tenants(context: typer.Context) -> None:
    """Tenants: what each has of memory and disk, and may have."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        reports = client.tenants().tenants
    chosen.show("tenants", [render.plain(one) for one in reports], quota_tables.tenants(reports))


@command("clients")
def clients(context: typer.Context) -> None:
    """Connected clients."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        reports = client.clients().clients
    chosen.show("clients", [render.plain(one) for one in reports], render.clients(reports))


@command("config")
def config(
    context: typer.Context,
    *,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only those that are not what they are by default.")
    ] = False,
) -> None:
    """Every setting with its origin."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        settings = [one for one in client.config().settings if one.origin != "default" or not changed]
    chosen.show("config", [render.plain(one) for one in settings], render.config(settings))


@command("costs", short="What prefills and loads take, and what was saved.")
def costs(
    context: typer.Context,
    namespace: Annotated[
        str | None,
        typer.Argument(
            metavar="NAMESPACE",
            autocompletion=values.namespaces,
            help=f"Its digest, or {PREFIX_DIGITS} or more of its first digits. Else those reported on last.",
        ),
    ] = None,
    *,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=values.tenants, help="Only what this tenant's clients reported."),
    ] = None,
) -> None:
    """What prefills and loads take, as clients report them, and how much computing was saved."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report = client.costs(cost_tables.request(client, namespace, tenant))
    chosen.show("costs", render.plain(report), cost_tables.costs(report))


@command("advise", short="What more memory, or another rule, would bring.")
def advise(
    context: typer.Context,
    *,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=values.tenants, help="Only what this tenant asks for."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, as -o json.")] = False,
) -> None:
    """What more memory, less of it or another rule would bring, by what was asked for in the last hours."""
    chosen = globals_of(context, json=json)
    with chosen.connect() as client:
        report = client.advise(insight.advise_request(tenant))
    chosen.show("advise", render.plain(report), insight.advice(report))


@command("explain-miss", short="Why a prefix missed.")
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
    chosen = globals_of(context, json=json)
    asked = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        report = asked.ask(client)
    chosen.show("explain-miss", render.plain(report), insight.explanation(report))


@command("pins", short="What is pinned, and until when.")
def show_pins(
    context: typer.Context,
    *,
    tenant: OnlyOf = None,
) -> None:
    """What is pinned, until when, and what of it budgets allow; and what came of prefetches."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report = client.pins(pb.ListPinsRequest(tenant=tenant))
    chosen.show("pins", render.plain(report), pins.pins(report))


@command("programs", short="Programs of agents, and what is pinned for them.")
def programs(
    context: typer.Context,
    *,
    tenant: OnlyOf = None,
) -> None:
    """Programs of agents: what each waits for, and what of its context is pinned meanwhile."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report = client.programs(pb.ListProgramsRequest(tenant=tenant))
    chosen.show("programs", render.plain(report), hints.programs(report))


@command("workflows", short="Workflows, and how far their runs have come.")
def workflows(
    context: typer.Context,
    *,
    tenant: OnlyOf = None,
) -> None:
    """Workflows, and how far the latest runs of them have come."""
    chosen = globals_of(context)
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
    chosen = globals_of(context)
    with chosen.connect() as client:
        reports = client.policies().policies
    chosen.show("policies", [render.plain(one) for one in reports], render.policies(reports))


@command("ping", short="Round trips to the daemon and back.")
def ping(
    context: typer.Context,
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=100_000, help="Round trips.")] = 10,
) -> None:
    """Round trips to the daemon's owner thread and back, over gRPC."""
    chosen = globals_of(context)
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
