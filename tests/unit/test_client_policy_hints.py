"""Programs, workflows and expectations: what is said one way, when, to whom, and that nobody ever waits for it."""

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import kvclient
from kvclient import Step
from kvclient.hints import IDLE_S, WORKFLOW_IDLE_S
from kvclient.refusals import LOG_NS, REFUSALS_KEPT, Refusals
from kvproto import frames, policy_frames
from kvproto.errors import ClosedError, Code, UsageError
from kvproto.frames import Verb
from kvproto.limits import HINT_TEXT_BYTES, KEY_BYTES, KEYS_PER_FRAME
from kvproto.policy_frames import Event, Hint
from kvstore.hints import limits
from kvstore.hints.graph import Graph
from kvstore.hints.guide import FREE, Guide
from kvstore.hints.refusal import Refused
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import Stopwatch, client_of, keys_of, namespace_of, pair, wait_until
from tests.unit.client_policy_kit import NAMESPACE

SLACK_S = 15.0
KEYS = keys_of(3)
JOINED = b"".join(KEYS)
STEPS = [Step("plan", ["search", "write"], split="one", chances=[0.75, 0.25]), Step("search", ["plan"]), Step("write")]


def told(peer: Peer, count: int) -> list[tuple[Event, str, str]]:
    """The first hints, as event, name and other name, once there are so many."""
    peer.wait_for(lambda: len(peer.hints) >= count)
    assert len(peer.hints) == count
    return [(hint.event, hint.name, hint.other) for hint in peer.hints]


def forget_session(peer: Peer, client: kvclient.Client) -> None:
    """The daemon goes and comes back, knowing nothing; the client is in a new session."""
    hellos = peer.hellos
    peer.hang_up()
    wait_until(lambda: peer.hellos > hellos and client.connected)
    peer.hints.clear()


# -- programs --------------------------------------------------------------------------------------------------


def test_the_life_of_a_program_is_told(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns), kvclient.connect(tmp_path / "nowhere"):
        client = kvclient.Client(ns._connection)
        with client.program("agent/7", idle_s=600) as program:
            program.context(ns, KEYS)
            program.tool_started("search", expected_s=2.5)
            program.tool_finished()
            program.turn_finished()
        assert told(peer, 6) == [
            (Event.PROGRAM, "agent/7", ""),
            (Event.CONTEXT, "agent/7", ""),
            (Event.TOOL_STARTED, "agent/7", "search"),
            (Event.TOOL_FINISHED, "agent/7", ""),
            (Event.TURN_FINISHED, "agent/7", ""),
            (Event.PROGRAM_FINISHED, "agent/7", ""),
        ]
        assert peer.hints[0].seconds == 600
        assert (peer.hints[1].keys, peer.hints[1].namespace) == (JOINED, NAMESPACE)
        assert peer.hints[1].keys != b"".join(keys_of(3, seed=2))
        assert peer.hints[2].seconds == 2.5
        assert math.isnan(peer.hints[5].seconds)


