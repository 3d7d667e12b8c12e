"""Daemon and engine in containers that share a folder: what Kubernetes is told, and the same with bare namespaces."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "systemd/container"
KUBERNETES = ("1.29", "1.33")  # the oldest one that is meant, and a later one
WAIT_S = 60.0
BLOCKS = 96  # of a MiB: more than there is of /dev/shm
APART = ["--mount", "--pid", "--ipc", "--uts", "--net", "--fork", "--kill-child"]
# A container as far as a process sees it: process ids, shared memory, network and mounts of its own. /run/kvstored is
# the one folder of the node in it.
INSIDE = """
set -e
mount -t proc proc /proc
mount -t tmpfs -o size=64m tmpfs /dev/shm
[ "$1" != ro ] || { mount --bind "$2" "$2"; mount -o remount,bind,ro "$2"; }
shift 2
exec "$@"
"""
ENGINE = f"""
import os, sys
import numpy as np
import kvclient
run = sys.argv[1]
assert os.getpid() == 1, "no container"
try:
    open(run + "/file", "w")
    sys.exit("the folder can be written to")
except OSError:
    pass
client = kvclient.connect(run, timeout_s=30)
assert client.wait_connected(30), client.status
ns = client.namespace(model="m", engine="pod", layout="flat", dtype="uint8", block_bytes=1 << 20)
keys = ns.keys(list(range(16 * {BLOCKS})))
blocks = [np.random.default_rng(number).integers(0, 256, 1 << 20, dtype=np.uint8) for number in range({BLOCKS})]
stored = 0
while stored < {BLOCKS}:
    stored += ns.store(keys[stored:], blocks[stored:], wait=True, parent=keys[stored - 1] if stored else None).accepted
targets = np.zeros(({BLOCKS}, 1 << 20), dtype=np.uint8)
with ns.fetch(keys) as lease:
    assert lease.copy_to(targets[: lease.blocks])
    same = sum(np.array_equal(target, block) for target, block in zip(targets, blocks))
    control = sum(np.array_equal(target, block) for target, block in zip(targets, blocks[1:]))
    print(lease.blocks, same, control, len(os.listdir("/dev/shm")), flush=True)
    sys.stdin.read()
"""


# What Kubernetes is told


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field_of_the_example(version: str) -> None:
    kinds = [one["kind"] for one in documents()]
    assert kinds == ["Namespace", "ConfigMap", "DaemonSet", "Pod"]
    for one in documents():
        kubernetes_validate.validate(one, version, strict=True)
    (daemon,) = [one for one in documents() if one["kind"] == "DaemonSet"]
    daemon["spec"]["template"]["spec"]["hostIpc"] = True  # it is written hostIPC
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(daemon, version, strict=True)


def test_daemon_and_engine_share_a_folder_of_the_node_and_nothing_else(tmp_path: Path) -> None:
    from kvstored.config import load

    kinds = {one["kind"]: one for one in documents()}
    daemon, engine = kinds["DaemonSet"]["spec"]["template"]["spec"], kinds["Pod"]["spec"]
    for pod in (daemon, engine):
        assert not {"hostIPC", "hostPID", "hostNetwork"} & pod.keys()
        assert pod["securityContext"]["runAsNonRoot"]
        assert not any(mount["mountPath"] == "/dev/shm" for one in pod["containers"] for mount in one["volumeMounts"])
    paths = [{one["hostPath"]["path"] for one in pod["volumes"] if "hostPath" in one} for pod in (daemon, engine)]
    assert paths[0] & paths[1] == paths[1] == {"/run/kvstored"}
    file = tmp_path / "kvstored.toml"
    file.write_text(kinds["ConfigMap"]["data"]["kvstored.toml"])
    config = load(file, {"HOME": "/"}, {}, memory_bytes=1 << 40).config
    limit = daemon["containers"][0]["resources"]["limits"]["memory"]
    assert config.dram_bytes < int(limit.removesuffix("Gi")) << 30
    assert config.stop_within_s + 60 < daemon["terminationGracePeriodSeconds"]
    assert config.tenants_of(engine["securityContext"]["runAsUser"]) == ("chat",)


def test_the_images_have_what_both_sides_need_and_name_no_more_than_the_checkout_has() -> None:
    text = (FOLDER / "Containerfile").read_text()
    targets = [line.split()[-1] for line in text.splitlines() if line.startswith("FROM ")]
    assert targets == ["build", "client", "daemon"]
    client = text.partition(" AS client\n")[2].partition("\nFROM ")[0]
    assert "kvstored[" not in client, "an engine's side needs no more than numpy and xxhash"
    assert text.rstrip().endswith('ENTRYPOINT ["kvstored"]')


# The same without any of it


def unshare() -> list[str]:
    """The command that has namespaces of its own, or a skip that says why it cannot."""
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("unshare is not installed")
    command = [program, *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), *APART]
    tried = subprocess.run(
        [*command, "sh", "-c", INSIDE, "sh", "rw", "/", "true"], check=False, capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"no namespaces: {tried.stderr.strip()}")
    return command


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Any]:
    """Starts a program in one; all are killed after the test."""
    command, running = unshare(), []

    def start(mode: str, *program: str, log: Path) -> "subprocess.Popen[str]":
        line = [*command, "sh", "-c", INSIDE, "sh", mode, str(tmp_path / "run"), sys.executable, *program]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/",
                env=os.environ | {"PYTHONPATH": ":".join(path for path in sys.path if path)},
            )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def line_of(process: "subprocess.Popen[str]", log: Path) -> str:
    """What it says next."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], WAIT_S)[0], log.read_text()[-3000:]
    return process.stdout.readline()


def test_two_containers_share_blocks_over_a_folder_with_64_mib_of_shared_memory(container: Any, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    arguments = ("--runtime-dir", str(run), "--dram", "256MiB", "--lock", "false")
    daemon = container("rw", "-m", "kvstored", *arguments, log=log)
    assert line_of(daemon, log).rstrip().endswith("pid 1"), log.read_text()
    engine = container("ro", "-c", ENGINE, str(run), log=log)
    assert line_of(engine, log) == f"{BLOCKS} {BLOCKS} 0 0\n", log.read_text()
    first = int(Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text())
    seen = Path(f"/proc/{first}/root/dev/shm")
    assert list(seen.iterdir()) == [], "the daemon needs none of it"
    assert "refused" not in log.read_text()
    os.kill(first, signal.SIGTERM)  # as a container is stopped: its first process is told
    deadline_s = time.monotonic() + WAIT_S
    while daemon.poll() is None and time.monotonic() < deadline_s:
        select.select([daemon.stdout], [], [], 0.05)
    assert daemon.returncode == 0, log.read_text()[-3000:]
