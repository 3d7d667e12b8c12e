"""Parts that requests on the control socket have in common, checked; and reports as messages. Any thread."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Protocol

from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME
from kvstore.rules import Rule, Tier

__all__ = ["digest_of", "keys_of", "named", "namespace_of", "rule_of", "tenant_of", "tier_of"]


class OfTenant(Protocol):
    """A request that may name a tenant."""

    tenant: str

    def HasField(self, field_name: Any) -> bool:  # noqa: N802  as protobuf has it; each message its own literals
        """Was it named?"""


class OfNamespace(Protocol):
    """A request that may name a namespace."""

    namespace_digest: str

    def HasField(self, field_name: Any) -> bool:  # noqa: N802
        """Was it named?"""


def tenant_of(request: OfTenant) -> str | None:
    """The tenant that a request names; None for any. Raises ValueError."""
    tenant = request.tenant if request.HasField("tenant") else None
    if tenant == "":
        raise ValueError("tenant must not be empty: leave it out to mean all tenants")
    return tenant


def namespace_of(request: OfNamespace) -> NamespaceDigest | None:
    """The namespace that a request names; None for any. Raises ValueError."""
    return digest_of(request.namespace_digest) if request.HasField("namespace_digest") else None


def digest_of(text: str) -> NamespaceDigest:
    """From hex. Raises ValueError."""
    if not text:
        raise ValueError("namespace_digest is missing: keys mean nothing without their namespace")
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != KEY_BYTES or len(text) != 2 * KEY_BYTES:
        raise ValueError(f"namespace_digest must be {2 * KEY_BYTES} hex digits")
    return NamespaceDigest(digest)


def keys_of(keys: Iterable[bytes]) -> tuple[BlockKey, ...]:
    """Those of a prefix. Raises ValueError."""
    found = tuple(BlockKey(key) for key in keys)
    if not 1 <= len(found) <= KEYS_PER_FRAME:
        raise ValueError(f"a prefix needs 1 to {KEYS_PER_FRAME} keys, not {len(found)}")
    for key in found:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key is {KEY_BYTES} bytes, not {len(key)}")
    return found


def tier_of(request: pb.GetPolicyRequest | pb.SetPolicyRequest | pb.ScrubRequest) -> Tier | None:
    """The tier that a request names; None for all. Raises ValueError."""
    if not request.HasField("tier"):
        return None
    if request.tier not in list(Tier):
        raise ValueError(f"no tier is called {request.tier!r}: it is one of {', '.join(Tier)}")
    return Tier(request.tier)


def rule_of(request: pb.SetPolicyRequest) -> Rule | None:
    """The rule that is wished for; None: what the configuration says. Raises ValueError."""
    name = request.rule
    if request.reset:
        if name:
            raise ValueError("a rule and reset do not go together")
        return None
    if name not in list(Rule):
        raise ValueError(f"no rule is called {name!r}: it is one of {', '.join(Rule)}")
    return Rule(name)


def named(report: Any) -> dict[str, Any]:
    """Of any dataclass, for the message that has the same field names."""
    return {field.name: getattr(report, field.name) for field in fields(report)}
