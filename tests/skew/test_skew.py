"""Two versions on one host: clients and daemons of an earlier one with those of today, both ways, and what was kept.

Everything is a real process: the packages of the earlier version come from its commit (previous.py), and a small
program (speaker.py) runs on either side's packages. Each version stores what the other one reads; bytes follow from
keys, and those of the next key must differ.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvproto.limits import PROTOCOL_VERSION
from tests.node import Node, until
from tests.skew.previous import compared, environ_of, site_of
from tests.skew.speaker import COUNT
from tests.systemd import ServiceManager
from tests.unit.test_kvctl_json import paths

pytestmark = [pytest.mark.skew, pytest.mark.timeout(600)]

SPEAKER = str(Path(__file__).with_name("speaker.py"))
RIGHT = {"blocks": COUNT, "right": COUNT, "control": 0}
WHOLE = {"blocks": COUNT}
TODAY = None  # in place of the packages of an earlier version

VERSIONS = compared()
WIRES = {"wire-3": 3, "wire-4": 4}


@dataclass(frozen=True)
class Earlier:
    """An earlier version."""

    name: str
    site: Path


@dataclass
class Host:
    """A directory, and daemons of whatever version in it, one after the other; their memory is kept for the next."""

    node: Node
    manager: ServiceManager

    def begin(self, site: Path | None) -> None:
        """A life of that version."""
        self.manager.environ = environ_of(site)
        self.manager.start()
        self.manager.wait_ready()

    def speak(self, site: Path | None, *steps: str) -> list[dict[str, Any]]:
        """What a client of that version has to say of these steps; its session must live through all of them."""
        done = subprocess.run(
            [sys.executable, SPEAKER, str(self.node.run), *steps],
            env=environ_of(site), cwd=self.node.home, capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:] + self.node.log()[-2000:]
        first, *answers, last = map(json.loads, done.stdout.splitlines())
        assert first["connected"]
        assert Path(first["from"]).is_relative_to(site) if site else not first["from"].startswith(str(site))
        assert last == {"same_session": True}
        return answers

    def kvctl(self, site: Path | None, *words: str) -> tuple[int, Any, str]:
        """What the kvctl of that version says: exit code, JSON, and words on stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "kvctl", "--runtime-dir", str(self.node.run), "-o", "json", *words],
            env=environ_of(site), cwd=self.node.home, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr

    def life(self) -> str:
        """What the life that runs said of its beginning."""
        return next(line for line in reversed(self.node.log().splitlines()) if "memory: warm=" in line)


@pytest.fixture(scope="module", params=VERSIONS)
def before(request: pytest.FixtureRequest) -> Earlier:
    """A version to be compared with."""
    version = VERSIONS[request.param]
    if version.why_not:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{request.param}: {version.why_not}")
    return Earlier(request.param, site_of(version.commit))


@pytest.fixture
def host() -> Iterator[Host]:
    """No daemon runs yet."""
    with Node(dram="32MiB", size="64MiB") as node:
        line = [sys.executable, "-m", "kvstored", "--runtime-dir", str(node.run), *node.arguments]
        with ServiceManager(line, os.environ, node.home, log_file=node.log_file) as manager:
            yield Host(node, manager)


def test_the_version_compared_with_is_another_one(before: Earlier) -> None:
    script = "import kvproto.limits as l; print(l.PROTOCOL_VERSION, l.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ_of(before.site), capture_output=True, text=True, check=True
    )
    version, file = done.stdout.split()
    assert Path(file).is_relative_to(before.site)
    if before.name in WIRES:
        assert int(version) == WIRES[before.name]
        assert int(version) < PROTOCOL_VERSION, "this is no comparison any more"


def test_the_version_of_the_wire_before_today_s_is_among_them_and_none_is_there_twice() -> None:
    assert PROTOCOL_VERSION - 1 in WIRES.values(), "add the last commit that spoke it to previous.py"
    assert WIRES.keys() <= VERSIONS.keys()
    commits = [version.commit for version in VERSIONS.values() if not version.why_not]
    assert len(commits) == len(set(commits))


