"""What a daemon has learned is there again after it was stopped, as an operator sees it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

import kvclient
from kvctl.cli import app, globals_first
from kvctl.client import Exit
from kvproto.limits import KIB
from tests.node import Node, chain, fetch, put, until, values

BLOCK = 64 * KIB
REPORTS = 16


@pytest.fixture
def node() -> Iterator[Node]:
    """64 MiB of DRAM, which a keeper keeps."""
    with Node(disks=0) as node:
        node.start("--keep", "true")
        yield node


def prefill_s(cached: int) -> float:
    """What a model takes for 256 tokens behind so many."""
    return 0.050 + cached * 1e-5


def teach(ns: kvclient.Namespace) -> None:
    """A namespace of blocks, and what computing them takes."""
    keys = chain(ns.identity.model, 8)
    put(ns, keys, values(keys, BLOCK), durable=False)
    for turn in range(REPORTS):
        ns.report_prefill(256 * turn, 256, prefill_s(256 * turn))


def costs(node: Node) -> dict[str, Any]:
    """`kvctl -o json costs`, by model."""
    done = CliRunner().invoke(app, globals_first(["--runtime-dir", str(node.run), "-o", "json", "costs"]))
    assert done.exit_code == Exit.OK, done.output
    return {one["model"]: one for one in json.loads(done.stdout)["costs"]["namespaces"]}


def seconds(shown: dict[str, Any]) -> list[float]:
    """What prefills of several lengths take, by the profile that is shown."""
    return [one["seconds"] for one in shown["prefills"]]


def test_a_prefill_profile_outlives_the_daemon_that_learned_it(node: Node) -> None:
    taught, other = node.namespace(BLOCK, model="taught"), node.namespace(BLOCK, model="other")
    teach(taught)
    put(other, chain("other", 8), values(chain("other", 8), BLOCK), durable=False)
    assert until(lambda: costs(node).get("taught", {}).get("prefill_reports") == REPORTS)
    before, priced_s = costs(node)["taught"], taught.match(chain("taught", 8)).recompute_s
    taught.pin(chain("taught", 8), ttl_s=300)
    for _ in range(3):  # the last use is younger than what is written down as time passes
        assert len(fetch(taught, chain("taught", 8)).blocks) == 8
    (pinned,) = taught.pins()
    node.stop()
    node.start("--keep", "true")
    assert "memory: warm=True kept=16" in node.log()
    later = costs(node)
    assert "other" not in later or not later["other"]["prefill_reports"], "nobody has reported on it"
    assert later["taught"]["prefill_reports"] == REPORTS
    assert seconds(later["taught"]) == pytest.approx(seconds(before), rel=0.01)
    assert max(seconds(before)) > 2 * min(seconds(before)), "the control"
    taught, other = node.namespace(BLOCK, model="taught"), node.namespace(BLOCK, model="other")
    found = taught.match(chain("taught", 8))
    assert found.blocks == 8
    assert taught.pins() == [pinned], "a stop loses no use"
    assert found.recompute_s == pytest.approx(priced_s, rel=0.02), "MATCH weighs it at once"
    assert other.match(chain("other", 8)).recompute_s is None