def test_a_program_that_is_finished_is_finished_once_and_may_begin_anew(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        program = client.program("p")
        program.finished()
        program.finished()
        program.turn_finished()
        events = [event for event, _, _ in told(peer, 4)]
        assert events == [Event.PROGRAM, Event.PROGRAM_FINISHED, Event.PROGRAM, Event.TURN_FINISHED]


def test_a_new_session_hears_of_a_program_before_anything_else_of_it(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        program, other = client.program("p", idle_s=9), client.program("q")
        told(peer, 2)
        former = client._connection.session()  # as a lease may keep it
        forget_session(peer, client)
        assert client._connection.session() is not former
        program.tool_started("t")
        program.tool_finished()
        assert told(peer, 3) == [
            (Event.PROGRAM, "p", ""),
            (Event.TOOL_STARTED, "p", "t"),
            (Event.TOOL_FINISHED, "p", ""),
        ]
        assert peer.hints[0].seconds == 9
        other.context(ns, KEYS)  # opens the namespace in this session
        assert told(peer, 5)[3:] == [(Event.PROGRAM, "q", ""), (Event.CONTEXT, "q", "")]
        assert peer.seen.count(Verb.OPEN) == 2


@pytest.mark.parametrize(("idle_s", "again"), [(1e-9, True), (None, False)], ids=["long silent", "the control"])
def test_what_was_silent_for_long_is_announced_anew(tmp_path: Path, idle_s: float | None, *, again: bool) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        program = client.program("p", idle_s)
        program.tool_started("t")
        program.context(ns, KEYS)
        run = client.workflow("w", STEPS).run("r", idle_s)
        run.enter("plan")
        run.enter("search")
        events = [event for event, _, _ in told(peer, 11 if again else 7)]
        hints = list(peer.hints)
    program_again, run_again = [Event.PROGRAM] * again, [Event.RUN] * again
    assert events == [
        Event.PROGRAM, *program_again, Event.TOOL_STARTED, *program_again, Event.CONTEXT, Event.WORKFLOW, Event.RUN,
        *run_again, Event.ENTER, *run_again, Event.ENTER,
    ]  # fmt: skip
    assert len({hint.version for hint in hints if hint.event is Event.RUN}) == 1, "it is the same run"
    guide, refused, now_ns = Guide(), [], 0
    announcing = False
    for hint in hints:
        if not announcing:  # there was a silence: what is said is said anew, or not known any more
            now_ns += 2 * IDLE_S * 10**9
            list(guide.due(now_ns, most=100))
        announcing = hint.event in (Event.PROGRAM, Event.WORKFLOW, Event.RUN)
        if isinstance(guide.hear(hint, now_ns, lambda _: FREE), Refused):
            refused.append(hint.event)
    assert refused == ([] if again else [Event.CONTEXT, Event.ENTER])


def test_a_client_knows_when_a_daemon_forgets() -> None:
    assert (IDLE_S, IDLE_S, WORKFLOW_IDLE_S) == (limits.PROGRAM_TTL_S, limits.RUN_TTL_S, limits.WORKFLOW_TTL_S)
    assert len({IDLE_S, WORKFLOW_IDLE_S}) == 2


def test_without_a_daemon_hints_are_dropped_and_counted_until_one_comes(tmp_path: Path) -> None:
    with kvclient.connect(tmp_path, timeout_s=PATIENCE_S) as client:
        ns = namespace_of(client)
        program = client.program("p")
        run = client.workflow("w", STEPS).run("r")
        assert client.status.hints_dropped == 0  # it will be announced when it matters
        with Stopwatch(SLACK_S):
            program.tool_started("t")
            program.context(ns, KEYS)
            run.enter("plan")
            run.bind("plan", ns, KEYS)
            ns.expect(KEYS, "soon")
        assert client.status.hints_dropped == 5
        with Peer(tmp_path) as peer:
            assert client.wait_connected(PATIENCE_S)
            assert peer.hints == []  # nothing was queued
            program.tool_finished()
            run.enter("search")
            assert [event for event, _, _ in told(peer, 5)] == [
                Event.PROGRAM, Event.TOOL_FINISHED, Event.WORKFLOW, Event.RUN, Event.ENTER,
            ]  # fmt: skip
    for attempt in (program.tool_finished, lambda: client.program("x"), lambda: program.context(ns, KEYS)):
        with pytest.raises(ClosedError):
            attempt()
    with program:  # leaving it after the client was closed is no mistake
        pass


def test_a_full_socket_costs_hints_and_never_time(tmp_path: Path) -> None:
    stuck = threading.Event()
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        program, late = client.program("p"), client.workflow("w", STEPS)
        told(peer, 2)
        try:
            link = client._connection._link
            assert link is not None
            peer.instead[Verb.RELEASE] = lambda *_: assert_set(stuck)
            link.try_send(frames.build(Verb.RELEASE, 0))
            filler = frames.build_match(1, 1, bytes(KEY_BYTES * 1000))
            sent = 0
            while link.try_send(filler):
                sent += 1
            assert sent
            with Stopwatch(SLACK_S):
                for _ in range(100):
                    program.tool_started("t")
                run = late.run("r")
                run.enter("plan")
                ns.expect(KEYS, 5.0)
                ns.report_prefill(0, 1, 1)
            assert client.status.hints_dropped == 104
            assert client.connected
        finally:
            peer.instead |= {Verb.MATCH: lambda *_: None}
            stuck.set()
        assert client.ping() is not None
        run.enter("search")  # the run could not be announced; now it can
        assert told(peer, 4)[2:] == [(Event.RUN, "r", "w"), (Event.ENTER, "r", "search")]


def assert_set(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


def test_a_silent_daemon_gets_no_hints_until_it_speaks(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer, timeout_s=0.1) as client:
        program = client.program("p")
        told(peer, 1)
        peer.mute(Verb.PING)
        assert client.ping() is None
        program.turn_finished()
        assert client.status.hints_dropped == 1
        peer.answer_held()
        wait_until(lambda: client.ping() is not None)
        program.tool_started("t")
        assert [event for event, _, _ in told(peer, 2)] == [Event.PROGRAM, Event.TOOL_STARTED]


def test_a_context_names_the_first_keys_of_a_long_chain_and_none_of_an_empty_one(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns, keys = namespace_of(client), keys_of(KEYS_PER_FRAME + 7)
        program, run = client.program("p"), client.workflow("w", STEPS).run()
        for keyed in (
            lambda keys: program.context(ns, keys), lambda keys: run.bind("plan", ns, keys), ns.expect,
        ):  # fmt: skip
            keyed([])
            keyed(keys)
        told(peer, 6)
        assert [hint.keys for hint in peer.hints[3:]] == [b"".join(keys[:KEYS_PER_FRAME])] * 3


def test_a_namespace_of_another_client_is_named_by_its_number_in_this_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        Peer(tmp_path / "a") as peer, client_of(peer) as client,
        Peer(tmp_path / "b") as there, client_of(there) as other,
    ):  # fmt: skip
        foreign = namespace_of(other)
        assert Verb.OPEN not in peer.seen
        client.program("p").context(foreign, KEYS)
        assert [event for event, _, _ in told(peer, 2)] == [Event.PROGRAM, Event.CONTEXT]
        assert Verb.OPEN in peer.seen
        assert there.hints == []
        with pytest.raises(UsageError):
            client.program("p").context("m", KEYS)  # type: ignore[arg-type]


# -- names and times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "\ud800", "tab\t", None, 7])
def test_a_name_is_printable_and_short(tmp_path: Path, name: str) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns, program = namespace_of(client), client.program("n" * 128)
        run = client.workflow("\u00fc 1", STEPS).run()
        attempts: list[Callable[[], object]] = [
            lambda: client.program(name), lambda: program.tool_started(name), lambda: client.workflow(name, STEPS),
            lambda: run.enter(name), lambda: run.bind(name, ns, KEYS), lambda: ns.expect(KEYS, source=name),
            lambda: client.run(name), lambda: client.workflow("w", [{"name": name}]),
            lambda: client.run("r").enter(name),
        ]  # fmt: skip
        for attempt in attempts:
            with pytest.raises(UsageError):
                attempt()
        assert len(told(peer, 3)) == 3


@pytest.mark.parametrize(
    "keys",
    [set(KEYS), (key for key in KEYS), dict.fromkeys(KEYS), None, 7, JOINED, "keys", [b"short"], [*KEYS, "k"]],
    ids=lambda keys: type(keys).__name__,
)
def test_keys_come_in_an_order_and_have_their_length(tmp_path: Path, keys: Sequence[bytes]) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns, program, run = namespace_of(client), client.program("p"), client.workflow("w", STEPS).run("r")
        attempts: list[Callable[[], object]] = [
            lambda: program.context(ns, keys), lambda: run.bind("plan", ns, keys), lambda: ns.expect(keys, "soon"),
        ]  # fmt: skip
        for attempt in attempts:
            with pytest.raises(UsageError, match="key"):
                attempt()
        for good in (KEYS, tuple(KEYS)):
            program.context(ns, good)
        told(peer, 5)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "2", True])
def test_a_time_is_positive_and_finite(tmp_path: Path, seconds: float) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns, program, workflow = namespace_of(client), client.program("p"), client.workflow("w", STEPS)
        attempts: list[Callable[[], object]] = [
            lambda: client.program("q", idle_s=seconds), lambda: program.tool_started("t", seconds),
            lambda: workflow.run(idle_s=seconds), lambda: ns.expect(KEYS, seconds), lambda: ns.expect(KEYS, "now"),
        ]  # fmt: skip
        for attempt in attempts:
            with pytest.raises(UsageError):
                attempt()
        told(peer, 2)


# -- expectations ----------------------------------------------------------------------------------------------


def test_what_is_expected_is_a_word_or_a_time_or_nothing(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        for seconds in ("soon", "later", "hardly", 12.5, None):
            ns.expect(KEYS, seconds, source="router")
        told(peer, 5)
        assert [hint.expectation for hint in peer.hints] == [1, 2, 3, 0, 0]
        assert peer.hints[3].seconds == 12.5
        assert all(math.isnan(peer.hints[number].seconds) for number in (0, 1, 2, 4))
        assert {(hint.event, hint.name, hint.namespace, hint.keys) for hint in peer.hints} == {
            (Event.EXPECT, "router", NAMESPACE, JOINED)
        }


# -- workflows -------------------------------------------------------------------------------------------------


def test_a_run_of_a_workflow_is_told_with_growing_versions(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        with client.workflow("review", STEPS).run("r/1", idle_s=60) as run:
            assert run.name == "r/1"
            run.bind("plan", ns, KEYS)
            run.enter("plan")
            run.enter("search")
        assert told(peer, 6) == [
            (Event.WORKFLOW, "review", ""),
            (Event.RUN, "r/1", "review"),
            (Event.BIND, "r/1", "plan"),
            (Event.ENTER, "r/1", "plan"),
            (Event.ENTER, "r/1", "search"),
            (Event.RUN_FINISHED, "r/1", ""),
        ]
        assert peer.hints[1].seconds == 60
        versions = [hint.version for hint in peer.hints if hint.event in (Event.WORKFLOW, Event.BIND, Event.ENTER)]
        assert versions == sorted(set(versions))
        assert min(versions) > 0


def test_a_workflow_is_described_so_that_the_daemon_understands_it(tmp_path: Path) -> None:
    as_dicts: list[dict[str, object]] = [
        {"name": "plan", "next": ["search", "write"], "split": "one", "chances": [0.75, 0.25]},
        {"name": "search", "next": ("plan",), "join": "all"},
        {"name": "write"},
    ]
    with Peer(tmp_path) as peer, client_of(peer) as client:
        client.workflow("a", STEPS)
        client.workflow("b", as_dicts)
        told(peer, 2)
    first, second = (Graph.parse(hint.text.encode()) for hint in peer.hints)
    assert isinstance(first, Graph)
    assert isinstance(second, Graph)
    assert first.names == second.names == ("plan", "search", "write")
    assert first.after == second.after == ((1, 2), (0,), ())
    assert first.chances[0] == second.chances[0] == (0.75, 0.25)
    assert first.one_of == (True, False, False)
    assert json.loads(peer.hints[0].text) != json.loads(peer.hints[1].text)  # "join" of the second step


@pytest.mark.parametrize(
    "steps",
    [
        [], "plan", {"name": "plan"}, [7], [{"next": []}], [{"name": "a", "then": ["b"]}], [{"name": "a", "next": "a"}],
        [{"name": "a", "next": ["b"]}], [{"name": "a"}, {"name": "a"}], [Step("a", split="some")],  # type: ignore[arg-type]
        [Step("a", join="one")], [Step("a", ["a"], "one", chances=[math.nan])],  # type: ignore[arg-type]
        [{"name": "a", "next": [["a"]]}], [{"name": "a", "next": 5}], [{"name": "a", "chances": 5}], 5, [{5: 6}],
        [Step(f"{number:0128}") for number in range(HINT_TEXT_BYTES // 128)],
    ],
)  # fmt: skip
def test_what_describes_no_workflow_is_the_callers_mistake(tmp_path: Path, steps: list[Step]) -> None:
    with kvclient.connect(tmp_path) as client, pytest.raises(UsageError):
        client.workflow("w", steps)


def test_a_new_session_hears_of_workflow_and_run_before_their_steps(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        workflow = client.workflow("w", STEPS)
        first, second = workflow.run("1"), workflow.run("2")
        told(peer, 3)
        version = peer.hints[0].version
        forget_session(peer, client)
        first.enter("plan")
        second.enter("plan")
        first.enter("write")
        assert [(event, name) for event, name, _ in told(peer, 6)] == [
            (Event.WORKFLOW, "w"), (Event.RUN, "1"), (Event.ENTER, "1"),
            (Event.RUN, "2"), (Event.ENTER, "2"), (Event.ENTER, "1"),
        ]  # fmt: skip
        assert peer.hints[0].version == version  # it is not newer than what somebody else may have defined since


@pytest.mark.parametrize("lives", [True, False], ids=["the daemon lives on", "another daemon"])
def test_a_daemon_that_has_lived_on_goes_on_with_the_run(tmp_path: Path, *, lives: bool) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        run = client.workflow("w", STEPS).run("r")
        run.bind("plan", ns, KEYS)
        told(peer, 3)
        guide = Guide()
        hints = list(peer.hints)
        forget_session(peer, client)
        run.enter("search")
        told(peer, 3)
        hints += peer.hints
    for number, hint in enumerate(hints):
        if number == 3 and not lives:
            guide = Guide()
        heard = guide.hear(hint, number, lambda _: FREE)
        assert not isinstance(heard, Refused), (hint.event, heard)
    assert guide.workflows.bound_steps("r") == ((0,) if lives else ())
    assert len(guide.workflows.running("r")) == 1


def test_a_run_that_goes_on_after_its_end_is_a_new_one(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        run = client.workflow("w", STEPS).run("r")
        run.finished()
        run.enter("plan")
        told(peer, 5)
        first, second = (hint.version for hint in peer.hints if hint.event is Event.RUN)
    assert 0 < first < second, "or it would be taken for the old one where its end was not heard"


def test_a_run_that_another_client_began_is_not_begun_again(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        run = client.run("r")
        run.enter("plan")
        forget_session(peer, client)
        run.enter("write")
        assert told(peer, 1) == [(Event.ENTER, "r", "write")]


def test_runs_without_a_name_have_names_of_their_own(tmp_path: Path) -> None:
    with kvclient.connect(tmp_path) as client:
        workflow = client.workflow("w", STEPS)
        assert len({workflow.run().name for _ in range(10)}) == 10
        with pytest.raises(UsageError):
            workflow.run("")


def enter_often(run: kvclient.Run) -> None:
    for _ in range(50):
        run.enter("plan")


def test_words_of_many_threads_about_one_run_come_in_the_order_of_their_versions(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        run = client.workflow("w", STEPS).run("r")
        told(peer, 2)
        forget_session(peer, client)
        threads = [threading.Thread(target=enter_often, args=(run,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        sent = 202 - client.status.hints_dropped
        peer.wait_for(lambda: len(peer.hints) == sent)
        assert [hint.event for hint in peer.hints].count(Event.RUN) == 1
        versions = [hint.version for hint in peer.hints if hint.event is Event.ENTER]
        assert versions == sorted(versions)
        assert len(versions) > 1


# -- refusals --------------------------------------------------------------------------------------------------


def refuse(peer: Peer, text: str) -> None:
    peer.do(lambda: peer.send(frames.build_failure(Verb.REFUSED, 0, Code.BAD_ARGUMENT, text)))


def test_what_is_refused_is_kept_and_the_session_goes_on(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        assert client.refusals == []
        for number in range(REFUSALS_KEPT + 6):
            refuse(peer, f"'p{number}': no")
        assert client.ping() is not None
        assert client.refusals == [(Code.BAD_ARGUMENT, f"'p{number}': no") for number in range(6, REFUSALS_KEPT + 6)]
        assert (client.status.hints_refused, client.status.hints_dropped) == (REFUSALS_KEPT + 6, 0)
        forget_session(peer, client)
        assert len(client.refusals) == REFUSALS_KEPT  # of all sessions


def test_refusals_are_heard_by_a_client_that_only_speaks(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        client.program("p")
        refuse(peer, "no")
        wait_until(lambda: client.refusals)
        assert client.refusals == [(Code.BAD_ARGUMENT, "no")]


def test_refusals_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    with caplog.at_level(logging.WARNING, logger="kvclient"):
        refusals.log(5)
        assert not caplog.records
        refusals.note(Code.BAD_ARGUMENT, "'a': unknown")
        refusals.log(5)
        for _ in range(3):
            refusals.note(Code.BAD_ARGUMENT, "'b': unknown")
        refusals.log(4 + LOG_NS)
        assert len(caplog.records) == 1
        refusals.log(5 + LOG_NS)
        refusals.log(5 + 3 * LOG_NS)
    assert [record.getMessage() for record in caplog.records] == [
        "hints refused: new=1 total=1 last=\"'a': unknown\" code=BAD_ARGUMENT",
        "hints refused: new=3 total=4 last=\"'b': unknown\" code=BAD_ARGUMENT",
    ]
    assert LOG_NS == 60 * 10**9


def test_the_largest_words_fit_a_frame() -> None:
    name = "\U0001f600" * 128
    hint = Hint(Event.BIND, name, name, keys=bytes(KEY_BYTES * KEYS_PER_FRAME))
    assert len(policy_frames.build_hint(hint)) < 64 << 10
    text = Hint(Event.WORKFLOW, name, text="x" * HINT_TEXT_BYTES)
    assert len(policy_frames.build_hint(text)) < 64 << 10
