"""`kvctl service install`: the units, the user, the folders and the configuration of a daemon under systemd.

    pieces(...)   what belongs where; the texts lie in systemd/ beside this file
    place(...)    what that changes below a root; nothing is written in a dry run, and configuration is never replaced
    commands(...) what systemd and the compiler are told afterwards

An upgrade is the same once more: units are replaced, so what one host wants otherwise belongs into a drop-in; folders
of disk that were named before are kept. Where a package has brought the units, they are its to replace, and only
drop-ins are written.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvctl.client import Exit, KvctlError
from kvctl.render import Json, _table

__all__ = [
    "Install", "Opening", "Piece", "Placed", "State", "commands", "daemon_beside", "install", "pieces", "place",
    "shown",
]  # fmt: skip

SOURCES: Final = Path(__file__).parent / "systemd"
UNIT: Final = "kvstored.service"
DISK_CONF: Final = "disk.conf"  # the drop-in that names the folders of disk
DROP_IN_LETTERS: Final = 1 << 20  # far above what the folders of a disk tier take
PACKAGED_AT: Final = "/usr/bin/kvstored"  # as the unit has it
PACKAGED_UNIT: Final = Path("/usr/lib/systemd/system") / UNIT
STORE_SINCE: Final = 254  # systemd: FileDescriptorStorePreserve=
# What the unit's ProtectHome= and PrivateTmp= hide from the daemon: it could not even be started from there.
HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  looked at, never written to
COMPILE: Final = "from kvstored.warmup import warm_up; warm_up()"


class Opening(Enum):
    """What the unit keeps shut, and a drop-in opens."""

    GPU = "gpu"
    NETWORK = "network"
    DIRECT = "direct"


class State(Enum):
    """What became of a file, or would."""

    NEW = "new"
    SAME = "same"
    CHANGED = "changed"
    KEPT = "kept"  # configuration that is there already


@dataclass(frozen=True, slots=True)
class Piece:
    """A file. `ours` is replaced at an upgrade, what is not is the operator's once it is there."""

    path: Path
    text: str
    ours: bool = True


@dataclass(frozen=True, slots=True)
class Placed:
    """A file, and what became of it."""

    piece: Piece
    state: State


@dataclass(frozen=True, slots=True)
class Install:
    """What an operator wants installed. `packaged`: where a package has its files, not an operator.

    `disks`: every folder of the disk tier, `had_disks`: there are some already, and what says so is written anew.
    """

    daemon: Path
    disks: tuple[Path, ...] = ()
    openings: tuple[Opening, ...] = ()
    systemd: int = STORE_SINCE
    packaged: bool = False
    had_disks: bool = False

    @property
    def units(self) -> Path:
        """The folder of units and their drop-ins."""
        return Path("/usr/lib/systemd/system" if self.packaged else "/etc/systemd/system")

    @property
    def drop_ins(self) -> Path:
        """The folder of the service's drop-ins."""
        return self.units / f"{UNIT}.d"


def pieces(wish: Install) -> list[Piece]:
    """Every file, by its final path."""
    others = Path("/usr/lib" if wish.packaged else "/etc")
    unit = _source(UNIT).replace(f"ExecStart={PACKAGED_AT}\n", f"ExecStart={_quoted(str(wish.daemon))}\n")
    found = [
        Piece(wish.units / UNIT, unit),
        Piece(wish.units / "kvstored.socket", _source("kvstored.socket")),
        Piece(others / "sysusers.d/kvstored.conf", _source("kvstored.sysusers")),
        Piece(others / "tmpfiles.d/kvstored.conf", _source("kvstored.tmpfiles") + _disk_folders(wish.disks)),
        Piece(Path("/etc/kvstored/kvstored.toml"), _source("kvstored.toml"), ours=False),
        Piece(Path("/etc/kvstored/environment"), _source("kvstored.env"), ours=False),
    ]
    if wish.systemd >= STORE_SINCE:
        found.append(Piece(wish.drop_ins / "254.conf", _source("kvstored-254.conf")))
    if wish.disks or wish.had_disks:
        writable = "".join(f"ReadWritePaths={_quoted(str(disk))}\n" for disk in wish.disks)
        found.append(Piece(wish.drop_ins / DISK_CONF, f"# Folders of the disk tier.\n[Service]\n{writable}"))
    for opening in wish.openings:
        ours = opening is not Opening.NETWORK  # which addresses, an operator says there
        name = f"{opening.value}.conf"
        found.append(Piece(wish.drop_ins / name, _source(f"kvstored-{name}"), ours=ours))
    return found


