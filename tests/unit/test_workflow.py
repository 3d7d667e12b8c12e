"""Step graphs and the worth of blocks against plain definitions of both."""

import hashlib
import json
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.ids import BlockKey, NamespaceNumber
from kvstore.hints.chains import Chain, Chains
from kvstore.hints.graph import START, Graph, Step, Which, steps_to_execution
from kvstore.hints.limits import GRAPH_EDGES, GRAPH_STEPS, HOUR_S, RUNS, SECOND_NS, WORKFLOW_TTL_S, WORKFLOWS
from kvstore.hints.progress import Progress
from kvstore.hints.refusal import Refusal, Refused
from kvstore.hints.workflow import Soon, Workflows

HOUR_NS = HOUR_S * SECOND_NS
NAMESPACE = NamespaceNumber(3)
OTHER = NamespaceNumber(4)
BAD_TIMES = [0.0, -1.0, 1e300, float("nan"), float("inf"), 25.0 * HOUR_S]


def key(name: str) -> BlockKey:
    return BlockKey(hashlib.sha256(name.encode()).digest())


def chain(path: str, namespace: NamespaceNumber = NAMESPACE) -> Chain:
    """A block for each letter, named by all letters up to it: paths that begin alike share blocks."""
    return Chain.of(namespace, [key(path[: n + 1]) for n in range(len(path))])


def graph(*steps: Step) -> Graph:
    made = Graph.of(steps)
    assert isinstance(made, Graph), made
    return made


def choose(name: str, *targets: str, chances: tuple[float, ...] = ()) -> Step:
    return Step(name, targets, split=Which.ONE, chances=chances)


PLAN = graph(
    Step("plan", ("search", "read")),
    Step("search", ("write",)),
    Step("read", ("write",)),
    Step("write", ("check",), join=Which.ALL),
    choose("check", "plan", "done", chances=(0.25, 0.75)),
    Step("done"),
)


def worths(progress: Progress) -> dict[str, int | None]:
    return dict(zip(progress.graph.names, progress.steps, strict=True))


def entered(progress: Progress, name: str) -> dict[str, int | None]:
    number = progress.graph.number(name)
    assert number is not None
    progress.enter(number)
    return worths(progress)


# -- steps to execution ---------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any sound graph of up to twelve steps: those that are not are drawn again."""
    names = [f"s{n}" for n in range(draw(st.integers(1, 12)))]
    some = st.lists(st.sampled_from(names), max_size=3, unique=True)
    steps = [
        Step(name, tuple(draw(some)), draw(st.sampled_from([Which.ALL, Which.ONE])), join)
        for name in names
        for join in [draw(st.sampled_from([Which.ALL, Which.ANY]))]
    ]
    made = Graph.of(steps)
    if isinstance(made, Refused):  # what made it endless goes
        made = Graph.of([Step(s.name, tuple(t for t in s.next if t > s.name), s.split, s.join) for s in steps])
    assert isinstance(made, Graph)
    return made


def by_definition(graph: Graph, running: Collection[int], passed: Collection[tuple[int, int]]) -> list[int | None]:
    """E from infinity downwards until nothing changes any more."""
    far = 10**6
    steps = [0 if n in running else far for n in range(len(graph.names))]
    for _ in range(2 * len(steps) + 2):
        for n, before in enumerate(graph.before):
            each = [0 if (p, n) in passed else steps[p] for p in before]
            if (START, n) in passed:
                each = [0]
            if n not in running and each:
                steps[n] = min((max if graph.joins_all(n) else min)(each) + 1, far)
    return [None if n == far else n for n in steps]


