"""`make deb`: the package is built, holds what it says and nothing of whoever built it, and what is in it runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.harness import ROOT
from tests.node import PATIENCE_S

PYTHON = "/usr/bin/python3"  # of the release that the package is for
NEEDED = (
    "README.md",
    "GUIDE.md",
    "OPERATING.md",
    "pyproject.toml",
    "kvstore",
    "kernels",
    "proto",
    "daemon",
    "clients",
    "systemd",
)
FILES = (
    "opt/kvstored/bin/kvstored", "opt/kvstored/bin/kvctl", "usr/bin/kvstored", "usr/bin/kvctl",
    "usr/lib/systemd/system/kvstored.service", "usr/lib/systemd/system/kvstored.socket",
    "usr/lib/sysusers.d/kvstored.conf", "usr/lib/tmpfiles.d/kvstored.conf",
    "etc/kvstored/kvstored.toml", "etc/kvstored/environment",
    "usr/share/man/man8/kvstored.8.gz", "usr/share/man/man1/kvctl.1.gz", "usr/share/doc/kvstored/OPERATING.md",
)  # fmt: skip


def run(*words: str | Path) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(list(map(str, words)), check=False, capture_output=True, text=True, env=outside())
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout


def outside() -> dict[str, str]:
    """The environment without what would lead a Python to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def need(program: str, *words: str) -> None:
    """Skip by name what this machine has not."""
    found = shutil.which(program)
    if found is None or subprocess.run([found, *words], check=False, capture_output=True).returncode:
        pytest.skip(f"{program} {' '.join(words)}: not here")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_package_is_built_and_what_is_in_it_runs(tmp_path: Path) -> None:
    need("dpkg-deb", "--version")
    need(PYTHON, "-c", "import ensurepip, venv")
    need("unshare", "--mount", "true")
    source = tmp_path / "source"
    source.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy2(ROOT / name, source)
    run(source / "systemd/debian/build", PYTHON)
    (package,) = (source / "dist").glob("*.deb")
    assert "Version: 0." in run("dpkg-deb", "--field", package, "Version", "Depends")
    assert run("dpkg-deb", "--info", package, "conffiles").split() == [f"/{name}" for name in FILES[8:10]]
    root = tmp_path / "root"
    run("dpkg-deb", "--extract", package, root)
    for name in FILES:
        assert os.path.lexists(root / name), name
    built_here = subprocess.run(
        ["grep", "-rlF", "-e", str(tmp_path), "-e", str(ROOT), str(root)], check=False, capture_output=True, text=True
    )
    assert built_here.returncode == 1, f"the host that built it is named in\n{built_here.stdout}"
    told = run("unshare", "--mount", "sh", "-e", "-c", INSTALLED, "sh", root, tmp_path / "run", f"{PATIENCE_S:.0f}")
    assert told.splitlines()[-1].startswith("stopped"), told


# /opt is that of the package in here. The first start compiles.
INSTALLED = """
mount --bind "$1/opt" /opt
cd /
/opt/kvstored/bin/kvctl --version
/opt/kvstored/bin/kvstored config check "$1/etc/kvstored/kvstored.toml"
mkdir "$2"
/opt/kvstored/bin/kvstored --runtime-dir "$2" --state-dir "$2/state" --dram 64MiB --lock false >"$2.log" 2>&1 &
for _ in $(seq 600); do
    /opt/kvstored/bin/kvctl --runtime-dir "$2" ping --count 1 && break || sleep 0.5
done
/opt/kvstored/bin/kvctl --runtime-dir "$2" status
kill "$!"
wait "$!"
echo stopped
"""
