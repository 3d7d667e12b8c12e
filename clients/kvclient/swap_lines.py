"""The threads of a swapper: one line of swaps out, one of swaps in; between two chunks each looks who goes next.

    out   two threads: one copies a chunk into the ring while the other one's has tickets, or is being asked for
    in    one thread: asks for a chunk while the one before is in the device's stream

A chunk that is not urgent begins when something of the budget is left, and is no larger than that.
"""

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from kvclient.copying import Gate, WithdrawnError
from kvclient.results import LoadResult, Reason, Refused, StoreResult
from kvclient.swap_budget import TIMED_BYTES, Budget
from kvclient.swap_ways import Flight, Way
from kvclient.swaps import Priority, Swap, SwapIn, SwapOut
from kvkernels.device.port import DeviceError
from kvproto.errors import KvError

if TYPE_CHECKING:
    from kvclient.namespace import Namespace

CHUNK_BYTES: Final = 4 << 20  # 80 us of a PCIe 5 link, 400 us of one core's memmove: so long the urgent wait for others
DEPTH: Final = 2  # chunks under way in a direction
NAP_S: Final = 0.0005  # between two looks at streams of the engine's, or at blocks that come from disk
KEEP_S: Final = 1.0  # and at leases of swaps that wait
STOP_S: Final = 2.0
_clock = time.monotonic
_log = logging.getLogger(__name__)
OneWay = TypeVar("OneWay", SwapOut, SwapIn)


@dataclass(slots=True, eq=False)
class Shared:
    """What both lines of a swapper have in common. `changed` guards all swaps."""

    way: Way
    budget: Budget
    chunk_bytes: int
    changed: threading.Condition
    closing: bool = False


class Line(ABC, Generic[OneWay]):
    """The swaps of one direction, and who moves them."""

    def __init__(self, shared: Shared, name: str) -> None:
        self.shared = shared
        self.swaps: list[OneWay] = []
        self._name = name
        self._threads: list[threading.Thread] = []
        self._ended_s = 0.0  # when the last chunk was over

    def put(self, swap: OneWay, threads: int) -> None:
        """One more; locked."""
        self.swaps.append(swap)
        while len(self._threads) < threads:
            self._threads.append(threading.Thread(target=self._run, name=f"kvclient-swap-{self._name}", daemon=True))
            self._threads[-1].start()
        self.shared.changed.notify_all()

    def stop(self) -> None:
        """Wait for the threads, which `Shared.closing` ends. What hangs keeps its own."""
        for thread in self._threads:
            thread.join(STOP_S)

    def _run(self) -> None:
        while (step := self._next()) is not None:
            step()

    def _next(self) -> Callable[[], None] | None:
        """What to do now; None: nothing any more. Waits."""
        with self.shared.changed:
            while True:
                step, wait_s = self._pick()
                if step is not None:
                    return step
                if self.shared.closing and not self.swaps:
                    return None
                self.shared.changed.wait(None if wait_s is None else min(wait_s, KEEP_S))

    @abstractmethod
    def _pick(self) -> tuple[Callable[[], None] | None, float | None]:
        """What may be done now; else how long until something may be, if that is known. Locked."""

    def _in_order(self) -> list[OneWay]:
        return sorted(self.swaps, key=lambda swap: (swap.priority, swap.number))

    def _may_begin(self, swap: Swap) -> float:
        """How long until a chunk of it may begin; 0.0: now. Locked."""
        if swap.after is not None:
            return KEEP_S  # `swap_events.py` says when
        return 0.0 if swap.priority is Priority.URGENT else self.shared.budget.wait_s(_clock())

    def _most_bytes(self, swap: Swap) -> float:
        """Of the next chunk."""
        most = self.shared.chunk_bytes
        return most if swap.priority is Priority.URGENT else min(most, self.shared.budget.left_bytes(_clock()))

    def _took(self, moved_bytes: int, began_s: float, ended_s: float, most_s: float = math.inf) -> float:
        """So much has moved in that time, beside others; the seconds that were its own, `most_s` at most. Locked."""
        seconds = min(ended_s - max(began_s, self._ended_s), most_s)
        self._ended_s = max(ended_s, self._ended_s)
        self.shared.budget.bandwidth.took(moved_bytes, seconds)
        return seconds


