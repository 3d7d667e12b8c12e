"""An installation of its own, as an operator makes one: a wheel, an environment, and the code compiled for it.

No network: what the wheel needs is found in the environment that runs the tests, and what a first start would compile
for a minute is taken from this checkout.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 100
PACKAGES = ("kvstore", "proto/kvproto", "daemon/kvstored")  # that have a say in what is compiled


# What pip does in the end, without pip's own second.
BUILD = """
import os, sys
from setuptools.build_meta import build_wheel
os.chdir(sys.argv[1])
build_wheel(sys.argv[2])
"""


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout."""
    folder.mkdir()
    (folder / "setup.cfg").write_text(f"[build]\nbuild_base = {folder / 'build'}\n")  # no leftovers of ours get in
    _run([sys.executable, "-c", BUILD, str(ROOT), str(folder)], DIST_EXTRA_CONFIG=str(folder / "setup.cfg"))
    (wheel,) = folder.glob("kvstored-*.whl")
    return wheel


def next_release(wheel: Path) -> Path:
    """The same code as a release that comes later; what differs is what it says of itself."""
    version = wheel.name.split("-")[1]
    later = re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), version)
    target = wheel.with_name(wheel.name.replace(f"-{version}-", f"-{later}-"))
    old, new = (f"kvstored-{one}.dist-info" for one in (version, later))
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for name in source.namelist():
            content = source.read(name)
            if name == f"{old}/METADATA":
                content = content.replace(f"\nVersion: {version}\n".encode(), f"\nVersion: {later}\n".encode(), 1)
            elif name == f"{old}/RECORD":
                text = re.sub(
                    rf"^{re.escape(old)}/METADATA,.*$", f"{old}/METADATA,,", content.decode(), flags=re.MULTILINE
                )
                content = text.replace(old, new).encode()
            made.writestr(name.replace(old, new), content)
    return target


class Prefix:
    """A virtual environment with kvstored in it. `bin` is where its commands are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        self.site = next((folder / "lib").glob("python*/site-packages"))
        # A path in a .pth file adds that folder, and not what its own .pth files add: this checkout stays out.
        (self.site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, wheel: Path) -> None:
        """This release, in place of another one."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.bin / "python")]
        _run([*pip, "install", "--no-deps", "--no-index", "--quiet", "--no-compile", "--upgrade", str(wheel)])
        self._take_compiled()

    def _take_compiled(self) -> None:
        """Compiled code goes by the name, time and size of its source, and all of it by those of a few more."""
        for source, target in ((ROOT / folder, self.site / Path(folder).name) for folder in PACKAGES):
            for path in source.rglob("*.py"):
                ours = target / path.relative_to(source)
                os.utime(ours, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            for cache in source.rglob("__pycache__"):
                ours, only_ours = target / cache.relative_to(source), shutil.ignore_patterns("*.pyc")
                shutil.copytree(cache, ours, dirs_exist_ok=True, ignore=only_ours)

    def environ(self) -> dict[str, str]:
        """For its commands: nothing of this checkout."""
        return environ()


def environ() -> dict[str, str]:
    """Ours, without what would bring this checkout in."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "KVSTORED_" not in name}


def _run(command: list[str], **more: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=WAIT_S, env=environ() | more, cwd="/"
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
