"""The manual pages: they name every command, option and setting, and read without a complaint."""

import shutil
import subprocess
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.main import get_command

from kvctl import cli
from kvstored.quota_keys import QUOTA_KEYS
from kvstored.settings import SETTINGS

FOLDER = Path(__file__).parent.parent.parent / "systemd/man"


def generator() -> ModuleType:
    """`systemd/man/generate.py`, which is no part of a package."""
    spec = util.spec_from_file_location("manual", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(page: Path) -> str:
    """Its words, without what roff needs."""
    return page.read_text().replace("\\-", "-").replace("\\(aq", "'").replace("\\&", "").replace("\\e", "\\")


def commands() -> dict[str, Any]:
    """Names of pages and what they are about."""
    module = generator()
    root: Any = get_command(cli.app)
    leaves = module._leaves(root, typer.Context(root, info_name="kvctl"))
    return {"-".join(("kvctl", *words)): command for words, command, _ in leaves}


def test_the_committed_pages_are_about_what_there_is() -> None:
    expected = {f"{name}.1" for name in commands()} | {"kvctl.1", "kvstored.8", "kvstored-check.8", "kvstored.toml.5"}
    assert {page.name for page in FOLDER.glob("*.[158]")} == expected, "run make man"
    assert {"kvctl-policy.1", "kvctl-policy-set.1", "kvctl-service.1", "kvctl-service-install.1"} <= expected


def test_each_page_names_every_option_of_its_command() -> None:
    overview = plain(FOLDER / "kvctl.1")
    for name, command in commands().items():
        text = plain(FOLDER / f"{name}.1")
        assert f"{name}(1)" in overview, "run make man"
        for parameter in command.params:
            for word in getattr(parameter, "opts", []):
                if word.startswith("-"):
                    assert word in text, f"{name} {word}: run make man"


def test_synopses_name_arguments_as_manuals_do_and_group_what_goes_together() -> None:
    synopses = {
        name: plain(FOLDER / f"{name}.1").partition(".SH SYNOPSIS\n")[2].partition(".SH")[0] for name in commands()
    }
    for name, text in synopses.items():
        assert not any(odd in text for odd in ("[[", "]]...", "{", "<", "....")), f"{name}: {text}"
    assert synopses["kvctl-unpin"].split() == [".B", "kvctl", "unpin", "[OPTIONS]", "TENANT", "[PIN]..."]
    assert synopses["kvctl-check"].endswith("[OPTIONS] DIR...\n")
    assert "[TENANT [set KEY=VALUE... | reset [KEY...]]]" in synopses["kvctl-quota"]
    assert "[COMMAND [ARGS]...]" in synopses["kvctl-policy"], "it does something by itself"
    assert "list[" not in plain(FOLDER / "kvctl-quota.1")


def test_what_kvstored_check_exits_with_is_told() -> None:
    text = plain(FOLDER / "kvstored.8").partition("Of kvstored check:")[2].partition(".SH")[0]
    assert [line.removeprefix(".B ") for line in text.splitlines() if line.startswith(".B ")] == ["0", "1", "75", "78"]


def test_every_setting_is_in_both_pages_of_the_daemon() -> None:
    daemon, file = plain(FOLDER / "kvstored.8"), plain(FOLDER / "kvstored.toml.5")
    for setting in SETTINGS:
        section, key = setting.toml.split(".")
        assert setting.flag in daemon, "run make man"
        assert setting.env in daemon
        assert f".SH [{section}]" in file
        assert f".B {key}\n" in file, "run make man"
    assert all(f".B {name}\n" in file for name in (*QUOTA_KEYS, "uids", "trusting"))


def test_defaults_are_told_only_where_they_are_the_same_everywhere() -> None:
    text = " ".join(plain(FOLDER / "kvstored.toml.5").split())
    assert "Default: by the host" in text.split(".B size", 1)[1].split(".TP", 1)[0]
    assert "Default: 30s." in text.split(".B ticket_ttl", 1)[1].split(".TP", 1)[0]
    assert "Default: $STATE_DIRECTORY, which systemd sets" in text.split(".B state_dir", 1)[1].split(".TP", 1)[0]
    assert "Default: .." not in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff here")
def test_pages_are_read_without_a_complaint(tmp_path: Path) -> None:
    pages = sorted(map(str, FOLDER.glob("*.[158]")))
    assert complaints(*pages) == ""
    broken = tmp_path / "broken.1"
    broken.write_text(".TH X 1\n.SH NAME\nx \\- y\n.nosuchmacro z\n")
    assert "nosuchmacro" in complaints(str(broken))


def complaints(*pages: str) -> str:
    """Whatever groff has to say of them, with all its warnings."""
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8", "-Kutf8", *pages], capture_output=True, text=True, check=False
    )
    return done.stderr


def test_pages_are_made_anew_and_those_of_commands_that_are_gone_go(tmp_path: Path) -> None:
    (tmp_path / "kvctl-gone.1").write_text("x")
    written = generator().write(tmp_path)
    assert {page.name for page in written} == {page.name for page in tmp_path.iterdir()}
    assert not (tmp_path / "kvctl-gone.1").exists()


@pytest.mark.parametrize(("text", "roff"), [(".TH", "\\&.TH"), ("a-b", "a\\-b"), ("it's", "it\\(aqs"), ("\\n", "\\en")])
def test_what_roff_would_take_for_its_own_is_escaped(text: str, roff: str) -> None:
    assert generator().said(text) == roff