def _beside_package(found: Iterable[Piece], wish: Install) -> list[Piece]:
    """Of all files those that a package does not have. Units of ours in /etc would hide its own, at every upgrade."""
    names = {DISK_CONF, *(f"{opening.value}.conf" for opening in wish.openings)}
    folders = "tmpfiles.d" if wish.disks or wish.had_disks else None
    return [piece for piece in found if piece.path.name in names or piece.path.parent.name == folders]


def _source(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")


def _disk_folders(disks: Iterable[Path]) -> str:
    return "".join(f'd "{str(disk).replace("%", "%%")}" 0700 kvstored kvstored -\n' for disk in disks)


def _quoted(path: str) -> str:
    """As unit files want a path: systemd splits at spaces and replaces what follows a percent sign."""
    text = path.replace("\\", "\\\\").replace("%", "%%")
    return f'"{text}"' if " " in text else text


def _folders_there(drop_in: Path) -> list[Path]:
    """The folders that an earlier installation has opened. Raises KvctlError for what none of ours has written."""
    try:
        with drop_in.open(encoding="utf-8") as file:
            text = file.read(DROP_IN_LETTERS)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise KvctlError(Exit.REFUSED, f"{drop_in} cannot be read: {error}") from None
    found = []
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name.strip() != "ReadWritePaths":
            continue
        path = Path(value.strip().strip('"').replace("%%", "%").replace("\\\\", "\\"))
        if not path.is_absolute() or _quoted(str(path)) != value:
            text = f"{drop_in} says {line!r}, which was not written here; move that line to a drop-in of another name"
            raise KvctlError(Exit.REFUSED, text)
        found.append(path)
    return found


def _with_folders(wish: Install, root: Path, gone: Sequence[Path]) -> Install:
    """The wish and the folders that are there, without those that shall be `gone`. Raises KvctlError."""
    there = _folders_there(root / (wish.drop_ins / DISK_CONF).relative_to("/"))
    for path in gone:
        if path not in there:
            said = ", ".join(map(str, there)) or "none"
            raise KvctlError(Exit.USAGE, f"{path} is none of its folders of disk; they are: {said}")
    disks = tuple(path for path in dict.fromkeys((*there, *wish.disks)) if path not in gone)
    return replace(wish, disks=disks, had_disks=bool(there))


def place(wanted: Iterable[Piece], root: Path, *, dry_run: bool) -> list[Placed]:
    """Write what is new or has changed below `root`, whole or not at all. Raises KvctlError."""
    placed = []
    for piece in wanted:
        path = root / piece.path.relative_to("/")
        state = _state(piece, path)
        placed.append(Placed(piece, state))
        if dry_run or state in (State.SAME, State.KEPT):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_text(piece.text, encoding="utf-8")
            fresh.chmod(0o644)
            fresh.replace(path)
        except OSError as error:
            raise KvctlError(Exit.REFUSED, f"{path} cannot be written: {error.strerror}; run as root") from None
    return placed


def _state(piece: Piece, path: Path) -> State:
    try:
        there = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return State.NEW
    except (OSError, ValueError):
        return State.CHANGED if piece.ours else State.KEPT
    if there == piece.text:
        return State.SAME
    return State.CHANGED if piece.ours else State.KEPT


def commands(wish: Install, *, start: bool) -> list[list[str]]:
    """What is run after the files are there, in this order: user, folders, compiled code, units."""
    python = wish.daemon.parent / "python"
    compiling = ["runuser", "-u", "kvstored", "--", "env", "NUMBA_CACHE_DIR=/var/cache/kvstored", str(python), "-c"]
    return [
        ["systemd-sysusers", "kvstored.conf"],
        ["systemd-tmpfiles", "--create", "kvstored.conf"],
        [*compiling, COMPILE],  # or the first start would, while engines find nobody
        ["systemctl", "daemon-reload"],
        *([["systemctl", "enable", "kvstored.socket", UNIT], ["systemctl", "restart", UNIT]] if start else []),
    ]


def daemon_beside(executable: str = sys.executable) -> Path:
    """The daemon that was installed with this kvctl. Raises KvctlError."""
    found = Path(executable).parent / "kvstored"
    if not os.access(found, os.X_OK):
        raise KvctlError(Exit.REFUSED, f"there is no {found}; pip install 'kvstored[daemon,ctl]' beside this kvctl")
    return found


def _check_reach(wish: Install) -> None:
    """Raises KvctlError for what the unit would hide from the daemon."""
    elsewhere = "python3 -m venv /opt/kvstored with a python of the system, install there, and use its kvctl"
    programs = ((path, elsewhere) for path in (wish.daemon, (wish.daemon.parent / "python").resolve()))
    disks = ((path, "take another folder") for path in wish.disks)
    for path, remedy in (*programs, *disks):
        hidden = next((folder for folder in HIDDEN if path.is_relative_to(folder)), None)
        if hidden is not None:
            raise KvctlError(Exit.REFUSED, f"{path} lies in {hidden}, which the service cannot see; {remedy}")


def _systemd_version() -> int:
    """Of this host; 0 where there is none."""
    program = shutil.which("systemctl")
    if program is None:
        return 0
    said = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)  # noqa: S603
    words = said.stdout.split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0


