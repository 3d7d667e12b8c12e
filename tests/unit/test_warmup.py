"""What warming up promises: nothing is compiled once the daemon serves."""

import re
from pathlib import Path

import kvstore
from kvstore import blocks
from kvstored.warmup import warm_up


def test_warming_up_compiles_everything_that_the_store_calls() -> None:
    warm_up()
    sources = [path.read_text() for path in Path(kvstore.__file__).parent.rglob("*.py") if path.name != "audit.py"]
    called = {name for source in sources for name in re.findall(r"blocks\.([a-z_]+)\(", source)}
    assert len(called) > 12
    compiled = {name: len(getattr(blocks, name).signatures) for name in called}
    assert set(compiled.values()) == {1}, compiled
