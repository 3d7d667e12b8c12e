"""What `kvctl clear` drops: from words on a command line to a request."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvctl import key_names
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.render import DIGEST_DIGITS as SHOWN_DIGITS
from kvproto import control_pb2 as pb
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME

__all__ = ["PREFIX_DIGITS", "Scope", "parse"]

DIGEST_DIGITS: Final = 2 * KEY_BYTES
PREFIX_DIGITS: Final = 6  # 16 million values: few enough to type, enough to tell 4,096 namespaces apart


@dataclass(frozen=True, slots=True)
class Scope:
    """The blocks that every given part agrees on. Digest and keys are in lower-case hex, whole only once `resolved`."""

    tenant: str | None
    digest: str | None
    keys: tuple[str, ...]

    @property
    def key_bytes(self) -> tuple[bytes, ...]:
        """Its keys, once resolved."""
        return tuple(map(bytes.fromhex, self.keys))

    def resolved(self, client: ControlClient) -> "Scope":
        """The same, whole. Raises KvctlError: NOT_FOUND, or USAGE if several namespaces or keys begin so."""
        digest = self._whole_digest(client)
        keys = key_names.resolved(client, self.tenant, digest, self.keys)
        return Scope(self.tenant, digest, tuple(key.hex() for key in keys))

    def _whole_digest(self, client: ControlClient) -> str | None:
        given = self.digest
        if given is None or len(given) == DIGEST_DIGITS:
            return given
        client.need_tenant(self.tenant)
        listed = [one for one in client.namespaces().namespaces if self.tenant in (None, one.tenant)]
        matching = sorted({one.digest for one in listed if one.digest.startswith(given)})
        if not matching:
            of_tenant = "" if self.tenant is None else f" of tenant {printable(self.tenant)}"
            text = f"no namespace{of_tenant} has a digest that begins with {given}; see `kvctl namespaces`"
            raise KvctlError(Exit.NOT_FOUND, text)
        if len(matching) > 1:
            shown = ", ".join(digest[: len(given) + 6] for digest in matching[:5])
            text = f"{len(matching)} namespaces begin with {given}: {shown}; give more digits"
            raise KvctlError(Exit.USAGE, text)
        return matching[0]

    def request(self, *, dry_run: bool) -> pb.ClearRequest:
        """What to ask of the daemon, once resolved."""
        if self.digest is None:
            return pb.ClearRequest(tenant=self.tenant, dry_run=dry_run, everything=pb.ClearRequest.Everything())
        if not self.keys:
            return pb.ClearRequest(tenant=self.tenant, dry_run=dry_run, namespace_digest=self.digest)
        prefix = pb.ClearRequest.Prefix(namespace_digest=self.digest, keys=self.key_bytes)
        return pb.ClearRequest(tenant=self.tenant, dry_run=dry_run, prefix=prefix)

    def __str__(self) -> str:
        what = "everything" if self.digest is None else f"namespace {self.digest[:SHOWN_DIGITS]}"
        if self.keys:
            what += f" from {len(self.keys)} key{'s' if len(self.keys) > 1 else ''} on"
        return f"{what} of {'all tenants' if self.tenant is None else f'tenant {self.tenant}'}"


def parse(tenant: str | None, namespace: str | None, keys: Sequence[str], *, everything: bool) -> Scope:
    """The scope that a command line names. Raises KvctlError with USAGE, before any daemon is asked."""
    if everything and (tenant is not None or namespace is not None or keys):
        raise _usage("--all means everything; leave it out to clear one tenant, namespace or prefix")
    if keys and namespace is None:
        raise _usage("a key means nothing without its namespace; add --namespace")
    if not everything and tenant is None and namespace is None:
        raise _usage("nothing is named; give --tenant, --namespace or --all")
    if tenant == "":
        raise _usage("--tenant is empty; see `kvctl tenants`")
    if len(keys) > KEYS_PER_FRAME:
        raise _usage(f"{len(keys):,} keys are too many; clear at most {KEYS_PER_FRAME:,} at a time")
    if namespace is not None and not (_is_hex(namespace) and PREFIX_DIGITS <= len(namespace) <= DIGEST_DIGITS):
        raise _usage(f"a namespace is named by {PREFIX_DIGITS} to {DIGEST_DIGITS} hex digits; see `kvctl namespaces`")
    digest = None if namespace is None else namespace.lower()
    return Scope(tenant, digest, key_names.checked(keys))


def _is_hex(text: str) -> bool:
    return set(text) <= set(string.hexdigits)


def _usage(text: str) -> KvctlError:
    return KvctlError(Exit.USAGE, text)
