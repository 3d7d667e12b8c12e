"""`make demo`: a model's KV cache leaves one process, lives in the daemon, and comes back in others.

    this process                              engine processes
    start the daemon, with a disk
    run A ----------------------------------> compute a document's KV, store it, flush it to disk, exit
    run B ----------------------------------> recompute: the reference
                                              fetch and resume: equal to the last bit?
                                              the same with one corrupted block: different?
                                              time to first token, without and with
    kill -9 the daemon <--------------------- while generating and fetching
                                              go on; ask again: a miss, recomputed
    start it again, its memory kept
    run C ----------------------------------> recompute, fetch and resume: equal, from DRAM?
    kill -9 the daemon
    start it again, its memory let go
    run D ----------------------------------> recompute, fetch and resume: equal, from disk?

A table at the end, and with `--json` one line of JSON below it. Exit status 0 only if every promise was shown.
`--quick`: a smaller model and a shorter prompt. A few hundred MiB in a temporary directory, which is gone in the end,
as are all processes.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.process import DaemonProcess
from kvctl.client import ControlClient, KvctlError, find_socket
from kvctl.host import LinuxHost
from kvproto import control_pb2 as pb

LEAST_SPEEDUP: Final = 5.0
ENGINE_DEADLINE_S: Final = 150.0
START_S: Final = 900.0  # the first one compiles, a minute on an idle host; one that dies is noticed at once
DAEMON_DEADLINE_S: Final = 30.0  # to answer a question, to open its disk, to die
POLL_S: Final = 0.02
ROOT: Final = Path(__file__).parent.parent
BAR_COLUMNS: Final = 16  # beside the longest step in 80
INTRODUCTION: Final = """\
A, B, C and D are processes that run a model, one after the other. A computes
the KV of a document, stores it in kvstored and ends. B, C and D each get that
document with a question after it: they fetch what A computed, and resume.
Before C and before D the daemon is killed and started again.
"""
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
    parser.add_argument("--json", action="store_true", help="all that was measured, in one line at the end")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what is below cleans up
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console(highlight=False)  # as wide as the terminal or COLUMNS say, else 80
    console.print(INTRODUCTION)
    try:
        with Steps(console) as steps:
            results = run(steps, quick=options.quick)
    except DemoError as error:
        console.print(f"[red]the demonstration failed:[/red] {escape(str(error))}")
        if options.json:
            print(json.dumps({"error": str(error)}))
        return 1
    except KeyboardInterrupt:
        return 130
    promises = judge(results)
    show(console, promises, results)
    if options.json:
        print(json.dumps(results), flush=True)
    return 0 if all(promise.kept is not False for life in promises for promise in life) else 1


def run(steps: "Steps", *, quick: bool) -> Results:
    """Engines A and B, a kill; C, a kill; D. Leaves no process and no file behind. Raises DemoError."""
    began = time.monotonic()
    with Host(steps) as host:
        results: Results = {"daemon_version": host.start("start the daemon (it compiles the first time)", keep=True)}
        results |= run_engine("a", host.runtime_dir, steps, quick=quick)
        results |= run_engine("b", host.runtime_dir, steps, quick=quick, kill=host.kill)
        host.start("start the daemon again, its memory kept", keep=True)
        host.await_verified("it verifies what was kept")
        results["kept"] = run_engine("c", host.runtime_dir, steps, quick=quick) | host.origin()
        host.kill()
        steps.say("kill -9: the daemon is dead again")
        host.start("start the daemon again, its memory let go", keep=False)
        results["let_go"] = run_engine("d", host.runtime_dir, steps, quick=quick) | host.origin()
    return results | {"quick": quick, "seconds": round(time.monotonic() - began, 1)}


class Host:
    """Daemons that follow one another in a temporary directory. A context manager that leaves nothing behind."""

    def __init__(self, steps: "Steps") -> None:
        self._steps = steps
        self._folder = tempfile.TemporaryDirectory(prefix="kvstored-demo-", dir=drive(), ignore_cleanup_errors=True)
        self._home = Path(self._folder.name)
        self.runtime_dir = self._home / "run"
        self._daemon: DaemonProcess | None = None

    def start(self, step: str, *, keep: bool) -> str:
        """The next daemon, serving from disk too; with what memory was kept, or without any. Its version."""
        self._steps.update(step, 0, 1)
        arguments = [
            "--dram", "512MiB", "--keep", str(keep).lower(), "--keep-patience", "60s",
            "--disk", str(self._home / "disk"), "--disk-size", "1GiB", "--disk-admission", "all",
        ]  # fmt: skip
        try:
            self._daemon = DaemonProcess(
                self.runtime_dir, *arguments, log_file=self._home / "daemon.log", deadline_s=START_S
            )
        except RuntimeError as error:
            raise DemoError(str(error)) from error
        deadline = time.monotonic() + DAEMON_DEADLINE_S
        while self.status().disk.state != "serving":  # some 0.1 s; until then what is on disk is a miss
            if time.monotonic() > deadline:
                raise DemoError(f"the disk does not open: {self.status().disk}")
            time.sleep(POLL_S)
        self._steps.update(step, 1, 1)
        return self._daemon.version

    def await_verified(self, step: str) -> None:
        """Until it has verified what it kept, as it does in the background: else the first fetch does it."""
        self._steps.update(step, 0, 1)
        deadline = time.monotonic() + DAEMON_DEADLINE_S
        while self.status().restart.unverified_blocks:
            if time.monotonic() > deadline:
                raise DemoError("what was kept is not verified in the background")
            time.sleep(POLL_S)
        self._steps.update(step, 1, 1)

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        if self._daemon is not None:
            self._daemon.kill()

    def status(self) -> pb.GetStatusResponse:
        """What `kvctl status` knows. Raises DemoError."""
        try:
            with ControlClient(find_socket(self.runtime_dir, {}, self._home), DAEMON_DEADLINE_S) as control:
                return control.status()
        except KvctlError as error:
            raise DemoError(str(error)) from error

    def origin(self) -> Results:
        """What this daemon took over from the one before, and read from disk since."""
        status = self.status()
        return {
            "began": status.restart.began,
            "kept_blocks": status.restart.kept_blocks,
            "disk_blocks": sum(tier.blocks for tier in status.tiers if tier.name == "disk"),
            "loaded_blocks": status.disk.counters.loaded,
            "past_page_cache": all(drive.direct for drive in status.disk.drives),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # nothing shall come between
            signal.signal(number, signal.SIG_IGN)
        self.kill()
        end_processes(self._home.name)
        self._folder.cleanup()


def drive() -> str:
    """Where temporary files lie, or /var/tmp where that is memory: the disk is to be one."""
    usual = tempfile.gettempdir()
    return "/var/tmp" if LinuxHost().ground(usual).file_system in {"tmpfs", "ramfs"} else usual


def end_processes(name: str) -> None:
    """Kill what runs on our interpreter with a folder of this name: who keeps a daemon's memory outlives it.

    Found in /proc and not by its socket, which it does not have yet where the daemon was killed right after its start.
    Raises DemoError if one does not die.
    """
    deadline = time.monotonic() + DAEMON_DEADLINE_S
    while found := processes(name):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise DemoError(f"processes {found} outlive SIGKILL")
        time.sleep(POLL_S)


def processes(name: str) -> list[int]:
    """Other processes of this interpreter that have `name` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            words = path.read_bytes().split(b"\0")  # [b""] of one that is dead
            if words[0] == os.fsencode(sys.executable) and any(os.fsencode(name) in word for word in words[1:]):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


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
                steps.say(f"kill -9: the daemon is dead while {role.upper()} generates")
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


