"""What the checks of `kvctl doctor` give, and what they know of a daemon."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["Check", "DaemonFacts", "Verdict"]


class Verdict(Enum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One answer: what was found, and what to do about it where there is something to do."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """What a running daemon says of itself. Sizes are of its DRAM tier, but for those of disk.

    `locks` says whether DRAM should be locked, `keeper` who holds it over a restart.
    """

    version: str
    pid: int
    uid: int
    draining: bool
    capacity_bytes: int
    populated_bytes: int
    locked_bytes: int
    locks: bool = True
    warnings: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()  # directories
    disk_bytes: int = 0  # that the disk tier may take
    disk_assigned_bytes: int = 0  # that its segments take already
    keeper: str = "none"
    admin_group: str = "none"  # whose members act
    huge_pages: bool = True  # are they wished for?
    huge_bytes: int = 0  # that lie in them