@settings(derandomize=True, database=None, deadline=None, max_examples=80)
@given(graph=graphs(), draws=st.data())
def test_steps_to_execution_are_what_the_definition_says(graph: Graph, draws: st.DataObject) -> None:
    numbers = st.integers(0, len(graph.names) - 1)
    running = set(draws.draw(st.lists(numbers, max_size=3)))
    edges = [(s, t) for s, targets in enumerate(graph.after) for t in targets] + [(START, s) for s in graph.starts]
    passed = set(draws.draw(st.lists(st.sampled_from(edges), max_size=3))) if edges else set()
    assert steps_to_execution(graph, running, passed) == by_definition(graph, running, passed)


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(graph=graphs(), walk=st.lists(st.integers(0, 11), max_size=12))
def test_after_any_walk_the_last_step_runs_and_all_others_follow_the_definition(graph: Graph, walk: list[int]) -> None:
    progress = Progress(graph)
    for step in walk:
        progress.enter(step % len(graph.names))
        assert progress.steps[step % len(graph.names)] == 0
        assert progress.steps == by_definition(graph, progress._running, progress._passed)
        assert progress._passed <= {(START, s) for s in graph.starts} | {
            (s, t) for s, targets in enumerate(graph.after) for t in targets
        }


def test_a_join_of_all_is_as_far_as_its_farthest_and_a_join_of_any_as_its_nearest() -> None:
    steps = [Step("a", ("b", "end")), Step("b", ("c",)), Step("c", ("end",))]
    assert worths(Progress(graph(*steps, Step("end", join=Which.ALL)))) == {"a": 1, "b": 2, "c": 3, "end": 4}
    assert worths(Progress(graph(*steps, Step("end", join=Which.ANY)))) == {"a": 1, "b": 2, "c": 3, "end": 2}


def test_a_run_goes_through_forks_joins_and_loops() -> None:
    progress = Progress(PLAN)
    assert worths(progress) == {"plan": 1, "search": 2, "read": 2, "write": 3, "check": 4, "done": 5}
    assert entered(progress, "plan") == {"plan": 0, "search": 1, "read": 1, "write": 2, "check": 3, "done": 4}
    assert entered(progress, "search") == {"plan": 4, "search": 0, "read": 1, "write": 2, "check": 3, "done": 4}
    assert entered(progress, "read") == {"plan": 3, "search": 0, "read": 0, "write": 1, "check": 2, "done": 3}
    assert entered(progress, "write") == {"plan": 2, "search": 3, "read": 3, "write": 0, "check": 1, "done": 2}
    assert entered(progress, "check") == {"plan": 1, "search": 2, "read": 2, "write": 3, "check": 0, "done": 1}
    assert entered(progress, "plan")["check"] == 3, "once more"
    for name in ("search", "read", "write", "check"):
        entered(progress, name)
    assert set(entered(progress, "done").values()) == {0, None}, "nothing is reached any more"


def test_a_branch_that_was_not_taken_is_out_of_reach_and_a_fork_is_not() -> None:
    for split, left in ((Which.ONE, None), (Which.ALL, 1)):
        progress = Progress(graph(Step("a", ("b", "c"), split), Step("b"), Step("c")))
        assert entered(progress, "a") == {"a": 0, "b": 1, "c": 1}
        assert entered(progress, "b") == {"a": None, "b": 0, "c": left}


def test_of_steps_that_nobody_told_of_those_on_the_way_are_over() -> None:
    progress = Progress(PLAN)
    entered(progress, "plan")
    entered(progress, "search")
    assert entered(progress, "check") == {"plan": 1, "search": 2, "read": 2, "write": 3, "check": 0, "done": 1}
    late = Progress(PLAN)
    assert entered(late, "write") == {"plan": 2, "search": 3, "read": 3, "write": 0, "check": 1, "done": 2}


def test_the_chance_of_a_step_is_that_of_the_branch_to_it() -> None:
    progress = Progress(PLAN)
    assert progress.chance(0) == 1
    entered(progress, "plan")
    assert (progress.chance(1), progress.chance(2)) == (1, 1), "both follow"
    entered(progress, "check")
    assert (progress.chance(0), progress.chance(5)) == (0.25, 0.75)
    even = Progress(graph(choose("a", "b", "c"), Step("b"), Step("c")))
    entered(even, "a")
    assert even.chance(1) == 0.5


# -- descriptions ---------------------------------------------------------------------------------------------------


