"""SGLang's hierarchical cache in a process of its own, for tests: its host memory, its backend factory and its threads.

The whole server wants a GPU; what lies between an engine's memory and a storage backend runs on CPU, unchanged.
`HicacheProcess` runs `hicache_program` in the environment that `make engines` makes, and speaks with it in lines of
JSON. This file imports nothing but the standard library.
"""

import hashlib
import os
from pathlib import Path
from random import Random
from typing import Final

from bench.engines import ROOT, STAMP, VllmProcess

FOLDER = ROOT / ".venv-sglang"
FOLDER_VARIABLE = "BENCH_SGLANG"  # another environment, whatever is in it
VERSIONS = {"torch": "2.13.0", "sglang": "0.5.23"}
MISSING = "the SGLang environment is missing: make engines"


class HicacheProcess(VllmProcess):
    """As `VllmProcess`, with what `hicache_program` is told first for `engine`, and its commands."""

    program = "bench.engines.hicache_program"


VALUES: Final = "values of "


def page_of(content: str, number: int, page_bytes: int) -> bytes:
    """The bytes that `hicache_program` puts into a page: any; bfloat16 from 1/128 to 2 for a content of values."""
    made = bytearray(Random(f"{content} {number}").randbytes(page_bytes))
    if content.startswith(VALUES):
        made[1::2] = bytes(byte & 0x83 | 0x3C for byte in made[1::2])
    return bytes(made)


def digest_of(page: bytes) -> str:
    """What it tells of a page instead of its bytes."""
    return hashlib.sha256(page).hexdigest()[:16]


def find_sglang() -> Path | None:
    """The python of the environment with SGLang; None where there is none, and `why_not` says why."""
    return None if why_not() else _folder() / "bin" / "python"


def why_not() -> str:
    """Why `find_sglang` finds nothing; empty where it does."""
    folder = _folder()
    stamp = folder / STAMP
    if not (folder / "bin" / "python").exists():
        return MISSING
    if FOLDER_VARIABLE in os.environ:
        return ""
    if not stamp.exists():
        return f"{MISSING} (it is half made)"
    return "" if stamp.read_text() == stamp_text() else f"{MISSING} (it holds other versions)"


def stamp_text() -> str:
    """What a finished environment holds in its stamp: the versions."""
    return "".join(f"{name}=={version}\n" for name, version in VERSIONS.items())


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
