"""Loads that are done although computing is said to be faster, so that what the daemon knows of loading stays true.

What nobody loads nobody times: without these, a few slow loads at a bad moment would be believed for ever, by every
engine of the tenant.
"""

from itertools import count
from typing import Final

TRIED_ANYWAY: Final = 16  # of so many loads that do not pay one is done


class Trials:
    """One engine's. Any thread."""

    def __init__(self) -> None:
        self._declined = count(1)  # loads that do not pay

    def due(self) -> bool:
        """Of one more load that does not pay: is it done anyway?"""
        return next(self._declined) % TRIED_ANYWAY == 0
