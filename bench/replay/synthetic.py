"""The synthetic workloads, each from a seed. Equal seed, minutes and load give equal events, on any machine.

`minutes` is how long one listens, `load` multiplies how often things begin; neither changes what a program does. The
default sizes give 150,000 to 280,000 accesses. They were settled on seed 1 under LRU, ARC, S3-FIFO and Belady, no rule
of ours among them, so that reuse gaps reach from seconds to an hour and that 1 to 20 % of the footprint is where rules
differ.

Shares of an infinite cache and gaps between accesses to a block are those of seed 1.
"""

from types import MappingProxyType
from typing import Final, Protocol

from bench.replay import models
from bench.replay.agents import write_agents
from bench.replay.chats import write_chat, write_floods
from bench.replay.draws import MINUTE_MS, Draws
from bench.replay.rag import write_rag
from bench.replay.script import Script
from bench.replay.tools import write_tools
from bench.replay.workload import Workload


class Generate(Protocol):
    """What every function below is."""

    def __call__(self, seed: int, *, minutes: float = ..., load: float = ...) -> Workload:
        """A workload."""


def agents(seed: int, *, minutes: float = 30, load: float = 1.0) -> Workload:
    """Runs of multi-agent workflows on an 8B model, with hints of tools, programs and workflows.

    Infinite cache: 77.1 % of blocks, 76.4 % of tokens, 73.6 % of compute. Half of the gaps lie between 19 and 198 s.
    """
    script = Script((models.BASE,), round(minutes * MINUTE_MS))
    write_agents(script, 0, Draws(seed), 6.0 * load)
    return script.workload("agents")


def tools(seed: int, *, minutes: float = 60, load: float = 1.0) -> Workload:
    """Long programs of one agent on an 8B model, tool gaps from 0.02 s to an hour; hints of tools and programs.

    Infinite cache: 92.8 % of blocks, 92.2 % of tokens, 90.4 % of compute. Half of the gaps lie between 5 and 37 s.
    """
    script = Script((models.BASE,), round(minutes * MINUTE_MS))
    write_tools(script, 0, Draws(seed), 5.0 * load)
    return script.workload("tools")


def rag(seed: int, *, minutes: float = 60, load: float = 1.0) -> Workload:
    """Questions over two to five popular documents in varying order on an 8B model; hints of turns.

    Infinite cache: 50.7 % of blocks, 49.9 % of tokens, 47.0 % of compute. Half of the gaps lie between 15 and 88 s.
    """
    script = Script((models.BASE,), round(minutes * MINUTE_MS))
    write_rag(script, 0, Draws(seed), 100.0 * load)
    return script.workload("rag")


def mixed(seed: int, *, minutes: float = 60, load: float = 1.0) -> Workload:
    """One capacity for a 70B model with tools, an 8B one with chats, and a 1.5B one with documents.

    Infinite cache: 70.9 % of blocks, 69.7 % of tokens, 84.8 % of compute. Half of the gaps lie between 11 and 68 s.
    """
    script = Script((models.LARGE, models.BASE, models.SMALL), round(minutes * MINUTE_MS))
    write_tools(script, 0, Draws(seed, 0), 1.5 * load)
    write_chat(script, 1, Draws(seed, 1), 20.0 * load)
    write_rag(script, 2, Draws(seed, 2), 40.0 * load)
    return script.workload("mixed")


def flood(seed: int, *, minutes: float = 90, load: float = 1.0) -> Workload:
    """Chats on an 8B model, and batch jobs over documents that nobody reads twice; hints of the chats' turns.

    Infinite cache: 56.1 % of blocks, 54.8 % of tokens, 52.1 % of compute. Half of the gaps lie between 9 and 66 s.
    """
    script = Script((models.BASE,), round(minutes * MINUTE_MS))
    write_chat(script, 0, Draws(seed, 0), 15.0 * load)
    write_floods(script, 0, Draws(seed, 1), 0.3 * load)
    return script.workload("flood")


def chat(seed: int, *, minutes: float = 120, load: float = 1.0) -> Workload:
    """Conversations of several turns with time to think in between on an 8B model; hints of turns.

    Infinite cache: 88.2 % of blocks, 85.8 % of tokens, 81.2 % of compute. Half of the gaps lie between 12 and 74 s.
    """
    script = Script((models.BASE,), round(minutes * MINUTE_MS))
    write_chat(script, 0, Draws(seed), 20.0 * load)
    return script.workload("chat")


GENERATORS: Final = MappingProxyType[str, Generate](
    {"agents": agents, "tools": tools, "rag": rag, "mixed": mixed, "flood": flood, "chat": chat}
)