def judge(results: Results) -> list[list[Promise]]:
    """What was promised, and what came of it; a list for each life of the daemon, and what ended it."""
    durable, stored = results["durable_blocks"], results["stored_blocks"]
    differs, speedup = results["control_differs"], results["speedup"]
    on = f"on {results['threads']} thread"
    first = [
        Promise("stored by A, and flushed to disk", f"{durable} of {stored} blocks", durable == stored),
        *judge_fetch(results, "B", "dram", f"a fetch (median of {results['warm_runs']})"),
        Promise("... with one block corrupted", "different" if differs else "no different", differs),
        Promise("... first token, recomputing all", f"{results['ttft_cold_s'] * 1e3:,.0f} ms {on}"),
        Promise("... first token, fetching", f"{results['ttft_warm_s'] * 1e3:,.0f} ms {on}"),
        Promise("... speedup", f"{speedup:.1f} times, at least {LEAST_SPEEDUP:.0f} promised", speedup >= LEAST_SPEEDUP),
        Promise(
            "kill -9 while B generates",
            f"{results['fetches_before_kill']} fetches, then a miss in {results['miss_ms']:.1f} ms",
            results["survived_kill"],
        ),
    ]
    return [
        first,
        judge_later(results["kept"], "C", "dram (kept)", memory="kept", began="warm"),
        judge_later(results["let_go"], "D", "disk", memory="let go", began="cold"),
    ]


