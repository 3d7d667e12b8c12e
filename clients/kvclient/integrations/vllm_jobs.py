"""What the scheduler's half of the vLLM connector tells the worker's half, and the other way round. Plain data."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvproto.identity import NamespaceIdentity

if TYPE_CHECKING:
    from kvclient.integrations.vllm_device import Mark


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Neighbouring blocks of a chain, into the engine's memory."""

    request: str
    keys: tuple[bytes, ...]  # exactly the blocks to load
    block_ids: tuple[int, ...]  # of the engine, one a key
    at_once: bool  # before the forward of this step, in the engine's own thread; else behind it, in another
    from_disk: bool = False  # some of it was not in memory when it was looked up
    tried: bool = False  # although computing is said to be faster: how long it took is to be reported
    after: "Mark | None" = field(default=None, compare=False)  # noted by a worker on a device: what comes before it


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Blocks of a chain that this step completes, out of the engine's memory."""

    number: int
    request: str
    keys: tuple[bytes, ...]
    parent: bytes | None
    block_ids: tuple[int, ...]
    after: "Mark | None" = field(default=None, compare=False)  # as of a load


@dataclass(frozen=True, slots=True)
class PinJob:
    """Keep the blocks of a chain, once all that was to be saved of it is."""

    keys: tuple[bytes, ...]
    ttl_s: float | None
    retention: str | None


@dataclass(frozen=True, slots=True)
class WordJob:
    """Say of the blocks of a chain when they are needed next, once all that was to be saved of it is."""

    keys: tuple[bytes, ...]
    expectation: str  # of `Namespace.expect`


@dataclass(slots=True)
class Plan:
    """What a worker does in one step."""

    loads: list[LoadJob] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)  # requests that are over: loads that have not begun are not wanted
    saves: list[SaveJob] = field(default_factory=list)
    pins: list[PinJob | WordJob] = field(default_factory=list)
    fences: set[int] = field(default_factory=set)  # saves, new ones too, whose blocks this step uses for something else
    closing: set[str] = field(default_factory=set)  # finished requests whose blocks wait for their saves
    forward: bool = False  # is anything computed in this step?
    timed: int = 0  # the number of this step, if it tells what computing costs (`vllm_steps`)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one worker stores: told to the scheduler once the engine's memory is known."""

    identity: NamespaceIdentity


@dataclass(slots=True)
class Progress:
    """What workers have done since they last said so: saves by number, and by how many workers."""

    saved: dict[int, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)  # of these, the saves of which a worker could not store every block
    timed: int = 0  # of the plan of the step that has ended
    weights_changed: bool = False  # or will have: what is stored belongs to the old ones

    def joined(self, other: "Progress") -> "Progress":
        """Both together."""
        saved = dict(self.saved)
        for number, workers in other.saved.items():
            saved[number] = saved.get(number, 0) + workers
        return Progress(
            saved,
            self.refused | other.refused,
            self.timed or other.timed,
            self.weights_changed or other.weights_changed,
        )


class Near(Protocol):
    """A worker in the scheduler's process, as `vllm_worker.Worker` is one."""

    def ask_early(self, request: str, keys: tuple[bytes, ...]) -> None:
        """A load of these is about to be planned."""

    def begin_early(self, job: LoadJob, fences: Collection[int]) -> None:
        """It is planned; `fences` are saves that read its blocks."""
