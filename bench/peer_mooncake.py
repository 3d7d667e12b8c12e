"""Mooncake Store with its SSD offload, embedded in its client. Run by its own interpreter, by `peers`.

For each line of input, `write` or `read`, prints the seconds of 100 objects of 2 MiB. Imports nothing of ours.
"""

import importlib
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

OBJECTS = 100
OBJECT_BYTES = 2 << 20
PATIENCE_S = 60.0
LEASE_MS = 50  # of what was asked about; 5 s otherwise, in which nothing of it gives way
SEGMENT_BYTES = 320 << 20  # of memory: one set and a part of another one


class Peer:
    """A master, and a client that owns the memory and the files."""

    def __init__(self, home: Path) -> None:
        self._disk = home / "ssd"
        self._disk.mkdir()
        port, metrics_port = free_port(), free_port()
        master = Path(sys.executable).with_name("mooncake_master")
        with (home / "log").open("ab") as log:
            self._master = subprocess.Popen(
                [
                    master, "-rpc_port", str(port), "-metrics_port", str(metrics_port), "-enable_offload=true",
                    "-default_kv_lease_ttl", str(LEASE_MS),
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        self._store: Any = None
        self._port = port

    def start(self) -> None:
        """Connect. Raises AssertionError if it cannot be set up."""
        time.sleep(2.0)  # for the master
        self._store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
        code = self._store.setup(
            {
                "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "tcp", "rdma_devices": "",
                "global_segment_size": str(SEGMENT_BYTES), "local_buffer_size": str(SEGMENT_BYTES),
                "master_server_addr": f"127.0.0.1:{self._port}", "enable_ssd_offload": "true",
                "ssd_offload_path": str(self._disk),
            }
        )  # fmt: skip
        assert code == 0, f"setup: {code}"
        self._buffer = np.frombuffer(mmap.mmap(-1, OBJECTS * OBJECT_BYTES), dtype=np.uint8)
        self._buffer[:] = 1
        base = self._buffer.ctypes.data
        self._addresses = [base + i * OBJECT_BYTES for i in range(OBJECTS)]
        code = self._store.register_buffer(base, self._buffer.size)
        assert code == 0, f"register_buffer: {code}"
        self._content = np.random.default_rng(1).integers(0, 256, self._buffer.size, dtype=np.uint8)
        self._sets = 0
        self._fillers = 0
        self._keys: list[str] = []

    def write(self) -> float:
        """Seconds from put until all objects lie in files; nobody syncs them."""
        self._keys = [f"set-{self._sets}-{i}" for i in range(OBJECTS)]
        self._sets += 1
        self._buffer[:] = self._content
        begun = time.perf_counter()
        left = list(range(OBJECTS))
        while left:  # a put that finds memory full is refused, and what is evicted then makes room
            codes = self._put([self._keys[i] for i in left], [self._addresses[i] for i in left])
            left = [i for i, code in zip(left, codes, strict=True) if code]
            assert time.perf_counter() < begun + PATIENCE_S, f"not put: {set(codes)}"
        while self._replicas("local_disk") < OBJECTS:
            assert time.perf_counter() < begun + PATIENCE_S, f"{self._replicas('local_disk')} objects were written"
            time.sleep(0.002)
        return time.perf_counter() - begun

    def read(self) -> float:
        """Seconds of one batched get, when none of the objects is in memory any more."""
        self._push_out()
        self._forget_pages()
        self._buffer[:] = 0
        begun = time.perf_counter()
        counts = self._store.batch_get_into(self._keys, self._addresses, [OBJECT_BYTES] * OBJECTS)
        seconds = time.perf_counter() - begun
        assert set(counts) == {OBJECT_BYTES}, f"not all came: {set(counts)}"
        assert np.array_equal(self._buffer, self._content), "other bytes came back than were stored"
        return seconds

    def _put(self, keys: list[str], addresses: list[int]) -> list[int]:
        codes: list[int] = self._store.batch_put_from(keys, addresses, [OBJECT_BYTES] * len(keys))
        return codes

    def _push_out(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while (there := self._replicas("memory")) > 0:  # which leases them anew
            assert time.monotonic() < until, f"{there} objects stay in memory"
            for _ in range(SEGMENT_BYTES // (8 * OBJECT_BYTES)):
                self._put([f"filler-{self._fillers + i}" for i in range(8)], self._addresses[:8])
                self._fillers += 8
                time.sleep(LEASE_MS / 1000)

    def _replicas(self, kind: str) -> int:
        described = self._store.batch_get_replica_desc(self._keys)
        return sum(any(getattr(one, f"is_{kind}_replica")() for one in described.get(key, [])) for key in self._keys)

    def _forget_pages(self) -> None:
        """Its files may be in the page cache; what is measured is the drive."""
        for path in self._disk.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def end(self) -> None:
        """Nothing of it runs any more."""
        if self._store is not None:
            self._store.close()
        self._master.kill()
        self._master.wait()


def free_port() -> int:
    """One that nobody uses right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def main() -> None:
    """What `peers` asks for, until it closes its end."""
    os.environ |= {
        "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
        "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "file_per_key_storage_backend",
    }
    peer = Peer(Path(sys.argv[1]))
    try:
        peer.start()
        for line in sys.stdin:
            seconds = peer.write() if line.strip() == "write" else peer.read()
            print(f"seconds {seconds}", flush=True)
    finally:
        peer.end()


if __name__ == "__main__":
    main()
