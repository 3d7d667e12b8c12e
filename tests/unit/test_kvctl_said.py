"""What kvctl says on a terminal: each thing once, in words, with the numbers that somebody looks for."""

from pathlib import Path

from rich.console import Console, RenderableType

from kvctl import prefix_tables, render
from kvctl.amounts import counted
from kvctl.doctor_facts import Check, Verdict
from kvproto import control_pb2 as pb
from tests.kvctl_line import Run
from tests.unit.test_kvctl import bare_environment, kvctl  # noqa: F401  fixtures


def shown(what: RenderableType, width: int = 80) -> str:
    """As on a terminal so wide."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_one_of_a_thing_is_not_several() -> None:
    assert [counted(number, "pin") for number in (0, 1, 2000)] == ["0 pins", "1 pin", "2,000 pins"]
    assert counted(2, "prefetch", "prefetches") == "2 prefetches"


def test_no_client_is_a_sentence_and_no_bare_heading() -> None:
    assert shown(render.clients([])) == "no client is connected\n"


def test_what_several_checks_want_done_is_said_once() -> None:
    checks = [Check(name, Verdict.WARN, "stale", "start kvstored") for name in ("hot.sock", "control.sock")]
    text = shown(render.checks([*checks, Check("keep", Verdict.WARN, "none", "another one")]))
    assert text.count("start kvstored") == 1
    assert "another one" in text


def test_hashes_in_a_namespace_are_cut_where_people_read_them() -> None:
    one = pb.Namespace(
        digest="ab" * 32, tenant="t", model=f"Llama {'12' * 32}", engine="transformers 5.0", dtype="bfloat16",
        layout=f"layer,kv {'cd' * 32}", revision="34" * 32, tp_size=1, pp_size=1,
    )  # fmt: skip
    text = shown(render.namespaces([one]))
    assert "Llama 12121212~" in text
    assert "revision 34343434~ adapter -" in text
    assert len(text.splitlines()) <= 6, "two of them headings"


def test_every_command_has_a_summary_that_is_not_cut(kvctl: Run) -> None:  # noqa: F811
    listed = kvctl("--help").out.partition("Commands:")[2].partition("Exit codes")[0]
    assert not [line for line in listed.splitlines() if line.endswith("...")]


def test_a_value_that_is_not_one_of_a_few_is_told_plainly(kvctl: Run) -> None:  # noqa: F811
    answer = kvctl("pin", "--ttl", "2h", "abcdef")
    assert answer.code == 2
    assert "'2h' is not one of '5m', '1h'" in answer.err
    assert "Value error" not in answer.err


def test_a_check_that_never_looked_prints_no_empty_line(kvctl: Run, tmp_path: Path) -> None:  # noqa: F811
    answer = kvctl("check", str(tmp_path / "nothing"))
    assert answer.code
    assert answer.out == ""


def test_trees_name_their_models_and_stand_apart() -> None:
    report = pb.GetTreeResponse(digest="ab" * 32, tenant="t", block_tokens=16, blocks=1, roots=1, runs=1)
    text = shown(prefix_tables.tree(report, "Llama"))
    assert "1 block of 16 tokens" in text
    assert "\nmodel Llama\n" in text
