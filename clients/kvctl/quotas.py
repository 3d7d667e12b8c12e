"""`kvctl quota`: what tenants are promised of memory and disk, and the most that they may have."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Annotated, Final

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvctl import values
from kvctl.client import Exit, KvctlError, printable
from kvctl.render import _table, size, span
from kvproto import control_pb2 as pb
from kvproto.sizes import UNITS_SAID, parse_bytes, parse_seconds, quoted

__all__ = ["KEYS", "quota_changes", "quotas", "tenants", "wish"]

USUAL: Final = "none"  # as a value: nothing is to be said of it any more
KEYS: Final = {  # as the configuration has them
    "dram_guaranteed": "dram_guaranteed_bytes",
    "dram_max": "dram_max_bytes",
    "disk_guaranteed": "disk_guaranteed_bytes",
    "disk_max": "disk_max_bytes",
    "pin_share": "pin_share",
    "in_flight": "in_flight_max",
    "pin_5m_ttl": "pin_5m_ttl_s",
    "pin_5m_share": "pin_5m_share",
    "pin_1h_ttl": "pin_1h_ttl_s",
    "pin_1h_share": "pin_1h_share",
    "pin_tool_ttl": "pin_tool_ttl_s",
    "pin_tool_share": "pin_tool_share",
    "unused_ttl": "unused_ttl_s",
    "hbm_guaranteed": "hbm_guaranteed_bytes",
    "hbm_max": "hbm_max_bytes",
}
VERBS: Final = ("reset", "set")
CLASSES: Final = {"5m": "pins up to 5m", "1h": "longer pins", "tool": "pins for tools"}
_OF_FEW: Final = frozenset(
    key for key in KEYS if (key.endswith(("_ttl", "_share")) and key != "pin_share") or key.startswith("hbm_")
)

USAGE: Final = ("[TENANT [set KEY=VALUE... | reset [KEY...]]]",)


def _tenants(context: typer.Context, incomplete: str) -> list[values.Offer]:
    return [*values.tenants(context, incomplete), *values.one_of(VERBS)(context, incomplete)]


def _words(context: typer.Context, incomplete: str) -> list[values.Offer]:
    """`set` or `reset`, then keys: the tenant may stand before them or after them."""
    said = [context.params.get("tenant"), *(context.params.get("words") or ())]
    if said[0] in VERBS and len(said) == 1:
        return values.tenants(context, incomplete)
    if not set(VERBS).intersection(map(str, said)):
        return values.one_of(VERBS)(context, incomplete)
    return values.one_of([f"{key}=" for key in KEYS] if "set" in said else list(KEYS))(context, incomplete)


Tenant = Annotated[str | None, typer.Argument(metavar="TENANT", autocompletion=_tenants, help="Only this one.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="WORD",
        autocompletion=_words,
        help=f"set KEY=VALUE..., or reset [KEY...], which goes back to the configuration; also before the tenant. "
        f"Keys: {', '.join(KEYS)}. Sizes as 16GiB ({UNITS_SAID}), times as 30m; {USUAL} for an equal share, or "
        "for no maximum. Pins are of three classes: up to five minutes, longer, and those made for waiting programs. "
        "What a tenant gets is in whole arenas of memory and segments of disk: the answer says how much.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]


def wish(tenant: str | None, words: Sequence[str], *, dry_run: bool) -> pb.SetQuotaRequest | None:
    """What a command line wants changed; None if it only asks. Raises KvctlError with USAGE."""
    if not words:
        if dry_run:
            raise _usage("--dry-run goes with set or reset")
        if tenant in VERBS:
            raise _usage(f"{tenant} whose quota? Say `kvctl quota {tenant} TENANT ...`")
        return None
    assert tenant is not None, "the first word is the tenant"
    verb, *pairs = words
    if tenant in VERBS and verb not in VERBS:
        tenant, verb = verb, tenant
    request = pb.SetQuotaRequest(tenant=tenant, dry_run=dry_run)
    if verb == "reset":
        request.reset = not pairs
        for key in pairs:
            _unsay(request, key)
    elif verb == "set" and pairs:
        for pair in pairs:
            _say(request, pair)
    else:
        raise _usage("after the tenant comes `set KEY=VALUE ...` or `reset [KEY ...]`")
    return request


def _unsay(request: pb.SetQuotaRequest, key: str) -> None:
    if key not in KEYS:
        raise _usage(f"{printable(key)!r} is no key; a key is one of {', '.join(KEYS)}")
    if KEYS[key] not in request.configured:
        request.configured.append(KEYS[key])


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
        elif field.endswith("_share"):
            setattr(request, field, float(text))
        elif field.endswith("_ttl_s"):
            setattr(request, field, parse_seconds(text))
        elif field == "in_flight_max":
            request.in_flight_max = int(text)
        else:
            setattr(request, field, parse_bytes(text))
    except ValueError:
        such = "sizes are such as 16GiB, times such as 30m, a share is from 0 to 1"
        raise _usage(f"{quoted(text)} is no value of {key}; {such}") from None


def quotas(reports: Iterable[pb.Quota]) -> RenderableType:
    """`kvctl quota`."""
    table = _table("tenant\nfrom", ">dram guaranteed\nmaximum", ">disk guaranteed\nmaximum", ">pins\nof", ">in flight")
    lines: list[str] = []
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
        lines += (f"{printable(one.tenant)}, {line}" for line in (*_chosen_lines(one), *_class_lines(one)))
    below = "* an equal share, as of now; what holds is in whole arenas and segments"
    return Group(table, *map(Text, [below, *lines]))


def _chosen_lines(one: pb.Quota) -> Iterator[str]:
    """What of it `kvctl quota set` has said, if that is not all."""
    names = {field: key for key, field in KEYS.items()}
    said = [names.get(field, printable(field)) for field in one.chosen_fields]
    if said:
        yield f"by kvctl quota set: {', '.join(said)}; the rest by the configuration"


def _class_lines(one: pb.Quota) -> Iterator[str]:
    """What is said of classes, if anything."""
    for kind, name in CLASSES.items():
        said = [text for text in (_most(one, f"pin_{kind}_ttl_s"), _sure(one, f"pin_{kind}_share")) if text]
        if said:
            yield f"{name}: {', '.join(said)}"
    if one.HasField("unused_ttl_s"):
        yield f"unused: dropped after {span(one.unused_ttl_s)}"
    if one.HasField("hbm_guaranteed_bytes") or one.HasField("hbm_max_bytes"):
        of_gpus = _hbm_in_words(one)
        yield f"each GPU: guaranteed {of_gpus['hbm_guaranteed']}; at most {of_gpus['hbm_max']}"


def _is_said(one: pb.Quota, key: str) -> bool:
    return one.HasField(KEYS[key])


def _most(one: pb.Quota, field: str) -> str:
    return f"at most {span(getattr(one, field))}" if one.HasField(field) else ""


def _sure(one: pb.Quota, field: str) -> str:
    return f"sure of {getattr(one, field):.0%}" if one.HasField(field) else ""


def _origin(one: pb.Quota) -> str:
    return "kvctl quota set" if one.chosen else "configuration"


def cuts(report: pb.SetQuotaResponse, tenants: Mapping[str, pb.Tenant]) -> dict[str, list[str]]:
    """What a change takes away from what tenants have, or are promised, its own tenant and others; a line each."""
    name = report.quota.tenant
    found = {name: _own_cuts(report.quota, report.former, tenants[name])} if name in tenants else {}
    for other in report.others:
        name = other.quota.tenant
        found[name] = list(_less_promised(other.quota, other.former, tenants.get(name, pb.Tenant(name=name))))
    return {name: lines for name, lines in found.items() if lines}


def _own_cuts(now: pb.Quota, before: pb.Quota, tenant: pb.Tenant) -> list[str]:
    lines = []
    for name, held in (("dram", tenant.assigned_bytes), ("disk", tenant.disk_assigned_bytes)):
        most = getattr(now, f"{name}_max_bytes") if now.HasField(f"{name}_max_bytes") else held
        if most < held:
            lines.append(f"{name}_max: {size(held - most)} of the {size(held)} that it has go, block by block")
    if _at_most(now, "hbm_max_bytes") < min(_at_most(before, "hbm_max_bytes"), tenant.hbm_assigned_bytes):
        lines.append(f"hbm_max: what it has of a GPU beyond {size(now.hbm_max_bytes)} goes")
    lines += _less_promised(now, before, tenant)
    for kind, name in CLASSES.items():
        if _at_most(now, f"pin_{kind}_ttl_s") < _at_most(before, f"pin_{kind}_ttl_s"):
            lines.append(f"pin_{kind}_ttl: {name} last {span(getattr(now, f'pin_{kind}_ttl_s'))} at most")
        was, sure = getattr(before, f"pin_{kind}_share"), getattr(now, f"pin_{kind}_share")
        if sure < was:
            lines.append(f"pin_{kind}_share: its other pins may take {was - sure:.0%} that {name} were sure of")
    if _at_most(now, "in_flight_max") < _at_most(before, "in_flight_max"):
        lines.append(f"in_flight: what is more than {now.in_flight_max:,} at a time is turned away, or not waited for")
    if _at_most(now, "unused_ttl_s") < _at_most(before, "unused_ttl_s"):
        lines.append(f"unused_ttl: of its {tenant.blocks:,} blocks, those unused for {span(now.unused_ttl_s)} go")
    return lines


def _less_promised(now: pb.Quota, before: pb.Quota, tenant: pb.Tenant) -> Iterator[str]:
    """Guarantees that fall, whoever's quota is changed, and pins that nothing is left for."""
    for name, field in (
        ("dram_guaranteed", "dram_guaranteed_bytes"),
        ("disk_guaranteed", "disk_guaranteed_bytes"),
        ("hbm_guaranteed", "hbm_sure_bytes"),
    ):
        was, sure = getattr(before, field), getattr(now, field)
        if sure < was:
            where = " of each GPU" if field == "hbm_sure_bytes" else ""
            yield f"{name}: others may take {size(was - sure)}{where} that were promised to it"
    if now.pin_budget_bytes < min(before.pin_budget_bytes, tenant.pinned_bytes):
        gone = size(tenant.pinned_bytes - now.pin_budget_bytes)
        yield f"pins: {gone} of {size(tenant.pinned_bytes)} are let go"


