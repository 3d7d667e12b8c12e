"""What programs and workflows say of when blocks are used next, as the words that the block table keeps.

    a tool starts        how long such tools took so far, or (nothing being learned) how long the caller says
    a turn begins        that it is under way; or hardly, where turns of such a step seldom go on
    a tool ends          at once
    a visit ends         hardly, of what no step reads (visits.py)
    a program ends       hardly, likewise
    a step begins        of what its run's steps begin with: the steps to the nearest one that reads it, over all runs
    a run ends           the same where another run is bound to it, else hardly

A step goes on from what it kept, but so long after that a word on it was worth less than what is learned without.

The lab replays this mapping too (bench/replay/hinted.py), so what it measures is what the daemon does.
"""

from dataclasses import dataclass

from kvstore.hints.chains import Chain, Chains
from kvstore.hints.expectations import Expectation, in_seconds, in_steps
from kvstore.hints.gaps import Gaps
from kvstore.hints.limits import SECOND_NS


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the block table what is expected of each block of a chain. `levels`: a byte a block, an Expectation."""

    chain: Chain
    levels: bytes


def of_all(chain: Chain, expected: Expectation) -> Say:
    """The same of every block."""
    return Say(chain, bytes([expected]) * chain.length)


def of_tool(gaps: Gaps, tool: str, expected_s: float | None) -> Expectation:
    """Of the context of whoever waits for a tool. What was learned wins over what the caller says: callers guess."""
    likely_ns = gaps.likely_ns(tool)
    return in_seconds(expected_s if likely_ns is None else likely_ns / SECOND_NS)


def by_steps(
    chains: Chains, chain: Chain, beginning: int, otherwise: Expectation, kept: Expectation = Expectation.NONE
) -> Say:
    """Of the first `beginning` blocks by the nearest step of any run that reads them; of the rest `kept` where a step
    does. `otherwise` of what no step is known to read.
    """
    leasts = chains.leasts(chain)
    levels = {least: in_steps(least) or otherwise for least in set(leasts)}
    first = bytes(map(levels.__getitem__, leasts[:beginning]))
    return Say(chain, first + bytes(otherwise if least is None else kept for least in leasts[beginning:]))
