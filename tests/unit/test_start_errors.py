"""What `kvstored` says where it cannot start: what is wrong, and what to do about it; never an errno alone."""

import os
from pathlib import Path

import pytest

from kvstored import cli


def started(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Of a start that fails: the exit code, and what it said."""
    code = cli.main(["--dram", "64MiB", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_made_is_named_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    said = started(capsys, "--runtime-dir", f"{tmp_path}/x")
    tmp_path.chmod(0o700)
    sentence = f"kvstored: the runtime directory {tmp_path}/x cannot be made: permission denied"
    assert said == (78, f"{sentence}; name another one with --runtime-dir\n")


def test_one_that_cannot_be_there_is_named_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = "the runtime directory /proc/kv cannot be made: no such file or directory"
    assert started(capsys, "--runtime-dir", "/proc/kv") == (
        78,
        f"kvstored: {why}; name another one with --runtime-dir\n",
    )
    file = tmp_path / "file"
    file.touch()
    code, said = started(capsys, "--runtime-dir", str(file))
    assert (code, "cannot be used: file exists; name another one with --runtime-dir" in said) == (78, True)


def test_a_disk_directory_is_told_from_the_runtime_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = ("--disk", "/proc/kv", "--disk-size", "64MiB")
    code, said = started(capsys, "--runtime-dir", str(tmp_path / "run"), *disk)
    assert code == 78
    assert said.endswith("the disk directory /proc/kv cannot be made: no such file or directory; "
                         "name another one with --disk\n")  # fmt: skip


def test_a_directory_of_somebody_else_is_a_matter_of_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.geteuid()
    if uid == 0:
        os.chown(tmp_path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    code, said = started(capsys, "--runtime-dir", str(tmp_path))
    assert (code, said.startswith(f"kvstored: the runtime directory {tmp_path} cannot be used: belongs to uid")) == (
        78,
        True,
    )
    assert said.endswith("; name another one with --runtime-dir\n")


def test_a_file_of_configuration_that_is_not_there_is_no_matter_of_its_first_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = started(capsys, "--config", str(tmp_path / "gone.toml"))
    assert said == (78, f"kvstored: {tmp_path}/gone.toml cannot be read: No such file or directory\n")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--dramm", "unknown flag --dramm; did you mean --dram?"),
        ("--dramm=1GiB", "unknown flag --dramm; did you mean --dram?"),
        ("--xyzzy", "unknown flag --xyzzy; kvstored --help has all flags"),
        ("serve", "unknown word serve; kvstored --help has all flags"),
    ],
)
def test_an_unknown_flag_is_a_sentence_with_a_guess(
    word: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(capsys, word) == (2, f"kvstored: {sentence}\n")


def test_a_flag_without_its_value_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--runtime-dir"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "kvstored: argument --runtime-dir: expected one argument; kvstored --help has all flags\n"
    )
