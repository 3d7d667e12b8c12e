"""Which engine copies: measured, kept, and measured again where what was kept is no good."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkernels import libc
from kvkernels.aligned import aligned
from kvkernels.device import engines
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.emulation import Emulation
from kvkernels.device.engines import GUESS, SIZES, Crossover, Engine, Engines, calibrate, load_or_measure
from kvkernels.device.paged import SPAN_BYTES
from kvkernels.device.port import (
    Argument,
    DeviceError,
    DeviceLostError,
    Direction,
    NoDeviceError,
    OutOfDeviceMemoryError,
)
from kvkernels.device.tables import Tables


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    made.close()


def as_on_a_gpu(engine: Engine, direction: Direction, size: int) -> float:
    """Kernels up to 64 KiB, batches up to 256, calls beyond; the other way round on the way to the host."""
    best = Engine.KERNEL if size <= 65536 else Engine.BATCH if size <= 262144 else Engine.DMA
    if direction is Direction.TO_HOST and best is not Engine.BATCH:
        best = Engine.DMA if best is Engine.KERNEL else Engine.KERNEL
    return 1.0 if engine is best else 2.0


def test_the_fastest_is_chosen_for_each_size_and_direction() -> None:
    found = calibrate(as_on_a_gpu)
    up, down = found.choices[Direction.TO_DEVICE], found.choices[Direction.TO_HOST]
    assert up[65536] is Engine.KERNEL
    assert up[262144] is Engine.BATCH
    assert up[1 << 20] is Engine.DMA
    assert down[65536] is Engine.DMA
    assert found.engine(Direction.TO_DEVICE, 100) is Engine.KERNEL
    assert found.engine(Direction.TO_DEVICE, 70_000) is Engine.KERNEL
    assert found.engine(Direction.TO_DEVICE, 1 << 30) is Engine.DMA
    assert found.engine(Direction.TO_HOST, 1 << 30) is Engine.KERNEL
    assert len(found.gb_per_s) == len(SIZES) * len(Engine) * len(Direction)


def test_an_engine_that_fails_is_not_the_fastest_and_the_others_are_measured() -> None:
    def measure(engine: Engine, direction: Direction, size: int) -> float:
        if (engine, size) == (Engine.DMA, 1 << 20):
            raise DeviceError("too many pieces")
        return as_on_a_gpu(engine, direction, size)

    found, control = calibrate(measure), calibrate(as_on_a_gpu)
    assert control.choices[Direction.TO_DEVICE][1 << 20] is Engine.DMA
    assert found.choices[Direction.TO_DEVICE][1 << 20] is Engine.BATCH  # as good as kernels, and first
    assert found.choices[Direction.TO_DEVICE][1 << 22] is Engine.DMA
    assert len(found.gb_per_s) == len(control.gb_per_s) - len(Direction)


@pytest.mark.parametrize("error", [DeviceError, DeviceLostError])
def test_a_device_on_which_nothing_copies_has_no_best_engine(error: type[DeviceError]) -> None:
    def measure(engine: Engine, direction: Direction, size: int) -> float:
        if error is DeviceLostError and engine is not Engine.DMA:
            return 1.0
        raise error("it does nothing")

    with pytest.raises(error):
        calibrate(measure)


@pytest.fixture
def look(device: Emulation, tmp_path: Path) -> Callable[[], tuple[Crossover, int]]:
    """Load or measure; how many measurements that took."""

    def load() -> tuple[Crossover, int]:
        asked: list[int] = []

        def measure(engine: Engine, direction: Direction, size: int) -> float:
            asked.append(size)
            return as_on_a_gpu(engine, direction, size)

        return load_or_measure(device, Tables(device), tmp_path, measure), len(asked)

    return load


ALL = len(SIZES) * len(Engine) * len(Direction)


def test_what_was_measured_is_kept(look: Callable[[], tuple[Crossover, int]], tmp_path: Path) -> None:
    first, asked = look()
    assert asked == ALL
    again, asked = look()
    assert asked == 0
    assert again.choices == first.choices != GUESS.choices
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["emulated"] is True


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "[" * 50_000,
        lambda text: text.replace('"kernel"', '"hope"'),
        lambda text: text.replace('"4096"', '"4097"'),
        lambda text: text.replace('"to_host"', '"nowhere"'),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"key": "', '"key": "0'),
        lambda text: text + " " * (1 << 17),
    ],
)
def test_a_damaged_file_is_measured_again(
    look: Callable[[], tuple[Crossover, int]], tmp_path: Path, damage: Callable[[str], str]
) -> None:
    first, _ = look()
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    assert damage(good) != good
    file.write_text(damage(good))
    again, asked = look()
    assert asked == ALL
    assert again.choices == first.choices
    assert file.read_text() == good


def test_other_kernels_or_another_driver_are_measured_anew(
    look: Callable[[], tuple[Crossover, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look()
    monkeypatch.setattr(engines, "SOURCES", tmp_path)  # no kernels at all
    assert look()[1] == ALL
    assert look()[1] == 0


def test_where_nothing_can_be_written_it_is_measured_each_time(device: Emulation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "nowhere", None):
        found = load_or_measure(device, Tables(device), folder, as_on_a_gpu)
        assert found.choices == calibrate(as_on_a_gpu).choices


def test_the_real_measurement_runs(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulation its outcome says nothing; that it copies is what is looked at."""
    monkeypatch.setattr(engines, "SIZES", (65536,))
    monkeypatch.setattr(engines, "TOTAL_BYTES", 1 << 20)
    found = load_or_measure(device, Tables(device), None)
    assert set(found.choices[Direction.ON_DEVICE]) == {65536}
    assert all(rate > 0 for rate in found.gb_per_s.values())
    assert device.free_bytes() == device.properties.memory_bytes - 3 * 65536 or device.free_bytes() > 0


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_a_measurement_without_room_on_the_device_leaves_nothing_behind(
    room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host memory that stays registered while it is freed would be written to when it is somebody else's."""
    monkeypatch.setattr(engines, "TOTAL_BYTES", 1 << 20)
    device = Emulation(memory_bytes=int(room * (1 << 20)))
    with pytest.raises(OutOfDeviceMemoryError):
        load_or_measure(device, Tables(device), None)
    assert not device._registrations.all()
    assert device.free_bytes() == device.properties.memory_bytes


def test_a_measurement_that_fails_late_leaves_nothing_behind(
    device: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_stream() -> EmulatedStream:
        raise DeviceError("no stream")

    monkeypatch.setattr(engines, "TOTAL_BYTES", 1 << 20)
    monkeypatch.setattr(device, "stream", no_stream)
    with pytest.raises(DeviceError, match="no stream"):
        load_or_measure(device, Tables(device), None)
    assert not device._registrations.all()
    assert device.free_bytes() == device.properties.memory_bytes


class Copying:
    """Moves of these lengths from host memory, apart on both sides, and what the kernel that copies them is told."""

    def __init__(self, device: Emulation, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        if shutil.which("g++") is None:
            pytest.skip("g++ is not there")
        total = sum(lengths) + 16 * len(lengths)
        self.host = aligned(total)
        self.host[:] = np.random.default_rng(5).integers(0, 256, self.host.size, dtype=np.uint8)
        self.device, self.stream = device, device.stream()
        self.target, first = device.allocate(total), int(self.host.ctypes.data)
        device.register(first, total)
        self.moves, at = [], 0
        for length in lengths:
            self.moves.append((self.target.address + at, first + at, length))
            at += length + 16
        self.launched: list[tuple[int, int]] = []  # the longest move, how many
        launch = EmulatedStream.launch

        def noted(stream: EmulatedStream, name: str, grid: int, block: int, *arguments: Argument) -> None:
            *_, longest, count = (int(each.value) for each in arguments)
            self.launched.append((longest, count))
            launch(stream, name, grid, block, *arguments)

        monkeypatch.setattr(EmulatedStream, "launch", noted)

    def arrived(self) -> bool:
        """Are all of them there, and nothing between them?"""
        self.stream.synchronize()
        there, first = libc.bytes_at(self.target.address, self.target.length), self.target.address
        wanted = np.zeros_like(there)
        for target, _, length in self.moves:
            wanted[target - first : target - first + length] = self.host[target - first : target - first + length]
        return bool(np.array_equal(there, wanted))


@pytest.mark.parametrize(
    "lengths",
    [
        [4 << 20, *[8192] * 512],  # a run of pages that are neighbours, and others
        [1 << 20, *[16] * 700],
        [*[8192] * 50, 1 << 20, 12304, 16, 1 << 19],
        [65536] * 40,
        [16],
    ],
)
def test_a_kernel_walks_about_as_much_as_there_is_to_copy(
    device: Emulation, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = Copying(device, lengths, monkeypatch)
    copier = Engines(device, Tables(device))
    copier.copy_by(Engine.KERNEL, copying.stream, Direction.TO_DEVICE, copying.moves)
    assert copying.arrived()
    ((longest, count),) = copying.launched
    useful = sum(-(-length // SPAN_BYTES) for length in lengths)
    assert useful <= -(-longest // SPAN_BYTES) * count <= 3 * useful
    assert count <= 2 * len(lengths)


def test_a_moment_without_device_memory_does_not_end_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Emulation(memory_bytes=1 << 20)
    copying = Copying(device, [4096] * 8, monkeypatch)
    copier = Engines(device, Tables(device))
    hog = device.allocate(device.free_bytes())
    copier.copy(copying.stream, Direction.TO_DEVICE, copying.moves)
    assert copying.arrived()
    assert not copying.launched
    device.free(hog)
    copier.copy(copying.stream, Direction.TO_DEVICE, copying.moves)
    assert len(copying.launched) == 1


def test_without_kernels_they_are_asked_for_once(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, asked = Copying(device, [4096] * 8, monkeypatch), []

    def launch(_stream: EmulatedStream, name: str, _grid: int, _block: int, *_: Argument) -> None:
        asked.append(name)
        raise NoDeviceError("no compiler")

    monkeypatch.setattr(EmulatedStream, "launch", launch)
    copier = Engines(device, Tables(device))
    for _ in range(2):
        copier.copy(copying.stream, Direction.TO_DEVICE, copying.moves)
    assert copying.arrived()
    assert asked == ["move_pieces"]
