"""The command `kvstored`: run the daemon, or check a configuration file or a disk tier without one.

Exit codes: 0 stopped as asked, 1 could not start, 2 usage, 75 another daemon serves this directory, 78 configuration
error, or a directory that cannot be used, 130 interrupted before it served.
"""

import argparse
import difflib
import errno
import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NoReturn

from kvstored import __version__, threads
from kvstored.compiled import choose_cache
from kvstored.config import EX_CONFIG, SETTINGS, ConfigError, Loaded, format_bytes, load
from kvstored.defaults import default_words
from kvstored.drive_asking import ask_each, patience_of_at_most, silent
from kvstored.environment_file import read_environment
from kvstored.host_limits import machine_bytes
from kvstored.index import DirectoryHeldError, Index, hold_directory
from kvstored.index_marks import OWED
from kvstored.index_scan import LOOKS
from kvstored.lock import AlreadyRunningError, only_one
from kvstored.loop import Loop
from kvstored.mounts import MOUNTS, OF_THE_DRIVE, Mounts
from kvstored.service import HOT_SOCKET, service_of

log = logging.getLogger(__name__)

EX_USAGE = 2
EX_TEMPFAIL = 75
EX_INTERRUPTED = 130
# Of a directory: trying again helps with nothing of it, as it may where a drive or memory is short.
_LASTING: Final = {
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
ENVIRONMENT_FILE = Path("/etc/kvstored/environment")  # of the unit
_CHECK_PATIENCE_S: Final = 10.0  # for drives, while somebody waits for `config check`; a start has more


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["config"]:
        return _config(given[1:])
    if given[:1] == ["check"]:
        from kvstored.check import main as check  # noqa: PLC0415  NumPy, which nothing else here needs

        return check(given[1:])
    options, unknown = _parser().parse_known_args(given)
    if unknown:
        print(f"kvstored: {_unknown_words(unknown)}", file=sys.stderr)
        return EX_USAGE
    values = {setting.flag: getattr(options, _attribute(setting.flag)) for setting in SETTINGS}
    flags = {flag: value for flag, value in values.items() if value is not None}
    config_file = options.config or os.environ.get("KVSTORED_CONFIG")
    try:
        loaded = load(Path(config_file) if config_file else None, os.environ, flags)
    except ConfigError as error:
        print(f"kvstored: {error}", file=sys.stderr)
        return EX_CONFIG
    except KeyboardInterrupt:  # while it waits for drives
        return EX_INTERRUPTED
    return _run(loaded)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvstored",
        description="Node-local KV-cache storage daemon. `kvstored config check FILE` checks a configuration, "
        "`kvstored check DIRECTORY...` a disk tier.",
    )
    parser.add_argument("--version", action="version", version=f"kvstored {__version__}")
    parser.add_argument("--config", metavar="FILE", help="TOML file; environment and flags override it")
    for setting in SETTINGS:
        said = f"{setting.reason} [{setting.toml}, {setting.env}; {setting.range}] {default_words(setting)}"
        reason = said.replace("%", "%%")
        count = None if setting.kind.bare is None else "?"  # a switch may stand alone: --keep
        parser.add_argument(setting.flag, metavar="VALUE", nargs=count, const=setting.kind.bare, help=reason)
    return parser


