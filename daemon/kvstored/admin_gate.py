"""In front of every call on a control socket: who asks, whether they may, and what is written down of it.

    control.sock    open to root, the daemon's user and its admin group by the mode of the file. Seeing needs no token;
                    acting does, so that the audit file can say who it was
    tenants.sock    open to everybody, where it is wanted: a token always, looked at before anything is waited for, and
                    only what its tenants have; so many calls a user (`admin_places.py`)
    a certificate   (mutual TLS) acts, under the name in it; one that names nobody is nobody's

A call that acts is written down when it is over, whatever came of it; one that goes on when its caller's time is over
(`control_acts.py`), when what it began is. Handler threads.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NoReturn, TypeAlias

import grpc

from kvproto import control_pb2 as pb
from kvproto.control_token import TOKEN_KEY, TOKEN_SOCKET
from kvstored.admin_access import Access, Caller
from kvstored.admin_audit import OUTCOME_LETTERS, Act, Audit
from kvstored.admin_places import CALLS_OF_ONE, Place, Places
from kvstored.admin_words import verb_of, words_of
from kvstored.control_acts import GoesOnError

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Control"].full_name

WHO_LETTERS: Final = 256  # of a certificate's name
_NAMES: Final = ("x509_common_name", "x509_subject_alternative_name")  # the first that says anything

Handler: TypeAlias = Callable[[Any, grpc.ServicerContext], Any]


# -- what a call is ---------------------------------------------------------------------------------------------

# Verbs that change something, and when they do. All others only look.
_ACTS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "Clear": lambda request: not request.dry_run,
    "Evict": lambda request: not request.dry_run,
    "Drain": lambda _: True,
    "Undrain": lambda _: True,
    "Scrub": lambda request: bool(request.start),
    "SetPolicy": lambda request: not request.dry_run,
    "SetQuota": lambda request: not request.dry_run,
    "Pin": lambda _: True,
    "Prefetch": lambda _: True,
    "HandOver": lambda request: not request.dry_run,
    "Unpin": lambda _: True,
    "NoteTransfer": lambda _: True,
}

# What somebody may see who may not act: these verbs alone, of one of their tenants each,
_OF_ONE_TENANT: Final = frozenset(
    {
        "ListPins",
        "ListPrograms",
        "ListWorkflows",
        "GetCosts",
        "GetPolicy",
        "GetQuotas",
        "Advise",
        "WalkBlocks",
        "ListBlocks",
        "GetTree",
        "StatPrefix",
        "FindKeys",
        "WatchBlocks",
        "SummariseMatch",
    }
)
# or of all of theirs: field of the answer, and where an entry says whose it is,
_FILTERED: Final = {
    "ListTenants": ("tenants", "name"),
    "ListNamespaces": ("namespaces", "tenant"),
    "ListClients": ("clients", "tenant"),
}
# without what is counted over all tenants.
_OF_ALL: Final = {"ListPins": "counters", "ListPrograms": "counters"}
_HARMLESS: Final = frozenset({"Ping"})


_WHO_ASKS: Final = f"who asks? send a token from {TOKEN_SOCKET} beside this socket, as kvctl of this version does"


def acts(verb: str, request: Any) -> bool:
    """Does this call change anything?"""
    return verb in _ACTS and _ACTS[verb](request)


# -- the gate ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gate(grpc.ServerInterceptor):  # type: ignore[type-arg, misc, unused-ignore]  # no generic where it runs
    """That of one socket. `open_to_all`: its file lets everybody connect."""

    access: Access
    audit: Audit
    open_to_all: bool = False
    places: Places = field(default_factory=Places)  # where it is

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.ServerInterceptor. Other services, such as health, pass."""
        handler = continuation(details)
        service, _, verb = details.method.removeprefix("/").partition("/")
        if handler is None or service != SERVICE:
            return handler
        token = next((str(value) for key, value in details.invocation_metadata or () if key == TOKEN_KEY), None)
        if self.open_to_all:
            return self._of_everybody(verb, token, handler)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: self._call(verb, token, handler.unary_unary, request, context),
                handler.request_deserializer, handler.response_serializer,
            )  # fmt: skip
        assert handler.unary_stream, "no verb takes a stream of requests"

        def stream(request: Any, context: grpc.ServicerContext) -> Any:
            self._admit(verb, request, self._caller(token, context), context)
            return handler.unary_stream(request, context)

        return grpc.unary_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)

    def _of_everybody(self, verb: str, token: str | None, handler: Any) -> Any:
        """Requests are streams here: a handler that has not seen its request yet can refuse, and be ended."""
        self.places.end_late()
        caller = None if token is None else self.access.caller(token)

        def refuse(_: Any, context: grpc.ServicerContext) -> NoReturn:
            try:
                self._caller(token, context)
                _refuse(context, grpc.StatusCode.UNAUTHENTICATED, _WHO_ASKS)
            finally:
                if verb in _ACTS:  # what was meant by it nobody has read
                    act = _act(verb, handler.request_deserializer(b""), None, None, context)
                    self.audit.note_refused(replace(act, verb=verb.lower(), scope=""))

        def unary(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            place = self._place(caller, context)
            request = _first(requests, context)
            self.places.asked(place, follows=False)
            return self._call(verb, token, handler.unary_unary, request, context)

        def stream(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            place = self._place(caller, context)
            request = _first(requests, context)
            self.places.asked(place, follows=True)
            self._admit(verb, request, self._caller(token, context), context)
            return handler.unary_stream(request, context)

        read, write = handler.request_deserializer, handler.response_serializer
        if caller is None:
            return grpc.stream_unary_rpc_method_handler(refuse, read, write)
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(unary, read, write)
        return grpc.stream_stream_rpc_method_handler(stream, read, write)

    def _place(self, caller: Caller | None, context: grpc.ServicerContext) -> Place:
        assert caller is not None, "without a token nobody gets here"
        place = self.places.take(caller.uid, context)
        if place is None:
            text = f"uid {caller.uid} has {CALLS_OF_ONE} calls under way here, which is all that one user may have"
            _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return place

    def _call(self, verb: str, token: str | None, handler: Handler, request: Any, context: grpc.ServicerContext) -> Any:
        if not acts(verb, request):
            caller = self._caller(token, context)
            narrow = self._admit(verb, request, caller, context)
            answer = handler(request, context)
            return _narrowed(verb, answer, caller) if narrow and caller is not None else answer
        caller = answer = going = None
        try:
            caller = self._caller(token, context)
            self._admit(verb, request, caller, context)
            answer = handler(request, context)
        except GoesOnError as error:
            going = error.end
            raise
        finally:
            act = _act(verb, request, answer, caller, context)
            if going is not None:
                self.audit.note_when_over(act, going)
            elif not self.open_to_all or (caller is not None and caller.acts):
                self.audit.note(act)
            else:
                self.audit.note_refused(act)
        return answer

    def _caller(self, token: str | None, context: grpc.ServicerContext) -> Caller | None:
        """Who asks, if they said so; ends the call of a token that is no good."""
        if token is not None:
            caller = self.access.caller(token)
            if caller is None:
                text = f"this token has lapsed; {TOKEN_SOCKET} gives new ones"
                _refuse(context, grpc.StatusCode.UNAUTHENTICATED, text)
            return caller
        name = _certified(context)
        return None if name is None else Caller(-1, 0, True, (), name)

    def _admit(self, verb: str, request: Any, caller: Caller | None, context: grpc.ServicerContext) -> bool:
        """Ends the call of who may not. True: they may see only what is theirs."""
        if caller is None:
            if self.open_to_all or acts(verb, request):
                _refuse(context, grpc.StatusCode.UNAUTHENTICATED, _WHO_ASKS)
            return False
        if caller.acts:
            return False
        if acts(verb, request):
            text = f"uid {caller.uid} may not change anything here"
            text += "; root, the daemon's user and members of control.admin_group may"
            _refuse(context, grpc.StatusCode.PERMISSION_DENIED, text)
        if verb in _OF_ONE_TENANT:
            _narrow(request, caller, context)
        elif verb not in _FILTERED and verb not in _HARMLESS:
            text = f"uid {caller.uid} may only see what its tenants have ({', '.join(caller.tenants)})"
            text += "; this is about all of them"
            _refuse(context, grpc.StatusCode.PERMISSION_DENIED, text)
        return True


def _first(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
    """The request of a call. Ends one that closes without."""
    request = next(requests, None)
    if request is None:
        _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "there is no request in this call")
    return request


def _certified(context: grpc.ServicerContext) -> str | None:
    """The name in the caller's certificate; None: there is none. Ends the call of one that names nobody."""
    known: Mapping[str, Any] = context.auth_context()
    if not any(key.startswith("x509_") for key in known):
        return None
    names = (str(name, "utf-8", "replace").strip() for key in _NAMES for name in known.get(key) or ())
    found = next(filter(None, names), "")
    if found:
        return found[:WHO_LETTERS]
    text = "this certificate names nobody; issue one with a common name, or a subject alternative name"
    return _refuse(context, grpc.StatusCode.UNAUTHENTICATED, text)


def _narrow(request: Any, caller: Caller, context: grpc.ServicerContext) -> None:
    """Have a request mean one of the caller's tenants. Whether others exist it is not told."""
    if not request.tenant and len(caller.tenants) == 1:
        request.tenant = caller.tenants[0]
    elif not request.tenant:
        text = f"name one of your tenants: {', '.join(caller.tenants)}"
        _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, text)
    elif not caller.sees(request.tenant):
        text = f"uid {caller.uid} may only see what its tenants have: {', '.join(caller.tenants)}"
        _refuse(context, grpc.StatusCode.PERMISSION_DENIED, text)


def _narrowed(verb: str, answer: Any, caller: Caller) -> Any:
    """An answer, less what is not the caller's."""
    if verb in _FILTERED:
        name, whose = _FILTERED[verb]
        entries = getattr(answer, name)
        mine = [entry for entry in entries if caller.sees(getattr(entry, whose))]
        del entries[:]
        entries.extend(mine)
    if verb in _OF_ALL:
        answer.ClearField(_OF_ALL[verb])
    if verb == "GetCosts":
        mine = [way for way in answer.ways if caller.sees(way.tenant)]
        del answer.ways[:]
        answer.ways.extend(mine)
    return answer


def _act(verb: str, request: Any, answer: Any, caller: Caller | None, context: grpc.ServicerContext) -> Act:
    counted = request if verb == "NoteTransfer" else answer
    outcome = "done"
    if answer is None:
        code, details = context.code(), context.details()  # type: ignore[attr-defined, unused-ignore]
        name = code.name.lower() if isinstance(code, grpc.StatusCode) else "failed"
        text = details.decode(errors="replace") if isinstance(details, bytes) else str(details or "")
        outcome = f"{name}: {text}"[:OUTCOME_LETTERS]
    return Act(
        unix_s=time.time(),
        uid=caller.uid if caller else -1,
        pid=caller.pid if caller else 0,
        who=caller.who if caller else "",
        verb=verb_of(verb, request),
        scope=words_of(verb, request),
        blocks=int(getattr(counted, "blocks", 0)),
        bytes=int(getattr(counted, "bytes", 0)),
        outcome=outcome,
    )


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort raises")
