"""Earlier versions of this project, built from its history: `python -m tests.skew.previous` makes what is missing.

Each is a wheel of its own commit, unpacked beside the environment and run with its dependencies; what its daemon
compiles is kept there too, so that only the first run waits a minute for it.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
HOME: Final = ROOT / ".venv" / "skew"
# The last commit that spoke version 3 of the wire (proto/WIRE.md): the next one offers 3..4.
WIRE_3: Final = "dbe05f5c1e19ced1175d2bc1143792fc1e59ad27"
# The last commit that spoke version 4 and whose daemon starts: it was written in one piece with the two that follow,
# of which the first lacks what the second brings, and that one offers 3..5.
WIRE_4: Final = "54f45ad8ab18e734a68b0d5e2e6f027d7057f076"
RELEASE: Final = re.compile(r"v?(\d+(?:\.\d+)+)(-.+)?")
WARM_UP: Final = "from kvstored.warmup import warm_up; warm_up()"


class NoHistoryError(Exception):
    """The commit is not in this clone."""


@dataclass(frozen=True, slots=True)
class Version:
    """One to be compared with: its commit, or why it cannot be had here."""

    commit: str
    why_not: str = ""


def earlier(root: Path = ROOT) -> dict[str, Version]:
    """By name: the last release before this commit, if there was one, and who speaks the wire of before.

    In a shallow clone either may be missing; then it says why.
    """
    found = {"wire-3": _version(root, WIRE_3)}
    if release := last_release(root):
        found[release] = _version(root, release)
    return found


def compared(root: Path = ROOT) -> dict[str, Version]:
    """Each version that today's is compared with, once: those of before, and who spoke version 4 of the wire.

    A release that is the last commit of a version of the wire goes by that name.
    """
    found: dict[str, Version] = {}
    for name, version in (earlier(root) | {"wire-4": _version(root, WIRE_4)}).items():
        if version.why_not or version not in found.values():
            found[name] = version
    return found


def last_release(root: Path) -> str:
    """The newest of the tags v1.2.3 (or 1.2.3) on the way here, but for one of this very commit; empty without any.

    1.2.3-rc1 comes before 1.2.3. Where history was cut off it is not known which tags lie on the way: then any counts.
    """
    try:
        shallow = _git(root, "rev-parse", "--is-shallow-repository").decode().strip() == "true"
        here = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
        on_the_way = () if shallow else ("--merged", "HEAD")
        tags = _git(root, "tag", *on_the_way).decode().split()
        numbered = {tag: found for tag in tags if (found := RELEASE.fullmatch(tag))}
        newest_first = sorted(numbered, key=lambda tag: _rank(numbered[tag]), reverse=True)
        return next((tag for tag in newest_first if _commit(root, tag) != here), "")
    except NoHistoryError:
        return ""


def _rank(tag: "re.Match[str]") -> tuple[tuple[int, ...], bool, str]:
    return tuple(map(int, tag[1].split("."))), not tag[2], tag[2] or ""


def _version(root: Path, name: str) -> Version:
    try:
        return Version(_commit(root, name))
    except NoHistoryError as missing:
        return Version("", str(missing))


def site_of(commit: str) -> Path:
    """Where the packages of a commit lie; made if they do not."""
    home = HOME / commit[:12]
    site, stamp = home / "site", home / "compiled" / "stamp"
    if not site.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix="making-") as making:
            _unpack(_build(commit, Path(making)), Path(making) / "site").rename(site)
    if not stamp.exists():
        _run("-c", WARM_UP, site=site)  # where it stays: numba's cache goes by path and time of a file
        stamp.touch()
    return site


def environ_of(site: Path | None) -> dict[str, str]:
    """The environment in which this interpreter runs the packages of `site`; None: those of today."""
    environ = dict(os.environ)
    environ.pop("PYTHONPATH", None)
    environ["PYTHONSAFEPATH"] = "1"  # or the folder it is started in would come first
    if site is not None:
        environ["PYTHONPATH"] = str(site)
        environ["NUMBA_CACHE_DIR"] = str(site.parent / "compiled")
    return environ


def _build(commit: str, making: Path) -> Path:
    """A wheel, as it would have been released."""
    source = making / "source"
    source.mkdir()
    subprocess.run(["tar", "-x", "-C", str(source)], input=_git(ROOT, "archive", commit), check=True)
    command = ("-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    _run(*command, "--wheel-dir", str(making), site=None)
    (wheel,) = making.glob("kvstored-*.whl")
    return wheel


def _unpack(wheel: Path, site: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def _run(*arguments: str, site: Path | None) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], env=environ_of(site), check=False, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:200]}: {done.stderr[-2000:]}")


def _commit(root: Path, name: str) -> str:
    return _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], check=False, capture_output=True)
    except FileNotFoundError:
        raise NoHistoryError("there is no git here") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip() or f"{arguments[-1]} is not in this clone"
        raise NoHistoryError(f"git {arguments[0]}: {reason}; fetch the whole history")
    return done.stdout


if __name__ == "__main__":
    for its_name, version in compared().items():
        print(its_name, version.why_not or f"{version.commit[:12]} {site_of(version.commit)}")
