"""The way to a daemon's control socket, and what each kind of trouble means to a script.

KvctlError.code     says
REFUSED        1    the daemon answered, and would not
USAGE          2    the question was wrong
UNREACHABLE    3    nobody answers
NOT_FOUND      4    no such tenant, namespace, block or pin
TIMED_OUT      5    no answer in time
CONFIGURATION 78    this setting can never work
"""

import os
import socket
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import grpc
from google.protobuf.message import Message

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY, ControlToken, TokenRefusedError, ask_token
from kvproto.holders import holder
from kvproto.limits import MIB

__all__ = ["SOCKET_NAME", "ControlClient", "Exit", "KvctlError", "find_socket", "printable"]

SOCKET_NAME: Final = "control.sock"
TENANTS_SOCKET: Final = "tenants.sock"  # where the daemon has one for those who may not act
SYSTEM_DIR: Final = Path("/run/kvstored")
SOCKET_PATH_BYTES: Final = 107  # sun_path less its NUL
TENANTS_NAMED: Final = 16  # where one is named that is not there
ANSWER_BYTES: Final = 32 * MIB  # as much as the daemon sends: 4,096 namespaces of 6.4 KiB

Answer = TypeVar("Answer", bound=Message)


class Exit(IntEnum):
    """Exit codes. 78 is EX_CONFIG of sysexits.h."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    TIMED_OUT = 5
    CONFIGURATION = 78


class KvctlError(Exception):
    """What went wrong, in one sentence that ends with a remedy."""

    def __init__(self, code: Exit, text: str) -> None:
        super().__init__(text)
        self.code = code


def home_folder() -> Path | None:
    """Of who asks; None for a user that nobody knows, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def find_socket(runtime_dir: Path | None, environ: Mapping[str, str], home: Path | None) -> Path:
    """The control socket of `runtime_dir`, or else of the first usual place that has one.

    The usual places: /run/kvstored, $XDG_RUNTIME_DIR/kvstored, ~/.local/state/kvstored/run. Raises KvctlError:
    UNREACHABLE where there is none, CONFIGURATION for a directory that cannot hold one.
    """
    if runtime_dir is not None:
        return _checked(runtime_dir)
    places = [SYSTEM_DIR]
    if session := environ.get("XDG_RUNTIME_DIR"):
        places.append(Path(session) / "kvstored")
    if home is not None:
        places.append(home / ".local/state/kvstored/run")
    for place in places:
        if os.access(place / SOCKET_NAME, os.F_OK):
            return place / SOCKET_NAME
    raise KvctlError(
        Exit.UNREACHABLE,
        f"no kvstored is running: there is no {SOCKET_NAME} in {', '.join(map(str, places))}; "
        "start kvstored, or name its directory with --runtime-dir",
    )


def _checked(runtime_dir: Path) -> Path:
    path = runtime_dir / SOCKET_NAME
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise KvctlError(
            Exit.CONFIGURATION,
            f"{runtime_dir} is too long: a socket's path holds {SOCKET_PATH_BYTES} bytes; use a shorter directory",
        )
    if runtime_dir.exists() and not runtime_dir.is_dir():
        raise KvctlError(Exit.CONFIGURATION, f"{runtime_dir} is not a directory; name the daemon's with --runtime-dir")
    return path


def _open_to_us(path: Path) -> Path:
    """The control socket, or the one for everybody beside it where that is closed to this user."""
    everybody = path.with_name(TENANTS_SOCKET)
    closed = path.exists() and not os.access(path, os.W_OK)
    return everybody if closed and os.access(everybody, os.W_OK) else path


