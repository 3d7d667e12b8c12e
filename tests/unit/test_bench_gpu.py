"""`python -m bench gpu` says what it did not measure; the emulation gives no figures."""

import pytest

from bench import gpu
from kvkernels.device import cuda
from kvkernels.device.engines import GUESS
from kvkernels.device.port import NoDeviceError


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(number: int) -> cuda.Cuda:
        raise NoDeviceError("no CUDA driver is installed")

    monkeypatch.setattr(gpu, "Cuda", none)
    found = gpu.run(quick=True)
    assert found.pop("device") == "none"
    assert found.pop("why") == "no CUDA driver is installed"
    assert set(found) == {*gpu.FIGURES, *gpu.LATER}
    assert set(found.values()) == {gpu.NOT_MEASURED}


def test_the_emulation_runs_and_says_so_in_every_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_daemon = {"client_fetch_2_mib_over_h2d", "client_store_2_mib_over_d2h", "slowdown_beside_a_swap"}
    figures = {name: figure for name, figure in gpu.FIGURES.items() if name not in needs_daemon}
    monkeypatch.setattr(gpu, "FIGURES", figures)
    monkeypatch.setattr(gpu, "load_or_measure", lambda *_: GUESS)
    monkeypatch.setattr(gpu, "PRETENDED", gpu.Scale(4 << 20, 1, 4 << 20))
    found = gpu.run(quick=True, emulate=True)
    assert found.pop("device") == "emulation"
    assert set(found.values()) == {"emulation: not measured"}
    assert set(found) > {*figures, *gpu.LATER}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > len(figures)
    assert all(line.startswith("emulation: ") for line in lines)
