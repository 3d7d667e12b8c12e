"""Daemons that follow one another at one home, and blocks that can be made again from their number."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

import kvclient
from bench.dram import open_namespace
from bench.harness import Bytes
from kvclient import Client, Namespace
from kvstored.keep import FdKeeper

PATIENCE_S = 60.0
DIAL_S = 0.002  # between two attempts to connect: what a first hit may come late by
Hit = Callable[[Client], bool]


class Lives:
    """One daemon at a time. A context manager that kills the last one, and ends its keeper."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.runtime_dir = home / "run"
        self._log = home / "log"
        self._command = [
            sys.executable, "-m", "kvstored", "--runtime-dir", str(self.runtime_dir), "--log-level", "warning",
            "--lock", "false", *arguments,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.begun = 0.0

    @property
    def pid(self) -> int:
        """Of the daemon that lives now."""
        assert self._process is not None
        return self._process.pid

    def begin(self) -> None:
        """The next life; `begun` is when. Does not wait for it to serve."""
        assert self._process is None, "one at a time"
        with self._log.open("ab") as log:
            self.begun = time.perf_counter()
            self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=log)

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended as it should."""
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(PATIENCE_S)
        assert code == 0, f"the daemon ended with {code}\n{self.log}"
        self._process = None

    def until(self, is_hit: Hit) -> tuple[float, Client]:
        """Seconds from exec to the first hit, and the client that had it; its to close. RuntimeError without one.

        Dials anew again and again: what a client waits between attempts of its own would count otherwise.
        """
        assert self._process is not None
        while time.perf_counter() < self.begun + PATIENCE_S and self._process.poll() is None:
            client = kvclient.connect(str(self.runtime_dir), timeout_s=PATIENCE_S)
            while client.connected and time.perf_counter() < self.begun + PATIENCE_S:
                if is_hit(client):
                    return time.perf_counter() - self.begun, client
                time.sleep(DIAL_S)
            client.close()
            time.sleep(DIAL_S)
        raise RuntimeError(f"no hit\n{self.log}")

    @property
    def log(self) -> str:
        """The end of it."""
        return self._log.read_text()[-2000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        keeper = FdKeeper(self.runtime_dir, 1.0)
        with suppress(OSError):  # there is none
            keeper.connect()
            keeper.quit()


@dataclass(frozen=True)
class Chains:
    """Chains of blocks of one size, by number: keys and bytes are the same each time, and no page occurs twice."""

    block_bytes: int
    length: int  # blocks of a chain

    @cached_property
    def _base(self) -> Bytes:
        return np.random.default_rng(self.block_bytes).integers(0, 256, self.block_bytes, dtype=np.uint8)

    def keys(self, chain: int) -> list[bytes]:
        """Of one chain."""
        generator = random.Random(self.block_bytes << 32 | chain)
        return [generator.randbytes(32) for _ in range(self.length)]

    def blocks(self, chain: int) -> list[Bytes]:
        """Of one chain: the same random bytes, and in each page the number of the block."""
        whole = np.broadcast_to(self._base, (self.length, self.block_bytes)).copy()
        first = chain * self.length
        whole.view(np.uint64)[:, ::512] = np.arange(first, first + self.length, dtype=np.uint64)[:, None]
        return list(whole)

    def open(self, client: Client) -> Namespace:
        """Their namespace."""
        return open_namespace(client, self.block_bytes)

    def store(self, namespace: Namespace, chain: int, *, wait: bool) -> None:
        """All of a chain, with `wait` until it is published."""
        result = namespace.store(self.keys(chain), self.blocks(chain), wait=wait, space_s=PATIENCE_S)
        assert result.accepted == self.length, result

    def served(self, namespace: Namespace, chain: int) -> tuple[int, int]:
        """Blocks of a chain that come back as they were stored, and those that come back otherwise."""
        blocks = self.blocks(chain)
        with namespace.fetch(self.keys(chain), wait_s=PATIENCE_S, ttl_s=PATIENCE_S) as lease:
            came = [np.frombuffer(view, dtype=np.uint8) for view in lease.views]
            right = sum(np.array_equal(one, block) for one, block in zip(came, blocks, strict=False))
            assert not any(map(np.array_equal, came, blocks[1:])), "this comparison finds nothing out"
            assert lease.valid(), "read too slowly: the lease is over"
        return right, len(came) - right

    def hit(self, chain: int, *, from_disk: bool = False) -> Hit:
        """Does the first block of a chain come back as it was stored?"""
        return hit_of(self.block_bytes, self.keys(chain)[0], self.blocks(chain)[0], from_disk=from_disk)


def hit_of(block_bytes: int, key: bytes, block: Bytes, *, from_disk: bool = False) -> Hit:
    """Does this block come back, with these bytes? Raises AssertionError if it does with others."""

    def is_hit(client: Client) -> bool:
        namespace = open_namespace(client, block_bytes)
        with namespace.fetch([key], wait_s=1.0) as lease:
            if not lease.blocks:
                return False
            assert np.array_equal(np.frombuffer(lease.views[0], dtype=np.uint8), block), "wrong bytes"
            assert not from_disk or lease.tiers.disk == 1, f"{lease.tiers}: it did not come from disk"
        return True

    return is_hit
