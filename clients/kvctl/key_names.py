"""Keys as a command line names them: all 64 hex digits, or as many of the first as tell a block from all others there.

Tables show twelve. Beginnings are looked up in the namespace that is meant; a key of a block that is gone is only
known whole.
"""

import string
from collections.abc import Sequence
from typing import Final

from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvproto import control_pb2 as pb
from kvproto.limits import BEGINNINGS_PER_REQUEST, KEY_BEGINNING_DIGITS, KEY_BYTES

__all__ = ["KEY_DIGITS", "checked", "resolved"]

KEY_DIGITS: Final = 2 * KEY_BYTES
WANTED: Final = f"{KEY_DIGITS} hex digits, or {KEY_BEGINNING_DIGITS} or more of the first"
_MORE_DIGITS: Final = 6  # shown beyond those that were given, where several keys begin so


def checked(keys: Sequence[str]) -> tuple[str, ...]:
    """The same in lower case. Raises KvctlError with USAGE for what can be no key, before any daemon is asked."""
    for key in keys:
        if not set(key) <= set(string.hexdigits) or not KEY_BEGINNING_DIGITS <= len(key) <= KEY_DIGITS:
            raise _usage(f"{printable(key)!r} is not a key; a key is {WANTED}")
    if sum(len(key) < KEY_DIGITS for key in keys) > BEGINNINGS_PER_REQUEST:
        text = f"more than {BEGINNINGS_PER_REQUEST} keys are not whole"
        raise _usage(f"{text}; `kvctl -o json ls NAMESPACE --blocks` has them whole")
    return tuple(key.lower() for key in keys)


def resolved(client: ControlClient, tenant: str | None, digest: str | None, keys: Sequence[str]) -> tuple[bytes, ...]:
    """Whole keys; those that are not are looked up. Raises KvctlError: NOT_FOUND, or USAGE if several begin so."""
    short = [key for key in dict.fromkeys(keys) if len(key) < KEY_DIGITS]
    whole: dict[str, bytes] = {}
    if short:
        report = client.find_keys(pb.FindKeysRequest(tenant=tenant, namespace_digest=digest, beginnings=short))
        where = f"namespace {report.digest[:12]} of {printable(report.tenant)}"
        whole = {key: _only(key, found, where) for key, found in zip(short, report.found, strict=True)}
    return tuple(whole[key] if key in whole else bytes.fromhex(key) for key in keys)


def _only(key: str, found: pb.FoundKeys, where: str) -> bytes:
    if not found.keys:
        text = f"no block in {where} has a key that begins with {key}"
        raise KvctlError(Exit.NOT_FOUND, f"{text}; of a block that is gone give the whole key")
    if len(found.keys) > 1:
        shown = ", ".join(one.hex()[: len(key) + _MORE_DIGITS] for one in found.keys)
        count = f"more than {len(found.keys)}" if found.more else f"{len(found.keys)}"
        raise _usage(f"{count} keys in {where} begin with {key}: {shown}; give more digits")
    return found.keys[0]


def _usage(text: str) -> KvctlError:
    return KvctlError(Exit.USAGE, text)