def parsed(*steps: object) -> Graph | Refused:
    return Graph.parse(json.dumps({"steps": steps}).encode())


def test_a_description_in_json_is_the_graph_it_describes() -> None:
    made = parsed(
        {"name": "plan", "next": ["search", "read"]},
        {"name": "search", "next": ["write"]},
        {"name": "read", "next": ["write"]},
        {"name": "write", "next": ["check"], "join": "all"},
        {"name": "check", "next": ["plan", "done"], "split": "one", "chances": [0.25, 0.75]},
        {"name": "done"},
    )
    assert made == PLAN
    assert made != parsed({"name": "plan"})


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (b"", Refusal.FORM),
        (b"\xff", Refusal.FORM),
        (b"[" * 60_000, Refusal.FORM),
        (b"[]", Refusal.FORM),
        (b"{}", Refusal.FORM),
        (b'{"steps": []}', Refusal.FORM),
        (b'{"steps": [7]}', Refusal.FORM),
        (b'{"steps": [{}]}', Refusal.FORM),
        (b'{"steps": [{"name": 7}]}', Refusal.FORM),
        (b'{"steps": [{"name": "a", "next": "a"}]}', Refusal.FORM),
        (b'{"steps": [{"name": "a", "next": [7]}]}', Refusal.FORM),
        (b'{"steps": [{"name": "a", "split": "any"}]}', Refusal.FORM),
        (b'{"steps": [{"name": "a", "join": ["all"]}]}', Refusal.FORM),
        (b'{"steps": [{"name": ""}]}', Refusal.NAME),
        (b'{"steps": [{"name": "\\ud800"}]}', Refusal.NAME),
        (b'{"steps": [{"name": "a", "next": ["\\ud800"]}]}', Refusal.UNKNOWN),
        (b'{"steps": [{"name": "a", "chances": [true]}]}', Refusal.CHANCE),
        (b'{"steps": [{"name": "' + b"x" * (64 << 10) + b'"}]}', Refusal.LARGE),
    ],
)
def test_what_is_no_description_is_refused(text: bytes, refusal: Refusal) -> None:
    made = Graph.parse(text)
    assert isinstance(made, Refused)
    assert made.refusal is refusal
    assert made.what.isascii()


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        ([Step("a", ("b",))], Refused(Refusal.UNKNOWN, "b")),
        ([Step("a"), Step("a")], Refused(Refusal.TWICE, "a")),
        ([Step("a", ("b", "b")), Step("b")], Refused(Refusal.TWICE, "a")),
        ([Step("a", ("a",))], Refused(Refusal.ENDLESS, "a")),
        ([Step("a", ("b",)), choose("b", "a")], Refused(Refusal.ENDLESS, "a")),
        ([choose("a", "b", "a"), choose("b", "a", "b")], Refused(Refusal.ENDLESS, "a")),
        ([Step("a", ("a", "b")), Step("b")], Refused(Refusal.ENDLESS, "a")),
        ([Step("a", ("a", "b")), choose("b", "a", "c"), Step("c")], Refused(Refusal.ENDLESS, "a")),
        ([choose("a", "b", "c", chances=(0.5,)), Step("b"), Step("c")], Refused(Refusal.CHANCE, "a")),
        ([choose("a", "b", "c", chances=(1.0, 0.0)), Step("b"), Step("c")], Refused(Refusal.CHANCE, "a")),
        ([choose("a", "b", "c", chances=(0.9, 0.9)), Step("b"), Step("c")], Refused(Refusal.CHANCE, "a")),
        ([choose("a", "b", "c", chances=(float("nan"), 1.0)), Step("b"), Step("c")], Refused(Refusal.CHANCE, "a")),
        ([Step("a", ("b",), chances=(1.0,)), Step("b")], Refused(Refusal.CHANCE, "a")),
        ([Step(str(n)) for n in range(GRAPH_STEPS + 1)], Refused(Refusal.LARGE)),
        ([Step(str(n), tuple(map(str, range(n))), Which.ONE) for n in range(50)], Refused(Refusal.LARGE)),
        ([], Refused(Refusal.FORM)),
    ],
)
def test_a_graph_that_is_not_sound_is_refused(steps: list[Step], refused: Refused) -> None:
    assert Graph.of(steps) == refused


