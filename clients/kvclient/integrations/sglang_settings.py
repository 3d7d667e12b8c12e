"""What a user says of the SGLang backend: entries of `--hicache-storage-backend-extra-config`.

They are parsed here and nowhere else; a mistake stops the engine's start with a sentence. SGLang keeps entries of its
own in the same object, which are let through (`HICACHE`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from kvclient.integrations.codec_choice import codec_trouble
from kvproto.errors import UsageError

TESTED: Final = ((0, 5, 23), (0, 5, 23))  # versions of SGLang, from the first to the last
HICACHE: Final = frozenset({
    "backend_name", "module_path", "class_name", "interface_v1", "prefetch_threshold", "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token", "hicache_storage_pass_prefix_keys", "tp_lcm_size",
})  # fmt: skip
# SGLang gives up on its storage threads ten seconds after it asks them to end.
MOST: Final = {"lookup_timeout_ms": 5000.0, "transfer_timeout_ms": 5000.0, "disk_wait_s": 4.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """Ours."""

    runtime_dir: str | None = None  # of the daemon; None looks where `kvclient` does
    tenant: str = ""
    revision: str = ""  # a name that no other weights of this model have; empty: found out from their files
    lookup_timeout_ms: float = 100.0  # how long a lookup may wait for the daemon's answer
    transfer_timeout_ms: float = 1000.0  # how long a load or a save may wait for one
    disk_wait_s: float = 2.0  # how long a load may wait for pages that come from disk
    store: bool = True  # False: only load
    images: bool = False  # use the store for a model that takes images and the like: all requests name them right
    codec: str = "raw"  # how pages lie in the store; "auto" takes what pays
    lossy: bool = False  # it may change values
    accelerate: str = ""  # "numba": what encodes is compiled, and several times faster
    any_version: bool = False  # try other versions of SGLang than the tested ones

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "Settings":
        """Raises UsageError for an unknown name or an impossible value."""
        ours = {name: value for name, value in (given or {}).items() if name not in HICACHE}
        known = {each.name for each in fields(cls)}
        for name, value in ours.items():
            if name not in known:
                raise UsageError(f"the extra config has no {name!r}: one of {', '.join(sorted(known | HICACHE))}")
            if wanted := _misfit(name, value, getattr(cls(), name)):
                raise UsageError(f"{name!r} of the extra config must be {wanted}, not {value!r}")
        made = cls(**ours)
        if trouble := codec_trouble(made.codec, lossy=made.lossy, accelerate=made.accelerate):
            raise UsageError(f"the extra config: {trouble}")
        return made


def _misfit(name: str, value: object, default: object) -> str:
    """What belongs there, or nothing if this does."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, float):
        least, most = (1.0 if name.endswith("_ms") else 0.0), MOST[name]
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        return "" if fits else f"a number from {least:g} to {most:g}"
    return "" if isinstance(value, str) or value is default is None else "a string"


def version_trouble(version: str, *, any_version: bool) -> str:
    """Why this version of SGLang is refused, or nothing."""
    try:
        found = tuple(int(part) for part in version.split(".")[:3])
    except ValueError:
        found = ()
    first, last = TESTED
    if any_version or first <= found <= last:
        return ""
    spans = ".".join(map(str, first)) + ("" if first == last else f" to {'.'.join(map(str, last))}")
    return (
        f"the backend was tested with SGLang {spans}, and this is {version}; "
        '"any_version": true in the extra config tries it all the same'
    )
