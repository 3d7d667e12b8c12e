"""What engine steps lose while blocks are loaded or stored beside them, over a bare memcpy of as many bytes.

One engine with the connector decodes; in the midst of it a request enters whose prompt needs one token computed, and
leaves with it. The same again and again, which differs in nothing but what is copied:

    plain   its blocks are in the engine's own prefix cache, and it does not wish to be stored: nothing is copied
    again   the same, as a control: what two of these differ by is noise
    store   the same blocks are there, and the daemon does not have them: all of them are stored beside the next steps
    load    the engine's cache was emptied, and the daemon has them: all of them are loaded beside the steps

The steps from its arrival on are added up, so that it does not matter in which of them the request itself is computed,
nor which one pays. It is the same engine, because two processes differ by more than a copy takes: in where their
memory lies. What the connector costs when it has nothing to copy is in `miss_overhead_share`. The engine's arithmetic
has one thread, and the daemon and the connector's threads share the other core.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

from bench.dram import addresses, move
from bench.engines import VllmProcess
from bench.harness import Findings, random_blocks, say, timed

BLOCK_BYTES = 1 << 20
BLOCKS = 56  # of the request: more than what is loaded before a forward
DECODING = 7  # requests; with the one that enters the engine has as many as it may
BEFORE = 3  # steps, until it enters
WINDOW = 6  # steps that are added up
KINDS = ("plain", "store", "again", "load")


def steps_beside_transfers(
    ours: VllmProcess, prompt_of: Callable[[str, int], list[int]], clear: Callable[[], int], block: int, rounds: int
) -> Findings:
    """`step_extra_over_copy_time`, and what it is made of.

    `prompt_of` makes a prompt of a name and so many tokens, `clear` empties the daemon and says how many blocks it
    had, `block` is what a block has of tokens.
    """
    decoding = [{"prompt": prompt_of(f"decoding {n}", 24), "max_tokens": BEFORE + WINDOW + 1} for n in range(DECODING)]
    prompt = prompt_of("beside", BLOCKS * block + 1)
    blocks = [random_blocks(BLOCKS, BLOCK_BYTES, seed) for seed in (1, 2)]
    sources, targets = map(addresses, blocks)

    def window(kind: str) -> float:
        """Seconds of the steps around such a request."""
        if kind == "load":
            assert ours.ask(do="reset_prefix_cache")["reset"]
        wishes = {"kvstored": {"store": kind == "store"}}
        entering: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": wishes}
        ours.ask(do="steps")
        answer = ours.generate(*decoding, entering | {"after_steps": BEFORE})[-1]
        steps = ours.ask(do="steps")
        assert answer["cached_tokens"] == BLOCKS * block, (kind, answer["cached_tokens"])
        assert not steps["idle"], "the engine always has something to compute"
        assert ours.ask(do="settle")["settled"]
        return float(sum(steps["steps"][BEFORE : BEFORE + WINDOW]))

    ours.generate({"prompt": prompt, "max_tokens": 1, "kv_transfer_params": {"kvstored": {"store": False}}})
    clear()
    seconds: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "copy")}
    for number in range(rounds + 1):
        took = {kind: window(kind) for kind in (*KINDS[:3][:: 1 if number % 2 else -1], "load")}
        stored = clear()
        assert stored == BLOCKS, f"{stored} blocks were stored"
        took["copy"] = timed(lambda: move(sources, targets, BLOCK_BYTES))
        if number:  # the first one warms up
            for name, each in took.items():
                seconds[name].append(each)
        say(f"steps: {number} of {rounds}: " + ", ".join(f"{name} {each * 1e3:.1f} ms" for name, each in took.items()))
    return figures(seconds)


def figures(seconds: dict[str, list[float]]) -> Findings:
    """Of times by kind, a round at a place."""
    copy_s = median(seconds["copy"])
    shares = {}
    for kind in ("load", "store", "again"):
        extra = [one - plain for one, plain in zip(seconds[kind], seconds["plain"], strict=True)]
        shares[kind] = median(extra) / copy_s
    return {
        "step_extra_over_copy_time": max(shares["load"], shares["store"]),
        "step_extra_load_over_copy_time": shares["load"],
        "step_extra_store_over_copy_time": shares["store"],
        "step_extra_nothing_over_copy_time": shares["again"],
        "step_plain_ms": median(seconds["plain"]) * 1e3 / WINDOW,
        "step_copy_ms": copy_s * 1e3,
    }
