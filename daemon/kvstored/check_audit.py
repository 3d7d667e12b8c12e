"""Where `kvstored check --repair` is written down: in the audit file of the daemon whose disk tier it is.

    --state-dir, KVSTORED_STATE_DIR, daemon.state_dir of the file of KVSTORED_CONFIG (/etc/kvstored/kvstored.toml)
    else the folder that systemd grants the service, where that serves /run/kvstored, as it does unless told otherwise
    else the runtime directory, as for the daemon itself

A folder that is not there is not made: then no daemon has acted there, and nothing is written.
"""

import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from kvstored.admin_audit import OUTCOME_LETTERS, SCOPE_LETTERS, Act, Audit
from kvstored.config import load
from kvstored.config_values import Config
from kvstored.host_limits import machine_bytes
from kvstored.settings import SYSTEM_RUNTIME_DIR
from kvstored.units import ConfigError

CONFIG_FILE: Final = Path("/etc/kvstored/kvstored.toml")
SERVICE_STATE_DIR: Final = Path("/var/lib/kvstored")
WRITE_S: Final = 2.0


def state_dir(environ: Mapping[str, str], config_file: Path = CONFIG_FILE) -> Path | None:
    """That of this host's daemon, or of the one that the environment names; None without one. Raises ConfigError."""
    usual = environ.get("KVSTORED_RUNTIME_DIR", str(SYSTEM_RUNTIME_DIR)) == str(SYSTEM_RUNTIME_DIR)
    if usual and SERVICE_STATE_DIR.is_dir():
        environ = {"STATE_DIRECTORY": str(SERVICE_STATE_DIR), **environ}
    found = _configured(environ, config_file).state_dir
    return found if found.is_dir() else None


def disk_directories(environ: Mapping[str, str], config_file: Path = CONFIG_FILE) -> tuple[Path, ...]:
    """Those of the same daemon; none without one. Raises ConfigError."""
    return _configured(environ, config_file).disk_directories


def _configured(environ: Mapping[str, str], config_file: Path) -> Config:
    named = environ.get("KVSTORED_CONFIG")
    file = Path(named) if named else config_file if config_file.exists() else None
    return load(file, environ, {}, memory_bytes=machine_bytes()).config


def write_down(given: Path | None, directories: Sequence[Path], blocks: int, erased_bytes: int, outcome: str) -> str:
    """A repair, as one line. Why it could not be written, or nothing: whoever repairs is not held up by that."""
    try:
        folder = state_dir(os.environ) if given is None else given
    except ConfigError as error:
        return f"this is in no audit file: {error}"
    if folder is None:
        return ""
    scope = " ".join(["--repair", *map(str, directories)])[:SCOPE_LETTERS]
    audit = Audit(folder)
    act = Act(
        time.time(), os.getuid(), os.getpid(), "", "check", scope, blocks, erased_bytes, outcome[:OUTCOME_LETTERS]
    )
    audit.note(act)
    audit.stop(WRITE_S)
    return f"this is not in the audit file of {folder}" if audit.lost else _given_back(folder, audit.path)


def _given_back(folder: Path, path: Path | None) -> str:
    """A file that root has just made belongs to the daemon's user, who is to write on."""
    if path is None or os.geteuid() != 0:
        return ""
    try:
        owner, file = folder.stat(), path.lstat()
        if file.st_uid != owner.st_uid and stat.S_ISREG(file.st_mode) and file.st_nlink == 1:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    except OSError as error:
        return f"{path} stays root's: {error.strerror}"
    return ""
