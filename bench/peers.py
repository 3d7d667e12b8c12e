"""Peers with a disk tier, and ours: the same 200 MiB written and read back, as their clients see it, in turn.

Each peer is installed into an environment of its own that is gone afterwards. One that cannot be installed or does not
run here has null for figures, and says why. bench/METHOD.md says what each figure covers.
"""

import os
import re
import select
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self

from bench import raw
from bench.disk import BLOCK_BYTES, DISK, PATIENCE_S, SET, ColdFetch, client_of, daemon_at
from bench.dram import new_keys
from bench.harness import ROOT, Findings, home_on_drive, random_blocks, say
from kvclient import Namespace
from kvproto.limits import GIB, MIB

INSTALL_S = 300.0
ANSWER_S = 180.0
LMCACHE = (
    "lmcache==0.5.6", "aiofile", "aiofiles", "aiohttp", "blake3", "cachetools", "cryptography", "fastapi", "httptools",
    "httpx", "msgspec", "nvtx", "opentelemetry-api<=1.40.0", "opentelemetry-sdk", "opentelemetry-exporter-otlp",
    "opentelemetry-exporter-prometheus", "prometheus_client", "psutil", "py-cpuinfo", "pyyaml", "pyzmq", "redis",
    "safetensors", "sortedcontainers", "uvicorn",
)  # fmt: skip
MOONCAKE = ("mooncake-transfer-engine-non-cuda==0.3.13.post1",)
MOONCAKE_LIBRARIES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")  # Debian's
Turns = dict[str, Callable[[], float]]
Install = Callable[[Path], tuple[Path, dict[str, str]]]  # into this folder: its interpreter and environment


def run(*, quick: bool) -> Findings:
    """All figures of `peers`. Needs 4 GiB of memory, 12 GiB of a drive, PyPI, and Debian's archive or libibverbs1."""
    rounds = 2 if quick else 5
    findings: Findings = {}
    seconds: dict[str, list[float]] = {}
    with home_on_drive(12 * GIB) as home, ExitStack() as stack:
        peers = begin({"lmcache": install_lmcache, "mooncake": install_mooncake}, home, stack, findings)
        ours = stack.enter_context(Ours(home))
        for number in range(rounds):
            turns = {f"{name}_{verb}": peer.turn(verb) for name, peer in peers.items() for verb in VERBS}
            turns |= {"kvstored_write": ours.write, "kvstored_read": ours.read} | ours.bare()
            take(turns, seconds, findings)
            say(f"round {number + 1} of {rounds}")
    rates = {name: SET * BLOCK_BYTES / median(took) / 1e9 for name, took in seconds.items()}
    raw_rates = [rates.pop(name) for name in list(rates) if name.startswith("raw_read_")]
    return {f"{name}_gb_per_s": rate for name, rate in rates.items()} | {"raw_read_gb_per_s": max(raw_rates)} | findings


VERBS = ("write", "read")


def begin(installers: Mapping[str, Install], home: Path, stack: ExitStack, findings: Findings) -> dict[str, "Peer"]:
    """Those that can be installed, running; what kept the others off is in `findings`."""
    peers: dict[str, Peer] = {}
    for name, install in installers.items():
        folder = home / name
        try:
            peers[name] = stack.enter_context(Peer(name, folder, *install(folder)))
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            give_up(findings, name, str(error))
        say(f"{name}: {findings.get(f'{name}_why_not', 'installed')}")
    return peers


def take(turns: Turns, seconds: dict[str, list[float]], findings: Findings) -> None:
    """One turn each. Who fails is given up, and its earlier turns do not count."""
    for name, turn in turns.items():
        who = name.split("_", 1)[0]
        if f"{who}_why_not" in findings:
            continue
        try:
            took = turn()
        except RuntimeError as error:  # only a peer's
            give_up(findings, who, str(error))
            say(f"{who}: {error}")
        else:
            seconds.setdefault(name, []).append(took)


def give_up(findings: Findings, name: str, reason: str) -> None:
    """No figures of this one."""
    findings |= {f"{name}_{verb}_gb_per_s": None for verb in VERBS} | {f"{name}_why_not": reason[-500:]}


