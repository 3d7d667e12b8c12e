"""What the long forms did, and how long they took, as a record beside those of the benchmarks."""

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
        """Write the record."""
        line = record("test_long", self._results, quick=False)
        self._file.write_text(json.dumps(json.loads(line), indent=1) + "\n")
