"""An engine that writes into the memory of a read after it has said that all is there: real daemons, a stand-in."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvproto.limits import KIB
from tests.node import PATIENCE_S, Node, chain, fetch, put, until, values

STUB = Path(__file__).parent.parent / "stub" / "mooncake_package"
BLOCK_BYTES = 64 * KIB
BLOCKS = 128
TRIALS = 3


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Node, Node]]:
    """One that writes all it stores, and one that only reads; objects are files in `tmp_path`."""
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("MOONCAKE_STUB", str(tmp_path))
    with ExitStack() as stack:
        nodes = [stack.enter_context(Node(disks=0, dram="256MiB")) for _ in range(2)]
        for node, admission in zip(nodes, ("all", "none"), strict=True):
            remote = ("--remote", "mooncake://127.0.0.1:50051", "--remote-size", "10GiB")
            node.start(*remote, "--remote-admission", admission)
        yield nodes[0], nodes[1]


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["as it should be", "late"])
def test_bytes_that_an_engine_changes_after_they_were_compared_are_never_served(
    hosts: tuple[Node, Node], tmp_path: Path, *, late: bool
) -> None:
    writer, reader = hosts
    source, ns = writer.namespace(BLOCK_BYTES), reader.namespace(BLOCK_BYTES)
    served = 0
    for trial in range(TRIALS):
        keys = chain(f"late {trial}", BLOCKS)
        want = values(keys, BLOCK_BYTES)
        put(source, keys, want, durable=False)
        written = (trial + 1) * BLOCKS
        assert until(lambda written=written: len(list(tmp_path.glob("v1*"))) == written)  # type: ignore[misc]
        if late:
            (tmp_path / "LATE").touch()
        ns.match(keys)
        patience_s = 3.0 if late else PATIENCE_S  # what was changed never comes
        until(lambda keys=keys: ns.match(keys).blocks == BLOCKS, patience_s)  # type: ignore[misc]
        got = fetch(ns, keys).blocks
        served += len(got)
        assert not (got != want[: len(got)]).any(), "a block that was served has other bytes than were stored"
        (tmp_path / "LATE").unlink(missing_ok=True)
    if late:
        assert "changed" in reader.log()
    else:
        assert served == TRIALS * BLOCKS, "the control"
        assert "changed" not in reader.log()
