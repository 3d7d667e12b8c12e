"""Names on a command line: of tenants and pins that are not there, and what Tab offers of those that are."""

import dataclasses
import inspect
import os
from collections.abc import Callable

import pytest

from kvctl import cli, values
from kvctl.client import Exit
from kvctl.events import KINDS
from kvctl.pins import unknown
from kvstore.rules import Rule, Tier
from kvstored.admin_look import BY
from kvstored.events import Kind
from tests.kvctl_line import Run
from tests.unit.control_fakes import DIGEST_A, DIGEST_B, KEYS, MemoryPort
from tests.unit.test_kvctl import Daemon, ask, bare_environment, daemon, kvctl  # noqa: F401  fixtures

KEY = KEYS[0].hex()
CHAIN = [KEY, "--namespace", DIGEST_A.hex()[:12]]
# By the command that takes a tenant's name: its other words. TENANT stands for the name.
NAMING = {
    "ls": ["ls", "--tenant", "TENANT"],
    "ls NAMESPACE": ["ls", DIGEST_A.hex()[:12], "--tenant", "TENANT"],
    "tree": ["tree", "--tenant", "TENANT"],
    "stat": ["stat", *CHAIN, "--tenant", "TENANT"],
    "stat KEY": ["stat", KEY, "--tenant", "TENANT"],
    "pins": ["pins", "--tenant", "TENANT"],
    "pin": ["pin", *CHAIN, "--tenant", "TENANT"],
    "unpin": ["unpin", "TENANT", "--all", "--yes"],
    "unpin --dry-run": ["unpin", "TENANT", "7", "--dry-run"],
    "prefetch": ["prefetch", *CHAIN, "--tenant", "TENANT"],
    "programs": ["programs", "--tenant", "TENANT"],
    "workflows": ["workflows", "--tenant", "TENANT"],
    "costs": ["costs", "--tenant", "TENANT"],
    "advise": ["advise", "--tenant", "TENANT"],
    "explain-miss": ["explain-miss", *CHAIN, "--tenant", "TENANT"],
    "quota": ["quota", "TENANT"],
    "quota set": ["quota", "TENANT", "set", "in_flight=3"],
    "policy set": ["policy", "set", "arc", "--tenant", "TENANT", "--yes"],
    "policy reset": ["policy", "reset", "TENANT", "--yes"],
    "clear": ["clear", "--tenant", "TENANT", "--yes"],
    "clear --namespace": ["clear", "--tenant", "TENANT", "--namespace", DIGEST_A.hex()[:12], "--dry-run"],
    "match": ["match", *CHAIN, "--tenant", "TENANT"],
    "admission": ["admission", "1MiB", "--namespace", DIGEST_A.hex()[:12], "--tenant", "TENANT"],
    "evict": ["evict", "--tenant", "TENANT", "--dry-run"],
    "move": ["move", *CHAIN, "--tenant", "TENANT", "--dry-run"],
    "export": ["export", "FILE", "--tenant", "TENANT"],
}


@pytest.mark.parametrize("name", NAMING)
def test_a_tenant_that_is_not_there_is_told_with_those_that_are(
    ask: Run, daemon: Daemon, name: str, tmp_path: os.PathLike[str]  # noqa: F811
) -> None:  # fmt: skip
    words = [{"TENANT": "nobody", "FILE": os.path.join(tmp_path, "x")}.get(word, word) for word in NAMING[name]]  # noqa: PTH118
    answer = ask(*words)
    assert (answer.code, answer.out) == (Exit.NOT_FOUND, "")
    said = " ".join(answer.err.split())
    assert said == "kvctl: no tenant is called nobody; there are: research, web"
    assert ask("-o", "json", *words).code == Exit.NOT_FOUND


def test_every_command_that_takes_a_tenant_is_among_them() -> None:
    tested = {words[1] if words[0] == "policy" else words[0] for words in NAMING.values()}
    taking = {
        one.name
        for app in (cli.app, *(group.typer_instance for group in cli.app.registered_groups))
        for one in (app.registered_commands if app else ())
        if one.callback is not None and "tenant" in inspect.signature(one.callback).parameters
    }
    assert taking - {"import", "watch"} == tested, "import makes tenants of new names, and watch waits for them"


def test_where_nobody_has_come_yet_that_is_said(ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(MemoryPort, "tenants", lambda _: ())
    assert ask("ls", "--tenant", "x").err == "kvctl: no tenant is called x; there are: none yet\n"


# -- pins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "ended", "said"),
    [(["7", "8"], (7,), "has no pin 8;"), (["8", "6", "8"], (), "has no pins 8, 6;"), (["9", "7"], (9, 7), "")],
)
def test_unpin_says_which_pins_are_not_there(
    ask: Run, daemon: Daemon, words: list[str], ended: tuple[int, ...], said: str  # noqa: F811
) -> None:  # fmt: skip
    answer = ask("unpin", "research", *words, "--yes")
    assert answer.code == (Exit.NOT_FOUND if said else Exit.OK)
    assert said in answer.err
    assert bool(answer.err) == bool(said)
    assert answer.out == f"{len(ended)} pin{'' if len(ended) == 1 else 's'} ended\n"
    assert daemon.port.unpinned == [ended]
    found = ask("-o", "json", "unpin", "research", *words, "--yes").json["unpin"]
    assert (found["ended"], bool(found["unknown"])) == (len(ended), bool(said))


