"""`kvctl quota`: what tenants are promised of memory and disk, and the most that they may have."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from kvctl.client import Exit, KvctlError, printable
from kvctl.render import _table, size
from kvproto import control_pb2 as pb
from kvproto.limits import GIB, KIB, MIB

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

_SIZE: Final = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,6}))? ?(B|KiB|MiB|GiB|TiB)?")
_UNITS: Final[dict[str | None, int]] = {None: 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": KIB * GIB}

Tenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Only this one.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[set KEY=VALUE ... | reset]",
        help=f"Keys: {', '.join(KEYS)}. Sizes as 16GiB; {USUAL} for an equal share, or for no maximum.",
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
            setattr(request, field, _bytes_of(text))
    except ValueError:
        raise _usage(
            f"{printable(text)!r} is no value of {key}; sizes are such as 16GiB, a share is from 0 to 1"
        ) from None


def _bytes_of(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    fraction = match[2] or ""
    scaled = int(match[1] + fraction) * _UNITS[match[3]]
    size_bytes, rest = divmod(scaled, int(10 ** len(fraction)))
    if rest:
        raise ValueError(text)
    return size_bytes


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
    table.caption = "* an equal share, as of now; guarantees are in whole arenas and segments"
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
    for name, asked, held in (
        ("dram", report.quota.dram_asked_bytes, report.quota.dram_guaranteed_bytes),
        ("disk", report.quota.disk_asked_bytes, report.quota.disk_guaranteed_bytes),
    ):
        if asked > held:
            unit = "arenas" if name == "dram" else "segments"
            lines.append(f"  {name}_guaranteed is {size(held)} of {size(asked)}: it is in whole {unit}")
    return Text("\n".join(lines))


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