def test_a_loop_with_an_exit_is_sound_wherever_the_exit_is() -> None:
    for last in (choose("c", "a", "end"), Step("c", ("a",))):
        middle = choose("b", "c", "end") if last.split is Which.ALL else Step("b", ("c",))
        assert isinstance(Graph.of([Step("a", ("b",)), middle, last, Step("end")]), Graph)
    assert isinstance(Graph.of([choose("a", "a", "end"), Step("end")]), Graph)
    assert GRAPH_EDGES >= 45 * 44 // 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "next", "split", "join", "chances"]) | st.text(max_size=2), inner)
    ),
    max_leaves=12,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(steps=JSON, noise=st.binary(max_size=20))
def test_nothing_that_is_sent_raises(steps: object, noise: bytes) -> None:
    Graph.parse(noise)
    Graph.parse(json.dumps(steps).encode())
    Graph.parse(json.dumps({"steps": steps}).encode())
    Graph.parse(json.dumps({"steps": [steps, {"name": "a", "next": steps, "chances": steps, "split": "one"}]}).encode())


PATHS = st.text("ab", min_size=1, max_size=6)


# -- runs -----------------------------------------------------------------------------------------------------------


def running(*runs: str) -> Workflows:
    workflows = Workflows(Chains())
    assert workflows.define("w", PLAN, 1, 0) is None
    for run in runs:
        assert workflows.start(run, "w", 1, 0) is True
    return workflows


def worth(workflows: Workflows, *paths: str) -> list[int | None]:
    return [workflows.worth(NAMESPACE, key(path)) for path in paths]


def test_a_shared_prefix_is_worth_what_the_nearest_step_of_any_run_is() -> None:
    workflows = running("one", "two")
    workflows.bind("one", "plan", chain("sp"), 1, 0)
    workflows.bind("one", "write", chain("sw"), 1, 0)
    workflows.bind("two", "done", chain("sd"), 1, 0)
    assert worth(workflows, "s", "sp", "sw", "sd", "x") == [1, 1, 3, 5, None]
    workflows.enter("one", "write", 1, 0)
    assert worth(workflows, "s", "sp", "sw", "sd") == [0, 2, 0, 5]
    workflows.enter("two", "check", 1, 0)
    assert worth(workflows, "s", "sp", "sw", "sd") == [0, 2, 0, 1]
    assert workflows.end("one") is None
    assert worth(workflows, "s", "sp", "sw", "sd") == [1, None, None, 1]
    workflows.end("two")
    assert worth(workflows, "s", "sd") == [None, None]


def test_a_step_that_is_bound_anew_reads_the_new_chain_only() -> None:
    workflows = running("run")
    assert workflows.bind("run", "plan", chain("ab"), 1, 0) is None
    assert workflows.bind("run", "plan", chain("abcd"), 2, 0) is None
    assert worth(workflows, "ab", "abcd") == [1, 1]
    assert workflows.bind("run", "plan", chain("ax"), 3, 0) is None
    assert worth(workflows, "a", "ab", "ax") == [1, None, 1]


def test_an_older_version_is_refused_by_step_and_by_run() -> None:
    workflows = running("run")
    assert workflows.bind("run", "plan", chain("new"), 5, 0) is None
    assert workflows.bind("run", "plan", chain("old"), 5, 0) == Refused(Refusal.OLD, "plan")
    assert workflows.bind("run", "write", chain("w"), 1, 0) is None, "nothing is known of this one"
    assert worth(workflows, "new", "old", "w") == [1, None, 3]
    assert not isinstance(workflows.enter("run", "write", 2, 0), Refused)
    assert workflows.enter("run", "plan", 1, 0) == Refused(Refusal.OLD, "run")
    assert worth(workflows, "w", "new") == [0, 2]
    assert workflows.define("w", graph(Step("only")), 1, 0) == Refused(Refusal.OLD, "w")
    assert workflows.define("w", graph(Step("only")), 2, 0) is None
    assert not isinstance(workflows.enter("run", "plan", 3, 0), Refused), "a run keeps the graph it began with"
    workflows.start("new", "w", 1, 0)
    assert workflows.enter("new", "plan", 1, 0) == Refused(Refusal.UNKNOWN, "plan")


