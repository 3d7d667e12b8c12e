"""Commands that take something away: they show it, ask, and change nothing on a dry run.

The same table, and what needs real blocks (`import`, `check --repair`), on a daemon: integration/test_kvctl_taking.py.
"""

import json
import subprocess
from typing import Any

import pytest

from kvctl.client import Exit
from kvstore.handing_over import HandOverReport
from kvstore.rules import Rule, Tier
from kvstored.admin_pins import PrefixWish
from tests.kvctl_line import Run
from tests.unit.control_fakes import BLOCK_BYTES, DIGEST_A, KEYS, MIB, MemoryPort
from tests.unit.test_kvctl import Daemon, ask, bare_environment, daemon, kvctl  # noqa: F401  fixtures

TAKING = {
    "clear": ["clear", "--all"],
    "evict": ["evict", "--all", "--bytes", "4MiB"],
    "unpin": ["unpin", "research", "--all"],
    "drain": ["drain"],
    "policy": ["policy", "set", "arc"],
    "policy reset": ["policy", "reset", "web"],
    "quota": ["quota", "web", "set", "dram_guaranteed=130MiB"],
    "quota reset": ["quota", "web", "reset"],
    "move": ["move", KEYS[0].hex(), "--namespace", DIGEST_A.hex(), "--tenant", "research", "--evict"],
}


