"""What is installed is what works: the wheel holds every package, and an engine's import stays light."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.prefix import build_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ("proto", "kernels", "daemon", "clients")  # packages lie in them; `kvstore` is one itself


def packages() -> set[str]:
    """Every folder of ours that is a package, as a wheel names it."""
    folders = [ROOT / "kvstore", *(found.parent for room in SHIPPED for found in (ROOT / room).glob("*/__init__.py"))]
    return {str(found.parent.relative_to(folder.parent)) for folder in folders for found in folder.rglob("__init__.py")}


def test_a_wheel_holds_every_package_and_the_client_imports_nothing_heavy(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path / "wheel")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        held = {name.removesuffix("/__init__.py") for name in archive.namelist() if name.endswith("/__init__.py")}
        assert "kvctl/systemd/kvstored.service" in archive.namelist(), "`kvctl service install` has nothing to install"
        pages = {name.rpartition("/share/man/")[2] for name in archive.namelist() if "/share/man/" in name}
        assert {"man1/kvctl.1", "man1/kvctl-tree.1", "man5/kvstored.toml.5", "man8/kvstored.8"} <= pages
    assert {"kvstore/tier", "kvclient/integrations", "kvproto", "kvkernels", "kvstored", "kvctl"} <= packages()
    assert held == packages()
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import kvclient, kvclient.aio
assert kvclient.__file__.startswith({str(installed)!r}), kvclient.__file__
print(sorted(set(sys.modules) & {{"torch", "numba", "grpc", "lmdb", "cupy", "kvstore", "kvstored", "llvmlite"}}))
import kvstored.daemon, kvctl.cli
assert kvstored.__file__.startswith({str(installed)!r}), kvstored.__file__
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", done.stderr
