"""`kvctl ls`, `tree`, `stat` and `events` against a real control socket over a real store."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvctl import cli, prefix_tables, prefixes
from kvctl.client import Exit
from kvctl.events import tell
from kvctl.render import console
from kvproto import control_pb2 as pb
from kvproto.limits import KEYS_PER_FRAME
from kvstored.events import Events, Kind
from tests.core import chain, key_of
from tests.kvctl_line import Run, command_line
from tests.unit.store_port import CHATS, SYSTEM, StorePort, served
from tests.unit.test_disk import put


@pytest.fixture(scope="module")
def said() -> Events:
    events = Events()
    events.say(Kind.DAEMON, "it began")
    events.say(Kind.FAULT, "2 blocks were \x1b[31mnot what was stored", warning=True, count=2)
    events.say(Kind.CLIENT, "client 'engine' came", tenant="research")
    return events


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, said: Events) -> Iterator[StorePort]:
    with served(tmp_path_factory.mktemp("run"), said) as (port, _):
        yield port


@pytest.fixture
def ask(daemon: StorePort, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line as the console script does."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    return command_line(monkeypatch, capsys, "--runtime-dir", daemon.runtime_dir)


@pytest.fixture
def talks(daemon: StorePort) -> str:
    assert daemon.core
    return daemon.talks.digest.hex()


class TestList:
    def test_namespaces_fit_80_columns_and_the_largest_is_first(self, ask: Run, talks: str) -> None:
        answer = ask("ls")
        assert (answer.code, answer.err) == (0, "")
        assert max(map(len, answer.out.splitlines())) <= 80
        assert answer.out.splitlines()[1].startswith(talks[:12])
        assert len(ask("ls", "-o", "json").json["namespaces"]) == 2
        assert ask("ls", "--tenant", "web").out == "no namespace holds blocks or is open\n"
        assert ask("ls", "--tenant", "nobody").code == Exit.NOT_FOUND

    def test_beginnings_of_a_namespace(self, ask: Run, talks: str) -> None:
        answer = ask("ls", talks[:12])
        assert (answer.code, answer.err) == (0, "")
        assert max(map(len, answer.out.splitlines())) <= 80
        assert SYSTEM[0].hex()[:12] in answer.out
        first = next(line for line in answer.out.splitlines() if line.startswith(SYSTEM[0].hex()[:12]))
        assert first.split()[-1] == "6", "are pinned"
        report = ask("ls", talks, "-o", "json").json["prefixes"]
        assert [node["blocks"] for node in report["nodes"]] == [6 + sum(1 + n % 4 for n in range(CHATS)), 3]
        one = ask("ls", talks, "-n", "1", "--by", "recent")
        assert "1 more" in one.out

    def test_blocks_come_page_by_page_each_on_a_line(
        self, ask: Run, talks: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefixes, "PAGE", 4)
        every = ask("ls", talks, "--blocks", "--all")
        keys = [line.split()[0] for line in every.out.splitlines()[1:]]
        assert len(keys) == len(set(keys)) == 9 + sum(1 + n % 4 for n in range(CHATS))
        assert {key.hex() for key in SYSTEM} < set(keys)
        few = ask("ls", talks, "--blocks", "-n", "7", "-o", "json").lines
        assert len(few) == 7
        assert all(line["version"] == 1 and len(line["block"]["key"]) == 64 for line in few)

    def test_what_cannot_be_listed_is_told(self, ask: Run, talks: str) -> None:
        assert ask("ls", "--blocks").code == Exit.USAGE
        assert ask("ls", "abcdefabcdef").code == Exit.NOT_FOUND
        assert ask("ls", "xyz").code == Exit.USAGE
        wrong = ask("ls", talks, "--by", "color")
        assert wrong.code == Exit.USAGE
        assert "blocks, hits, recent" in wrong.err


class TestTree:
    def test_branches_hang_on_what_they_share(self, ask: Run, talks: str) -> None:
        answer = ask("tree", talks[:12])
        assert (answer.code, answer.err) == (0, "")
        assert max(map(len, answer.out.splitlines())) <= 80
        lines = answer.out.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(SYSTEM[0].hex()[:12]))
        assert lines[at + 1].startswith(f"+ {chain(4, 'chat 3')[0].hex()[:12]}") or lines[at + 1].startswith("+ ")
        shown = [line for line in lines[at + 1 :] if line.startswith("+ ") and "more" not in line]
        assert len(shown) == 8
        more = next(line for line in lines if "more" in line)
        assert more.split()[:3] == ["+", str(CHATS - 8), "more"]
        assert any(line.startswith(chain(3, "alone")[0].hex()[:12]) for line in lines)

    def test_all_namespaces_are_drawn_where_none_is_named(
        self, ask: Run, talks: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trees = ask("tree", "-o", "json").json["trees"]
        assert [tree["blocks"] for tree in trees] == [9 + sum(1 + n % 4 for n in range(CHATS)), 2]
        monkeypatch.setattr(prefixes, "TREES", 1)
        assert "and 1 more namespace:" in ask("tree").out

    def test_only_what_continues_a_block(self, ask: Run, talks: str) -> None:
        below = ask("tree", talks, "--key", chain(4, "chat 3")[1].hex(), "-o", "json").json["trees"][0]
        assert [(node["before_blocks"], node["run_blocks"]) for node in below["nodes"]] == [(7, 3)]
        assert ask("tree", talks, "--key", key_of("nowhere").hex()).code == Exit.NOT_FOUND
        assert ask("tree", talks, "--key", "ab").code == Exit.USAGE
        assert ask("tree", "--key", SYSTEM[0].hex()).code == Exit.USAGE

    def test_guides_say_where_branches_go_on(self) -> None:
        def node(level: int, blocks: int, run: int, branches: int, key: str) -> pb.TreeNode:
            return pb.TreeNode(level=level, first_key=key_of(key), blocks=blocks, run_blocks=run, branches=branches)

        nodes = [
            node(0, 100, 10, 3, "a"), node(1, 50, 10, 2, "b"), node(2, 20, 20, 0, "c"), node(2, 20, 20, 0, "d"),
            node(1, 30, 5, 4, "e"), node(2, 5, 5, 0, "f"), node(0, 7, 7, 0, "g"),
        ]  # fmt: skip
        report = pb.GetTreeResponse(nodes=nodes, roots=3, blocks=120, block_tokens=16, digest="ab" * 32, tenant="t")
        shown = console()
        with shown.capture() as drawn:
            shown.print(prefix_tables.tree(report))
        heads = [line.split("  0 B")[0].rstrip() for line in drawn.get().splitlines()[4:]]
        names = {name: key_of(name).hex()[:12] for name in "abcdefg"}
        guides = [
            line[: line.index(next(one for one in names.values() if one in line))]
            for line in heads
            if any(one in line for one in names.values())
        ]
        assert guides == ["", "+ ", "|+ ", "|+ ", "+ ", "|+ ", ""]
        rest = [line for line in drawn.get().splitlines() if "more" in line]
        assert [" ".join(line.split()) for line in rest] == ["|+ 3 more 20", "+ 1 more 10", "1 more 13"]

    def test_what_is_very_deep_says_how_deep_and_stays_in_80_columns(self) -> None:
        nodes = [
            pb.TreeNode(level=level, first_key=key_of(level), blocks=4_000_000 - level, run_blocks=1, branches=2,
                total_bytes=1000 << 30, hits=99_000_000, age_s=86_400 * 99, dram_blocks=4_000_000 - level,
                disk_blocks=4_000_000 - level, pinned_blocks=999_999)
            for level in range(40)
        ]  # fmt: skip
        shown = console()
        with shown.capture() as drawn:
            shown.print(prefix_tables.tree(pb.GetTreeResponse(nodes=nodes, roots=1, blocks=4_000_000)))
        lines = drawn.get().splitlines()[4:]
        assert max(map(len, lines)) <= 80
        assert len(lines) == 40 + 40, "each on a line, and what is not listed of it"
        assert f"39: {key_of(39).hex()[:12]}" in drawn.get()


class TestStat:
    def test_a_prefix_with_who_keeps_it_and_what_continues_it(self, ask: Run, talks: str) -> None:
        keys = [key.hex() for key in (*SYSTEM, key_of("absent"))]
        answer = ask("stat", *keys, "--namespace", talks[:12])
        assert (answer.code, answer.err) == (0, "")
        assert max(map(len, answer.out.splitlines())) <= 80
        assert "6 of 7 blocks are there" in answer.out
        assert "(operator), 6 blocks" in answer.out.replace("\n", " ")
        assert "client 1" in answer.out
        assert "30 blocks continue it, in 12 branches" in answer.out
        report = ask("stat", *keys, "--namespace", talks, "-o", "json").json["prefix"]
        assert (report["found_blocks"], report["below"]["branches"]) == (6, CHATS)
        assert [one["state"] for one in report["blocks"]] == ["resident"] * 6 + ["absent"]
        each = ask("stat", *keys, "--namespace", talks, "--blocks").out
        assert keys[3] in each
        assert keys[3] not in answer.out, "only the first of like ones is named"

    def test_the_end_of_a_chain(self, ask: Run, talks: str) -> None:
        answer = ask("stat", *(key.hex() for key in chain(3, "alone")), "--namespace", talks)
        assert "nothing continues it" in answer.out
        assert "no pin covers it" in answer.out
        assert "no lease ends in it" in answer.out

    def test_what_is_not_there_exits_with_4(self, ask: Run, talks: str) -> None:
        answer = ask("stat", key_of("absent").hex(), "--namespace", talks)
        assert answer.code == Exit.NOT_FOUND
        assert "0 of 1 blocks" in answer.out

    def test_chains_longer_than_a_request_are_put_together(
        self, ask: Run, talks: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert KEYS_PER_FRAME == 1024
        keys = [key.hex() for key in (*SYSTEM, *chain(4, "chat 3"), key_of("absent"))]
        whole = ask("stat", *keys, "--namespace", talks, "-o", "json").json["prefix"]
        monkeypatch.setattr(prefixes, "KEYS_PER_FRAME", 3)
        parts = ask("stat", *keys, "--namespace", talks, "-o", "json").json["prefix"]
        for report in (whole, parts):
            for one in report["blocks"]:
                one.pop("age_s")
                one.pop("leased_s")
            for one in (*report["pins"], *report["leases"]):
                one.pop("left_s")
            report.pop("below")
        assert parts == whole
        assert whole["found_blocks"] == 10
        assert whole["leases"][0]["blocks"] == 4


class TestKeysByTheirFirstDigits:
    """As tables show them, and more."""

    def test_every_key_that_a_tree_shows_names_its_block_everywhere(self, ask: Run, talks: str) -> None:
        drawn = ask("tree", talks[:12], "-n", "100", "-w", "100").out
        shown = re.findall(r"^[+| ]*([0-9a-f]{12}) ", drawn, re.MULTILINE)
        assert len(shown) == 2 + CHATS
        for digits in shown:
            report = ask("stat", digits, "--namespace", talks[:12], "-o", "json").json["prefix"]
            assert report["found_blocks"] == 1
            assert report["blocks"][0]["key"].startswith(digits)
            assert ask("tree", talks, "--key", digits, "-o", "json").json["trees"][0]["nodes"][0]["run_blocks"]
        top = SYSTEM[0].hex()[:8].upper()
        assert ask("match", top, "--namespace", talks, "-o", "json").json["match"]["blocks"] == 1

    def test_a_chain_may_be_named_in_both_ways(self, ask: Run, talks: str) -> None:
        mixed = [key.hex() if number % 2 else key.hex()[:9] for number, key in enumerate(SYSTEM)]
        report = ask("stat", *mixed, "--namespace", talks, "-o", "json").json["prefix"]
        assert [one["key"] for one in report["blocks"]] == [key.hex() for key in SYSTEM]

    def test_what_names_none_several_or_nothing_is_told_in_a_line(
        self, ask: Run, talks: str, daemon: StorePort
    ) -> None:
        none = ask("stat", "0" * 8, "--namespace", talks)
        assert (none.code, none.out) == (Exit.NOT_FOUND, "")
        where = f"namespace {talks[:12]} of research"
        assert none.err.startswith(f"kvctl: no block in {where} has a key that begins with 00000000; ")
        assert "give the whole key" in none.err
        twins = [bytes.fromhex("feedfeed") + bytes([number]) * 28 for number in range(2)]
        namespace = daemon.client.open(model="twins")
        put(daemon.client, namespace, twins)
        several = ask("stat", "feedfeed", "--namespace", namespace.digest.hex())
        assert several.code == Exit.USAGE
        assert "2 keys" in several.err
        assert "feedfeed000000, feedfeed010101; give more digits" in several.err
        assert ask("stat", "feedfeed01", "--namespace", namespace.digest.hex()).code == 0
        short = ask("stat", "feedfee", "--namespace", talks)
        assert short.code == Exit.USAGE
        assert "64 hex digits, or 8 or more of the first" in short.err


class TestEvents:
    def test_each_is_a_line_and_safe_for_a_terminal(self, ask: Run) -> None:
        answer = ask("events")
        assert answer.code == 0
        first, second, third = answer.out.splitlines()
        assert first.split()[0] == "1"
        assert "\x1b" not in answer.out
        assert "fault" in second
        assert "research: client 'engine' came" in third

    def test_json_of_all_is_one_object_and_of_those_that_follow_one_a_line(self, ask: Run, said: Events) -> None:
        everything = ask("events", "-o", "json").json
        assert everything["version"] == 1
        assert [event["kind"] for event in everything["events"]] == ["daemon", "fault", "client"]
        assert [event["number"] for event in ask("events", "-o", "json", "--warnings").json["events"]] == [2]
        assert [event["number"] for event in ask("events", "-o", "json", "--after", "2").json["events"]] == [3]
        assert [event["number"] for event in ask("events", "-o", "json", "-n", "2").json["events"]] == [2, 3]

    def test_an_unknown_kind_is_a_wrong_command_line(self, ask: Run) -> None:
        answer = ask("events", "-k", "weather")
        assert answer.code == Exit.USAGE
        assert "traffic" in answer.err

    def test_events_that_were_lost_are_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        tell(pb.Event(number=9, unix_s=1.7e9, kind="tier", text="x", lost=1234), console())
        assert "1,234 events are not remembered" in capsys.readouterr().out


def test_who_follows_hears_the_end_of_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = Events()
    events.say(Kind.DAEMON, "it began")
    monkeypatch.setattr(sys, "argv", ["kvctl", "--runtime-dir", str(tmp_path), "events", "-f", "-o", "json"])
    with served(tmp_path, events):
        events.stop()
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out = capsys.readouterr()
    assert json.loads(out.out)["event"]["text"] == "it began"
    assert ended.value.code == Exit.UNREACHABLE
    assert "the daemon ended" in out.err