@pytest.fixture(autouse=True)
def something_to_take(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule and a quota that were chosen, and a far side that has what is handed over to it."""
    if request.cls is not TestTaking:
        return
    port: MemoryPort = request.getfixturevalue("daemon").port
    port.rules[Tier.DRAM, "web"] = Rule.LFU
    port.chosen["web"] = {"dram_guaranteed_bytes": 640 * MIB}

    def hand_over(wish: PrefixWish, *, dry_run: bool) -> HandOverReport:
        port.wishes += [] if dry_run else [wish]
        looked = len(port.wishes) if wish.looked_ns else 0
        return HandOverReport(1, BLOCK_BYTES, len(port.wishes), 0, remote=True, dry_run=dry_run, looked=looked)

    monkeypatch.setattr(port, "hand_over", hand_over)


def state(port: MemoryPort) -> Any:
    """All that these commands could change."""
    chains = [(chain.tenant, tuple(chain.keys)) for chain in port.chains]
    return (chains, port.draining, dict(port.rules), dict(port.chosen), list(port.unpinned), list(port.wishes))


@pytest.mark.parametrize("name", TAKING)
class TestTaking:
    def test_a_dry_run_says_what_would_happen_and_changes_nothing(self, ask: Run, daemon: Daemon, name: str) -> None:  # noqa: F811
        before = state(daemon.port)
        for options in ([], ["-o", "json"]):
            answer = ask(*options, *TAKING[name], "--dry-run")
            assert (answer.code, answer.err) == (0, "")
            assert state(daemon.port) == before
        assert json.loads(answer.out)["version"] == 1
        assert "would" in ask(*TAKING[name], "--dry-run").out

    def test_without_a_terminal_is_refused(self, ask: Run, daemon: Daemon, name: str) -> None:  # noqa: F811
        before = state(daemon.port)
        answer = ask(*TAKING[name])
        assert (answer.code, answer.out) == (Exit.USAGE, "")
        assert "there is no terminal to ask on; give --yes to" in answer.err
        assert state(daemon.port) == before

    @pytest.mark.parametrize("typed", ["n\n", "\n", ""])
    def test_shows_what_is_concerned_and_takes_no_for_an_answer(
        self, ask: Run, daemon: Daemon, name: str, typed: str  # noqa: F811
    ) -> None:  # fmt: skip
        before = state(daemon.port)
        answer = ask(*TAKING[name], typed=typed)
        assert (answer.code, answer.out) == (Exit.REFUSED, "")
        assert "concerned: " in answer.err
        assert "[y/N]" in answer.err
        assert state(daemon.port) == before

    @pytest.mark.parametrize(("options", "typed"), [(["--yes"], None), (["-y"], None), ([], "y\n"), ([], "YES\n")])
    def test_does_it_when_told(
        self, ask: Run, daemon: Daemon, name: str, options: list[str], typed: str | None  # noqa: F811
    ) -> None:  # fmt: skip
        before = state(daemon.port)
        answer = ask(*TAKING[name], *options, typed=typed)
        assert answer.code == 0
        assert state(daemon.port) != before


class TestConcerned:
    def test_pins_leases_and_clients_are_counted_where_they_are(self, ask: Run) -> None:  # noqa: F811
        of_tenant = ask("clear", "--tenant", "research", typed="n\n").err
        assert "3 running leases, 1 client" in of_tenant
        assert "0 running leases, 0 clients" in ask("clear", "--tenant", "web", typed="n\n").err
        elsewhere = ask("clear", "--namespace", "abcdef02", typed="n\n").err
        assert "concerned: at least 0 pins" in elsewhere
        assert "concerned: 0 pins" not in of_tenant

    def test_what_takes_nothing_away_asks_nothing(self, ask: Run, daemon: Daemon) -> None:  # noqa: F811
        assert ask("undrain").code == 0
        assert ask("quota", "web", "set", "dram_max=none").code == 0
        assert ask("policy", "set", "lru").code == 0, "the rule that holds"
        assert ask("policy", "set", "--dry-run", "arc").code == 0
        daemon.port.chains.clear()
        assert ask("clear", "--all", typed="").code != 0 or "[y/N]" not in ask("clear", "--all", typed="").err


class TestMove:
    def test_what_would_leave_and_what_holds_it_is_told_only_of_a_move_that_takes_away(
        self, ask: Run, daemon: Daemon  # noqa: F811
    ) -> None:  # fmt: skip
        words = ["move", KEYS[0].hex(), "--namespace", DIGEST_A.hex(), "--tenant", "research", "--dry-run"]
        told = ask(*words, "--evict").out
        assert "would leave this daemon" in told
        assert "1 stay, and what leads there: 0 pinned, 1 leased" in told
        assert "concerned: " in told
        assert "pins" in told
        copied = ask(*words).out
        assert "they stay here, too" in copied
        assert "concerned" not in copied, "the control: nothing is taken away"
        held = ask(*words, "--evict", "-o", "json").json["move"]
        assert (held["evicted_blocks"] > 0, held["held_blocks"], held["dry_run"]) == (True, 1, True)


class Ran:
    """`kvstored check`, as its exit codes and words go."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.words = list(codes), list[list[str]]()

    def __call__(self, words: list[str], **_: Any) -> Any:
        self.words.append(words)
        return subprocess.CompletedProcess(words, self.codes.pop(0), "blocks damaged: 3\nbytes damaged: 12288\n")


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """A disk tier with something to repair."""
    ran = Ran(1, 1)
    monkeypatch.setattr(subprocess, "run", ran)
    return ran


class TestRepair:
    def test_who_cannot_be_asked_is_told_what_looks(self, kvctl: Run, damaged: Ran) -> None:  # noqa: F811
        answer = kvctl("check", "--repair", "/nowhere")
        assert answer.code == Exit.USAGE
        assert "give --yes to repair, or --dry-run to look" in " ".join(answer.err.split())
        assert not damaged.words

    def test_blocks_and_bytes_are_shown_before_anybody_is_asked(self, kvctl: Run, damaged: Ran) -> None:  # noqa: F811
        answer = kvctl("check", "--repair", "/somewhere", typed="n\n")
        assert (answer.code, answer.out) == (Exit.REFUSED, "")
        for said in (
            "blocks damaged: 3",
            "bytes damaged: 12288",
            "concerned: no leases",
            "[y/N]",
            "nothing was erased",
        ):
            assert said in answer.err
        assert ["--repair" in words for words in damaged.words] == [False]
        damaged.codes = [1, 1]
        assert kvctl("check", "--repair", "/somewhere", typed="y\n").code == 1
        assert ["--repair" in words for words in damaged.words] == [False, False, True]

    @pytest.mark.parametrize("options", [[], ["--dry-run"], ["--repair", "--dry-run"], ["--repair", "--dry-run", "-y"]])
    def test_plain_or_dry_it_only_looks_and_says_so(self, kvctl: Run, damaged: Ran, options: list[str]) -> None:  # noqa: F811
        answer = kvctl("check", *options, "/somewhere")
        assert "nothing was changed; --repair would erase what is damaged" in " ".join(answer.out.split())
        assert kvctl("-o", "json", "check", *options, "/somewhere").json["check"]["dry_run"]
        assert not any("--repair" in words for words in damaged.words)

    def test_with_yes_it_is_done_at_once_and_where_all_is_well_nobody_is_asked(
        self, kvctl: Run, damaged: Ran  # noqa: F811
    ) -> None:  # fmt: skip
        assert kvctl("-o", "json", "check", "--repair", "--yes", "/somewhere").json["check"]["dry_run"] is False
        assert ["--repair" in words for words in damaged.words] == [True]
        damaged.codes = [0]
        answer = kvctl("check", "--repair", "/somewhere", typed="")
        assert (answer.code, answer.err) == (0, "")


class TestPolicyReset:
    def test_goes_back_to_the_configuration_for_one_tenant_or_for_all(self, ask: Run, daemon: Daemon) -> None:  # noqa: F811
        for words in (["arc"], ["lfu", "--tenant", "web", "--tier", "dram"], ["density", "--tenant", "research"]):
            assert ask("policy", "set", *words, "--yes").code == 0
        before = dict(daemon.port.rules)
        told = ask("policy", "reset", "web", "--dry-run")
        assert told.out.startswith("dram, tenant web: would evict by lru, until now by lfu (1 blocks)\nconcerned: ")
        assert daemon.port.rules == before
        assert ask("policy", "reset", "web").code == Exit.USAGE, "blocks go by another rule: somebody must be asked"
        assert ask("policy", "reset", "web", "--yes").code == 0
        assert len(daemon.port.rules) == len(before) - 1
        assert ask("policy", "reset", "--tier", "dram", "--yes").code == 0
        assert {tier for tier, _ in daemon.port.rules} == {Tier.DISK}
        assert ask("policy", "reset", "--yes").code == 0
        assert not daemon.port.rules


class TestEvict:
    def test_says_how_much_and_how_much_less(self, ask: Run, daemon: Daemon) -> None:  # noqa: F811
        answer = ask("evict", "--tenant", "research", "--bytes", "4MiB", "--yes", "-o", "json")
        assert answer.code == 0
        assert answer.json["evict"] == {
            "blocks": 2, "bytes": 4 << 20, "kept_blocks": 0, "held_blocks": 1, "pinned_blocks": 0, "dry_run": False,
        }  # fmt: skip
        short = ask("evict", "--tenant", "web", "--bytes", "1GiB", "--yes")
        assert short.code == Exit.REFUSED
        assert "evicted 1 block from dram" in short.out

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["--yes"], Exit.USAGE, "nothing is named"),
            (["--all", "--bytes", "lots", "--yes"], Exit.USAGE, "--bytes"),
            (["--all", "--bytes", "0", "--yes"], Exit.USAGE, "above 0"),
            (["--all", "--tier", "hbm", "--yes"], Exit.USAGE, "no tier is called 'hbm'"),
            (["--tenant", "nobody", "--yes"], Exit.NOT_FOUND, "nobody"),
            (["--key", "ab" * 32, "--yes"], Exit.USAGE, "without its namespace"),
        ],
    )
    def test_refuses_what_cannot_be(self, ask: Run, words: list[str], code: Exit, said: str) -> None:  # noqa: F811
        answer = ask("evict", *words)
        assert answer.code == code
        assert said in answer.err

    def test_a_scope_is_as_that_of_clear(self, ask: Run, daemon: Daemon) -> None:  # noqa: F811
        ask("evict", "--namespace", DIGEST_A.hex()[:8], "--tenant", "web", "--dry-run")
        assert (daemon.port.scopes[-1].tenant, daemon.port.scopes[-1].digest) == ("web", DIGEST_A)


class TestAudit:
    def test_without_one_is_said(self, ask: Run) -> None:  # noqa: F811
        answer = ask("audit")
        assert answer.code == Exit.REFUSED
        assert "nothing is written down" in answer.err
