# ruff: noqa: N802  handlers are named as gRPC names them
"""The handlers of the control socket: each checks its request, asks the owner thread, and builds the answer.

Any thread of the server (`control.py`); none holds state. proto/kvproto/control.proto says what each call means and
which status code says what.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, Protocol, TypeVar

import grpc

from kvproto import control_pb2 as pb
from kvproto.limits import PIN_TTL_NS_MAX, PREFETCH_NS_MAX
from kvproto.policy_frames import Tier as PinTier
from kvstore.insight.looking import SeveralError
from kvstore.rules import Tier
from kvstored.admin_audit import Audit, acts_of
from kvstored.admin_evict import evict_wish_of, evicted_of, scope_of, walk_of, walk_wish_of
from kvstored.admin_find import find_keys, find_wish_of
from kvstored.admin_hints import programs_of, workflows_of
from kvstored.admin_insight import advice_of, explanation_of, question_of
from kvstored.admin_look import (
    TooManyError,
    asker,
    draw_tree,
    list_blocks,
    list_wish_of,
    stat_prefix,
    stat_wish_of,
    tree_wish_of,
)
from kvstored.admin_pins import hand_over_wish_of, pinned_of, pins_of, prefix_wish_of
from kvstored.admin_quotas import wish_of
from kvstored.admin_routing import admission_wish_of, estimate, load_of, match_wish_of, summary_of
from kvstored.admin_routing import asker as ask_routing
from kvstored.block_events_stream import WatchedBlocks
from kvstored.control_acts import GoesOnError, at_once, carry_out
from kvstored.control_messages import change_of, costs_of, status_of
from kvstored.control_port import AdminPort, AmbiguousError, Owner, RefusedError
from kvstored.events import Events
from kvstored.events_stream import Watched
from kvstored.requests import named, namespace_of, rule_of, tenant_of, tier_of

__all__ = ["Verbs"]

OWNER_WAIT_S: Final = 10.0  # the longest a handler waits for the owner, where the caller sets no shorter deadline
TELL_SHARE, TELL_S = 0.1, 0.25  # of a caller's time, and at most so many seconds: to say in it what came of it
RATE_BYTES_PER_S: Final = 1 << 40  # far above any drive

_log = logging.getLogger(__name__)

T = TypeVar("T")
Report = TypeVar("Report")
Answer = TypeVar("Answer")


class Verbs:
    """The handlers. Their names are gRPC's."""

    def __init__(
        self, owner: Owner, announce: "_Announce", audit: Audit | None, events: Events, watched_blocks: WatchedBlocks
    ) -> None:  # fmt: skip
        self._owner = owner
        self._announce = announce
        self._audit = audit
        self._watched = Watched(events)
        self._watched_blocks = watched_blocks

    def GetStatus(self, _: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        return self._answer(context, lambda port: port.status(), status_of)

    def GetStatistics(self, _: pb.GetStatisticsRequest, context: grpc.ServicerContext) -> pb.GetStatisticsResponse:
        return self._answer(
            context,
            lambda port: port.counters(),
            lambda counters: pb.GetStatisticsResponse(counters=pb.Counters(**named(counters))),
        )

    def ListNamespaces(self, _: pb.ListNamespacesRequest, context: grpc.ServicerContext) -> pb.ListNamespacesResponse:
        return self._answer(
            context,
            lambda port: port.namespaces(),
            lambda reports: pb.ListNamespacesResponse(namespaces=[pb.Namespace(**named(one)) for one in reports]),
        )

    def ListTenants(self, _: pb.ListTenantsRequest, context: grpc.ServicerContext) -> pb.ListTenantsResponse:
        return self._answer(
            context,
            lambda port: port.tenants(),
            lambda reports: pb.ListTenantsResponse(tenants=[pb.Tenant(**named(one)) for one in reports]),
        )

    def ListClients(self, _: pb.ListClientsRequest, context: grpc.ServicerContext) -> pb.ListClientsResponse:
        return self._answer(
            context,
            lambda port: port.clients(),
            lambda reports: pb.ListClientsResponse(clients=[pb.Client(**named(one)) for one in reports]),
        )

    def GetConfig(self, _: pb.GetConfigRequest, context: grpc.ServicerContext) -> pb.GetConfigResponse:
        return self._answer(
            context,
            lambda port: port.config(),
            lambda values: pb.GetConfigResponse(settings=[pb.ConfigValue(**named(one)) for one in values]),
        )

    def Clear(self, request: pb.ClearRequest, context: grpc.ServicerContext) -> pb.ClearResponse:
        scope = _checked(context, lambda: scope_of(request))
        return self._act(
            context,
            lambda port: port.clear(scope, dry_run=request.dry_run),
            lambda cleared: pb.ClearResponse(**named(cleared)),
            unknown=KeyError,
            dry_run=request.dry_run,
        )

    def Evict(self, request: pb.EvictRequest, context: grpc.ServicerContext) -> pb.EvictResponse:
        wish = _checked(context, lambda: evict_wish_of(request))
        return self._act(
            context,
            lambda port: port.evict(wish, dry_run=request.dry_run),
            evicted_of,
            unknown=KeyError,
            dry_run=request.dry_run,
        )

    def WalkBlocks(self, request: pb.WalkBlocksRequest, context: grpc.ServicerContext) -> pb.WalkBlocksResponse:
        tenant, digest, after = _checked(context, lambda: walk_wish_of(request))
        return self._answer(context, lambda port: port.walk(tenant, digest, after), walk_of, unknown=KeyError)

    def ListActs(self, request: pb.ListActsRequest, context: grpc.ServicerContext) -> pb.ListActsResponse:
        if self._audit is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nothing is written down here")
        audit = self._audit
        return _checked(context, lambda: acts_of(request, audit))

    def NoteTransfer(self, request: pb.NoteTransferRequest, context: grpc.ServicerContext) -> pb.NoteTransferResponse:
        if request.verb not in ("export", "import", "move"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "verb is export, import or move")
        return pb.NoteTransferResponse()  # the gate has it written down

    def Drain(self, _: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        return self._change(context, lambda port: self._drain(port, on=True), lambda _: pb.DrainResponse())

    def Undrain(self, _: pb.UndrainRequest, context: grpc.ServicerContext) -> pb.UndrainResponse:
        return self._change(context, lambda port: self._drain(port, on=False), lambda _: pb.UndrainResponse())

    def Scrub(self, request: pb.ScrubRequest, context: grpc.ServicerContext) -> pb.ScrubResponse:
        rate = request.rate_bytes_per_s if request.HasField("rate_bytes_per_s") else None
        if rate is not None and (rate > RATE_BYTES_PER_S or not request.start):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"rate_bytes_per_s is at most {RATE_BYTES_PER_S}, and goes with start",
            )
        tier = _checked(context, lambda: tier_of(request))
        return self._change(
            context,
            lambda port: port.scrub(start=request.start, rate=rate, tier=tier or Tier.DISK),
            lambda report: pb.ScrubResponse(**named(report)),
            dry_run=not request.start,
        )

    def GetCosts(self, request: pb.GetCostsRequest, context: grpc.ServicerContext) -> pb.GetCostsResponse:
        tenant, digest = _checked(context, lambda: (tenant_of(request), namespace_of(request)))
        return self._answer(context, lambda port: port.costs(tenant, digest), costs_of, unknown=KeyError)

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        tier, tenant = _checked(context, lambda: (tier_of(request), tenant_of(request)))
        return self._answer(
            context,
            lambda port: port.policies(tier, tenant),
            lambda reports: pb.GetPolicyResponse(policies=[pb.Policy(**named(one)) for one in reports]),
            unknown=KeyError,
        )

    def SetPolicy(self, request: pb.SetPolicyRequest, context: grpc.ServicerContext) -> pb.SetPolicyResponse:
        tier, tenant, rule = _checked(context, lambda: (tier_of(request), tenant_of(request), rule_of(request)))
        return self._change(
            context,
            lambda port: port.set_policy(tier, tenant, rule, dry_run=request.dry_run),
            lambda changes: pb.SetPolicyResponse(changes=map(change_of, changes), dry_run=request.dry_run),
            unknown=KeyError,
            dry_run=request.dry_run,
        )

    def GetQuotas(self, request: pb.GetQuotasRequest, context: grpc.ServicerContext) -> pb.GetQuotasResponse:
        tenant = _checked(context, lambda: tenant_of(request))
        return self._answer(
            context,
            lambda port: port.quotas(tenant),
            lambda reports: pb.GetQuotasResponse(quotas=[pb.Quota(**named(one)) for one in reports]),
            unknown=KeyError,
        )

    def SetQuota(self, request: pb.SetQuotaRequest, context: grpc.ServicerContext) -> pb.SetQuotaResponse:
        wish = _checked(context, lambda: wish_of(request))
        return self._change(
            context,
            lambda port: port.set_quota(wish, dry_run=request.dry_run),
            lambda change: pb.SetQuotaResponse(
                quota=pb.Quota(**named(change.quota)),
                former=pb.Quota(**named(change.former)),
                others=[
                    pb.QuotaOfOther(quota=pb.Quota(**named(one.quota)), former=pb.Quota(**named(one.former)))
                    for one in change.others
                ],
                dry_run=request.dry_run,
            ),
            unknown=KeyError,
            dry_run=request.dry_run,
        )

    def Advise(self, request: pb.AdviseRequest, context: grpc.ServicerContext) -> pb.AdviseResponse:
        tenant = _checked(context, lambda: tenant_of(request))
        return self._answer(context, lambda port: port.advise(tenant), advice_of, unknown=KeyError)

    def ExplainMiss(self, request: pb.ExplainMissRequest, context: grpc.ServicerContext) -> pb.ExplainMissResponse:
        question = _checked(context, lambda: question_of(request))
        return self._answer(context, lambda port: port.explain_miss(question), explanation_of, unknown=KeyError)

    def ListPins(self, request: pb.ListPinsRequest, context: grpc.ServicerContext) -> pb.ListPinsResponse:
        tenant = _checked(context, lambda: tenant_of(request))
        return self._answer(context, lambda port: port.pins(tenant), pins_of, unknown=KeyError)

    def Pin(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.PinResponse:
        tier = PinTier.DISK if request.on_disk else PinTier.DRAM
        wish = _checked(
            context,
            lambda: prefix_wish_of(request.prefix, request.ttl_s, PIN_TTL_NS_MAX, tier=tier, refresh=request.refresh),
        )
        return self._change(context, lambda port: port.pin(wish), pinned_of, unknown=KeyError)

    def Prefetch(self, request: pb.PrefetchRequest, context: grpc.ServicerContext) -> pb.PrefetchResponse:
        wish = _checked(context, lambda: prefix_wish_of(request.prefix, request.within_s, PREFETCH_NS_MAX))
        return self._change(
            context,
            lambda port: port.prefetch(wish),
            lambda fetching: pb.PrefetchResponse(there=fetching.there, coming=fetching.coming),
            unknown=KeyError,
        )

    def HandOver(self, request: pb.HandOverRequest, context: grpc.ServicerContext) -> pb.HandOverResponse:
        wish = _checked(context, lambda: hand_over_wish_of(request))
        return self._change(
            context,
            lambda port: port.hand_over(wish, dry_run=request.dry_run),
            lambda report: pb.HandOverResponse(**named(report)),
            unknown=KeyError,
            dry_run=request.dry_run,
        )

    def Unpin(self, request: pb.UnpinRequest, context: grpc.ServicerContext) -> pb.UnpinResponse:
        if not request.tenant:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "tenant must name whose pins are to end")
        numbers = list(request.pins)
        return self._change(
            context,
            lambda port: port.unpin(request.tenant, numbers),
            lambda found: pb.UnpinResponse(**named(found)),
            unknown=KeyError,
        )

    def ListPrograms(self, request: pb.ListProgramsRequest, context: grpc.ServicerContext) -> pb.ListProgramsResponse:
        tenant = _checked(context, lambda: tenant_of(request))
        return self._answer(context, lambda port: port.guiding(tenant), programs_of, unknown=KeyError)

    def ListWorkflows(
        self, request: pb.ListWorkflowsRequest, context: grpc.ServicerContext
    ) -> pb.ListWorkflowsResponse:
        tenant = _checked(context, lambda: tenant_of(request))
        return self._answer(context, lambda port: port.guiding(tenant), workflows_of, unknown=KeyError)

    def ListBlocks(self, request: pb.ListBlocksRequest, context: grpc.ServicerContext) -> pb.ListBlocksResponse:
        wish = _checked(context, lambda: list_wish_of(request))
        return _answered(context, lambda wait_s: list_blocks(asker(self._owner, wait_s), wish), KeyError)

    def GetTree(self, request: pb.GetTreeRequest, context: grpc.ServicerContext) -> pb.GetTreeResponse:
        wish = _checked(context, lambda: tree_wish_of(request))
        return _answered(context, lambda wait_s: draw_tree(asker(self._owner, wait_s), wish, wait_s), KeyError)

    def StatPrefix(self, request: pb.StatPrefixRequest, context: grpc.ServicerContext) -> pb.StatPrefixResponse:
        wish = _checked(context, lambda: stat_wish_of(request))
        return _answered(context, lambda wait_s: stat_prefix(asker(self._owner, wait_s), wish), KeyError)

    def FindKeys(self, request: pb.FindKeysRequest, context: grpc.ServicerContext) -> pb.FindKeysResponse:
        wish = _checked(context, lambda: find_wish_of(request))
        return _answered(context, lambda wait_s: find_keys(asker(self._owner, wait_s), wish), KeyError)

    def WatchEvents(self, request: pb.WatchEventsRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        return self._watched.stream(request, context)

    def WatchBlocks(self, request: pb.WatchBlocksRequest, context: grpc.ServicerContext) -> Iterator[pb.BlockChanges]:
        return self._watched_blocks.stream(request, context)

    def SummariseMatch(
        self, request: pb.SummariseMatchRequest, context: grpc.ServicerContext
    ) -> pb.SummariseMatchResponse:
        wish = _checked(context, lambda: match_wish_of(request))
        return self._answer(context, lambda port: port.routing.summarise(wish), summary_of, unknown=KeyError)

    def GetLoad(self, _: pb.GetLoadRequest, context: grpc.ServicerContext) -> pb.GetLoadResponse:
        return self._answer(context, lambda port: port.routing.load(), load_of)

    def EstimateAdmission(
        self, request: pb.EstimateAdmissionRequest, context: grpc.ServicerContext
    ) -> pb.EstimateAdmissionResponse:
        wish = _checked(context, lambda: admission_wish_of(request))
        return _answered(
            context, lambda wait_s: estimate(ask_routing(self._owner, wait_s), wish, context.is_active), KeyError
        )

    def Ping(self, _: pb.PingRequest, context: grpc.ServicerContext) -> pb.PingResponse:
        start_s = time.monotonic()
        return self._answer(context, lambda _: None, lambda _: pb.PingResponse(owner_s=time.monotonic() - start_s))

    def _drain(self, port: AdminPort, *, on: bool) -> None:
        # Here on the owner thread, so that health follows drains in their order, even if a caller gave up.
        port.drain(on=on)
        self._announce(serving=not on)

    def _answer(
        self,
        context: grpc.ServicerContext,
        question: Callable[[AdminPort], Report],
        build: Callable[[Report], Answer],
        unknown: type[Exception] | tuple[()] = (),
    ) -> Answer:
        """Ask the owner and build the answer here."""
        return _answered(context, lambda wait_s: build(self._owner.ask(question, wait_s)), unknown)

    def _change(
        self,
        context: grpc.ServicerContext,
        question: Callable[[AdminPort], Report],
        build: Callable[[Report], Answer],
        unknown: type[Exception] | tuple[()] = (),
        *,
        dry_run: bool = False,
    ) -> Answer:
        """As `_act`, of what is over when it has begun."""
        return self._act(context, lambda port: at_once(question(port)), build, unknown, dry_run=dry_run)

    def _act(
        self,
        context: grpc.ServicerContext,
        act: Callable[[AdminPort], "Future[Report]"],
        build: Callable[[Report], Answer],
        unknown: type[Exception] | tuple[()] = (),
        *,
        dry_run: bool = False,
    ) -> Answer:
        """As `_answer`, of what changes something: whose time is over is told whether it goes on without them."""

        def answer(wait_s: float) -> Answer:
            try:
                return build(carry_out(self._owner, act, wait_s))
            except GoesOnError:
                if dry_run:
                    raise TimeoutError from None
                raise
            except TimeoutError:
                if dry_run:
                    raise
                raise _NeverBeganError from None

        return _answered(context, answer, unknown)


class _NeverBeganError(Exception):
    """An act's time was over before its turn came."""


def _answered(
    context: grpc.ServicerContext, answer: Callable[[float], Answer], unknown: type[Exception] | tuple[()] = ()
) -> Answer:
    """An answer that is given so many seconds. Trouble of every kind ends this call and nothing else.

    Raises GoesOnError of an act that does; the caller has been answered.
    """
    wait_s = _wait_s(context)
    try:
        return answer(wait_s)
    except GoesOnError:
        text = f"it has begun, takes longer than {wait_s:.3g} s, and goes on; `kvctl audit` will say what came of it"
        with suppress(Exception):  # which is how abort ends a call
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        raise
    except _NeverBeganError:
        text = f"the owner thread did not answer in {wait_s:.3g} s; nothing was done, and nothing will be: try again"
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    except TimeoutError:
        code, text = (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"the owner thread did not answer in {wait_s:.3g} s",
        )
    except unknown as error:
        code, text = grpc.StatusCode.NOT_FOUND, str(error.args[0] if error.args else error)
    except (AmbiguousError, SeveralError) as error:
        code, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
    except RefusedError as error:
        code, text = grpc.StatusCode.FAILED_PRECONDITION, str(error)
    except TooManyError as error:
        code, text = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    except Exception as error:  # noqa: BLE001  one broken answer must not take the control socket along
        _log.exception("control call failed")
        code, text = grpc.StatusCode.INTERNAL, f"{type(error).__name__} in the daemon: its log says more"
    return context.abort(code, text)


def _wait_s(context: grpc.ServicerContext) -> float:
    """How long a handler waits for the owner: the caller's time, less what it takes to tell them, or our own."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None:
        return OWNER_WAIT_S
    return min(remaining_s - min(remaining_s * TELL_SHARE, TELL_S), OWNER_WAIT_S)


class _Announce(Protocol):
    def __call__(self, *, serving: bool) -> None: ...


def _checked(context: grpc.ServicerContext, part: Callable[[], T]) -> T:
    """What a request asks for, or an answer that says what is wrong with it."""
    try:
        return part()
    except ValueError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
