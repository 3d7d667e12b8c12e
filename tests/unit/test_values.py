"""The tree of chains follows what runs do in slices, and comes to where it would have come at once."""

import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.ids import BlockKey, NamespaceNumber
from kvproto.policy_frames import Event, Hint
from kvstore.hints import workflow
from kvstore.hints.chains import Chain, Chains
from kvstore.hints.graph import Graph
from kvstore.hints.guide import FREE, Guide
from kvstore.hints.refusal import Refused
from kvstore.hints.values import A_SLICE, AT_ONCE
from kvstore.hints.words import Say
from kvstore.hints.workflow import Workflows
from tests.core import chain, key_of

NAMESPACE = NamespaceNumber(1)
STEPS = 6
LOOP = json.dumps(
    {"steps": [*({"name": f"s{n}", "next": [f"s{(n + 1) % STEPS}", "end"], "split": "one"} for n in range(STEPS)),
               {"name": "end"}]}
)  # fmt: skip
LONG = AT_ONCE + 44  # blocks: no such chain moves while a frame is answered


class CountedChains(Chains):
    """A tree that notes how many blocks the chains have that move together."""

    __slots__ = ("moved",)

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[list[int]] = []

    def change(self, changes: list[tuple[int, int | None, int | None]]) -> None:  # type: ignore[override]
        """Note it, and go on."""
        self.moved.append([self.length(end) for end, _, _ in changes])  # type: ignore[arg-type]
        super().change(changes)  # type: ignore[arg-type]


def bound(length: int) -> tuple[Workflows, CountedChains]:
    """A run of which each step reads a chain of so many blocks; the tree has caught up."""
    graph, chains = Graph.parse(LOOP.encode()), CountedChains()
    assert isinstance(graph, Graph)
    workflows = Workflows(chains)
    workflows.define("w", graph, 1, 0)
    workflows.start("r", "w", 1, 0)
    for number in range(STEPS):
        keys = Chain.of(NAMESPACE, [BlockKey(key) for key in chain(length, f"c{number}")])
        assert workflows.bind("r", f"s{number}", keys, 1, 0) is None
    while workflows.unsettled:
        workflows.settle()
    chains.moved.clear()
    return workflows, chains


def worths(workflows: Workflows) -> list[int | None]:
    """Of the first blocks of what the steps read."""
    return [workflows.worth(NAMESPACE, BlockKey(chain(1, f"c{number}")[0])) for number in range(STEPS)]


@pytest.mark.parametrize(("length", "at_once"), [(LONG, False), (4, True)], ids=["long chains", "short ones"])
def test_what_moves_while_a_frame_is_answered_is_bounded_and_so_is_a_slice(length: int, *, at_once: bool) -> None:
    workflows, chains = bound(length)
    before = worths(workflows)
    assert not isinstance(workflows.advance("r", "s3", 2, 0), Refused)
    then = [3, 4, 5, 0, 1, 2]
    assert (worths(workflows) == then, workflows.unsettled) == (at_once, not at_once)
    assert sum(map(sum, chains.moved)) <= AT_ONCE
    assert at_once or worths(workflows) == before
    assert [soon.step for soon in workflows.soon()] == ["s3", "s4"], "what is to be fetched is known at once"
    while workflows.unsettled:
        chains.moved.clear()
        workflows.settle()
        assert 0 < sum(map(sum, chains.moved)) <= A_SLICE
    assert worths(workflows) == then


def test_steps_that_move_again_before_the_tree_has_followed_move_once() -> None:
    workflows, chains = bound(LONG)
    for version in range(2, 500):
        workflows.advance("r", f"s{version % STEPS}", version, 0)
    workflows.advance("r", "s3", 500, 0)
    while workflows.unsettled:
        workflows.settle()
    assert sum(map(len, chains.moved)) == STEPS
    assert worths(workflows) == [3, 4, 5, 0, 1, 2]


def test_the_chains_of_a_run_that_is_over_go_in_slices_too() -> None:
    workflows, chains = bound(LONG)
    workflows.advance("r", "s3", 2, 0)
    workflows.end("r")
    assert chains.ends == STEPS
    assert len(workflows) == 0
    slices = 0
    while workflows.unsettled:
        workflows.settle()
        slices += 1
    assert slices > 1
    assert (chains.ends, chains.blocks) == (0, 0)


def test_words_are_said_by_where_a_run_is_now() -> None:
    def said(length: int) -> list[bytes]:
        guide = Guide()
        hints = [Hint(Event.WORKFLOW, "w", text=LOOP, version=1), Hint(Event.RUN, "r", other="w", version=1)]
        for number in range(STEPS):
            keys = b"".join(chain(length, f"c{number}"))
            hints.append(Hint(Event.BIND, "r", f"s{number}", version=1, namespace=NAMESPACE, keys=keys))
        for hint in (*hints, Hint(Event.ENTER, "r", "s3", version=2)):
            assert not isinstance(guide.hear(hint, 0, lambda _: FREE), Refused)
        deeds = []
        while guide.next_ns() == 0:
            deeds.append(guide.errand(0))
        return [deed.levels[:1] for deed in deeds if isinstance(deed, Say)]

    assert said(LONG) == said(4)
    assert len(set(said(4))) > 2, "the control"


PATHS = st.text("ab", min_size=1, max_size=4)
MOVES = st.lists(
    st.tuples(st.sampled_from(["start", "enter", "bind", "bind", "end", "settle"]), st.sampled_from("xy"),
              st.integers(0, STEPS - 1), PATHS), max_size=60,
)  # fmt: skip


def after(moves: list[tuple[str, str, int, str]], at_once: int) -> dict[str, int | None]:
    """What all blocks are worth in the end, where so many blocks may move at once; and how large the tree is."""
    graph, chains = Graph.parse(LOOP.encode()), Chains()
    assert isinstance(graph, Graph)
    workflows = Workflows(chains)
    workflows.define("w", graph, 1, 0)
    with mock.patch.object(workflow, "AT_ONCE", at_once), mock.patch.object(workflow, "A_SLICE", 1):
        for version, (verb, run, step, path) in enumerate(moves):
            if verb == "start":
                workflows.start(run, "w", version, 0)
            elif verb == "enter":
                workflows.advance(run, f"s{step}", version, 0)
            elif verb == "bind":
                keys = [BlockKey(key_of(path[: n + 1])) for n in range(len(path))]
                workflows.bind(run, f"s{step}", Chain.of(NAMESPACE, keys), version, 0)
            elif verb == "end":
                workflows.end(run)
            elif workflows.unsettled:
                workflows.settle()
        while workflows.unsettled:
            workflows.settle()
    blocks = {path[: n + 1] for _, _, _, path in moves for n in range(len(path))}
    worth = {block: workflows.worth(NAMESPACE, BlockKey(key_of(block))) for block in blocks}
    return worth | {"ends": chains.ends, "blocks": chains.blocks}


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(moves=MOVES)
def test_wherever_the_tree_lags_behind_it_comes_to_the_same(moves: list[tuple[str, str, int, str]]) -> None:
    assert after(moves, at_once=-1) == after(moves, at_once=1 << 30)
