"""Every command that takes something away, on a real daemon: what it shows, whom it asks, and what the audit has of it.

One table, `TAKING`. Each is looked at with --dry-run, refused where nobody could be asked, answered with no, tried by
another user, and done at last; only that changes anything, and only that (and who was refused) is written down.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import kvclient
from kvctl.client import Exit
from kvproto.limits import KIB
from tests.integration.test_kvctl_acting import BLOCK, body
from tests.integration.test_kvctl_acting import kvctl as answered
from tests.kvctl_line import Result, Run, command_line
from tests.node import PATIENCE_S, Node, chain, put, values
from tests.segments import flip

STRANGER: Final = 54321
CONFIG: Final = f"""
[tenants.work]
uids = [{os.geteuid()}]
in_flight = 64
[tenants.chat]
uids = [{STRANGER}]
dram_max = "4MiB"
"""
BLOCKS: Final = 8


@dataclass(frozen=True)
class Host:
    """A daemon, one beside it for what moves, and an archive that is larger than what `chat` may have left."""

    node: Node
    there: Node
    archive: Path

    def chain(self, name: str, *, pinned: bool = True) -> list[str]:
        """A chain in a namespace of its own, of which the first half is pinned: the words that name the namespace."""
        ns = self.node.namespace(BLOCK, model=name)
        keys = chain(name, BLOCKS)
        put(ns, keys, values(keys, BLOCK), durable=False)
        if pinned:
            assert ns.pin(keys[: BLOCKS // 2], ttl_s=3600).blocks == BLOCKS // 2
        return ["--namespace", ns.identity.digest().hex()]

    def state(self) -> Any:
        """All that these commands could change."""
        looks = (("namespaces", "namespaces"), ("policy", "policies"), ("quota", "quotas"), ("pins", "pins"))
        found = {name: body(answered(self.node, name, "-o", "json"), key) for name, key in looks}
        blocks = {one["digest"]: (one["tenant"], one["blocks"]) for one in found["namespaces"]}
        pins = [one["pin"] for one in found["pins"]["pins"]]
        rules = [(one["tier"], one["tenant"], one["rule"], one["chosen"]) for one in found["policy"]]
        chosen = [(one["tenant"], one["chosen_fields"], one.get("in_flight_max")) for one in found["quota"]]
        draining = body(answered(self.node, "status", "-o", "json"), "status")["draining"]
        return blocks, pins, rules, chosen, draining

    def acts(self) -> list[dict[str, Any]]:
        """What the audit has, the newest at the end."""
        acts: list[dict[str, Any]] = body(answered(self.node, "audit", "-n", "512", "-o", "json"), "audit")["acts"]
        return acts


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Node(disks=0) as node, Node(disks=0) as there:
        for one in (node, there):
            one.home.joinpath("config.toml").write_text(CONFIG)
            one.home.chmod(0o755)
            one.start("--config", str(one.home / "config.toml"), "--tenant-control", "true")
        archive = node.home / "large.kva"
        ns = node.namespace(BLOCK, model="archive")
        for number in range(6):
            keys = chain(f"archive {number}", BLOCKS)
            put(ns, keys, values(keys, BLOCK), durable=False)
        assert answered(node, "export", str(archive), "--namespace", ns.identity.digest().hex())[0] == Exit.OK
        assert answered(node, "clear", "--all", "--yes")[0] == Exit.OK
        with kvclient.connect(node.run, tenant="chat", timeout_s=PATIENCE_S) as client:
            theirs = client.namespace(model="theirs", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK)
            for number in range(5):
                keys = chain(f"theirs {number}", BLOCKS)
                theirs.store(keys, values(keys, BLOCK), wait=True)
        yield Host(node, there, archive)


@dataclass(frozen=True)
class Taking:
    """One of them: its words once all is ready for it, what else must be shown, and what the audit says of it."""

    words: Callable[[Host], list[str]]
    verbs: Sequence[str]  # in the audit, the oldest first
    shown: Sequence[str]  # before anybody is asked, and on a dry run
    scope: Callable[[list[str]], str]  # of the last of these, from the words
    counted: Callable[[Any], tuple[int, int]] = lambda _: (0, 0)  # blocks and bytes of the last, from the answer
    body: str = ""  # of the answer; else the first verb


def quota_reset(host: Host) -> list[str]:
    host.chain("quota reset")
    assert answered(host.node, "quota", "work", "set", "in_flight=4096", "--yes")[0] == Exit.OK
    return ["quota", "work", "reset"]


def policy_reset(host: Host) -> list[str]:
    host.chain("policy reset")
    assert answered(host.node, "policy", "set", "arc", "--yes")[0] == Exit.OK
    return ["policy", "reset"]


def move(host: Host) -> list[str]:
    keys = [key.hex() for key in chain("move", BLOCKS)]
    return ["move", *keys, *host.chain("move"), "--to", str(host.there.run), "--evict"]


def blocks_and_bytes(answer: Any) -> tuple[int, int]:
    return answer["blocks"], answer["bytes"]


PINS: Final = f"concerned: 1 pin ({BLOCK * BLOCKS // 2 // KIB}.0 KiB in {BLOCKS // 2} blocks)"
TAKING: Final = {
    "clear": Taking(
        lambda host: ["clear", *host.chain("clear")], ["clear"],
        ["8 blocks, 512.0 KiB", PINS, "1 block of them, with all that leads there, leased or pinned"],
        lambda words: f"--namespace {words[2][:12]}", blocks_and_bytes,
    ),
    "evict": Taking(
        lambda host: ["evict", *host.chain("evict"), "--bytes", str(3 * BLOCK)], ["evict"],
        ["3 blocks from dram, 192.0 KiB", PINS],
        lambda words: f"--namespace {words[2][:12]} --tier dram --bytes 192KiB", blocks_and_bytes,
    ),
    "move": Taking(
        move, ["move", "evict"],
        ["8 blocks are here, 512.0 KiB", "4 would leave this daemon, 256.0 KiB", PINS, "what leads there: 1 pinned"],
        lambda words: f"--tenant work --namespace {words[10][:12]} (8 keys) --tier dram (not what continues them)",
        lambda answer: (answer["evicted_blocks"], answer["evicted_bytes"]),
    ),
    "unpin": Taking(
        lambda host: [*host.chain("unpin")[:0], "unpin", "work", "--all"], ["unpin"], [PINS],
        lambda _: "work --all",
    ),
    "drain": Taking(
        lambda _: ["drain"], ["drain"], ["efuse new blocks", "concerned: "], lambda _: "", body="draining"
    ),
    "policy set": Taking(
        lambda host: [*host.chain("policy")[:0], "policy", "set", "lfu"], ["policy set"],
        ["would evict by lfu, until now by lru", "concerned: "], lambda _: "lfu", body="policy",
    ),
    "policy reset": Taking(
        policy_reset, ["policy reset"], ["would evict by lru, until now by arc", "concerned: "], lambda _: "",
        body="policy",
    ),
    "quota set": Taking(
        lambda host: [*host.chain("quota")[:0], "quota", "work", "set", "in_flight=8"], ["quota set"],
        ["in_flight: 8, until now 64", "in_flight: what is more than 8", "concerned: "], lambda _: "work in_flight=8",
        body="quota",
    ),
    "quota reset": Taking(
        quota_reset, ["quota reset"], ["in_flight: 64, until now 4,096", "concerned: "], lambda _: "work", body="quota"
    ),
    "import": Taking(
        lambda host: ["import", str(host.archive), "--tenant", "chat"], ["import"],
        ["48", "3.0 MiB", "are free, and for the rest what is there", "concerned: "], lambda _: "--tenant chat",
        lambda answer: (answer["stored_blocks"], answer["stored_bytes"]),
    ),
}  # fmt: skip


@pytest.fixture
def typing(host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line, with nobody at a terminal unless `typed` is given."""
    return command_line(monkeypatch, capsys, "--runtime-dir", str(host.node.run), "--timeout", "20")


