"""What warming up promises: nothing is compiled once the daemon serves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kvstore

# In a process of its own: other tests call the same functions with types of theirs.
COUNT = """
import json, sys
from kvstore import blocks
from kvstored.warmup import warm_up

warm_up()
print(json.dumps({name: len(getattr(blocks, name).signatures) for name in sys.argv[1:]}))
"""


def test_warming_up_compiles_everything_that_the_store_calls() -> None:
    paths = Path(kvstore.__file__).parent.rglob("*.py")
    sources = [path.read_text() for path in paths if not path.name.startswith("audit")]  # which only tests call
    called = {name for source in sources for name in re.findall(r"blocks\.([a-z_]+)\(", source)}
    assert len(called) > 12
    for _ in range(2):  # while they are compiled, functions that call others compile these for types of their own
        done = subprocess.run([sys.executable, "-c", COUNT, *called], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert set(compiled.values()) == {1}, compiled


LATER = """
import sys
from kvstored import warmup

done = []
warmup.first = lambda *, disk: (lambda: done.append(disk))
timer = warmup.first_and_rest_later(disk=True)
at_once = list(done)
timer.function()
print(at_once, done)
"""


def test_the_rest_waits_only_where_all_is_compiled(tmp_path: Path) -> None:
    """Stopped in its first start, a daemon has compiled a part: the next one must not compile while it serves."""
    said = []
    for _ in range(2):
        environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True, env=environ)
        said.append(done.stdout.strip())
    assert said == ["[True] [True]", "[] [True]"]


def test_what_an_installation_compiled_is_known_to_the_first_start(tmp_path: Path) -> None:
    environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    installed = LATER.replace("timer = ", "warmup.warm_up(); done.clear(); timer = ")
    done = subprocess.run([sys.executable, "-c", installed], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.strip() == "[] [True]"
