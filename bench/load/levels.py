"""What a daemon has open, holds and uses, once nobody is connected: to be the same after the load as before."""

import http.client
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.harness import memory_of

PATIENCE_S: Final = 10.0
# What must be nothing once everybody is gone.
NOTHING: Final = (
    "kvstored_sessions", "kvstored_leases", "kvstored_waiting_leases", "kvstored_open_tickets", "kvstored_pins",
    "kvstored_pinned_bytes", "kvstored_in_flight_requests", "kvstored_write_behind_chains",
    "kvstored_write_behind_running_bytes",
)  # fmt: skip
PINS: Final = ("kvstored_pins", "kvstored_pinned_bytes")
# What must be nothing once everything is cleared, too.
QUARANTINED: Final = "kvstored_quarantined_slots"
EMPTY: Final = ("kvstored_blocks", "kvstored_used_bytes")
THREADS: Final = 8  # of gRPC's own, which come when it is asked several things at once
ANON_BYTES: Final = 24 << 20  # what the interpreter's and the C library's heaps may grow by


@dataclass(frozen=True, slots=True)
class Levels:
    """Of one daemon at one moment."""

    descriptors: Mapping[str, int]  # by kind
    anonymous_bytes: int
    threads: int
    figures: Mapping[str, float]  # of its metrics, summed over labels

    @property
    def total(self) -> int:
        """Descriptors."""
        return sum(self.descriptors.values())

    def held(self) -> dict[str, float]:
        """What somebody still seems to hold."""
        return {name: self.figures[name] for name in NOTHING if self.figures.get(name)}

    def leftovers(self) -> list[str]:
        """A sentence for whatever is still held or there, once everybody is gone and everything is cleared."""
        held = [f"still held: {name} = {value:g}" for name, value in self.held().items()]
        return held + [f"not empty after a clear: {name} = {value:g}" for name, value in self.left().items()]

    def busy(self) -> dict[str, float]:
        """The same without pins, which outlive those who asked for them: until their deadline, or until a clear."""
        return {name: value for name, value in self.held().items() if name not in PINS}

    def left(self) -> dict[str, float]:
        """Blocks that are there, but for places on disk that were found damaged: those are never used again."""
        there = {name: self.figures[name] for name in EMPTY if self.figures.get(name)}
        if there.get(EMPTY[0]) == self.figures.get(QUARANTINED):
            there.pop(EMPTY[0], None)
        return there


def levels_of(pid: int, metrics: Path) -> Levels:
    """As of now; metrics are up to a second old."""
    return Levels(
        descriptors_of(pid), memory_of(pid, "RssAnon"), len(list(Path(f"/proc/{pid}/task").iterdir())), scrape(metrics)
    )


def leaks(before: Levels, after: Levels) -> list[str]:
    """A sentence for everything that has grown."""
    found = [
        f"{kind}: {count} descriptors, {before.descriptors.get(kind, 0)} before"
        for kind, count in sorted(after.descriptors.items())
        if kind != "segment" and count > before.descriptors.get(kind, 0)
    ]
    grown = after.anonymous_bytes - before.anonymous_bytes
    if grown > ANON_BYTES:
        found.append(f"anonymous memory: {grown >> 20} MiB more than before")
    if after.threads > before.threads + THREADS:
        found.append(f"{after.threads} threads, {before.threads} before")
    return found


def descriptors_of(pid: int) -> dict[str, int]:
    """How many of each kind are open: arenas, rings, sockets, segments and the like."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        kinds[_kind(target)] += 1
    return dict(kinds)


def _kind(target: str) -> str:
    if target.startswith("/memfd:kvstored-"):
        name = target.removeprefix("/memfd:kvstored-").split(" ")[0]
        return name if name in {"arena", "ring"} else "table"
    if target.startswith("anon_inode:"):
        return target.removeprefix("anon_inode:").strip("[]")
    if target.endswith((".seg", ".seg (deleted)")) or "/segments/" in target:
        return "segment"
    return target.split(":", maxsplit=1)[0] if ":" in target else "file"


class _ToSocket(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(self._path))


def scrape(path: Path) -> dict[str, float]:
    """Figures of a daemon by name, summed over their labels; none before the first second is over."""
    connection = _ToSocket(path)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read(8 << 20).decode()
    finally:
        connection.close()
    sums: Counter[str] = Counter()
    if answer.status != http.client.OK:
        return {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            sums[name.split("{")[0]] += float(value)  # type: ignore[assignment]
    return {name: float(value) for name, value in sums.items()}
