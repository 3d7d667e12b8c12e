"""`kvctl export`, `import`, `evict`, `audit` and `support-bundle` against real daemons."""

import base64
import gzip
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kvclient
from kvctl.bundle import PACKAGES
from kvctl.cli import app, globals_first
from kvctl.client import ControlClient, Exit
from kvctl.redaction import LEFT_OUT, scrubbed, setting_value
from kvproto import control_pb2 as pb
from kvproto.archive import RECORD_BYTES
from kvproto.control_token import ask_token
from kvproto.limits import KIB
from tests.node import PATIENCE_S, Node, chain, fetch, put, values

BLOCK = 64 * KIB
SALT = "a-salt-that-nobody-may-see"
NAME = "client-called-Sesame-9917"
PROGRAM = "program-called-Sesame-9918"
TOKEN_IDS = [424_242, 313_131, 171_717]
SETTINGS = ("--tenant-control", "true", "--metrics-listen", f"/var/tmp/kvn-metrics-{os.getpid()}.sock")
TENANTS = f"""
[tenants.chat]
uids = [54321]
dram_max = "4MiB"
[tenants.ours]
uids = [{os.geteuid()}]
"""

Kvctl = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with two tenants, of which one is ours; its first life."""
    with Node(disks=0) as node:
        node.home.joinpath("config.toml").write_text(TENANTS)
        node.home.chmod(0o755)
        node.start(*SETTINGS, "--config", str(node.home / "config.toml"))
        yield node


@pytest.fixture(scope="module")
def other() -> Iterator[Node]:
    """Another host, with a disk."""
    with Node() as node:
        node.start()
        yield node


def kvctl(node: Node, *words: str) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, standard error."""
    line = globals_first(["--runtime-dir", str(node.run), "--timeout", "20", *words])
    done = CliRunner().invoke(app, line, catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def body(done: tuple[int, str, str], name: str, code: Exit = Exit.OK) -> Any:
    assert done[0] == code, done
    said = json.loads(done[1])
    assert said["version"] == 1
    return said[name]


def stored(ns: kvclient.Namespace, name: str) -> dict[bytes, np.ndarray[Any, Any]]:
    """Three chains that begin alike: what each key holds."""
    trunk = chain(name, 4)
    held = dict(zip(trunk, values(trunk, BLOCK), strict=True))
    put(ns, trunk, values(trunk, BLOCK), durable=False)
    for branch in "xyz":
        keys = chain(f"{name}{branch}", 5)
        blocks = values(keys, BLOCK)
        assert ns.store(keys, blocks, parent=trunk[-1], wait=True).accepted == 5
        held |= dict(zip(keys, blocks, strict=True))
    return held


def same(ns: kvclient.Namespace, held: dict[bytes, np.ndarray[Any, Any]]) -> int:
    """How many of these are there, each equal."""
    count = 0
    for key, block in held.items():
        found = fetch(ns, [key])
        if len(found.blocks):
            assert (found.blocks[0] == block).all()
            assert not (found.blocks[0] == np.roll(block, 1)).all()
            count += 1
    return count


def test_acts_take_a_key_by_the_digits_that_tables_show(node: Node) -> None:
    ns = node.namespace(BLOCK, model="by their digits")
    held = stored(ns, "digits")
    keys = list(held)
    where = ("--tenant", "ours", "--namespace", ns.identity.digest().hex())
    shown = keys[4].hex()[:12]
    assert body(kvctl(node, "explain-miss", shown, *where, "-o", "json"), "explain-miss")["state"] == "hit"
    assert body(kvctl(node, "evict", *where, "--key", shown, "--dry-run", "-o", "json"), "evict")["blocks"] == 5
    assert body(kvctl(node, "clear", *where, "--key", shown, "--yes", "-o", "json"), "clear")["blocks"] == 5
    assert same(ns, held) == 14, "the others are there"
    code, _, told = kvctl(node, "clear", *where, "--key", shown, "--yes")
    assert (code, "of a block that is gone give the whole key" in told) == (Exit.NOT_FOUND, True)
    path = node.home / "digits.kva"
    done = kvctl(node, "export", str(path), *where, "--key", keys[9].hex()[:8].upper(), "-o", "json")
    assert body(done, "export")["blocks"] == 4 + 5, "a branch, and what leads there"
    assert kvctl(node, "clear", *where, "--yes")[0] == Exit.OK


@pytest.fixture(scope="module")
def archive(node: Node) -> tuple[Path, dict[bytes, np.ndarray[Any, Any]]]:
    """Of one namespace of the tenant `ours`."""
    held = stored(node.namespace(BLOCK), "a")
    path = node.home / "all.kva"
    said = body(kvctl(node, "export", str(path), "--tenant", "ours", "-o", "json"), "export")
    assert (said["blocks"], said["bytes"], said["gone_blocks"]) == (19, 19 * BLOCK, 0)
    return path, held


def test_an_archive_of_a_tenant_that_is_not_there_is_refused(node: Node) -> None:
    path = node.home / "nobody.kva"
    code, _, said = kvctl(node, "export", str(path), "--tenant", "nobody")
    assert code == Exit.NOT_FOUND
    assert "no tenant is called nobody; there are: chat, ours" in said
    assert not path.exists()


def test_an_archive_warms_another_host_and_what_is_there_is_passed_over(
    node: Node, other: Node, archive: tuple[Path, dict[bytes, np.ndarray[Any, Any]]]
) -> None:
    path, held = archive
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kvctl(node, "export", str(path))[0] == Exit.USAGE, "it is not written over"
    ns = other.namespace(BLOCK)
    words = ("import", str(path), "--tenant", f"uid-{os.geteuid()}", "-o", "json")
    dry = body(kvctl(other, *words, "--dry-run"), "import")
    assert (dry["blocks"], dry["stored_blocks"], dry["whole"]) == (19, 0, True)
    assert same(ns, held) == 0
    said = body(kvctl(other, *words), "import")
    assert (said["stored_blocks"], said["known_blocks"], said["durable_blocks"]) == (19, 0, 19)
    assert same(ns, held) == 19
    again = body(kvctl(other, *words), "import")
    assert (again["stored_blocks"], again["known_blocks"]) == (0, 19)
    acts = body(kvctl(other, "audit", "-o", "json"), "audit")["acts"]
    assert [act["verb"] for act in acts] == ["import", "import"]
    assert (acts[0]["uid"], acts[0]["pid"], acts[0]["blocks"]) == (os.geteuid(), os.getpid(), 19)


def test_damage_costs_the_blocks_it_is_in_and_never_gives_a_wrong_one(
    other: Node, tmp_path: Path, archive: tuple[Path, dict[bytes, np.ndarray[Any, Any]]]
) -> None:
    path, held = archive
    content = bytearray(path.read_bytes())
    key = chain("ax", 5)[1]
    at = content.index(key) - 16 + RECORD_BYTES + 1000
    content[at] ^= 1
    (tmp_path / "spoilt.kva").write_bytes(content)
    assert kvctl(other, "clear", "--all", "--yes")[0] == Exit.OK
    ns = other.namespace(BLOCK)
    options = ("-o", "json", "--tenant", f"uid-{os.geteuid()}")
    said = body(kvctl(other, "import", str(tmp_path / "spoilt.kva"), *options), "import", Exit.REFUSED)
    assert (said["stored_blocks"], said["refused_blocks"], said["reasons"]) == (15, 3, {"no_parent": 3})
    assert said["damages"] == [f"at byte {at - RECORD_BYTES - 1000:,}, key {key.hex()[:16]}: a block is damaged"]
    assert same(ns, held) == 15
    (tmp_path / "short.kva").write_bytes(path.read_bytes()[:-200_000])
    said = body(kvctl(other, "import", str(tmp_path / "short.kva"), *options), "import", Exit.REFUSED)
    assert not said["whole"]
    (tmp_path / "no.kva").write_bytes(b"something else")
    code, _, err = kvctl(other, "import", str(tmp_path / "no.kva"))
    assert code == Exit.REFUSED
    assert "no archive" in err
    whole = body(kvctl(other, "import", str(path), *options), "import")
    assert whole["whole"]
    assert same(ns, held) == 19


def test_a_prefix_comes_with_what_leads_there_and_another_tenant_keeps_its_quota(node: Node, tmp_path: Path) -> None:
    held = stored(node.namespace(BLOCK, model="prefix"), "p")
    ns = node.namespace(BLOCK, model="prefix")
    key, path = chain("py", 5)[2], tmp_path / "part.kva"
    words = ("--namespace", ns.identity.digest().hex(), "--key", key.hex())
    said = body(kvctl(node, "export", str(path), *words, "-o", "json"), "export")
    assert said["blocks"] == 4 + 5, "the trunk, and its branch up to the key and on"
    whole = tmp_path / "whole.kva"
    assert kvctl(node, "export", str(whole), "--namespace", ns.identity.digest().hex())[0] == Exit.OK
    for _ in range(2):
        said = body(kvctl(node, "import", str(whole), "--tenant", "chat", "--yes", "-o", "json"), "import")
        assert said["stored_blocks"] + said["known_blocks"] == 19
    with kvclient.connect(node.run, tenant="chat", timeout_s=PATIENCE_S) as client:
        theirs = client.namespace(model="prefix", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK)
        assert same(theirs, held) == 19
    tenants = {one["name"]: one for one in body(kvctl(node, "tenants", "-o", "json"), "tenants")}
    assert tenants["chat"]["assigned_bytes"] <= 4 << 20


def test_an_import_that_would_push_others_out_asks_first(node: Node, tmp_path: Path) -> None:
    ns = node.namespace(BLOCK, model="large")
    keys = chain("large", 48)
    put(ns, keys, values(keys, BLOCK), durable=False)
    path = tmp_path / "large.kva"
    body(kvctl(node, "export", str(path), "--namespace", ns.identity.digest().hex(), "-o", "json"), "export")
    before = body(kvctl(node, "tenants", "-o", "json"), "tenants")
    stored(node.namespace(BLOCK, model="filler"), "f")
    with kvclient.connect(node.run, tenant="chat", timeout_s=PATIENCE_S) as client:
        theirs = client.namespace(model="filler", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK)
        fill = chain("fill", 40)
        theirs.store(fill, values(fill, BLOCK), wait=True)
        code, _, err = kvctl(node, "import", str(path), "--tenant", "chat")
        assert (code, "there is no terminal" in err) == (Exit.USAGE, True), before
        assert theirs.match(fill).blocks == 40
        assert kvctl(node, "import", str(path), "--tenant", "chat", "--yes")[0] == Exit.OK
        assert theirs.match(fill).blocks < 40, "the control: it did push others out"


def test_what_was_done_is_known_in_the_next_life(node: Node) -> None:
    ns = node.namespace(BLOCK, model="evicted")
    keys = chain("evicted", 8)
    put(ns, keys, values(keys, BLOCK), durable=False)
    words = ("evict", "--namespace", ns.identity.digest().hex(), "--bytes", str(3 * BLOCK))
    before = body(kvctl(node, "audit", "-o", "json"), "audit")["acts"]
    dry = body(kvctl(node, *words, "--dry-run", "-o", "json"), "evict")
    assert (dry["blocks"], ns.match(keys).blocks) == (3, 8)
    assert "concerned: 0 pins" in kvctl(node, *words, "--dry-run")[1]
    assert body(kvctl(node, "audit", "-o", "json"), "audit")["acts"] == before
    assert body(kvctl(node, *words, "--yes", "-o", "json"), "evict")["blocks"] == 3
    assert ns.match(keys).blocks == 5
    (act,) = body(kvctl(node, "audit", "-n", "1", "-o", "json"), "audit")["acts"]
    assert (act["verb"], act["blocks"], act["bytes"], act["outcome"]) == ("evict", 3, 3 * BLOCK, "done")
    assert stat.S_IMODE((node.run / "audit.log").stat().st_mode) == 0o600
    node.restart(*SETTINGS, "--config", str(node.home / "config.toml"))
    assert body(kvctl(node, "audit", "-n", "1", "-o", "json"), "audit")["acts"] == [act]


AS_CHAT = """
import sys
sys.path[:0] = {paths!r}
import kvclient
from kvproto.errors import RefusedError
with kvclient.connect({run!r}, timeout_s=30.0) as client:
    print(client.status.tenant)
try:
    kvclient.connect({run!r}, tenant="ours", timeout_s=30.0)
except RefusedError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root: there is no second uid")
def test_another_user_sees_what_its_tenant_has_and_changes_nothing(node: Node) -> None:
    paths = [path for path in sys.path if path]

    def as_chat(*command: str) -> subprocess.CompletedProcess[str]:
        words = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *command]
        environ = {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environ, cwd="/")

    def asked(*words: str) -> subprocess.CompletedProcess[str]:
        return as_chat(sys.executable, "-m", "kvctl", "--runtime-dir", str(node.run), *words)

    put(node.namespace(BLOCK), chain("mine", 2), values(chain("mine", 2), BLOCK), durable=False)
    kvclient.connect(node.run, tenant="chat", timeout_s=PATIENCE_S).close()
    ours = json.loads(kvctl(node, "tenants", "-o", "json")[1])["tenants"]
    assert {one["name"] for one in ours} == {"ours", "chat"}
    theirs = asked("tenants", "-o", "json")
    assert theirs.returncode == 0, theirs.stderr
    assert {one["name"] for one in json.loads(theirs.stdout)["tenants"]} == {"chat"}
    for words in (("drain", "--yes"), ("clear", "--all", "--yes"), ("status",), ("pins", "--tenant", "ours")):
        refused = asked(*words)
        assert refused.returncode == Exit.REFUSED, (words, refused.stdout, refused.stderr)
        assert "uid 54321 may" in refused.stderr
    assert not json.loads(kvctl(node, "status", "-o", "json")[1])["status"]["draining"]
    done = as_chat(sys.executable, "-c", AS_CHAT.format(paths=paths, run=str(node.run)))
    assert done.stdout.splitlines() == ["chat", "uid 54321 may not be tenant 'ours' (REFUSED)"], done.stderr


def planted(node: Node) -> dict[str, bytes]:
    """Things that must never leave the host, and that a daemon has met."""
    client = kvclient.connect(node.run, name=NAME, timeout_s=PATIENCE_S)
    ns = client.namespace(
        model="bundle", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK, block_tokens=3
    )
    keys = ns.keys(TOKEN_IDS * 2, SALT.encode())
    blocks = values(keys, BLOCK)
    assert not ns.store(keys, blocks, wait=True).refused
    ns.pin(keys, ttl_s=300)
    program = client.program(PROGRAM)
    program.context(ns, keys)
    program.tool_started("a tool called Sesame-9919", expected_s=60.0)
    assert client.ping() is not None
    token = ask_token(node.run, 5.0)
    assert token is not None
    with node.log_file.open("a") as log:
        log.write(f"INFO planted session opened: name={NAME!r} token={token.token} salt={SALT}\n")
        log.write(f"INFO planted a prompt of {TOKEN_IDS * 2}\n")
        log.write(f"INFO planted a key {keys[0].hex()} and {token.token}\n")
    return {
        "payload": blocks[0].tobytes()[100:148], "key": keys[0], "key in hex": keys[0].hex().encode(),
        "salt": SALT.encode(), "client": NAME.encode(), "program": PROGRAM.encode(), "tool": b"Sesame-9919",
        "token": token.token.encode(), "token ids": b"424242",
    }  # fmt: skip


def test_a_bundle_has_what_helps_and_nothing_that_was_planted(node: Node, tmp_path: Path) -> None:
    secrets = planted(node)
    path = tmp_path / "bundle.tar.gz"
    said = body(kvctl(node, "support-bundle", str(path), "--log", str(node.log_file), "-o", "json"), "support-bundle")
    assert set(said["missing"]) == {"scrub.json"}, "there is no disk"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        parts = {one.name.partition("/")[2]: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert set(parts) == set(said["parts"])
    for name in (
        "status",
        "statistics",
        "config",
        "tenants",
        "doctor",
        "versions",
        "events",
        "audit",
        "quotas",
        "pins",
    ):
        assert json.loads(parts[f"{name}.json"])["version"] == 1, name
    assert b"kvstored_build_info" in parts["metrics.txt"]
    assert b"origin" in parts["config.json"]
    assert b"INFO" in parts["log.txt"]
    assert set(PACKAGES) <= set(json.loads(parts["versions.json"])["body"])
    found = {name for name, secret in secrets.items() if any(secret in part for part in (content, *parts.values()))}
    assert found == set()
    for name, secret in secrets.items():
        assert base64.b64encode(secret)[:-4] not in content, name


def test_the_search_does_find_them_where_nobody_left_them_out(node: Node) -> None:
    """The control of the test above: a naive bundle of the same daemon would have them."""
    secrets = planted(node)
    naive = [node.log_file.read_bytes()]
    naive += [kvctl(node, command, "-o", "json")[1].encode() for command in ("clients", "programs")]
    with ControlClient(node.run / "control.sock", 20.0) as client:
        names = [one.digest for one in client.namespaces().namespaces if one.model == "bundle"]
        naive += [client.walk(pb.WalkBlocksRequest(tenant="ours", namespace_digest=one)).keys for one in names]
    arenas = Path(f"/proc/{node.daemon.process.pid}")  # type: ignore[union-attr]
    with (arenas / "mem").open("rb", buffering=0) as memory:
        for line in (arenas / "maps").read_text().splitlines():
            if "kvstored-arena" in line:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                memory.seek(begin)
                naive.append(memory.read(end - begin))
    missed = {name for name, secret in secrets.items() if not any(secret in part for part in naive)}
    assert missed == set()


def test_a_bundle_of_a_daemon_that_is_gone_has_the_hosts_part(tmp_path: Path) -> None:
    line = globals_first(["--runtime-dir", str(tmp_path), "support-bundle", str(tmp_path / "b.tar.zst"), "-o", "json"])
    (tmp_path / "log").write_text("its last words\n")
    done = CliRunner().invoke(app, [*line, "--log", str(tmp_path / "log")], catch_exceptions=False)
    said = json.loads(done.stdout)["support-bundle"]
    assert {"doctor.json", "versions.json", "log.txt"} <= set(said["parts"])
    assert "no kvstored is running" in said["missing"]["daemon"]
    bad = CliRunner().invoke(app, ["support-bundle", str(tmp_path / "b.zip")])
    assert bad.exit_code == Exit.USAGE


def test_scrubbing_leaves_figures_and_takes_secrets() -> None:
    kept = 'kvstored_lease_duration_seconds_bucket{verb="lease",le="0.0005"} 12\nblocks=19 bytes=1245184 pid=4711\n'
    assert scrubbed(kept) == kept
    token = "Zk3-abcDEF_0123456789abcdefGHIJKLMNOPQRSTUVW"
    assert token not in scrubbed(f"x {token} y")
    assert scrubbed("key " + "ab" * 32) == "key abababababab..."
    assert scrubbed("opened: name='it\\'s me' tenant=t") == f"opened: name={LEFT_OUT} tenant=t"
    assert scrubbed("HF_TOKEN=hf_x password: y") == f"HF_TOKEN={LEFT_OUT} password: {LEFT_OUT}"
    assert setting_value("disk.key", "0123") == setting_value("http.token", "x") == LEFT_OUT
    assert setting_value("disk.key", "/etc/kvstored/key") == "/etc/kvstored/key"
    assert setting_value("clients.ticket_ttl", "30s") == "30s"


def test_check_is_that_of_the_daemon(other: Node, tmp_path: Path) -> None:
    def check(*words: str) -> Any:
        return CliRunner().invoke(app, globals_first(["check", *words, "-o", "json"]), catch_exceptions=False)

    held = check(*map(str, other.disks))
    said = json.loads(held.stdout)["check"]
    assert held.exit_code == said["exit_code"] != 0, "a daemon has it"
    asked = check("--repair", str(other.disks[0]))
    assert asked.exit_code == Exit.USAGE, "nobody to ask"
    other.stop()
    whole = check(*map(str, other.disks))
    assert (whole.exit_code, json.loads(whole.stdout)["check"]["exit_code"]) == (0, 0), whole.stdout
    assert any("blocks" in line for line in json.loads(whole.stdout)["check"]["lines"])
