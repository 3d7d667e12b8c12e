"""Turn a log of prompts into a trace that `python -m bench replay` reads; no token leaves this program.

    python clients/examples/make_trace.py < prompts.jsonl > trace.jsonl

Each line of the log has when a request came, in seconds, and the numbers of its tokens; `answer` is how many tokens it
was answered with, and may be missing:

    {"at": 1763700000.25, "tokens": [1, 15043, 29892], "answer": 120}
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

BLOCK_TOKENS = 512  # of the format


def requests_of(log: Iterable[str]) -> list[dict[str, Any]]:
    """The requests of a log, by time. Raises ValueError that names the line."""
    requests = []
    for number, line in enumerate(log, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            requests.append({"answer": 0} | request | {"at": float(request["at"]), "tokens": list(request["tokens"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} is not a request with `at` and `tokens`: {error!r}") from error
    return sorted(requests, key=lambda request: request["at"])


def trace(log: Iterable[str]) -> Iterator[str]:
    """A line of the trace for each of the log. The log may be out of order by a bit. Raises ValueError."""
    requests = requests_of(log)
    numbers: dict[bytes, int] = {}  # of prefixes, as they are first seen
    for request in requests:
        prefix, ids = hashlib.sha256(), []
        tokens = request["tokens"]
        for first in range(0, len(tokens), BLOCK_TOKENS):
            prefix.update(json.dumps(tokens[first : first + BLOCK_TOKENS]).encode())
            ids.append(numbers.setdefault(prefix.digest(), len(numbers)))
        at_ms = round((request["at"] - requests[0]["at"]) * 1000)
        line = {"timestamp": at_ms, "input_length": len(tokens), "output_length": request["answer"]}
        yield json.dumps(line | {"hash_ids": ids})


if __name__ == "__main__":
    try:
        for each in trace(sys.stdin):
            print(each)
    except ValueError as trouble:
        sys.exit(str(trouble))