class OutLine(Line[SwapOut]):
    """Swaps out."""

    def _pick(self) -> tuple[Callable[[], None] | None, float | None]:
        wait_s: float | None = None
        for swap in self._in_order():
            if swap.why is not None or swap.next >= len(swap.keys):
                if not swap.chunks:
                    self.swaps.remove(swap)
                    swap.finish()
                continue
            if swap.asking is not None or (swap.alone and swap.chunks):
                continue
            soon_s = self._may_begin(swap)
            if soon_s <= 0:
                beside = bool(swap.chunks)
                return partial(self._move, swap, self._take(swap), beside=beside), None
            wait_s = soon_s if wait_s is None else min(wait_s, soon_s)
        return None, wait_s

    def _take(self, swap: SwapOut) -> range:
        """The next chunk of it. Locked."""
        block_bytes = self.shared.way.pages.block_bytes
        count = max(1, int(self._most_bytes(swap)) // block_bytes)
        chunk = range(swap.next, min(swap.next + count, len(swap.keys)))
        self.shared.budget.take(len(chunk) * block_bytes, _clock())
        swap.next = chunk.stop
        swap.chunks.append(chunk)
        swap.asking = chunk
        return chunk

    def _move(self, swap: SwapOut, chunk: range, *, beside: bool) -> None:
        """Store a chunk; `beside`: another one was under way when this was picked."""
        entry = _Entry(self.shared, swap, chunk)
        result = self._save(swap, chunk, entry)
        block_bytes = self.shared.way.pages.block_bytes
        with self.shared.changed:
            swap.chunks.remove(chunk)
            self.shared.budget.give_back((len(chunk) - result.accepted) * block_bytes)
            if entry.read_s is not None:  # without asking and answering, which a link has no part in
                self._took(result.accepted * block_bytes, entry.read_s, entry.until_s, entry.seconds)
            refused = result.refused
            if beside and refused and refused[0] == Refused(0, Reason.NO_PARENT):
                # The chunk before it had not got all of its tickets: for want of room in the ring.
                swap.next, swap.alone = chunk.start, True
            else:
                swap.accepted += result.accepted
                swap.known += result.known
                swap.moved_bytes += result.accepted * block_bytes
                swap.refused += [Refused(chunk.start + one.index, one.reason) for one in refused]
                if refused and refused[-1].reason is not Reason.PENDING:  # that one somebody else stores
                    swap.end(refused[-1].reason)
            swap.has_tickets(chunk)
            self.shared.changed.notify_all()

    def _save(self, swap: SwapOut, chunk: range, entry: "_Entry") -> StoreResult:
        some = slice(chunk.start, chunk.stop)
        parent = swap.keys[chunk.start - 1] if chunk.start else swap.parent
        try:
            return self.shared.way.save(swap.keys[some], swap.ids[some], parent, entry)
        except WithdrawnError:
            why = Reason.TIMED_OUT
        except DeviceError:
            why = Reason.DEVICE
        except KvError as error:  # such as of a client that is being closed
            _log.warning("swap out failed: %s", error)
            why = Reason.UNREACHABLE
        except Exception:  # noqa: BLE001  whatever it was, nobody may wait for ever
            _log.exception("swap out failed")
            why = Reason.UNREACHABLE
        return StoreResult(0, 0, tuple(Refused(index, why) for index in range(len(chunk))))


class _Entry(Gate):
    """What a chunk passes once it has tickets: the next one may ask for its own. No cancelled swap's does."""

    def __init__(self, shared: Shared, swap: SwapOut, chunk: range) -> None:
        super().__init__()
        self._shared = shared
        self._swap = swap
        self._chunk = chunk

    def __enter__(self) -> None:
        with self._shared.changed:
            if self._swap.why is not None:
                raise WithdrawnError("the swap was cancelled before this was copied")
            self._swap.has_tickets(self._chunk)
            self._shared.changed.notify_all()
        super().__enter__()


class InLine(Line[SwapIn]):
    """Swaps in. `held_up`: swaps out that still read pages of one."""

    def __init__(self, shared: Shared, name: str, namespace: "Namespace", outs: OutLine) -> None:
        super().__init__(shared, name)
        self._namespace = namespace
        self._outs = outs
        self._flying: deque[tuple[SwapIn, Flight, float]] = deque()

    def _pick(self) -> tuple[Callable[[], None] | None, float | None]:
        if len(self._flying) >= DEPTH:
            return self._land, None
        wait_s: float | None = None
        for swap in self._in_order():
            step, soon_s = self._step_of(swap)
            if step is not None:
                return step, None
            if soon_s is not None:
                wait_s = soon_s if wait_s is None else min(wait_s, soon_s)
        return (self._land, None) if self._flying else (None, wait_s)

    def _step_of(self, swap: SwapIn) -> tuple[Callable[[], None] | None, float | None]:
        """What it may do now, or how long until then, if that is known. Locked."""
        step: Callable[[], None] | None = None
        wait_s: float | None = None
        if self._is_at_its_end(swap):
            step = None if swap.flying else partial(self._end, swap)
        elif self._is_held_up(swap):
            pass  # until a swap out says so
        elif not self._is_ready(swap):
            wait_s = NAP_S
        elif swap.incoming is not None and _clock() - swap.kept_s >= KEEP_S:
            step = partial(self._keep, swap)
        elif (soon_s := self._may_begin(swap)) > 0:
            wait_s = min(soon_s, KEEP_S)
        elif swap.incoming is None:
            step = partial(self._open, swap)
        else:
            step = partial(self._begin, swap, self._most_bytes(swap))
        return step, wait_s

    @staticmethod
    def _is_at_its_end(swap: SwapIn) -> bool:
        return swap.why is not None or swap.short or (swap.incoming is not None and not swap.incoming.has_more)

    def _is_ready(self, swap: SwapIn) -> bool:
        """Has all come from disk that will?"""
        if swap.incoming is None:
            return True
        with self._failing(swap):
            return swap.incoming.is_ready()
        return False

    def _is_held_up(self, swap: SwapIn) -> bool:
        if swap.clear:
            return False
        ids = {*swap.ids}
        readers = [out for out in self._outs.swaps if out.touches(ids)]
        for out in [out for out in readers if out.priority > swap.priority]:
            out.priority = swap.priority
            self.shared.changed.notify_all()  # or its threads would go on waiting for the budget
        swap.clear = not readers  # whatever would read these pages from now on is refused
        return bool(readers)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _open(self, swap: SwapIn) -> None:
        """Ask for its blocks; what is under way lands meanwhile."""
        with self._failing(swap):
            incoming = self.shared.way.load(swap.keys, swap.ids, swap.groups, swap.wait_s)
            while self._flying:
                self._land()
            incoming.open()
            with self.shared.changed:
                swap.incoming, swap.kept_s = incoming, _clock()
                incoming.cancelled = swap.why is not None

    def _begin(self, swap: SwapIn, most_bytes: float) -> None:
        assert swap.incoming is not None, "opened first"
        began_s = _clock()
        with self._failing(swap):
            flights = swap.incoming.begin(most_bytes, urgent=swap.priority is Priority.URGENT)
            with self.shared.changed:
                self.shared.budget.take(sum(flight.moved_bytes for flight in flights), began_s)
                swap.flying += len(flights)
                for flight in flights:
                    if flight.event is not None and flight.groups:
                        swap.events.setdefault(flight.groups, flight.event)
                self._flying += [(swap, flight, began_s) for flight in flights]
                self.shared.changed.notify_all()

    def _land(self) -> None:
        swap, flight, began_s = self._flying.popleft()
        there = False
        with self._failing(swap):
            there = flight.finish()
        with self.shared.changed:
            swap.flying -= 1
            if there and not swap.short:
                timed_bytes = flight.moved_bytes if flight.timed is None else flight.timed()
                if timed_bytes:
                    swap.seconds += self._took(timed_bytes, began_s, _clock())
                swap.moved_bytes += flight.moved_bytes
                swap.groups_done = max(swap.groups_done, flight.groups)
            else:
                swap.short = True
            self.shared.changed.notify_all()

    def _keep(self, swap: SwapIn) -> None:
        assert swap.incoming is not None, "opened first"
        swap.kept_s = _clock()
        with self._failing(swap):
            swap.incoming.keep()

    def _end(self, swap: SwapIn) -> None:
        outcome = LoadResult(0, reason=swap.why)
        if swap.incoming is not None:
            with self._failing(swap):
                outcome = swap.incoming.end(swap.why)
            self._report(swap, outcome)
        with self.shared.changed:
            self.swaps.remove(swap)
            if outcome.reason is None and swap.why is not None:
                outcome = LoadResult(0, outcome.settled, swap.why)
            swap.outcome = outcome
            swap.finish()
            swap.incoming = None  # it keeps the daemon's memory mapped, and its caller may keep the swap

    def _report(self, swap: SwapIn, outcome: LoadResult) -> None:
        """Tell the daemon how fast its memory is read: advice goes by that."""
        incoming = swap.incoming
        good = outcome.blocks == len(swap.keys) and swap.moved_bytes >= TIMED_BYTES and swap.seconds > 0
        if good and incoming is not None and incoming.from_memory:
            with suppress(KvError):
                self._namespace.report_load("dram", swap.moved_bytes, swap.seconds)

    def _failing(self, swap: SwapIn) -> "_Failing":
        return _Failing(self.shared, swap)


class _Failing:
    """What goes wrong inside ends the swap, and nothing else."""

    def __init__(self, shared: Shared, swap: Swap) -> None:
        self._shared = shared
        self._swap = swap

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> bool:
        if error is None:
            return False
        if not isinstance(error, Exception):
            return False
        if not isinstance(error, DeviceError | KvError):
            _log.error("swap in failed", exc_info=error)
        with self._shared.changed:
            self._swap.end(Reason.DEVICE if isinstance(error, DeviceError) else Reason.UNREACHABLE)
        return True
