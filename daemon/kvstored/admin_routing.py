"""SummariseMatch, GetLoad and EstimateAdmission, and slices for WatchBlocks.

owner thread    `Routing`
handlers        the rest: requests are checked, slices put together, answers written down
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.limits import MATCHES_PER_FRAME, NAMESPACES_PER_MATCH
from kvstore import admission, routing
from kvstore.admission import Held, Setting
from kvstore.announcing import Announcing, Told
from kvstore.insight.looking import Looking
from kvstore.report import RemoteReport
from kvstore.routing import LoadReport, MatchSummary
from kvstore.sessions import Namespace
from kvstore.store import Store
from kvstored.admin_look import Owner, TooManyError
from kvstored.block_log import EventTally
from kvstored.requests import digest_of, keys_of, named, tenant_of

BYTES_MOST: Final = 1 << 62

T = TypeVar("T")
R = TypeVar("R")


class Asks(Protocol):
    """One call's way to the owner thread."""

    def __call__(self, question: Callable[["Routing"], T]) -> T:
        """Ask it. Raises TimeoutError once the call's time is over, and what the question raises."""


@dataclass(frozen=True, slots=True)
class MatchWish:
    """A chain, and the namespaces that must all have it; none: the only one that can be meant."""

    tenant: str | None
    digests: tuple[NamespaceDigest, ...]
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class AdmissionWish:
    """What is to be stored."""

    tenant: str
    digest: NamespaceDigest
    wanted_bytes: int


class Routing:
    """What one store can be asked for routers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._looking = Looking(store)
        self.announcing: Announcing | None = None  # who tells where blocks lie, if that is wanted
        self.events: Callable[[], EventTally | None] = lambda: None  # what was told
        self.remote: Callable[[], RemoteReport | None] = lambda: None  # how the remote tier stands

    def _namespace(self, tenant: str | None, digest: NamespaceDigest | None) -> Namespace:
        """Raises KeyError, SeveralError."""
        return self._store.registry.by_number[self._looking.begin(tenant, digest).number]

    def summarise(self, wish: MatchWish) -> MatchSummary:
        """Raises KeyError for an unknown tenant or namespace, ValueError where several could be meant."""
        found = [self._namespace(wish.tenant, digest) for digest in wish.digests or (None,)]
        if len({namespace.tenant.number for namespace in found}) > 1:
            raise KeyError("these namespaces are not of one tenant; name it")
        return routing.summarise(self._store, found, np.frombuffer(b"".join(wish.keys), dtype=np.uint64).copy())

    def load(self) -> LoadReport:
        """How busy it is."""
        return replace(routing.load_of(self._store), remote=self.remote())

    def begin(self, wish: AdmissionWish) -> tuple[Setting, int]:
        """What an estimate goes by, and how many blocks are wanted. Raises KeyError."""
        namespace = self._namespace(wish.tenant, wish.digest)
        return admission.begin(self._store, namespace), -(-wish.wanted_bytes // namespace.identity.block_bytes)

    def slice(self, setting: Setting, start: int) -> tuple[Held, int]:
        """See `admission.slice_of`."""
        return admission.slice_of(self._store, setting, start)

    def there(self, tenant: str, start: int) -> tuple[Told, int]:
        """See `Announcing.there`."""
        assert self.announcing is not None, "nobody looks"
        return self.announcing.there(tenant, start)


# -- handlers ---------------------------------------------------------------------------------------------------


def match_wish_of(request: pb.SummariseMatchRequest) -> MatchWish:
    """Raises ValueError."""
    keys = keys_of(request.keys)
    digests = tuple(dict.fromkeys(map(digest_of, request.namespace_digests)))
    if len(digests) > NAMESPACES_PER_MATCH or len(digests) * len(keys) > MATCHES_PER_FRAME:
        most = f"{NAMESPACES_PER_MATCH} namespaces and {MATCHES_PER_FRAME} look-ups"
        raise ValueError(f"{len(digests)} namespaces of {len(keys)} keys are more than a call looks for: {most}")
    return MatchWish(tenant_of(request), digests, keys)


def summary_of(summary: MatchSummary) -> pb.SummariseMatchResponse:
    """Field by field."""
    return pb.SummariseMatchResponse(**named(summary))


def load_of(report: LoadReport) -> pb.GetLoadResponse:
    """Field by field."""
    nested: dict[str, Any] = {
        "tiers": [pb.TierLoad(**named(tier)) for tier in report.tiers],
        "remote": _remote_load(report.remote) if report.remote else None,
    }
    return pb.GetLoadResponse(**{**named(report), **nested})


def _remote_load(report: RemoteReport) -> pb.RemoteLoad:
    return pb.RemoteLoad(
        reading=report.reading,
        writing=report.writing,
        capacity_bytes=report.capacity_bytes,
        used_bytes=report.used_bytes,
        read_bytes_per_s=report.bytes_per_s or None,
    )


def admission_wish_of(request: pb.EstimateAdmissionRequest) -> AdmissionWish:
    """Raises ValueError."""
    if not request.tenant:
        raise ValueError("tenant must name whose blocks are meant")
    if not 0 < request.bytes <= BYTES_MOST:
        raise ValueError(f"bytes is from 1 to {BYTES_MOST}")
    return AdmissionWish(request.tenant, digest_of(request.namespace_digest), request.bytes)


def estimate(ask: Asks, wish: AdmissionWish, waits: Callable[[], bool]) -> pb.EstimateAdmissionResponse:
    """`waits`: whether the caller still does. Raises KeyError, TimeoutError, TooManyError."""
    setting, wanted = ask(lambda about: about.begin(wish))
    parts: list[Held] = []
    start, count = 1, 0
    while start and wanted > setting.free_slots:
        if not waits():
            raise TimeoutError
        part, start = ask(_slice(setting, start))
        parts.append(part)
        count += part.rows.size
        if count > admission.ROWS_MOST:
            raise TooManyError(f"more than {admission.ROWS_MOST:,} blocks are not looked over; ask for less")
    return pb.EstimateAdmissionResponse(**named(admission.estimate(setting, parts, wanted, waits)))


def _slice(setting: Setting, start: int) -> Callable[[Routing], tuple[Held, int]]:
    return lambda about: about.slice(setting, start)


def asker(owner: Owner, wait_s: float) -> Asks:
    """Many questions within the time of one call."""
    until_s = time.monotonic() + wait_s

    def ask(question: Callable[[Routing], R]) -> R:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return owner.ask(lambda port: question(port.routing), left_s)

    return ask
