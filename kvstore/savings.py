"""The figure by which the store is judged: seconds of prefill that were not computed again, and what loading cost.

    saved = T(0, n) - T(cached, n - cached)

by the namespace's own prefill profile, for a prompt of n tokens of which the first `cached` came from the store.
Owner thread; pure.
"""

from dataclasses import dataclass
from typing import Final

from kvproto.limits import TENANTS
from kvstore.cost import LOAD_SECONDS_MAX, TOKENS_MAX, PrefillProfile, Refusal, refusal_of

# A series is a line in every scrape. Namespaces beyond these share one series a tenant, and tenants beyond the limit
# of tenants one between them: at most 1,024 + 64 + 1 lines.
SERIES: Final = 1024
OTHER: Final = "*"  # no name of a tenant or namespace


@dataclass(frozen=True, slots=True)
class Saved:
    """Totals of one series since the start."""

    tenant: str
    namespace: str  # OTHER: all that have no series of their own
    saved_seconds: float
    load_seconds: float
    hits: int
    loads: int
    cached_tokens: int
    unpriced_tokens: int  # of those: cached, but nobody has reported what computing them takes


@dataclass(slots=True)
class _Totals:
    saved_seconds: float = 0.0
    load_seconds: float = 0.0
    hits: int = 0
    loads: int = 0
    cached_tokens: int = 0
    unpriced_tokens: int = 0


def seconds_saved(profile: PrefillProfile, cached_tokens: int, prompt_tokens: int) -> float | None:
    """Seconds of prefill that `cached_tokens` of a prompt save, never negative; None while the profile is empty."""
    assert 0 <= cached_tokens <= prompt_tokens
    whole = profile.seconds(0, prompt_tokens)
    rest = profile.seconds(cached_tokens, prompt_tokens - cached_tokens)
    if whole is None or rest is None:
        return None
    return max(0.0, whole - rest)


class Savings:
    """Totals by tenant and namespace."""

    def __init__(self, most_series: int = SERIES, most_tenants: int = TENANTS) -> None:
        self._most_series = most_series
        self._most_tenants = most_tenants
        self._series: dict[tuple[str, str], _Totals] = {}
        self._others: dict[str, _Totals] = {}
        self._rest = _Totals()

    def count_hit(
        self, tenant: str, namespace: str, profile: PrefillProfile, *, cached_tokens: int, prompt_tokens: int
    ) -> float | Refusal:
        """A prompt was computed from `cached_tokens` on. Returns the seconds saved, 0 if nobody can say."""
        refusal = refusal_of(cached_tokens, 0, TOKENS_MAX) or refusal_of(prompt_tokens, cached_tokens, TOKENS_MAX)
        if refusal is not None:
            return refusal
        totals = self._totals(tenant, namespace)
        saved = seconds_saved(profile, cached_tokens, prompt_tokens)
        totals.hits += 1
        totals.cached_tokens += cached_tokens
        if saved is None:
            totals.unpriced_tokens += cached_tokens
            return 0.0
        totals.saved_seconds += saved
        return saved

    def count_load(self, tenant: str, namespace: str, seconds: float) -> Refusal | None:
        """Blocks were loaded, in so many seconds."""
        refusal = refusal_of(seconds, 0.0, LOAD_SECONDS_MAX)
        if refusal is None:
            totals = self._totals(tenant, namespace)
            totals.loads += 1
            totals.load_seconds += seconds
        return refusal

    def report(self) -> tuple[Saved, ...]:
        """All series, in the order in which they appeared; those that others share come last."""
        series = [_saved(tenant, namespace, totals) for (tenant, namespace), totals in self._series.items()]
        series += [_saved(tenant, OTHER, totals) for tenant, totals in self._others.items()]
        if self._rest.hits or self._rest.loads:
            series.append(_saved(OTHER, OTHER, self._rest))
        return tuple(series)

    def _totals(self, tenant: str, namespace: str) -> _Totals:
        known = self._series.get((tenant, namespace))
        if known is not None:
            return known
        if len(self._series) < self._most_series:
            return self._series.setdefault((tenant, namespace), _Totals())
        if tenant in self._others or len(self._others) < self._most_tenants:
            return self._others.setdefault(tenant, _Totals())
        return self._rest


def _saved(tenant: str, namespace: str, totals: _Totals) -> Saved:
    return Saved(
        tenant, namespace, totals.saved_seconds, totals.load_seconds, totals.hits, totals.loads, totals.cached_tokens,
        totals.unpriced_tokens,
    )  # fmt: skip
