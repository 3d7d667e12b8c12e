"""What kvctl and kvstored say to who has left something out, and what a page shows that was asked for often."""

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvstored.warmup
from kvctl import quotas, render
from kvctl.cli import app, globals_first
from kvctl.client import Exit
from kvproto import control_pb2 as pb
from kvproto.limits import MIB
from kvstored import cli
from kvstored.defaults import default_words
from kvstored.settings import SETTINGS
from tests.unit.test_kvctl_hints import shown

KEY = "0123456"  # a digit too few


@pytest.mark.parametrize(
    "words",
    [
        ["stat", KEY], ["match", KEY], ["explain-miss", KEY], ["pin", KEY, "--ttl", "5m"],
        ["clear", "--namespace", KEY, "--key", KEY], ["tree", KEY, "--key", KEY],
    ],
)  # fmt: skip
def test_who_names_a_key_by_too_few_digits_is_told_how_many_it_takes(words: list[str]) -> None:
    result = CliRunner().invoke(app, globals_first(words))
    assert result.exit_code == Exit.USAGE
    assert "a key is 64 hex digits, or 8 or more of the first" in str(result.exception) + result.output


@pytest.mark.parametrize(("words", "said"), [(["7"], "whose pin 7?"), (["t"], "name pins, or say --all")])
def test_unpin_says_what_is_missing(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, globals_first(["unpin", "--yes", *words]))
    assert result.exit_code == Exit.USAGE
    assert said in str(result.exception) + result.output


@pytest.mark.parametrize(
    ("before", "after", "is_cut"), [(None, 3, True), (4, 3, True), (3, 3, False), (3, None, False)]
)
def test_fewer_in_flight_is_a_cut(before: int | None, after: int | None, is_cut: bool) -> None:
    change = pb.SetQuotaResponse(quota=pb.Quota(in_flight_max=after), former=pb.Quota(in_flight_max=before))
    change.quota.tenant = "t"
    said = quotas.cuts(change, {"t": pb.Tenant(name="t")})
    assert bool(said) == is_cut
    assert not quotas.cuts(change, {}), "nobody has come yet"


def test_status_shows_gpus_and_the_tier_on_them() -> None:
    device = pb.Device(name="cuda:0", hbm_bytes=64 * MIB, hbm_used_bytes=16 * MIB, hbm_hits=1234, loads=5)
    text = shown(render.status(pb.GetStatusResponse(devices=[device])))
    for part in ("GPU cuda:0", "5 loads", "16.0 MiB of 64.0 MiB", "1,234 blocks loaded from there"):
        assert part in text
    assert "after" not in text
    device.hbm_evicted, device.hbm_evicted_after_s, device.hbm_unpinned = 10, 700.0, 3
    assert "10 gave way after 1 min 10 s, 3 of them pinned" in shown(
        render.status(pb.GetStatusResponse(devices=[device]))
    )
    assert "its tier" not in shown(render.status(pb.GetStatusResponse(devices=[pb.Device(name="cuda:0")])))
    assert "GPU" not in shown(render.status(pb.GetStatusResponse()))


def test_help_of_the_daemon_says_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("Default: ") == len(SETTINGS)
    level = next(one for one in SETTINGS if one.toml == "daemon.log_level")
    assert default_words(level) == "Default: info."
    dram = next(one for one in SETTINGS if one.toml == "dram.size")
    assert default_words(dram) == "Default: by the host, see kvctl config."


def test_only_a_start_that_compiles_says_that_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(kvstored.warmup, "_begin", lambda: (None, None, None, None))
    monkeypatch.setattr(kvstored.warmup, "_mark", lambda: tmp_path / "mark")
    caplog.set_level(logging.INFO)
    kvstored.warmup.first(disk=False)
    assert "about a minute" in caplog.text
    caplog.clear()
    (tmp_path / "mark").touch()
    kvstored.warmup.first(disk=False)
    assert "about a minute" not in caplog.text


def test_a_start_says_once_and_at_its_end_that_compiled_code_is_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Said at half time, the other half of the first start looked like a daemon that hangs."""
    log = kvstored.warmup.log
    for part in ("_live_on", "live_with_disk"):
        monkeypatch.setattr(kvstored.warmup, part, lambda *_, part=part: log.info("%s is compiled", part))
    monkeypatch.setattr(kvstored.warmup, "_begin", lambda: (None, None, None, None))
    monkeypatch.setattr(kvstored.warmup, "_mark", lambda: tmp_path / "mark")
    caplog.set_level(logging.INFO)
    kvstored.warmup.first_and_rest_later(disk=True)
    said = [one.getMessage().partition(":")[0] for one in caplog.records]
    assert said[1:] == [
        "live_with_disk is compiled", "half of it is compiled", "_live_on is compiled", "compiled code ready",
    ]  # fmt: skip
    caplog.clear()
    kvstored.warmup.first_and_rest_later(disk=True)
    assert [one.getMessage().partition(":")[0] for one in caplog.records] == [
        "live_with_disk is compiled", "compiled code ready",
    ]  # fmt: skip
