"""`kvctl pins`: what is kept, for whom, until when, and what of it the budgets allow; prefetches with it."""

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvctl.client import ControlClient, printable
from kvctl.insight import Miss
from kvctl.render import _table, size, span
from kvproto import control_pb2 as pb
from kvproto.limits import KEYS_PER_FRAME
from kvproto.retention import Retention

__all__ = ["Retention", "pin", "pinned", "pins", "prefetch", "unknown"]

_WHY: Final = {
    "absent": "the chain ends there",
    "budget": "the tenant's pins have no room for more; kvctl quota TENANT set pin_share=...",
    "too_many": "the tenant has as many pins as it may; kvctl pins lists them",
}


def pin(client: ControlClient, chain: Miss, seconds: float, *, on_disk: bool, refresh: bool) -> list[pb.PinResponse]:
    """Keep a chain, 1,024 blocks a pin, up to the first that is not whole. Raises KvctlError."""
    answers: list[pb.PinResponse] = []
    for prefix in _prefixes(client, chain):
        answers.append(client.pin(pb.PinRequest(prefix=prefix, ttl_s=seconds, on_disk=on_disk, refresh=refresh)))
        if answers[-1].why_not_all:
            break
    return answers


def prefetch(client: ControlClient, chain: Miss, seconds: float) -> pb.PrefetchResponse:
    """Have a chain in memory. Raises KvctlError."""
    total = pb.PrefetchResponse()
    for prefix in _prefixes(client, chain):
        answer = client.prefetch(pb.PrefetchRequest(prefix=prefix, within_s=seconds))
        total.there, total.coming = total.there + answer.there, total.coming + answer.coming
        if answer.there + answer.coming < len(prefix.keys):
            break
    return total


def _prefixes(client: ControlClient, chain: Miss) -> Iterator[pb.Prefix]:
    digest, keys = chain.named(client)
    for start in range(0, len(keys), KEYS_PER_FRAME):
        part = keys[start : start + KEYS_PER_FRAME]
        yield pb.Prefix(tenant=chain.tenant, namespace_digest=digest, keys=part)


def pinned(answers: Sequence[pb.PinResponse]) -> Text:
    """What came of a wish to keep something."""
    blocks, kept = sum(one.blocks for one in answers), sum(one.bytes for one in answers)
    numbers = ", ".join(str(one.pin) for one in answers if one.pin)
    text = f"{blocks:,} blocks, {size(kept)}: pin {numbers}" if blocks else "nothing was pinned"
    why = answers[-1].why_not_all
    return Text(f"{text}; {_WHY.get(why, printable(why))}" if why else text)


def unknown(tenant: str, numbers: Sequence[int]) -> str:
    """What is said of pins that are not there."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8:,} more" if len(numbers) > 8 else "")
    plural = "s" if len(numbers) > 1 else ""
    return f"tenant {printable(tenant)} has no pin{plural} {shown}; `kvctl pins` lists those that it has"


def pins(report: pb.ListPinsResponse) -> RenderableType:
    """Budgets, then a line each, the one that ends first on top."""
    below = Text(_counted(report.counters))
    if not report.pins:
        return Group(Text("nothing is pinned"), Text(), below)
    budgets = _table("tenant", ">pins", ">pinned", ">of")
    for one in report.budgets:
        budgets.add_row(printable(one.tenant), f"{one.pins:,}", size(one.used_bytes), size(one.budget_bytes))
    table = _table(
        ">pin", "tenant", "namespace", "for", ">blocks", ">size", ">ends in", "",
        least=("namespace", "", "blocks", "tenant"),
    )  # fmt: skip
    for pin in report.pins:
        table.add_row(
            str(pin.pin), printable(pin.tenant), pin.namespace_digest[:8], printable(pin.owner) or "a client",
            f"{pin.blocks:,}", size(pin.bytes), span(pin.left_s), "renews" if pin.refresh else "",
        )  # fmt: skip
    more = report.pins_total - len(report.pins)
    rest = [Text(f"and {more:,} more")] if more > 0 else []
    return Group(budgets, Text(), table, *rest, Text(), below)


def _counted(counts: pb.PinCounters) -> str:
    ended = f"{counts.unpinned:,} unpinned, {counts.expired:,} expired, {counts.dropped:,} lost blocks"
    ended += f", {counts.gave_way:,} gave way" if counts.gave_way else ""
    fetched = f"{size(counts.prefetched_bytes)} fetched, {size(counts.prefetched_used_bytes)} used"
    return (
        f"since the daemon started: {counts.pinned:,} pins, {counts.refreshed:,} refreshed, {ended}, "
        f"{counts.over_budget:,} over budget\n"
        f"{counts.prefetches:,} prefetches: {fetched}, {size(counts.prefetched_wasted_bytes)} in vain; "
        f"{counts.prefetches_merged:,} merged, {counts.prefetches_late:,} late, "
        f"{counts.prefetches_cancelled:,} cancelled, {counts.prefetches_refused:,} refused"
    )
