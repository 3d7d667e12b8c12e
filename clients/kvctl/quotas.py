"""`kvctl quota`: what tenants are promised of memory and disk, and the most that they may have."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from kvctl.client import Exit, KvctlError, printable
from kvctl.render import _table, size
from kvproto import control_pb2 as pb
from kvproto.sizes import UNITS_SAID, parse_bytes, quoted

__all__ = ["KEYS", "quota_changes", "quotas", "tenants", "wish"]

USUAL: Final = "none"  # as a value: nothing is to be said of it any more
KEYS: Final = {  # as the configuration has them
    "dram_guaranteed": "dram_guaranteed_bytes",
    "dram_max": "dram_max_bytes",
    "disk_guaranteed": "disk_guaranteed_bytes",
    "disk_max": "disk_max_bytes",
    "pin_share": "pin_share",
    "in_flight": "in_flight_max",
}

Tenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Only this one.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[set KEY=VALUE ... | reset]",
        help=f"Keys: {', '.join(KEYS)}. Sizes as 16GiB ({UNITS_SAID}); {USUAL} for an equal share, or for no maximum. "
        "What a tenant gets is in whole arenas of memory and segments of disk: the answer says how much.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]


def wish(tenant: str | None, words: Sequence[str], *, dry_run: bool) -> pb.SetQuotaRequest | None:
    """What a command line wants changed; None if it only asks. Raises KvctlError with USAGE."""
    if not words:
        if dry_run:
            raise _usage("--dry-run goes with set or reset")
        return None
    assert tenant is not None, "the first word is the tenant"
    verb, *pairs = words
    request = pb.SetQuotaRequest(tenant=tenant, dry_run=dry_run)
    if verb == "reset" and not pairs:
        request.reset = True
    elif verb == "set" and pairs:
        for pair in pairs:
            _say(request, pair)
    else:
        raise _usage("after the tenant comes `set KEY=VALUE ...` or `reset`")
    return request


def _say(request: pb.SetQuotaRequest, pair: str) -> None:
    key, equals, text = pair.partition("=")
    field = KEYS.get(key)
    if field is None or not equals:
        raise _usage(f"{printable(pair)!r} is not KEY=VALUE; a key is one of {', '.join(KEYS)}")
    if request.HasField(field) or field in request.usual:
        raise _usage(f"{key} is given twice")
    try:
        if text == USUAL:
            request.usual.append(field)
        elif field == "pin_share":
            request.pin_share = float(text)
        elif field == "in_flight_max":
            request.in_flight_max = int(text)
        else:
            setattr(request, field, parse_bytes(text))
    except ValueError:
        raise _usage(f"{quoted(text)} is no value of {key}; sizes are such as 16GiB, a share is from 0 to 1") from None


def quotas(reports: Iterable[pb.Quota]) -> Table:
    """`kvctl quota`."""
    table = _table("tenant\nfrom", ">dram guaranteed\nmaximum", ">disk guaranteed\nmaximum", ">pins\nof", ">in flight")
    for one in reports:
        dram_max = size(one.dram_max_bytes) if one.HasField("dram_max_bytes") else "-"
        disk_max = size(one.disk_max_bytes) if one.HasField("disk_max_bytes") else "-"
        table.add_row(
            f"{printable(one.tenant)}\n{_origin(one)}",
            f"{size(one.dram_guaranteed_bytes)}{'' if one.HasField('dram_asked_bytes') else ' *'}\n{dram_max}",
            f"{size(one.disk_guaranteed_bytes)}{'' if one.HasField('disk_asked_bytes') else ' *'}\n{disk_max}",
            f"{one.pin_share:.0%}\n{size(one.pin_budget_bytes)}",
            f"{one.in_flight_max:,}" if one.HasField("in_flight_max") else "-",
        )
    table.caption = "* an equal share, as of now; what holds is in whole arenas and segments"
    table.caption_justify = "left"
    return table


def _origin(one: pb.Quota) -> str:
    return "kvctl quota set" if one.chosen else "configuration"


def quota_changes(report: pb.SetQuotaResponse) -> Text:
    """What `kvctl quota TENANT set` changed, or would."""
    now, before = _in_words(report.quota), _in_words(report.former)
    verb = "would have" if report.dry_run else "has"
    lines = [f"{printable(report.quota.tenant)} {verb}, by {_origin(report.quota)}:"]
    for name, text in now.items():
        lines.append(f"  {name}: {text}" + ("" if before[name] == text else f", until now {before[name]}"))
    return Text("\n".join([*lines, *_less_than_asked(report.quota)]))


def _less_than_asked(one: pb.Quota) -> Iterator[str]:
    """What was really set where that is less."""
    maximum = "and no more than there are"
    for name, asked, held, why in (
        ("dram_guaranteed", one.dram_asked_bytes, one.dram_guaranteed_bytes, "in whole arenas"),
        ("dram_max", one.dram_max_asked_bytes, one.dram_max_bytes, f"in whole arenas, {maximum}"),
        ("disk_guaranteed", one.disk_asked_bytes, one.disk_guaranteed_bytes, "in whole segments"),
        ("disk_max", one.disk_max_asked_bytes, one.disk_max_bytes, f"in whole segments, {maximum}"),
    ):
        if asked > held:
            shown = f"{size(held)} of the {size(asked)}"
            if size(held) == size(asked):
                shown = f"{held:,} of the {asked:,} bytes"
            yield f"  {name} is {shown} asked for: it is {why}"


def _in_words(one: pb.Quota) -> dict[str, str]:
    def guaranteed(asked: bool, size_bytes: int) -> str:
        return size(size_bytes) if asked else f"an equal share, {size(size_bytes)} now"

    return {
        "dram_guaranteed": guaranteed(one.HasField("dram_asked_bytes"), one.dram_guaranteed_bytes),
        "dram_max": size(one.dram_max_bytes) if one.HasField("dram_max_bytes") else "no maximum",
        "disk_guaranteed": guaranteed(one.HasField("disk_asked_bytes"), one.disk_guaranteed_bytes),
        "disk_max": size(one.disk_max_bytes) if one.HasField("disk_max_bytes") else "no maximum",
        "pin_share": f"{one.pin_share:.0%}, {size(one.pin_budget_bytes)} now",
        "in_flight": f"{one.in_flight_max:,}" if one.HasField("in_flight_max") else "as many as sessions may have",
    }


def tenants(reports: Iterable[pb.Tenant]) -> Table:
    """`kvctl tenants`: what each has of what it may have."""
    table = _table(
        "tenant\nuids", ">clients\nin flight", ">dram used\nassigned", ">guaranteed\nmaximum", ">disk\nguaranteed, max",
        ">pinned\nrefused",
    )  # fmt: skip
    for one in reports:
        dram_max = size(one.dram_max_bytes) if one.HasField("dram_max_bytes") else "-"
        disk_max = size(one.disk_max_bytes) if one.HasField("disk_max_bytes") else "-"
        table.add_row(
            f"{printable(one.name)}\n{', '.join(map(str, one.uids))}",
            f"{one.sessions:,}\n{one.in_flight:,}",
            f"{size(one.used_bytes)}\n{size(one.assigned_bytes)}",
            f"{size(one.dram_guaranteed_bytes)}\n{dram_max}",
            f"{size(one.disk_assigned_bytes)}\n{size(one.disk_guaranteed_bytes)}, {disk_max}",
            f"{size(one.pinned_bytes)}\n{one.refused:,}",
        )
    return table


def _usage(text: str) -> KvctlError:
    return KvctlError(Exit.USAGE, text)
