"""Hints over the socket of a real daemon: what they pin and fetch, what is refused, what an operator sees."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bench.process import DaemonProcess
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from kvproto import frames, policy_frames
from kvproto.errors import Code, Grant
from kvproto.frames import Verb
from kvproto.limits import HINT_TEXT_BYTES, KEYS_PER_FRAME
from kvproto.policy_frames import Event, Hint, Pin
from tests.raw import RawClient, dial, key, real_daemon

LINE = json.dumps({"steps": [{"name": "a", "next": ["b"]}, {"name": "b"}]})


class Agent:
    """A raw client that gives hints."""

    def __init__(self, daemon: DaemonProcess, tenant: str) -> None:
        self.raw: RawClient = dial(daemon.runtime_dir)
        self.raw.hello(tenant=tenant)
        self.namespace = self.raw.open()

    def store(self, keys: list[bytes]) -> None:
        """A chain, to the end."""
        granted = self.raw.reserve(self.namespace, keys)
        assert [one.grant for one in granted] == [Grant.GRANTED] * len(keys)
        assert self.raw.commit([one.ticket for one in granted]) == 0
        self.raw.answer(Verb.PUBLISHED)

    def say(self, event: Event, name: str, **fields: object) -> None:
        """A hint; nothing comes back if it is taken."""
        fields = {"namespace": self.namespace, **fields}
        self.raw.send(policy_frames.build_hint(Hint(event, name, **fields)))  # type: ignore[arg-type]

    def refusals(self) -> list[str]:
        """What was refused so far."""
        self.raw.ping()
        refused = [(head, frame) for head, frame, _ in self.raw.unasked if head.verb == Verb.REFUSED]
        self.raw.unasked.clear()
        return [frames.parse_failure(frame, head)[1] for head, frame in refused]

    def pins(self) -> list[Pin]:
        """PINS."""
        self.raw.send(policy_frames.build_pins(self.raw.request(), 0))
        head, frame, _ = self.raw.answer(Verb.PIN_LIST)
        return policy_frames.parse_pin_list(frame, head)


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with real_daemon("--policy-dram", "density", tenants=("red", "blue")) as process:
        yield process


@pytest.fixture
def agents(daemon: DaemonProcess) -> Iterator[tuple[Agent, Agent]]:
    """One of each tenant."""
    with ExitStack() as stack:
        both = Agent(daemon, "red"), Agent(daemon, "blue")
        for agent in both:
            stack.callback(agent.raw.close)
        yield both


def test_an_agent_that_calls_a_tool_keeps_its_context_until_it_is_over(
    daemon: DaemonProcess, agents: tuple[Agent, Agent]
) -> None:
    agent, _ = agents
    keys = [key(100 + number) for number in range(4)]
    agent.store(keys)
    agent.say(Event.PROGRAM, "agent-1")
    agent.say(Event.CONTEXT, "agent-1", keys=b"".join(keys))
    assert agent.pins() == []
    agent.say(Event.TOOL_STARTED, "agent-1", other="search", seconds=30.0)
    (pin,) = agent.pins()
    assert (pin.blocks, pin.namespace, pin.bytes) == (4, agent.namespace, 4 * 4096)
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as operator:
        (shown,) = operator.programs(pb.ListProgramsRequest(tenant="red")).programs
        assert (shown.program, shown.state, shown.tool, shown.pinned_blocks) == ("agent-1", "in tool", "search", 4)
        assert 0 < shown.pinned_s <= 120
        assert not operator.programs(pb.ListProgramsRequest(tenant="blue")).programs
    agent.say(Event.TOOL_FINISHED, "agent-1")
    (anew,) = agent.pins()
    assert anew.pin != pin.pin
    agent.say(Event.PROGRAM_FINISHED, "agent-1")
    assert agent.pins() == []
    assert agent.refusals() == []


def test_workflows_are_heard_and_shown(daemon: DaemonProcess, agents: tuple[Agent, Agent]) -> None:
    agent, _ = agents
    keys = [key(200 + number) for number in range(3)]
    agent.store(keys)
    agent.say(Event.WORKFLOW, "line", text=LINE, version=1)
    agent.say(Event.RUN, "run-1", other="line")
    agent.say(Event.BIND, "run-1", other="b", version=1, keys=b"".join(keys))
    agent.say(Event.ENTER, "run-1", other="a", version=1)
    assert agent.refusals() == []
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as operator:
        before = operator.programs(pb.ListProgramsRequest()).counters
        report = operator.workflows(pb.ListWorkflowsRequest())
        (run,) = report.runs
        assert (run.tenant, run.run, list(run.running), list(run.near)) == ("red", "run-1", ["a"], ["b"])
        agent.say(Event.RUN_FINISHED, "run-1")
        assert agent.refusals() == []
        assert operator.workflows(pb.ListWorkflowsRequest()).runs_total == 0
    assert before.said_blocks >= 3, "words on what the next step reads"
    assert before.fetches >= 1


def test_what_is_not_taken_is_told_and_the_session_goes_on(agents: tuple[Agent, Agent]) -> None:
    agent, stranger = agents
    agent.say(Event.PROGRAM, "mine")
    assert agent.refusals() == []
    stranger.say(Event.TURN_FINISHED, "mine")
    (text,) = stranger.refusals()
    assert "mine" in text
    assert "no program" in text
    for event, fields in (
        (Event.PROGRAM, {"seconds": -1.0}),
        (Event.PROGRAM, {"seconds": 1e300}),
        (Event.WORKFLOW, {"text": "[" * HINT_TEXT_BYTES}),
        (Event.WORKFLOW, {"text": json.dumps({"steps": [{"name": "a", "next": ["a"]}]})}),
        (Event.EXPECT, {"keys": b""}),
        (Event.CONTEXT, {"keys": key(1) * 2}),
    ):
        agent.say(event, "mine", **fields)
        assert len(agent.refusals()) == 1, (event, fields)
    agent.say(Event.TURN_FINISHED, "mine")
    assert agent.refusals() == []


def test_a_namespace_that_was_not_opened_ends_the_session(agents: tuple[Agent, Agent]) -> None:
    agent, _ = agents
    agent.say(Event.EXPECT, "mine", namespace=agent.namespace + 999, keys=key(1), expectation=1)
    assert agent.raw.goodbye()[0] is Code.BAD_NAMESPACE


def test_the_longest_hint_is_heard(agents: tuple[Agent, Agent]) -> None:
    agent, _ = agents
    agent.say(Event.PROGRAM, "long")
    agent.say(Event.CONTEXT, "long", keys=b"".join(key(1000 + number) for number in range(KEYS_PER_FRAME)))
    agent.say(Event.TOOL_STARTED, "long", other="search", seconds=30.0)
    assert agent.refusals() == []
    assert agent.pins() == [], "none of it is there"
    agent.say(Event.PROGRAM_FINISHED, "long")
