"""Which engine copies: measured, kept, and measured again where what was kept is no good."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkernels.device import engines
from kvkernels.device.emulation import Emulation
from kvkernels.device.engines import GUESS, SIZES, Crossover, Engine, calibrate, load_or_measure
from kvkernels.device.port import DeviceError, DeviceLostError, Direction
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