def test_what_is_said_again_by_who_cannot_know_that_it_was_heard_changes_nothing() -> None:
    workflows = running("run")
    workflows.bind("run", "plan", chain("p"), 1, 0)
    workflows.enter("run", "plan", 1, 0)
    for version in (1, 0):
        assert workflows.define("w", PLAN, version, HOUR_NS - 1) is None, "it says what is so"
        assert workflows.define("w", graph(Step("only")), version, 0) == Refused(Refusal.OLD, "w")
    assert workflows.start("run", "w", 1, HOUR_NS - 1) is False
    assert worth(workflows, "p") == [0]
    assert workflows.running("run") == {PLAN.number("plan")}
    workflows.due(HOUR_NS)
    assert len(workflows) == 1, "it was heard of"
    assert workflows.start("run", "w", 0, 0) == Refused(Refusal.OLD, "run"), "a later one has taken its place"
    workflows.define("v", PLAN, 1, 0)
    assert workflows.start("run", "v", 1, 0) == Refused(Refusal.OLD, "run"), "it is another one"
    assert worth(workflows, "p") == [0]
    assert workflows.start("run", "w", 2, 0) is True
    assert worth(workflows, "p") == [None]
    workflows.end("run")
    assert workflows.start("run", "w", 1, 0) is True, "nothing is known of what is over"


def test_what_is_within_a_step_is_to_be_fetched_the_nearest_and_likeliest_first() -> None:
    workflows = running("run", "other")
    for name in PLAN.names:
        workflows.bind("run", name, chain(name), 1, 0)
    workflows.bind("other", "plan", chain("other"), 1, 0)
    soon = workflows.enter("run", "check", 1, 0)
    wanted = (
        Soon("run", "check", chain("check"), 0, 1.0),
        Soon("run", "done", chain("done"), 1, 0.75),
        Soon("run", "plan", chain("plan"), 1, 0.25),
    )
    assert soon == wanted
    assert workflows.soon() == (wanted[0], Soon("other", "plan", chain("other"), 1, 1.0), *wanted[1:])
    assert workflows.soon(most=1) == wanted[:1]
    assert workflows.soon(most=-1) == ()


