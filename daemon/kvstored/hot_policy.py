"""The verbs by which clients say what they know: PIN, UNPIN, PINS, PREFETCH, CANCEL, HINT, REPORT, ADVISE.

HINT and REPORT are one way, so that no engine waits for them: what is not taken comes back as REFUSED, which a client
may log. What breaks the format ends the session, as with every other verb. Owner thread.
"""

from collections.abc import Callable
from typing import Final

from kvproto import frames, policy_frames
from kvproto.errors import Code, ProtocolError
from kvproto.frames import Flag, Head, Verb
from kvproto.limits import PIN_TTL_NS_MAX, PREFETCH_NS_MAX
from kvproto.policy_frames import Kind, Tier
from kvstore.blocks import U8
from kvstore.cost import Refusal
from kvstore.handing_over import hand_over
from kvstore.sessions import Session
from kvstore.store import Store
from kvstored.connection import Connection

Handler = Callable[[Connection, Session, Head], None]
PINS_A_FRAME: Final = 1024  # 32 bytes each


class PolicyVerbs:
    """Handlers for one server, which lends its receive buffer."""

    def __init__(self, frame: memoryview, words: U8, store: Callable[[], Store]) -> None:
        """`frame` and `words` are the same bytes; a handler finds the frame in them that it is called for."""
        self._frame = frame
        self._words = words
        self._store = store

    def handlers(self) -> dict[int, Handler]:
        """By verb."""
        return {
            Verb.PIN: self._pin,
            Verb.UNPIN: self._unpin,
            Verb.PINS: self._pins,
            Verb.PREFETCH: self._prefetch,
            Verb.CANCEL: self._cancel,
            Verb.HINT: self._hint,
            Verb.REPORT: self._report,
            Verb.ADVISE: self._advise,
        }

    # -- pins ----------------------------------------------------------------------------------------------------

    def _pin(self, connection: Connection, session: Session, head: Head) -> None:
        keys_at = policy_frames.pin_keys(head)
        number, tier, ttl_ns = policy_frames.PIN_HEAD.unpack_from(self._frame, head.body)
        tier = policy_frames.require_tier(tier)
        if not 0 < ttl_ns <= PIN_TTL_NS_MAX:
            _fail(connection, head, f"a pin for {ttl_ns} ns; 1 to {PIN_TTL_NS_MAX} may be asked for")
            return
        store = self._store()
        pinned = store.pinning.pin(
            session.tenant, store.namespace(session, number), self._words, keys_at >> 3, head.count, ttl_ns, tier,
            refresh=bool(head.flags & Flag.REFRESH),
        )  # fmt: skip
        connection.send(frames.build(Verb.PINNED, head.request, policy_frames.PINNED_BODY.pack(*pinned)))

    def _unpin(self, connection: Connection, session: Session, head: Head) -> None:
        ended = self._store().pinning.unpin(session.tenant, policy_frames.parse_numbers(self._frame, head))
        connection.send(frames.build(Verb.UNPINNED, head.request, frames.NUMBER_BODY.pack(ended)))

    def _pins(self, connection: Connection, session: Session, head: Head) -> None:
        (after,) = frames.CLOCK_BODY.unpack_from(self._frame, frames.require_body(head, frames.CLOCK_BODY.size))
        pins = self._store().pinning.list_pins(session.tenant, after, PINS_A_FRAME)
        connection.send(policy_frames.build_pin_list(head.request, pins))

    # -- prefetches ----------------------------------------------------------------------------------------------

    def _prefetch(self, connection: Connection, session: Session, head: Head) -> None:
        keys_at = policy_frames.pin_keys(head)
        number, tier, within_ns = policy_frames.PREFETCH_HEAD.unpack_from(self._frame, head.body)
        remote = tier == policy_frames.REMOTE
        tier = Tier.DRAM if remote else policy_frames.require_tier(tier)
        if not 0 < within_ns <= PREFETCH_NS_MAX:
            _fail(connection, head, f"a prefetch within {within_ns} ns; 1 to {PREFETCH_NS_MAX} may be asked for")
            return
        store = self._store()
        namespace, at = store.namespace(session, number), keys_at >> 3
        if remote:
            fetching = hand_over(store, namespace, self._words, at, head.count, within_ns)
        else:
            fetching = store.prefetching.prefetch(
                session.tenant, namespace, self._words, at, head.count, within_ns, tier, wished=True
            )
        connection.send(frames.build(Verb.FETCHING, head.request, policy_frames.FETCHING_BODY.pack(*fetching)))

    def _cancel(self, _connection: Connection, session: Session, head: Head) -> None:
        self._store().prefetching.cancel(session.tenant, policy_frames.parse_numbers(self._frame, head))

    # -- hints and timings ---------------------------------------------------------------------------------------

    def _hint(self, connection: Connection, session: Session, head: Head) -> None:
        refused = self._store().guiding.hear(session, policy_frames.parse_hint(self._frame, head))
        if refused is not None:
            what = f"{refused.what!r}: {refused.refusal.value}" if refused.what else refused.refusal.value
            _refuse(connection, what)

    def _report(self, connection: Connection, session: Session, head: Head) -> None:
        report = policy_frames.parse_report(self._frame, head)
        store = self._store()
        namespace = store.namespace(session, report.namespace)
        if report.kind == Kind.PREFILL:
            refusal = store.costing.report_prefill(namespace, report.first, report.amount, report.seconds)
        elif report.kind == Kind.QUEUE:
            refusal = store.costing.report_queue(namespace, report.seconds)
        else:
            refusal = store.costing.report_load(namespace, report.first, report.amount, report.seconds)
        if refusal is not None:
            _refuse(connection, f"a timing that is {refusal.value}")

    def _advise(self, connection: Connection, session: Session, head: Head) -> None:
        question = policy_frames.parse_advise(self._frame, head)
        store = self._store()
        advised = store.costing.advise(store.namespace(session, question.namespace), question)
        if isinstance(advised, Refusal):
            _fail(connection, head, f"a question with a number that is {advised.value}")
            return
        connection.send(frames.build(Verb.ADVISED, head.request, policy_frames.ADVISED_BODY.pack(*advised)))


def _fail(connection: Connection, head: Head, text: str) -> None:
    """The request is well formed and cannot be carried out; the session goes on."""
    if not head.request:
        raise ProtocolError(text)
    connection.send(frames.build_failure(Verb.FAILED, head.request, Code.BAD_ARGUMENT, text))


def _refuse(connection: Connection, text: str) -> None:
    connection.send(frames.build_failure(Verb.REFUSED, 0, Code.BAD_ARGUMENT, text))
