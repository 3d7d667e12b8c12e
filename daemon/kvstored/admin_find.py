"""FindKeys: whole keys by the first digits that people type. Handler threads; the owner is asked slice by slice."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.limits import BEGINNINGS_PER_REQUEST, KEY_BEGINNING_DIGITS, KEY_BYTES, KEYS_PER_BEGINNING
from kvstore.insight.finding import BEGINNINGS_A_LOOK
from kvstore.insight.looking import Begun, Looking
from kvstored.admin_look import Asks
from kvstored.requests import namespace_of, tenant_of

_DIGITS = frozenset(string.digits + "abcdef")


@dataclass(frozen=True, slots=True)
class FindWish:
    """Keys that begin so, in lower-case hex."""

    tenant: str | None
    digest: NamespaceDigest | None
    beginnings: tuple[str, ...]


def find_wish_of(request: pb.FindKeysRequest) -> FindWish:
    """Raises ValueError."""
    beginnings = tuple(request.beginnings)
    if not 1 <= len(beginnings) <= BEGINNINGS_PER_REQUEST:
        raise ValueError(f"1 to {BEGINNINGS_PER_REQUEST} beginnings of keys are looked for at once")
    for beginning in beginnings:
        if not KEY_BEGINNING_DIGITS <= len(beginning) <= 2 * KEY_BYTES or not _DIGITS.issuperset(beginning):
            raise ValueError(f"a beginning is {KEY_BEGINNING_DIGITS} to {2 * KEY_BYTES} lower-case hex digits")
    return FindWish(tenant_of(request), namespace_of(request), beginnings)


def find_keys(ask: Asks, wish: FindWish) -> pb.FindKeysResponse:
    """Raises KeyError, ValueError, TimeoutError."""
    begun = ask(lambda looking: looking.begin(wish.tenant, wish.digest))
    found: list[pb.FoundKeys] = []
    for at in range(0, len(wish.beginnings), BEGINNINGS_A_LOOK):
        found += map(_found, _found_for(ask, begun, wish.beginnings[at : at + BEGINNINGS_A_LOOK]))
    return pb.FindKeysResponse(tenant=begun.tenant, digest=begun.digest, found=found)


def _found_for(ask: Asks, begun: Begun, beginnings: Sequence[str]) -> list[list[BlockKey]]:
    found: list[dict[BlockKey, None]] = [{} for _ in beginnings]  # a block that moves may be met twice
    start = 1
    while start:
        more, start = ask(_slice(begun, start, beginnings))
        for keys, some in zip(found, more, strict=True):
            keys.update(dict.fromkeys(some))
            while len(keys) > KEYS_PER_BEGINNING + 1:
                keys.popitem()
    return [list(keys) for keys in found]


def _slice(
    begun: Begun, start: int, beginnings: Sequence[str]
) -> Callable[[Looking], tuple[list[list[BlockKey]], int]]:
    return lambda looking: looking.keys_beginning(begun, start, beginnings)


def _found(keys: Sequence[BlockKey]) -> pb.FoundKeys:
    return pb.FoundKeys(keys=keys[:KEYS_PER_BEGINNING], more=len(keys) > KEYS_PER_BEGINNING)
