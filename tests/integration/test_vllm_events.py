"""Events of blocks, heard by vLLM's own decoder in an environment that has it."""

import json
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kvstore.announcing import IN_DRAM, ON_DISK, Told
from kvstored.block_events import NOTHING, BlockEvents
from kvstored.block_events_address import EventsConfig, endpoints_of
from tests.unit.test_block_events import PLACE, changes, number_of, stored

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]

LISTENER: Final = Path(__file__).with_name("vllm_listener.py")


@contextmanager
def listening(python: Path, endpoint: str, count: int) -> Iterator["subprocess.Popen[str]"]:
    command = [str(python), str(LISTENER), endpoint, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("form", ["maps", "arrays"])
def test_vllm_reads_what_we_publish_and_would_have_written_the_same(python: Path, tmp_path: Path, form: str) -> None:
    dram, disk = int(IN_DRAM), int(ON_DISK)
    events = BlockEvents(
        EventsConfig("ipc", topic="kv@pod@{model}", form=form, runtime_dir=tmp_path), None, lambda: None
    )
    events.start()
    try:
        with listening(python, endpoints_of("ipc", tmp_path, "one").publish, 2) as process:
            assert process.stdout is not None
            ready: list[int] = []
            while not ready and process.poll() is None:
                events.tell(Told(stored("probe"), {0: PLACE}))
                ready, _, _ = select.select([process.stdout.fileno()], [], [], 0.05)
            if form == "arrays":  # vLLM has not read these since it writes maps
                process.stdout.readline()
                events.tell(Told(NOTHING, {}, cleared="one"))
                assert process.wait(60) != 0, "the control: what is written otherwise is not read"
                return
            assert process.stdout.readline() == "ready\n"
            events.tell(Told(NOTHING, {}, cleared="one"))
            events.tell(Told(changes(("a", 0, dram), ("b", dram, dram | disk), ("c", dram | disk, disk)), {0: PLACE}))
            events.tell(Told(NOTHING, {}, cleared="one"))
            first, second = (json.loads(process.stdout.readline()) for _ in range(2))
    finally:
        events.stop()
    assert first["topic"] == "kv@pod@org/model_7"
    assert second["number"] == first["number"] + 1
    assert first["same"]
    assert second["same"]
    kinds = [(event["type"], event.get("block_hashes"), event.get("medium")) for event in first["events"]]
    assert kinds == [
        ("BlockStored", [number_of("a")], "CPU"),
        ("BlockStored", [number_of("b")], "STORAGE"),
        ("BlockRemoved", [number_of("c")], "CPU"),
    ]
    assert [event["type"] for event in second["events"]] == ["AllBlocksCleared"]
