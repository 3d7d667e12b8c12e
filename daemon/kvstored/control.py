# ruff: noqa: N802  handlers are named as gRPC names them
"""The control socket: gRPC over a Unix socket, for operators, routers and other languages.

A call passes through three kinds of thread:

    operator --gRPC--> handler thread (one of 4)  --question-->  owner thread
                       checks the request                        runs it between two events of the hot path
    operator <--gRPC-- builds the answer          <--report----  (plain frozen values)

Handlers hold no state and never touch the store's. proto/kvproto/control.proto says what each call means and
which status code says what.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import fsencode
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.ids import NamespaceDigest
from kvproto.limits import FRAME_BYTES, MIB, PIN_TTL_NS_MAX, PREFETCH_NS_MAX
from kvproto.policy_frames import Fetching, Pinned
from kvproto.policy_frames import Tier as PinTier
from kvstore.evicting import EvictReport
from kvstore.hints.report import GuidingReport
from kvstore.insight.looking import Looking, SeveralError
from kvstore.report import (
    ClearReport,
    ClearScope,
    ConfigValue,
    Counters,
    DaemonReport,
    DiskReport,
    NamespaceReport,
    PolicyChange,
    PolicyReport,
    ScrubReport,
    SessionReport,
    TenantReport,
    TierReport,
)
from kvstore.report_costs import CostsReport, NamespaceCosts
from kvstore.report_pins import PinsReport
from kvstore.report_quotas import QuotaChange, QuotaReport
from kvstore.rules import Rule, Tier
from kvstored.admin_audit import Audit, acts_of
from kvstored.admin_evict import EvictWish, Walked, evict_wish_of, evicted_of, scope_of, walk_of, walk_wish_of
from kvstored.admin_hints import programs_of, workflows_of
from kvstored.admin_insight import Explanation, MissQuestion, Observed, advice_of, explanation_of, question_of
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
from kvstored.admin_pins import PrefixWish, Unpinned, pinned_of, pins_of, prefix_wish_of
from kvstored.admin_quotas import QuotaWish, wish_of
from kvstored.admin_routing import (
    Routing,
    admission_wish_of,
    estimate,
    load_of,
    match_wish_of,
    summary_of,
)
from kvstored.admin_routing import asker as ask_routing
from kvstored.block_events import BlockEvents
from kvstored.block_events_stream import WATCHERS as BLOCK_WATCHERS
from kvstored.block_events_stream import WatchedBlocks
from kvstored.door import CONTROL, Door
from kvstored.events import Events
from kvstored.events_stream import WATCHERS, Watched
from kvstored.requests import named, namespace_of, tenant_of

__all__ = ["SOCKET_NAME", "AdminPort", "AmbiguousError", "ControlServer", "Owner", "RefusedError"]

SOCKET_NAME: Final = CONTROL
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Control"].full_name

OWNER_WAIT_S: Final = 10.0  # the longest a handler waits for the owner, where the caller sets no shorter deadline

# The largest request is a Clear of 1,024 keys: 34 bytes each, 35 KiB.
REQUEST_BYTES: Final = FRAME_BYTES
# The largest answer lists 4,096 namespaces of six texts of 1 KiB and 0.3 KiB of the rest: 26 MiB.
ANSWER_BYTES: Final = 32 * MIB
SOCKET_PATH_BYTES: Final = 107  # sun_path less its NUL
RATE_BYTES_PER_S: Final = 1 << 40  # far above any drive

_log = logging.getLogger(__name__)

T = TypeVar("T")
Report = TypeVar("Report")
Answer = TypeVar("Answer")


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
        """Refuse new blocks from now on, or take them again. Idempotent."""

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


class ControlServer:
    """Serves a socket in `runtime_dir`. `start` and `stop` belong to one thread; `announce` to any."""

    def __init__(
        self, owner: Owner, runtime_dir: Path, door: Door | None = None, audit: Audit | None = None,
        events: Events | None = None, block_events: BlockEvents | None = None,
    ) -> None:  # fmt: skip
        """`audit` has what was done here, and in former lives; `events` what happens; `block_events` where blocks lie,
        if somebody looks."""
        self._door = Door() if door is None else door
        self.path = runtime_dir / self._door.name
        self._owner = owner
        self._audit = audit
        self._events = events or Events()
        self._block_events = block_events
        self._health = health.HealthServicer()
        self._server: grpc.Server | None = None
        self._inode = 0
        self.serving = False  # as the health service says

    def start(self) -> None:
        """Serve. The socket appears under its name once calls are answered, and its mode is never but its door's.

        Raises OSError if the runtime directory cannot hold it, ValueError if its path is too long for a
        socket. A socket that a dead daemon left behind is replaced: that no living one serves this directory
        is for the caller to know (flock). A stopped server does not start again.
        """
        if len(fsencode(self.path)) > SOCKET_PATH_BYTES:
            raise ValueError(f"{self.path} is longer than the {SOCKET_PATH_BYTES} bytes of a Unix socket's path")
        self.announce(serving=True)
        self._server = self._new_server()
        try:
            self._appear(self._server)
        except BaseException:
            self._server.stop(None).wait()
            self._server = None
            raise

    def announce(self, *, serving: bool) -> None:
        """What the health service says from now on: SERVING or NOT_SERVING."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self.serving = serving
        for service in (health.OVERALL_HEALTH, SERVICE):
            self._health.set(service, state)

    def stop(self, grace_s: float) -> None:
        """Take no more calls, give running ones `grace_s` seconds, remove the socket. Idempotent.

        May be called by the owner thread, which then answers nothing more: calls that wait for it are cut off
        after `grace_s`.
        """
        server, self._server = self._server, None
        if server is None:
            return
        self._health.enter_graceful_shutdown()
        self._events.stop()
        if self._block_events is not None:
            self._block_events.end_watching()
        server.stop(grace_s).wait()
        # A successor may have put its own socket there already.
        if self.path.exists() and self.path.stat().st_ino == self._inode:
            self.path.unlink()

    def _new_server(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(self._door.threads + WATCHERS + BLOCK_WATCHERS, thread_name_prefix="control"),
            options=[
                ("grpc.max_receive_message_length", REQUEST_BYTES),
                ("grpc.max_send_message_length", ANSWER_BYTES),
                *([("grpc.max_allowed_incoming_connections", most)] if (most := self._door.connections) else ()),
            ],
            maximum_concurrent_rpcs=self._door.calls,
            interceptors=[self._door.gate] if self._door.gate else None,
        )
        watched = WatchedBlocks(self._block_events, self._owner, self._door.watchers_of_one)
        handlers = _Control(self._owner, self.announce, self._audit, self._events, watched)
        control_pb2_grpc.add_ControlServicer_to_server(handlers, server)
        if not self._door.health:
            return server
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _appear(self, server: grpc.Server) -> None:
        """Bind where nobody else can look, narrow the mode, then rename into place.

        bind() gives a socket the mode that the umask leaves, and gRPC binds by itself: a chmod afterwards is
        too late for a quick peer, and a changed umask would change what other threads create meanwhile.
        """
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path.parent) as private:  # mode 0700
            hidden = Path(private) / "s"
            server.add_insecure_port(f"unix:{quote(str(hidden))}")
            hidden.chmod(0o600)
            if self._door.gid is not None:
                os.chown(hidden, -1, self._door.gid)
            hidden.chmod(self._door.mode)
            server.start()
            self._inode = hidden.stat().st_ino
            hidden.rename(self.path)


