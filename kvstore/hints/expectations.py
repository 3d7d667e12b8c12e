"""What hints say in the three words that the block table keeps: soon, later, hardly ever.

Coarse on purpose. What a word is worth is learned from what became of the blocks it was said of (blocks.py, DENSITY),
so these bounds only have to tell apart what behaves differently.
"""

from enum import IntEnum
from typing import Final


class Expectation(IntEnum):
    """Of a block's next use. The values are those of `blocks.hint_run`."""

    NONE = 0
    SOON = 1
    LATER = 2
    HARDLY = 3


SOON_S: Final = 120.0
LATER_S: Final = 900.0
SOON_STEPS: Final = 1
LATER_STEPS: Final = 3


def in_seconds(seconds: float | None) -> Expectation:
    """Of what is expected to be used after so long; None: nobody knows."""
    if seconds is None:
        return Expectation.NONE
    if seconds <= SOON_S:
        return Expectation.SOON
    return Expectation.LATER if seconds <= LATER_S else Expectation.HARDLY


def in_steps(steps: int | None) -> Expectation:
    """Of what a step reads that is so many steps away (KVFlow's steps to execution); None: nobody knows."""
    if steps is None:
        return Expectation.NONE
    if steps <= SOON_STEPS:
        return Expectation.SOON
    return Expectation.LATER if steps <= LATER_STEPS else Expectation.HARDLY
