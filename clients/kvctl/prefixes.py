"""`kvctl ls`, `tree` and `stat`: which blocks there are, how they hang together, and how one prefix stands."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, TypeAlias

import typer
from rich.console import Group
from rich.text import Text

from kvctl import insight, key_names, prefix_tables, scope, values
from kvctl.amounts import counted
from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.fitting import width_of
from kvctl.program import Digest, Extra, Globals, Keys, Output, Owner, Tokens, command, globals_of
from kvctl.render import as_json_line, console, namespace_list, plain
from kvctl.scope import PREFIX_DIGITS
from kvproto import control_pb2 as pb
from kvproto.limits import KEYS_PER_FRAME

PAGE: Final = 1024  # blocks, as many as the daemon gives at once
LIMIT_MAX: Final = (1 << 32) - 1  # that a message holds
TREES: Final = 4  # namespaces that are drawn where none is named

Named: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="NAMESPACE",
        autocompletion=values.namespaces,
        help=f"Its digest, or {PREFIX_DIGITS} or more of its first digits.",
    ),
]
By: TypeAlias = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="ORDER",
        autocompletion=values.one_of(values.ORDERS),
        help="blocks, hits, or recent: used last.",
    ),
]


@command("ls", short="Namespaces, their prefixes, their blocks.")
def show_list(
    context: typer.Context,
    namespace: Named = None,
    *,
    tenant: Owner = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Each block, in no order.")] = False,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=LIMIT_MAX, metavar="N", help="So many at most.")
    ] = 40,
    everything: Annotated[bool, typer.Option("--all", help="With --blocks: all of them, page by page.")] = False,
    by: By = "blocks",
) -> None:
    """Namespaces; or of one namespace the prefixes that begin in it, or its blocks.

    With -o json, --blocks prints one object a line.
    """
    chosen = globals_of(context)
    if namespace is None:
        if blocks or everything:
            raise KvctlError(Exit.USAGE, "name the namespace whose blocks are to be listed; kvctl ls lists them")
        with chosen.connect() as client:
            client.need_tenant(tenant)
            reports = [one for one in client.namespaces().namespaces if tenant in (None, one.tenant)]
        chosen.show("namespaces", [plain(one) for one in reports], namespace_list(reports))
        return
    with chosen.connect() as client:
        digest, owner = _resolved(client, namespace, tenant)
        if blocks:
            _print_blocks(chosen, _blocks(client, digest, owner, None if everything else limit))
            return
        request = pb.GetTreeRequest(tenant=owner, namespace_digest=digest, depth=0, width=limit, limit=limit, by=by)
        report = client.tree(_within(request))
    chosen.show("prefixes", plain(report), prefix_tables.prefixes(report))


@command("tree", short="Prefixes as a tree: what is shared.")
def show_tree(
    context: typer.Context,
    namespace: Named = None,
    *,
    tenant: Owner = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Only what continues this block: its key, or first digits.")
    ] = None,
    depth: Annotated[int, typer.Option("--depth", "-d", min=0, max=1024, metavar="N", help="Branchings shown.")] = 8,
    width: Annotated[
        int, typer.Option("--width", "-w", min=1, max=1024, metavar="N", help="Branches shown of each.")
    ] = 8,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=1024, metavar="N", help="Lines in all, or so.")
    ] = 48,
    by: By = "blocks",
) -> None:
    """Prefixes as a tree: what is shared, and what branches off. What is not shown is counted."""
    chosen = globals_of(context)
    named = key_names.checked([] if key is None else [key])
    if named and namespace is None:
        raise KvctlError(Exit.USAGE, "a key means nothing without its namespace; name it before")
    with chosen.connect() as client:
        reports = []
        for digest, owner in _wanted(client, namespace, tenant):
            start = next(iter(key_names.resolved(client, owner, digest, named)), b"")
            request = pb.GetTreeRequest(
                tenant=owner, namespace_digest=digest, key=start, depth=depth, width=width, limit=limit, by=by
            )
            reports.append(client.tree(request))
        listed = client.namespaces().namespaces
    if not reports:
        raise KvctlError(Exit.NOT_FOUND, "no namespace holds blocks; see `kvctl namespaces`")
    models = {(one.digest, one.tenant): one.model for one in listed}
    drawn = [prefix_tables.tree(one, models.get((one.digest, one.tenant), "")) for one in reports]
    apart = [part for one in drawn for part in (Text(), one)][1:]
    more = sum(1 for one in listed if one.blocks and tenant in (None, one.tenant)) - len(reports)
    rest = [Text(f"\nand {counted(more, 'more namespace')}: name one")] if namespace is None and more > 0 else []
    chosen.show("trees", [plain(one) for one in reports], Group(*apart, *rest))


@command("stat", short="One prefix: what of it is there, and who keeps it.")
def stat(
    context: typer.Context,
    key: Keys = None,
    *,
    tokens: Tokens = None,
    extra: Extra = "",
    namespace: Digest = None,
    tenant: Owner = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="A line for each block.")] = False,
) -> None:
    """One prefix: which of its blocks are there and where, who pins and who leases them, what continues it."""
    chosen = globals_of(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        digest, keys = chain.named(client)
        report = _stat(client, tenant, digest, keys)
        below = _below(client, report)
        names = {one.session: one.name for one in client.clients().clients} if report.leases else {}
    body = {**plain(report), "below": None if below is None else plain(below)}
    chosen.show("prefix", body, prefix_tables.stat(report, below, names))
    if blocks and chosen.output is Output.TABLE:
        typer.echo()
        _print_blocks(chosen, iter(report.blocks))
    if not report.found_blocks:
        raise typer.Exit(Exit.NOT_FOUND)


# -- what is asked ----------------------------------------------------------------------------------------------


def _resolved(client: ControlClient, namespace: str, tenant: str | None) -> tuple[str, str | None]:
    """The whole digest of a namespace. Raises KvctlError."""
    digest = scope.parse(tenant, namespace, (), everything=False).resolved(client).digest
    assert digest is not None, "a namespace was named"
    return digest, tenant


def _wanted(client: ControlClient, namespace: str | None, tenant: str | None) -> list[tuple[str, str | None]]:
    """The namespace that is named; else those that hold most."""
    if namespace is not None:
        return [_resolved(client, namespace, tenant)]
    if tenant == "":
        raise KvctlError(Exit.USAGE, "--tenant is empty; see `kvctl tenants`")
    client.need_tenant(tenant)
    listed = [one for one in client.namespaces().namespaces if one.blocks and tenant in (None, one.tenant)]
    largest = sorted(listed, key=lambda one: (-one.bytes, one.digest, one.tenant))[:TREES]
    return [(one.digest, one.tenant) for one in largest]


def _within(request: pb.GetTreeRequest) -> pb.GetTreeRequest:
    """As much as the daemon lists at once."""
    request.width = request.limit = min(request.limit, PAGE)
    return request


def _blocks(client: ControlClient, digest: str, tenant: str | None, most: int | None) -> Iterator[pb.Block]:
    """Page by page. Raises KvctlError."""
    cursor, left = 0, most
    while left is None or left > 0:
        limit = PAGE if left is None else min(PAGE, left)
        page = client.blocks(
            pb.ListBlocksRequest(tenant=tenant, namespace_digest=digest, cursor=cursor, limit=limit)
        )  # fmt: skip
        yield from page.blocks
        left = None if left is None else left - len(page.blocks)
        cursor = page.next_cursor
        if not cursor:
            return


def _print_blocks(chosen: Globals, blocks: Iterator[pb.Block]) -> None:
    """As they come: there may be a million."""
    if chosen.output is Output.JSON:
        for one in blocks:
            typer.echo(as_json_line("block", plain(one)))
        return
    columns = prefix_tables.block_columns(width_of(console()))
    typer.echo(prefix_tables.block_heading(columns))
    for one in blocks:
        typer.echo(prefix_tables.block_line(one, columns))


def _stat(
    client: ControlClient, tenant: str | None, digest: str | None, keys: Sequence[bytes]
) -> pb.StatPrefixResponse:
    """Chains longer than a request are asked for in parts, the first part first."""
    whole: pb.StatPrefixResponse | None = None
    for at in range(0, len(keys), KEYS_PER_FRAME):
        part = client.stat(
            pb.StatPrefixRequest(tenant=tenant, namespace_digest=digest, keys=keys[at : at + KEYS_PER_FRAME])
        )
        if whole is None:
            whole, digest, tenant = part, part.digest, part.tenant
            continue
        unbroken = whole.found_blocks == len(whole.blocks)
        whole.blocks.extend(part.blocks)
        if unbroken:
            for name in ("found_blocks", "hbm_blocks", "dram_blocks", "disk_blocks", "bytes"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        _add_keepers(whole, part, at)
    assert whole is not None, "a chain has a key at least"
    return whole


def _add_keepers(whole: pb.StatPrefixResponse, part: pb.StatPrefixResponse, before: int) -> None:
    """A pin may have blocks of several parts; a lease ends in one, and has all before it."""
    pins = {one.number: one for one in whole.pins}
    for pin in part.pins:
        if pin.number in pins:
            pins[pin.number].blocks += pin.blocks
        else:
            whole.pins.append(pin)
    whole.pins_total = max(whole.pins_total, part.pins_total, len(whole.pins))
    for lease in part.leases:
        lease.blocks += before
        whole.leases.append(lease)
    whole.leases_total += part.leases_total


def _below(client: ControlClient, report: pb.StatPrefixResponse) -> pb.TreeNode | None:
    """What hangs on the last block of it that is there."""
    if not report.found_blocks:
        return None
    last = report.blocks[report.found_blocks - 1].key
    request = pb.GetTreeRequest(
        tenant=report.tenant, namespace_digest=report.digest, key=last, depth=0, width=1, limit=1
    )  # fmt: skip
    try:
        nodes = client.tree(request).nodes
    except KvctlError as error:
        if error.code not in (Exit.NOT_FOUND, Exit.REFUSED):
            raise
        return None  # it went away meanwhile, or there are too many to add up
    return nodes[0] if nodes else None