Runner = Callable[[Sequence[str]], None]


def run(command: Sequence[str]) -> None:
    """Raises KvctlError if it cannot be run, or fails."""
    try:
        subprocess.run(command, check=True)  # noqa: S603  one of `commands`
    except (OSError, subprocess.SubprocessError) as error:
        text = f"`{shlex.join(command)}`: {error}; mend that, and install once more"
        raise KvctlError(Exit.REFUSED, text) from None


def install(
    *,
    root: Path | None,
    daemon: Path | None,
    disks: Sequence[Path],
    no_disks: Sequence[Path] = (),
    openings: Sequence[Opening] = (),
    start: bool,
    dry_run: bool,
    runner: Runner = run,
) -> tuple[list[Placed], list[list[str]]]:
    """Do it, and say what was done. With a `root`, files only. Raises KvctlError.

    `disks`: folders of the disk tier beside those that are there; `no_disks`: of these, what shall be closed again.
    """
    for path in (*disks, *([daemon] if daemon else [])):
        if not path.is_absolute() or any(sign in str(path) for sign in '\n"'):
            raise KvctlError(Exit.USAGE, f"{str(path)!r} is not an absolute path that a unit can name")
    openings = tuple(dict.fromkeys(openings))
    wish = Install(daemon or daemon_beside(), tuple(disks), openings, _systemd_version() or STORE_SINCE)
    if root is not None:
        wish = _with_folders(replace(wish, packaged=True), root, no_disks)
        return place(pieces(wish), root, dry_run=dry_run), []
    wish = _with_folders(wish, Path("/"), no_disks)
    _check_reach(wish)
    if not dry_run and not Path("/run/systemd/system").is_dir():
        raise KvctlError(Exit.REFUSED, "this host is not run by systemd; kvstored --keep needs none of it")
    found = pieces(wish)
    placed = place(_beside_package(found, wish) if PACKAGED_UNIT.exists() else found, Path("/"), dry_run=dry_run)
    wanted = commands(wish, start=start)
    if not dry_run:
        for command in wanted:
            runner(command)
    return placed, wanted


def shown(placed: Sequence[Placed], wanted: Sequence[Sequence[str]], *, dry_run: bool) -> tuple[Json, Group]:
    """For `Globals.show`: the JSON body and the table."""
    files = _table("STATE", "FILE")
    for one in placed:
        files.add_row(one.state.value, str(one.piece.path))
    parts: list[Table | Text] = [files]
    if wanted:
        parts.append(Text("\n" + ("would run:" if dry_run else "ran:")))
        parts += [Text(f"  {shlex.join(command)}") for command in wanted]
    body: Json = {
        "dry_run": dry_run,
        "files": [{"path": str(one.piece.path), "state": one.state.value} for one in placed],
        "commands": [list(command) for command in wanted],
    }
    return body, Group(*parts)
