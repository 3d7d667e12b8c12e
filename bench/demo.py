"""`make demo`: a model's KV cache leaves one process, lives in the daemon, and comes back in another.

    this process                engine A                       engine B
    start the daemon
    run A --------------------> compute a document's KV
                                store it, exit
    run B ----------------------------------------------------> recompute: the reference
                                                                fetch and resume: equal to the last bit?
                                                                the same with one corrupted block: different?
                                                                time to first token, without and with
    kill -9 the daemon <--------------------------------------- while generating and fetching
                                                                go on; ask again: a miss, recomputed

A table at the end, then one line of JSON. Exit status 0 only if every promise was shown. `--quick`: a smaller model and
a shorter prompt.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.process import DaemonProcess

LEAST_SPEEDUP: Final = 5.0
ENGINE_DEADLINE_S: Final = 150.0
ROOT: Final = Path(__file__).parent.parent
QUIET: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

Results = dict[str, Any]


class DemoError(Exception):
    """The demonstration could not be carried through."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of the table. `kept` is None where nothing was promised."""

    what: str
    found: str
    kept: bool | None = None


def main() -> int:
    """Run it. The exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description="See KV move between processes.")
    parser.add_argument("--quick", action="store_true", help="a smaller model and a shorter prompt")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what is below cleans up
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    try:
        with Steps(console) as steps:
            results = run(steps, quick=options.quick)
    except DemoError as error:
        console.print(f"[red]the demonstration failed:[/red] {error}", markup=True)
        print(json.dumps({"error": str(error)}))
        return 1
    except KeyboardInterrupt:
        return 130
    promises = judge(results)
    show(console, promises)
    print(json.dumps(results), flush=True)
    return 0 if all(promise.kept is not False for promise in promises) else 1


def run(steps: "Steps", *, quick: bool) -> Results:
    """Daemon, engine A, engine B. Leaves no process and no file behind. Raises DemoError."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvstored-demo-") as folder:
        steps.update("start the daemon", 0, 1)
        try:
            daemon = DaemonProcess(Path(folder, "run"), "--dram", "512MiB", log_file=Path(folder, "daemon.log"))
        except RuntimeError as error:
            raise DemoError(str(error)) from error
        with daemon:
            steps.update("start the daemon", 1, 1)
            results: Results = {"daemon_version": daemon.version}
            results |= run_engine("a", daemon.runtime_dir, steps, quick=quick)
            results |= run_engine("b", daemon.runtime_dir, steps, quick=quick, kill=daemon.kill)
    return results | {"quick": quick, "seconds": round(time.monotonic() - began, 1)}


def run_engine(
    role: str, runtime_dir: Path, steps: "Steps", *, quick: bool, kill: Callable[[], None] | None = None
) -> Results:
    """Run one engine to its end and return what it found; `kill` is called when it asks for that."""
    steps.update(f"{role.upper()} starts", 0, 1)
    with engine_process(role, runtime_dir, quick=quick) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        result: Results | None = None
        for line in engine.stdout:
            event = json.loads(line)
            if "step" in event:
                steps.update(event["step"], event["done"], event["of"])
            elif "result" in event:
                result = event["result"]
            elif kill is not None:
                kill()
                steps.say(f"kill -9: the daemon is dead while {role.upper()} generates and fetches")
                with contextlib.suppress(BrokenPipeError):  # its status will tell
                    engine.stdin.write("dead\n")
                    engine.stdin.flush()
        status = engine.wait()
    if status or result is None:
        raise DemoError(f"engine {role.upper()} ended with status {status}")
    return result


@contextlib.contextmanager
def engine_process(role: str, runtime_dir: Path, *, quick: bool) -> Iterator["subprocess.Popen[str]"]:
    """`bench.demo_engine` in a process of its own, killed at the end and when it takes too long."""
    command = [sys.executable, "-m", "bench.demo_engine", role, str(runtime_dir), *(["--quick"] if quick else [])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | QUIET, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    watchdog = threading.Timer(ENGINE_DEADLINE_S, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def judge(results: Results) -> list[Promise]:
    """What was promised, and what came of it."""
    hit, prompt, tier = results["hit_tokens"], results["prompt_tokens"], results["served_from"]
    document = prompt - results["question_tokens"]
    identical, differs = results["identical"], results["control_differs"]
    equal = f"equal in every bit for {results['compared_tokens']} tokens"
    speedup, on = results["speedup"], f"on {results['threads']} thread"
    return [
        Promise("prompt tokens fetched, not computed", f"{hit:,} of {prompt:,}, from {tier}", hit == document),
        Promise("logits against a full recompute", equal if identical else "different", identical),
        Promise("... with one block corrupted", "different" if differs else "no different", differs),
        Promise("time to first token, cold", f"{results['ttft_cold_s'] * 1e3:,.0f} ms {on}"),
        Promise("time to first token, warm", f"{results['ttft_warm_s'] * 1e3:,.0f} ms {on}"),
        Promise("speedup", f"{speedup:.1f} times, at least {LEAST_SPEEDUP:.0f} promised", speedup >= LEAST_SPEEDUP),
        Promise("fetch", f"{results['fetch_bytes'] >> 20} MiB at {results['fetch_gb_per_s']:.1f} GB/s"),
        Promise(
            "kill -9 while generating and fetching",
            f"{results['fetches_before_kill']} good fetches, then a miss in {results['miss_ms']:.1f} ms",
            results["survived_kill"],
        ),
    ]


def show(console: Console, promises: list[Promise]) -> None:
    """The table."""
    verdicts = {True: "[green]shown[/green]", False: "[red]NOT SHOWN[/red]", None: ""}
    table = Table(title="KV from process A, through kvstored, in process B", title_justify="left")
    for heading in ("what", "found", "verdict"):
        table.add_column(heading)
    for promise in promises:
        table.add_row(promise.what, promise.found, verdicts[promise.kept])
    console.print(table)


class Steps:
    """How far each long step has got: bars on a terminal, otherwise a line at the end of each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=console)

    def update(self, step: str, done: int, of: int) -> None:
        """`done` of `of` parts of this step are behind us. The next step's beginning ends one that said no more."""
        if step not in self._began:
            self._finish_others()
            self._began[step] = time.monotonic()
            if self._bars is not None:
                self._tasks[step] = self._bars.add_task(step, total=of)
        if self._bars is not None:
            self._bars.update(self._tasks[step], completed=done)
        if done == of:
            self._finish(step)

    def say(self, text: str) -> None:
        """A line between the bars."""
        self._console.print(text)

    def _finish_others(self) -> None:
        for step in list(self._began):
            self._finish(step)

    def _finish(self, step: str) -> None:
        began = self._began[step]
        if began < 0:
            return
        self._began[step] = -1.0
        if self._bars is not None:
            task = self._tasks[step]
            total = self._bars.tasks[task].total
            self._bars.update(task, completed=total)
            self._bars.stop_task(task)
        else:
            self._console.print(f"{step}: {time.monotonic() - began:.1f} s")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()


if __name__ == "__main__":
    sys.exit(main())
