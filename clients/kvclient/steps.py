"""Descriptions of workflows: steps, and as what they travel. WIRE.md draws it.

Checked here is what no daemon could accept. Whether the graph makes sense (its cycles have exits, the chances of a
branch add up to 1) the daemon finds out.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from kvclient.checks import amount, name_of
from kvproto.errors import UsageError
from kvproto.limits import HINT_TEXT_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One step of a workflow, and which come `next`. `chances`: of each of them, where one is run and that is known."""

    name: str
    next: Sequence[str] = ()
    split: Literal["all", "one"] = "all"  # after it all of the next ones are run, or one
    join: Literal["any", "all"] = "any"  # it waits for one of those before it, or for all
    chances: Sequence[float] = ()


Steps: TypeAlias = Sequence[Step | Mapping[str, object]]


def steps_of(given: Steps) -> list[Step]:
    """The steps of a workflow, each described by a `Step` or by a dict like it. Raises UsageError."""
    steps = [_step(each) for each in _sequence("steps", given)]
    names = {name_of("the name of a step", step.name) for step in steps}
    if not steps or len(names) < len(steps):
        raise UsageError("a workflow has steps, each with a name of its own")
    for step in steps:
        _check(step, names)
    return steps


def text_of(steps: Sequence[Step]) -> str:
    """Steps that were checked, in JSON. Raises UsageError if that does not fit a frame."""
    text = json.dumps({"steps": [_described(step) for step in steps]}, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > HINT_TEXT_BYTES:
        raise UsageError(f"a description of {len(text.encode())} bytes is longer than {HINT_TEXT_BYTES}")
    return text


def _step(given: object) -> Step:
    if isinstance(given, Step):
        return given
    try:
        return Step(**given)  # type: ignore[arg-type]  # whatever it is, it is looked at next
    except TypeError as error:
        raise UsageError(f"a step is a Step or a dict like it, not {given!r:.200}") from error


def _check(step: Step, names: set[str]) -> None:
    for name in _sequence("next", step.next):
        if not isinstance(name, str) or name not in names:
            raise UsageError(f"{name!r:.200}, after step {step.name!r}, is no step of this workflow")
    if step.split not in ("all", "one") or step.join not in ("any", "all"):
        raise UsageError(f"step {step.name!r} says split {step.split!r:.20}, join {step.join!r:.20}")
    for chance in _sequence("chances", step.chances):
        amount(f"a chance after step {step.name!r}", chance)


def _described(step: Step) -> dict[str, object]:
    described: dict[str, object] = {"name": step.name}
    if step.next:
        described["next"] = list(step.next)
    if step.split != "all":
        described["split"] = step.split
    if step.join != "any":
        described["join"] = step.join
    if step.chances:
        described["chances"] = [float(chance) for chance in step.chances]
    return described


def _sequence(what: str, given: Sequence[object]) -> Sequence[object]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UsageError(f"{what} must be a list, not {given!r:.200}")
    return given