class _Parser(argparse.ArgumentParser):
    """One whose mistakes are a sentence: 29 lines of usage in front of it hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"kvstored: {message}; kvstored --help has all flags\n")


def _unknown_words(words: Sequence[str]) -> str:
    """What of a command line means nothing, and what may have been meant by the first of it."""
    word = words[0].partition("=")[0]
    near = difflib.get_close_matches(word, ["--config", "--version", *(setting.flag for setting in SETTINGS)], n=1)
    kind = "flag" if word.startswith("-") else "word"
    return f"unknown {kind} {word}; " + (f"did you mean {near[0]}?" if near else "kvstored --help has all flags")


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _config(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kvstored config", description="Work on configuration without a daemon.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="say whether a file would start a daemon on this machine")
    check.add_argument("file", type=Path)
    check.add_argument(
        "--environment",
        type=Path,
        metavar="FILE",
        help=f"variables that win over it, as systemd reads them; else {ENVIRONMENT_FILE}, if that is there; "
        "/dev/null: none",
    )
    options = parser.parse_args(arguments)
    environment = options.environment or (ENVIRONMENT_FILE if os.path.lexists(ENVIRONMENT_FILE) else None)
    try:
        with patience_of_at_most(_CHECK_PATIENCE_S):
            loaded = _load_as_service(options.file, environment)
            _check_folders(loaded, options.file)
    except ConfigError as error:
        print(f"kvstored: {error}", file=sys.stderr)
        return EX_CONFIG
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    for value in loaded.values:
        print(f"{value.name} = {value.value}  # {value.origin}")
    beside = "" if environment is None else f" with {environment}"
    print(f"{options.file}: good{beside}, by the rights of uid {os.geteuid()}")
    if os.geteuid() == 0:
        print(f"root may more than the service: runuser -u kvstored -- kvstored config check {options.file}")
    return 0


def _load_as_service(file: Path, environment: Path | None) -> Loaded:
    """What a service would start with: variables are those of its file, not of whoever asks. Raises ConfigError."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORED_")}
    over = {} if environment is None else read_environment(environment)
    named = Path(over.get("KVSTORED_CONFIG", file))
    if os.path.realpath(named) != os.path.realpath(file):
        raise ConfigError(f"{environment}: KVSTORED_CONFIG is {named}, and {file} would not be read")
    try:
        # Of this machine: the control group of whoever asks is not the service's.
        return load(file, others | over, {}, memory_bytes=machine_bytes())
    except ConfigError as error:
        if str(error).startswith("environment "):
            raise ConfigError(f"{environment}: {error}") from None
        raise


def _check_folders(loaded: Loaded, file: Path) -> None:
    """Raises ConfigError for what this process could not use."""
    for setting, folders in (
        ("daemon.runtime_dir", [loaded.config.runtime_dir]), ("disk.directories", loaded.config.disk_directories),
    ):  # fmt: skip
        for folder, answer in ask_each(folders, _why_unusable).items():
            if unusable := answer.result() if answer.done() else f"{folder}: {silent()}":
                raise ConfigError(f"{_place(loaded, setting, file)}: {setting}: {unusable}")


def _place(loaded: Loaded, setting: str, file: Path) -> str:
    """Where a setting stands: FILE:LINE or a variable, or only FILE for what it leaves to its default."""
    origin = next(value.origin for value in loaded.values if value.name == setting)
    return str(file) if origin == "default" else origin.removeprefix("file ")


def _why_unusable(folder: Path) -> str:
    """Why it cannot be made, or nothing in it; empty if it can."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            return f"{there} is not a directory"
    except OSError as error:
        return f"{folder} cannot be looked at: {error.strerror}"
    if not os.access(there, os.W_OK | os.X_OK) or there == Path("/proc"):
        return f"{there} cannot be written to by uid {os.geteuid()}"
    return ""


def _run(loaded: Loaded) -> int:
    gc.disable()  # until it serves: what a start makes stays, and looking through it again and again takes 0.1 s
    config = loaded.config
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    faulthandler.enable(2)  # a watchdog's SIGABRT then says where each thread was
    threads.watch()
    try:
        service = service_of(os.environ, os.getpid(), config.runtime_dir / HOT_SOCKET)
    except ConfigError as error:
        print(f"kvstored: {error}", file=sys.stderr)
        return EX_CONFIG
    service.notifier.status("starting: loading compiled code; the first start after an installation compiles it")

    def announce() -> None:
        arenas = config.dram_bytes // config.arena_bytes
        size = format_bytes(arenas * config.arena_bytes)
        print(f"kvstored {__version__} serves {config.runtime_dir}: DRAM {size} in {arenas} arenas, pid {os.getpid()}")
        sys.stdout.flush()

    try:
        with _ours(config.runtime_dir) as held:
            choose_cache(config.runtime_dir)
            loop, index = held.enter_context(_index_of(loaded))
            # Late: numba takes 0.3 s to import, which `config check` and --help need not wait for, nor the index.
            from kvstored.daemon import Daemon  # noqa: PLC0415
            from kvstored.warmup import first_and_rest_later  # noqa: PLC0415

            rest = first_and_rest_later(disk=index is not None)

            def ready() -> None:
                announce()
                rest.start()

            service.notifier.status("starting: taking over what a former life has left")
            Daemon(loaded, loop, index, service).serve(ready)
            rest.cancel()
    except ConfigError as error:
        print(f"kvstored: {error}", file=sys.stderr)
        return EX_CONFIG
    except (AlreadyRunningError, DirectoryHeldError) as error:
        print(f"kvstored: {error}", file=sys.stderr)
        return EX_TEMPFAIL
    except OSError as error:
        print(f"kvstored: cannot start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before it served: from then on a signal ends the loop
        return EX_INTERRUPTED
    print("kvstored: stopped")
    return 0


def _ours(runtime_dir: Path) -> ExitStack:
    """As `only_one`. Raises ConfigError, too, where another directory would do."""
    with _explained("runtime directory", runtime_dir, "--runtime-dir"):
        return only_one(runtime_dir)


@contextmanager
def _explained(what: str, folder: Path, flag: str) -> Iterator[None]:
    """Say what to do where a directory cannot be made or used: trying again does not help. Raises ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LASTING and not isinstance(error, PermissionError):
            raise
        made = "used" if os.path.lexists(folder) else "made"
        why = error.strerror or str(error)
        why = why[:1].lower() + why[1:] if error.strerror else why.removeprefix(f"{folder} ")
        where = "" if error.filename in (None, str(folder), folder) else f" ({error.filename})"
        raise ConfigError(
            f"the {what} {folder} cannot be {made}: {why}{where}; name another one with {flag}"
        ) from error


