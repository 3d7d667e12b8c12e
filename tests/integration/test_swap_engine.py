"""The example engine of `bench swap`: whatever becomes of a paused context, its request says the same tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

import kvclient
from bench import swap
from bench.process import DaemonProcess
from bench.swap import QUICK, Link, PacedWay, figures_of, script_of
from bench.swap_engine import Engine, Policy, Request, Script, Tally
from bench.swap_model import PagedModel
from kvclient.copying import Gate
from kvclient.results import StoreResult

SMALL = replace(
    QUICK, requests=3, pool_pages=32, prompt_tokens=(48, 100), turns=(2, 2), generate_tokens=(3, 6),
    answer_tokens=(17, 30), short_s=0.05, long_s=0.2,
)  # fmt: skip
LONG_S = 0.5
TIGHT = replace(SMALL, pool_pages=12)  # not even two contexts find room at a time


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvclient.Client]:
    folder = tmp_path_factory.mktemp("daemon")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    arguments = ("--dram", "256MiB", "--arena", "16MiB", "--lock", "false")
    with (
        DaemonProcess(folder / "run", *arguments, log_file=folder / "log") as process,
        kvclient.connect(process.runtime_dir, timeout_s=10.0) as made,
    ):
        assert made.wait_connected(30.0)
        yield made
    torch.set_num_threads(threads)


@pytest.fixture
def slow_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tool answers before what it was swapped out for is out, however slow this machine is."""
    real = Engine._take_back

    def take_back(self: Engine, now_s: float) -> None:
        for request in [each for each in self._paused if each.out is not None]:
            assert request.out is not None
            request.out.result(30.0)
            self._end_out(request)
        real(self, now_s)

    monkeypatch.setattr(Engine, "_take_back", take_back)


@pytest.fixture(scope="module")
def link(client: kvclient.Client) -> Link:
    made = Link(client, PagedModel(SMALL.pool_pages))
    made.warm_up(128)
    return made


@pytest.fixture(scope="module")
def scripts() -> list[Script]:
    return script_of(SMALL, 3)


def said(requests: Sequence[Request]) -> list[list[int]]:
    return [request.output for request in requests]


def served(
    link: Link, scripts: Sequence[Script], policy: Policy, scale: swap.Scale = SMALL
) -> tuple[list[list[int]], Tally]:
    requests, tally, seconds = link.serve(scripts, policy, scale.pool_pages)
    assert all(figure >= 0 for figure in figures_of(requests, tally, seconds, scale).values())
    return said(requests), tally


@pytest.fixture(scope="module")
def wanted(link: Link, scripts: list[Script]) -> list[list[int]]:
    tokens, tally = served(link, scripts, Policy.PRESERVE)
    assert tally.swaps == tally.discards == 0
    assert len({*map(tuple, tokens)}) == len(tokens), "the control: different requests say different things"
    return tokens


@pytest.mark.usefixtures("slow_tools")
@pytest.mark.parametrize("policy", [Policy.SWAP, Policy.DISCARD, Policy.ADAPTIVE])
def test_tokens_are_the_same_whatever_becomes_of_paused_contexts(
    link: Link, scripts: list[Script], wanted: list[list[int]], policy: Policy
) -> None:
    tokens, tally = served(link, scripts, policy)
    assert tokens == wanted
    if policy is Policy.SWAP:
        assert tally.swaps == sum(len(script.turns) - 1 for script in scripts)
        assert tally.swapped_in_bytes > 0
    if policy is Policy.DISCARD:
        assert tally.recomputed_tokens > 0
        assert tally.swaps == 0


@pytest.mark.usefixtures("slow_tools")
def test_tokens_are_the_same_where_contexts_give_way_to_each_other(
    link: Link, scripts: list[Script], wanted: list[list[int]]
) -> None:
    crowded = [
        # All are there at once, and no tool answers before the next one has had its turn.
        replace(
            script,
            arrival_s=number / 1e6,
            turns=tuple(replace(turn, gap_s=LONG_S * bool(turn.answer)) for turn in script.turns),
        )
        for number, script in enumerate(scripts)
    ]
    tokens, tally = served(link, crowded, Policy.PRESERVE, TIGHT)
    assert tally.evictions > 0
    assert tokens == wanted
    assert served(link, crowded, Policy.SWAP, TIGHT)[0] == wanted


@pytest.mark.usefixtures("slow_tools")
def test_other_bytes_than_those_that_were_swapped_out_would_be_heard(
    client: kvclient.Client, scripts: list[Script], wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PagedModel(SMALL.pool_pages)
    real = PacedWay.save

    def damaged(
        self: PacedWay, keys: Sequence[bytes], ids: Sequence[int], parent: bytes | None, gate: Gate
    ) -> StoreResult:
        for layer in model.layers:
            layer[list(ids)] = 0.0
        return real(self, keys, ids, parent, gate)

    monkeypatch.setattr(PacedWay, "save", damaged)
    link = Link(client, model, bytes_per_s=1e9)
    requests, tally, _ = link.serve(scripts, Policy.SWAP, SMALL.pool_pages)
    assert tally.swapped_in_bytes > 0
    assert said(requests) != wanted
