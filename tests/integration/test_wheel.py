"""What is installed is what works: the wheel holds every package, and an engine's import stays light."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_a_wheel_holds_every_package_and_the_client_imports_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("kvstored-*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = set(archive.namelist())
    for package in ("kvproto", "kvkernels", "kvstore", "kvstored", "kvclient", "kvclient/integrations", "kvctl"):
        assert f"{package}/__init__.py" in names
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
    assert done.stdout.strip() == "[]", done.stderr
