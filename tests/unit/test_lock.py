"""`systemd/requirements.txt`, which the package and the service are installed from: every version and its hashes.

`make lock` writes it. Nothing is fetched here: what pyproject.toml asks for is compared with what is pinned.
"""

import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "systemd" / "requirements.txt"
EXTRAS = ("daemon", "ctl", "encryption")  # what is installed on a host
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_LINE = re.compile(r"(?P<requirement>[^\\]+?)(?P<hashes>( *\\\n    --hash=sha256:[0-9a-f]{64})*)\n")


class LockError(Exception):
    """The lock is not what it should be."""


@dataclass(frozen=True)
class Pin:
    """One line, with those that go on with it."""

    requirement: Requirement
    hashes: int

    @property
    def version(self) -> str:
        return next(iter(self.requirement.specifier)).version


def read(text: str) -> list[Pin]:
    """Raises LockError."""
    pins, at = [], 0
    while at < len(text):
        match = _LINE.match(text, at)
        if match is None:
            raise LockError(f"not a pin with its hashes: {text[at : at + 80]!r}")
        at = match.end()
        pin = Pin(Requirement(match["requirement"].strip()), match["hashes"].count("sha256:"))
        if [one.operator for one in pin.requirement.specifier] != ["=="] or pin.requirement.url:
            raise LockError(f"not one version: {pin.requirement}")
        if not pin.hashes:
            raise LockError(f"no hash: {pin.requirement}")
        pins.append(pin)
    return pins


def of(pins: list[Pin], python: str) -> dict[str, str]:
    """What a Linux host with that Python gets. Raises LockError."""
    environment = {name: str(value) for name, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    for pin in pins:
        marker, name = pin.requirement.marker, canonicalize_name(pin.requirement.name)
        if marker is None or marker.evaluate(environment):
            if name in found:
                raise LockError(f"{name} is pinned twice for Python {python}")
            found[name] = pin.version
    return found


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_project_asks_for_is_pinned_within_what_it_allows(python: str) -> None:
    pinned = of(read(LOCK.read_text()), python)
    for requirement in wanted():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"make lock: {requirement} is not there"
        assert requirement.specifier.contains(pinned[name]), f"make lock: {requirement}, and {pinned[name]} is pinned"
        assert not requirement.specifier.contains("0.0.1"), "the control: another version would not do"


def test_what_those_ask_for_is_pinned_too() -> None:
    """As far as they are installed here, in these versions or others."""
    pinned = of(read(LOCK.read_text()), ".".join(default_environment()["python_full_version"].split(".")[:2]))
    looked_at = 0
    for name in pinned:
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue
        looked_at += 1
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in pinned, f"make lock: {name} asks for {requirement}"
    assert looked_at > 10


def test_no_line_says_where_to_fetch_from() -> None:
    text = LOCK.read_text()
    for word in ("http:", "https:", "file:", "index", "find-links", " @ ", "-e "):
        assert word not in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("numpy==2.0\n", "no hash"),
        ("numpy>=2.0 \\\n    --hash=sha256:" + "0" * 64 + "\n", "not one version"),
        ("--index-url https://example.org/\n", "."),
        ("numpy==2.0 \\\n    --hash=md5:" + "0" * 32 + "\n", "."),
        ("numpy @ file:///tmp/x \\\n    --hash=sha256:" + "0" * 64 + "\n", "not one version"),
    ],
)
def test_a_lock_that_is_none_is_found(text: str, why: str) -> None:
    good = "numpy==2.0 \\\n    --hash=sha256:" + "0" * 64 + "\n"
    assert of(read(good), "3.12") == {"numpy": "2.0"}
    with pytest.raises((LockError, ValueError), match=why):
        read(text)
    with pytest.raises(LockError, match="twice"):
        of(read(good + good), "3.12")


def test_the_package_and_the_container_are_built_from_it() -> None:
    for file in ("systemd/debian/build", "systemd/container/Containerfile", "OPERATING.md"):
        assert "--require-hashes -r systemd/requirements.txt" in (ROOT / file).read_text(), file
