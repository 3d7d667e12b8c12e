"""Mooncake Store in processes of its own, for tests and benchmarks: a master, and a store that gives memory, over TCP.

`make engines` makes the environment (185 MB); where libibverbs is not installed, Debian's is unpacked beside it, which
takes no root. This file imports nothing but the standard library.
"""

import ctypes.util
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.engines import ROOT, STAMP

FOLDER = ROOT / ".venv-mooncake"
FOLDER_VARIABLE = "BENCH_MOONCAKE"  # another environment, whatever is in it
VERSIONS = {"mooncake-transfer-engine-non-cuda": "0.3.13.post1"}
LIBRARIES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")  # Debian's
DEBIAN = "debian"  # the folder in which they are unpacked
MISSING = "the Mooncake environment is missing: make engines"
START_S = 60.0
LEASE_MS = 2000  # of what was asked about; 10 s unless said, in which nothing of it gives way
CLIENT_TTL_S = 2  # a store that is silent for longer is forgotten, with all that it has


def find_mooncake() -> Path | None:
    """The python of the environment with Mooncake; None where there is none, and `why_not` says why."""
    return None if why_not() else _folder() / "bin" / "python"


def why_not() -> str:
    """Why `find_mooncake` finds nothing; empty where it does."""
    folder = _folder()
    stamp = folder / STAMP
    if not (folder / "bin" / "python").exists():
        return MISSING
    if FOLDER_VARIABLE in os.environ:
        return ""
    if not stamp.exists():
        return f"{MISSING} (it is half made)"
    return "" if stamp.read_text() == stamp_text() else f"{MISSING} (it holds other versions)"


def stamp_text() -> str:
    """What a finished environment holds in its stamp: the versions."""
    return "".join(f"{name}=={version}\n" for name, version in VERSIONS.items())


def environment() -> dict[str, str]:
    """What processes need that load Mooncake: where libibverbs is, if it is not installed."""
    if ctypes.util.find_library("ibverbs"):
        return {}
    folders = {str(path.parent) for path in (_folder() / DEBIAN).rglob("*.so.*")}
    return {"LD_LIBRARY_PATH": os.pathsep.join(sorted(folders))}


class Mooncake:
    """A master and a store. Serving once made; a context manager that kills them on the way out.

    `store_bytes`: what the store gives. Raises RuntimeError, with the end of the log, if they do not serve in time.
    """

    def __init__(
        self, python: Path, *, log_file: Path, store_bytes: int, lease_ms: int = LEASE_MS,
        client_ttl_s: int = CLIENT_TTL_S,
    ) -> None:  # fmt: skip
        self._programs = python.parent
        self._log_file = log_file
        self._store_bytes = store_bytes
        self._lease_ms = lease_ms
        self._client_ttl_s = client_ttl_s
        self._port, self._metrics_port, self._store_port = _free_ports(3)
        self.master: subprocess.Popen[bytes] | None = None
        self.store: subprocess.Popen[bytes] | None = None
        try:
            self.start_master()
            self.start_store()
        except BaseException:
            self.kill()
            raise

    @property
    def address(self) -> str:
        """HOST:PORT of the master."""
        return f"127.0.0.1:{self._port}"

    def start_master(self) -> None:
        """A new one knows nothing of what the one before knew. Raises RuntimeError."""
        self.master = self._run(
            "mooncake_master", "-rpc_address", "127.0.0.1", "-rpc_port", str(self._port), "-metrics_host", "127.0.0.1",
            "-metrics_port", str(self._metrics_port), "-default_kv_lease_ttl", str(self._lease_ms), "-client_ttl",
            str(self._client_ttl_s),
        )  # fmt: skip
        self._await(self._port, self.master)

    def start_store(self) -> None:
        """One that has nothing yet. Raises RuntimeError."""
        self.store = self._run(
            "mooncake_client", "-host", "127.0.0.1", "-port", str(self._store_port), "-master_server_address",
            self.address, "-metadata_server", "P2PHANDSHAKE", "-global_segment_size", f"{self._store_bytes >> 20} MB",
        )  # fmt: skip
        self._await(self._store_port, self.store)

    def kill_master(self) -> None:
        """`kill -9`, and wait until it is gone."""
        _kill(self.master)

    def kill_store(self) -> None:
        """`kill -9`, and wait until it is gone."""
        _kill(self.store)

    def stop(self, process: subprocess.Popen[bytes] | None) -> None:
        """It does not answer any more, and is not gone either: until `go_on`."""
        assert process is not None, "it was started"
        process.send_signal(signal.SIGSTOP)

    def go_on(self, process: subprocess.Popen[bytes] | None) -> None:
        """It answers again."""
        assert process is not None, "it was started"
        process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Both. Any number of times."""
        _kill(self.store)
        _kill(self.master)

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log_file.open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments], stdout=log, stderr=log, env=os.environ | environment()
            )

    def _await(self, port: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        said = self._log_file.read_text(errors="replace")[-1000:]
        raise RuntimeError(f"Mooncake does not serve within {START_S:.0f} s\n{said}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    """So many that nobody uses right now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