def judge_later(found: Results, name: str, tier: str, *, memory: str, began: str) -> list[Promise]:
    """After a restart."""
    without, fetching, times = found["ttft_cold_s"] * 1e3, found["ttft_warm_s"] * 1e3, found["speedup"]
    blocks = f"{found['kept_blocks']} blocks, {found['disk_blocks']} on disk"
    return [
        Promise(f"kill -9, restart, memory {memory}", f"{found['began']}: {blocks}", found["began"] == began),
        *judge_fetch(found, name, tier, "its first fetch of them"),
        Promise("... first token", f"{fetching:,.0f} ms; recomputed {without:,.0f}: {times:.1f} times", times > 1),
    ]


def judge_fetch(found: Results, name: str, tier: str, fetch: str) -> list[Promise]:
    """Whether all of the document came, from where it should, and is what was computed."""
    document = found["prompt_tokens"] - found["question_tokens"]
    why_not = f": {found['why_not']}" if found["why_not"] else ""
    equal = f"equal in every bit for {found['compared_tokens']} tokens" if found["identical"] else "different"
    hit = found["hit_tokens"] > 0  # without one all is computed, and equal of course
    return [
        Promise(
            f"{name}: tokens fetched, not computed",
            f"{found['hit_tokens']:,} of {found['prompt_tokens']:,}, from {served_from(found)}{why_not}",
            found["hit_tokens"] == document and served_from(found).startswith(tier),
        ),
        Promise(
            f"... {fetch}",
            f"{found['hit_blocks']} blocks, {found['fetch_bytes'] >> 20} MiB at {found['fetch_gb_per_s']:.2f} GB/s",
        ),
        Promise("... logits against a recompute", equal if hit else "nothing fetched", hit and found["identical"]),
    ]


def served_from(found: Results) -> str:
    """The tier, and what matters about it: memory kept over a restart, a disk that may be the page cache."""
    tier: str = found["served_from"]
    if tier == "dram" and found.get("began") == "warm" and not found["loaded_blocks"]:
        return "dram (kept)" if found["kept_blocks"] >= found["hit_blocks"] else tier
    return tier if found.get("past_page_cache", True) else tier.replace("disk", "disk/page cache")


def show(console: Console, promises: list[list[Promise]], results: Results) -> None:
    """The table, what its numbers do not say, and the verdict."""
    verdicts = {True: "[green]shown[/green]", False: "[red]NOT SHOWN[/red]", None: ""}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("what", "found", "promise"):
        table.add_column(heading)
    for life in promises:
        table.add_row()
        for promise in life:
            table.add_row(promise.what, escape(promise.found), verdicts[promise.kept])
    console.print()
    console.print(table)
    console.print(f"\n{blocks_said(results)}\n")
    console.print(verdict([promise.kept for life in promises for promise in life], results["seconds"]))


def blocks_said(results: Results) -> str:
    """Why more blocks outlive the daemon than A's document has."""
    stored = results["stored_blocks"]
    return (
        f"A restart finds more blocks than the document's {stored}: B has stored it once\n"
        "more, with one block corrupted, to see that this shows; and A a few blocks of\n"
        "another chain, which C and D fetch first, or what is timed were a client's\n"
        "first steps. What memory kept was verified in the background before C began."
    )


def verdict(kept: Sequence[bool | None], seconds: float) -> str:
    """The last line."""
    promised, shown = sum(one is not None for one in kept), sum(one is True for one in kept)
    if shown == promised:
        return f"All {promised} promises shown in {seconds:.0f} s."
    return f"[red]{promised - shown} of {promised} promises NOT SHOWN[/red], in {seconds:.0f} s."


class Steps:
    """How far each long step has got: bars on a terminal, otherwise a line at the end of each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        if console.is_terminal:
            parts = (MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(TextColumn("{task.description}"), BarColumn(BAR_COLUMNS), *parts, console=console)

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
