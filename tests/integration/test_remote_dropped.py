"""What was dropped stays dropped beyond this host: real daemons, restarted or killed, and a bucket over a socket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstored.remote_ledger import FILE
from tests.integration.test_remote import BLOCK_BYTES, keep, told
from tests.node import Node, until
from tests.s3 import S3Server, s3_for_daemons

TENANT = f"uid-{os.geteuid()}"
LINES = 20_000  # of a ledger
# Python runs it at the start of each daemon: of a ledger no more than the beginning is read while a file is there.
HELD = """
import os, sys, time
if sys.orig_argv[1:3] == ["-m", "kvstored"]:
    from kvstored.remote_ledger import Ledger
    real = Ledger.read
    def read(self, meanwhile):
        def held():
            meanwhile()
            while self._lines and os.path.exists(os.environ["HELD"]):
                time.sleep(0.001)
                meanwhile()
        real(self, held)
    Ledger.read = read
"""


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_for_daemons() as server:
        yield server


@contextmanager
def host(s3: S3Server) -> Iterator[tuple[Node, tuple[str, ...]]]:
    """A host without a disk, and what its daemon is started with."""
    arguments = ("--remote", f"s3://{s3.bucket}/hosts", "--remote-endpoint", s3.endpoint, "--remote-size", "1TiB")
    with Node(disks=0) as node:
        yield node, (*arguments, "--events-listen", "grpc")


def kvctl(node: Node, *arguments: str) -> str:
    program = Path(sys.executable).with_name("kvctl")
    run = subprocess.run([program, "--runtime-dir", node.run, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return " ".join(run.stdout.split())


@pytest.mark.parametrize("scope", [["--all"], ["--tenant", TENANT], ["--tenant", "uid-nobody"]])
def test_what_a_former_life_wrote_is_cleared_before_any_client_comes(s3: S3Server, scope: list[str]) -> None:
    with host(s3) as (node, arguments):
        node.start(*arguments)
        keys = keep(node, "secret", 8)
        node.restart(*arguments)
        assert until(lambda: told(node)[0].remote.objects == 1), "the ledger has been read"
        noted = "0 objects" if scope[-1] == "uid-nobody" else "1 object"
        assert f"{noted} of this host in the remote tier would be removed" in kvctl(node, "clear", *scope, "--dry-run")
        assert len(s3.objects) == 1
        assert "of this host in the remote tier still to be removed" in kvctl(node, "clear", *scope, "--yes")
        ns = node.namespace(BLOCK_BYTES)
        if scope[-1] == "uid-nobody":
            assert until(lambda: ns.match(keys).blocks == 8), "the control"
            return
        assert until(lambda: not s3.objects), node.log()[-2000:]
        ns.match(keys)
        assert until(lambda: told(node)[0].remote.sought_empty)
        assert ns.match(keys).blocks == 0


def test_a_delete_that_was_answered_while_the_ledger_is_read_outlives_a_kill(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = tmp_path / "hold"
    (tmp_path / "sitecustomize.py").write_text(HELD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("HELD", str(hold))
    with host(s3) as (node, arguments):
        node.start(*arguments)
        keys = keep(node, "secret", 8)
        node.stop()
        (ledger,) = node.home.rglob(FILE)
        name = ledger.read_text().split()[2]
        namespace = name.rsplit("/", 2)[0]
        with ledger.open("a") as file:
            file.writelines(f"+ 1000 {namespace}/{number:040x}/64.{'abc' * 63}\n" for number in range(LINES))
        hold.touch()
        node.start(*arguments)
        node.namespace(BLOCK_BYTES).delete(keys)
        assert until(lambda: f"x {namespace}" in _end(ledger)), "it is noted"
        reading = told(node)[0].remote.objects
        node.kill()
        hold.unlink()
        assert 0 < reading < LINES, "and that was while the ledger was read"
        ledger.write_text(
            "".join(line for line in ledger.read_text().splitlines(keepends=True) if "abcabc" not in line)
        )
        node.start(*arguments)
        ns = node.namespace(BLOCK_BYTES)
        ns.match(keys)
        assert until(lambda: not s3.objects), "it is removed in this life"
        assert ns.match(keys).blocks == 0


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        return file.read().decode()
