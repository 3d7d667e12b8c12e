"""Which earlier version the skew tests take: of clones of a small history, whole and shallow, with tags and without."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.skew import previous
from tests.skew.previous import earlier, last_release


def git(root: Path, *arguments: str) -> str:
    """A command there; what it says."""
    who = {f"GIT_{role}_{part}": "a" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    alone = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], env=os.environ | who | alone, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Six commits, of which the one on a side and the last are tagged later than 0.10.0."""
    root = tmp_path / "history"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    for tag in ("0.1.0", "v0.2.0", "v0.10.0", "v0.10.0-rc1", "", "v0.11.0"):
        git(root, "commit", "-q", "--allow-empty", "-m", tag or "-")
        if tag:
            git(root, "tag", tag)
    git(root, "tag", "not-a-release")
    git(root, "checkout", "-q", "-b", "side", "HEAD~3")
    git(root, "commit", "-q", "--allow-empty", "-m", "side")
    git(root, "tag", "v9.0.0")
    git(root, "checkout", "-q", "main")
    return root


def test_it_is_the_newest_release_on_the_way_here_and_not_this_very_commit(history: Path) -> None:
    assert last_release(history) == "v0.10.0"
    git(history, "commit", "-q", "--allow-empty", "-m", "on")
    assert last_release(history) == "v0.11.0", "the control: now that is an earlier one"
    git(history, "checkout", "-q", "v0.2.0")
    assert last_release(history) == "0.1.0", "with a v or without"
    git(history, "checkout", "-q", "0.1.0")
    assert not last_release(history), "there was none before"


def test_without_tags_the_pinned_commit_is_all_and_in_a_shallow_clone_it_is_said_why_not(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = git(history, "rev-parse", "v0.2.0")
    monkeypatch.setattr(previous, "WIRE_3", pinned)
    found = earlier(history)
    assert {name: version.commit for name, version in found.items()} == {
        "wire-3": pinned, "v0.10.0": git(history, "rev-parse", "v0.10.0"),
    }  # fmt: skip
    for name, tags in (("bare-of-tags", "--no-tags"), ("tags", "--tags")):
        shallow = tmp_path / name
        git(tmp_path, "clone", "-q", "--depth", "1", "--no-tags", history.as_uri(), str(shallow))
        git(shallow, "fetch", "-q", "--depth", "1", tags, "origin", *(["v0.10.0"] if tags == "--no-tags" else []))
        found = earlier(shallow)
        if name == "tags":
            assert found["v9.0.0"].commit, "which of them lie on the way is not known there"
            assert found["wire-3"].commit, "a tag has brought it"
        else:
            assert found.keys() == {"wire-3"}
            assert not found["wire-3"].commit
            assert "is not in this clone; fetch the whole history" in found["wire-3"].why_not


def test_where_there_is_no_history_at_all_it_is_said_so(tmp_path: Path) -> None:
    (version,) = earlier(tmp_path).values()
    assert not version.commit
    assert "fetch the whole history" in version.why_not
