"""Reads traces in the format published with Mooncake (FAST'25): one JSON object a line.

    timestamp       ms since the start, never falling
    input_length    tokens of the prompt
    output_length   tokens of the answer
    hash_ids        prefix-chained ids of blocks of 512 tokens, the last one partly filled; equal id, equal prefix

Other fields are passed over. Sessions and blocks of the answer are not in the format, so requests have no program and
no output keys.
"""

import json
from pathlib import Path
from typing import Final

from bench.replay import profiles
from bench.replay.profiles import Profile
from bench.replay.workload import Model, Request, Workload, keys_of

BLOCK_TOKENS: Final = 512
BLOCK_BYTES: Final = BLOCK_TOKENS * (128 << 10)  # of a model with 128 KiB a token, such as Llama-3.1-8B
_ROOT: Final = -1
_LENGTHS: Final = ("timestamp", "input_length", "output_length")


class TraceError(ValueError):
    """A line that is not of the format. The message begins with file and line."""


def read(path: Path, *, block_bytes: int = BLOCK_BYTES, profile: Profile = profiles.BASE) -> Workload:
    """The whole trace, on one model of these block bytes and this cost. Raises TraceError or OSError."""
    parents: dict[int, int] = {}
    requests: list[Request] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                request = _request(line)
                _check_place(request, parents, requests[-1].at_s if requests else 0.0)
            except ValueError as trouble:
                raise TraceError(f"{path}:{number}: {trouble}") from None
            requests.append(request)
    model = Model(profile.name, BLOCK_TOKENS, block_bytes, profile)
    return Workload(path.stem, (model,), tuple(requests))


def _request(line: str) -> Request:
    """One line. Raises ValueError, of which TraceError and JSONDecodeError are kinds."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TraceError("not an object")
    for name in _LENGTHS:
        if type(fields.get(name)) is not int or fields[name] < 0:
            raise ValueError(f"{name} is not a whole number >= 0")
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 1 << 64 for each in ids):
        raise ValueError("hash_ids is not a list of whole numbers that fit 64 bits")
    tokens = fields["input_length"]
    if len(ids) != -(-tokens // BLOCK_TOKENS):
        raise ValueError(f"{len(ids)} hash_ids for {tokens} tokens in blocks of {BLOCK_TOKENS}")
    return Request(fields["timestamp"] / 1000, 0, keys_of(ids), tokens)


def _check_place(request: Request, parents: dict[int, int], before_s: float) -> None:
    """In time, and in the tree: an id stands for a whole prefix, so the one before it is always the same."""
    if request.at_s < before_s:
        raise ValueError("timestamp is before that of the line above")
    parent = _ROOT
    for key in request.keys.tolist():
        if parents.setdefault(key, parent) != parent:
            raise ValueError(f"hash id {key} follows {parent} here and {parents[key]} in an earlier line")
        parent = key
