"""How long a pin lasts, in words: what clients and operators may say instead of seconds."""

from enum import StrEnum


class Retention(StrEnum):
    """How long a pin lasts, in the two classes that users of hosted models know."""

    FIVE_MINUTES = "5m"
    ONE_HOUR = "1h"

    @property
    def seconds(self) -> float:
        """The same as a time."""
        return 300.0 if self is Retention.FIVE_MINUTES else 3600.0