class Ours:
    """A daemon with a disk tier and DRAM for one set of blocks. A context manager."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._stack = ExitStack()
        self._blocks = random_blocks(SET, BLOCK_BYTES, seed=4)
        self._namespace: Namespace
        self._cold: ColdFetch

    def __enter__(self) -> Self:
        arguments = ("--dram", f"{SET * BLOCK_BYTES // MIB}MiB", "--arena", "8MiB", "--disk-admission", "none")
        disk = self._home / "disk"
        running = self._stack.enter_context(daemon_at(self._home, *arguments, "--disk", str(disk), *DISK))
        _, self._namespace = self._stack.enter_context(client_of(running))
        self._cold = ColdFetch(disk, self._namespace)
        for _ in range(2):
            self._cold.fetch(self._namespace)
            self._cold.next()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self) -> float:
        """Seconds of `store` and `flush`: durable."""
        begun = time.perf_counter()
        result = self._namespace.store(new_keys(SET), self._blocks, space_s=PATIENCE_S)
        durable = self._namespace.flush(PATIENCE_S).durable
        seconds = time.perf_counter() - begun
        assert result.accepted == durable == SET, f"{result}, {durable} durable"
        return seconds

    def read(self) -> float:
        """Seconds of a fetch into warm memory; what was written before has evicted both sets."""
        seconds = self._cold.fetch(self._namespace)
        self._cold.next()
        return seconds

    def bare(self) -> Turns:
        """The drive with these bytes, by depth."""
        return {f"raw_read_{depth}": partial(self._cold.read_bare, depth) for depth in raw.DEPTHS}


class Peer:
    """A process that drives a peer. A context manager that ends both; turns raise RuntimeError."""

    def __init__(self, name: str, folder: Path, python: Path, environment: dict[str, str]) -> None:
        self._log = folder / "errors"
        command = [str(python), str(ROOT / "bench" / f"peer_{name}.py"), str(folder)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=os.environ | environment
            )

    def turn(self, verb: str) -> Callable[[], float]:
        """A turn of a verb; its seconds."""
        return partial(self._ask, verb)

    def _ask(self, verb: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{verb}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(f"is gone: {self._errors()}") from error
        until, heard = time.monotonic() + ANSWER_S, b""
        while True:  # libraries print, too
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                raise RuntimeError(f"does not {verb}: {self._errors()}")
            heard += piece
            for line in heard.split(b"\n")[:-1]:
                if line.startswith(b"seconds "):
                    return float(line.split()[1])

    def _errors(self) -> str:
        """The end of what it said, without glog's lines."""
        lines = self._log.read_text().splitlines()
        return "\n".join(line for line in lines if not re.match(r"[IWEF]\d{4} ", line))[-400:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=30)  # ends its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def install_lmcache(folder: Path) -> tuple[Path, dict[str, str]]:
    """Its interpreter and environment. Raises OSError, subprocess.SubprocessError."""
    return make_environment(folder, LMCACHE), {}


def install_mooncake(folder: Path) -> tuple[Path, dict[str, str]]:
    """Its interpreter and environment. Raises OSError, subprocess.SubprocessError."""
    python = make_environment(folder, MOONCAKE)
    libraries = folder / "debian"
    libraries.mkdir()
    for command in (["apt-get", "update"], ["apt-get", "download", *MOONCAKE_LIBRARIES]):
        call(command, libraries)
    for package in libraries.glob("*.deb"):
        call(["dpkg-deb", "-x", str(package), str(libraries)], libraries)
    found = {str(path.parent) for path in libraries.rglob("*.so.*")}
    return python, {"LD_LIBRARY_PATH": os.pathsep.join(sorted(found))}


def make_environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """A virtual environment with the first of these without, and the rest with, what they need; what else we have.

    The peers' own requirements want gigabytes of CUDA. PyTorch and NumPy are those of this environment, behind theirs.
    """
    folder.mkdir()
    call([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call([*pip, "--no-deps", packages[0]], folder)
    if packages[1:]:
        call([*pip, *packages[1:]], folder)
    behind = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (behind / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def call(command: list[str], folder: Path) -> None:
    """Run it. Raises OSError, RuntimeError with what it said, subprocess.TimeoutExpired."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[-300:]}")
