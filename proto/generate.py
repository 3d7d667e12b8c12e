"""Generates the gRPC stubs from control.proto: `python proto/generate.py [--check]`.

Writes `control_pb2.py`, `control_pb2.pyi` and `control_pb2_grpc.py` beside the .proto file. `--check` writes
nothing and exits with 1 if the committed stubs are not what control.proto says.

Three things are done to the compiler's output:

* The calls that make a stub refuse every runtime older than the very compiler that wrote it are taken out, so that
  an inference image need not change its protobuf for us. The stubs hold a serialized descriptor and calls of an
  interface that is older than `OLDEST_GRPCIO`; the ranges in pyproject.toml guard them.
* A first line says which grpcio-tools wrote the file. With the same minor version installed `--check` compares byte
  by byte; with another it compares what the stubs mean (descriptor, classes, methods, fields, paths), since layout
  and comments change from version to version.
* A bare Mapping gets its parameters, for strict type checkers.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parent
SOURCE = "kvproto/control.proto"
STUBS = ("control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py")
OLDEST_GRPCIO = "1.66.0"

_HEAD = "# Written by proto/generate.py with grpcio-tools {}; change control.proto instead.\n"
_HEAD_PATTERN = re.compile(re.escape(_HEAD).replace(r"\{\}", r"(\d+\.\d+)\S*"))
_REWORDINGS = (
    (re.compile(r"^# Protobuf Python Version: .*\n", re.MULTILINE), ""),
    (re.compile(r"^from google\.protobuf import runtime_version as _runtime_version\n", re.MULTILINE), ""),
    (re.compile(r"^_runtime_version\.ValidateProtobufRuntimeVersion\([^)]*\)\n", re.MULTILINE), ""),
    (
        re.compile(r"^GRPC_GENERATED_VERSION = .*$", re.MULTILINE),
        f"GRPC_GENERATED_VERSION = '{OLDEST_GRPCIO}'",
    ),
    (re.compile(r"\b_Mapping\]"), "_Mapping[str, object]]"),
)


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Generate the gRPC stubs from control.proto.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the stubs are not current")
    check = parser.parse_args(arguments).check
    fresh = generate()
    committed = ROOT / Path(SOURCE).parent
    if not check:
        for name, text in fresh.items():
            (committed / name).write_text(text)
        return 0
    outdated = [name for name, text in fresh.items() if not is_current(_read(committed / name), text)]
    if outdated:
        print(
            f"out of date with {SOURCE}: {', '.join(outdated)}\nrun `python proto/generate.py` and commit the result",
            file=sys.stderr,
        )
    return 1 if outdated else 0


def generate() -> dict[str, str]:
    """The stubs by file name, as they should be committed. Exits with the compiler's message on an error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"]
        command += [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        compiler = subprocess.run([*command, SOURCE], capture_output=True, text=True, check=False)  # noqa: S603  our own words
        if compiler.returncode:
            raise SystemExit(f"{SOURCE} does not compile (is grpcio-tools installed?)\n{compiler.stderr}")
        return {name: reworded((Path(folder) / "kvproto" / name).read_text()) for name in STUBS}


def reworded(stub: str) -> str:
    """One stub as it is committed: see the top of this file."""
    for pattern, replacement in _REWORDINGS:
        stub = pattern.sub(replacement, stub)
    if "runtime_version" in stub:
        raise SystemExit("grpcio-tools checks the protobuf runtime in a new way: teach proto/generate.py about it")
    return _HEAD.format(version("grpcio-tools")) + stub


def is_current(committed: str, fresh: str) -> bool:
    """Whether a committed stub says what a fresh one says; another minor version may word it otherwise."""
    if _compiler(committed) == _compiler(fresh):
        return _HEAD_PATTERN.sub("", committed, count=1) == _HEAD_PATTERN.sub("", fresh, count=1)
    return _meaning(committed) == _meaning(fresh)


def _compiler(stub: str) -> str:
    found = _HEAD_PATTERN.match(stub)
    return found[1] if found else "none"


def _meaning(stub: str) -> set[str | bytes]:
    """Classes, methods, fields, the serialized descriptor and the paths of the calls."""
    try:
        tree = ast.parse(stub)
    except SyntaxError:
        return set()
    meaning: set[str | bytes] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            meaning.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            meaning.add(f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}")
        elif isinstance(node, ast.Constant) and _tells(node.value):
            meaning.add(node.value)
    return meaning


def _tells(constant: object) -> TypeGuard[str | bytes]:
    return isinstance(constant, bytes) or (isinstance(constant, str) and constant.startswith("/"))


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
