"""Tables on narrow terminals: the least useful columns are left out, keys are short, and pipes get everything."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from kvctl import prefix_tables, render, top
from kvctl.events import tell
from kvctl.fitting import width_of
from kvproto import control_pb2 as pb

KEY = bytes(range(32))
BLOCK = pb.Block(key=KEY, state="resident", in_dram=True, on_disk=True, age_s=90, hits=3, pins=1, holds=2)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=False)


def shown(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("width", [24, 40, 60, 79, 80, 110, 111, 200])
def test_a_list_of_blocks_is_as_wide_as_the_terminal_at_most(width: int) -> None:
    columns = prefix_tables.block_columns(width)
    lines = [prefix_tables.block_heading(columns), prefix_tables.block_line(BLOCK, columns)]
    assert max(map(len, lines)) <= width
    assert lines[1].startswith(KEY.hex()[:12])
    assert (KEY.hex() in lines[1]) == (width >= 111)
    assert "resident" in lines[1]
    assert ("2 min" in lines[1]) == (width >= 60)


def test_whoever_reads_a_list_of_blocks_through_a_pipe_gets_whole_keys_and_all_columns() -> None:
    columns = prefix_tables.block_columns(width_of(Console(file=io.StringIO(), width=40)))
    assert prefix_tables.block_heading(columns).split() == ["key", "state", "tiers", "used", "hits", "pins", "holds"]
    line = prefix_tables.block_line(BLOCK, columns)
    assert line.split() == [KEY.hex(), "resident", "dram+disk", "2", "min", "3", "1", "2"]


def table() -> Table:
    made = render._table("name", ">first", ">second", ">third", least=("second", "first"))
    made.add_row("a" * 10, "1.0 MiB", "2.0 MiB", "3.0 MiB")
    return made


@pytest.mark.parametrize(
    ("width", "columns"), [(80, "name first second third"), (35, "name first third"), (20, "name third")]
)
def test_columns_are_left_out_in_their_order(width: int, columns: str) -> None:
    console = terminal(width)
    console.print(table())
    lines = shown(console).splitlines()
    assert lines[0].split() == columns.split()
    assert "3.0 MiB" in lines[1]
    assert max(len(line.rstrip()) for line in lines) <= width


def test_without_a_terminal_no_column_is_left_out() -> None:
    console = Console(file=io.StringIO(), width=20)
    console.print(table())
    assert {"fir", "sec", "thi"} <= set(re.findall("fir|sec|thi", shown(console)))


@pytest.mark.parametrize("width", [50, 60, 80])
def test_top_has_whole_numbers_on_a_narrow_terminal(width: int) -> None:
    tier = top.TierFigures("dram", 48 << 30, 64 << 30, 123_456, 1.23e9, 2.34e9)
    tenant = top.TenantFigures("research-and-more", 5 << 30, 1 << 30, 99, 12, 1.5e9, 3.0, 0.25)
    one = top.ClientFigures(7, "engine-with-a-name", "research", 123_456, 999.0, 3, 4, 1, 4)
    figures = top.Figures(
        at_unix_s=1.7e9, interval_s=2.0, version="0.1.0", uptime_s=9.0, draining=False, warnings=(), asked_per_s=0.0,
        hit_share=None, hit_share_in_all=None, stored_per_s=0.0, evicted_per_s=0.0, refused_per_s=0.0, faults_per_s=0.0,
        saved_s_per_s=0.0, saved_s=0.0, clients_total=1, namespaces=1, tiers=(tier, replace(tier, name="disk")),
        tenants=(tenant,), clients=(one,),
    )  # fmt: skip
    console = terminal(width)
    console.print(top.page(figures))
    text = shown(console)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for figure in ("48.0 GiB", "1.23 GB/s", "2.34 GB/s", "1.50 GB/s", "5.0 GiB", "999/s"):
        assert figure in text
    assert "\u2026" not in text, "nothing is cut off"


@pytest.mark.parametrize("width", [40, 71, 72, 100])
def test_an_event_goes_on_below_itself(width: int) -> None:
    event = pb.Event(number=12, unix_s=1.7e9, kind="admin", tenant="chat", text="kvctl quota set " + "word " * 30)
    console = terminal(width)
    tell(event, console)
    lines = shown(console).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1].startswith(" " * 17)
    assert lines[0].lstrip().startswith("12 ") == (width >= 72)
    piped = Console(file=io.StringIO(), width=width)
    tell(event, piped)
    assert len(shown(piped).splitlines()) == 1, "one line an event for grep"
