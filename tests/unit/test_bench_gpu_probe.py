"""`python -m bench.probe_gpu` writes every question down, whether there is somebody to answer it or not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import probe_gpu
from bench.harness import ROOT
from kvkernels.device.cuda import FOLDER
from kvkernels.device.emulated_kernels import COMPILE

RUN = "import bench.probe_gpu as probe; probe.ARENA_MIB = probe.COPY_MIB = 8; probe.main()"


def probed(tmp_path: Path, **environment: str) -> dict[str, Any]:
    """What it writes, in a process of its own."""
    file = tmp_path / "probe.json"
    subprocess.run(
        [sys.executable, "-c", RUN, "--json", file], cwd=ROOT, check=True, env=os.environ | environment, timeout=60
    )
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["probe"] == "gpu"
    return found


def test_without_a_driver_every_question_is_not_measured_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    found = probe_gpu.run()
    assert found["why"] == "no CUDA driver is installed"
    assert found["answers"] == dict.fromkeys(probe_gpu.QUESTIONS, "not measured")


def test_the_committed_answers_are_to_these_questions() -> None:
    found = json.loads((ROOT / "bench" / "results" / "probe_gpu.json").read_text())
    assert [*found["answers"]] == [*probe_gpu.QUESTIONS]


def test_a_driver_is_asked_every_question_and_what_fails_costs_no_other_answer(tmp_path: Path) -> None:
    """The stub of the driver has not all of it."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    library, source = tmp_path / "libcuda.so.1", ROOT / "tests" / "stub" / "libcuda.cpp"
    subprocess.run(["g++", *COMPILE, f"-I{FOLDER}", "-DCUDA_12", "-o", library, source], check=True)
    found = probed(tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert "why" not in found
    answers = found["answers"]
    assert [*answers] == [*probe_gpu.QUESTIONS]
    assert "not measured" not in answers.values()
    assert answers["device"] == "stub"
    assert answers["register_writable"] is True
    assert answers["context_device_mib"] >= 0
    assert answers["register_in_two_processes"] is True
    assert "cuMemsetD8_v2" in answers["open_by_ipc_handle"], "what the stub has not"
