"""Requests of vLLM that are held, aborted, unknown, or not worth loading; with a real daemon and plain tensors."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient.integrations.trials import TRIED_ANYWAY
from kvclient.integrations.vllm_settings import Settings
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from tests.integration.vllm_halves import BLOCKS, TOKENS, Engine, again, patient, request_of
from tests.node import until

BESIDE = patient(at_once_mib=0.0)


def made(daemon: DaemonProcess, settings: Settings, name: str) -> Iterator[Engine]:
    """An engine that shares nothing with other tests."""
    engine = Engine(daemon.runtime_dir, settings, name=name)
    yield engine
    engine.stop()


@pytest.fixture
def engine(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Loads before the forward."""
    yield from made(daemon, patient(), request.node.name)


@pytest.fixture
def beside(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Loads beside the forward."""
    yield from made(daemon, BESIDE, request.node.name)


# -- held ------------------------------------------------------------------------------------------------------------


def finish(engine: Engine, name: str, block_ids: list[int], hold_s: float = 30.0) -> bool:
    """A request is over and wishes its blocks held; whether vLLM must keep it, too."""
    request = request_of(name, len(block_ids) - 1, params={"kvstored": {"hold_s": hold_s, "store": False}})
    engine.scheduler.on_new_request(request)
    request.num_computed_tokens = request.num_tokens
    return engine.scheduler.finished(request, block_ids)


def test_a_request_that_holds_its_blocks_is_over_for_the_engine(engine: Engine) -> None:
    assert not finish(engine, "a", [0, 1, 2, 3])
    assert not engine.scheduler._known
    assert engine.held == Counter([0, 1, 2, 3])
    assert not engine.scheduler.plan({}, lambda _: []).closing
    assert engine.held == Counter([0, 1, 2, 3])
    engine.scheduler.reset()
    assert not engine.held
    assert not finish(engine, "b", [0, 1, 2, 3], hold_s=1e-9)
    engine.scheduler.plan({}, lambda _: [])
    assert not engine.held, "its time is over"


def test_a_request_that_does_not_fit_beside_what_is_held_is_made_room_for(engine: Engine) -> None:
    finish(engine, "a", [0, 1, 2, 3])
    fits, large = request_of("fits", 10), request_of("large", BLOCKS - 6)
    for request, held in ((fits, 4), (large, 0)):
        engine.scheduler.on_new_request(request)
        assert engine.scheduler.matched(request, 0) == (0, False)
        assert len(engine.held) == held


def test_a_loaded_request_that_finds_no_memory_is_made_room_for(beside: Engine) -> None:
    request = request_of("a", 4)
    beside.save(request, [0, 1, 2, 3, 4])
    finish(beside, "held", [5, 6, 7])
    other = again(request, "b")
    beside.scheduler.on_new_request(other)
    tokens, _ = beside.scheduler.matched(other, 0)
    assert tokens
    beside.scheduler.allocated(other, [10, 11, 12, 13, 14], tokens)
    beside.step({}, {})
    assert until(lambda: "b" in beside.listen())
    assert len(beside.held) == 3, "the control: nobody has waited for memory yet"
    beside.step({}, {})  # vLLM could have run it, and has not
    assert not beside.held


@pytest.mark.parametrize("held", [False, True])
def test_blocks_that_are_being_saved_need_not_stay_while_they_are_held(engine: Engine, held: bool) -> None:
    request = request_of("a", 2, params={"kvstored": {"hold_s": 30.0}} if held else None)
    engine.scheduler.on_new_request(request)
    request.num_computed_tokens = request.num_tokens
    assert engine.scheduler.finished(request, [0, 1, 2]) is not held
    (job,) = engine.step({}, {}).saves
    assert engine.scheduler.plan({"stranger": 5}, {"stranger": [1]}.__getitem__).fences == {job.number}


# -- others ----------------------------------------------------------------------------------------------------------


def test_what_a_request_writes_of_which_nothing_is_known_is_withdrawn_from_saves(engine: Engine) -> None:
    request = request_of("a", 4)
    engine.scheduler.on_new_request(request)
    request.num_computed_tokens = request.num_tokens
    blocks = {"a": [0, 1, 2, 3, 4], "stranger": [9, 2], "other stranger": [9, 8]}
    (job,) = engine.scheduler.plan({"a": 1}, blocks.__getitem__).saves
    assert engine.scheduler.plan({"other stranger": 5}, blocks.__getitem__).fences == set()
    assert engine.scheduler.plan({"stranger": 5}, blocks.__getitem__).fences == {job.number}


def test_a_turn_that_is_aborted_while_it_loads_is_over(daemon: DaemonProcess, beside: Engine) -> None:
    request = request_of("a", 4)
    beside.save(request, [0, 1, 2, 3, 4])
    other = again(request, "b")
    other.kv_transfer_params = {"kvstored": {"program": "agent", "program_finished": True}}
    beside.scheduler.on_new_request(other)
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as operator:

        def programs() -> list[str]:
            return [each.program for each in operator.programs(pb.ListProgramsRequest()).programs]

        beside.scheduler._programs._programs["agent"].tool_started("search", 20.0)
        assert until(lambda: programs() == ["agent"]), "the control: it is known"
        tokens, _ = beside.scheduler.matched(other, 0)
        assert tokens
        beside.scheduler.allocated(other, [10, 11, 12, 13, 14], tokens)
        assert not beside.scheduler.finished(other, [10, 11, 12, 13, 14])
        assert until(lambda: not programs())


def test_a_few_slow_loads_are_not_believed_for_ever(engine: Engine) -> None:
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    shard, client = engine.scheduler._shards[0], engine.lookups
    load_bytes = 4 * engine.workers[0].layout.block_bytes
    for tokens in range(TOKENS, 20 * TOKENS, TOKENS):
        shard.report_prefill(0, tokens, tokens * 0.5)
    for _ in range(4):
        shard.report_load("dram", load_bytes, 3000.0)
    assert until(lambda: not shard.match(request.block_hashes).worth_loading)
    loaded = []
    for number in range(2 * TRIED_ANYWAY):
        other = again(request, f"again {number}")
        answers = _asked(engine, other)
        loaded.append(answers[0])
        assert answers == answers[:1] * 3, "decided once a request"
    assert loaded == ([0] * (TRIED_ANYWAY - 1) + [4 * TOKENS]) * 2
    for number in range(20 * TRIED_ANYWAY):
        other = again(request, f"tried {number}")
        tokens = _asked(engine, other)[0]
        engine.scheduler.allocated(other, [10, 11, 12, 13, 14], tokens)
        engine.step({other.request_id: 1}, {other.request_id: [10, 11, 12, 13, 14]})
        if client.ping() is not None and shard.match(request.block_hashes).worth_loading:
            break
    assert shard.match(request.block_hashes).worth_loading, "what was tried was reported"
    assert number >= TRIED_ANYWAY


def _asked(engine: Engine, request: Any) -> list[Any]:
    """How many tokens to load, asked again and again."""
    engine.scheduler.on_new_request(request)
    return [engine.scheduler.matched(request, 0)[0] for _ in range(3)]


def test_a_load_that_needs_the_disk_says_so(beside: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of("a", 4)
    beside.save(request, [0, 1, 2, 3, 4])
    honest = beside.scheduler._client.match
    for disk in (0, 2):

        def match(*given: Any, disk: int = disk) -> kvclient.Match:
            found = honest(*given)
            return kvclient.Match(found.blocks, kvclient.Tiers(dram=4 - disk, disk=disk), 0, None, None)

        monkeypatch.setattr(beside.scheduler._client, "match", match)
        other = again(request, f"disk {disk}")
        beside.scheduler._settings = patient(at_once_mib=0.0, disk_wait_s=0.0)
        beside.scheduler.on_new_request(other)
        tokens, _ = beside.scheduler.matched(other, 0)
        assert tokens == 4 * TOKENS
        beside.scheduler.allocated(other, [10, 11, 12, 13, 14], tokens)
        (load,) = beside.scheduler.plan({}, lambda _: []).loads
        assert load.from_disk is (disk > 0)
        beside.scheduler.finished(other, [10, 11, 12, 13, 14])
