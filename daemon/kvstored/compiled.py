"""Where numba keeps the code that it has compiled. Loading it is running it: its files are pickles and machine code, so
the daemon takes none from a folder that somebody else can have written to.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import xxhash

from kvstored.units import ConfigError

STAMP: Final = "kvstored-sources"  # beside compiled code: what all of it was compiled from

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
    sources = _sources()
    if not (named := os.environ.get(_VARIABLE)):
        folders = dict.fromkeys(source.parent / "__pycache__" for source in sources)  # in one order, wherever they lie
        drop_stale(sources, list(folders))
        return
    folder = Path(named)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if why := _why_unsafe(folder):
        raise ConfigError(
            f"compiled code in {folder} is not run: {why}; empty that folder, let nobody but the daemon's user write "
            "there (chmod 700), and the next start compiles anew"
        )
    drop_stale(sources, [folder])


def _sources() -> list[Path]:
    """Files with functions that numba compiles and that call one another's, and constants that are compiled in."""
    spec, limits = find_spec("kvstore"), find_spec("kvproto.limits")
    assert spec is not None, "kvstore is installed"
    assert spec.origin is not None
    assert limits is not None, "and so is kvproto"
    assert limits.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    return [
        *(file for file in files if b"import njit" in (code := file.read_bytes()) or b"@compiled" in code),
        Path(limits.origin),
    ]


def drop_stale(sources: Sequence[Path], folders: Sequence[Path]) -> None:
    """Numba compiles a function again when its own file has changed, but not when that of one which it calls has, or of
    a constant: it would go on with the old ones. So all goes when any of `sources` has changed. The first folder has
    the stamp.
    """
    facts = [(file.name, (state := file.stat()).st_mtime_ns, state.st_size) for file in sources]
    stamp = xxhash.xxh3_64_hexdigest(repr(facts).encode())
    kept = folders[0] / STAMP
    with suppress(OSError):
        if kept.read_text() == stamp:
            return
    with suppress(OSError):  # who may not write there compiles nothing into it either
        for folder in folders:
            for file in [one for kind in ("*.nbi", "*.nbc", "*.compiled") for one in folder.rglob(kind)]:
                file.unlink(missing_ok=True)
        folders[0].mkdir(exist_ok=True)
        kept.write_text(stamp)
        kept.chmod(0o600)


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
