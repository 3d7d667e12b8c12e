"""`kvctl load`, `match`, `admission` and `watch`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvctl import cli
from tests.core import key_of
from tests.unit.store_port import SYSTEM
from tests.unit.test_routing_access import Served

Ask = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Served]]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("run")
        yield folder, Served(folder, stack)


@pytest.fixture
def ask(home: tuple[Path, Served], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    def asked(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kvctl", "--runtime-dir", str(home[0]), *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out + said.err

    return asked


def test_load_names_each_tier(ask: Ask) -> None:
    code, text = ask("load")
    assert code == 0
    assert "dram" in text
    assert "1 leases" in text


def test_match_says_how_much_is_where(ask: Ask, home: tuple[Path, Served]) -> None:
    options = ("--namespace", home[1].digest[:12], "--tenant", "research")
    code, text = ask("match", *(key.hex() for key in SYSTEM), key_of("absent").hex(), *options)
    assert code == 0
    assert f"{len(SYSTEM)} of {len(SYSTEM) + 1} blocks" in text
    assert ask("match", key_of("absent").hex(), *options)[0] == 4, "nothing of it is there"


def test_admission_says_what_would_go(ask: Ask, home: tuple[Path, Served]) -> None:
    options = ("--namespace", home[1].digest[:12])
    assert ask("admission", "1MiB", *options)[0] == 2, "several tenants have it"
    code, text = ask("admission", "1MiB", *options, "--tenant", "research")
    assert code == 0
    assert "would leave memory" in text
    assert ask("admission", "much", *options)[0] == 2


def test_watch_lists_what_is_there_and_then_changes(ask: Ask, home: tuple[Path, Served]) -> None:
    code, text = ask("watch", "--tenant", "web")
    assert code == 0
    assert text.splitlines()[0].endswith("all cleared")
    assert all(key.hex() in text for key in home[1].of_web)
    code, text = ask("watch", "--tenant", "web", "--from", "1")
    assert "nowhere -> dram" in text
    code, text = ask("watch", "--tenant", "nobody")
    assert code == 4, "a name that nobody has is no empty answer"
    assert "web" in text
    assert ask("watch", "--tenant", "web", "--from", "1", "-o", "json")[1].startswith('{"version"')
