"""What hints say in the seven words that the block table keeps, from "at once" to "hardly ever".

Coarse on purpose. What a word is worth is learned from what became of the blocks it was said of (blocks.py, DENSITY),
so these bounds only have to tell apart what behaves differently: a turn that the model is at has a word of its own, and
so has what the next step reads.
"""

from bisect import bisect_left
from enum import IntEnum
from typing import Final


class Expectation(IntEnum):
    """Of a block's next use. The values are those of `blocks.hint_run`."""

    NONE = 0
    AT_ONCE = 1
    SOON = 2
    THINKING = 3  # its program is at a turn, and usually goes on
    NEXT_STEP = 4
    LATER = 5
    FAR = 6
    HARDLY = 7


# Up to so many seconds, and up to so many steps.
_SECONDS: Final = (15.0, 120.0, 900.0, 3600.0)
_IN_SECONDS: Final = (Expectation.AT_ONCE, Expectation.SOON, Expectation.LATER, Expectation.FAR, Expectation.HARDLY)
_STEPS: Final = (0, 1, 3)
_IN_STEPS: Final = (Expectation.SOON, Expectation.NEXT_STEP, Expectation.LATER, Expectation.FAR)
# The words of EXPECT on the wire.
SAID: Final = (Expectation.NONE, Expectation.SOON, Expectation.LATER, Expectation.HARDLY)


def in_seconds(seconds: float | None) -> Expectation:
    """Of what is expected to be used after so long; None: nobody knows."""
    return Expectation.NONE if seconds is None else _IN_SECONDS[bisect_left(_SECONDS, seconds)]


def in_steps(steps: int | None) -> Expectation:
    """Of what a step reads that is so many steps away (KVFlow's steps to execution); None: nobody knows."""
    return Expectation.NONE if steps is None else _IN_STEPS[bisect_left(_STEPS, steps)]
