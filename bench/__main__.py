"""`python -m bench NAME [--quick] [--json FILE]`: run one benchmark; its record is the last line of output.

`python -m bench replay ...` takes arguments of its own: bench/replay/command.py.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from bench.harness import record, say

NAMES = ("hot", "dram", "disk", "readers", "restart", "peers", "insight", "evictions", "vllm", "codec")


def main() -> None:
    """Run what was asked for."""
    if sys.argv[1:2] == ["replay"]:
        importlib.import_module("bench.replay.command").run(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m bench", epilog="See also: python -m bench replay --help")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="small and fast; does not count as a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    options = parser.parse_args()
    results = importlib.import_module(f"bench.{options.name}").run(quick=options.quick)
    for name, value in results.items():
        say(f"{name:40} {value:14.4f}" if isinstance(value, int | float) else f"{name:40} {value}")
    line = record(options.name, results, quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(json.loads(line), indent=1) + "\n")
    print(line)


if __name__ == "__main__":
    main()