def printable(text: str) -> str:
    """Text from outside, safe for a terminal: what could move the cursor becomes `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def starting(runtime_dir: Path) -> bool:
    """Does a daemon hold this directory that cannot be asked yet? Its lock is looked at, never locked.

    Whoever can reach the directory sees that, but not from a container into the host (`kvproto.holders`).
    """
    return holder(runtime_dir / "lock") is not None


class ControlClient:
    """A connection to one daemon. Every call waits at most `timeout_s` and raises KvctlError. One thread."""

    def __init__(self, socket_path: Path, timeout_s: float) -> None:
        self.socket_path = socket_path = _open_to_us(socket_path)
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            f"unix:{quote(str(socket_path))}",
            options=[
                ("grpc.max_receive_message_length", ANSWER_BYTES),
                ("grpc.enable_http_proxy", 0),
                ("grpc.default_authority", "localhost"),
            ],
        )
        self._stub = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call, unused-ignore]
        self._token: ControlToken | None = None

    def __enter__(self) -> Self:
        try:
            probe(self.socket_path, self._timeout_s)
        except BaseException:
            self._channel.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    @property
    def daemon(self) -> str:
        """Which daemon this is, for somebody who is asked: its directory, or its address."""
        return str(self.socket_path.parent)

    def status(self) -> pb.GetStatusResponse:
        """The daemon on one page."""
        return self._call("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)

    def statistics(self) -> pb.GetStatisticsResponse:
        """Totals since the daemon started."""
        return self._call("GetStatistics", pb.GetStatisticsRequest(), pb.GetStatisticsResponse)

    def namespaces(self) -> pb.ListNamespacesResponse:
        """Namespaces of all tenants."""
        return self._call("ListNamespaces", pb.ListNamespacesRequest(), pb.ListNamespacesResponse)

    def tenants(self) -> pb.ListTenantsResponse:
        """Tenants and their shares."""
        return self._call("ListTenants", pb.ListTenantsRequest(), pb.ListTenantsResponse)

    def clients(self) -> pb.ListClientsResponse:
        """Connected sessions."""
        return self._call("ListClients", pb.ListClientsRequest(), pb.ListClientsResponse)

    def config(self) -> pb.GetConfigResponse:
        """Settings and their origins."""
        return self._call("GetConfig", pb.GetConfigRequest(), pb.GetConfigResponse)

    def clear(self, request: pb.ClearRequest) -> pb.ClearResponse:
        """Drop blocks, or count them."""
        return self._call("Clear", request, pb.ClearResponse)

    def evict(self, request: pb.EvictRequest) -> pb.EvictResponse:
        """Have blocks leave a tier, or count them."""
        return self._call("Evict", request, pb.EvictResponse)

    def walk(self, request: pb.WalkBlocksRequest) -> pb.WalkBlocksResponse:
        """A page of a namespace's keys."""
        return self._call("WalkBlocks", request, pb.WalkBlocksResponse)

    def acts(self, request: pb.ListActsRequest) -> pb.ListActsResponse:
        """What was done, and by whom."""
        return self._call("ListActs", request, pb.ListActsResponse)

    def note_transfer(self, request: pb.NoteTransferRequest) -> pb.NoteTransferResponse:
        """Have an export or an import written down."""
        return self._call("NoteTransfer", request, pb.NoteTransferResponse)

    def drain(self, *, on: bool) -> None:
        """Refuse new blocks, or take them again."""
        if on:
            self._call("Drain", pb.DrainRequest(), pb.DrainResponse)
        else:
            self._call("Undrain", pb.UndrainRequest(), pb.UndrainResponse)

    def scrub(self, request: pb.ScrubRequest) -> pb.ScrubResponse:
        """Start a scrub of all that lies on disk, or see how far it is."""
        return self._call("Scrub", request, pb.ScrubResponse)

    def costs(self, request: pb.GetCostsRequest) -> pb.GetCostsResponse:
        """What blocks cost, and how much computing was saved."""
        return self._call("GetCosts", request, pb.GetCostsResponse)

    def advise(self, request: pb.AdviseRequest) -> pb.AdviseResponse:
        """What other sizes and rules would bring."""
        return self._call("Advise", request, pb.AdviseResponse)

    def explain_miss(self, request: pb.ExplainMissRequest) -> pb.ExplainMissResponse:
        """Why a prefix missed."""
        return self._call("ExplainMiss", request, pb.ExplainMissResponse)

    def pins(self, request: pb.ListPinsRequest) -> pb.ListPinsResponse:
        """What is pinned."""
        return self._call("ListPins", request, pb.ListPinsResponse)

    def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Keep a prefix."""
        return self._call("Pin", request, pb.PinResponse)

    def prefetch(self, request: pb.PrefetchRequest) -> pb.PrefetchResponse:
        """Have a prefix in memory."""
        return self._call("Prefetch", request, pb.PrefetchResponse)

    def hand_over(self, request: pb.HandOverRequest) -> pb.HandOverResponse:
        """Have a prefix written beyond its host, or see how far it is."""
        return self._call("HandOver", request, pb.HandOverResponse)

    def unpin(self, request: pb.UnpinRequest) -> pb.UnpinResponse:
        """End pins."""
        return self._call("Unpin", request, pb.UnpinResponse)

    def programs(self, request: pb.ListProgramsRequest) -> pb.ListProgramsResponse:
        """Programs of agents."""
        return self._call("ListPrograms", request, pb.ListProgramsResponse)

    def workflows(self, request: pb.ListWorkflowsRequest) -> pb.ListWorkflowsResponse:
        """Workflows and their runs."""
        return self._call("ListWorkflows", request, pb.ListWorkflowsResponse)

    def policies(self) -> pb.GetPolicyResponse:
        """By which rules tiers and tenants evict."""
        return self._call("GetPolicy", pb.GetPolicyRequest(), pb.GetPolicyResponse)

    def set_policy(self, request: pb.SetPolicyRequest) -> pb.SetPolicyResponse:
        """Have a tier or a tenant evict by another rule, or see what would change."""
        return self._call("SetPolicy", request, pb.SetPolicyResponse)

    def quotas(self, request: pb.GetQuotasRequest) -> pb.GetQuotasResponse:
        """What tenants are promised, and the most that they may have."""
        return self._call("GetQuotas", request, pb.GetQuotasResponse)

    def set_quota(self, request: pb.SetQuotaRequest) -> pb.SetQuotaResponse:
        """Promise and allow a tenant something else, or see what would change."""
        return self._call("SetQuota", request, pb.SetQuotaResponse)

    def blocks(self, request: pb.ListBlocksRequest) -> pb.ListBlocksResponse:
        """A page of a namespace's blocks."""
        return self._call("ListBlocks", request, pb.ListBlocksResponse)

    def tree(self, request: pb.GetTreeRequest) -> pb.GetTreeResponse:
        """Prefixes of a namespace as a tree."""
        return self._call("GetTree", request, pb.GetTreeResponse)

    def stat(self, request: pb.StatPrefixRequest) -> pb.StatPrefixResponse:
        """One prefix, block by block."""
        return self._call("StatPrefix", request, pb.StatPrefixResponse)

    def find_keys(self, request: pb.FindKeysRequest) -> pb.FindKeysResponse:
        """Whole keys by their first digits."""
        return self._call("FindKeys", request, pb.FindKeysResponse)

    def events(self, request: pb.WatchEventsRequest) -> Iterator[pb.Event]:
        """What happened; with `follow` without an end, and for as long as it takes. Raises KvctlError on the way."""
        timeout_s = None if request.follow else self._timeout_s
        try:
            yield from self._stub.WatchEvents(request, timeout=timeout_s, metadata=self.metadata())
        except grpc.RpcError as error:
            raise self._trouble(error.code(), printable(error.details() or "")) from None

    def watch(self, request: pb.WatchBlocksRequest) -> Iterator[pb.BlockChanges]:
        """Where blocks lie and move; with `follow` without an end. Raises KvctlError on the way."""
        timeout_s = None if request.follow else self._timeout_s
        try:
            yield from self._stub.WatchBlocks(request, timeout=timeout_s, metadata=self.metadata())
        except grpc.RpcError as error:
            raise self._trouble(error.code(), printable(error.details() or "")) from None

    def summarise(self, request: pb.SummariseMatchRequest) -> pb.SummariseMatchResponse:
        """How much of a prefix is there."""
        return self._call("SummariseMatch", request, pb.SummariseMatchResponse)

    def load(self) -> pb.GetLoadResponse:
        """How full and how busy."""
        return self._call("GetLoad", pb.GetLoadRequest(), pb.GetLoadResponse)

    def admission(self, request: pb.EstimateAdmissionRequest) -> pb.EstimateAdmissionResponse:
        """What would be given up."""
        return self._call("EstimateAdmission", request, pb.EstimateAdmissionResponse)

    def ping(self) -> pb.PingResponse:
        """One round trip through the owner thread."""
        return self._call("Ping", pb.PingRequest(), pb.PingResponse)

    def _call(self, verb: str, request: Message, _: type[Answer]) -> Answer:
        had_token = self._token is not None
        try:
            try:
                answer: Answer = self._ask(verb, request)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED or not had_token:
                    raise
                self._token = None  # it has lapsed: what follows something lives longer
                answer = self._ask(verb, request)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                self.need_tenant(name := _tenant_of(request))
                if name and (error.details() or "").endswith(f"no tenant is called {name}"):
                    text = f"tenant {printable(name)} has nothing here: no client of it has come yet"
                    raise KvctlError(Exit.NOT_FOUND, text) from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and verb in _ACTS and not _looks(request):
                told = printable(error.details() or "")
                said = f": {told}" if "; " in told else "; `kvctl audit` will say whether it was done: it may go on"
                raise KvctlError(Exit.TIMED_OUT, f"no answer within {self._timeout_s:g} s{said}") from None
            raise self._trouble(error.code(), printable(error.details() or "")) from None
        return answer

    def need_tenant(self, name: str | None) -> None:
        """Raises KvctlError with NOT_FOUND, and the tenants that there are, if nobody is called so."""
        if not name:
            return
        there = [one.name for one in self.tenants().tenants]
        if name not in there:
            shown = ", ".join(map(printable, there[:TENANTS_NAMED])) or "none yet"
            more = f" and {len(there) - TENANTS_NAMED:,} more" if len(there) > TENANTS_NAMED else ""
            raise KvctlError(Exit.NOT_FOUND, f"no tenant is called {printable(name)}; there are: {shown}{more}")

    def _ask(self, verb: str, request: Message) -> Any:
        return getattr(self._stub, verb)(request, timeout=self._timeout_s, metadata=self.metadata())

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What says who we are, for every call. Raises KvctlError if the daemon will not know us."""
        if self._token is None:
            try:
                self._token = ask_token(self.socket_path.parent, self._timeout_s)
            except TokenRefusedError as error:
                raise KvctlError(Exit.REFUSED, f"the daemon refused: {printable(str(error))}") from None
            except OSError:  # then we ask without; a daemon that must know will say so
                return ()
        return () if self._token is None else ((TOKEN_KEY, self._token.token),)

    def _trouble(self, code: grpc.StatusCode, details: str) -> KvctlError:
        exit_code, sentence = _TROUBLE.get(code, _OTHER_TROUBLE)
        text = sentence.format(details=details, path=self.socket_path, timeout=f"{self._timeout_s:g} s", code=code.name)
        return KvctlError(exit_code, text)


# What may be done though no answer came.
_ACTS: Final = frozenset(
    {"Clear", "Evict", "Drain", "Undrain", "Scrub", "SetPolicy", "SetQuota", "Pin", "Prefetch", "HandOver", "Unpin"}
)


def _looks(request: Any) -> bool:
    """Does a request of `_ACTS` only ask what would be done?"""
    return bool(getattr(request, "dry_run", False)) or not getattr(request, "start", True)


def _tenant_of(request: Any) -> str:
    """Whom a request names, if anybody."""
    prefix = getattr(request, "prefix", None)
    name = getattr(request, "tenant", "") or getattr(prefix, "tenant", "")
    return name if isinstance(name, str) else ""


_GONE: Final = (Exit.UNREACHABLE, "the daemon behind {path} went away; see its log, then start it again")
_OTHER_TROUBLE: Final = (Exit.REFUSED, "the daemon refused: {details} ({code}); see its log")
_TROUBLE: Final = {
    grpc.StatusCode.UNAVAILABLE: _GONE,
    grpc.StatusCode.CANCELLED: _GONE,
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        Exit.TIMED_OUT,
        "no answer within {timeout}; the daemon is busy: try again, or raise --timeout",
    ),
    grpc.StatusCode.NOT_FOUND: (
        Exit.NOT_FOUND,
        "{details}; `kvctl tenants` and `kvctl namespaces` list what there is",
    ),
    grpc.StatusCode.INVALID_ARGUMENT: (Exit.USAGE, "{details}; see `kvctl COMMAND --help`"),
    grpc.StatusCode.FAILED_PRECONDITION: (Exit.REFUSED, "{details}"),
    grpc.StatusCode.PERMISSION_DENIED: (Exit.REFUSED, "{details}"),
    grpc.StatusCode.UNAUTHENTICATED: (Exit.REFUSED, "{details}"),
    grpc.StatusCode.UNIMPLEMENTED: (
        Exit.REFUSED,
        "the daemon does not know this command; use the kvctl of its version, see `kvctl doctor`",
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        Exit.REFUSED,
        "the daemon refused: {details}; ask for less, or try again in a moment",
    ),
}


_STARTING: Final = "kvstored is starting in {path}, for about a minute after an installation; try again in a moment"


def probe(path: Path, timeout_s: float) -> None:
    """Connect once without gRPC, which cannot say why it cannot. Raises KvctlError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(timeout_s)
        try:
            peer.connect(str(path))
        except (FileNotFoundError, NotADirectoryError):
            if starting(path.parent):
                raise KvctlError(Exit.UNREACHABLE, _STARTING.format(path=path.parent)) from None
            text = f"no kvstored is running in {path.parent}: there is no {path.name}; "
            text += "start kvstored, or name its directory with --runtime-dir"
            raise KvctlError(Exit.UNREACHABLE, text) from None
        except ConnectionRefusedError:
            if starting(path.parent):
                raise KvctlError(Exit.UNREACHABLE, _STARTING.format(path=path.parent)) from None
            text = f"no kvstored is running: {path} is left over from one that is gone; start kvstored"
            raise KvctlError(Exit.UNREACHABLE, text) from None
        except PermissionError:
            text = f"{path} is closed to uid {os.geteuid()}; run kvctl as the daemon's user or as root"
            raise KvctlError(Exit.UNREACHABLE, text) from None
        except TimeoutError:
            text = f"{path} took no connection within {timeout_s:g} s; the daemon is stuck: see its log"
            raise KvctlError(Exit.TIMED_OUT, text) from None
        except OSError as error:
            raise KvctlError(
                Exit.UNREACHABLE, f"{path} cannot be reached: {error.strerror}; see `kvctl doctor`"
            ) from None