def test_a_dry_run_says_it_too_as_far_as_all_pins_are_listed(
    ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    assert ask("unpin", "research", "8", "--dry-run").code == Exit.OK, "one of the 598 that are not listed"
    few = MemoryPort().pins(None)
    monkeypatch.setattr(MemoryPort, "pins", lambda *_: type(few)(few.pins, 2, few.budgets, few.counters))
    answer = ask("unpin", "research", "7", "8", "--dry-run")
    below = "concerned: 1 pin (80.0 MiB in 40 blocks), 3 running leases, 1 client"
    assert (answer.code, answer.out) == (Exit.NOT_FOUND, f"would end 1 pin, 80.0 MiB\n{below}\n")
    assert "tenant research has no pin 8" in answer.err
    assert ask("unpin", "research", "7", "9", "--dry-run").code == Exit.OK
    assert not daemon.port.unpinned


def test_of_many_pins_some_are_named() -> None:
    assert "has no pins 0, 1, 2, 3, 4, 5, 6, 7 and 92 more;" in unknown("t", range(100))


# -- Tab ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tab(monkeypatch: pytest.MonkeyPatch, kvctl: Run, daemon: Daemon) -> Callable[..., set[str]]:  # noqa: F811
    """What a shell is offered for the last word of a line."""

    monkeypatch.setattr(values, "WAIT_S", 60.0)

    def offered(line: str, shell: str = "bash") -> set[str]:
        line = line.replace("DIR", str(daemon.folder))
        monkeypatch.setenv("_KVCTL_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", line.replace(" ", "\n"))
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        answer = kvctl()
        assert answer.err == ""
        return set(answer.out.split("\n")) - {""}

    return offered


BOTH = {"research", "web"}
DIGESTS = {DIGEST_A.hex()[:12], DIGEST_B.hex()[:12]}


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("kvctl --runtime-dir DIR ls --tenant ", BOTH),
        ("kvctl ls --runtime-dir DIR --tenant w", {"web"}),
        ("kvctl --runtime-dir DIR ls --tenant x", set()),
        ("kvctl --runtime-dir DIR tree ", DIGESTS),
        ("kvctl --runtime-dir DIR tree --tenant web ", {DIGEST_A.hex()[:12]}),
        ("kvctl --runtime-dir DIR clear --namespace abcdef02", {DIGEST_B.hex()[:12]}),
        ("kvctl --runtime-dir DIR unpin ", BOTH),
        ("kvctl --runtime-dir DIR unpin research ", {"7", "9"}),
        ("kvctl --runtime-dir DIR policy reset ", BOTH),
        ("kvctl --runtime-dir DIR quota ", BOTH | {"set", "reset"}),
        ("kvctl --runtime-dir DIR quota web ", {"set", "reset"}),
        ("kvctl --runtime-dir DIR quota web set dram_m", {"dram_max="}),
        ("kvctl --runtime-dir DIR quota web reset dram_m", {"dram_max"}),
        ("kvctl --runtime-dir DIR quota set ", BOTH),
        ("kvctl policy set l", {"lru", "lfu"}),
        ("kvctl policy set --tier d", {"dram", "disk"}),
        ("kvctl tree --by ", {"blocks", "hits", "recent"}),
        ("kvctl events --kind t", {"traffic", "tier"}),
        ("kvctl pin --ttl ", {"5m", "1h"}),
        ("kvctl completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_tab_offers_values(tab: Callable[..., set[str]], line: str, offers: set[str]) -> None:
    assert tab(line) == offers


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_tab_offers_them_in_every_shell(tab: Callable[..., set[str]], shell: str) -> None:
    for line in ("kvctl ls --runtime-dir DIR --tenant ", "kvctl ls --runtime-dir DIR --tenant w"):
        said = " ".join(tab(line, shell))
        assert "web" in said
        assert ("research" in said) == line.endswith(" ")


def test_tab_is_silent_without_a_daemon_and_where_it_does_not_answer(
    tab: Callable[..., set[str]], daemon: Daemon, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    assert tab("kvctl --runtime-dir /nowhere ls --tenant ") == set()
    assert tab("kvctl --address nowhere:1 ls --tenant ") == set()
    line = "kvctl --runtime-dir DIR ls --tenant "
    monkeypatch.setattr(values, "WAIT_S", 0.05)
    with daemon.owner.busy():
        assert tab(line) == set()
    monkeypatch.setattr(values, "WAIT_S", 60.0)
    assert tab(line) == BOTH, "the control"


def test_what_a_tenant_calls_its_model_is_no_command_of_whoever_presses_tab(
    tab: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "m\\$(reboot)\\`reboot`\n'; reboot #"
    (first, *_) = MemoryPort().namespaces()
    monkeypatch.setattr(MemoryPort, "namespaces", lambda *_: (dataclasses.replace(first, model=evil),))
    line = "kvctl --runtime-dir DIR tree "
    for shell in ("zsh", "fish"):
        said = "".join(tab(line, shell))
        assert "m__" in said, "the control: it is named"
        assert not set(said) & set("$`;#"), shell
    monkeypatch.setattr(MemoryPort, "namespaces", lambda *_: (dataclasses.replace(first, model="org/m-7.1"),))
    assert "org/m-7.1" in "".join(tab(line, "zsh"))


def test_words_that_are_always_the_same_are_those_of_the_daemon() -> None:
    assert set(values.RULES) == set(Rule)
    assert set(values.TIERS) >= set(Tier)
    assert values.ORDERS == BY
    assert set(KINDS) == set(Kind)