def _at_most(one: pb.Quota, field: str) -> float:
    """A bound of which nothing is said is none."""
    return float(getattr(one, field)) if one.HasField(field) else inf


def quota_changes(report: pb.SetQuotaResponse) -> Text:
    """What `kvctl quota TENANT set` changed, or would."""
    now, before = _in_words(report.quota), _in_words(report.former)
    verb = "would have" if report.dry_run else "has"
    lines = [f"{printable(report.quota.tenant)} {verb}, by {_origin(report.quota)}:"]
    for name, text in now.items():
        if name in _OF_FEW and not (_is_said(report.quota, name) or _is_said(report.former, name)):
            continue  # of most tenants nothing is said of classes, or of GPUs
        lines.append(f"  {name}: {text}" + ("" if before[name] == text else f", until now {before[name]}"))
    lines += (f"  {line}" for line in _chosen_lines(report.quota))
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
        **dict(pair for kind in CLASSES for pair in _class_in_words(one, kind)),
        "unused_ttl": span(one.unused_ttl_s) if one.HasField("unused_ttl_s") else "never dropped for that",
        **_hbm_in_words(one),
    }


def _hbm_in_words(one: pb.Quota) -> dict[str, str]:
    sure, most = one.HasField("hbm_guaranteed_bytes"), one.HasField("hbm_max_bytes")
    return {
        "hbm_guaranteed": size(one.hbm_guaranteed_bytes) if sure else "an equal share",
        "hbm_max": size(one.hbm_max_bytes) if most else "no maximum",
    }


