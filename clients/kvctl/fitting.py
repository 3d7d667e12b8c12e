"""Tables that lose columns where a terminal is too narrow for them, those first that are told to be least useful.

Where there is no terminal everything stays: what reads it can cope.
"""

from copy import copy
from dataclasses import replace
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

__all__ = ["Fitting", "width_of"]

_WIDE: Final = 10_000  # letters, more than any line of ours has


def width_of(console: Console) -> int | None:
    """Columns of the terminal; None: there is none."""
    return console.width if console.is_terminal else None


class Fitting(Table):
    """A table whose columns with headings in `least` may be left out, the first ones first."""

    least: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        fitted = self.fitted(console, options) if console.is_terminal else self
        yield from Table.__rich_console__(fitted, console, options)

    def fitted(self, console: Console, options: ConsoleOptions) -> "Fitting":
        """As much of it as is `options.max_width` wide."""
        table = self
        for heading in self.least:
            if Measurement.get(console, options.update(max_width=_WIDE), table).maximum <= options.max_width:
                break
            kept = [column for column in table.columns if column.header != heading]
            table = copy(table)
            table.columns = [replace(column, _index=at) for at, column in enumerate(kept)]
        return table
