"""`kvctl move` against real daemons: by the remote tier, and into another daemon of this machine."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvctl import move_near
from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.program import Globals, Output
from kvproto import control_pb2 as pb
from tests.integration.test_kvctl_acting import body, kvctl
from tests.integration.test_remote import host
from tests.node import PATIENCE_S, Node, assert_blocks, chain, fetch, put, until, value, values
from tests.s3 import S3Server, s3_for_daemons

BLOCK_BYTES = 16 << 10


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_for_daemons() as server:
        yield server


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Iterator[Node]:
    with host(s3) as node:
        yield node


@pytest.fixture(scope="module")
def target(s3: S3Server) -> Iterator[Node]:
    with host(s3) as node:
        yield node


@pytest.fixture(scope="module")
def alone() -> Iterator[Node]:
    """A host without a remote tier, with a disk."""
    with Node() as node:
        node.start()
        yield node


def stored(node: Node, name: str, count: int) -> tuple[list[str], list[bytes]]:
    """A chain on a host: the words that name it, and its keys."""
    keys = chain(name, count)
    ns = node.namespace(BLOCK_BYTES)
    put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
    return [*(key.hex() for key in keys), "--namespace", ns.identity.digest().hex()], keys


def audited(node: Node) -> list[dict[str, Any]]:
    return [act for act in body(kvctl(node, "-o", "json", "audit"), "audit").get("acts", ()) if act["verb"] == "move"]


def test_a_prefix_moves_by_the_remote_tier_and_another_host_has_it(source: Node, target: Node) -> None:
    words, keys = stored(source, "moved", 70)
    told = body(kvctl(source, "-o", "json", "move", *words, "--dry-run"), "move")
    assert (told["blocks"], told["moved_blocks"], told["dry_run"]) == (70, 0, True)
    assert told["bytes"] == 70 * BLOCK_BYTES
    assert not audited(source), "the control: who only looks acts not"
    done = body(kvctl(source, "-o", "json", "move", *words, "--yes"), "move")
    assert (done["moved_blocks"], done["moved_bytes"], done["evicted_blocks"]) == (70, 70 * BLOCK_BYTES, 0)
    assert len(audited(source)) == 1
    ns = target.namespace(BLOCK_BYTES)
    assert kvctl(target, "prefetch", *words)[0] == Exit.OK
    assert until(lambda: ns.match(keys).blocks == 70), target.log()[-2000:]
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
    assert_blocks(fetch(source.namespace(BLOCK_BYTES), keys).blocks, values(keys, BLOCK_BYTES))
    again = body(kvctl(source, "-o", "json", "move", *words, "--yes"), "move")
    assert again["there_blocks"] == 70


def test_a_prefix_moves_into_another_daemon_of_this_machine_and_leaves_if_told(source: Node, alone: Node) -> None:
    words, keys = stored(source, "near", 9)
    branch = [*keys[:3], *chain("branch", 2)]
    here = source.namespace(BLOCK_BYTES)
    here.store(branch[3:], values(branch[3:], BLOCK_BYTES), parent=branch[2], wait=True)
    done = body(kvctl(source, "-o", "json", "move", *words, "--to", str(alone.run), "--evict", "--yes"), "move")
    assert (done["moved_blocks"], done["evicted_blocks"]) == (9, 6)
    assert here.match(keys).blocks == 3, "what others continue stays"
    assert here.match(branch).blocks == 5
    assert_blocks(fetch(alone.namespace(BLOCK_BYTES), keys).blocks, values(keys, BLOCK_BYTES))
    assert audited(source)
    assert audited(alone)


def test_other_bytes_over_there_are_said_and_nothing_is_evicted(source: Node, alone: Node) -> None:
    words, keys = stored(source, "other bytes", 4)
    there = alone.namespace(BLOCK_BYTES)
    wrong = [value(keys[0], BLOCK_BYTES), *(value(key, BLOCK_BYTES, 1) for key in keys[1:])]
    there.store(keys, wrong, wait=True, space_s=PATIENCE_S)
    code, _, said = kvctl(source, "move", *words, "--to", str(alone.run), "--evict", "--yes")
    assert (code, "other bytes" in said) == (Exit.REFUSED, True)
    assert source.namespace(BLOCK_BYTES).match(keys).blocks == 4


def test_runs_before_one_with_other_bytes_are_counted_and_noted(
    source: Node, alone: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In-process, with short runs: the second one finds other bytes, and the first one is stored all the same."""
    monkeypatch.setattr(move_near, "RUN_BLOCKS", 4)
    words, keys = stored(source, "two runs", 8)
    there = alone.namespace(BLOCK_BYTES)
    wrong = [value(key, BLOCK_BYTES, int(number == 6)) for number, key in enumerate(keys)]
    there.store(keys, wrong, wait=True, space_s=PATIENCE_S)
    chosen = Globals(source.run, Output.TABLE, PATIENCE_S)
    with ControlClient(source.run / "control.sock", PATIENCE_S) as client:
        listed = client.namespaces().namespaces
        digest = words[-1]
        tenant = next(one.tenant for one in listed if one.digest.startswith(digest))
        with pytest.raises(KvctlError, match="4 blocks before it went well"):
            move_near.copy(chosen, client, alone.run, tenant, digest, keys)
        noted = [act for act in client.acts(pb.ListActsRequest(most=4)).acts if act.verb == "move"]
        assert noted[-1].blocks == 4


