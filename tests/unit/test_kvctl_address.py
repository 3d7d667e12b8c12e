"""Which daemon a command line means, where --runtime-dir, --address and their variables name different ones."""

from pathlib import Path

import pytest

from kvctl.client import Exit
from tests.kvctl_line import Run
from tests.unit.test_kvctl import Daemon, ask, bare_environment, daemon, kvctl  # noqa: F401  fixtures

ELSEWHERE = "host-7.invalid:9756"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an operator of other hosts has it in a profile; nothing there could be read."""
    monkeypatch.setenv("KVCTL_ADDRESS", ELSEWHERE)
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.setenv(f"KVCTL_TLS_{name}", str(tmp_path / f"none-{name}"))


@pytest.mark.usefixtures("exported")
def test_a_directory_that_is_named_beats_an_address_that_is_exported(ask: Run, daemon: Daemon) -> None:  # noqa: F811
    assert ask("drain", "--yes").code == 0
    assert daemon.port.draining
    assert ask("undrain").code == 0
    assert not daemon.port.draining


@pytest.mark.usefixtures("exported")
def test_an_address_that_is_exported_counts_where_no_directory_is_named(
    kvctl: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    for exported in (None, str(daemon.folder)):
        if exported:
            monkeypatch.setenv("KVSTORED_RUNTIME_DIR", exported)
        answer = kvctl("drain", "--yes")
        assert answer.code == Exit.CONFIGURATION
        assert "none-CA" in answer.err
    assert not daemon.port.draining


@pytest.mark.usefixtures("exported")
def test_an_address_that_is_named_beats_a_directory_that_is_exported(
    kvctl: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("KVSTORED_RUNTIME_DIR", str(daemon.folder))
    answer = kvctl("--address", "host-8.invalid:1", "--tls-ca", str(tmp_path / "mine"), "drain", "--yes")
    assert answer.code == Exit.CONFIGURATION
    assert "mine" in answer.err
    assert not daemon.port.draining


@pytest.mark.parametrize("options", [("--address", ELSEWHERE), ("--tls-ca", "/mine"), ("--tls-key", "/mine")])
@pytest.mark.usefixtures("exported")
def test_both_named_is_a_mistake(ask: Run, daemon: Daemon, options: tuple[str, str]) -> None:  # noqa: F811
    answer = ask(*options, "drain", "--yes")
    assert (answer.code, answer.out) == (Exit.USAGE, "")
    assert "leave one of them out" in answer.err
    assert not daemon.port.draining


def test_the_daemon_that_is_meant_is_named_where_somebody_is_asked(ask: Run, daemon: Daemon) -> None:  # noqa: F811
    for words in (["drain"], ["clear", "--all"], ["unpin", "research", "--all"], ["policy", "set", "arc"]):
        shown = ask(*words, typed="n\n").err.replace("\n", "").replace(" ", "")
        assert f"daemon:{daemon.folder}" in shown, words


@pytest.mark.usefixtures("exported")
def test_a_variable_that_is_in_the_way_is_named(kvctl: Run, ask: Run) -> None:  # noqa: F811
    answer = kvctl("doctor")
    assert answer.code == Exit.USAGE
    assert "KVCTL_ADDRESS" in answer.err
    assert "about the host" not in ask("doctor").err, "the control"


def test_files_of_tls_that_are_exported_alone_are_in_nobodys_way(
    ask: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.setenv(f"KVCTL_TLS_{name}", str(tmp_path / name))
    assert ask("ping").code == 0
    assert ask("--tls-ca", str(tmp_path / "CA"), "ping").code == Exit.USAGE, "the control: one that is named is not"