def _class_in_words(one: pb.Quota, kind: str) -> Iterator[tuple[str, str]]:
    yield f"pin_{kind}_ttl", _most(one, f"pin_{kind}_ttl_s") or "as long as they ask for"
    yield f"pin_{kind}_share", _sure(one, f"pin_{kind}_share") or "sure of nothing"


def tenants(reports: Iterable[pb.Tenant]) -> RenderableType:
    """`kvctl tenants`: what each has of what it may have."""
    table = _table(
        "tenant\nuids", ">clients\nin flight", ">dram used\nassigned", ">guaranteed\nmaximum", ">disk\nguaranteed, max",
        ">pinned\nrefused",
    )  # fmt: skip
    lines: list[str] = []
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
        if one.pinned_bytes:
            classes = zip(CLASSES, (one.pinned_5m_bytes, one.pinned_1h_bytes, one.pinned_tool_bytes), strict=True)
            by_class = ", ".join(f"{kind} {size(part)}" for kind, part in classes if part)
            lines.append(f"{printable(one.name)}, pinned: {by_class}")
        if one.hbm_assigned_bytes or one.hit_hbm_bytes:
            lines.append(f"{printable(one.name)}, on GPUs: {_on_gpus(one)}")
        if one.unused_dropped:
            lines.append(f"{printable(one.name)}, dropped since nobody used them: {one.unused_dropped:,} blocks")
    return Group(table, *map(Text, lines))


def _on_gpus(one: pb.Tenant) -> str:
    most = f", at most {size(one.hbm_max_bytes)}" if one.HasField("hbm_max_bytes") else ""
    pinned = f", {size(one.hbm_pinned_bytes)} pinned" if one.hbm_pinned_bytes else ""
    return (
        f"{size(one.hbm_used_bytes)} of {size(one.hbm_assigned_bytes)} used{pinned}, "
        f"{size(one.hbm_guaranteed_bytes)} of each guaranteed{most}, {size(one.hit_hbm_bytes)} loaded from there"
    )


def _usage(text: str) -> KvctlError:
    return KvctlError(Exit.USAGE, text)
