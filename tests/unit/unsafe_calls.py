"""Finds, in Python sources, what could run bytes as code or read without a bound. No more than syntax is looked at.

A finding is named by file, the function it is in, and a kind; `test_unsafe_calls.py` says which are there and why.
"""

import ast
from collections.abc import Iterator
from typing import Final, NamedTuple

# Modules whose whole purpose is to make objects out of bytes, or code.
MODULES: Final = frozenset(
    {
        "pickle",
        "_pickle",
        "cPickle",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
        "joblib",
        "jsonpickle",
        "code",
        "runpy",
    }
)
BUILTINS: Final = frozenset({"eval", "exec", "compile", "__import__"})
# By the last two parts of their names.
CALLS: Final = {
    ("os", "system"): "shell", ("os", "popen"): "shell", ("subprocess", "getoutput"): "shell",
    ("subprocess", "getstatusoutput"): "shell", ("asyncio", "create_subprocess_shell"): "shell",
    ("yaml", "load"): "yaml.load", ("yaml", "load_all"): "yaml.load", ("yaml", "unsafe_load"): "yaml.load",
    ("yaml", "full_load"): "yaml.load",
    ("np", "load"): "pickle", ("numpy", "load"): "pickle", ("torch", "load"): "pickle",
    ("np", "fromfile"): "read", ("json", "load"): "read", ("tomllib", "load"): "read",
    ("shutil", "copyfileobj"): "read", ("subprocess", "check_output"): "read",
    ("multiprocessing", "Pool"): "pickle", ("multiprocessing", "Queue"): "pickle",
    ("multiprocessing", "Pipe"): "pickle", ("multiprocessing", "Manager"): "pickle",
    ("multiprocessing", "Process"): "pickle",
}  # fmt: skip
# Methods that read all there is, if nothing says how much. A socket's or pipe's makefile() has the same names.
READS: Final = frozenset({"read", "readline", "readlines", "readall", "read1", "communicate"})
# What a loop over one of these gives is lines, of whatever length who wrote them liked.
STREAMS: Final = frozenset({"pipe", "stdin", "stdout", "stderr", "file", "stream"})
WHOLE_FILES: Final = frozenset({"read_text", "read_bytes"})
# A small stream can become as many bytes as it likes, or files wherever it likes.
UNPACKS: Final = {"decompress": "decompress", "extractall": "extract", "unpack_archive": "extract"}
BOUNDS: Final = frozenset({"max_length", "max_output_size"})


class Finding(NamedTuple):
    """What was found, and where."""

    file: str
    function: str  # with its classes; empty at the top of the file
    kind: str


def findings(source: str, file: str) -> Iterator[Finding]:
    """Of one source. Raises SyntaxError."""
    finder = _Finder(file)
    finder.visit(ast.parse(source))
    yield from finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self.found: list[Finding] = []
        self._file = file
        self._inside: list[str] = []
        self._names: dict[str, tuple[str, str]] = {}  # imported name -> its module and name there

    def _add(self, kind: str) -> None:
        self.found.append(Finding(self._file, ".".join(self._inside), kind))

    def _inner(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _inner  # noqa: N815  as ast has it

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._module(alias.name)
            self._names[alias.asname or alias.name] = (alias.name, "")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._module(node.module or "")
        for alias in node.names:
            self._names[alias.asname or alias.name] = (node.module or "", alias.name)

    def _module(self, name: str) -> None:
        if name.split(".", maxsplit=1)[0] in MODULES:
            self._add(f"import {name}")

    def visit_Call(self, node: ast.Call) -> None:
        module, name = self._called(node.func)
        if not module and name in BUILTINS:
            self._add(name)
        elif (module, name) in CALLS:
            self._add(CALLS[module, name])
        elif isinstance(node.func, ast.Attribute) and _reads_all(name, node):
            self._add("read")
        elif name in UNPACKS and len(node.args) < 2 and not any(word.arg in BOUNDS for word in node.keywords):
            self._add(UNPACKS[name])
        if any(word.arg == "shell" and not _is_false(word.value) for word in node.keywords):
            self._add("shell")
        if any(word.arg == "capture_output" and not _is_false(word.value) for word in node.keywords):
            self._add("read")
        if any(word.arg == "allow_pickle" and not _is_false(word.value) for word in node.keywords):
            self._add("pickle")
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._loop(node.iter)
        self.generic_visit(node)

    def _loop(self, over: ast.expr) -> None:
        name = over.attr if isinstance(over, ast.Attribute) else over.id if isinstance(over, ast.Name) else ""
        if name in STREAMS:
            self._add("read")

    def _called(self, function: ast.expr) -> tuple[str, str]:
        """Module, as far as can be told, and name."""
        if isinstance(function, ast.Name):
            module, name = self._names.get(function.id, ("", function.id))
            return ("", name) if module == "builtins" else (module, name or function.id)
        if isinstance(function, ast.Attribute):
            owner = function.value
            if isinstance(owner, ast.Name):
                module, name = self._names.get(owner.id, (owner.id, ""))
                return ("" if module == "builtins" else name or module, function.attr)
            return "?", function.attr
        return "?", ""


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def _reads_all(name: str, node: ast.Call) -> bool:
    """Without a size, or with -1 or None for one."""
    if name not in READS or not node.args:
        return name in WHOLE_FILES or (name in READS and not node.keywords)
    size = node.args[0]
    if isinstance(size, ast.UnaryOp) and isinstance(size.op, ast.USub):
        return True
    return isinstance(size, ast.Constant) and size.value is None
