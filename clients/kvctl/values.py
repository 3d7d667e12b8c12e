"""What Tab offers for values: names that the daemon knows, asked of it within a moment, and words that never change.

Nothing is offered, and nothing is said, where there is no daemon, it does not answer in time, or it refuses.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import typer

from kvctl.client import ControlClient, KvctlError, find_socket, home_folder
from kvproto import control_pb2 as pb

__all__ = ["namespaces", "one_of", "pins", "tenants"]

WAIT_S: Final = 0.5  # somebody waits with a finger on the key
DIGITS: Final = 12  # of a digest
# zsh evaluates what it is offered, and a tenant chooses what its models are called.
_WORD: Final = re.compile(r"[\w.@+-]+", re.ASCII)
_UNSAFE: Final = re.compile(r"[^\w .,:@/+-]", re.ASCII)
TIERS: Final = ("dram", "disk")
RULES: Final = ("lru", "second_touch", "pgdsf", "lfu", "s3fifo", "arc", "density")
ORDERS: Final = ("blocks", "hits", "recent")

Offer: TypeAlias = str | tuple[str, str]  # a word, with what it is if the shell shows that
Offers: TypeAlias = Callable[[typer.Context, str], list[Offer]]


def one_of(words: Sequence[str]) -> Offers:
    """Offers these."""

    def offered(_context: typer.Context, incomplete: str) -> list[Offer]:
        return [word for word in words if word.startswith(incomplete)]

    return offered


def tenants(context: typer.Context, incomplete: str) -> list[Offer]:
    """Offers names of tenants, those too that nobody has come for yet."""
    return _asked(context, incomplete, lambda client: [one.name for one in client.tenants().tenants])


def namespaces(context: typer.Context, incomplete: str) -> list[Offer]:
    """Offers digests of namespaces, with their models; those of the tenant that is named already."""
    tenant = context.params.get("tenant")
    return _asked(
        context,
        incomplete,
        lambda client: sorted(
            {(one.digest[:DIGITS], one.model) for one in client.namespaces().namespaces if tenant in (None, one.tenant)}
        ),
    )


def pins(context: typer.Context, incomplete: str) -> list[Offer]:
    """Offers pins of the tenant that is named already."""
    request = pb.ListPinsRequest(tenant=context.params.get("tenant"))
    return _asked(context, incomplete, lambda client: [str(one.pin) for one in client.pins(request).pins])


def _asked(
    context: typer.Context, incomplete: str, question: Callable[[ControlClient], Iterable[Offer]]
) -> list[Offer]:
    options = context.find_root().params
    if options.get("address"):
        return []  # another host is not asked while somebody types
    given = options.get("runtime_dir")
    try:
        socket = find_socket(Path(given) if given else None, os.environ, home_folder())
        with ControlClient(socket, WAIT_S) as client:
            found = [(one, "") if isinstance(one, str) else one for one in question(client)]
    except (KvctlError, OSError):
        return []
    harmless = ((word, _UNSAFE.sub("_", said)) for word, said in found if _WORD.fullmatch(word))
    return [(word, said) if said else word for word, said in harmless if word.startswith(incomplete)]