@pytest.fixture(params=TAKING)
def taking(request: pytest.FixtureRequest, host: Host) -> Iterator[tuple[Taking, list[str]]]:
    """One of the table, and its words on a daemon that has something for it; all is as before afterwards."""
    one = TAKING[request.param]
    yield one, one.words(host)
    answered(host.node, "undrain")
    for words in (["policy", "reset"], ["quota", "work", "reset"], ["unpin", "work", "--all"]):
        answered(host.node, *words, "--yes")
    answered(host.node, "clear", "--tenant", "work", "--yes")


def lacking(said: str, wanted: Sequence[str]) -> list[str]:
    """What of this is not said, wherever lines end."""
    text = " ".join(said.split())
    return [one for one in wanted if one not in text]


def test_it_is_shown_and_asked_and_only_a_yes_changes_anything_and_is_written_down(
    host: Host, typing: Callable[..., Result], taking: tuple[Taking, list[str]]
) -> None:
    what, words = taking
    state, acts = host.state(), host.acts()
    dry = typing(*words, "--dry-run")
    assert (dry.code, dry.err, lacking(dry.out, what.shown)) == (Exit.OK, "", []), dry.out
    assert typing(*words, "--dry-run", "-o", "json").json["version"] == 1
    nobody = typing(*words)
    assert (nobody.code, nobody.out) == (Exit.USAGE, "")
    assert "there is no terminal to ask on; give --yes to" in nobody.err
    refused = typing(*words, typed="n\n")
    assert (refused.code, refused.out, lacking(refused.err, [*what.shown, "[y/N]"])) == (Exit.REFUSED, "", [])
    assert host.state() == state
    assert host.acts() == acts, "who only looks, or changes their mind, has done nothing"

    began_s = time.time()
    done = typing(*words, "-o", "json", typed="y\n")
    assert done.code == Exit.OK, done.err
    assert host.state() != state, "the control: this is what it takes away"
    new = host.acts()[len(acts) :]
    assert [act["verb"] for act in new] == list(what.verbs)
    for act in new:
        assert (act["uid"], act["pid"], act["outcome"]) == (os.geteuid(), os.getpid(), "done")
        assert began_s - 1 <= act["unix_s"] <= time.time() + 1
    answer = done.json[what.body or what.verbs[0]]
    assert (new[-1]["blocks"], new[-1]["bytes"]) == what.counted(answer)
    assert new[-1]["scope"] == what.scope(words)


