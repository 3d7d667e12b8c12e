"""Programs of one agent each that call tools between turns: every turn reads the whole context again."""

from dataclasses import dataclass
from typing import Final

from bench.replay.draws import MINUTE_MS, SECOND_MS, Draws, Zipf
from bench.replay.script import Context, Script

MOST_TOKENS: Final = 120_000
_LONGEST_MS: Final = 60 * MINUTE_MS


@dataclass(frozen=True, slots=True)
class Tool:
    """Gaps are lognormal around `usual_ms`, or fall off with a power where `alpha` says so, from half of it on."""

    name: str
    usual_ms: int
    spread: float
    result_tokens: int
    alpha: float | None = None
    announces: bool = False  # its author gives a guess with the call

    def gap_ms(self, draws: Draws) -> int:
        """How long one call takes."""
        if self.alpha is not None:
            return draws.pareto(self.usual_ms / 2, self.alpha, most=_LONGEST_MS)
        return draws.lognormal(self.usual_ms, self.spread, least=20, most=_LONGEST_MS)

    def guess_ms(self, draws: Draws) -> int | None:
        """What its author would say before: the usual time, more or less, and nothing about this call."""
        return draws.lognormal(self.usual_ms, 0.4, least=20, most=_LONGEST_MS) if self.announces else None


READ: Final = Tool("read", 100, 0.8, 900)
SHELL: Final = Tool("shell", 2 * SECOND_MS, 1.5, 250)
SEARCH: Final = Tool("search", 1_500, 0.7, 1_200)
BROWSE: Final = Tool("browse", 15 * SECOND_MS, 0.9, 2_500)
PYTHON: Final = Tool("python", 4 * SECOND_MS, 1.6, 300)
TESTS: Final = Tool("tests", 40 * SECOND_MS, 1.2, 700, announces=True)
BUILD: Final = Tool("build", 90 * SECOND_MS, 0.0, 400, alpha=1.1, announces=True)
DELEGATE: Final = Tool("delegate", 2 * MINUTE_MS, 0.9, 800, announces=True)
PERSON: Final = Tool("person", 4 * MINUTE_MS, 1.3, 60)

# What kinds of agent there are, and what each calls: a tool stands once for every time in ten.
_KINDS: Final = (
    (READ, READ, READ, READ, SHELL, SHELL, SHELL, TESTS, TESTS, BUILD),
    (SEARCH, SEARCH, SEARCH, BROWSE, BROWSE, BROWSE, BROWSE, READ, READ, PERSON),
    (PYTHON, PYTHON, PYTHON, PYTHON, PYTHON, READ, READ, SHELL, SEARCH, PERSON),
    (READ, READ, SHELL, SHELL, DELEGATE, DELEGATE, DELEGATE, SEARCH, BUILD, PERSON),
    (SEARCH, READ, PERSON, PERSON, PERSON, SHELL, BROWSE, BROWSE, PYTHON, PYTHON),
)
_VERSIONS: Final = 4  # prompts a kind in use at a time
_MOST_TURNS: Final = 80


def write_tools(script: Script, model: int, draws: Draws, programs_per_minute: float) -> None:
    """Programs that begin at random. Prompts have 5,000 tokens in the median, with tool descriptions.

    12 turns in the median and up to 80; an answer of 140 tokens, then a tool whose result is appended. Two programs in
    five think before they answer. One in thirty breaks off without a word; the others say that they have finished.
    """
    prompts = [_prompt(script, model, draws) for _ in range(len(_KINDS) * _VERSIONS)]
    popularity = Zipf(len(prompts), 0.9)
    for start_ms in draws.arrivals(script.until_ms, programs_per_minute):
        number = popularity.draw(draws)
        _work(script, draws, prompts[number].copy(), _KINDS[number % len(_KINDS)], start_ms)


def _prompt(script: Script, model: int, draws: Draws) -> Context:
    context = script.context(model)
    context.append(script.segment(), draws.lognormal(5_000, 0.5, least=1_000, most=16_000))
    return context


def _work(script: Script, draws: Draws, context: Context, kind: tuple[Tool, ...], at_ms: int) -> None:
    """One program, to its end or the end of the recording."""
    program = script.program()
    context.append(script.segment(), draws.lognormal(600, 1.1, least=30, most=20_000))
    turns = draws.lognormal(12, 0.8, least=2, most=_MOST_TURNS)
    thinks, breaks_off = draws.chance(0.4), draws.chance(1 / 30)
    for _ in range(turns - 1):
        at_ms = call_tool(script, draws, context, draws.pick(kind), at_ms, program, thinks=thinks)
        if at_ms >= script.until_ms or context.tokens > MOST_TOKENS:
            return
    answer_tokens = draws.lognormal(350, 0.7, least=20, most=3_000)
    done_ms = script.ask(at_ms, context, answer_tokens, program, thought_tokens(draws) if thinks else 0).done_ms
    if not breaks_off:
        script.finished(done_ms, program)


def thought_tokens(draws: Draws) -> int:
    """How long a reasoning model thinks before it answers."""
    return draws.lognormal(700, 0.9, least=20, most=10_000)


def call_tool(
    script: Script, draws: Draws, context: Context, tool: Tool, at_ms: int, program: int, *, thinks: bool
) -> int:
    """A turn that ends with a tool call, and the result in the context. Returns when the next turn begins."""
    thought = thought_tokens(draws) if thinks else 0
    answer = script.ask(at_ms, context, draws.lognormal(140, 0.8, least=15, most=3_000), program, thought)
    taken_ms = tool.gap_ms(draws)
    finished_ms = script.tool(answer.done_ms, program, tool.name, tool.guess_ms(draws), taken_ms)
    context.append(script.segment(), draws.lognormal(tool.result_tokens, 1.0, least=5, most=15_000))
    return finished_ms + draws.between(5, 60)
