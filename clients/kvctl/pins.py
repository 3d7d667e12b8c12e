"""`kvctl pins`: what is kept, for whom, until when, and what of it the budgets allow; prefetches with it."""

from rich.console import Group, RenderableType
from rich.text import Text

from kvctl.client import printable
from kvctl.render import _table, size, span
from kvproto import control_pb2 as pb

__all__ = ["pins"]


def pins(report: pb.ListPinsResponse) -> RenderableType:
    """Budgets, then a line each, the one that ends first on top."""
    below = Text(_counted(report.counters))
    if not report.pins:
        return Group(Text("nothing is pinned"), Text(), below)
    budgets = _table("tenant", ">pins", ">pinned", ">of")
    for one in report.budgets:
        budgets.add_row(printable(one.tenant), f"{one.pins:,}", size(one.used_bytes), size(one.budget_bytes))
    table = _table("pin", "tenant", "namespace", "for", ">blocks", ">size", ">ends in", "")
    for pin in report.pins:
        table.add_row(
            str(pin.pin), printable(pin.tenant), pin.namespace_digest[:12], printable(pin.owner) or "a client",
            f"{pin.blocks:,}", size(pin.bytes), span(pin.left_s), "unless it is used" if pin.refresh else "",
        )  # fmt: skip
    more = report.pins_total - len(report.pins)
    rest = [Text(f"and {more:,} more")] if more > 0 else []
    return Group(budgets, Text(), table, *rest, Text(), below)


def _counted(counts: pb.PinCounters) -> str:
    ended = f"{counts.unpinned:,} unpinned, {counts.expired:,} expired, {counts.dropped:,} lost blocks"
    fetched = f"{size(counts.prefetched_bytes)} fetched, {size(counts.prefetched_used_bytes)} used"
    return (
        f"since the daemon started: {counts.pinned:,} pins, {counts.refreshed:,} refreshed, {ended}, "
        f"{counts.over_budget:,} over budget\n"
        f"{counts.prefetches:,} prefetches: {fetched}, {size(counts.prefetched_wasted_bytes)} in vain; "
        f"{counts.prefetches_merged:,} merged, {counts.prefetches_late:,} late, "
        f"{counts.prefetches_cancelled:,} cancelled, {counts.prefetches_refused:,} refused"
    )
