"""Clients that end badly, by the thousand: a small process forks them one after the other, and sees what is left.

    python -m tests.herd RUNTIME_DIR

    a line of input      what it does, and then answers with a line of JSON
    die SEED COUNT       so many clients are killed, each in the middle of something
    leave SEED COUNT     so many are killed whose forked children keep the socket open
    go                   these children end

Each client stores under keys of its own. As soon as it is reaped, a client that lives reserves the same keys: they are
pending until the daemon has taken in that the other one is gone, and granted then, since they were never visible.
"""

import json
import mmap
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvproto import frames
from kvproto.errors import Grant
from kvproto.frames import Hello
from kvproto.limits import PAGE_BYTES
from tests.core import chain
from tests.raw import PATIENCE_S, RawClient, dial

BLOCK_BYTES = 4096
MODEL = "herd"
KEYS = 4  # of a client
SHARED = chain(8, "shared")  # what all of them lease
LEASE_S = 60.0
WAYS = ("hello", "tickets", "half a span", "leases", "waits", "committed")


@dataclass
class Ended:
    """What a batch came to."""

    ways: dict[str, int] = field(default_factory=dict)
    back_ms: list[float] = field(default_factory=list)  # from each one's end until its keys are granted to another
    visible: list[str] = field(default_factory=list)  # keys that were never committed, and are there
    published: int = 0  # blocks that were committed just before: these may be there


def keys_of(seed: int, number: int) -> list[bytes]:
    """Of one client."""
    return chain(KEYS, (seed, number))


def content_of(key: bytes) -> bytes:
    """Of a block that one of them commits."""
    return (key * (BLOCK_BYTES // len(key)))[:BLOCK_BYTES]


def hold(runtime_dir: Path, way: str, keys: Sequence[bytes]) -> RawClient:
    """Be in the middle of something."""
    client = dial(runtime_dir)
    if way == "hello":
        client.send(frames.build_hello(1, Hello(name="herd")))
        return client
    client.hello()
    namespace = client.open(BLOCK_BYTES, model=MODEL)
    if way == "leases":
        client.lease(namespace, SHARED, ttl_s=LEASE_S)
        client.send(frames.build_lease(client.request(), namespace, b"".join(SHARED), 10**9, 0))
    items = client.reserve(namespace, keys)
    assert all(item.grant == Grant.GRANTED for item in items), items
    if way == "waits":  # for its own blocks, which never come
        client.send(frames.build_lease(client.request(), namespace, b"".join(keys), 10**9, 60 * 10**9))
    if way in {"half a span", "committed"}:
        with mmap.mmap(client.fds[1], 0) as ring:
            for item, key in zip(items, keys, strict=True):
                start, content = item.page * PAGE_BYTES, content_of(key)
                written = content if way == "committed" else content[: BLOCK_BYTES // 2]
                ring[start : start + len(written)] = written
    if way == "committed":
        client.send(frames.build(frames.Verb.COMMIT, client.request(), commits=[item.ticket for item in items]))
    return client


class Herd:
    """They and their shepherd."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._observer = dial(runtime_dir)
        self._observer.hello()
        self._namespace = self._observer.open(BLOCK_BYTES, model=MODEL)
        self._open = -1  # while it is, children that keep a socket live
        self._children: list[int] = []

    def die(self, seed: int, count: int) -> Ended:
        """See above."""
        return self._end(seed, count, lambda way, keys: _then_die(lambda: hold(self._runtime_dir, way, keys)))

    def leave(self, seed: int, count: int) -> Ended:
        """See above."""
        read, self._open = os.pipe()

        def begin(way: str, keys: Sequence[bytes]) -> int:
            told, tell = os.pipe()
            pid = _then_die(lambda: self._fork_and_keep(hold(self._runtime_dir, way, keys), read, tell))
            os.close(tell)
            self._children.append(int(os.read(told, 32)))
            os.close(told)
            return pid

        ended = self._end(seed, count, begin)
        os.close(read)
        return ended

    def go(self) -> Ended:
        """See above."""
        handles = [os.pidfd_open(pid) for pid in self._children]
        os.close(self._open)
        for handle in handles:
            _wait_readable(handle)
            os.close(handle)
        self._children.clear()
        return Ended()

    def _fork_and_keep(self, client: RawClient, until: int, tell: int) -> None:
        pid = os.fork()
        if pid:
            os.write(tell, str(pid).encode())
            return
        os.close(tell)
        os.close(self._open)
        os.read(until, 1)
        os._exit(client.socket.fileno() < 0)

    def _end(self, seed: int, count: int, begin: Callable[[str, Sequence[bytes]], int]) -> Ended:
        rng, ended, ways = random.Random(seed), Ended(), Counter[str]()
        for number in range(count):
            way, keys = rng.choice(WAYS), keys_of(seed, number)
            _, status = os.waitpid(begin(way, keys), 0)
            assert os.WIFSIGNALED(status), f"a client that {way}: {status}"
            ways[way] += 1
            self._see(way, keys, ended)
        ended.ways = dict(ways)
        return ended

    def _see(self, way: str, keys: Sequence[bytes], ended: Ended) -> None:
        """Reserve what it had, until nothing is pending any more; and give it back."""
        observer, began_s = self._observer, time.monotonic()
        grants: set[int] = {Grant.PENDING}
        while Grant.PENDING in grants or Grant.BUSY in grants:
            items = observer.reserve(self._namespace, keys)
            grants = {item.grant for item in items}
            mine = [item.ticket for item in items if item.grant == Grant.GRANTED]
            if mine:
                observer.send(frames.build_abort(0, mine))
            assert time.monotonic() < began_s + PATIENCE_S, f"{way}: {grants} for ever"
        ended.back_ms.append(1e3 * (time.monotonic() - began_s))
        if way == "committed":
            ended.published += sum(item.grant == Grant.KNOWN for item in items)
        elif grants != {Grant.GRANTED}:
            ended.visible += [key.hex() for key in keys]


def _wait_readable(handle: int) -> None:
    assert select.select([handle], [], [], PATIENCE_S)[0], "a child goes on for ever"


def _then_die(act: Callable[[], object]) -> int:
    """A child that does this and is killed in the middle of it; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        kept = act()  # what it holds is open to the end
        os.kill(os.getpid(), signal.SIGKILL)
        assert kept, "nobody outlives this"
    except BaseException:  # noqa: BLE001  it must never become a second shepherd
        traceback.print_exc()
    os._exit(1)


def main() -> None:
    """Obey."""
    herd = Herd(Path(sys.argv[1]))
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        verb, *numbers = line.split()
        ended: Ended = getattr(herd, verb)(*map(int, numbers))
        print(json.dumps(asdict(ended)), flush=True)


if __name__ == "__main__":
    main()
