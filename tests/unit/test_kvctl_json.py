"""Fields of what `-o json` prints, as programs read them: `kvctl_fields.json` beside this file says which there are.

A field that goes away or changes its name breaks whoever reads it: that needs another `version`. One that is new is
added to the file by `python -m tests.unit.test_kvctl_json`. Every command is here, or in `WITHOUT` with the reason.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from typer.main import get_command

from kvctl import checkup, cli
from kvstore.evicting import EvictReport
from kvstore.report import DeviceReport
from kvstored.admin_audit import Act, Audit
from kvstored.admin_evict import EvictWish
from kvstored.control import ControlServer
from kvstored.events import Events, Kind
from tests.core import key_of
from tests.node import Node, chain, put, until, values
from tests.unit.control_fakes import ThreadOwner
from tests.unit.store_port import SYSTEM, StorePort
from tests.unit.test_kvctl import SameEverywhere

FILE: Final = Path(__file__).with_name("kvctl_fields.json")
KEY: Final = SYSTEM[0].hex()
# By a name of ours: the command line. NAMESPACE stands for the digest of the one with conversations, FOLDER for one of
# ours. Those that act come last, and each dry run before what it is of.
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
    "audit": ["audit"],
    "check": ["check", "FOLDER"],
    "check --repair": ["check", "--repair", "--yes", "FOLDER"],
    "support-bundle": ["support-bundle", "FOLDER/bundle.tar.gz", "--log", "FOLDER/log"],
    "service install --dry-run": ["service", "install", "--root", "FOLDER", "--dry-run"],
    "move --evict --dry-run": ["move", KEY, "--namespace", "NAMESPACE", "--to", "ELSEWHERE", "--evict", "--dry-run"],
    "move --yes": ["move", KEY, "--namespace", "NAMESPACE", "--within", "0.1", "--yes"],
    "pin": ["pin", KEY, "--namespace", "NAMESPACE"],
    "prefetch": ["prefetch", KEY, "--namespace", "NAMESPACE"],
    "scrub": ["scrub"],
    "scrub --wait": ["scrub", "--wait"],
    "policy set --dry-run": ["policy", "set", "lfu", "--dry-run"],
    "policy set": ["policy", "set", "lfu", "--yes"],
    "policy reset --dry-run": ["policy", "reset", "--dry-run"],
    "policy reset": ["policy", "reset", "--yes"],
    "quota set --dry-run": ["quota", "web", "set", "EVERY", "--dry-run"],
    "quota set": ["quota", "web", "set", "EVERY", "--yes"],
    "quota reset --dry-run": ["quota", "web", "reset", "--dry-run"],
    "quota reset": ["quota", "web", "reset", "--yes"],
    "unpin --dry-run": ["unpin", "research", "7", "8", "--dry-run"],
    "unpin": ["unpin", "research", "7", "8", "--yes"],
    "drain --dry-run": ["drain", "--dry-run"],
    "drain": ["drain", "--yes"],
    "undrain": ["undrain"],
    "evict --dry-run": ["evict", "--all", "--dry-run"],
    "evict": ["evict", "--all", "--yes"],
    "clear --dry-run": ["clear", "--all", "--dry-run"],
    "clear": ["clear", "--all", "--yes"],
}
# Those that carry blocks, or follow them: of a daemon.
REAL: Final = {
    "watch": ["watch", "--tenant", "TENANT"],
    "export": ["export", "FOLDER/archive"],
    "import --dry-run": ["import", "FOLDER/archive", "--dry-run"],
    "import": ["import", "FOLDER/archive"],
}
NAMES: Final = (*COMMANDS, *REAL)
WITHOUT: Final = {"completion": "prints a script for a shell"}
# Names in these are what was found, and no fields.
MAPS: Final = ("import.reasons", "support-bundle.missing")
EVERY: Final = [
    *(f"{tier}_{kind}=640MiB" for tier in ("dram", "disk", "hbm") for kind in ("guaranteed", "max")),
    *(f"pin_{kind}_{what}" for kind in ("5m", "1h", "tool") for what in ("ttl=30s", "share=0.1")),
    "pin_share=0.25", "in_flight=9", "unused_ttl=1h",
]  # fmt: skip


GPU: Final = DeviceReport("cuda:0", *[False] * 2, *[0] * 11)


class Port(StorePort):
    """A second passes from look to look."""

    looks = 0

    def status(self) -> Any:
        self.looks += 1
        return replace(super().status(), uptime_s=float(self.looks), devices=(GPU,))

    def evict(self, wish: EvictWish, *, dry_run: bool) -> Future[EvictReport]:
        answer = Future[EvictReport]()
        answer.set_result(EvictReport(2, 2 << 20, 1, 1, 1, dry_run))
        return answer


def paths(value: Any, above: str = "") -> Iterator[str]:
    """Where there is something: `status.tiers[].name`."""
    if above in MAPS:
        yield f"{above}.*"
    elif isinstance(value, dict):
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
    objects = [text] if text.startswith("{\n") else text.splitlines()  # what follows something prints one a line
    assert objects, arguments
    assert all("version" in json.loads(one) for one in objects), "each of them can be read alone"
    return sorted({path for one in objects for path in paths(json.loads(one))})


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """One with something of everything; the namespace with conversations."""
    events, audit = Events(), Audit(None)
    events.say(Kind.DAEMON, "it began")
    events.stop()  # so that following ends
    audit.note(Act(1.7e9, 1000, 4711, "", "clear", "--all", 8, 8 << 20, "done"))
    folder.mkdir(mode=0o755, exist_ok=True)
    port = Port(runtime_dir=str(folder))
    owner = ThreadOwner(port)
    server = ControlServer(owner, folder, audit=audit, events=events)
    server.start()
    try:
        assert port.core, "makes it"
        yield port.talks.digest.hex()
    finally:
        server.stop(0.0)
        owner.stop()
        audit.stop(1.0)


def all_fields(folder: Path) -> dict[str, list[str]]:
    """Of every command."""
    place = folder / "place"
    place.mkdir()
    (place / "log").write_text("its last words\n")
    with daemon(folder) as namespace:
        named = {"NAMESPACE": [namespace], "EVERY": EVERY}
        found = {name: fields_of(folder, _words(words, place, named)) for name, words in COMMANDS.items()}
    with Node(disks=0) as node:
        node.start("--events-listen", "grpc")
        ns, keys = node.namespace(4096), chain("json", 3)
        put(ns, keys, values(keys, 4096), durable=False)
        named = {"TENANT": [node.client.status.tenant]}
        watch = _words(REAL["watch"], place, named)
        assert until(lambda: "changes.changes[].key" in fields_of(node.run, watch)), (
            "what it says first is whom it is of"
        )
        return found | {name: fields_of(node.run, _words(words, place, named)) for name, words in REAL.items()}


def _words(words: list[str], folder: Path, named: dict[str, list[str]]) -> list[str]:
    return [said.replace("FOLDER", str(folder)) for word in words for said in named.get(word, [word])]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(checkup, "LinuxHost", SameEverywhere)
        patch.setattr(time, "sleep", lambda _seconds: None)
        return all_fields(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_that_were_promised(name: str, found: dict[str, list[str]]) -> None:
    promised = json.loads(FILE.read_text())[name]
    missing = sorted(set(promised) - set(found[name]))
    assert not missing, "programs read these"
    added = sorted(set(found[name]) - set(promised))
    assert not added, "new: python -m tests.unit.test_kvctl_json"


@pytest.mark.parametrize("name", NAMES)
def test_every_object_has_its_version_and_one_body(name: str, found: dict[str, list[str]]) -> None:
    assert "version" in found[name]
    assert len({path.partition(".")[0].removesuffix("[]") for path in found[name]} - {"version"}) == 1


def leaves(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that kvctl has, `policy set` too."""
    for name, one in group.commands.items():
        inner = getattr(one, "commands", None)
        if inner is None or one.invoke_without_command:
            yield " ".join((*above, name)), one
        if inner is not None:
            yield from leaves(one, (*above, name))


