"""Figures that README shows are those of the committed records that it links to, rounded as it says them.

`python -m tests.unit.test_readme_figures` writes them anew.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

# How a row begins, its record, and what its second column says of it.
ROWS = (
    ("find, hold and give back", "hot", "{lease_100_over_ping_us:.0f} us"),
    ("... the round trip itself", "hot", "{ping_p50_us:.0f} us; {ping_p99_us:.0f}, {lease_p99_loaded_us:.0f} us"),
    ("ask for 100 blocks that are not there", "hot", "{match_absent_over_ping_us:.0f} us"),
    ("memory a block", "hot", "{bytes_per_block:.0f} bytes"),
    ("fetch blocks of 2 MiB / 64 KiB", "dram", "{fetch_2mib_over_memcpy:.2f} / {fetch_64kib_over_memcpy:.2f}"),
    ("the first fetch of a fresh process", "dram", "{first_fetch_over_memcpy:.2f}"),
    ("store until accepted", "dram", "{store_accept_over_memcpy:.2f} / {store_sustained_over_memcpy:.2f}"),
    ("fetch 100 blocks of 2 MiB from disk", "disk", "{cold_fetch_over_raw_read:.2f}; {first_chunk_fraction:.2f}"),
    (
        "write behind, durable", "disk",
        "{write_behind_over_raw_write:.2f}; {store_slowdown:.2f}; {stream_slowdown:.2f}",
    ),
    ("from `exec` after `kill -9`", "restart", "{ready_p50_s:.1f} / {ready_p99_s:.1f} s"),
    ("... to a hit in 4 GiB of kept memory", "restart", "{warm_serving_s:.1f} s; {warm_kill_kept:.2f}"),
    (
        "requests that pause for tools", "swap",
        (
            "{paced_preserve_latency_ms_per_token:.1f}, {paced_swap_latency_ms_per_token:.1f}, "
            "{paced_discard_latency_ms_per_token:.1f}, {paced_adaptive_latency_ms_per_token:.1f}; "
            "{memory_preserve_latency_ms_per_token:.1f}, {memory_swap_latency_ms_per_token:.1f}, "
            "{memory_discard_latency_ms_per_token:.1f}, {memory_adaptive_latency_ms_per_token:.1f}"
        ),
    ),
    ("64 clients of 8 tenants", "load", "{wrong}, {hangs}, {leaks}; {fetch_p99_ms:.0f}, {store_p99_ms:.0f} ms"),
    ("vLLM, prompt of 3,000 tokens", "vllm", "{ttft_over_native:.2f} / {ttft_over_recompute:.2f}"),
    ("... what storing costs a request", "vllm", "{miss_overhead_share:.1%}; {lookup_over_ping_p99_us:.0f} us"),
)  # fmt: skip


def rows() -> list[list[str]]:
    """Cells of the table under "How fast"."""
    table = README.read_text().split("## How fast", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def record_of(name: str) -> Mapping[str, float]:
    """Figures, and those in microseconds in milliseconds, too."""
    results = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["results"]
    milliseconds = {key.replace("_us", "_ms"): value / 1e3 for key, value in results.items() if key.endswith("_us")}
    return {**results, **milliseconds}


def shown(text: str) -> str:
    """As a table has it."""
    return text.replace("%", " %")


@pytest.mark.parametrize(("begins", "name", "text"), ROWS)
def test_a_row_says_what_its_record_says(begins: str, name: str, text: str) -> None:
    (found,) = (cells for cells in rows() if cells[0].startswith(begins))
    assert f"(bench/results/{name}.json)" in found[2]
    assert found[1] == shown(text.format(**record_of(name)))


def test_no_row_is_without_its_record() -> None:
    without = [cells[0] for cells in rows() if not any(cells[0].startswith(begins) for begins, _, _ in ROWS)]
    assert not without
    assert len(rows()) == len(ROWS)


def rewrite() -> None:
    """Have README say what the records say."""
    text = README.read_text()
    for begins, name, wanted in ROWS:
        (found,) = (cells for cells in rows() if cells[0].startswith(begins))
        text = text.replace(f"{found[0]} | {found[1]} |", f"{found[0]} | {shown(wanted.format(**record_of(name)))} |")
    README.write_text(text)


if __name__ == "__main__":
    rewrite()