def test_what_cannot_be_moved_is_refused_before_anything_is_done(source: Node, alone: Node) -> None:
    words, _ = stored(alone, "here to stay", 3)
    code, _, said = kvctl(alone, "move", *words, "--yes")
    assert (code, "no remote tier" in said) == (Exit.REFUSED, True)
    assert kvctl(alone, "move", *words, "--to", str(alone.run), "--yes")[0] == Exit.USAGE
    assert kvctl(alone, "move", *words)[0] == Exit.USAGE, "nobody could be asked"
    unknown = [chain("nowhere", 1)[0].hex(), "--namespace", words[-1]]
    assert kvctl(alone, "move", *unknown, "--to", str(source.run), "--yes")[0] == Exit.NOT_FOUND
    assert kvctl(alone, "move", *words, "--to", str(alone.home / "nobody"), "--yes")[0] == Exit.UNREACHABLE


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone", "none"])
def test_what_lies_damaged_over_there_or_has_gone_is_written_anew_before_it_leaves_here(
    source: Node, target: Node, s3: S3Server, harm: str
) -> None:
    words, keys = stored(source, f"harmed, {harm}", 8)
    before = set(s3.objects)
    if harm != "none":
        body(kvctl(source, "-o", "json", "move", *words, "--yes"), "move")
        (name,) = set(s3.objects) - before
        if harm == "gone":
            del s3.objects[name]  # by a rule of the bucket
        elif harm == "cut":
            s3.objects[name] = s3.objects[name][:5000]
        else:
            s3.flip(name, 5000)
    puts = s3.count("PUT")
    done = body(kvctl(source, "-o", "json", "move", *words, "--evict", "--yes", "--within", "20"), "move")
    assert (done["moved_blocks"], done["evicted_blocks"]) == (8, 8)
    assert s3.count("PUT") == puts + 1
    ns = target.namespace(BLOCK_BYTES)
    ns.prefetch(keys)
    assert until(lambda: ns.match(keys).blocks == 8), target.log()[-2000:]
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))


def test_what_cannot_be_made_whole_over_there_is_named_and_stays_here(source: Node, s3: S3Server) -> None:
    words, keys = stored(source, "stays", 6)
    body(kvctl(source, "-o", "json", "move", *words, "--yes"), "move")
    s3.lies = lambda _name, content: content[:4096] + bytes(len(content) - 4096)
    try:
        code, out, said = kvctl(source, "-o", "json", "move", *words, "--evict", "--yes", "--within", "1")
    finally:
        s3.lies = None
    assert code == Exit.REFUSED
    assert f"6 blocks did not come there, {keys[0].hex()[:16]}" in said
    assert "nothing was evicted here" in said
    assert json.loads(out)["move"]["evicted_blocks"] == 0
    assert source.namespace(BLOCK_BYTES).match(keys).blocks == 6


def test_a_far_side_that_does_not_take_all_in_time_is_said(source: Node, s3: S3Server) -> None:
    words, _ = stored(source, "in vain", 5)
    with s3.stalling():
        code, out, said = kvctl(source, "-o", "json", "move", *words, "--yes", "--within", "0.2")
    assert (code, "did not come there" in said) == (Exit.REFUSED, True)
    assert json.loads(out)["move"]["moved_blocks"] == 0
