"""A program for tests: memory with a keeper, patterns in it, and a report on what a predecessor left.

    python kept_program.py RUNTIME_DIR ARENAS keep|systemd|nobody PATIENCE_S

It prints one line of JSON, says READY=1, and then serves `flush` until it is killed or its stdin ends.
"""

import json
import os
import queue
import select
import sys
from pathlib import Path

from kvproto.limits import PAGE_BYTES
from kvstored import keep
from kvstored.memory import HostMemory

ARENA_BYTES = 16 * PAGE_BYTES
TABLE_BYTES = 64 << 10


def main() -> None:
    """Each life checks all arenas, recycles the oldest one if there is one, and makes another."""
    runtime_dir, arenas, wish, patience_s = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    notifier = keep.notifier_of(os.environ)
    kept, keeper = keep.kept_descriptors(runtime_dir, os.environ, notifier, keep=wish == "keep", patience_s=patience_s)
    punched: queue.Queue[int] = queue.Queue()
    memory = HostMemory(arenas, ARENA_BYTES, prefault=True, lock=False, punched=punched.put, keeper=keeper)
    memory.adopt(kept)
    found = sorted(memory.kept_arenas())
    warm = memory.kept_table("book") is not None
    if not warm:
        memory.drop_kept()
    book = memory.table("book", TABLE_BYTES).view("u8")  # lives, first arena, next arena
    for arena in found if warm else ():
        memory.take_arena(arena)
    memory.drop_kept()
    memory.start()
    expected = list(range(int(book[1]), int(book[2])))
    wrong = [arena for arena in expected if arena in found and not (memory.view(arena) == arena % 251).all()]
    if warm:
        memory.punch_arena(int(book[1]))
        memory.close_arena(punched.get(timeout=10))
        book[1] += 1
        _make(memory, int(book[2]))
    else:
        book[1] = 1
        for arena in range(1, arenas + 1):
            _make(memory, arena)
        book[2] = arenas
    book[0] += 1
    book[2] += 1
    keeper.flush(10.0)
    report = {"warm": warm, "lives": int(book[0]), "found": found == expected, "arenas": len(found), "wrong": wrong}
    report |= {"pending": keeper.pending, "faults": keeper.faults, "populated": memory.populated_bytes}
    line = json.dumps(report)
    print(line, flush=True)
    notifier.notify(f"STATUS={line}\nREADY=1")
    while not select.select([0], [], [], 0.05)[0] or wish == "systemd":
        keeper.flush()
        notifier.flush()
    memory.stop()


def _make(memory: HostMemory, arena: int) -> None:
    assert memory.new_arena(arena, ARENA_BYTES)
    memory.view(arena)[:] = arena % 251


if __name__ == "__main__":
    main()
