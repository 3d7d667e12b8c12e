"""A process in mode direct that reserves slots, and then writes there whenever it is told to, whoever has them by then.

`python -m tests.direct_writer RUNTIME_DIR BLOCKS [BLOCK_BYTES]`; a line of input each: scribble, hang-up, abort.
It answers each with a line, the first one of its own being "reserved".
"""

import mmap
import os
import sys
from pathlib import Path

from kvproto import frames
from kvproto.errors import Grant
from kvproto.frames import Mode
from tests.raw import RawClient, dial

JUNK = b"\xee"


class Writer:
    """Its slots, mapped writable."""

    def __init__(self, client: RawClient, count: int, block_bytes: int) -> None:
        self.client = client
        self.block_bytes = block_bytes
        items = client.reserve(client.open(block_bytes), [os.urandom(32) for _ in range(count)])
        assert all(item.grant == Grant.GRANTED for item in items), items
        maps = {arena: mmap.mmap(fd, 0) for arena, fd in client.writable().items()}
        self.tickets = [item.ticket for item in items]
        self.slots = [(maps[item.arena], item.page * block_bytes) for item in items]

    def scribble(self) -> None:
        """Write over all of them."""
        for memory, start in self.slots:
            memory[start : start + self.block_bytes] = JUNK * self.block_bytes

    def abort(self) -> None:
        """ABORT, and wait until the daemon has heard of it."""
        self.client.send(frames.build_abort(0, self.tickets))
        self.client.ping()


def main() -> None:
    """Obey."""
    runtime_dir, count = Path(sys.argv[1]), int(sys.argv[2])
    client = dial(runtime_dir)
    welcome = client.hello(modes=(Mode.DIRECT,))
    assert welcome.mode is Mode.DIRECT, welcome.notes
    writer = Writer(client, count, int(sys.argv[3]) if len(sys.argv) > 3 else 65536)
    writer.scribble()
    print("reserved", flush=True)
    for line in sys.stdin:
        {"scribble": writer.scribble, "hang-up": client.close, "abort": writer.abort}[line.strip()]()
        print("done", flush=True)


if __name__ == "__main__":
    main()
