"""People talking to assistants: turns with time to think in between, and floods of one-shot requests beside them."""

from typing import Final

from bench.replay.draws import MINUTE_MS, SECOND_MS, Draws, Zipf
from bench.replay.script import Context, Script

_ASSISTANTS: Final = 20  # system prompts in use
_MOST_TURNS: Final = 60
_MOST_TOKENS: Final = 120_000  # nobody goes on in a full context window


def write_chat(script: Script, model: int, draws: Draws, sessions_per_minute: float) -> None:
    """Conversations that begin at random; what is drawn follows published statistics of chat services.

    A third ends after one turn; the others have 4 turns in the median and tens in the tail. One first message in five
    carries a document. People answer after 35 s in the median; one time in twelve they come back after 20 minutes or
    so. One answer in 25 is asked for again, which reads all but the answer a second time.
    """
    assistants = [_system_prompt(script, model, draws) for _ in range(_ASSISTANTS)]
    popularity = Zipf(_ASSISTANTS, 1.0)
    for start_ms in draws.arrivals(script.until_ms, sessions_per_minute):
        _converse(script, draws, assistants[popularity.draw(draws)].copy(), start_ms)


def _system_prompt(script: Script, model: int, draws: Draws) -> Context:
    context = script.context(model)
    context.append(script.segment(), draws.lognormal(900, 0.8, least=100, most=6_000))
    return context


def _converse(script: Script, draws: Draws, context: Context, at_ms: int) -> None:
    """One conversation, to its end or the end of the recording."""
    program = script.program()
    turns = 1 if draws.chance(0.33) else draws.lognormal(4, 0.8, least=2, most=_MOST_TURNS)
    for turn in range(turns):
        if draws.chance(0.04 if turn else 0.20):
            context.append(script.segment(), draws.lognormal(3_500, 1.0, least=200, most=60_000))
        context.append(script.segment(), draws.lognormal(70, 1.0, least=3, most=4_000))
        again = context.copy()
        done_ms = script.ask(at_ms, context, _answer_tokens(draws), program).done_ms
        script.turn_finished(done_ms, program)
        if draws.chance(0.04):
            context = again
            done_ms = script.ask(done_ms + _glance_ms(draws), context, _answer_tokens(draws), program).done_ms
            script.turn_finished(done_ms, program)
        at_ms = done_ms + _pause_ms(draws)
        if at_ms >= script.until_ms or context.tokens > _MOST_TOKENS:
            return


def _answer_tokens(draws: Draws) -> int:
    return draws.lognormal(260, 0.9, least=5, most=4_000)


def _glance_ms(draws: Draws) -> int:
    return draws.lognormal(6 * SECOND_MS, 0.7, least=SECOND_MS, most=MINUTE_MS)


def _pause_ms(draws: Draws) -> int:
    """Reading and typing, or a break."""
    if draws.chance(1 / 12):
        return draws.lognormal(20 * MINUTE_MS, 0.8, least=MINUTE_MS, most=120 * MINUTE_MS)
    return draws.lognormal(35 * SECOND_MS, 1.1, least=2 * SECOND_MS, most=15 * MINUTE_MS)


def write_floods(script: Script, model: int, draws: Draws, floods_per_minute: float) -> None:
    """Batch jobs: one instruction over a hundred documents or more that nobody reads twice, within a few minutes."""
    for start_ms in draws.arrivals(script.until_ms, floods_per_minute):
        instruction = script.context(model)
        instruction.append(script.segment(), draws.lognormal(800, 0.6, least=100, most=4_000))
        documents = draws.lognormal(120, 0.7, least=20, most=600)
        lasts_ms = draws.between(1 * MINUTE_MS, 5 * MINUTE_MS)
        for _ in range(documents):
            context = instruction.copy()
            context.append(script.segment(), draws.lognormal(4_500, 0.7, least=300, most=30_000))
            script.ask(start_ms + draws.below(lasts_ms), context, draws.lognormal(120, 0.7, least=5, most=1_000))
