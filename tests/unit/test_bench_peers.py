"""A peer that cannot be installed or does not run has no figures, and says why; the others have theirs."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import peers
from bench.harness import Findings

SAYS = "import sys\nfor line in sys.stdin:\n    print('seconds', 0.25 if line == 'read\\n' else 0.5, flush=True)\n"


@pytest.fixture
def stack() -> ExitStack:
    return ExitStack()


def installed(folder: Path) -> tuple[Path, dict[str, str]]:
    folder.mkdir(parents=True)
    return Path(sys.executable), {}


def not_to_be_had(folder: Path) -> tuple[Path, dict[str, str]]:
    folder.mkdir(parents=True)
    peers.call([sys.executable, "-c", "import sys; sys.exit('no such distribution')"], folder)
    raise AssertionError("it ended well")


def test_who_cannot_be_installed_is_reported_and_nobody_else_is_lost(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "peer_runs.py").write_text(SAYS)
    (tmp_path / "bench" / "peer_fails.py").write_text("raise SystemExit('it wants another processor')")
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    findings: Findings = {}
    seconds: dict[str, list[float]] = {}
    with stack:
        begun = peers.begin(
            {"absent": not_to_be_had, "fails": installed, "runs": installed}, tmp_path / "home", stack, findings
        )
        assert set(begun) == {"fails", "runs"}
        for _ in range(2):
            peers.take(
                {f"{name}_{verb}": peer.turn(verb) for name, peer in begun.items() for verb in peers.VERBS},
                seconds, findings,
            )  # fmt: skip
    assert seconds == {"runs_write": [0.5, 0.5], "runs_read": [0.25, 0.25]}
    assert "no such distribution" in str(findings["absent_why_not"])
    assert "it wants another processor" in str(findings["fails_why_not"])
    assert {findings[f"{who}_{verb}_gb_per_s"] for who in ("absent", "fails") for verb in peers.VERBS} == {None}
    assert not any(name.startswith("runs") for name in findings)
