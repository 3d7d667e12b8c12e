"""Arguments of verbs, checked before anything is sent. All raise UsageError for what no daemon could accept."""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Final

from kvclient import flows
from kvproto.errors import UsageError
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME, PIN_TTL_NS_MAX
from kvproto.policy_frames import REMOTE, UNKNOWN, Tier
from kvproto.retention import Retention

NAME_CHARS: Final = 128
TIERS: Final = {tier.name.lower(): tier for tier in Tier}
EXPECTATIONS: Final = {"soon": 1, "later": 2, "hardly": 3}


def name_of(what: str, name: str) -> str:
    """A name of a program, tool, workflow, run, step or source: printable, 1 to 128 characters."""
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS or not name.isprintable():
        raise UsageError(f"{what} must be a printable name of 1 to {NAME_CHARS} characters, not {name!r:.200}")
    return name


def tier_of(name: str) -> Tier:
    """One of "dram", "disk", "hbm"."""
    tier = TIERS.get(name) if isinstance(name, str) else None
    if tier is None:
        raise UsageError(f"tier must be one of {', '.join(TIERS)}, not {name!r}")
    return tier


def prefetch_tier_of(name: str) -> int:
    """As `tier_of`, or "remote"."""
    return REMOTE if name == "remote" else tier_of(name)


def duration(what: str, seconds: float) -> float:
    """A time in seconds, positive and finite."""
    length_s = amount(what, seconds)
    if not length_s:
        raise UsageError(f"{what} must be a positive number of seconds, not {seconds!r}")
    return length_s


def duration_if_known(what: str, seconds: float | None) -> float:
    """As `duration`; None is a time that nobody knows."""
    return UNKNOWN if seconds is None else duration(what, seconds)


def amount(what: str, number: object) -> float:
    """0 or more, and finite."""
    try:
        value = float(number) if isinstance(number, Real) and not isinstance(number, bool) else math.nan
    except OverflowError:
        value = math.inf
    if not 0 <= value < math.inf:
        raise UsageError(f"{what} must be a finite number, 0 or more, not {number!r:.200}")
    return value


def whole(what: str, number: int, least: int = 0) -> int:
    """A whole number that fits a frame."""
    try:
        value = operator.index(number) if not isinstance(number, bool) else -1
    except TypeError:
        value = -1
    if not least <= value < 1 << 63:
        raise UsageError(f"{what} must be a whole number, {least} or more, not {number!r:.200}")
    return value


def expectation_of(seconds: "float | str | None") -> tuple[int, float]:
    """When blocks are needed next, as it travels: one of three words, or a time in seconds, or neither."""
    if isinstance(seconds, str):
        if seconds not in EXPECTATIONS:
            raise UsageError(f"expected in seconds, or one of {', '.join(EXPECTATIONS)}, not {seconds!r:.200}")
        return EXPECTATIONS[seconds], UNKNOWN
    return 0, duration_if_known("seconds", seconds)


def hinted_keys(keys: Sequence[bytes]) -> bytes:
    """The keys that a hint has room for: the first 1,024."""
    try:
        first = keys[:KEYS_PER_FRAME]
    except (TypeError, KeyError) as error:  # of a set, a generator, a dict
        what = f"keys must be a sequence of {KEY_BYTES}-byte bytes objects, not a {type(keys).__name__}"
        raise UsageError(what) from error
    return flows.join_keys(first)


def pin_ttl_ns(ttl_s: float | None, retention: "Retention | str | None") -> int:
    """How long a pin is to last: a time, or a class, but one of them."""
    if (ttl_s is None) == (retention is None):
        raise UsageError("a pin needs either ttl_s, in seconds, or a retention: '5m' or '1h'")
    if retention is not None:
        try:
            ttl_s = Retention(retention).seconds
        except ValueError as error:
            raise UsageError(f"retention must be '5m' or '1h', not {retention!r}") from error
    assert ttl_s is not None
    ttl_ns = flows.nanoseconds("ttl_s", ttl_s, least_ns=1)
    if ttl_ns > PIN_TTL_NS_MAX:
        raise UsageError(f"ttl_s must be at most {PIN_TTL_NS_MAX // 10**9}, not {ttl_s}")
    return ttl_ns