def test_a_move_with_evict_says_before_what_it_then_does(host: Host) -> None:
    words = move(host)
    told = body(answered(host.node, *words, "--dry-run", "-o", "json"), "move")
    done = body(answered(host.node, *words, "--yes", "-o", "json"), "move")
    fields = ("evicted_blocks", "evicted_bytes", "held_blocks", "pinned_blocks")
    assert [told[name] for name in fields] == [done[name] for name in fields] == [4, 4 * BLOCK, 1, 1]
    keys = chain("move", BLOCKS)
    assert host.node.namespace(BLOCK, model="move").match(keys).blocks == 4, "what is pinned, and leads there, stays"
    assert host.there.namespace(BLOCK, model="move").match(keys).blocks == BLOCKS


BY_ANOTHER: Final = """
import json, sys
sys.path[:0] = {paths!r}
from typer.testing import CliRunner
from kvctl.cli import app, globals_first
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, globals_first(["--runtime-dir", {run!r}, *words]))
    print(json.dumps([done.exit_code, done.stderr]))
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root: there is no second uid")
def test_another_user_takes_nothing_and_is_written_down_as_refused(host: Host) -> None:
    lines = {name: one.words(host) for name, one in TAKING.items() if name != "import"}  # they may fill what is theirs
    state, before = host.state(), len(host.acts())
    paths = [path for path in sys.path if path]
    environ = {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(
        ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", sys.executable, "-c",
         BY_ANOTHER.format(paths=paths, run=str(host.node.run)), json.dumps([[*w, "--yes"] for w in lines.values()])],
        capture_output=True, text=True, timeout=120, check=False, env=environ, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, line in zip(lines, done.stdout.splitlines(), strict=True):
        code, said = json.loads(line)
        assert code in (Exit.REFUSED, Exit.NOT_FOUND, Exit.USAGE), (name, said)
        assert said, name
    assert host.state() == state
    refused = host.acts()[before:]
    assert all(act["outcome"].startswith("permission_denied: uid 54321 may not change") for act in refused), refused
    assert {act["uid"] for act in refused} == {STRANGER}
    assert {act["verb"] for act in refused} >= {"clear", "evict", "policy set", "policy reset", "quota set"}
    assert answered(host.node, "unpin", "work", "--all", "--yes")[0] == Exit.OK
    assert answered(host.node, "clear", "--tenant", "work", "--yes")[0] == Exit.OK


def test_what_takes_nothing_away_is_written_down_as_it_was_done(host: Host, tmp_path: Path) -> None:
    where, key = host.chain("others", pinned=False), chain("others", BLOCKS)[-1].hex()
    keys = [one.hex() for one in chain("others", BLOCKS)]
    before = len(host.acts())
    kept = body(answered(host.node, "pin", *keys, *where, "-o", "json"), "pin")["pins"][0]
    assert answered(host.node, "prefetch", key, *where)[0] == Exit.OK
    assert answered(host.node, "scrub", "--tier", "dram")[0] == Exit.OK
    assert answered(host.node, "undrain")[0] == Exit.OK
    out = body(answered(host.node, "export", str(tmp_path / "all.kva"), "-o", "json"), "export")
    acts = host.acts()[before:]
    assert [act["verb"] for act in acts] == ["pin", "prefetch", "scrub", "undrain", "export", "export"]
    assert (acts[0]["blocks"], acts[0]["bytes"]) == (kept["blocks"], kept["bytes"]) == (BLOCKS, BLOCKS * BLOCK)
    told = {act["scope"]: (act["blocks"], act["bytes"]) for act in acts[-2:]}
    assert told == {f"--tenant {one['tenant']}": (one["blocks"], one["bytes"]) for one in out["by_tenant"]}
    assert sum(blocks for blocks, _ in told.values()) == out["blocks"], "each tenant's own, not all for each"
    assert answered(host.node, "unpin", "work", "--all", "--yes")[0] == Exit.OK


def test_an_import_once_more_is_written_down_as_what_it_stored(host: Host) -> None:
    words = ["import", str(host.archive), "--tenant", "work", "--yes", "-o", "json"]
    first, again = (body(answered(host.node, *words), "import") for _ in range(2))
    assert (first["stored_blocks"], again["stored_blocks"], again["known_blocks"]) == (48, 0, 48)
    assert [(act["blocks"], act["bytes"]) for act in host.acts()[-2:]] == [(48, 48 * BLOCK), (0, 0)]


@pytest.mark.slow
def test_a_repair_shows_blocks_and_bytes_asks_and_is_known_to_the_next_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Node() as node:
        node.start()
        ns = node.namespace(BLOCK)
        keys = chain("on disk", BLOCKS)
        put(ns, keys, values(keys, BLOCK))
        assert answered(node, "drain", "--yes")[0] == Exit.OK
        before = body(answered(node, "audit", "-o", "json"), "audit")["acts"]
        slot = node.slots()[keys[-1]]
        node.stop()
        flip(slot.path, 8 * (slot.offset + 5000))

        run = command_line(monkeypatch, capsys, "--runtime-dir", str(node.run), "check")

        def check(*options: str, typed: str | None = None) -> Result:
            return run(*options, *map(str, node.disks), typed=typed)

        erased = ["blocks damaged: 1", f"bytes damaged: {slot.slot_bytes}", "blocks good: 7", "concerned: no leases"]
        kept = {path: path.read_bytes() for path in node.segments()}
        log = (node.run / "audit.log").read_bytes()
        for options in ([], ["--dry-run"], ["--repair", "--dry-run"]):
            told = check(*options)
            assert (told.code, lacking(told.out, [*erased, "nothing was changed"])) == (1, []), told
        assert check("--repair").code == Exit.USAGE, "nobody to ask"
        refused = check("--repair", typed="n\n")
        assert (refused.code, refused.out, lacking(refused.err, [*erased, "[y/N]"])) == (Exit.REFUSED, "", [])
        assert {path: path.read_bytes() for path in node.segments()} == kept
        assert (node.run / "audit.log").read_bytes() == log

        assert check("--repair", typed="y\n").code == 1, "as kvstored check: problems were found, and are repaired"
        assert {path: path.read_bytes() for path in node.segments()} != kept
        assert check().code == 0
        node.start()
        (act,) = body(answered(node, "audit", "-o", "json"), "audit")["acts"][len(before) :]
        assert (act["verb"], act["blocks"], act["bytes"], act["outcome"]) == ("check", 1, slot.slot_bytes, "done")
        assert act["scope"] == f"--repair {node.disks[0]}"
        assert act["uid"] == os.geteuid()
        assert "check" in answered(node, "audit")[1]


def test_a_repair_that_fails_is_written_down_as_that(host: Host, tmp_path: Path) -> None:
    before = len(host.acts())
    words = [
        sys.executable,
        "-m",
        "kvstored",
        "check",
        "--repair",
        "--state-dir",
        str(tmp_path),
        str(tmp_path / "gone"),
    ]
    assert subprocess.run(words, capture_output=True, check=False).returncode == Exit.CONFIGURATION
    (line,) = (tmp_path / "audit.log").read_text().splitlines()
    assert json.loads(line)["outcome"].endswith("gone is not a directory")
    assert len(host.acts()) == before, "another daemon's file is left alone"
