"""The verbs by which clients say what they know, frame by frame, on a store whose clock the test owns."""

from collections.abc import Sequence

import numpy as np
import pytest

from kvproto import frames, policy_frames
from kvproto.errors import Code, ProtocolError
from kvproto.frames import Head, Verb
from kvproto.limits import FRAME_BYTES, PIN_TTL_NS_MAX, PREFETCH_NS_MAX
from kvproto.policy_frames import Event, Hint, Kind, Partial, Question, Report, Tier
from kvstore.sessions import Namespace
from kvstored.connection import Connection, Frame
from kvstored.hot_policy import PolicyVerbs
from tests.core import MS, SECOND, Client, Core, chain

Answer = tuple[Head, bytes]
AGES = 1 << 63  # ns


class Heard(Connection):
    """What a client would receive; there is no socket."""

    __slots__ = ("answers",)

    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def send(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """See `Connection`."""
        kept = bytes(frame)
        self.answers.append((frames.parse_head(kept, len(kept)), kept))


class Wire:
    """A session whose frames go straight to the handlers."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heard = Heard()
        received = np.zeros(FRAME_BYTES, dtype=np.uint8)
        self._frame = memoryview(received)  # type: ignore[arg-type]  # ndarray has the buffer protocol
        verbs = PolicyVerbs(self._frame, received.view(np.uint64), lambda: client.store)
        self._handlers = verbs.handlers()

    def say(self, frame: bytes) -> None:
        """A frame arrives."""
        self._frame[: len(frame)] = frame
        head = frames.parse_head(self._frame, len(frame))
        self._handlers[head.verb](self.heard, self.client.session, head)

    def answer(self, verb: Verb) -> Answer:
        """The one frame that has come since, which must be of this verb."""
        ((head, frame),) = self.heard.answers
        self.heard.answers.clear()
        assert head.verb == verb
        return head, frame

    def refusal(self) -> str:
        """The text of the REFUSED that has come, and nothing else."""
        head, frame = self.answer(Verb.REFUSED)
        code, text = frames.parse_failure(frame, head)
        assert (head.request, code) == (0, Code.BAD_ARGUMENT)
        return text

    def report(self, namespace: Namespace, kind: Kind, first: int, amount: int, seconds: float) -> None:
        """REPORT."""
        self.say(policy_frames.build_report(Report(namespace.number, kind, first, amount, seconds)))

    def hint(self, event: Event, name: str, **fields: object) -> None:
        """HINT."""
        self.say(policy_frames.build_hint(Hint(event, name, **fields)))  # type: ignore[arg-type]

    def pins(self, after: int = 0) -> list[policy_frames.Pin]:
        """PINS."""
        self.say(policy_frames.build_pins(7, after))
        head, frame = self.answer(Verb.PIN_LIST)
        return policy_frames.parse_pin_list(frame, head)


@pytest.fixture
def wire() -> Wire:
    """A session, a namespace open in it, and a chain of four."""
    client = Core().client()
    client.put(client.open(), chain(4))
    return Wire(client)


def ask(wire: Wire, verb: Verb, ns: int, *, request: int = 9) -> None:
    """PIN for, or PREFETCH within so long."""
    number, keys = wire.client.open().number, b"".join(chain(4))
    if verb == Verb.PIN:
        wire.say(policy_frames.build_pin(request, number, keys, Tier.DRAM, ns, refresh=False))
    else:
        wire.say(policy_frames.build_prefetch(request, number, keys, Tier.DRAM, ns))


LONGEST = [(Verb.PIN, Verb.PINNED, PIN_TTL_NS_MAX), (Verb.PREFETCH, Verb.FETCHING, PREFETCH_NS_MAX)]


@pytest.mark.parametrize(("verb", "answer", "most_ns"), LONGEST)
def test_a_time_outside_the_limits_fails_and_one_within_is_taken(
    wire: Wire, verb: Verb, answer: Verb, most_ns: int
) -> None:
    for ns in (0, most_ns + 1, AGES, 2 * AGES - 1):
        ask(wire, verb, ns)
        head, frame = wire.answer(Verb.FAILED)
        code, text = frames.parse_failure(frame, head)
        assert (head.request, code) == (9, Code.BAD_ARGUMENT)
        assert f"{ns} ns" in text
        assert str(most_ns) in text
    assert wire.pins() == []
    for ns in (1, most_ns):
        ask(wire, verb, ns)
        assert wire.answer(answer)[0].request == 9
    assert len(wire.pins()) == (2 if verb == Verb.PIN else 0)


@pytest.mark.parametrize(("verb", "answer", "most_ns"), LONGEST)
def test_a_failure_that_nobody_waits_for_breaks_the_format(wire: Wire, verb: Verb, answer: Verb, most_ns: int) -> None:
    with pytest.raises(ProtocolError):
        ask(wire, verb, most_ns + 1, request=0)
    assert wire.heard.answers == []
    ask(wire, verb, most_ns, request=0)
    assert wire.answer(answer)[0].request == 0


def test_pins_are_listed_from_a_number_on_and_ended_by_number(wire: Wire) -> None:
    for _ in range(3):
        ask(wire, Verb.PIN, SECOND)
        _, frame = wire.answer(Verb.PINNED)
        assert policy_frames.PINNED_BODY.unpack_from(frame, frames.HEAD_BYTES)[4] == Partial.NOTHING
    first, second, third = (pin.pin for pin in wire.pins())
    assert [pin.pin for pin in wire.pins(first)] == [second, third]
    assert wire.pins(third) == []
    wire.say(policy_frames.build_unpin(3, [second, third + 1]))
    head, frame = wire.answer(Verb.UNPINNED)
    assert frames.parse_number(frame, head) == 1
    assert [pin.pin for pin in wire.pins()] == [first, third]


def test_a_pin_is_refreshed_by_a_use_only_where_that_was_asked_for(wire: Wire) -> None:
    client, keys = wire.client, b"".join(chain(4))
    namespace = client.open()
    for flag in (False, True):
        wire.say(policy_frames.build_pin(1, namespace.number, keys, Tier.DRAM, SECOND, refresh=flag))
        wire.answer(Verb.PINNED)
    plain, refreshed = wire.pins()
    client.core.pass_time(500 * MS)
    client.fetch(namespace, chain(4))
    later = {pin.pin: pin.expires_ns for pin in wire.pins()}
    assert later == {plain.pin: plain.expires_ns, refreshed.pin: refreshed.expires_ns + 500 * MS}


def test_how_long_requests_queue_decides_how_long_a_context_is_kept(wire: Wire) -> None:
    """Nothing else makes losing it expensive here: no prefill and no load was ever timed."""
    client = wire.client
    namespace, keys = client.open(), b"".join(chain(4))
    for number in range(10):  # programs of equally many turns: each turn that need not queue is worth all of it
        name = f"p{number}"
        wire.hint(Event.PROGRAM, name)
        for _ in range(10):
            wire.hint(Event.TOOL_STARTED, name, other="search")
            client.core.pass_time(3 * SECOND)
            wire.hint(Event.TOOL_FINISHED, name)
            wire.hint(Event.TURN_FINISHED, name)
        wire.hint(Event.PROGRAM_FINISHED, name)
    wire.hint(Event.PROGRAM, "agent")
    wire.hint(Event.CONTEXT, "agent", namespace=namespace.number, keys=keys)
    wire.hint(Event.TOOL_STARTED, "agent", other="search")
    assert wire.pins() == [], "who loses it loses nothing"
    for _ in range(200):
        wire.report(namespace, Kind.QUEUE, 0, 0, 60.0)
    wire.hint(Event.TOOL_STARTED, "agent", other="search")
    (pin,) = wire.pins()
    assert pin.blocks == 4
    assert 3 * SECOND <= pin.expires_ns - client.core.clock.ns < 3.3 * SECOND
    assert wire.heard.answers == []


@pytest.mark.parametrize("kind", list(Kind))
def test_a_timing_that_cannot_be_is_refused_whatever_it_times(wire: Wire, kind: Kind) -> None:
    namespace = wire.client.open()
    first, amount = {Kind.PREFILL: (0, 512), Kind.LOAD: (Tier.DRAM, 4096), Kind.QUEUE: (0, 0)}[kind]
    wire.report(namespace, kind, first, amount, 0.5)
    assert wire.heard.answers == []
    for seconds in (-1.0, float("nan"), float("inf"), 1e300):
        wire.report(namespace, kind, first, amount, seconds)
        assert "timing" in wire.refusal()
    with pytest.raises(ProtocolError):
        wire.report(namespace, len(Kind), first, amount, 0.5)  # type: ignore[arg-type]


def test_a_hint_that_is_not_taken_is_named(wire: Wire) -> None:
    wire.hint(Event.TURN_FINISHED, "nobody")
    assert "nobody" in wire.refusal()
    wire.hint(Event.PROGRAM, "x", seconds=-1.0)
    assert wire.refusal()


def test_advice_is_given_of_numbers_that_can_be(wire: Wire) -> None:
    number, unknown = wire.client.open().number, float("nan")
    wire.say(policy_frames.build_advise(5, Question(number, 4096.0, *[unknown] * 7)))
    assert wire.answer(Verb.ADVISED)[0].request == 5
    wire.say(policy_frames.build_advise(6, Question(number, -1.0, *[unknown] * 7)))
    head, frame = wire.answer(Verb.FAILED)
    assert (head.request, frames.parse_failure(frame, head)[0]) == (6, Code.BAD_ARGUMENT)
