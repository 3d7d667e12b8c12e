"""One memfd and our map of it: what arenas, rings and tables are made of.

Every memfd is sealed against shrinking, growing and further seals: a client that maps it never gets SIGBUS.
`F_SEAL_FUTURE_WRITE` is left out on purpose: it would lock out a restarted daemon too.
"""

import fcntl
import os
import stat
from collections import Counter
from dataclasses import dataclass, field

from kvkernels import libc
from kvkernels.libc import Bytes

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(slots=True, eq=False)
class Region:
    """One memfd and the daemon's own writable map of it."""

    fd: int
    region_bytes: int
    address: int
    view: Bytes
    huge_bytes: int = 0  # in huge pages, as far as it is known
    gone: bool = False  # nobody needs it any more: not worth faulting in
    node: int = -1  # where an arena is wanted; -1: anywhere
    nodes: Counter[int] = field(default_factory=Counter)  # where it lies: bytes by NUMA node, once it is faulted in

    def unmap(self) -> None:
        """Nothing in the daemon looks there any more."""
        libc.unmap(self.address, self.region_bytes)
        self.address = 0


def make_region(name: str, region_bytes: int, *, writable: bool = True) -> Region:
    """A sealed memfd, mapped. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, region_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        address = libc.map_shared(fd, region_bytes, writable=writable)
    except OSError:
        os.close(fd)
        raise
    return Region(fd, region_bytes, address, libc.bytes_at(address, region_bytes))


def adopt_region(fd: int) -> Region:
    """What `make_region` of a predecessor made, mapped. Raises OSError, also for what it did not make."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o777 != 0o600:
        raise PermissionError("not memory of ours")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise PermissionError("not sealed as ours is")  # one that can shrink kills who reads it
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise PermissionError("not writable")
    address = libc.map_shared(fd, status.st_size, writable=True)
    return Region(fd, status.st_size, address, libc.bytes_at(address, status.st_size))
