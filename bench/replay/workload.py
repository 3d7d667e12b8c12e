"""What a replay feeds to a policy: requests for blocks, and the hints that agents send, on one time line.

A block is named by an id that stands for its whole prefix: equal id, equal tokens from the first to the last of that
block. So a request's keys are a path from the root of the prefix tree, every id has one parent for ever, and no two
models share one.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import singledispatch
from typing import Final, TypeAlias

import numpy as np

from bench.replay.profiles import Profile

Keys: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]

NO_PROGRAM: Final = -1


def keys_of(ids: Sequence[int]) -> Keys:
    """Ids as an array that nobody can write to: events are shared between replays."""
    keys = np.array(ids, np.uint64)
    keys.flags.writeable = False
    return keys


NO_KEYS: Final = keys_of([])


@dataclass(frozen=True, slots=True)
class Model:
    """One model as the cache sees it. `block_bytes` is the KV of `block_tokens` tokens, all ranks together."""

    name: str
    block_tokens: int
    block_bytes: int
    profile: Profile


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt of `tokens` tokens. `output_keys` are the blocks below `keys` that decoding fills and the engine stores.

    Only whole blocks have keys, except where a trace counts the last part of one: then keys cover up to one block more
    than tokens.
    """

    at_s: float
    model: int
    keys: Keys
    tokens: int
    program: int = NO_PROGRAM
    output_keys: Keys = field(default_factory=lambda: NO_KEYS)


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """A program waits for a tool. `expected_s` is what its author would guess, not what it will take."""

    at_s: float
    program: int
    tool: str
    expected_s: float | None


@dataclass(frozen=True, slots=True)
class ToolFinished:
    """The tool has answered; the program's next request follows within a moment."""

    at_s: float
    program: int


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The answer is complete, and the next turn is up to a person."""

    at_s: float
    program: int


@dataclass(frozen=True, slots=True)
class ProgramFinished:
    """No request of this program follows."""

    at_s: float
    program: int


class Join(Enum):
    """When a step may run: after all that it names, or after any of them."""

    ALL = "all"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Step:
    """One agent of a workflow. `after` are positions in the graph; a loop names a later step."""

    name: str
    after: tuple[int, ...]
    join: Join


@dataclass(frozen=True, slots=True)
class Graph:
    """What runs after what."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class WorkflowBegun:
    """A run of a graph begins; no step of it has been entered."""

    at_s: float
    run: int
    graph: Graph


@dataclass(frozen=True, slots=True, eq=False)
class StepBound:
    """That step will ask for these blocks first when it runs next; replaces what was bound before."""

    at_s: float
    run: int
    step: int
    keys: Keys


@dataclass(frozen=True, slots=True)
class StepEntered:
    """That step runs now."""

    at_s: float
    run: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkflowEnded:
    """No step of this run will be entered again."""

    at_s: float
    run: int


Event: TypeAlias = (
    Request
    | ToolStarted
    | ToolFinished
    | TurnFinished
    | ProgramFinished
    | WorkflowBegun
    | StepBound
    | StepEntered
    | WorkflowEnded
)


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Events in order of time, and the models that they name by position."""

    name: str
    models: tuple[Model, ...]
    events: tuple[Event, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests alone."""
        return tuple(event for event in self.events if isinstance(event, Request))

    @property
    def accesses(self) -> int:
        """Blocks asked for, each time one is."""
        return sum(request.keys.size for request in self.requests)

    @property
    def unique_blocks(self) -> int:
        """Different blocks asked for or stored."""
        return sum(self._unique_by_model().values())

    @property
    def footprint_bytes(self) -> int:
        """What keeping every block would take: capacities are shares of this."""
        return sum(count * self.models[model].block_bytes for model, count in self._unique_by_model().items())

    def digest(self) -> str:
        """SHA-256 over models and events: equal digest, equal workload, whoever generated it and when."""
        seal = hashlib.sha256(repr(self.models).encode())
        for event in self.events:
            seal.update(_bytes_of(event))
        return seal.hexdigest()

    def halves(self) -> tuple["Workload", "Workload"]:
        """The events before and after half of the accesses, to tune on one and judge on the other.

        Workflows that go on are begun and bound again at the start of the second half: whoever starts there could not
        know them otherwise.
        """
        middle = self._middle()
        first, second = self.events[:middle], self.events[middle:]
        lasting = {event.run for event in second if isinstance(event, StepBound | StepEntered | WorkflowEnded)}
        known = tuple(
            replace(event, at_s=second[0].at_s)
            for event in first
            if isinstance(event, WorkflowBegun | StepBound) and event.run in lasting
        )
        return replace(self, name=f"{self.name}/1", events=first), replace(
            self, name=f"{self.name}/2", events=known + second
        )

    def check(self) -> None:
        """Assert what the text at the top of this file promises."""
        moments = [event.at_s for event in self.events]
        assert moments == sorted(moments), "out of order"
        place: dict[int, tuple[int, int]] = {}
        for request in self.requests:
            block_tokens = self.models[request.model].block_tokens
            assert request.tokens >= (request.keys.size - 1) * block_tokens, "more keys than tokens"
            parent = -1
            for key in _path(request):
                assert place.setdefault(key, (request.model, parent)) == (request.model, parent), (
                    "a key with two places"
                )
                parent = key

    def _middle(self) -> int:
        """Position of the first event after half of the accesses."""
        left = self.accesses // 2
        for position, event in enumerate(self.events):
            if isinstance(event, Request):
                left -= event.keys.size
            if left < 0:
                return position
        return len(self.events)

    def _unique_by_model(self) -> Counter[int]:
        seen: dict[int, int] = {}
        for request in self.requests:
            seen.update(dict.fromkeys(request.keys.tolist(), request.model))
            seen.update(dict.fromkeys(request.output_keys.tolist(), request.model))
        return Counter(seen.values())


def _path(request: Request) -> Iterator[int]:
    yield from request.keys.tolist()
    yield from request.output_keys.tolist()


@singledispatch
def _bytes_of(event: Event) -> bytes:
    """An event for the digest; `repr` gives every field, and floats exactly."""
    return repr(event).encode()


@_bytes_of.register
def _(event: Request) -> bytes:
    sizes = (event.model, event.tokens, event.program, event.keys.size, event.output_keys.size)
    return struct.pack("<cd5q", b"R", event.at_s, *sizes) + _stored(event.keys) + _stored(event.output_keys)


@_bytes_of.register
def _(event: StepBound) -> bytes:
    return struct.pack("<cd3q", b"B", event.at_s, event.run, event.step, event.keys.size) + _stored(event.keys)


def _stored(keys: Keys) -> bytes:
    return keys.astype("<u8").tobytes()