class _Control:
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
        return self._answer(context, lambda port: port.status(), _status)

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
        return self._answer(
            context,
            lambda port: port.clear(scope, dry_run=request.dry_run),
            lambda clearing: pb.ClearResponse(**named(clearing.result(_wait_s(context)))),
            unknown=KeyError,
        )

    def Evict(self, request: pb.EvictRequest, context: grpc.ServicerContext) -> pb.EvictResponse:
        wish = _checked(context, lambda: evict_wish_of(request))
        return self._answer(
            context,
            lambda port: port.evict(wish, dry_run=request.dry_run),
            lambda evicting: evicted_of(evicting.result(_wait_s(context))),
            unknown=KeyError,
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
        if request.verb not in ("export", "import"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "verb is export or import")
        return pb.NoteTransferResponse()  # the gate has it written down

    def Drain(self, _: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        return self._answer(context, lambda port: self._drain(port, on=True), lambda _: pb.DrainResponse())

    def Undrain(self, _: pb.UndrainRequest, context: grpc.ServicerContext) -> pb.UndrainResponse:
        return self._answer(context, lambda port: self._drain(port, on=False), lambda _: pb.UndrainResponse())

    def Scrub(self, request: pb.ScrubRequest, context: grpc.ServicerContext) -> pb.ScrubResponse:
        rate = request.rate_bytes_per_s if request.HasField("rate_bytes_per_s") else None
        if rate is not None and (rate > RATE_BYTES_PER_S or not request.start):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"rate_bytes_per_s is at most {RATE_BYTES_PER_S}, and goes with start",
            )
        tier = _checked(context, lambda: _tier(request))
        return self._answer(
            context,
            lambda port: port.scrub(start=request.start, rate=rate, tier=tier or Tier.DISK),
            lambda report: pb.ScrubResponse(**named(report)),
        )

    def GetCosts(self, request: pb.GetCostsRequest, context: grpc.ServicerContext) -> pb.GetCostsResponse:
        tenant, digest = _checked(context, lambda: (tenant_of(request), namespace_of(request)))
        return self._answer(context, lambda port: port.costs(tenant, digest), _costs, unknown=KeyError)

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        tier, tenant = _checked(context, lambda: (_tier(request), tenant_of(request)))
        return self._answer(
            context,
            lambda port: port.policies(tier, tenant),
            lambda reports: pb.GetPolicyResponse(policies=[pb.Policy(**named(one)) for one in reports]),
            unknown=KeyError,
        )

    def SetPolicy(self, request: pb.SetPolicyRequest, context: grpc.ServicerContext) -> pb.SetPolicyResponse:
        tier, tenant, rule = _checked(context, lambda: (_tier(request), tenant_of(request), _rule_of(request)))
        return self._answer(
            context,
            lambda port: port.set_policy(tier, tenant, rule, dry_run=request.dry_run),
            lambda changes: pb.SetPolicyResponse(changes=map(_change, changes), dry_run=request.dry_run),
            unknown=KeyError,
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
        return self._answer(
            context,
            lambda port: port.set_quota(wish, dry_run=request.dry_run),
            lambda change: pb.SetQuotaResponse(
                quota=pb.Quota(**named(change.quota)),
                former=pb.Quota(**named(change.former)),
                dry_run=request.dry_run,
            ),
            unknown=KeyError,
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
        return self._answer(context, lambda port: port.pin(wish), pinned_of, unknown=KeyError)

    def Prefetch(self, request: pb.PrefetchRequest, context: grpc.ServicerContext) -> pb.PrefetchResponse:
        wish = _checked(context, lambda: prefix_wish_of(request.prefix, request.within_s, PREFETCH_NS_MAX))
        return self._answer(
            context,
            lambda port: port.prefetch(wish),
            lambda fetching: pb.PrefetchResponse(there=fetching.there, coming=fetching.coming),
            unknown=KeyError,
        )

    def Unpin(self, request: pb.UnpinRequest, context: grpc.ServicerContext) -> pb.UnpinResponse:
        if not request.tenant:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "tenant must name whose pins are to end")
        numbers = list(request.pins)
        return self._answer(
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
        return _answered(context, lambda wait_s: estimate(ask_routing(self._owner, wait_s), wish), KeyError)

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


def _answered(
    context: grpc.ServicerContext, answer: Callable[[float], Answer], unknown: type[Exception] | tuple[()] = ()
) -> Answer:
    """An answer that is given so many seconds. Trouble of every kind ends this call and nothing else."""
    wait_s = _wait_s(context)
    try:
        return answer(wait_s)
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
    """How long a handler waits for the owner: up to the caller's deadline, and never longer than our own."""
    remaining_s: float | None = context.time_remaining()
    return OWNER_WAIT_S if remaining_s is None else min(remaining_s, OWNER_WAIT_S)


class _Announce(Protocol):
    def __call__(self, *, serving: bool) -> None: ...


def _checked(context: grpc.ServicerContext, part: Callable[[], T]) -> T:
    """What a request asks for, or an answer that says what is wrong with it."""
    try:
        return part()
    except ValueError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def _tier(request: pb.GetPolicyRequest | pb.SetPolicyRequest | pb.ScrubRequest) -> Tier | None:
    """The tier that a request names; None for all. Raises ValueError."""
    if not request.HasField("tier"):
        return None
    if request.tier not in list(Tier):
        raise ValueError(f"no tier is called {request.tier!r}: it is one of {', '.join(Tier)}")
    return Tier(request.tier)


def _rule_of(request: pb.SetPolicyRequest) -> Rule | None:
    """The rule that is wished for; None: what the configuration says. Raises ValueError."""
    name = request.rule
    if request.reset:
        if name:
            raise ValueError("a rule and reset do not go together")
        return None
    if name not in list(Rule):
        raise ValueError(f"no rule is called {name!r}: it is one of {', '.join(Rule)}")
    return Rule(name)


def _status(report: DaemonReport) -> pb.GetStatusResponse:
    nested: dict[str, Any] = {
        "tiers": [_tier_message(tier) for tier in report.tiers],
        "tenants": [pb.Tenant(**named(tenant)) for tenant in report.tenants],
        "counters": pb.Counters(**named(report.counters)),
        "disk": _disk(report.disk) if report.disk else None,
        "restart": pb.Restart(**named(report.restart)),
        "remote": pb.Remote(**named(report.remote)) if report.remote else None,
        "devices": [pb.Device(**named(device)) for device in report.devices],
    }
    return pb.GetStatusResponse(**{**named(report), **nested})


def _tier_message(report: TierReport) -> pb.Tier:
    nested: dict[str, Any] = {"nodes": [pb.NodeMemory(**named(node)) for node in report.nodes]}
    return pb.Tier(**{**named(report), **nested})


def _disk(report: DiskReport) -> pb.Disk:
    nested: dict[str, Any] = {
        "counters": pb.DiskCounters(**named(report.counters)),
        "drives": [pb.Drive(**named(drive)) for drive in report.drives],
    }
    return pb.Disk(**{**named(report), **nested})


def _costs(report: CostsReport) -> pb.GetCostsResponse:
    return pb.GetCostsResponse(
        namespaces=map(_namespace_costs, report.namespaces),
        more=report.more,
        ways=[pb.Way(**named(way)) for way in report.ways],
    )


def _namespace_costs(report: NamespaceCosts) -> pb.NamespaceCosts:
    nested: dict[str, Any] = {
        "prefills": [pb.Prefill(**named(prefill)) for prefill in report.prefills],
        "runs": [pb.Run(**named(run)) for run in report.runs],
    }
    return pb.NamespaceCosts(**{**named(report), **nested})


def _change(change: PolicyChange) -> pb.PolicyChange:
    return pb.PolicyChange(policy=pb.Policy(**named(change.policy)), former_rule=change.former_rule)
