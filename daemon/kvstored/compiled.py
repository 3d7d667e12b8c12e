"""Where numba keeps the code that it has compiled. Loading it is running it: its files are pickles and machine code, so
the daemon takes none from a folder that somebody else can have written to.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvstored.units import ConfigError

_VARIABLE: Final = "NUMBA_CACHE_DIR"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER: Final = stat.S_IXGRP | stat.S_IXOTH


def choose_cache(runtime_dir: Path) -> None:
    """Compiled code is kept beside its source, by whoever may write there, and may so change the source as well; else
    in a folder of ours. Before anything of numba is imported. Raises ConfigError, or OSError.
    """
    source = Path(__file__).parent
    if _VARIABLE not in os.environ and not os.access(source, os.W_OK):
        kept = os.environ.get("CACHE_DIRECTORY", "").split(":")[0] or str(runtime_dir / "compiled")
        os.environ[_VARIABLE] = kept
    check_cache()


def check_cache() -> None:
    """Make the folder that was chosen, for nobody else, or see that nobody else can have written to it.

    Raises ConfigError, or OSError.
    """
    if not (named := os.environ.get(_VARIABLE)):
        return
    folder = Path(named)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if why := _why_unsafe(folder):
        raise ConfigError(
            f"compiled code in {folder} is not run: {why}; empty that folder, let nobody but the daemon's user write "
            "there (chmod 700), and the next start compiles anew"
        )


def _why_unsafe(folder: Path) -> str:
    """Who else can have written there; empty if nobody can."""
    inner = _OTHERS_WRITE if folder.stat().st_mode & _OTHERS_ENTER else 0  # whom it keeps out gets no further
    for path, state in _below(folder):
        if state.st_uid not in {0, os.geteuid()}:
            return f"{path} belongs to uid {state.st_uid}"
        if state.st_mode & (_OTHERS_WRITE if path == folder else inner) and not stat.S_ISLNK(state.st_mode):
            return f"others may write to {path} (mode {stat.S_IMODE(state.st_mode):04o})"
    return ""


def _below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A folder and all that is in it. What is removed meanwhile is passed over."""
    yield folder, folder.stat()
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                yield Path(root, name), Path(root, name).lstat()
