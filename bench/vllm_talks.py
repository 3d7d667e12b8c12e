"""Conversations with a server: several clients, each with some of them, a turn at a time, in an order of chance.

A turn sends all that was said before, the server's own answers as they came, and some tokens that are new. People
pause: a conversation goes on when all others of its client have had a turn. In which order they have it, and how long
a client waits before each, comes from a seed and not from the clock, so that every server is asked the same by each
client in the same order.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from statistics import mean
from typing import NamedTuple, Protocol

from bench.harness import percentile


class Reply(Protocol):
    """What a server answers."""

    tokens: list[int]
    first_token_s: float
    all_s: float
    cached_tokens: int


Ask = Callable[[list[int], int], Reply]  # a prompt and how many tokens to answer with; called by several threads


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is said. Lengths in tokens."""

    conversations: int = 10
    turns: int = 4
    clients: int = 3
    system: int = 128  # that all begin with
    first: int = 330  # of the first turn, behind these
    later: int = 180  # of each one that follows
    answer: int = 24
    pause_s: float = 0.05  # before a turn, on average
    vocabulary: int = 2048

    @property
    def prompt_tokens(self) -> int:
        """Of all turns together."""
        one = self.turns * (self.system + self.first)
        return self.conversations * (one + sum(range(self.turns)) * (self.later + self.answer))

    @property
    def requests(self) -> int:
        """In all."""
        return self.conversations * self.turns


class Turn(NamedTuple):
    """One that was answered."""

    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    all_s: float


@dataclass(slots=True)
class Measured:
    """What became of all turns of one or more runs."""

    turns: list[Turn] = field(default_factory=list)
    seconds: float = 0.0  # from the first question to the last answer

    def figures(self, answer_tokens: int) -> dict[str, float]:
        """By name."""
        firsts = [turn.first_token_s for turn in self.turns]
        asked = sum(turn.prompt_tokens for turn in self.turns)
        return {
            "ttft_mean_ms": mean(firsts) * 1e3,
            "ttft_p99_ms": percentile(firsts, 0.99) * 1e3,
            "tokens_per_s": (asked + answer_tokens * len(self.turns)) / self.seconds,
            "hit_share": sum(turn.cached_tokens for turn in self.turns) / asked,
        }


def talk(ask: Ask, traffic: Traffic, seed: int) -> Measured:
    """Have all conversations of a seed with a server. Raises what `ask` raises."""
    measured = Measured()
    failures: list[BaseException] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        try:
            for turn in _turns(ask, traffic, seed, number):
                with lock:
                    measured.turns.append(turn)
                if failures:
                    return
        except Exception as error:  # noqa: BLE001 -- raised again where the clients are waited for
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(traffic.clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured.seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    assert len(measured.turns) == traffic.requests, "every turn of every conversation"
    return measured


def _turns(ask: Ask, traffic: Traffic, seed: int, client: int) -> Iterator[Turn]:
    """Those of a client, as they are answered."""
    chance = Random(f"{seed} {client}")
    said = {
        number: _tokens(traffic, "system", traffic.system)
        for number in range(client, traffic.conversations, traffic.clients)
    }
    for turn in range(traffic.turns):
        for number in chance.sample(list(said), len(said)):
            time.sleep(chance.expovariate(1 / traffic.pause_s) if traffic.pause_s else 0.0)
            new = _tokens(traffic, f"{seed} {number} {turn}", traffic.later if turn else traffic.first)
            prompt = said[number] + new
            reply = ask(prompt, traffic.answer)
            yield Turn(len(prompt), reply.cached_tokens, reply.first_token_s, reply.all_s)
            said[number] = prompt + reply.tokens


def _tokens(traffic: Traffic, name: str, count: int) -> list[int]:
    """Tokens that no other name has."""
    random = Random(name)
    return [random.randrange(2, traffic.vocabulary) for _ in range(count)]
