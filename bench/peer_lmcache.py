"""LMCache's server with its `fs_native` tier, driven by its own bench client. Run by its own interpreter, by `peers`.

For each line of input, `write` or `read`, prints the seconds of 100 chunks of 2 MiB. Imports nothing of ours.
"""

import functools
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHUNKS = 100
CHUNK_BYTES = 2 << 20
START_S = 60.0
SHAPE = f"(2,{CHUNKS + 28},16,8,128):float16:32"  # 16 tokens of 32 layers, 8 heads of 128, keys and values: 2 MiB


class Peer:
    """One server at a time, over one directory."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._disk = home / "l2"
        self._disk.mkdir()
        self._port, self._http_port = free_port(), free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._written = 0
        self._checksums: list[str] = []
        helpers = importlib.import_module("lmcache.cli.commands.bench.server_bench.helpers")
        poll = "_poll_prefetch_status"  # asks every 50 ms otherwise, half of what is measured
        setattr(helpers, poll, functools.partial(getattr(helpers, poll), max_polls=30_000, poll_interval=0.001))

    def restart(self) -> None:
        """A server that has nothing in memory, and a client."""
        self.end()
        tier = {"type": "fs_native", "base_path": str(self._disk), "use_odirect": True, "num_workers": 4}
        command = [
            str(Path(sys.executable).with_name("lmcache")), "server", "--l1-size-gb", "1", "--eviction-policy", "LRU",
            "--chunk-size", "16", "--port", str(self._port), "--http-port", str(self._http_port),
            "--shm-name", f"bench-{self._port}", "--no-l1-use-lazy", "--supported-transfer-mode", "auto",
            "--disable-observability", "--l2-adapter", json.dumps(tier),
        ]  # fmt: skip
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not listens(self._port):
            if time.monotonic() > until or self._server.poll() is not None:
                raise RuntimeError(f"lmcache server does not start: {(self._home / 'log').read_text()[-500:]}")
            time.sleep(0.05)
        config = importlib.import_module("lmcache.cli.commands.bench.server_bench.config").BenchConfig(
            rpc_url=f"tcp://localhost:{self._port}", http_url=f"http://localhost:{self._http_port}", mode="cpu",
            transfer_mode="engine_driven", tp_size=1, use_mla=False, num_tokens=16 * CHUNKS, kvcache_shape_spec=SHAPE,
            num_blocks=CHUNKS, block_size=16,
        )  # fmt: skip
        module = importlib.import_module("lmcache.cli.commands.bench.server_bench.client")
        self._client = module.ServerBenchClient(config, lambda _: None)
        self._client.start()

    def write(self) -> float:
        """Seconds from STORE until all files are there; nobody syncs them."""
        if self._client is None:
            self.restart()
        request = self._client.create_request(self._written, f"write-{self._written}", "write")
        if not self._written:
            self._checksums = self._client.compute_checksums(request, 0, 16 * CHUNKS)
        self._written += 1
        begun = time.perf_counter()
        result = self._client.store(request, 0, 16 * CHUNKS)
        assert result.succeeded, result
        while self._files() < self._written * CHUNKS:
            assert time.perf_counter() < begun + START_S, f"{self._files()} files were written"
            time.sleep(0.002)
        seconds = time.perf_counter() - begun
        self._client.end_session(request)
        return seconds

    def read(self) -> float:
        """Seconds from LOOKUP to the end of RETRIEVE, by a server that was just started."""
        self.restart()
        self._empty()
        request = self._client.create_request(0, f"read-{time.monotonic_ns()}", "read")
        assert self._client.compute_checksums(request, 0, 16 * CHUNKS) != self._checksums, "no bytes were cleared"
        begun = time.perf_counter()
        found = self._client.lookup(request)
        assert found.is_full_hit, found
        result = self._client.retrieve(request, 0, 16 * CHUNKS)
        seconds = time.perf_counter() - begun
        assert result.succeeded, result
        assert self._client.compute_checksums(request, 0, 16 * CHUNKS) == self._checksums, "other bytes came back"
        self._client.end_session(request)
        return seconds

    def end(self) -> None:
        """Nothing of it runs any more."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def _empty(self) -> None:
        for worker in vars(self._client)["_workers"]:
            for tensor in worker.kv_caches.values():
                tensor.zero_()

    def _files(self) -> int:
        return sum(each.stat().st_size >= CHUNK_BYTES for each in self._disk.glob("*.data"))


def free_port() -> int:
    """One that nobody uses right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Does anybody answer there?"""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """What `peers` asks for, until it closes its end."""
    os.environ |= {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "ERROR"}
    peer = Peer(Path(sys.argv[1]))
    try:
        for line in sys.stdin:
            seconds = peer.write() if line.strip() == "write" else peer.read()
            print(f"seconds {seconds}", flush=True)
    finally:
        peer.end()


if __name__ == "__main__":
    main()
