"""What the scheduler's half of the vLLM connector knows of the engine's memory, and of the saves that read it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvclient.integrations.vllm_jobs import Progress, SaveJob


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """The engine's own bookkeeping of its blocks."""

    blocks: int = 0  # in all
    free: Callable[[], int] = lambda: 0  # how many are not in use
    forget: Callable[[set[int]], None] = lambda _: None  # nobody finds these by what they held from here on
    hold: Callable[[Sequence[int]], Sequence[int]] = lambda _: ()  # those of these that can be found stay; which
    let_go: Callable[[Sequence[int]], None] = lambda _: None  # they need not, as far as `hold` is concerned
    reuses_oldest: bool = False  # among free blocks, the one that was freed first; else the last one


@dataclass(slots=True)
class Saving:
    """A save that runs."""

    request: str
    block_ids: tuple[int, ...]  # of the engine
    workers: int  # that have not ended it yet


class Heard(NamedTuple):
    """What became of a save."""

    number: int
    request: str
    over: bool  # has every worker ended it?
    refused: bool  # is some of it not in the store?


class Saves:
    """By number, and by the blocks of the engine that they read. Scheduler's thread."""

    def __init__(self, workers: int) -> None:
        """`workers`: how many carry out every save."""
        self._workers = workers
        self._next = 0
        self._running: dict[int, Saving] = {}
        self._readers: dict[int, set[int]] = {}  # saves, by a block that they read

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, request: str, keys: Sequence[bytes], parent: bytes | None, block_ids: Sequence[int]) -> SaveJob:
        """One more. It reads `block_ids`, one a key."""
        number, self._next = self._next, self._next + 1
        job = SaveJob(number, request, tuple(keys), parent, tuple(block_ids))
        self._running[number] = Saving(request, job.block_ids, self._workers)
        for block in job.block_ids:
            self._readers.setdefault(block, set()).add(number)
        return job

    def readers(self, written: Iterable[int]) -> set[int]:
        """Saves that read one of these blocks."""
        readers = self._readers
        return set().union(*(readers[block] for block in written if block in readers)) if readers else set()

    def heard(self, progress: Progress) -> Iterator[Heard]:
        """What workers have ended."""
        for number, workers in progress.saved.items():
            saving = self._running.get(number)
            if saving is None:
                continue
            saving.workers -= workers
            if saving.workers <= 0:
                self._end(number, saving)
            yield Heard(number, saving.request, saving.workers <= 0, number in progress.refused)

    def _end(self, number: int, saving: Saving) -> None:
        del self._running[number]
        for block in saving.block_ids:
            readers = self._readers[block]
            readers.discard(number)
            if not readers:
                del self._readers[block]