def test_every_command_is_here_or_has_a_reason_not_to_be() -> None:
    there = dict(leaves(get_command(cli.app)))
    said = [words[:2] for words in (COMMANDS | REAL).values()]
    here = {name for name in there if name.split() in [words[: len(name.split())] for words in said]}
    assert there.keys() - here == WITHOUT.keys(), "new: add it to COMMANDS"
    assert {"policy set", "policy", "service install", "watch", "tree"} <= here
    assert all(WITHOUT.values())


def test_every_command_with_a_dry_run_is_here_with_it() -> None:
    there = dict(leaves(get_command(cli.app)))
    dry = {name for name, one in there.items() if any("--dry-run" in getattr(p, "opts", ()) for p in one.params)}
    lines = (COMMANDS | REAL).values()
    lacking = {
        name
        for name in dry
        if not any(words[: len(name.split())] == name.split() and "--dry-run" in words for words in lines)
    }
    assert lacking == {"check"}, "which is one by itself, without --repair"
    assert {"clear", "evict", "import", "move", "quota", "policy set", "policy reset"} <= dry


def test_fields_of_nested_things_are_told_apart() -> None:
    assert list(paths({"a": [{"b": 1, "c": []}, {"d": None}], "e": "x"})) == ["a[].b", "a[].c", "a[].d", "e"]
    assert list(paths({"import": {"reasons": {"full": 3}}})) == ["import.reasons.*"]
    assert list(paths({"import": {"reasons": {}}})) == ["import.reasons.*"]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as here, tempfile.TemporaryDirectory() as place:
        here.setattr(checkup, "LinuxHost", SameEverywhere)
        FILE.write_text(json.dumps(all_fields(Path(place)), indent=1) + "\n")
