"""Three ways to copy many pieces, and which of them for pieces of what size: measured once a device, and kept.

    dma      a call of the copy engine a piece: nothing beats it for megabytes, calls cost 2 us each
    batch    all pieces in one call of the driver; no multiprocessor works
    kernel   a table of pieces for the multiprocessors, 16 bytes an access; best for small ones, and steals some time

All take the same moves. What a kernel cannot take (addresses that are no multiples of 16) goes by batch.
"""

import ctypes
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from kvkernels.aligned import aligned
from kvkernels.device.paged import LINK_BLOCKS, SPAN_BYTES, THREADS
from kvkernels.device.port import (
    ACCESS_BYTES,
    Device,
    DeviceError,
    DeviceLostError,
    Direction,
    Move,
    NoDeviceError,
    Stream,
    UnfitError,
)
from kvkernels.device.tables import Tables, bytes_for

VERSION: Final = 1
SIZES: Final = tuple(1 << bits for bits in range(12, 23, 2))  # 4 KiB to 4 MiB
TOTAL_BYTES: Final = 32 << 20  # of one measurement
ROUNDS: Final = 3
SOURCES: Final = Path(__file__).parent.parent / "cuda"
FILE_BYTES_MAX: Final = 1 << 16
_log = logging.getLogger(__name__)


class Engine(StrEnum):
    """Who copies."""

    DMA = "dma"
    BATCH = "batch"
    KERNEL = "kernel"


Measure: TypeAlias = Callable[[Engine, Direction, int], float]  # seconds for TOTAL_BYTES in pieces of so many bytes
Rows: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.uint64]]"  # target, source, bytes of each
Choices: TypeAlias = Mapping[Direction, Mapping[int, Engine]]  # by size of a piece


@dataclass(frozen=True, slots=True)
class Crossover:
    """Which engine is best for pieces of each of SIZES. `gb_per_s`: what was measured, for whoever asks."""

    choices: Choices
    gb_per_s: Mapping[str, float]

    def engine(self, direction: Direction, piece_bytes: int) -> Engine:
        """For pieces of about this size."""
        nearest = min(SIZES, key=lambda size: abs(size.bit_length() - piece_bytes.bit_length()))
        return self.choices[direction][nearest]


# Until something is measured: ENGINES.md, section 5.
GUESS: Final = Crossover(
    {each: {size: Engine.DMA if size >= 1 << 20 else Engine.KERNEL for size in SIZES} for each in Direction}, {}
)


