"""Command lines of kvctl in this process, run as the console script does."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest

from kvctl import cli


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run: TypeAlias = Callable[..., Result]


class Terminal(io.StringIO):
    """A person who types this much and then leaves."""

    def isatty(self) -> bool:
        return True


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> Run:
    """Runs what it is given behind the words `first`, with nobody at a terminal unless `typed` is given."""

    def run(*words: str, typed: str | None = None) -> Result:
        monkeypatch.setattr(sys, "argv", ["kvctl", *first, *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO() if typed is None else Terminal(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Result(int(ended.value.code or 0), said.out, said.err)

    return run
