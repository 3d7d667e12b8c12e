"""How much memory a process may have: hosts as they describe themselves, in a folder."""

import resource
from pathlib import Path

import pytest

from kvproto.limits import GIB, MIB
from kvstored import config as config_module
from kvstored import host_limits
from kvstored.config import ConfigError, load
from kvstored.host_limits import Limit, group_limit, memory_limit, too_tight, why_not_locked

TWO = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
ONE = (
    "35 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "36 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
INSIDE = "36 31 0:32 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """8 GiB, and no groups yet."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {8 * GIB >> 10} kB\nMemFree: 1 kB\n")
    return tmp_path


def group(host: Path, cgroup: str, mounts: str, limits: dict[str, int | str]) -> None:
    """This process's groups, the file systems that show them, and limits by path."""
    (host / "proc/self/cgroup").write_text(cgroup)
    (host / "proc/self/mountinfo").write_text(mounts)
    for name, limit in limits.items():
        path = host / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")


def test_without_groups_it_is_the_machine(host: Path) -> None:
    assert group_limit(host) is None
    assert memory_limit(host) == Limit(8 * GIB, "the machine's memory")
    assert not too_tight(8 * GIB, host)


@pytest.mark.parametrize(
    ("cgroup", "mounts", "limits", "found"),
    [
        ("0::/a/b\n", TWO, {"a/b/memory.max": "max", "a/memory.max": 2 * GIB}, "/sys/fs/cgroup/a/memory.max"),
        ("0::/a/b\n", TWO, {"a/b/memory.max": GIB, "a/memory.max": 2 * GIB}, "/sys/fs/cgroup/a/b/memory.max"),
        ("4:memory:/x\n0::/\n", ONE, {"memory/x/memory.limit_in_bytes": GIB},
         "/sys/fs/cgroup/memory/x/memory.limit_in_bytes"),
        ("4:cpu,memory:/x\n", ONE, {"memory/memory.limit_in_bytes": GIB}, "fs/cgroup/memory/memory.limit_in_bytes"),
        ("0::/docker/abc\n", INSIDE, {"memory.max": GIB}, "/sys/fs/cgroup/memory.max"),
        ("0::/docker/abc/kv\n", INSIDE, {"kv/memory.max": GIB}, "/sys/fs/cgroup/kv/memory.max"),
        ("0::/\n", INSIDE, {"memory.max": GIB}, "/sys/fs/cgroup/memory.max"),
    ],
)  # fmt: skip
def test_the_tightest_group_is_found_and_named(
    host: Path, cgroup: str, mounts: str, limits: dict[str, int | str], found: str
) -> None:
    group(host, cgroup, mounts, limits)
    limit = group_limit(host)
    assert limit is not None
    assert limit.whose.endswith(found)
    assert limit.limit_bytes == min(one for one in limits.values() if isinstance(one, int))
    assert memory_limit(host) == limit


def test_limits_that_are_none_are_none(host: Path) -> None:
    group(host, "4:memory:/x\n", ONE, {"memory/x/memory.limit_in_bytes": 9223372036854771712})
    assert group_limit(host) is None
    group(host, "0::/a\n", TWO, {"a/memory.max": 64 * GIB})
    assert memory_limit(host).limit_bytes == 8 * GIB, "more than there is"


def test_a_pool_that_hardly_fits_is_warned_of_with_both_figures(host: Path) -> None:
    group(host, "0::/a\n", TWO, {"a/memory.max": 2 * GIB})
    text = too_tight(2 * GIB - 400 * MIB, host)
    assert "1648MiB" in text
    assert "2GiB" in text
    assert "a/memory.max" in text
    assert not too_tight(GIB, host)


def test_a_pool_beyond_the_group_is_refused_with_both_figures(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(host, "0::/a\n", TWO, {"a/memory.max": 2 * GIB})
    monkeypatch.setattr(config_module, "memory_limit", lambda: host_limits.memory_limit(host))
    environ = {"HOME": "/x"}
    with pytest.raises(ConfigError, match=r"flag --dram: 3GiB is more than the memory limit of the control.*2GiB"):
        load(None, environ, {"--dram": "3GiB"})
    assert load(None, environ, {"--dram": "1GiB"}).config.dram_bytes == GIB
    assert load(None, environ, {}).config.dram_bytes == GIB // 2, "a quarter of what it may have"


def test_what_could_not_be_locked_names_the_limit_that_was_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("CapEff:\t0000000000000000\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * MIB, 8 * MIB))
    error = OSError(12, "mlock: Cannot allocate memory")
    text = why_not_locked(GIB, error, status)
    assert "8MiB may be (RLIMIT_MEMLOCK), and dram.size is 1GiB; raise LimitMEMLOCK=" in text
    assert "RLIMIT_MEMLOCK" not in why_not_locked(4 * MIB, error, status), "the limit was not in the way"
    status.write_text("CapEff:\t0000000000004000\n")
    assert "RLIMIT_MEMLOCK" not in why_not_locked(GIB, error, status), "no limit holds for it"
