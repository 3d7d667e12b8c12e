"""`kvctl costs`: what prefills and loads take, side by side, and how much computing was saved."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from kvctl import scope
from kvctl.client import ControlClient, printable
from kvctl.render import DIGEST_DIGITS, _table, size, span
from kvproto import control_pb2 as pb


def request(client: ControlClient, namespace: str | None, tenant: str | None) -> pb.GetCostsRequest:
    """What to ask for. `namespace` is a digest or its first digits. Raises KvctlError."""
    if namespace is None:
        return pb.GetCostsRequest(tenant=tenant)
    named = scope.parse(tenant, namespace, (), everything=False).resolved(client)
    return pb.GetCostsRequest(tenant=tenant, namespace_digest=named.digest)


def costs(report: pb.GetCostsResponse) -> RenderableType:
    """All of it; a namespace is a few lines and two tables."""
    parts: list[RenderableType] = []
    for one in report.namespaces:
        parts += [Text(_head(one), style="bold"), Text(_learned(one)), Text(_saved(one))]
        if one.prefills:
            parts += [Text(), _prefills(one.prefills)]
        if any(run.dram_s or run.disk_s or run.recompute_s for run in one.runs):
            parts += [Text(), _runs(one.runs)]
        parts.append(Text())
    if report.more:
        parts += [Text(f"{report.more:,} more; name one: kvctl costs NAMESPACE"), Text()]
    if not report.namespaces:
        parts += [Text("no client has reported a prefill yet: nobody knows what computing takes"), Text()]
    parts.append(_ways(report.ways) if report.ways else Text("no load was timed yet: nobody knows what loading takes"))
    return Group(*parts)


def below(table: RenderableType, reports: Iterable[pb.Tenant]) -> RenderableType:
    """The same with a line for each tenant that saved computing, or reported what it takes."""
    lines = [
        f"{printable(one.name)}: {_compute_saved(one)}"
        for one in reports
        if one.saved_dram_s or one.saved_disk_s or one.prefill_reports
    ]
    return Group(table, Text(), Text("\n".join(lines))) if lines else table


def _compute_saved(one: pb.Tenant | pb.NamespaceCosts) -> str:
    parts = f"dram {one.saved_dram_s:,.1f}, disk {one.saved_disk_s:,.1f}"
    saved = f"compute saved: {one.saved_dram_s + one.saved_disk_s:,.1f} s ({parts})"
    return f"{saved}, prefill profile: {one.prefill_reports:,} reports"


def _head(one: pb.NamespaceCosts) -> str:
    block = f"{one.block_tokens:,} tokens, {size(one.block_bytes)} a block"
    return f"{one.digest[:DIGEST_DIGITS]} {printable(one.model)} of tenant {printable(one.tenant)}, {block}"


def _learned(one: pb.NamespaceCosts) -> str:
    said = f"; clients say {seconds(one.block_s)} a block" if one.block_s else ""
    if not one.prefill_reports:
        return f"nobody has reported a prefill{said}"
    return f"a pass {seconds(one.pass_s)}, a token {seconds(one.token_s)}, a pair of tokens {seconds(one.pair_s)}{said}"


def _saved(one: pb.NamespaceCosts) -> str:
    hits = f"{one.hit_blocks:,} blocks found"
    if one.unpriced_blocks:
        hits += f", {one.unpriced_blocks:,} of them before anybody knew what they cost"
    return f"{_compute_saved(one)}\n{hits}"


def _prefills(prefills: Iterable[pb.Prefill]) -> RenderableType:
    """Rows by what is cached, columns by what is new."""
    by_cached: dict[int, dict[int, float]] = {}
    for one in prefills:
        by_cached.setdefault(one.cached_tokens, {})[one.new_tokens] = one.seconds
    columns = sorted({new for row in by_cached.values() for new in row})
    table = _table(">prefill behind", *(f">{_tokens(new)} new" for new in columns))
    for cached, row in sorted(by_cached.items()):
        table.add_row(_tokens(cached), *(seconds(row.get(new, 0.0)) for new in columns))
    return table


def _runs(runs: Iterable[pb.Run]) -> RenderableType:
    """Loading against computing."""
    table = _table(">first tokens", ">from dram", ">from disk", ">computed")
    for one in runs:
        table.add_row(_tokens(one.tokens), *map(seconds, (one.dram_s, one.disk_s, one.recompute_s)))
    return table


def _ways(ways: Iterable[pb.Way]) -> RenderableType:
    table = _table("from", "timed by", ">loads", ">a call", ">a second")
    for one in ways:
        by = f"tenant {printable(one.tenant)}" if one.tenant else "kvstored"
        speed = size(int(one.bytes_per_s)) if one.bytes_per_s else "-"
        table.add_row(printable(one.tier), by, f"{one.reports:,}", seconds(one.call_s), speed)
    return table


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count and count % 1024 == 0 else f"{count:,}"


def seconds(value: float) -> str:
    """A short time for people, three digits of it: `12.3 ms`; `-` where nobody knows."""
    if value <= 0.0:
        return "-"
    for unit_s, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if value >= 0.9995 * unit_s or unit == "ns":
            scaled = value / unit_s
            return span(value) if scaled >= 999.5 else f"{scaled:.3g} {unit}"
    raise AssertionError("some unit fits")
