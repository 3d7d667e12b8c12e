"""What an engine should do with the context of a request that waits for a tool: keep it, swap it out, or drop it.

InferCept (Abhyankar et al., "InferCept: Efficient Intercept Support for Augmented Large Language Model Inference",
ICML 2024, section 4) counts what each choice wastes: accelerator memory that does nothing, times how long it does
nothing, in byte-seconds. With C the tokens of the waiting request, C_other those of the requests that run, M the bytes
a token, T_fwd the seconds of a forward pass and T_swap the seconds to move tokens to the host or back:

    preserve  T_int * C * M                                              it lies there until the tool answers
    swap      2 * T_swap(C') * C_batch * M                               out and in; the whole batch stands still
    discard   T_fwd(C) * C * M  +  T_fwd(C) * C_other * M                it fills up again; the others stand still
    chunked   T_fwd(C) * C * M / 2  +  n * T_fwd(C / n) * C_other * M    n pieces: half of it is there on average

    T_swap(N) = T_fwd(batch)                                             swap budget: N hides behind a forward pass

Where this departs from the paper:

* C' is what does not hide: tokens above the swap budget. C_batch is C + C_other.
* The paper's T_fwd knows no position. The profile's does, so the pieces of a chunked discard cost what the middle one
  costs: exact where T grows linearly with what is cached, which is what attention does.
* T_int is the time the call will still take. Without an estimate that is the time since the call, as in the paper
  (what has lasted long will last long); with one, what is left of it, until it has proved too short.

Pure. Any thread that may read the profile.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvstore.cost import TOKENS_MAX, Bandwidth, PrefillProfile, Refusal, refusal_of

# An answer for a whole accelerator: 2^32 tokens run at once, a token takes at most 64 MiB, a tool at most a month.
RUNNING_TOKENS_MAX: Final = 1 << 32
TOKEN_BYTES_MAX: Final = 1 << 26
INTERCEPTION_SECONDS_MAX: Final = 31 * 86400.0
FORWARD_SECONDS_MAX: Final = 3600.0


class Choice(StrEnum):
    """What to do with the context."""

    PRESERVE = "preserve"
    SWAP = "swap"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Interception:
    """A request that waits for a tool, and the engine around it."""

    context_tokens: int  # C
    token_bytes: float  # M
    running_tokens: int  # C_other
    elapsed_seconds: float  # since the call
    expected_seconds: float | None = None  # of the whole call, if somebody knows better than "as long again"
    forward_seconds: float | None = None  # of the engine's next iteration; None: as the profile says for `batch_tokens`
    batch_tokens: int = 0  # new tokens of the next iteration
    chunk_tokens: int = 0  # recomputed in pieces of so many; 0: in one go


@dataclass(frozen=True, slots=True)
class Advice:
    """The choice that wastes least. None: nobody has measured what it depends on, so it is not advised."""

    choice: Choice
    waste_preserve: float  # byte-seconds, as the others
    waste_swap: float | None
    waste_discard: float | None
    swap_budget_bytes: int  # what moves unnoticed in the next iteration, for all requests together


def advise(interception: Interception, profile: PrefillProfile, swap: Bandwidth) -> Advice | Refusal:
    """Weigh the three. `swap` is the way between accelerator and host. Call again as time passes: it may change."""
    refusal = _refusal(interception)
    if refusal is not None:
        return refusal
    tokens, token_bytes = interception.context_tokens, interception.token_bytes
    budget_bytes = _swap_budget_bytes(interception, profile, swap)
    preserve = _remaining_seconds(interception) * tokens * token_bytes
    swapped = _waste_swap(interception, swap, budget_bytes)
    discard = _waste_discard(interception, profile)
    choice, least = Choice.PRESERVE, preserve  # of equals the one that moves least
    if swapped is not None and swapped < least:
        choice, least = Choice.SWAP, swapped
    if discard is not None and discard < least:
        choice = Choice.DISCARD
    return Advice(choice, preserve, swapped, discard, budget_bytes)


def _refusal(asked: Interception) -> Refusal | None:
    """What comes from a client is not believed."""
    bounds: tuple[tuple[float | None, float], ...] = (
        (asked.context_tokens, TOKENS_MAX),
        (asked.token_bytes, TOKEN_BYTES_MAX),
        (asked.running_tokens, RUNNING_TOKENS_MAX),
        (asked.elapsed_seconds, INTERCEPTION_SECONDS_MAX),
        (asked.expected_seconds, INTERCEPTION_SECONDS_MAX),
        (asked.forward_seconds, FORWARD_SECONDS_MAX),
        (asked.batch_tokens, TOKENS_MAX),
        (asked.chunk_tokens, TOKENS_MAX),
    )
    refusals = (refusal_of(value, 0, most) for value, most in bounds if value is not None)
    return next((refusal for refusal in refusals if refusal is not None), None)


def _remaining_seconds(asked: Interception) -> float:
    """T_int. An estimate that has passed was wrong: from then on as if there had been none."""
    if asked.expected_seconds is not None and asked.expected_seconds > asked.elapsed_seconds:
        return asked.expected_seconds - asked.elapsed_seconds
    return asked.elapsed_seconds


def _swap_budget_bytes(asked: Interception, profile: PrefillProfile, swap: Bandwidth) -> int:
    """N of T_swap(N) = T_fwd(batch); 0 where either side is unknown."""
    forward_seconds = asked.forward_seconds
    if forward_seconds is None:
        forward_seconds = profile.seconds(0, asked.batch_tokens)
    return swap.bytes_within(forward_seconds or 0.0)


def _waste_swap(asked: Interception, swap: Bandwidth, budget_bytes: int) -> float | None:
    exposed_bytes = max(0.0, asked.context_tokens * asked.token_bytes - budget_bytes)
    seconds = swap.load_seconds(exposed_bytes)
    if seconds is None:
        return None
    return 2.0 * seconds * (asked.context_tokens + asked.running_tokens) * asked.token_bytes


def _waste_discard(asked: Interception, profile: PrefillProfile) -> float | None:
    tokens = asked.context_tokens
    whole = profile.seconds(0, tokens)
    if whole is None:
        return None
    pieces = -(-tokens // asked.chunk_tokens) if asked.chunk_tokens else 1
    if pieces <= 1:
        return whole * (tokens + asked.running_tokens) * asked.token_bytes
    piece_tokens = round(tokens / pieces)
    middle = profile.seconds((tokens - piece_tokens) // 2, piece_tokens)
    assert middle is not None, "a profile knows all or nothing"
    return (whole * tokens / 2.0 + pieces * middle * asked.running_tokens) * asked.token_bytes
