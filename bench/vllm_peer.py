"""LMCache beside our connector: its packages behind those of the environment with vLLM, its server, its configuration.

The environment is a new one, with a line that leads to the packages of the other, which stays as it is: what both need
LMCache takes from there, in the versions that vLLM runs with. It takes seconds and some MB, and goes with its folder.
"""

import os
import re
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.peer_lmcache import free_port, listens
from bench.peers import LMCACHE, call

START_S = 120.0
STOP_S = 10.0
POLL_S = 0.05
DRAM_GB = 2
QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "WARNING"}
WHERE = "import sysconfig; print(sysconfig.get_paths()['purelib'])"


def install(python: Path, folder: Path) -> Path:
    """The interpreter of an environment in a new folder that has vLLM's packages and LMCache.

    `python`: of the one with vLLM. Raises OSError, RuntimeError, subprocess.SubprocessError.
    """
    folder.mkdir()
    call([str(python), "-m", "venv", str(folder / "venv")], folder)
    own = folder / "venv" / "bin" / "python"
    found = subprocess.run([python, "-c", WHERE], capture_output=True, text=True, check=True)
    (next((folder / "venv" / "lib").glob("python*/site-packages")) / "behind.pth").write_text(found.stdout)
    pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call([*pip, "--no-deps", LMCACHE[0]], folder)
    call([*pip, *(re.split("[<=>]", name)[0] for name in LMCACHE[1:])], folder)
    return own


class LmcacheServer:
    """LMCache's own server with its memory populated. A context manager that kills it on the way out.

    `chunk_tokens`: what it stores at a time. Raises OSError, and RuntimeError if it does not start.
    """

    def __init__(self, python: Path, chunk_tokens: int, *, log_file: Path) -> None:
        self._port = free_port()
        command = [
            str(python.with_name("lmcache")), "server", "--l1-size-gb", str(DRAM_GB), "--eviction-policy", "LRU",
            "--chunk-size", str(chunk_tokens), "--port", str(self._port), "--http-port", str(free_port()),
            "--shm-name", f"bench-{self._port}", "--no-l1-use-lazy", "--supported-transfer-mode", "auto",
            "--disable-observability",
        ]  # fmt: skip
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | QUIET)
        until = time.monotonic() + START_S
        while not listens(self._port):
            if time.monotonic() > until or self.process.poll() is not None:
                self.kill()
                raise RuntimeError(f"lmcache server does not start: {log_file.read_text(errors='replace')[-500:]}")
            time.sleep(POLL_S)

    def transfer(self) -> dict[str, Any]:
        """`kv_transfer_config` of an engine that stores there."""
        return {
            "kv_connector": "LMCacheMPConnector", "kv_connector_module_path": "bench.engines.lmcache",
            "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": self._port},
        }  # fmt: skip

    def kill(self) -> None:
        """Any number of times. It is asked first, since it gives back its shared memory itself."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
