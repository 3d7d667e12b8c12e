"""What the long forms did, and how long they took, as a record beside those of the benchmarks.

They take more than an hour, so a record may be made in parts (`pytest -m long tests/sim --figures FILE`): a run
replaces what it has run again and leaves the rest, and `made` says of every test when and of which commit it was.
"""

import fcntl
import json
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from bench.harness import record

Recorder = Callable[[str, float], None]  # the fixture `record_property`, in a long test


class Figures:
    """Collects every long test that ran, with what it recorded by `record_property`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._results: dict[str, float | str | None] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """After each phase of a test: note the one in which it ran."""
        report = yield
        if report.when == "call" and item.get_closest_marker("long"):
            self._results[f"{item.name}_passed"] = int(report.passed)
            self._results[f"{item.name}_s"] = report.duration
            for name, value in report.user_properties:
                assert isinstance(value, int | float), f"{name} is no figure"
                self._results[f"{item.name}_{name}"] = value
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the record, over what this run has done anew."""
        if not self._results:
            return
        with self._file.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another part may end at the same time
            file.seek(0)
            before = json.loads(file.read() or '{"results": {}, "made": {}}')
            made = json.loads(record("test_long", self._results, quick=False))
            tests = [name.removesuffix("_passed") for name in self._results if name.endswith("_passed")]
            again = tuple(f"{test}_" for test in tests)
            kept = {name: value for name, value in before["results"].items() if not name.startswith(again)}
            made["results"] = dict(sorted((kept | made["results"]).items()))
            when = f"{made['time']} {made['commit']}"
            made["made"] = dict(sorted((before["made"] | dict.fromkeys(tests, when)).items()))
            file.truncate(0)
            file.write(json.dumps(made, indent=1) + "\n")