@pytest.mark.parametrize("daemon", ["today", "before"])
def test_clients_of_both_versions_share_what_they_store_in_one_daemon(host: Host, before: Earlier, daemon: str) -> None:
    host.begin(TODAY if daemon == "today" else before.site)
    new = host.speak(TODAY, "store:new", "fetch:new", "pin:new", "hint:new")
    old = host.speak(before.site, "fetch:new", "store:new", "store:old", "fetch:old", "pin:old", "hint:old")
    stored = {"accepted": COUNT, "known": 0, "durable": COUNT}
    assert new[0] == old[2] == stored
    assert old[1] == {"accepted": 0, "known": COUNT, "durable": 0}, "what one version stores the other one knows"
    for fetched in (new[1], old[0], old[3]):
        assert fetched == RIGHT | {"dram": COUNT, "disk": 0}
    assert new[2] == {"blocks": COUNT, "listed": 1}
    assert old[4] == {"blocks": COUNT, "listed": 2}
    assert new[3] == old[5] == {"answers": True}
    both = host.speak(TODAY, "fetch:old", "ranks:old", "forget:old")
    assert both == [RIGHT | {"dram": COUNT, "disk": 0}, {"blocks": COUNT // 2}, {"deleted": COUNT, "left": 0}]
    (gone, there) = host.speak(before.site, "fetch:old", "fetch:new")
    assert gone["blocks"] == 0, "what one version deletes the other one misses"
    assert there == RIGHT | {"dram": COUNT, "disk": 0}


@pytest.mark.parametrize("way", ["upgrade", "back"])
def test_what_a_daemon_of_one_version_kept_the_other_one_serves_or_misses(
    host: Host, before: Earlier, way: str
) -> None:
    first, then = (before.site, TODAY) if way == "upgrade" else (TODAY, before.site)
    host.begin(first)
    assert host.speak(first, "store:kept", "fetch:kept")[1]["right"] == COUNT
    host.manager.kill()
    host.begin(then)
    warm = "warm=True" in host.life()
    assert until(lambda: host.speak(then, "match:kept")[0] == WHOLE, 60.0), f"memory and disk lack some: {host.life()}"
    (found,) = host.speak(then, "fetch:kept")
    assert found["blocks"] == found["right"] == COUNT, found
    assert found["control"] == 0
    assert found["dram" if warm else "disk"] == COUNT, f"{host.life()}: {found}"
    assert host.speak(then, "store:more", "fetch:more")[1]["right"] == COUNT, "and goes on"
    host.manager.kill()
    host.manager.forget()  # disk alone
    host.begin(first)
    assert until(lambda: host.speak(first, "match:more")[0] == WHOLE, 60.0), "and back again"
    assert host.speak(first, "fetch:more")[0] == RIGHT | {"dram": 0, "disk": COUNT}
    assert host.speak(first, "fetch:kept")[0]["right"] == COUNT


# What kvctl of every version knows. Who acts has to send a token, which kvctl of wire-3 (0.1.0) did not know of; it did
# not ask before it drained, either.
LOOKS = ("status", "namespaces", "tenants", "config", "quota", "pins")
OLDEST_ACTS = (["drain"], ["clear", "--all", "--yes"], ["policy", "set", "lfu"])
ACTS = (["drain", "--yes"], ["clear", "--all", "--yes"], ["policy", "set", "lfu", "--yes"])
YOUNGER = (["audit"], ["evict", "--all", "--yes"])  # than version 3 of the wire


def state(host: Host) -> list[Any]:
    """What those acts change, as today's kvctl sees it."""
    status = host.kvctl(TODAY, "status")[1]["status"]
    policies = host.kvctl(TODAY, "policy")[1]["policies"]
    return [status["draining"], status["tiers"][0]["blocks"], [one["rule"] for one in policies]]


def test_kvctl_of_an_earlier_version_sees_today_s_daemon_and_acts_only_if_it_says_who_asks(
    host: Host, before: Earlier
) -> None:
    host.begin(TODAY)
    host.speak(TODAY, "store:new")
    for look in LOOKS:
        code, old, said = host.kvctl(before.site, look)
        assert (code, said) == (0, ""), look
        _, new, _ = host.kvctl(TODAY, look)
        assert old["version"] == new["version"] == 1
        lacking = set(paths(old)) - set(paths(new))
        assert not lacking, f"{look}: fields that are not there any more"
    whole = state(host)
    for words in OLDEST_ACTS if before.name == "wire-3" else ACTS:
        code, _, said = host.kvctl(before.site, *words)
        if before.name == "wire-3":
            assert code == 1, words
            assert "who asks? send a token from token.sock beside this socket, as kvctl of this version does" in said
        else:
            assert (code, said) == (0, ""), words
    if before.name == "wire-3":
        assert state(host) == whole
    else:
        assert state(host)[:2] == [True, 0] != whole[:2], "the control: these acts do change something"
        assert host.kvctl(TODAY, "audit")[1]["audit"]["acts"][0]["verb"] == "drain"


def test_today_s_kvctl_sees_and_steers_an_earlier_daemon_and_says_what_that_one_does_not_know(
    host: Host, before: Earlier
) -> None:
    host.begin(before.site)
    host.speak(before.site, "store:old")
    for look in LOOKS:
        code, found, said = host.kvctl(TODAY, look)
        assert (code, said) == (0, ""), look
        assert found["version"] == 1
    if before.name == "wire-3":
        for words in YOUNGER:
            code, _, said = host.kvctl(TODAY, *words)
            assert (code, said.startswith("kvctl: the daemon does not know this command")) == (1, True), words
    whole = state(host)
    for words in ACTS:
        assert host.kvctl(TODAY, *words)[0] == 0, words
    assert state(host)[:2] == [True, 0] != whole[:2]
