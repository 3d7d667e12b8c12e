"""Both halves of the vLLM connector, twice: one engine prefills, another one waits for what it stores, and decodes."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from bench.process import DaemonProcess
from kvclient.integrations.vllm_scheduler import APART_S
from tests.integration.vllm_halves import Engine, again, load, patient, request_of
from tests.node import until

WAITS = {"kvstored": {"handed_over_s": 30.0}}
BLOCKS = [3, 1, 4, 15, 9, 2]


@pytest.fixture
def engines(empty_daemon: DaemonProcess) -> Iterator[tuple[Engine, Engine]]:
    """One that prefills, one that decodes: of the same model, with memory of their own."""
    both = Engine(empty_daemon.runtime_dir), Engine(empty_daemon.runtime_dir, patient())
    yield both
    for one in both:
        one.stop()


def test_a_decode_waits_for_the_whole_prompt_and_loads_every_byte(engines: tuple[Engine, Engine]) -> None:
    prefill, decode = engines
    prompt = request_of("prompt", 5)
    waiting = again(prompt, "waits")
    waiting.kv_transfer_params = WAITS
    decode.scheduler.on_new_request(waiting)
    assert decode.scheduler.matched(waiting, 0) == (None, False), "nothing is there, and yet it is not computed"
    hurried = again(prompt, "does not")
    decode.scheduler.on_new_request(hurried)
    assert decode.scheduler.matched(hurried, 0) == (0, False), "the control: without the word it is"
    prefill.workers[0].caches["layer 0"][BLOCKS] += 1.0
    prefill.save(prompt, BLOCKS)
    assert until(lambda: decode.scheduler.matched(waiting, 0)[0] is not None)
    taken = [20, 22, 21, 25, 23, 24]
    assert load(decode, waiting, taken) == 5
    for name, cache in decode.workers[0].caches.items():
        assert torch.equal(cache[taken[:5]], prefill.workers[0].caches[name][BLOCKS[:5]])
    assert not torch.equal(
        decode.workers[0].caches["layer 0"][taken[:5]], decode.workers[0].caches["layer 0"][BLOCKS[:5]]
    ), "the control: it was computed by the other one"


def test_a_decode_waits_no_longer_than_it_was_told(engines: tuple[Engine, Engine]) -> None:
    _, decode = engines
    waiting = request_of("nobody computes it", 3, params={"kvstored": {"handed_over_s": 0.01}})
    decode.scheduler.on_new_request(waiting)
    assert until(lambda: decode.scheduler.matched(waiting, 0) == (0, False))


def test_many_that_wait_are_looked_up_one_after_the_other_and_not_all_in_one_step(
    engines: tuple[Engine, Engine],
) -> None:
    scheduler = engines[1].scheduler
    waiting = [request_of(f"waits {number}", 2, params=WAITS) for number in range(20)]
    for one in waiting:
        scheduler.on_new_request(one)
        assert scheduler.matched(one, 0) == (None, False)
    at = [scheduler._known[one.request_id].look_again for one in waiting]
    assert all(later - sooner >= 0.99 * APART_S for sooner, later in pairwise(at))
