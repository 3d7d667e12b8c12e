"""What a user says of the vLLM connector: `kv_connector_extra_config` once, `kv_transfer_params` for each request.

Both are parsed here and nowhere else. Of the first a mistake stops the engine's start with a sentence; of the second it
is logged once and that entry is left out, because a request must not fail for it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from kvclient.integrations.codec_choice import codec_trouble
from kvproto.errors import UsageError
from kvproto.limits import MIB
from kvproto.retention import Retention

_log = logging.getLogger(__name__)

TESTED: Final = ((0, 32), (0, 33))  # versions of vLLM, from the first to the last
PARAMS_KEY: Final = "kvstored"  # of `kv_transfer_params`
PRIORITIES: Final = ("high", "low")
HOUR_S: Final = 3600  # the most that any number may be, or as long in milliseconds
# Of one core, decoding against copying: by NumPy (client_*_out of bench/results/codec.json) and compiled (*_out, and
# `bf16-fixed` copies once more), as slow as the slowest is.
DECODING_SLOWER: Final = 8
COMPILED_SLOWER: Final = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """`kv_connector_extra_config`."""

    runtime_dir: str | None = None  # of the daemon; None looks where `kvclient` does
    tenant: str = ""
    mode: str = "auto"  # how bytes come and go, as of `kvclient.connect`: one copy less where the tenant is trusting
    revision: str = ""  # a name that no other weights of this model have; empty: found out from their files
    lookup_timeout_ms: float = 20.0  # how long the scheduler may wait for an answer
    at_once_mib: float = 32.0  # loads up to this size are done before the forward, larger ones beside it
    layerwise: bool = False  # these fill layer after layer while the forward runs; on a GPU it costs full CUDA graphs
    disk_wait_s: float = 5.0  # how long a request may wait for blocks that come from disk
    store: bool = True  # False: only load
    hold_share: float = 0.25  # of the engine's blocks that finished requests may hold at a time (`hold_s`)
    hold_longest_s: float = 60.0  # that a request may hold its blocks at most, whatever its `hold_s` says
    codec: str = "raw"  # how blocks lie in the store; "auto" takes what pays
    lossy: bool = False  # it may change values
    accelerate: str = ""  # "numba": what encodes is compiled, and several times faster
    any_version: bool = False  # try other versions of vLLM than the tested ones

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Settings":
        """Raises UsageError for an unknown name or an impossible value."""
        known = {each.name: each for each in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise UsageError(f"kv_connector_extra_config has no {name!r}: one of {', '.join(sorted(known))}")
            _check(name, value, getattr(cls(), name))
        made = cls(**given)
        if trouble := codec_trouble(made.codec, lossy=made.lossy, accelerate=made.accelerate):
            raise UsageError(f"kv_connector_extra_config: {trouble}")
        if made.codec != "raw" and made.layerwise:
            raise UsageError(
                'kv_connector_extra_config: "layerwise" copies blocks layer by layer, a codec whole blocks'
            )
        return made

    def where_steps_overlap(self) -> "Settings":
        """These for an engine that plans its next step before this one's failed loads are known.

        What that step computes on them would be taken: a request must not run before its blocks are known to be there.
        """
        if self.layerwise:
            _log.warning(
                'kv_connector_extra_config: "layerwise" does nothing with asynchronous scheduling, where no load goes '
                "on beside its request, and has vLLM run CUDA graphs in pieces all the same: leave it out, or start "
                "vLLM with --no-async-scheduling"
            )
        return replace(self, at_once_mib=0.0, layerwise=False)

    @property
    def at_once_bytes(self) -> int:
        """Of a load, at most, to be done before the forward: of raw blocks, or of encoded ones, which take longer."""
        slower = COMPILED_SLOWER if self.accelerate else DECODING_SLOWER
        return int(self.at_once_mib * MIB / (1 if self.codec == "raw" else slower))


def _check(name: str, value: object, default: object) -> None:
    if isinstance(default, bool):
        fits = isinstance(value, bool)
        kind = "true or false"
    elif isinstance(default, float):
        most = HOUR_S * 1000 if name.endswith("_ms") else HOUR_S
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
        kind = f"a number from 0 to {most}"
    else:
        fits = isinstance(value, str) or (value is None and default is None)
        kind = "a string"
    if not fits:
        raise UsageError(f"kv_connector_extra_config {name!r} must be {kind}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Wishes:
    """`kv_transfer_params["kvstored"]` of one request."""

    load: bool = True
    store: bool = True
    pin_ttl_s: float | None = None  # keep its whole context for so long after it has finished
    retention: str | None = None  # the same as "5m" or "1h"
    hold_s: float = 0.0  # keep its blocks in the engine's own memory for so long after it has finished, room permitting
    priority: str = ""  # "high": its context is needed again soon; "low": hardly, and is not fetched ahead
    program: str = ""  # the agent or conversation it is a turn of
    tool: str = ""  # a tool that the program calls once this request has finished
    tool_expected_s: float | None = None
    program_finished: bool = False
    handed_over_s: float = 0.0  # another engine is computing this prompt: wait so long until all of it is there


_PLAIN: Final = Wishes()


def wishes_of(params: object) -> Wishes:
    """Those of a request. Never raises."""
    given = params.get(PARAMS_KEY) if isinstance(params, Mapping) else None
    if given is None:
        return _PLAIN
    if not isinstance(given, Mapping):
        _log.warning("kv_transfer_params[%r] must be an object, not %r", PARAMS_KEY, given)
        return _PLAIN
    taken: dict[str, Any] = {}
    for name, value in given.items():
        try:
            taken[name] = _READERS.get(name, _unknown)(value)
        except (TypeError, ValueError) as error:
            _log.warning("kv_transfer_params[%r][%r] = %r is left out: %s", PARAMS_KEY, name, value, error)
    return Wishes(**taken)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false was expected")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
        raise ValueError("seconds were expected, a day at most")
    return float(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value.encode()) <= 128:
        raise ValueError("a printable name of at most 128 bytes was expected")
    return value


def _priority(value: object) -> str:
    if value not in PRIORITIES:
        raise ValueError(f"one of {', '.join(PRIORITIES)} was expected")
    return str(value)


def _unknown(_value: object) -> None:
    raise ValueError(f"one of {', '.join(sorted(_READERS))} was expected")


def _retention(value: object) -> str:
    return str(Retention(str(value)).value)


_READERS: Final = {
    "load": _flag, "store": _flag, "pin_ttl_s": _seconds, "retention": _retention, "hold_s": _seconds,
    "priority": _priority, "program": _name, "tool": _name, "tool_expected_s": _seconds, "program_finished": _flag,
    "handed_over_s": _seconds,
}  # fmt: skip


def version_trouble(version: str, *, any_version: bool) -> str:
    """Why this version of vLLM is refused, or nothing."""
    parts = version.split(".")
    try:
        found = int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        found = (-1, -1)
    first, last = TESTED
    if first <= found <= last or any_version:
        return ""
    return (
        f"the connector was tested with vLLM {first[0]}.{first[1]} to {last[0]}.{last[1]}, and this is {version}; "
        'kv_connector_extra_config={"any_version": true} tries it all the same'
    )
