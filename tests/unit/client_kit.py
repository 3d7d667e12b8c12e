"""What the client's tests share: a peer, a client of it, a namespace, blocks to store."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

import kvclient
from tests.peer import PATIENCE_S, Peer

BLOCK_BYTES: Final = 5000  # not a multiple of anything, so that slot and block differ
Blocks = NDArray[np.uint8]
TIMES_S: Final = (0.2, 2.0, PATIENCE_S)


@contextmanager
def client_of(peer: Peer, timeout_s: float = PATIENCE_S) -> Iterator[kvclient.Client]:
    """A connected client."""
    with kvclient.connect(peer.path.parent, timeout_s=timeout_s) as client:
        assert client.wait_connected(PATIENCE_S)  # the calls' own time may be short
        yield client


@contextmanager
def pair(directory: Path, timeout_s: float = PATIENCE_S) -> Iterator[tuple[Peer, kvclient.Namespace]]:
    """A peer, and a namespace of a client of it."""
    with Peer(directory) as peer, client_of(peer, timeout_s) as client:
        yield peer, namespace_of(client)


@contextmanager
def streaming(
    directory: Path, at_once: int, total: int, ready_blocks: int = 0
) -> Iterator[tuple[Peer, kvclient.Namespace, list[bytes], Blocks]]:
    """A peer that has `total` blocks, all but the first `at_once` on disk; a namespace; the keys and the blocks."""
    keys, blocks = keys_of(total), blocks_of(total)
    with Peer(directory) as peer, client_of(peer) as client:
        namespace = namespace_of(client)
        fill(peer, keys, blocks, at_once, ready_blocks)
        yield peer, namespace, keys, blocks


def fill(peer: Peer, keys: list[bytes], blocks: Blocks, at_once: int, ready_blocks: int = 0) -> None:
    """Give a peer blocks, all but the first `at_once` on disk."""

    def put() -> None:
        for key, block in zip(keys, blocks, strict=True):
            peer.put(key, block.tobytes())
        peer.on_disk = set(keys[at_once:])
        peer.ready_blocks = ready_blocks

    peer.do(put)


def wait_until(condition: Callable[[], object]) -> None:
    """Until `condition` holds. Fails after a generous while."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "never came true"
        time.sleep(0.001)  # or the thread that is waited for waits for the GIL


def within(timeout_s: float, client: kvclient.Client, ns: kvclient.Namespace) -> None:
    """From now on calls may take so long: short where no answer comes, and only there."""
    client._connection.timeout_ns = ns._timeout_ns = int(timeout_s * 1e9)


def times(client: kvclient.Client, ns: kvclient.Namespace) -> Iterator[float]:
    """For a call of which some answers must come in time, and one never comes: ever more time, in seconds, while a
    machine is so busy that a call shows nothing. Whoever has seen what is to be shown looks no further.
    """
    for timeout_s in TIMES_S:
        within(PATIENCE_S, client, ns)
        wait_until(lambda: client.ping() is not None)  # who was silent is asked nothing
        within(timeout_s, client, ns)
        yield timeout_s


def namespace_of(client: kvclient.Client, block_bytes: int = BLOCK_BYTES) -> kvclient.Namespace:
    """Some namespace."""
    return client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=block_bytes)


def blocks_of(count: int, seed: int = 1) -> Blocks:
    """Distinct random blocks."""
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK_BYTES), dtype=np.uint8)


def keys_of(count: int, seed: int = 1) -> list[bytes]:
    """A chain of keys. The peer looks at nothing but equality."""
    return [key.tobytes() for key in np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)]


class Stopwatch:
    """Asserts that a block of code took no longer than it may."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        took_s = time.monotonic() - self._began
        assert took_s <= self._most_s, f"took {took_s:.3f} s, more than {self._most_s}"
