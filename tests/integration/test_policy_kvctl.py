"""`kvctl pin`, `pins`, `unpin` and `prefetch` against a real daemon: what a person reads, and what a script is told."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvclient
from kvclient.results import Tiers
from kvctl.cli import app, globals_first
from kvctl.client import Exit
from kvproto.limits import KIB
from tests.node import PATIENCE_S, Node, chain, put, put_roots, roots, until, values

BLOCK = 64 * KIB

Kvctl = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """64 MiB of DRAM above a disk that takes everything."""
    with Node() as node:
        node.start("--disk-admission", "all")
        yield node


@pytest.fixture
def kvctl(node: Node) -> Kvctl:
    """The command in this process: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        line = globals_first(["--runtime-dir", str(node.run), "--timeout", "20", *words])
        done = CliRunner().invoke(app, line, catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture
def ns(node: Node) -> kvclient.Namespace:
    """The one namespace that most tests use."""
    return node.namespace(BLOCK)


def digits(ns: kvclient.Namespace) -> str:
    """Of a namespace, as few as `kvctl` shows."""
    return ns.identity.digest().hex()[:8]


def hexed(keys: list[bytes]) -> list[str]:
    """Keys as they are typed."""
    return [key.hex() for key in keys]


def answer(done: tuple[int, str, str], name: str) -> Any:
    """The body of an answer in JSON."""
    assert done[0] == Exit.OK, done
    return json.loads(done[1])[name]


def test_a_prefix_is_pinned_listed_and_let_go(ns: kvclient.Namespace, kvctl: Kvctl) -> None:
    keys = chain("kept", 6)
    put(ns, keys[:4], values(keys[:4], BLOCK), durable=False)
    assert "nothing is pinned" in kvctl("pins")[1]
    code, out, err = kvctl("pin", *hexed(keys), "--ttl", "5m", "--namespace", digits(ns))
    assert (code, err) == (Exit.OK, "")
    told = re.fullmatch(r"4 blocks, 256\.0 KiB: pin (\d+); the chain ends there\n", out)
    assert told, out
    number = told[1]
    (mine,) = ns.pins()
    assert (mine.pin, mine.blocks) == (int(number), 4)

    code, out, err = kvctl("pins")
    assert (code, err) == (Exit.OK, "")
    assert max(map(len, out.splitlines())) <= 80, out
    (line,) = (line.split() for line in out.splitlines() if line.split()[:1] == [number])
    assert line[2:4] == [digits(ns), "operator"]
    assert line[4:7] == ["4", "256.0", "KiB"]
    assert re.fullmatch(r"(4 min 5\d|5 min 0) s", " ".join(line[7:])), out
    listed = answer(kvctl("-o", "json", "pins"), "pins")
    (pin,) = listed["pins"]
    assert (pin["blocks"], pin["bytes"], pin["refresh"]) == (4, 4 * BLOCK, False)
    assert 290 < pin["left_s"] <= 300

    tenant = pin["tenant"]
    absent = f"kvctl: tenant {tenant} has no pin {int(number) + 1}; `kvctl pins` lists those that it has\n"
    assert kvctl("unpin", "--yes", tenant, str(int(number) + 1)) == (Exit.NOT_FOUND, "0 pins ended\n", absent)
    assert len(ns.pins()) == 1
    assert kvctl("unpin", "--yes", tenant, number) == (Exit.OK, "1 pin ended\n", "")
    assert ns.pins() == []
    for retention in ("5m", "1h"):
        assert kvctl("pin", *hexed(keys[:2]), "--refresh", "--ttl", retention, "--namespace", digits(ns))[0] == Exit.OK
    assert kvctl("pins")[1].count("renews") == 2
    assert kvctl("unpin", "--yes", tenant, "--all")[1] == "2 pins ended\n"
    assert "nothing is pinned" in kvctl("pins")[1]


def test_what_cannot_be_pinned_is_told_with_a_code_and_no_traceback(ns: kvclient.Namespace, kvctl: Kvctl) -> None:
    keys = hexed(chain("never stored", 2))
    code, out, err = kvctl("pin", *keys, "--namespace", digits(ns))
    assert (code, err) == (Exit.REFUSED, "")
    assert out == "nothing was pinned; the chain ends there\n"
    for words, expected, told in (
        (["pin", *keys, "--namespace", "00" * 32], Exit.NOT_FOUND, "kvctl namespaces"),
        (["pin", *keys, "--namespace", "000000"], Exit.NOT_FOUND, "begins with 000000"),
        (["prefetch", *keys, "--tenant", "nobody"], Exit.NOT_FOUND, "no tenant is called nobody; there are: "),
        (["pins", "--tenant", "nobody"], Exit.NOT_FOUND, "nobody"),
        (["unpin", "--yes", "nobody", "--all"], Exit.NOT_FOUND, "nobody"),
        (["pin", "0123"], Exit.USAGE, "is not a key"),
        (["pin"], Exit.USAGE, "name a chain"),
        (["unpin", "nobody"], Exit.USAGE, "--all"),
    ):
        code, out, err = kvctl(*words)
        assert (code, out) == (expected, ""), words
        assert told in err, words
        assert err.startswith("kvctl: ")
        assert err.count("\n") == 1, "one line"
    assert ns.pins() == []


def test_where_several_namespaces_could_be_meant_one_must_be_named(
    node: Node, ns: kvclient.Namespace, kvctl: Kvctl
) -> None:
    other, keys = node.namespace(BLOCK, model="other"), chain("twice", 3)
    put(ns, keys, values(keys, BLOCK), durable=False)
    put(other, keys[:2], values(keys[:2], BLOCK), durable=False)
    for verb in ("pin", "prefetch"):
        code, out, err = kvctl(verb, *hexed(keys))
        assert code == Exit.USAGE, "as `kvctl clear` says of a digest that several begin with"
        assert out == ""
        assert re.match(r"kvctl: \d namespaces could be meant; name one", err), err
    for namespace, blocks in ((ns, 3), (other, 2)):
        asked = kvctl("-o", "json", "pin", *hexed(keys), "--namespace", digits(namespace))
        (pin,) = answer(asked, "pin")["pins"]
        assert pin["blocks"] == blocks
        assert [one.pin for one in namespace.pins()] == [int(pin["pin"])]
        assert namespace.unpin([one.pin for one in namespace.pins()]) == 1


def test_a_prefix_on_disk_is_fetched_and_one_that_is_pinned_there_stays_there(node: Node, kvctl: Kvctl) -> None:
    ns = node.namespace(BLOCK, model="cold")
    keys, there, low = chain("cold", 8), chain("warm", 8), chain("low", 8)
    for cold in (keys, low):
        put(ns, cold, values(cold, BLOCK))
    put_roots(ns, roots("pressure", 1200), durable=False)
    ns.flush(PATIENCE_S)
    put(ns, there, values(there, BLOCK), durable=False)
    assert ns.match(keys).tiers == ns.match(low).tiers == Tiers(disk=8)
    named = ("--namespace", digits(ns))
    assert kvctl("prefetch", *hexed(there), *named) == (Exit.OK, "8 blocks are in memory, 0 are to come\n", "")
    assert kvctl("pin", "--on-disk", *hexed(low), *named)[0] == Exit.OK
    assert kvctl("prefetch", *hexed(keys), *named) == (Exit.OK, "0 blocks are in memory, 8 are to come\n", "")
    assert until(lambda: ns.match(keys).tiers == Tiers(dram=8))
    assert ns.match(low).tiers == Tiers(disk=8), "the control"
    assert kvctl("pin", *hexed(low), *named)[0] == Exit.OK
    assert until(lambda: ns.match(low).tiers == Tiers(dram=8)), "in memory, unless it is said otherwise"
    assert kvctl("prefetch", *hexed(keys), "--within", "0")[0] == Exit.USAGE


def test_the_command_of_a_shell_ends_with_these_codes(node: Node, ns: kvclient.Namespace) -> None:
    keys = chain("shell", 2)
    put(ns, keys, values(keys, BLOCK), durable=False)
    line = [sys.executable, "-m", "kvctl", "--runtime-dir", str(node.run), "pin", "--namespace", digits(ns)]
    codes = []
    for chosen in (keys, chain("no shell", 2)):
        done = subprocess.run([*line, *hexed(chosen)], capture_output=True, text=True, check=False, timeout=60)
        assert done.stderr == ""
        codes.append(done.returncode)
    assert codes == [Exit.OK, Exit.REFUSED]
    gone = [*line[:4], str(Path(node.home) / "nowhere"), *line[5:], *hexed(keys)]
    done = subprocess.run(gone, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (Exit.UNREACHABLE, "")
