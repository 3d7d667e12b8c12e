"""Writes the events of many programs that overlap, each as if it were alone, and puts them in order of time."""

from dataclasses import dataclass
from typing import Final

from bench.replay.workload import (
    NO_PROGRAM,
    Event,
    Keys,
    Model,
    ProgramFinished,
    Request,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    Workload,
    keys_of,
)

_64_BITS: Final = (1 << 64) - 1
_FIRST_TOKEN_MS: Final = 500  # queueing and prefill, on the way to the first token
_DECODE_MS: Final = 30  # a token, in the large batches of a busy engine


class Context:
    """The tokens of one conversation, known as a list of segments, and the ids of the blocks that they fill.

    A segment is text that has always the same length: a system prompt, a document, one message. A block's id is made
    from all segments up to the one that fills it, so contexts that begin with the same segments begin with the same
    ids, and no others do (but for 1 in 2**64).
    """

    __slots__ = ("_block_tokens", "_chain", "_ids", "model", "tokens")

    def __init__(self, model: int, block_tokens: int) -> None:
        self.model = model
        self.tokens = 0
        self._block_tokens = block_tokens
        self._chain = _mixed(model, 0)
        self._ids: list[int] = []

    def append(self, segment: int, tokens: int) -> None:
        """Add a segment at the end."""
        self.tokens += tokens
        self._chain = _mixed(self._chain, segment)
        self._ids.extend(
            _mixed(self._chain, block) for block in range(len(self._ids), self.tokens // self._block_tokens)
        )

    def copy(self) -> "Context":
        """The same tokens, to go on differently."""
        other = Context(self.model, self._block_tokens)
        other.tokens, other._chain, other._ids = self.tokens, self._chain, self._ids.copy()
        return other

    def keys(self, begin: int = 0) -> Keys:
        """Ids of its full blocks, from a position on."""
        return keys_of(self._ids[begin:])


def _mixed(chain: int, word: int) -> int:
    """splitmix64's finish of both: every bit of either changes half of the result's."""
    mixed = (chain + (word + 1) * 0x9E3779B97F4A7C15) & _64_BITS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return mixed ^ (mixed >> 31)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, as a segment for whoever reads it, and when it had said it."""

    segment: int
    tokens: int
    done_ms: int


class Script:
    """Takes events of any order up to `until_ms`, where a recording would stop; later ones are left out.

    Moments are whole milliseconds. Answers take as long as they would without a cache that hits or misses, so that
    every policy sees the same stream.
    """

    __slots__ = ("_events", "_programs", "_runs", "_segments", "models", "until_ms")

    def __init__(self, models: tuple[Model, ...], until_ms: int) -> None:
        self.models = models
        self.until_ms = until_ms
        self._events: list[Event] = []
        self._segments = self._programs = self._runs = 0

    def context(self, model: int) -> Context:
        """An empty context for that model."""
        return Context(model, self.models[model].block_tokens)

    def segment(self) -> int:
        """Text that nobody else has."""
        self._segments += 1
        return self._segments

    def program(self) -> int:
        """A program that nobody else is."""
        self._programs += 1
        return self._programs - 1

    def run(self) -> int:
        """A run of a workflow that nobody else is."""
        self._runs += 1
        return self._runs - 1

    def write(self, event: Event) -> None:
        """Any event."""
        if event.at_s < self.until_ms / 1000:
            self._events.append(event)

    def ask(
        self, at_ms: int, context: Context, answer_tokens: int, program: int = NO_PROGRAM, thought_tokens: int = 0
    ) -> Answer:
        """A request with all of the context, which the answer is appended to.

        What the model thinks before it answers is decoded and stored with the answer, but chat templates leave it out
        of the next prompt, so that nobody asks for these blocks again.
        """
        keys, tokens, answer = context.keys(), context.tokens, self.segment()
        decoded = context.copy()
        if thought_tokens:
            decoded.append(self.segment(), thought_tokens)
        decoded.append(answer, answer_tokens)
        context.append(answer, answer_tokens)
        self.write(Request(at_ms / 1000, context.model, keys, tokens, program, decoded.keys(keys.size)))
        return Answer(answer, answer_tokens, at_ms + _FIRST_TOKEN_MS + (thought_tokens + answer_tokens) * _DECODE_MS)

    def turn_finished(self, at_ms: int, program: int) -> None:
        """Hint: it is a person's turn."""
        self.write(TurnFinished(at_ms / 1000, program))

    def finished(self, at_ms: int, program: int) -> None:
        """Hint: this program is over."""
        self.write(ProgramFinished(at_ms / 1000, program))

    def tool(self, at_ms: int, program: int, name: str, expected_ms: int | None, taken_ms: int) -> int:
        """Hints: a tool runs. Returns when it has answered."""
        expected_s = None if expected_ms is None else expected_ms / 1000
        self.write(ToolStarted(at_ms / 1000, program, name, expected_s))
        self.write(ToolFinished((at_ms + taken_ms) / 1000, program))
        return at_ms + taken_ms

    def workload(self, name: str) -> Workload:
        """All of it. Of one moment's events, what was written first comes first."""
        return Workload(name, self.models, tuple(sorted(self._events, key=lambda event: event.at_s)))
