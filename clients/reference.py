"""Writes the reference of `kvclient` from its docstrings: `python clients/reference.py > clients/API.md`."""

import enum
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import kvclient
import kvclient.aio
from kvclient import codecs, following, handing_over, swap_ways, swapping
from kvclient.integrations import transformers

INNER = {"look", "naming", "target_for"}  # for the flows of this package
HEAD = """# kvclient

Made by `make reference` from the docstrings; a test holds it against them. The README shows how these go together.
"""


def main() -> Iterator[str]:
    """All lines."""
    yield HEAD
    yield f"```text\n{inspect.cleandoc(kvclient.__doc__ or '')}\n```\n"
    for name in kvclient.__all__:
        yield from described(name, getattr(kvclient, name), 2)
    yield f"## kvclient.aio\n\n{text(kvclient.aio)}\n"
    for name, thing in vars(kvclient.aio).items():
        if not name.startswith("_") and getattr(thing, "__module__", "").startswith("kvclient.aio"):
            yield from described(f"aio.{name}", thing, 3)
    yield f"## kvclient.codecs\n\n{text(codecs)}\n"
    for name in ("choose", "pays", "measure", "Speed"):
        yield from described(f"codecs.{name}", getattr(codecs, name), 3)
    yield f"## kvclient.handing_over\n\n{text(handing_over)}\n"
    for name in ("hand_over", "take_over", "HandOver", "HandedOver", "Round"):
        yield from described(f"handing_over.{name}", getattr(handing_over, name), 3)
    yield f"## kvclient.following\n\n{text(following)}\n"
    for name in ("follow", "Following"):
        yield from described(f"following.{name}", getattr(following, name), 3)
    yield f"## kvclient.swapping\n\n{text(swapping)}\n"
    for name in ("Swapper", "SwapOut", "SwapIn", "Priority"):
        yield from described(f"swapping.{name}", getattr(swapping, name), 3)
    yield from described("swap_ways.host_pages", swap_ways.host_pages, 3)
    yield "## kvclient.integrations.transformers\n"
    yield from described("TransformersKV", transformers.TransformersKV, 3)


def described(name: str, thing: Any, depth: int) -> Iterator[str]:
    """One public name, and what it has."""
    mark = "#" * depth
    if not inspect.isclass(thing):
        yield f"{mark} {name}\n\n    {name}{signature(thing)}\n\n{text(thing)}\n"
        return
    yield f"{mark} {name}\n\n{text(thing)}\n"
    if issubclass(thing, enum.Enum):
        yield "\n".join(f"* `{each.name}` = `{each.value!r}`" for each in thing) + "\n"
        return
    if is_dataclass(thing):
        yield "\n".join(f"* `{each.name}: {named(each.type)}`" for each in fields(thing)) + "\n"
    elif issubclass(thing, tuple) and hasattr(thing, "_fields"):
        yield "\n".join(f"* `{each}: {named(thing.__annotations__.get(each))}`" for each in thing._fields) + "\n"
    for member, value in members(thing):
        if isinstance(value, property):
            yield f"**`{member}`** {text(value)}\n"
        else:
            call = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            yield f"**`{member}{signature(call)}`**\n\n{text(call)}\n"


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class and of those classes of the project that it is made from."""
    seen: set[str] = set()
    for part in thing.__mro__:
        if not part.__module__.startswith("kv"):
            continue
        for name, value in vars(part).items():
            kind = (property, classmethod, staticmethod)
            if (
                name.startswith("_")
                or name in seen | INNER
                or not (inspect.isfunction(value) or isinstance(value, kind))
            ):
                continue
            if getattr(value, "__doc__", None):
                seen.add(name)
                yield name, value


def signature(call: Any) -> str:
    """Names of types without their modules, and no `self`."""
    said = re.sub(r"\b(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*)", r"\1", str(inspect.signature(call)))
    said = re.sub(r"(?<!= )'([A-Za-z][^']*)'", r"\1", said)
    said = re.sub(r"<([A-Za-z]\w*): [^>]*>", r"\1", said)
    return re.sub(r"\((?:self|cls)(?:, )?", "(", said, count=1).replace("(*, )", "()")


def text(thing: Any) -> str:
    """Its docstring; what is drawn there stays as it is."""
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def named(kind: Any) -> str:
    """A type as it is written."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


if __name__ == "__main__":
    lines = [line.rstrip() for line in "\n".join(main()).rstrip().split("\n")]
    sys.stdout.write("\n".join(lines) + "\n")
