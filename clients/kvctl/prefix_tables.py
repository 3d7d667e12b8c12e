"""How `kvctl ls`, `tree` and `stat` show blocks: in 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvctl.amounts import counted
from kvctl.client import printable
from kvctl.render import DIGEST_DIGITS, _table, count, size, span
from kvproto import control_pb2 as pb

__all__ = ["block_columns", "block_heading", "block_line", "prefixes", "stat", "tree"]

KEY_DIGITS: Final = 12  # shown of a key in a table, and enough to name it by (`key_names.py`)
GUIDES: Final = 6  # levels of a tree that are drawn; what is deeper says how deep it is
BLOCK_COLUMNS: Final = {"key": 64, "state": -10, "tiers": -9, "used": 9, "hits": 4, "pins": 4, "holds": 5}
BLOCK_LEAST: Final = ("holds", "hits", "pins", "used", "tiers")  # left out first where a terminal is narrow
HITS_MOST: Final = 30  # that a row remembers


# -- prefixes ---------------------------------------------------------------------------------------------------


def prefixes(report: pb.GetTreeResponse) -> RenderableType:
    """`kvctl ls NAMESPACE`: the beginnings, a line each."""
    table = _runs_table("prefix")
    for node in report.nodes:
        _add_run(table, Text(_key(node.first_key)), node)
    _add_rest(table, "", report.roots - len(report.nodes), report.blocks - sum(one.blocks for one in report.nodes))
    return Group(_heading(report), table, *_changed(report))


def tree(report: pb.GetTreeResponse, model: str = "") -> RenderableType:
    """`kvctl tree`: each run below the one that it continues. `model`: its namespace's."""
    table = _runs_table("prefix")
    nodes = list(report.nodes)
    base = nodes[0].level if nodes else 0
    for at, node in enumerate(nodes):
        _add_run(table, Text(f"{_guide(nodes, at, node.level - base)}{_key(node.first_key)}"), node)
        for ended in _ended(nodes, at):
            branches, blocks = _unlisted(nodes, ended)
            _add_rest(table, _guide(nodes, at, nodes[ended].level - base + 1), branches, blocks)
    top = [one for one in nodes if one.level == base]
    _add_rest(table, "", report.roots - len(top), report.blocks - sum(one.blocks for one in top))
    return Group(_heading(report, model), table, *_changed(report))


def _guide(nodes: Sequence[pb.TreeNode], at: int, level: int) -> str:
    """What stands before a key that is so far from the top."""
    if not level:
        return ""
    if level > GUIDES:
        return f"{'|' * (GUIDES - 4)} {level}: "
    return "".join("|" if _goes_on(nodes, at, above) else " " for above in range(1, level)) + "+ "


def _heading(report: pb.GetTreeResponse, model: str = "") -> Text:
    text = f"namespace {report.digest[:DIGEST_DIGITS]} of {printable(report.tenant)}: "
    text += f"{counted(report.blocks, 'block')} of {counted(report.block_tokens, 'token')}, {size(report.bytes)}"
    text += f"\nmodel {printable(model)}" if model else ""
    return Text(f"{text}\nbeginnings: {report.roots:,}, runs: {report.runs:,}\n")


def _changed(report: pb.GetTreeResponse) -> list[Text]:
    text = f"{report.changed_blocks:,} blocks came or went meanwhile, and are not counted"
    return [Text(text, style="yellow")] if report.changed_blocks else []


def _runs_table(heading: str) -> Table:
    return _table(
        heading, ">run", ">blocks", ">size", ">dram", ">disk", ">hits", ">used", ">pinned",
        least=("pinned", "dram", "disk", "hits", "run", "size"),
    )  # fmt: skip


def _add_run(table: Table, name: Text, node: pb.TreeNode) -> None:
    pinned = count(node.pinned_blocks) if node.pinned_blocks else "-"
    table.add_row(
        name, count(node.run_blocks), count(node.blocks), size(node.total_bytes), _of(node.dram_blocks, node.blocks),
        _of(node.disk_blocks, node.blocks), count(node.hits), _ago(node.age_s), pinned,
    )  # fmt: skip


def _add_rest(table: Table, guide: str, branches: int, blocks: int) -> None:
    if branches > 0:
        table.add_row(Text(f"{guide}{count(branches)} more", style="dim"), "", count(blocks), *[""] * 6)


def _goes_on(nodes: Sequence[pb.TreeNode], at: int, level: int) -> bool:
    """Does another branch of this level (from the top) follow below the same one, listed or summed up?"""
    level += nodes[0].level
    for later in nodes[at + 1 :]:
        if later.level < level:
            break
        if later.level == level:
            return True
    above = next(i for i in range(at, -1, -1) if nodes[i].level == level - 1)
    return nodes[at].level >= level and _unlisted(nodes, above)[0] > 0


def _ended(nodes: Sequence[pb.TreeNode], at: int) -> Iterator[int]:
    """Those of which nothing more is listed after `at`, the deepest first."""
    following = nodes[at + 1].level if at + 1 < len(nodes) else nodes[0].level
    deepest = nodes[at].level
    for level in range(deepest, following - 1, -1):
        yield next(i for i in range(at, -1, -1) if nodes[i].level == level)


def _unlisted(nodes: Sequence[pb.TreeNode], at: int) -> tuple[int, int]:
    """Branches of a run that are not listed, and how many blocks they have."""
    node, below = nodes[at], []
    for later in nodes[at + 1 :]:
        if later.level <= node.level:
            break
        if later.level == node.level + 1:
            below.append(later)
    return node.branches - len(below), node.blocks - node.run_blocks - sum(one.blocks for one in below)


