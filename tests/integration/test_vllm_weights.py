"""A real vLLM that is given other weights while it runs, and whose own cache alone is reset."""

from pathlib import Path

import pytest

from bench.engines.model import SIZES, write_model
from tests.integration.vllm_kit import APART, BLOCK, SAME, ask, difference, prompt_of, start, stored
from tests.node import Node

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


def test_after_weights_are_reloaded_in_place_nothing_of_the_old_ones_is_loaded(python: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "old", SIZES["tiny"], seed=0)
    write_model(tmp_path / "new", SIZES["tiny"], seed=1)
    known, more = prompt_of("known", 3 * BLOCK + 9), prompt_of("more", 3 * BLOCK + 9)
    with Node(dram="128MiB") as node:
        node.start()
        with start(python, tmp_path / "old", node.run, tmp_path / "log", enable_prefix_caching=True) as engine:
            old = stored(engine, known)
            assert engine.ask(do="reset_prefix_cache")["reset"]
            assert ask(engine, known)[0]["cached_tokens"] == 3 * BLOCK, "the control"
            engine.ask(do="reload_weights", folder=str(tmp_path / "new"))
            assert engine.ask(do="reset_prefix_cache")["reset"]
            (new,) = ask(engine, known)
            assert engine.ask(do="reset_prefix_cache")["reset"]
            (right,) = ask(engine, known, kv_transfer_params=APART)
            assert difference(new, right) <= SAME
            assert difference(old, right) > 2 * SAME, "the control: these weights say something else"
            ask(engine, more)
            assert engine.ask(do="reset_prefix_cache")["reset"]
            assert ask(engine, more)[0]["cached_tokens"] == 0, "nothing is stored either"
