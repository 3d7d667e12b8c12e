"""`--figures FILE`: see figures.py."""

from pathlib import Path

import pytest

from tests.figures import Figures


def pytest_addoption(parser: pytest.Parser) -> None:
    """Called by pytest."""
    parser.addoption("--figures", type=Path, metavar="FILE", help="write what the long tests did there")


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    file = config.getoption("--figures")
    if file is not None:
        config.pluginmanager.register(Figures(file), "figures")
