"""By which rule tiers and tenants evict: said, and changed. Owner thread."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from kvstore import survey
from kvstore.report import PolicyChange, PolicyReport
from kvstore.rules import Chosen, Rule, Tier
from kvstore.store import Store

log = logging.getLogger(__name__)


def policy_reports(store: Store, tiers: Sequence[Tier], tenant: str | None) -> tuple[PolicyReport, ...]:
    """What holds in these tiers, for all (None) and for those that have a rule of their own; or for one tenant."""
    if tenant is not None:
        return tuple(survey.policy_report(store, one, tenant) for one in tiers)
    own = [(one.tier, one.tenant) for one in store.policies.chosen() if one.tenant is not None]
    return tuple(
        survey.policy_report(store, one, whose)
        for one in tiers
        for whose in (None, *sorted(name for where, name in own if where is one))
    )


def set_policy(
    store: Store, tiers: Sequence[Tier], tenant: str | None, rule: Rule, *, dry_run: bool
) -> tuple[PolicyChange, ...]:
    """Have tiers, or a tenant's part of them, evict by `rule`; or only say what would change."""
    before = [survey.policy_report(store, one, tenant) for one in tiers]
    if dry_run:
        return tuple(PolicyChange(replace(one, rule=rule.value, chosen=True), one.rule) for one in before)
    for one in tiers:
        store.choose_rule(Chosen(one, tenant, rule))
    now = [survey.policy_report(store, one, tenant) for one in tiers]
    for change in now:
        log.info("policy: tier=%s tenant=%s rule=%s", change.tier, change.tenant or "*", change.rule)
    return tuple(PolicyChange(after, former.rule) for after, former in zip(now, before, strict=True))


def reset_policy(store: Store, tiers: Sequence[Tier], tenant: str | None, *, dry_run: bool) -> tuple[PolicyChange, ...]:
    """Back to what is configured. A tenant's own rules go first, so that each change says what will hold in the end."""
    policies = store.policies
    chosen = (one for one in policies.chosen() if one.tier in tiers and tenant in (None, one.tenant))
    own = [(one.tier, one.tenant) for one in chosen]
    own += [(one, tenant) for one in tiers if (one, tenant) not in own]
    own.sort(key=lambda one: (one[1] is None, one[1] or "", one[0] is Tier.DISK))
    before = [survey.policy_report(store, tier, whose) for tier, whose in own]
    if dry_run:
        common = {one: policies.configured(one) if tenant is None else policies.rule_of(one, None) for one in tiers}
        return tuple(
            PolicyChange(replace(report, rule=common[tier].value, chosen=False), report.rule)
            for (tier, _), report in zip(own, before, strict=True)
        )
    for tier, whose in own:
        if policies.is_own(tier, whose):
            store.reset_rule(tier, whose)
    after = (survey.policy_report(store, *one) for one in own)
    now = [replace(one, blocks=former.blocks) for one, former in zip(after, before, strict=True)]
    log.info("policy: tiers=%s tenant=%s reset", ",".join(tiers), tenant or "*")
    return tuple(PolicyChange(after, former.rule) for after, former in zip(now, before, strict=True))
