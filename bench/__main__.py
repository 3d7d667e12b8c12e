"""`python -m bench NAME [--quick] [--json FILE]`: run one benchmark; its record is the last line of output.

`python -m bench replay ...` and `load ...` take arguments of their own: bench/replay/command.py, bench/load/command.py.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from bench.harness import record, say

NAMES = (
    "hot", "dram", "disk", "readers", "writers", "restart", "peers", "insight", "evictions", "vllm", "codec",
    "placement", "gpu", "remote", "cluster", "swap", "quality",
)  # fmt: skip
APART = ("replay", "load")  # with commands of their own


def main() -> None:
    """Run what was asked for."""
    # Daemons are measured as they are installed: without this, each start would compile Python's sources again (0.6 s).
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if sys.argv[1:2] and sys.argv[1] in APART:
        importlib.import_module(f"bench.{sys.argv[1]}.command").run(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench", epilog="See also: python -m bench replay --help, load --help"
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="small and fast; does not count as a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    parser.add_argument("--emulate", action="store_true", help="gpu: only show that the code runs; measures nothing")
    parser.add_argument("--capture", type=Path, metavar="FILE", help="quality: of this KV, not of the built-in model's")
    parser.add_argument("--save-capture", type=Path, metavar="FILE", help="quality: write the model's KV there")
    options = parser.parse_args()
    if (options.capture or options.save_capture) and options.name != "quality":
        parser.error("captures are for quality")
    if options.emulate and options.name != "gpu":
        parser.error("only gpu can be emulated")
    more: dict[str, object] = {"emulate": True} if options.emulate else {}
    if options.name == "quality":
        more = {"capture": options.capture, "save_capture": options.save_capture}
    results = importlib.import_module(f"bench.{options.name}").run(quick=options.quick, **more)
    for name, value in results.items():
        say(f"{name:40} {value:14.4f}" if isinstance(value, int | float) else f"{name:40} {value}")
    line = record(options.name, results, quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(json.loads(line), indent=1) + "\n")
    print(line)


if __name__ == "__main__":
    main()
