"""Advise and ExplainMiss: what the owner thread looks up for them, and what is made of it elsewhere.

owner thread    `observe`, `explain_miss`     copies of curves and counts; about a tenth of a millisecond, and a half
handler         `question_of`, `advice_of`, `explanation_of`     requests are checked, curves read, sentences made
"""

from dataclasses import fields
from typing import Any, Final

from kvproto import control_pb2 as pb
from kvproto.limits import PAGE_BYTES
from kvstore.insight.advise import Advice, Change, RuleTrial, Sizes, advise, sentences, try_rules
from kvstore.insight.curves import Estimate
from kvstore.insight.explain import Explanation, MissQuestion, explain
from kvstore.rules import Tier
from kvstore.sessions import Tenant
from kvstore.store import Store
from kvstore.watching import Observed
from kvstored.requests import keys_of, namespace_of, tenant_of

__all__ = [
    "Explanation", "MissQuestion", "Observed", "advice_of", "explain_miss", "explanation_of", "observe", "question_of",
]  # fmt: skip

DELTAS: Final = (-0.25, 0.25, 0.5, 1.0)  # of what there is


class CurvesOffError(Exception):
    """There is nothing to advise from."""


# -- owner thread -----------------------------------------------------------------------------------------------


def observe(store: Store, name: str | None) -> Observed:
    """What is known of a tenant, or (None) of all. Raises KeyError for an unknown one, CurvesOffError."""
    if name is not None and name not in store.tenants:
        raise KeyError(f"no tenant is called {name}")
    if not store.watching.on:
        raise CurvesOffError("curves are off, so that nothing is known; set insight.curves and restart kvstored")
    tenant = None if name is None else store.tenants[name]
    rule = store.policies.rule_of(Tier.DRAM, name)
    return store.watching.observe(tenant, _sizes(store, tenant), rule.value)


def _sizes(store: Store, tenant: Tenant | None) -> Sizes:
    segments = store.disk.segments
    if tenant is None:
        disk_bytes = segments.positions * segments.segment_bytes if store.limits.disk.disk_bytes else 0
        return Sizes(store.limits.positions * store.limits.arena_bytes, disk_bytes)
    return Sizes(store.quotas.memory_bytes(tenant), tenant.segments * segments.segment_bytes)


def explain_miss(store: Store, question: MissQuestion) -> Explanation:
    """See `explain`. Raises KeyError, ValueError."""
    return explain(store, question)


# -- any thread -------------------------------------------------------------------------------------------------


def question_of(request: pb.ExplainMissRequest) -> MissQuestion:
    """What a request asks. Raises ValueError for what no daemon could answer."""
    return MissQuestion(tenant_of(request), namespace_of(request), keys_of(request.keys))


def advice_of(observed: Observed) -> pb.AdviseResponse:
    """What follows from what was observed: the curve at the sizes there are and at others, and other rules."""
    if observed.curve is None or not observed.watched:
        whom = f"Tenant {observed.tenant} is not observed, or" if observed.tenant else "Nothing to go by:"
        text = f"{whom} nothing has been asked for yet."
        sizes = observed.sizes
        return pb.AdviseResponse(
            tenant=observed.tenant, dram_bytes=sizes.dram_bytes, disk_bytes=sizes.disk_bytes, sentences=[text]
        )
    curve, sizes = observed.curve, observed.sizes
    advice = advise(curve, sizes, _deltas(sizes.dram_bytes), _deltas(sizes.disk_bytes))
    per_min = 60.0 * curve.cost_s_per_s
    rules = try_rules(observed.shadows, observed.rule, observed.shadow_span_s, per_min)
    really = observed.found / observed.asked if observed.asked else 0.0
    points = [pb.CurvePoint(capacity_bytes=at, hit_share=hit, saved_share=saved) for at, hit, saved in curve.points()]
    nested: dict[str, Any] = {
        name: _estimate(getattr(advice, name)) for name in ("dram_hit", "hit", "hit_ceiling")
    } | {
        "changes": map(_change, advice.changes),
        "rules": map(_rule, rules),
        "points": points,
        "sentences": sentences(advice, really, rules),
    }  # fmt: skip
    plain = {one.name: getattr(advice, one.name) for one in fields(Advice) if one.name not in (*nested, "sizes")}
    return pb.AdviseResponse(
        tenant=observed.tenant, watched=True, dram_bytes=sizes.dram_bytes, disk_bytes=sizes.disk_bytes,
        really_hit_share=really, lost=observed.lost, **plain, **nested,
    )  # fmt: skip


def _deltas(size_bytes: int) -> list[int]:
    """Steps up and down, in whole pages."""
    return [int(size_bytes * share) // PAGE_BYTES * PAGE_BYTES for share in DELTAS] if size_bytes else []


def _estimate(estimate: Estimate) -> pb.Estimate:
    return pb.Estimate(share=estimate.share, error=estimate.error)


def _change(change: Change) -> pb.SizeChange:
    return pb.SizeChange(
        tier=change.tier.value, delta_bytes=change.delta_bytes, hit=_estimate(change.hit),
        prefill_s_per_min=change.prefill_s_per_min, prefill_error=change.prefill_error, measurable=change.measurable,
    )  # fmt: skip


def _rule(tried: RuleTrial) -> pb.RuleTried:
    return pb.RuleTried(
        rule=tried.rule, in_force=tried.in_force, hit=_estimate(tried.hit), hit_gain=_estimate(tried.hit_gain),
        prefill_s_per_min=tried.prefill_s_per_min, prefill_error=tried.prefill_error, measurable=tried.measurable,
        blocks=tried.blocks,
    )  # fmt: skip


def explanation_of(explanation: Explanation) -> pb.ExplainMissResponse:
    """The answer in its form on the wire."""
    plain = {one.name: getattr(explanation, one.name) for one in fields(Explanation)}
    plain["elsewhere"] = [
        pb.Elsewhere(tenant=one.tenant, digest=one.digest, differs=one.differs) for one in explanation.elsewhere
    ]
    return pb.ExplainMissResponse(**plain)
