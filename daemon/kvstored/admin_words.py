"""What was asked for, in the words of kvctl's command line: what an operator reads in the audit file and in events.

Keys are counted, not named: whose prompt it was is nobody's business.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from kvproto import control_pb2 as pb
from kvproto.sizes import format_bytes
from kvstored.admin_audit import SCOPE_LETTERS

SHOWN_DIGITS: Final = 12  # of a digest
NAMED: Final = 16  # pins; more are counted
_VERBS: Final[Mapping[str, Callable[[Any], str]]] = {
    "SetPolicy": lambda request: "policy reset" if request.reset else "policy set",
    "SetQuota": lambda request: "quota set" if _settings(request) else "quota reset",
    "NoteTransfer": lambda request: str(request.verb),
    "HandOver": lambda _: "move",
}
_KEYS: Final = {"in_flight_max": "in_flight"}  # of a quota, where they are not fields without their units


def verb_of(verb: str, request: Any) -> str:
    """The command: `quota set`."""
    return _VERBS[verb](request) if verb in _VERBS else verb.lower()


def words_of(verb: str, request: Any) -> str:
    """What follows it: `chat dram_max=48GiB`. Empty where nothing does."""
    words = _WORDS.get(verb, _scope)(request)
    return " ".join(words)[:SCOPE_LETTERS]


def _scope(request: Any) -> Iterator[str]:
    """Blocks: `--tenant chat --namespace 0123456789ab (3 keys)`, and what else there is to say of them."""
    fields = {field.name for field in request.DESCRIPTOR.fields}
    prefix = request.prefix if "prefix" in fields and request.HasField("prefix") else request
    tenant = getattr(request, "tenant", "") or getattr(prefix, "tenant", "")
    digest = getattr(request, "namespace_digest", "") or getattr(prefix, "namespace_digest", "")
    keys = len(getattr(prefix, "keys", ()))
    if "everything" in fields and not tenant and request.HasField("everything"):
        yield "--all"
    yield from ("--tenant", tenant) if tenant else ()
    yield from ("--namespace", digest[:SHOWN_DIGITS]) if digest else ()
    if keys:
        yield f"({keys:,} {'key' if keys == 1 else 'keys'})"


def _evict(request: pb.EvictRequest) -> Iterator[str]:
    yield from _scope(request)
    yield from ("--tier", request.tier or "dram")
    yield from ("--bytes", format_bytes(request.bytes)) if request.bytes else ()
    yield from ("(not what continues them)",) if request.exactly else ()


def _pin(request: pb.PinRequest) -> Iterator[str]:
    yield from _scope(request)
    yield from ("--on-disk",) if request.on_disk else ()
    yield f"for {request.ttl_s:g} s"


def _unpin(request: pb.UnpinRequest) -> Iterator[str]:
    yield request.tenant
    yield from map(str, request.pins[:NAMED]) if request.pins else ("--all",)
    if len(request.pins) > NAMED:
        yield f"and {len(request.pins) - NAMED:,} more"


def _scrub(request: pb.ScrubRequest) -> Iterator[str]:
    yield from ("--tier", request.tier or "disk")
    if request.HasField("rate_bytes_per_s"):
        yield from ("--rate", format_bytes(request.rate_bytes_per_s))


def _policy(request: pb.SetPolicyRequest) -> Iterator[str]:
    if request.rule:
        yield request.rule
    if request.reset and request.tenant:
        yield request.tenant
    yield from ("--tier", request.tier) if request.tier else ()
    yield from ("--tenant", request.tenant) if request.tenant and not request.reset else ()


def _quota(request: pb.SetQuotaRequest) -> Iterator[str]:
    yield request.tenant
    settings = _settings(request)
    configured = [_key(name) for name in request.configured]
    yield from settings or configured
    if settings and (configured or request.reset):
        yield f"(reset: {', '.join(configured) or 'all others'})"


def _settings(request: pb.SetQuotaRequest) -> list[str]:
    """`KEY=VALUE` of what is set, as configuration and command line have it."""
    said = {field.name: value for field, value in request.ListFields() if field.name in _SETTABLE}
    pairs = [f"{_key(name)}={_value(name, value)}" for name, value in said.items()]
    return pairs + [f"{_key(name)}=none" for name in request.usual]


def _key(field: str) -> str:
    return _KEYS.get(field, field.removesuffix("_bytes").removesuffix("_s"))


def _value(field: str, value: Any) -> str:
    if field.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:g}s" if field.endswith("_s") else f"{value:g}" if isinstance(value, float) else str(value)


_SETTABLE: Final = frozenset(
    field.name
    for field in pb.SetQuotaRequest.DESCRIPTOR.fields
    if field.name not in {"tenant", "usual", "configured", "reset", "dry_run"}
)
_WORDS: Final[Mapping[str, Callable[[Any], Iterator[str]]]] = {
    "Evict": _evict,
    "Pin": _pin,
    "Unpin": _unpin,
    "Scrub": _scrub,
    "SetPolicy": _policy,
    "SetQuota": _quota,
}
