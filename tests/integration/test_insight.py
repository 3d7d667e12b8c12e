"""A daemon that knows itself: `kvctl advise` and `kvctl explain-miss` from one that really ran."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvclient
from kvproto.keys import block_keys
from kvproto.limits import KIB
from tests.integration.conftest import StartDaemon
from tests.node import PATIENCE_S

BLOCK_BYTES = 64 * KIB
BLOCK_TOKENS = 16


def kvctl(runtime_dir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the operator's command."""
    command = [sys.executable, "-m", "kvctl", "--runtime-dir", str(runtime_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def answer(runtime_dir: Path, *arguments: str) -> dict[str, Any]:
    """What it says in JSON."""
    done = kvctl(runtime_dir, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found[arguments[0]]  # type: ignore[no-any-return]


def tokens_file(folder: Path, first: int, count: int) -> tuple[Path, list[bytes]]:
    """Tokens of a prompt in a file, and the keys of its blocks."""
    tokens = list(range(first, first + count))
    file = folder / f"tokens-{first}.json"
    file.write_text(json.dumps(tokens))
    return file, list(block_keys(tokens, BLOCK_TOKENS))


def test_what_was_stored_evicted_and_never_there_is_told_apart(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon("--dram", "16MiB", "--arena", "1MiB", "--lock", "false", "--policy-dram", "lru")
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0), client.status
        namespace = client.namespace(
            model="m", engine="e", layout="l", dtype="bf16", block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES
        )
        content = np.zeros(BLOCK_BYTES, dtype=np.uint8)
        files = []
        for prompt in range(6):  # 384 blocks where 256 fit
            file, keys = tokens_file(tmp_path, 100_000 * prompt, 64 * BLOCK_TOKENS)
            files.append(file)
            assert namespace.store(keys, [content] * len(keys), wait=True).accepted == len(keys)
        first = answer(daemon.runtime_dir, "explain-miss", "--tokens", str(files[0]))
        assert (first["state"], first["cause"], first["tier"], first["rule"]) == ("miss", "evicted", "dram", "lru")
        assert first["asked"] == 64
        last = answer(daemon.runtime_dir, "explain-miss", "--tokens", str(files[-1]))
        assert (last["state"], last["found"]) == ("hit", 64)
        unknown, _ = tokens_file(tmp_path, 7_000_000, 64 * BLOCK_TOKENS)
        assert answer(daemon.runtime_dir, "explain-miss", "--tokens", str(unknown))["cause"] == "never"
        assert "Evicted from DRAM by lru" in kvctl(daemon.runtime_dir, "explain-miss", "--tokens", str(files[0])).stdout


@pytest.mark.slow
def test_advice_is_given_of_what_was_asked_for_unless_curves_are_off(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "16MiB", "--lock", "false")
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0), client.status
        namespace = client.namespace(
            model="m", engine="e", layout="l", dtype="bf16", block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES
        )
        assert not answer(daemon.runtime_dir, "advise")["watched"]
        for prompt in range(20):
            namespace.fetch(block_keys(range(prompt, prompt + 64 * BLOCK_TOKENS), BLOCK_TOKENS)).release()
        seen = answer(daemon.runtime_dir, "advise")
        said = kvctl(daemon.runtime_dir, "advise")
        assert "Too early to say" in said.stdout
        assert (seen["doubt"], seen["dram_bytes"]) == ("short", 16 << 20)
    assert daemon.terminate() == 0
    blind = start_daemon("--dram", "16MiB", "--lock", "false", "--insight-curves", "off")
    refused = kvctl(blind.runtime_dir, "advise")
    assert refused.returncode == 1
    assert "insight.curves" in refused.stderr
