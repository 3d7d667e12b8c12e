"""What the control socket asks of the owner thread, and how it is refused."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from kvproto.ids import NamespaceDigest
from kvproto.policy_frames import Fetching, Pinned
from kvstore.evicting import EvictReport
from kvstore.handing_over import HandOverReport
from kvstore.hints.report import GuidingReport
from kvstore.insight.looking import Looking
from kvstore.report import (
    ClearReport,
    ClearScope,
    ConfigValue,
    Counters,
    DaemonReport,
    NamespaceReport,
    PolicyChange,
    PolicyReport,
    ScrubReport,
    SessionReport,
    TenantReport,
)
from kvstore.report_costs import CostsReport
from kvstore.report_pins import PinsReport
from kvstore.report_quotas import QuotaChange, QuotaReport
from kvstore.rules import Rule, Tier
from kvstored.admin_evict import EvictWish, Walked
from kvstored.admin_insight import Explanation, MissQuestion, Observed
from kvstored.admin_pins import PrefixWish, Unpinned
from kvstored.admin_quotas import QuotaWish
from kvstored.admin_routing import Routing

__all__ = ["AdminPort", "AmbiguousError", "Owner", "RefusedError"]

T = TypeVar("T")


class RefusedError(Exception):
    """Not as things are. Says why and, after a semicolon, what to do."""


class AmbiguousError(RefusedError):
    """The request names less than it must: several things could be meant."""


class AdminPort(Protocol):
    """What the owner thread answers. Every method runs there, does not block, and returns plain values."""

    @property
    def looking(self) -> Looking:
        """Blocks, slice by slice."""

    @property
    def routing(self) -> Routing:
        """What routers ask."""

    def status(self) -> DaemonReport:
        """Everything of `kvctl status`."""

    def counters(self) -> Counters:
        """Totals since the daemon started."""

    def namespaces(self) -> tuple[NamespaceReport, ...]:
        """Namespaces that hold blocks or that a session has open."""

    def tenants(self) -> tuple[TenantReport, ...]:
        """Every tenant that has a session, blocks or a place in the configuration."""

    def clients(self) -> tuple[SessionReport, ...]:
        """Connected sessions."""

    def config(self) -> tuple[ConfigValue, ...]:
        """Every setting with its origin."""

    def clear(self, scope: ClearScope, *, dry_run: bool) -> "Future[ClearReport]":
        """Begin to drop what `scope` covers, or only to count it; done in slices, since it can be a million blocks.

        Raises KeyError(text): unknown tenant or namespace.
        """

    def evict(self, wish: EvictWish, *, dry_run: bool) -> "Future[EvictReport]":
        """Begin to have blocks leave a tier, or only to count them. Raises as `clear`; RefusedError: no such tier."""

    def walk(self, tenant: str, digest: NamespaceDigest, after: int) -> Walked:
        """A page of the keys of a namespace's blocks. Raises KeyError(text): unknown tenant or namespace."""

    def drain(self, *, on: bool) -> None:
        """Refuse new blocks from now on, or take them again. Idempotent. Raises RefusedError: it is stopping."""

    def scrub(self, *, start: bool, rate: int | None, tier: Tier = Tier.DISK) -> ScrubReport:
        """How far the scrub of a tier is; `start` first begins one anew, at `rate` bytes a second.

        A `rate` of 0 is as fast as it goes, None what the configuration says.
        Raises RefusedError where there is nothing to scrub.
        """

    def costs(self, tenant: str | None, digest: NamespaceDigest | None) -> CostsReport:
        """What is known of the costs of a tenant's namespaces (None: of everybody's), or of one namespace.

        Raises KeyError(text): unknown tenant or namespace.
        """

    def pins(self, tenant: str | None) -> PinsReport:
        """Pins of a tenant (None: of everybody). Raises KeyError(text): unknown tenant."""

    def pin(self, wish: PrefixWish) -> Pinned:
        """Keep a prefix for a while. Raises KeyError(text) where it is not plain which namespace is meant."""

    def prefetch(self, wish: PrefixWish) -> Fetching:
        """Have a prefix read into memory. Raises as `pin`."""

    def hand_over(self, wish: PrefixWish, *, dry_run: bool) -> HandOverReport:
        """Have a prefix written beyond this host, or say how far it is. Raises as `pin`."""

    def unpin(self, tenant: str, numbers: Sequence[int]) -> Unpinned:
        """End these pins of a tenant, or all of them if none is named. Raises KeyError(text): unknown tenant."""

    def guiding(self, tenant: str | None) -> GuidingReport:
        """Programs and workflows of a tenant (None: of everybody). Raises KeyError(text): unknown tenant."""

    def policies(self, tier: Tier | None, tenant: str | None) -> tuple[PolicyReport, ...]:
        """By which rules a tier (None: every one) evicts; with a tenant only what holds for it.

        Raises KeyError(text): unknown tenant; RefusedError: no such tier here.
        """

    def set_policy(
        self, tier: Tier | None, tenant: str | None, rule: Rule | None, *, dry_run: bool
    ) -> tuple[PolicyChange, ...]:
        """Have a tier (None: every one), or a tenant's part of it, evict by `rule`, or only say what would change.

        `rule` None: what the configuration says, and without a tenant also where one has a rule of its own.
        Raises as `policies`.
        """

    def quotas(self, tenant: str | None) -> tuple[QuotaReport, ...]:
        """What a tenant (None: each) is promised, and the most that it may have. Raises KeyError(text): unknown."""

    def set_quota(self, wish: QuotaWish, *, dry_run: bool) -> QuotaChange:
        """Change what a tenant is promised and allowed, or only say what would change.

        Raises KeyError(text): unknown tenant; RefusedError: there is not so much, or more guaranteed than allowed.
        """

    def advise(self, tenant: str | None) -> Observed:
        """What was observed of a tenant's accesses (None: of everybody's).

        Raises KeyError(text): unknown tenant; RefusedError: curves are off.
        """

    def explain_miss(self, question: MissQuestion) -> Explanation:
        """What became of the first block of a chain that is not there.

        Raises KeyError(text): unknown tenant or namespace; AmbiguousError: several namespaces could be meant.
        """


class Owner(Protocol):
    """The way to the owner thread."""

    def ask(self, question: Callable[[AdminPort], T], timeout_s: float) -> T:
        """Run `question` on the owner thread; return what it returns, raise what it raises. Any other thread.

        Raises TimeoutError after `timeout_s` seconds. A question that has not begun by then never runs: an
        operator who was told of a timeout may have changed their mind.
        """