class Engines:
    """All of them for one device. Any thread, each with a stream of its own."""

    def __init__(self, device: Device, tables: Tables, crossover: Crossover = GUESS) -> None:
        self._device = device
        self._tables = tables
        self.crossover = crossover
        self._kernels = True  # until one cannot be had

    def copy(self, stream: Stream, direction: Direction, moves: Sequence[Move]) -> None:
        """The moves, in any order among themselves, by whichever engine is best. As `Stream.copy` otherwise."""
        moves = merged(moves)
        if moves:
            piece_bytes = sum(length for _, _, length in moves) // len(moves)
            self.copy_by(self.crossover.engine(direction, piece_bytes), stream, direction, moves)

    def copy_by(self, engine: Engine, stream: Stream, direction: Direction, moves: Sequence[Move]) -> None:
        """By this one, if it can."""
        if engine is Engine.KERNEL and self._kernels and is_aligned(moves):
            try:
                self._by_kernel(stream, direction, moves)
            except DeviceLostError:
                raise
            except DeviceError as error:
                # Addresses that are no good are told by the next line.
                stream.copy_batch(direction, moves)
                if isinstance(error, NoDeviceError | UnfitError):  # what else it may be is over sooner or later
                    self._kernels = False
                    _log.warning("%s copies without kernels: %s", self._device.properties.name, error)
        elif engine is Engine.DMA:
            stream.copy(direction, moves)
        else:
            stream.copy_batch(direction, moves)

    def _by_kernel(self, stream: Stream, direction: Direction, moves: Sequence[Move]) -> None:
        table: Rows = np.array(moves, dtype=np.uint64)
        if direction is not Direction.ON_DEVICE:
            column = 1 if direction is Direction.TO_DEVICE else 0
            reach, lengths = self._device.reach, table[:, 2].tolist()
            table[:, column] = [reach(*each) for each in zip(table[:, column].tolist(), lengths, strict=True)]
        table = cut(table)
        longest = int(table[:, 2].max())
        arrays: list[np.ndarray[Any, Any]] = [np.ascontiguousarray(table[:, column]) for column in range(3)]
        room = self._tables.take(bytes_for(arrays))
        try:
            places = [ctypes.c_uint64(place) for place in room.upload(stream, arrays)]
            spans = -(-longest // SPAN_BYTES) * len(table)
            most = self._device.properties.multiprocessors * 4
            grid = min(most if direction is Direction.ON_DEVICE else min(most, LINK_BLOCKS), -(-spans * 32 // THREADS))
            last = ctypes.c_int64(longest), ctypes.c_int64(len(table))
            stream.launch("move_pieces", max(1, grid), THREADS, *places, *last)
        finally:
            self._tables.give_back(room, stream.record())


def merged(moves: Sequence[Move]) -> list[Move]:
    """Neighbours on both sides as one, and none of nothing."""
    whole: list[Move] = []
    for target, source, length in moves:
        if not length:
            continue
        if whole:
            last_target, last_source, last = whole[-1]
            if target == last_target + last and source == last_source + last:
                whole[-1] = last_target, last_source, last + length
                continue
        whole.append((target, source, length))
    return whole


def cut(table: Rows) -> Rows:
    """The same bytes in moves no longer than the mean, in whole spans: a kernel walks each as if it were the longest.

    At most twice as many, and at most three times as many spans are walked as have bytes in them.
    """
    lengths = table[:, 2].astype(np.int64)
    most = max(1, -(-int(lengths.sum()) // (lengths.size * SPAN_BYTES))) * SPAN_BYTES
    if int(lengths.max()) <= most:
        return table
    pieces = -(-lengths // most)
    numbers = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its move
    begins = (numbers * most).astype(np.uint64)
    whole: Rows = np.repeat(table, pieces, axis=0)
    whole[:, :2] += begins[:, None]
    whole[:, 2] = np.minimum(whole[:, 2] - begins, np.uint64(most))
    return whole


def is_aligned(moves: Sequence[Move]) -> bool:
    """May kernels take them?"""
    return not any((target | source | length) % ACCESS_BYTES for target, source, length in moves)


# -- what was measured -----------------------------------------------------------------------------------------------


def load_or_measure(device: Device, tables: Tables, folder: Path | None, measure: Measure | None = None) -> Crossover:
    """What is kept in `folder` for this device, driver and these kernels; else measured now, 1 or 2 s, and kept.

    A file that is damaged, or another version's, counts as none; one that cannot be written is done without.
    """
    found = kept(device, folder)
    if found is not None:
        return found
    if measure is not None:
        fresh = calibrate(measure)
    else:
        with closing(_Room(device)) as room:
            fresh = calibrate(partial(_stopwatch, room, Engines(device, tables)))
    if folder is not None:
        with suppress(OSError):
            _write(_file(device, folder), device, fresh)
    return fresh


def kept(device: Device, folder: Path | None) -> Crossover | None:
    """What was measured before, if it is there."""
    return None if folder is None else _read(_file(device, folder), _digest(device))


def _file(device: Device, folder: Path) -> Path:
    return folder / f"device-{_digest(device)[:16]}.json"


def calibrate(measure: Measure) -> Crossover:
    """The fastest engine for each size and direction. One that fails there is not it.

    Raises DeviceError where none of them works, or the device is lost.
    """
    choices: dict[Direction, dict[int, Engine]] = {}
    rates: dict[str, float] = {}
    for direction in Direction:
        choices[direction] = {}
        for size in SIZES:
            took: dict[Engine, float] = {}
            for engine in Engine:
                try:
                    took[engine] = measure(engine, direction, size)
                except DeviceLostError:
                    raise
                except DeviceError as error:
                    _log.warning("%s copies no pieces of %d bytes %s: %s", engine, size, direction.value, error)
                    continue
                rates[f"{direction.value}_{size >> 10}_kib_{engine}"] = TOTAL_BYTES / took[engine] / 1e9
            if not took:
                raise DeviceError(f"no engine copies pieces of {size} bytes {direction.value}")
            choices[direction][size] = min(took, key=lambda engine: took[engine])
    return Crossover(choices, rates)


def _stopwatch(room: "_Room", engines: Engines, engine: Engine, direction: Direction, size: int) -> float:
    """Copies between places that are apart, so that nothing can be merged."""
    targets, sources = room.sides(direction)
    moves = [(targets + at, sources + at, size) for at in range(0, TOTAL_BYTES, 2 * size)]
    took = []
    for _ in range(ROUNDS + 1):  # the first one compiles
        begun = time.perf_counter()
        engines.copy_by(engine, room.stream, direction, moves)
        room.stream.synchronize()
        took.append(time.perf_counter() - begun)
    return max(1e-9, 2 * min(took[1:]))  # half of TOTAL_BYTES was copied


class _Room:
    """Memory on both sides to measure in."""

    def __init__(self, device: Device) -> None:
        with ExitStack() as undo:  # an engine may have left no room, and host memory is not freed while registered
            self._allocations = []
            for _ in range(2):
                self._allocations.append(device.allocate(TOTAL_BYTES))
                undo.callback(device.free, self._allocations[-1])
            self._host = aligned(TOTAL_BYTES)
            self._host[:] = 1
            self._registration = device.register(int(self._host.ctypes.data), TOTAL_BYTES)
            undo.callback(device.unregister, self._registration)
            self.stream = device.stream()
            undo.callback(self.stream.close)
            self._close = undo.pop_all().close

    def sides(self, direction: Direction) -> tuple[int, int]:
        """Target and source."""
        here, there = (each.address for each in self._allocations)
        return {
            Direction.TO_DEVICE: (here, self._registration.address),
            Direction.TO_HOST: (self._registration.address, here),
            Direction.ON_DEVICE: (here, there),
        }[direction]

    def close(self) -> None:
        """All of it."""
        self._close()


def _digest(device: Device) -> str:
    """Of all that the choice depends on."""
    properties = device.properties
    whole = hashlib.sha256(f"{VERSION} {properties.name} {properties.driver} {properties.emulated}".encode())
    for path in sorted(SOURCES.glob("*.cu*")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _read(file: Path, digest: str) -> Crossover | None:
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            return None
        found = json.loads(file.read_bytes())
        if found["version"] != VERSION or found["key"] != digest:
            return None
        choices = {
            each: {size: Engine(found["choices"][each.value][str(size)]) for size in SIZES} for each in Direction
        }
        rates = {str(name): float(rate) for name, rate in found["gb_per_s"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Crossover(choices, rates)


def _write(file: Path, device: Device, crossover: Crossover) -> None:
    """In its place at once, or not at all."""
    text = json.dumps(
        {
            "version": VERSION,
            "key": _digest(device),
            "device": device.properties.name,
            "driver": device.properties.driver,
            "emulated": device.properties.emulated,
            "choices": {
                each.value: {str(size): engine.value for size, engine in sizes.items()}
                for each, sizes in crossover.choices.items()
            },
            "gb_per_s": {name: round(rate, 3) for name, rate in crossover.gb_per_s.items()},
        },
        indent=1,
    )
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(text + "\n")
    beside.replace(file)
