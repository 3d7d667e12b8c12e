"""Replay seeds: `python -m tests.sim SEED [SEED ...]`, or `python -m tests.sim FIRST..LAST`."""

import sys

from tests.sim.world import World


def main() -> None:
    """Live each seed, and say what it went through."""
    for argument in sys.argv[1:]:
        first, _, last = argument.partition("..")
        for seed in range(int(first), int(last or first) + 1):
            print(f"seed {seed}", flush=True)
            print(World(seed).live())


if __name__ == "__main__":
    main()
