"""Nothing that is shipped runs bytes as code, asks a shell, or reads what somebody else wrote without a bound."""

from collections import Counter
from pathlib import Path

import pytest

from tests.unit.unsafe_calls import Finding, findings

ROOT = Path(__file__).parents[2]
ROOMS = ("proto", "kernels", "kvstore", "daemon", "clients")
FILES_LEAST = 200  # fewer: the search has gone astray

# What is there, and why it may be. A finding that is not listed fails, and so does a line here that finds nothing.
OWN_FILE = "a file of this package"
KERNEL = "a file that the kernel writes"
OPERATOR = "what the operator named or typed, in the operator's own process"
MODEL = "the engine's own model folder, which the engine has loaded as code or weights already"
BUILD = "when the project is built, from its own files"
NOT_A_FILE = "no file: a table of the daemon's own, or the kernel's of nodes, that is called read()"
ALLOWED: dict[Finding, str] = {
    Finding("clients/kvclient/integrations/sglang.py", "_identity", "read"): MODEL,
    Finding("clients/kvclient/integrations/sglang.py", "_scales", "read"): MODEL,
    Finding("clients/kvclient/integrations/model_files.py", "weights_mark", "read"): MODEL,
    Finding("clients/examples/router.py", "main", "read"): OPERATOR,
    Finding("clients/kvctl/asking.py", "ask", "read"): OPERATOR,
    Finding("clients/kvctl/bundle.py", "_log", "read"): "journalctl, which is told how many lines, and cuts them",
    Finding("clients/kvctl/host.py", "LinuxHost.text", "read"): KERNEL,
    Finding("clients/kvctl/service.py", "_source", "read"): OWN_FILE,
    Finding("clients/kvctl/service.py", "_state", "read"): OPERATOR,
    Finding("clients/kvctl/service.py", "_systemd_version", "read"): "systemctl's own few words",
    Finding("daemon/kvstored/compiled.py", "_sources", "read"): OWN_FILE,
    Finding("daemon/kvstored/compiled.py", "drop_stale", "read"): "beside what is run, where nobody else can write",
    Finding("daemon/kvstored/config.py", "_numa", "read"): NOT_A_FILE,
    Finding("daemon/kvstored/daemon.py", "Daemon.__init__", "read"): NOT_A_FILE,
    Finding("daemon/kvstored/processes.py", "_start_of", "read"): KERNEL,
    Finding("daemon/kvstored/workers.py", "_processor_ticks", "read"): KERNEL,
    Finding("kernels/kvkernels/device/cuda.py", "Cuda._compile", "read"): OWN_FILE,
    Finding("kernels/kvkernels/device/emulation.py", "_identity", "read"): KERNEL,
    Finding("kernels/kvkernels/device/emulation.py", "_is_writable", "read"): KERNEL,
    Finding("kernels/kvkernels/device/emulated_kernels.py", "library", "read"): "a compiler's words",
    Finding("kernels/kvkernels/device/engines.py", "_digest", "read"): OWN_FILE,
    Finding("kernels/kvkernels/device/engines.py", "_read", "read"): "its size is looked at first",
    Finding("kernels/kvkernels/planes.py", "_grow", "decompress"): "a frame says how much; compared first",
    Finding("kvstore/insight/trial.py", "", "read"): OWN_FILE,
    Finding("kvstore/repinning.py", "Repinning.begin", "read"): NOT_A_FILE,
    Finding("kvstore/store.py", "Store.__init__", "read"): NOT_A_FILE,
    Finding("proto/generate.py", "_read", "read"): BUILD,
    Finding("proto/generate.py", "generate", "read"): BUILD,
}

SEVERAL = {
    Finding("kernels/kvkernels/device/cuda.py", "Cuda._compile", "read"),
    Finding("proto/generate.py", "generate", "read"),
}  # more than one

BAD = {
    "import pickle": "import pickle",
    "from pickle import loads": "import pickle",
    "import marshal as m": "import marshal",
    "from shelve import open": "import shelve",
    "eval(text)": "eval",
    "exec(text)": "exec",
    "compile(text, name, 'exec')": "compile",
    "__import__(name)": "__import__",
    "import builtins\nbuiltins.eval(text)": "eval",
    "from builtins import eval as quiet\nquiet(text)": "eval",
    "import subprocess\nsubprocess.run(text, shell=True)": "shell",
    "import subprocess\nsubprocess.Popen(text, shell=flag)": "shell",
    "import subprocess\nsubprocess.getoutput(text)": "shell",
    "import os\nos.system(text)": "shell",
    "import os as o\no.system(text)": "shell",
    "from os import popen\npopen(text)": "shell",
    "import asyncio\nasyncio.create_subprocess_shell(text)": "shell",
    "import yaml\nyaml.load(text)": "yaml.load",
    "from yaml import unsafe_load\nunsafe_load(text)": "yaml.load",
    "import numpy\nnumpy.load(path)": "pickle",
    "import numpy as np\nnp.save(path, x, allow_pickle=True)": "pickle",
    "import torch\ntorch.load(path)": "pickle",
    "socket.makefile('rb').read()": "read",
    "file.read(-1)": "read",
    "file.read(None)": "read",
    "file.readline()": "read",
    "file.readlines()": "read",
    "path.read_bytes()": "read",
    "path.read_text(encoding='utf-8')": "read",
    "import json\njson.load(file)": "read",
    "process.communicate()": "read",
    "import subprocess\nsubprocess.run(text, capture_output=True)": "read",
    "import subprocess\nsubprocess.check_output(text)": "read",
    "for line in pipe: pass": "read",
    "for line in process.stderr: pass": "read",
    "lines = [line for line in file]": "read",
    "import runpy": "import runpy",
    "import multiprocessing\nmultiprocessing.Pool(2)": "pickle",
    "import multiprocessing as mp\nmp.Process(target=text)": "pickle",
    "zstandard.ZstdDecompressor().decompress(text)": "decompress",
    "tarfile.open(path).extractall(folder)": "extract",
}
GOOD = (
    "file.read(4096)",
    "file.readline(80)",
    "for line in iter(lambda: pipe.readline(80), b''): pass",
    "import subprocess\nsubprocess.run(text, capture_output=False)",
    "import os\nos.read(fd, 4096)",
    "import json\njson.loads(text)",
    "import yaml\nyaml.safe_load(text)",
    "import re\nre.compile(text)",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import numpy as np\nnp.save(path, x, allow_pickle=False)",
    "zlib.decompressobj().decompress(text, 4096)",
    "model.eval",
)


def test_what_is_shipped_has_nothing_that_is_not_listed_here_with_its_reason() -> None:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if "pb2" not in path.name]
    assert len(paths) > FILES_LEAST
    found = Counter(one for path in paths for one in findings(path.read_text(), str(path.relative_to(ROOT))))
    assert sorted(found.keys() - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found.keys()) == [], "listed, and not there any more"
    several = {one for one, times in found.items() if times > 1}
    assert several == SEVERAL, "one more of a kind"


@pytest.mark.parametrize("source", BAD)
def test_what_is_dangerous_is_found(source: str) -> None:
    inside = "class A:\n    async def f(self):\n" + "".join(f"        {line}\n" for line in source.splitlines())
    assert list(findings(source, "x.py")) == [Finding("x.py", "", BAD[source])]
    assert list(findings(inside, "x.py")) == [Finding("x.py", "A.f", BAD[source])]


@pytest.mark.parametrize("source", GOOD)
def test_what_is_bounded_and_plain_is_not(source: str) -> None:
    assert list(findings(source, "x.py")) == []
