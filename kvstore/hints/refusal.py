"""Why a hint is not taken. A refusal is a value: hints are advice, and no advice is worth an exception."""

from dataclasses import dataclass
from enum import Enum

from kvstore.hints.limits import NAME_CHARS, SECOND_NS


class Refusal(Enum):
    """What was wrong with it."""

    NAME = "the name is empty, too long or not printable"
    TIME = "the time is not a number, not positive or too long"
    UNKNOWN = "there is no program, workflow, run or step of that name, or there no longer is"
    NO_TOOL = "no tool is running"
    FULL = "the tenant has as many as it may"
    OLD = "a later version is known"
    FORM = "the description has not the right form"
    CHANCE = "the chances of a branch are not numbers above 0 that add up to 1"
    TWICE = "a name or an edge is there twice"
    ENDLESS = "a cycle has no exit"
    LARGE = "too large"
    NO_CHAIN = "the keys do not continue each other"
    DAMAGED = "the bytes are not what was written, or of another version"


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to a hint that changes nothing. `what`: the name it is about, cut short, or nothing."""

    refusal: Refusal
    what: str = ""


def is_name(name: str) -> bool:
    """May this name a thing? Printable text can be written down, and shown to an operator."""
    return 0 < len(name) <= NAME_CHARS and name.isprintable()


def shown(name: str) -> str:
    """A name for a refusal, whatever it holds."""
    return ascii(name[:NAME_CHARS])[1:-1][:NAME_CHARS]


def duration_ns(seconds: float, most_s: int) -> int | None:
    """Nanoseconds, if it is a positive time of at most that long. NaN and infinities are not."""
    return max(1, int(seconds * SECOND_NS)) if 0 < seconds <= most_s else None