# -- one prefix -------------------------------------------------------------------------------------------------


def stat(report: pb.StatPrefixResponse, below: pb.TreeNode | None, names: Mapping[int, str]) -> RenderableType:
    """`kvctl stat`, with a line for each stretch of like blocks. `names`: of sessions."""
    asked, found, tokens = len(report.blocks), report.found_blocks, report.block_tokens
    there = f"{found:,} of {asked:,} blocks are there ({found * tokens:,} of {asked * tokens:,} tokens)"
    near = f"{report.hbm_blocks:,} on a GPU, " if report.hbm_blocks else ""
    where = f"{near}{report.dram_blocks:,} in DRAM, {report.disk_blocks:,} on disk; quality {printable(report.quality)}"
    lines = [
        f"namespace {report.digest[:DIGEST_DIGITS]} of {printable(report.tenant)}",
        f"{there}, {size(report.bytes)}: {where}",
    ]
    if below is not None:
        lines.append(_continued(below))
    lines.append(_kept("pinned by", [_pin(one) for one in report.pins], report.pins_total, "no pin covers it"))
    leases = [f"{_client(one, names)}, {one.blocks:,} blocks, {span(one.left_s)} left" for one in report.leases]
    lines.append(_kept("leased by", leases, report.leases_total, "no lease ends in it"))
    parts: list[RenderableType] = [Text(line) for line in lines]
    return Group(*parts, Text(), _stretches(report.blocks))


def _continued(below: pb.TreeNode) -> str:
    more = below.blocks - 1
    if not more:
        return "nothing continues it"
    held = f", {below.held_blocks:,} of them held by leases, pins, reads or writes" if below.held_blocks else ""
    alone = below.run_blocks - 1
    runs = "in one run" if alone == more else f"{alone:,} of them before it branches into {below.branches:,}"
    runs = runs if alone else f"in {below.branches:,} branches"
    return f"{more:,} blocks continue it, {runs}{held}; used {_ago(below.age_s)} ago, {below.hits:,} hits"


def _pin(one: pb.KeptBy) -> str:
    return f"pin {one.number} ({printable(one.owner) or 'a client'}), {one.blocks:,} blocks, {span(one.left_s)} left"


def _client(one: pb.KeptBy, names: Mapping[int, str]) -> str:
    name = names.get(one.number)
    return f"client {one.number} ({printable(name)})" if name else f"client {one.number} (gone)"


def _kept(what: str, keepers: Sequence[str], total: int, nobody: str) -> str:
    if not keepers:
        return nobody
    more = f"; and {total - len(keepers):,} more" if total > len(keepers) else ""
    return f"{what} " + "; ".join(keepers) + more


def _stretches(blocks: Sequence[pb.Block]) -> Table:
    """Like blocks in one line."""
    table = _table(
        ">blocks", "first key", "state", "tiers", ">used", ">hits", ">pins", ">holds",
        least=("holds", "hits", "pins", "used"),
    )  # fmt: skip
    at = 0
    for _, group in groupby(blocks, key=lambda one: (one.state, _tiers(one), one.pins, bool(one.holds))):
        stretch = list(group)
        first, last = at, at + len(stretch) - 1
        at += len(stretch)
        where = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        hits = max(one.hits for one in stretch)
        used = _ago(min(one.age_s for one in stretch)) if stretch[0].state != "absent" else "-"
        table.add_row(
            where, _key(stretch[0].key), printable(stretch[0].state), _tiers(stretch[0]), used, f"{hits}",
            f"{stretch[0].pins:,}", f"{sum(one.holds for one in stretch):,}",
        )  # fmt: skip
    return table


def block_columns(width: int | None) -> dict[str, int]:
    """Columns of a list of blocks with their widths, those of words negative: as many as a terminal has room for.

    Without a terminal (None) all are there, with whole keys: made for `grep`.
    """
    columns = dict(BLOCK_COLUMNS)
    if width is not None and _needed(columns) > width:
        columns["key"] = KEY_DIGITS
        for name in BLOCK_LEAST:
            if _needed(columns) > width:
                del columns[name]
    return columns


def _needed(columns: Mapping[str, int]) -> int:
    return sum(map(abs, columns.values())) + len(columns) - 1


def block_heading(columns: Mapping[str, int]) -> str:
    """Names of columns."""
    return _in_columns({name: name for name in columns}, columns)


def block_line(one: pb.Block, columns: Mapping[str, int]) -> str:
    """A block."""
    said = {
        "key": one.key.hex()[: columns["key"]],
        "state": printable(one.state),
        "tiers": _tiers(one),
        "used": "-" if one.state == "absent" else _ago(one.age_s),
        "hits": str(one.hits),
        "pins": str(one.pins),
        "holds": str(one.holds),
    }
    return _in_columns(said, columns)


def _in_columns(said: Mapping[str, str], columns: Mapping[str, int]) -> str:
    words = (
        said[name].ljust(abs(width)) if width < 0 or name == "key" else said[name].rjust(width)
        for name, width in columns.items()
    )
    return " ".join(words).rstrip()


def _tiers(one: pb.Block) -> str:
    there = (("hbm", one.in_hbm), ("dram", one.in_dram), ("disk", one.on_disk))
    return "+".join(name for name, is_there in there if is_there) or "-"


def _key(key: bytes) -> str:
    return key.hex()[:KEY_DIGITS] or "(changed)"


def _of(part: int, whole: int) -> str:
    return "-" if not part or not whole else f"{max(1, 100 * part // whole)}%"


def _ago(seconds: float) -> str:
    """In one unit: `12 s`, `3 min`."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"
