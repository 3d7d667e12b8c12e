"""Compiled code is run once it is loaded: none is taken from where somebody else can have put it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstored.compiled import STAMP, _sources, check_cache, choose_cache, drop_stale
from kvstored.config import EX_CONFIG
from kvstored.units import ConfigError

STRANGER = 4243


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a daemon leaves it that ran with any umask: closed, with files in it that are not."""
    folder = tmp_path / "compiled"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    check_cache()
    (folder / "kvstore_1").mkdir()
    file = folder / "kvstore_1/blocks.nbi"
    file.write_bytes(b"pickle")
    file.chmod(0o666)
    return folder


def test_a_folder_of_its_own_is_made_for_nobody_else_and_used(kept: Path) -> None:
    assert kept.stat().st_mode & 0o777 == 0o700
    (kept / "kvstore_1/link").symlink_to("blocks.nbi")
    check_cache()


def everybody(kept: Path) -> None:
    kept.chmod(0o777)


def a_group(kept: Path) -> None:
    kept.chmod(0o770)


def a_file(kept: Path) -> None:
    kept.chmod(0o755)


def a_folder(kept: Path) -> None:
    (kept / "kvstore_1/blocks.nbi").chmod(0o644)
    (kept / "kvstore_1").chmod(0o777)
    kept.chmod(0o711)


def planted(kept: Path) -> None:
    """While it was open; systemd has closed it since."""
    os.chown(kept / "kvstore_1/blocks.nbi", STRANGER, STRANGER)


def theirs(kept: Path) -> None:
    os.chown(kept, STRANGER, STRANGER)


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")


@pytest.mark.parametrize(
    ("open_it", "said"),
    [
        (everybody, "others may write to .*compiled .mode 0777"),
        (a_group, "others may write to .*compiled .mode 0770"),
        (a_file, "others may write to .*blocks.nbi .mode 0666"),
        (a_folder, "others may write to .*kvstore_1 .mode 0777"),
        pytest.param(planted, f"blocks.nbi belongs to uid {STRANGER}", marks=NEEDS_ROOT),
        pytest.param(theirs, f"compiled belongs to uid {STRANGER}", marks=NEEDS_ROOT),
    ],
)
def test_one_that_others_can_have_written_to_is_refused(kept: Path, open_it: Callable[[Path], None], said: str) -> None:
    check_cache()
    open_it(kept)
    with pytest.raises(ConfigError, match=said):
        check_cache()


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "CACHE_DIRECTORY"])
def test_a_daemon_whose_folder_is_open_does_not_start(tmp_path: Path, variable: str) -> None:
    folder, run = tmp_path / "open", tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    # As installed: where the source is, nobody may write, which os.access() denies root never.
    start = "import os, sys; os.access = lambda *_: False; from kvstored.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", start, "--runtime-dir", str(run), "--dram", "64MiB", "--lock", "false"],
        env=os.environ | {variable: str(folder)}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == EX_CONFIG, done.stderr
    assert f"others may write to {folder} (mode 0777)" in done.stderr
    assert "chmod 700" in done.stderr
    assert list(folder.iterdir()) == [], "nothing was kept there, or read"


def test_without_a_folder_that_is_given_it_is_one_in_the_runtime_directory_or_beside_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NUMBA_CACHE_DIR", "CACHE_DIRECTORY"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "access", lambda *_: True)
    choose_cache(tmp_path)
    assert "NUMBA_CACHE_DIR" not in os.environ
    assert not (tmp_path / "compiled").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    choose_cache(tmp_path)
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "compiled")
    assert (tmp_path / "compiled").stat().st_mode & 0o777 == 0o700


CALLED = "from numba import njit\n@njit(cache=True)\ndef called():\n    return {}\n"
CALLING = "from numba import njit\nfrom called import called\n@njit(cache=True)\ndef calling():\n    return called()\n"


@pytest.mark.slow
def test_what_was_compiled_with_other_functions_is_dropped(tmp_path: Path) -> None:
    """The control is numba by itself, which goes on with the function of before."""
    (tmp_path / "calling.py").write_text(CALLING)
    sources = [tmp_path / "called.py", tmp_path / "calling.py"]

    def says(number: int) -> str:
        sources[0].write_text(CALLED.format(number))
        os.utime(sources[0], ns=(number * 10**9, number * 10**9))
        command = [sys.executable, "-c", "from calling import calling; print(calling())"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert says(1) == "1"
    assert says(2) == "1", "numba has learned it: nothing here is needed any more"
    drop_stale(sources, [tmp_path / "__pycache__"])
    assert says(2) == "2"
    drop_stale(sources, [tmp_path / "__pycache__"])
    assert len(list(tmp_path.rglob("*.nbi"))) == 2, "the control: nothing has changed"
    sources[0].write_text(CALLED.format(3))
    drop_stale(sources, [tmp_path / "__pycache__"])
    assert not list(tmp_path.rglob("*.nb[ic]"))


def test_all_that_is_compiled_here_is_known_and_a_start_looks(kept: Path) -> None:
    names = {path.name for path in _sources()}
    assert {"blocks.py", "announcing.py", "usable.py", "forest.py", "limits.py"} <= names
    assert "store.py" not in names
    assert (kept / STAMP).exists()
    compiled, mark = kept / "kvstore_1/blocks.nbi", kept / "kvstored-1.compiled"
    mark.touch()
    check_cache()
    assert compiled.exists()
    assert mark.exists()
    (kept / STAMP).write_text("of another version")
    check_cache()
    assert not compiled.exists()
    assert not mark.exists(), "the next start would serve while it compiles"
