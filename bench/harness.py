"""What every benchmark shares: a real daemon, clocks, percentiles, host facts, and the JSON record."""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from statistics import median
from typing import TypeAlias

import numpy as np

from bench.process import DaemonProcess

Results = dict[str, float]
Findings = dict[str, float | str | None]  # where a figure may be missing, and a reason stands for it
Figure: TypeAlias = "float | str | Mapping[str, Figure] | None"
Figures: TypeAlias = Mapping[str, Figure]  # of a record: by name, and by name under a name where there are many
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

ROOT = Path(__file__).parent.parent
HOMES = Path("/var/tmp")  # survives a reboot, so it is on a drive wherever /tmp is memory


@contextmanager
def daemon(*arguments: str) -> Iterator[DaemonProcess]:
    """A real daemon process in a temporary directory, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-") as folder:
        home = Path(folder)
        with DaemonProcess(home / "run", "--log-level", "warning", *arguments, log_file=home / "log") as process:
            yield process


@contextmanager
def home_on_drive(needed_bytes: int) -> Iterator[Path]:
    """A temporary directory on a drive, until the block ends. Raises RuntimeError without room for so many bytes."""
    kind = _file_system(HOMES)
    if kind in {"tmpfs", "ramfs", "overlay"}:
        raise RuntimeError(f"{HOMES} is {kind}: a disk tier wants a drive")
    free_bytes = disk_usage(HOMES).free
    if free_bytes < needed_bytes:
        raise RuntimeError(f"{HOMES} has {free_bytes >> 20} MiB, and this takes {needed_bytes >> 20}")
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-", dir=HOMES) as folder:
        yield Path(folder)


def _file_system(folder: Path) -> str:
    """Its kind, as the kernel names it."""
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[2] == device:
            return line.split(" - ")[1].split()[0]
    return "unknown"


def memory_of(pid: int, name: str) -> int:
    """Bytes that /proc/PID/status gives under a name such as `RssShmem`."""
    return int(_first(f"/proc/{pid}/status", f"{name}:").split()[0]) << 10


def percentile(samples: Sequence[float], share: float) -> float:
    """The nearest rank: the least sample that at least `share` of them do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratio_of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    """Median of the limit's seconds over median of ours, for times measured in turn."""
    return median(limit for limit, _ in pairs) / median(ours for _, ours in pairs)


def random_blocks(count: int, block_bytes: int, seed: int) -> list[Bytes]:
    """Distinct blocks, every page of them touched."""
    generator = np.random.default_rng(seed)
    whole = generator.integers(0, 256, count * block_bytes, dtype=np.uint8)
    return [whole[i * block_bytes : (i + 1) * block_bytes] for i in range(count)]


def host_facts() -> dict[str, str | int]:
    """What a reader needs to judge a figure."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_kib": int(_first("/proc/meminfo", "MemTotal").split()[0]),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def last_level_cache_bytes() -> int:
    """Of core 0, or 32 MiB where the kernel does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes), default=32 << 20)


def _first(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "unknown"


def record(bench: str, results: Figures, *, quick: bool, **beside: Figures) -> str:
    """The JSON of one run, on one line. What stands `beside` the results goes by its own name."""
    return json.dumps(
        {
            "bench": bench,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "quick": quick,
            "host": host_facts(),
            "commit": _commit(),
            "results": _rounded(results),
            **{name: _rounded(figures) for name, figures in beside.items()},
        }
    )


def _rounded(figures: Figures) -> dict[str, Figure]:
    """To four places, at every depth."""
    rounded: dict[str, Figure] = {}
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            rounded[name] = _rounded(figure)
        else:
            rounded[name] = round(figure, 4) if isinstance(figure, int | float) else figure
    return rounded


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", "proto", "kernels", "kvstore", "daemon", "clients", "bench/*.py")
    return f"{commit}+changes" if changed else commit


def say(text: str) -> None:
    """Progress, apart from the record on standard output."""
    print(text, file=sys.stderr, flush=True)