def test_a_run_that_nothing_is_heard_of_is_over() -> None:
    workflows = running("silent", "heard")
    workflows.bind("silent", "plan", chain("s"), 1, 0)
    workflows.bind("heard", "plan", chain("h"), 1, HOUR_NS // 2)
    assert workflows.next_ns() == HOUR_NS
    workflows.due(HOUR_NS - 1)
    assert worth(workflows, "s", "h") == [1, 1]
    workflows.due(HOUR_NS)
    assert worth(workflows, "s", "h") == [None, 1]
    assert workflows.enter("silent", "plan", 1, HOUR_NS) == Refused(Refusal.UNKNOWN, "silent")
    workflows.due(2 * HOUR_NS)
    assert (len(workflows), workflows.next_ns(), worth(workflows, "h")) == (0, None, [None])


def test_a_workflow_that_is_not_used_is_forgotten_and_too_many_oust_the_longest_unused() -> None:
    workflows = running()
    for number in range(WORKFLOWS - 1):
        assert workflows.define(f"more {number}", PLAN, 1, 1) is None
    assert workflows.start("run", "w", 1, 2) is True
    assert workflows.define("too many", PLAN, 1, 3) is None
    assert workflows.start("run", "more 0", 1, 3) == Refused(Refusal.UNKNOWN, "more 0")
    assert workflows.start("run", "w", 2, 3) is True
    workflows.due(WORKFLOW_TTL_S * SECOND_NS + 1)
    assert workflows.start("run", "more 1", 1, 3) == Refused(Refusal.UNKNOWN, "more 1")
    assert workflows.start("run", "w", 3, 3) is True


@pytest.mark.parametrize("again", ["nothing", "workflow", "run"])
def test_what_is_said_again_is_used(again: str) -> None:
    workflows = running("run")
    for number in range(WORKFLOWS - 1):
        assert workflows.define(f"more {number}", PLAN, 1, 1) is None
    if again == "workflow":
        assert workflows.define("w", PLAN, 1, 2) is None
    elif again == "run":
        assert workflows.start("run", "w", 1, 2) is False
    workflows.define("too many", PLAN, 1, 3)
    names = {each.workflow for each in workflows.standings()}
    assert ("w" in names, "more 0" in names) == ((False, True) if again == "nothing" else (True, False))


def test_hints_about_what_is_not_known_are_refused() -> None:
    workflows = running("run")
    for run, step, what in (("who", "plan", "who"), ("run", "what", "what"), ("\ud800", "plan", "\\ud800")):
        assert workflows.enter(run, step, 1, 0) == Refused(Refusal.UNKNOWN, what)
        assert workflows.bind(run, step, chain("a"), 1, 0) == Refused(Refusal.UNKNOWN, what)
    assert workflows.start("new", "who", 1, 0) == Refused(Refusal.UNKNOWN, "who")
    assert workflows.end("who") == Refused(Refusal.UNKNOWN, "who")
    assert workflows.start("", "w", 1, 0) == Refused(Refusal.NAME)
    assert workflows.define("a\nb", PLAN, 1, 0) == Refused(Refusal.NAME, "a\\nb")
    assert workflows.bind("run", "plan", Chain(NAMESPACE, b"short"), 1, 0) == Refused(Refusal.FORM, "plan")
    assert not isinstance(workflows.enter("run", "plan", 1, 0), Refused)


@pytest.mark.parametrize("seconds", BAD_TIMES)
def test_a_patience_that_is_none_is_refused(seconds: float) -> None:
    workflows = running()
    assert workflows.start("run", "w", 1, 0, ttl_s=seconds) == Refused(Refusal.TIME, "run")
    assert len(workflows) == 0


def test_a_million_runs_are_refused_until_others_are_over() -> None:
    workflows = running(*map(str, range(RUNS)))
    assert workflows.start("more", "w", 1, 0) == Refused(Refusal.FULL, "more")
    assert workflows.start("7", "w", 2, 0) is True, "it takes the place of the one of that name"
    workflows.due(HOUR_NS)
    assert workflows.start("more", "w", 1, HOUR_NS) is True


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["start", "enter", "bind", "bind", "end"]), st.sampled_from("xy"),
                  st.sampled_from(PLAN.names), PATHS), max_size=40,
    )
)  # fmt: skip
def test_the_worth_of_a_block_is_the_nearest_bound_step_of_all_runs(moves: list[tuple[str, str, str, str]]) -> None:
    workflows, bound = running("x", "y"), dict[tuple[str, str], str]()
    progress = {"x": Progress(PLAN), "y": Progress(PLAN)}
    for version, (verb, run, step, path) in enumerate(moves):
        if verb in ("start", "end"):
            assert workflows.start(run, "w", version + 2, 0) is True
            progress[run] = Progress(PLAN)
            bound = {at: path for at, path in bound.items() if at[0] != run}
        elif verb == "enter":
            assert not isinstance(workflows.enter(run, step, version, 0), Refused)
            entered(progress[run], step)
        else:
            assert workflows.bind(run, step, chain(path), version, 0) is None
            bound[run, step] = path
        for block in {each[: n + 1] for each in bound.values() for n in range(len(each))} | {"a"}:
            through = [worths(progress[of])[at] for (of, at), other in bound.items() if other.startswith(block)]
            known = [steps for steps in through if steps is not None]
            assert worth(workflows, block) == [min(known, default=None)]
