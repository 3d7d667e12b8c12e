"""Looking on at a real daemon: `kvctl top`, `ls`, `tree`, `stat` and `events`, while clients store and fetch."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kvclient
from bench.process import DaemonProcess
from kvctl.cli import app, globals_first
from kvctl.client import ControlClient, KvctlError
from kvproto import control_pb2 as pb
from kvproto.keys import block_keys
from tests.integration.conftest import StartDaemon
from tests.node import PATIENCE_S, until

BLOCK_TOKENS, BLOCK_BYTES = 16, 64 << 10
SYSTEM = list(range(10 * BLOCK_TOKENS))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    disk = ["--disk", str(folder / "disk"), "--disk-size", "256MiB", "--disk-segment", "16MiB"]
    arguments = ["--dram", "16MiB", "--arena", "2MiB", "--lock", "false", "--disk-admission", "all", *disk]
    with DaemonProcess(folder / "run", *arguments, log_file=folder / "log") as process:
        yield process


@pytest.fixture(scope="module")
def talks(daemon: DaemonProcess) -> Iterator[kvclient.Namespace]:
    """A namespace with ten conversations behind one beginning."""
    with kvclient.connect(daemon.runtime_dir, name="engine-a", timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0), client.status
        yield opened(client)


def opened(client: kvclient.Client) -> kvclient.Namespace:
    return client.namespace(
        model="llama", engine="e", layout="l", dtype="bf16", block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES
    )


def chat(number: int) -> list[bytes]:
    tokens = SYSTEM + [1000 * (number + 1) + at for at in range((1 + number % 3) * BLOCK_TOKENS)]
    return list(block_keys(tokens, BLOCK_TOKENS))


def store(namespace: kvclient.Namespace, keys: list[bytes]) -> None:
    content = np.zeros(BLOCK_BYTES, dtype=np.uint8)
    stored = namespace.store(keys, [content] * len(keys), wait=True, space_s=PATIENCE_S)
    assert stored.accepted + stored.known == len(keys), stored


def kvctl(daemon: DaemonProcess, *arguments: str) -> Any:
    """The object that a command line prints, or a list of those on its lines."""
    line = globals_first(["--runtime-dir", str(daemon.runtime_dir), *arguments, "-o", "json"])
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    try:
        return json.loads(done.output)
    except ValueError:
        return [json.loads(one) for one in done.output.splitlines()]


def test_prefixes_are_those_that_were_stored(daemon: DaemonProcess, talks: kvclient.Namespace, tmp_path: Path) -> None:
    for number in range(10):
        store(talks, chat(number))
    for _ in range(3):
        talks.fetch(chat(0)).release()
    (namespace,) = kvctl(daemon, "ls")["namespaces"]
    blocks = 10 + sum(1 + number % 3 for number in range(10))
    assert namespace["blocks"] == blocks
    (tree,) = kvctl(daemon, "tree", "-w", "100", "-n", "100")["trees"]
    first, *branches = tree["nodes"]
    assert (tree["roots"], tree["blocks"], tree["changed_blocks"]) == (1, blocks, 0)
    assert (first["first_key"], first["run_blocks"], first["branches"]) == (chat(0)[0].hex(), 10, 10)
    assert {node["first_key"] for node in branches} == {chat(number)[10].hex() for number in range(10)}
    assert first["hits"] >= 3
    listed = [line["block"]["key"] for line in kvctl(daemon, "ls", namespace["digest"], "--blocks", "--all")]
    assert sorted(listed) == sorted({key.hex() for number in range(10) for key in chat(number)})
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(SYSTEM + [7] * BLOCK_TOKENS))
    pinned = kvctl(daemon, "pin", "--tokens", str(tokens))["pin"]["pins"][0]
    lease = talks.fetch(chat(1)[:10])
    stat = kvctl(daemon, "stat", "--tokens", str(tokens))["prefix"]
    assert (stat["found_blocks"], len(stat["blocks"])) == (10, 11)
    assert [(pin["number"], pin["blocks"], pin["owner"]) for pin in stat["pins"]] == [(pinned["pin"], 10, "operator")]
    assert [one["blocks"] for one in stat["leases"]] == [10]
    assert stat["below"]["branches"] == 10
    lease.release()


def test_top_has_the_rates_of_what_goes_on(daemon: DaemonProcess, talks: kvclient.Namespace) -> None:
    over, tops = threading.Event(), list[dict[str, Any]]()

    def work() -> None:
        number = 100
        while not over.is_set():
            store(talks, chat(number))
            talks.fetch(chat(number)).release()
            number += 1

    def looked() -> bool:
        tops.append(kvctl(daemon, "top", "--once", "--interval", "0.5")["top"])
        return rates(tops[-1])

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert until(looked)
        for _ in range(5):  # while blocks come and go by eviction
            (tree,) = kvctl(daemon, "tree")["trees"]
            assert sum(node["blocks"] for node in tree["nodes"] if node["level"] == 0) == tree["blocks"] > 10
    finally:
        over.set()
        worker.join(60.0)
    assert tops[-1]["hit_share"] == 1.0
    assert [client["name"] for client in tops[-1]["clients"]] == ["engine-a"]


def rates(top: dict[str, Any]) -> bool:
    """Did something go on at every place in that time? On a busy machine it may be that nobody got on."""
    tiers = {tier["name"]: tier for tier in top["tiers"]}
    dram, disk, clients = tiers["dram"], tiers["disk"], top["clients"]
    moved = min(dram["in_bytes_per_s"], dram["out_bytes_per_s"]) > BLOCK_BYTES and disk["in_bytes_per_s"] > 0
    return moved and len(clients) == 1 and clients[0]["requests_per_s"] > 1 and top["hit_share"] is not None


def test_events_tell_of_clients_operators_and_the_end(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "16MiB", "--lock", "false")
    heard: list[pb.Event] = []
    came = threading.Event()

    def listen() -> None:
        with ControlClient(daemon.runtime_dir / "control.sock", 10.0) as control, suppress(KvctlError):
            for event in control.events(pb.WatchEventsRequest(follow=True)):
                heard.append(event)
                came.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert came.wait(20.0)
    with kvclient.connect(daemon.runtime_dir, name="engine-b", timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0), client.status
        store(opened(client), chat(1))
    kvctl(daemon, "drain", "--yes")
    kvctl(daemon, "clear", "--all", "--yes")
    remembered = kvctl(daemon, "events")["events"]
    assert daemon.terminate() == 0
    listener.join(20.0)
    assert not listener.is_alive(), "the end of the daemon ends the stream"
    said = [(event.kind, event.text) for event in heard]
    assert said[: len(remembered)] == [(event["kind"], event["text"]) for event in remembered]
    assert [event.number for event in heard] == list(range(1, len(heard) + 1))
    assert not any(event.lost for event in heard)
    assert said[0][1].startswith(f"kvstored {metadata.version('kvstored')} began cold")
    texts = "\n".join(text for _, text in said)
    assert "client 'engine-b' came: session 1" in texts
    assert "client 'engine-b' went: session 1" in texts
    me = f"uid {os.geteuid()}: kvctl"
    assert [text for kind, text in said if kind == "admin"] == [f"{me} drain", f"{me} clear --all"]