def _remember(mounts: Mounts) -> None:
    try:
        mounts.remember()
    except OSError as error:  # it does without: then a drive that is not mounted at the next start is not missed
        log.warning("disk: where the directories lie cannot be noted: %s", error)


@contextmanager
def _index_of(loaded: Loaded) -> Iterator[tuple[Loop, Index | None]]:
    """The disk directories are ours, and their index is being read, if there are any. Those that are absent are left
    out; without the first one nothing is held, since nothing on disk is used then. Raises OSError.
    """
    directories, loop, folder = loaded.config.disk_directories, Loop(), loaded.config.state_dir
    mounts = Mounts(folder / MOUNTS, directories)
    with ExitStack() as stack:
        _hold_all(directories, mounts, stack)
        for directory, why in mounts.absent.items():
            log.warning("disk: directory=%s is left out: %s", directory, why)
        if directories and directories[0] not in mounts.absent:
            _remember(mounts)
        index = Index(directories, loop.wake, owed=folder / OWED, mounts=mounts) if directories else None
        if index is not None:
            index.start()
        yield loop, index


def _hold_all(directories: Sequence[Path], mounts: Mounts, stack: ExitStack) -> None:
    """Those that are not absent, which counts for whatever a drive refuses. Raises ConfigError, DirectoryHeldError,
    OSError.
    """
    for directory in directories:
        if directory not in mounts.absent:
            why = _hold_one(directory, stack)
            if why:
                mounts.leave_out(directory, why)
        if directories[0] in mounts.absent:
            return


def _hold_one(directory: Path, stack: ExitStack) -> str:
    """Why it is absent; empty if it is held from now on. Raises ConfigError, DirectoryHeldError, OSError."""
    answer = ask_each([directory], _hold)[directory]
    if not answer.done():  # it has answered a moment ago
        answer.add_done_callback(_let_go)
        return silent()
    with _explained("disk directory", directory, "--disk"):
        why, held = answer.result()
    stack.enter_context(held)
    return why


def _hold(directory: Path) -> tuple[str, ExitStack]:
    """Why its drive will not have it held; empty if it is held, until the stack is closed. Raises DirectoryHeldError,
    OSError; does not return while the drive hangs.
    """
    why, stack = "", ExitStack()
    for _ in range(LOOKS):  # with one call that fails, all that lies there would be missed in this life
        try:
            if not _is_missing(directory):
                directory.stat()  # a mount point that answers nobody is there, and may be called a file
            stack.enter_context(hold_directory(directory))
        except OSError as error:
            if error.errno not in OF_THE_DRIVE or _is_missing(directory / "lock"):
                raise  # never used: whoever configured that is told, say of a folder that the unit may not write to
            said = (error.strerror or str(error)).lower()
            why = f"its drive cannot be used: {said} ({error.filename or directory})"
        else:
            return "", stack
    return why, stack


def _let_go(answer: "Future[tuple[str, ExitStack]]") -> None:
    """It was held too late: whoever looks after that directory now holds it when its drive is there (`drive.py`)."""
    if answer.exception() is None:
        answer.result()[1].close()


def _is_missing(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
