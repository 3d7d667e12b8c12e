"""Fields of what `-o json` prints, as programs read them: `kvctl_fields.json` beside this file says which there are.

A field that goes away or changes its name breaks whoever reads it: that needs another `version`. One that is new is
added to the file by `python -m tests.unit.test_kvctl_json`.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from kvctl import checkup, cli
from kvstore.report import DeviceReport
from kvstored.events import Events, Kind
from tests.core import key_of
from tests.unit.store_port import SYSTEM, StorePort, served
from tests.unit.test_kvctl import SameEverywhere

FILE: Final = Path(__file__).with_name("kvctl_fields.json")
KEY: Final = SYSTEM[0].hex()
# By a name of ours: the command line. NAMESPACE stands for the digest of the one with conversations.
COMMANDS: Final = {
    "status": ["status"],
    "stats": ["stats"],
    "namespaces": ["namespaces"],
    "tenants": ["tenants"],
    "clients": ["clients"],
    "config": ["config"],
    "costs": ["costs"],
    "policy": ["policy"],
    "quota": ["quota"],
    "pins": ["pins"],
    "programs": ["programs"],
    "workflows": ["workflows"],
    "advise": ["advise"],
    "explain-miss": ["explain-miss", key_of("absent").hex(), "--namespace", "NAMESPACE"],
    "scrub --status": ["scrub", "--status"],
    "ping": ["ping", "-c", "1"],
    "doctor": ["doctor"],
    "top": ["top", "--once"],
    "events": ["events"],
    "events --follow": ["events", "--follow"],
    "ls": ["ls"],
    "ls NAMESPACE": ["ls", "NAMESPACE"],
    "ls NAMESPACE --blocks": ["ls", "NAMESPACE", "--blocks", "-n", "1"],
    "tree": ["tree", "NAMESPACE"],
    "stat": ["stat", KEY, "--namespace", "NAMESPACE"],
    "load": ["load"],
    "match": ["match", KEY, "--namespace", "NAMESPACE"],
    "move": ["move", KEY, "--namespace", "NAMESPACE", "--to", "ELSEWHERE", "--dry-run"],
    "admission": ["admission", "1MiB", "--namespace", "NAMESPACE"],
}


GPU: Final = DeviceReport("cuda:0", *[False] * 2, *[0] * 11)


class Port(StorePort):
    """A second passes from look to look."""

    looks = 0

    def status(self) -> Any:
        self.looks += 1
        return replace(super().status(), uptime_s=float(self.looks), devices=(GPU,))


def paths(value: Any, above: str = "") -> Iterator[str]:
    """Where there is something: `status.tiers[].name`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths(inner, f"{above}.{name}" if above else name)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from paths(inner, f"{above}[]")
    else:
        yield above


def fields_of(folder: Path, arguments: list[str]) -> list[str]:
    """What a command line prints has these."""
    sys.argv = ["kvctl", "--runtime-dir", str(folder), "-o", "json", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main()
    text = said.getvalue()
    first = text if text.startswith("{\n") else text.splitlines()[0]
    return sorted(set(paths(json.loads(first))))


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """One with something of everything; the namespace with conversations."""
    events = Events()
    events.say(Kind.DAEMON, "it began")
    events.stop()  # so that following ends
    with served(folder, events, Port) as (port, _):
        assert port.core, "makes it"
        yield port.talks.digest.hex()


def all_fields(folder: Path) -> dict[str, list[str]]:
    """Of every command."""
    with daemon(folder) as namespace:
        return {
            name: fields_of(folder, [namespace if word == "NAMESPACE" else word for word in words])
            for name, words in COMMANDS.items()
        }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(checkup, "LinuxHost", SameEverywhere)
        patch.setattr(time, "sleep", lambda _seconds: None)
        return all_fields(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", COMMANDS)
def test_fields_are_those_that_were_promised(name: str, found: dict[str, list[str]]) -> None:
    promised = json.loads(FILE.read_text())[name]
    missing = sorted(set(promised) - set(found[name]))
    assert not missing, "programs read these"
    added = sorted(set(found[name]) - set(promised))
    assert not added, "new: python -m tests.unit.test_kvctl_json"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_object_has_its_version_and_one_body(name: str, found: dict[str, list[str]]) -> None:
    assert "version" in found[name]
    assert len({path.partition(".")[0].removesuffix("[]") for path in found[name]} - {"version"}) == 1


def test_every_command_that_asks_a_daemon_and_only_looks_is_here() -> None:
    looking = {one.name for one in cli.app.registered_commands if one.callback and one.callback.__module__ in LOOKING}
    assert looking - {"check"} <= {words[0] for words in COMMANDS.values()}
    assert "tree" in looking


LOOKING: Final = ("kvctl.reading", "kvctl.live", "kvctl.prefixes", "kvctl.checkup")


def test_fields_of_nested_things_are_told_apart() -> None:
    assert list(paths({"a": [{"b": 1, "c": []}, {"d": None}], "e": "x"})) == ["a[].b", "a[].c", "a[].d", "e"]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as here, tempfile.TemporaryDirectory() as place:
        here.setattr(checkup, "LinuxHost", SameEverywhere)
        FILE.write_text(json.dumps(all_fields(Path(place)), indent=1) + "\n")
