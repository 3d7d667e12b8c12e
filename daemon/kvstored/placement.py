"""Where arenas lie: on which NUMA node each is wanted, and where its pages really are.

    dram.numa = "auto"         as interleave where several nodes have memory, else off
                "interleave"   each arena on one node, as many on each
                "0,2"          the same, on these nodes only
                "off"          where the kernel puts them: on the node of the thread that touches them

A node is preferred, never insisted on: memory that is far away is slower, and none at all kills the daemon. An engine
reads across nodes what its own does not have; which of them a block gets is not chosen.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvkernels import numa
from kvproto.limits import MIB
from kvproto.sizes import quoted
from kvstored.units import Kind

AUTO: Final = "auto"
INTERLEAVE: Final = "interleave"
OFF: Final = "off"
NODES: Final = Path("/sys/devices/system/node")
STATUS: Final = Path("/proc/self/status")
FILE_BYTES: Final = 1 << 20  # of what the kernel says
LOOK_BYTES: Final = 2 * MIB  # one page in so many is looked at: as much as a huge page

_LIST: Final = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")
_FORMS: Final = "auto, interleave, off, or numbers of nodes such as 0,1"


class NoSuchNodeError(Exception):
    """The configuration names a node that has no memory here, or none that this process may use."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes that have memory and that this process may use, upwards."""

    nodes: tuple[int, ...]

    @staticmethod
    def read(folder: Path = NODES, status: Path = STATUS) -> "Topology":
        """As the kernel says; one node, 0, where it says nothing."""
        nodes = _numbers_in(folder / "has_memory") or _numbers_in(folder / "online")
        allowed = re.search(r"^Mems_allowed_list:\s*(\S+)$", _text(status), re.MULTILINE)
        if allowed is not None and _LIST.fullmatch(allowed[1]):
            nodes &= _numbers(allowed[1])
        return Topology(tuple(sorted(nodes)) or (0,))


def numa_kind() -> Kind[str]:
    """What `dram.numa` may be, as text; `plan` reads it again."""

    def parse(text: str) -> str:
        word = text.strip()
        if word not in {AUTO, INTERLEAVE, OFF} and not _LIST.fullmatch(word):
            raise ValueError(f"{quoted(text)} is not {_FORMS}")
        return word

    return Kind(parse, str, (str,), f"text: {_FORMS}", _FORMS)


def plan(wish: str, topology: Topology) -> tuple[int, ...]:
    """Nodes that arenas are spread over; none: wherever the kernel puts them. Raises NoSuchNodeError."""
    if wish == OFF or (wish == AUTO and len(topology.nodes) == 1):
        return ()
    if wish in {AUTO, INTERLEAVE}:
        return topology.nodes
    wanted = _numbers(wish)
    missing = sorted(wanted - set(topology.nodes))
    if missing:
        have = ", ".join(map(str, topology.nodes))
        raise NoSuchNodeError(f"there is no memory for this process on node {missing[0]}; it has that of {have}")
    return tuple(sorted(wanted))


def spread(nodes: Sequence[int]) -> str:
    """A plan, for an operator: "off", or numbers of nodes."""
    return ",".join(map(str, nodes)) or OFF


@dataclass(slots=True)
class Placement:
    """Which node the next arena is for. Owner and memory thread: counts may be one off, and are only for balance."""

    nodes: tuple[int, ...] = ()
    prefer: Callable[[int, int, int], None] = numa.prefer  # address, bytes, node
    nodes_of: Callable[[Sequence[int]], list[int]] = numa.nodes_of
    lie: Mapping[int, int] = field(default_factory=dict)  # bytes by node, of what was looked at
    wanted: dict[int, int] = field(default_factory=dict)  # arenas by node

    def place(self, address: int, map_bytes: int) -> int:
        """Where the next arena is wanted, before anything in it is touched; -1: anywhere.

        On the node for which fewest are. Raises OSError; it lies wherever it comes to lie then.
        """
        if not self.nodes:
            return -1
        node = min(self.nodes, key=lambda node: self.wanted.get(node, 0))
        self.prefer(address, map_bytes, node)
        self.wanted[node] = self.wanted.get(node, 0) + 1
        return node

    def look(self, address: int, map_bytes: int) -> Counter[int]:
        """Bytes of populated memory by node, from one page in each 2 MiB; counted in `lie`. Memory thread.

        Nothing where the kernel does not say.
        """
        pages = range(address, address + map_bytes, LOOK_BYTES)
        found: Counter[int] = Counter()
        try:
            for page, node in zip(pages, self.nodes_of(pages), strict=True):
                if node >= 0:
                    found[node] += min(LOOK_BYTES, address + map_bytes - page)
        except OSError:
            return Counter()
        self.lie = Counter(self.lie) + found
        return found

    def gone(self, node: int, found: Counter[int]) -> None:
        """What `place` has placed there, and what `look` has found, is no more. Memory thread."""
        if node >= 0:
            self.wanted[node] -= 1
        self.lie = Counter(self.lie) - found


def _numbers_in(path: Path) -> set[int]:
    text = _text(path).strip()
    return _numbers(text) if _LIST.fullmatch(text) else set()


def _numbers(text: str) -> set[int]:
    """Of a list as the kernel writes it: `0-2,4`."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), min(int(last or first), numa.NODES_MAX) + 1))
    return found


def _text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(FILE_BYTES).decode("ascii", "replace")
    except OSError:
        return ""
