"""`python -m bench gpu` says what it did not measure; the emulation gives no figures."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import gpu, gpu_own_cache, gpu_rig
from bench.harness import ROOT
from bench.quality_capture import read_capture
from kvclient.results import LoadResult
from kvkernels import encodings
from kvkernels.device import cuda
from kvkernels.device.engines import GUESS
from kvkernels.device.port import NoDeviceError
from kvkernels.encodings import Encoding, encoded_bytes

pytestmark = pytest.mark.slow


def none(number: int) -> cuda.Cuda:
    raise NoDeviceError("no CUDA driver is installed")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as there can be, and nothing calibrated."""
    monkeypatch.setattr(gpu_rig, "load_or_measure", lambda *_: GUESS)
    monkeypatch.setattr(gpu, "PRETENDED", gpu_rig.Scale(4 << 20, 1, 4 << 20, 0.0, 16))
    monkeypatch.setattr(gpu_own_cache, "TURNS", 6)


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "Cuda", none)
    found = gpu.run(quick=True)
    assert found.pop("device") == "none"
    assert found.pop("why") == "no CUDA driver is installed"
    assert set(found) == {*gpu.FIGURES}
    assert set(found.values()) == {gpu.NOT_MEASURED}


def test_the_committed_record_has_every_figure() -> None:
    found = json.loads((ROOT / "bench" / "results" / "gpu.json").read_text())["results"]
    assert [name for name in found if name not in {"device", "why"} and not name.startswith("chosen_")] == [
        *gpu.FIGURES
    ]


@pytest.mark.usefixtures("small")
def test_the_emulation_runs_all_of_it_and_says_so_in_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.run(quick=True, emulate=True)
    assert found.pop("device") == "emulation"
    assert {*gpu.FIGURES} < {*found}
    assert {name: said for name, said in found.items() if said != "emulation: not measured"} == {}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > len(gpu.FIGURES)
    assert all(line.startswith("emulation: ") for line in lines)


@pytest.mark.usefixtures("small")
def test_a_figure_that_fails_says_so_and_costs_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rig: gpu_rig.Rig) -> float:
        raise RuntimeError("of a kernel")

    monkeypatch.setattr(gpu, "FIGURES", {"first": fails, "second": lambda _: 1.0})
    found = gpu.run(quick=True, emulate=True)
    assert found["first"] == "not measured, failed: RuntimeError: of a kernel"
    assert found["second"] == "emulation: not measured"


def test_the_capture_is_small_labelled_and_takes_its_encoding() -> None:
    capture = read_capture(gpu_rig.CAPTURE)
    assert "random weights" in capture.label
    assert gpu_rig.CAPTURE.stat().st_size < 2 << 20
    plain = gpu_rig.captured()
    assert plain.nbytes == gpu_rig.BLOCK_BYTES
    encoded, back = np.zeros(encoded_bytes(Encoding.BF16_FIXED, plain.size, 8), np.uint8), np.zeros_like(plain)
    assert encodings.encode(Encoding.BF16_FIXED, plain, encoded, 8, half=False)
    encodings.decode(Encoding.BF16_FIXED, encoded, back, 8, half=False)
    assert np.array_equal(back, plain)
    assert encoded.nbytes < 0.8 * plain.nbytes


class Loads:
    """A namespace and attached memory at once: what was loaded, into which pages."""

    def __init__(self, blocks: int) -> None:
        self.pages, self.held = SimpleNamespace(blocks=blocks), dict[int, bytes]()

    def __getitem__(self, ids: list[int]) -> list[int]:
        return ids

    def load(self, keys: list[bytes], ids: list[int], timeout_s: float) -> LoadResult:
        assert len({*ids}) == len(ids) == len(keys)
        self.held.update(zip(ids, keys, strict=True))
        return LoadResult(len(keys))


def test_an_engines_own_cache_gives_way_from_the_end_of_what_was_used_longest_ago() -> None:
    one: Any = Loads(6)
    cache = gpu_own_cache.OwnCache(one, one)
    first, second, third = ([bytes([name, number]) for number in range(3)] for name in range(3))
    assert [cache.use(chain) for chain in (first, second, first)] == [0, 0, 3]
    assert cache.use(third[:1]) == 0  # the end of the second goes
    assert sorted(one.held.values()) == sorted([*first, *second[:2], third[0]])
    assert cache.use(second) == 2
    assert sorted(one.held.values()) == sorted([*first[:2], *second, third[0]])
