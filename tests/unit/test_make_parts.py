"""`make test` runs its tests in parts: none is left out, and none runs twice."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"integration", "unit"}  # with parts of their own; the rest is all others


def parts_of(makefile: str) -> list[str]:
    """As they are listed."""
    found = re.search(r"^PARTS := (.+)$", makefile, re.MULTILINE)
    assert found
    return found[1].split()


def shares(parts: list[str], names: list[str]) -> Counter[str]:
    """In how many parts each file of the integration tests is."""
    ranges = [part.removeprefix("integration-") for part in parts if part.startswith("integration-")]
    return Counter({name: sum(bool(re.match(f"test_[{letters}]", name)) for letters in ranges) for name in names})


def test_every_integration_test_is_in_one_part_and_all_others_are_in_the_rest() -> None:
    makefile = (ROOT / "Makefile").read_text()
    parts = parts_of(makefile)
    names = [path.name for path in (ROOT / "tests/integration").glob("test_*.py")]
    assert len(names) > 20
    assert set(shares(parts, names).values()) == {1}, shares(parts, names)
    assert shares(parts, ["test_2_hosts.py"])["test_2_hosts.py"] == 0, "the control: nobody would run it"
    assert {"unit", "rest"} <= set(parts)
    (rest,) = re.findall(r"^test-rest:.*\n\t(.+)$", makefile, re.MULTILINE)
    assert set(re.findall(r"--ignore=tests/(\w+)", rest)) == FOLDERS
    assert all((ROOT / "tests" / folder).is_dir() for folder in FOLDERS)
    deep = [path for folder in FOLDERS for path in (ROOT / "tests" / folder).rglob("*/test_*.py")]
    assert not deep, "the letters are those of files in the folder itself"
