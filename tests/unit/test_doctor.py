"""kvctl doctor: each check against machines that exist only here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from kvctl import doctor
from kvctl.doctor import Check, DaemonFacts, Verdict
from kvctl.doctor_disks import check_disks
from kvctl.doctor_memory import check_hugepages, check_memlock, check_memory, check_open_files, check_shm
from kvctl.host import Entry, Ground, Listener, Space, file_system

GIB = 1 << 30
OK, WARN, FAIL, SKIP = Verdict.OK, Verdict.WARN, Verdict.FAIL, Verdict.SKIP
RUN = "/run/kvstored"
DISK = "/mnt/a/kv"
ROOMY = Space(8 * GIB, 8 * GIB)


def limits(open_files: object = 1_048_576, locked: object = "unlimited") -> str:
    return (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max open files            {open_files!s:<21}1048576              files     \n"
        f"Max locked memory         {locked!s:<21}unlimited            bytes     \n"
    )


def meminfo(available_bytes: int) -> str:
    return f"MemTotal:       {64 << 20} kB\nMemAvailable:   {available_bytes // 1024} kB\nHugePages_Total:       3\n"


WELL_TEXTS = {
    "/proc/meminfo": meminfo(60 * GIB),
    "/proc/self/limits": limits(),
    "/proc/77/limits": limits(),
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always [within_size] advise never deny force\n",
    "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri\nGCC version: 12\n",
}


@dataclass
class FakeHost:
    """A machine on which all is well, until a test takes something away."""

    uid: int = 1000
    texts: Mapping[str, str] = field(default_factory=lambda: dict(WELL_TEXTS))
    folders: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"/dev": ("null", "nvidia0", "nvidia1", "nvidiactl"), RUN: ("control.sock", "lock")}
    )
    entries: Mapping[str, Entry] = field(
        default_factory=lambda: {
            RUN: Entry("directory", 0o755, 1000),
            f"{RUN}/control.sock": Entry("socket", 0o600, 1000),
            f"{RUN}/lock": Entry("other", 0o600, 1000),
            DISK: Entry("directory", 0o700, 1000),
        }
    )
    shm: Space | None = ROOMY
    drives: Mapping[str, Space] = field(default_factory=lambda: {DISK: Space(100 * GIB, 20 * GIB, device=1)})
    grounds: Mapping[str, Ground] = field(default_factory=lambda: {DISK: Ground("ext4", "", direct=True)})
    listening: Listener = Listener.ALIVE
    memfd: str = ""
    release: str = "6.8.0-45-generic"

    def text(self, path: str) -> str | None:
        return self.texts.get(path)

    def names(self, folder: str) -> tuple[str, ...]:
        return self.folders.get(folder, ())

    def entry(self, path: str) -> Entry | None:
        return self.entries.get(path)

    def space(self, path: str) -> Space | None:
        return self.shm if path == "/dev/shm" else self.drives.get(path)

    def ground(self, folder: str) -> Ground:
        return self.grounds.get(folder, Ground("", "", direct=True))

    def listener(self, path: str) -> Listener:
        return self.listening

    def memfd_trouble(self) -> str:
        return self.memfd

    def kernel(self) -> str:
        return self.release

    def versions(self) -> Sequence[tuple[str, str]]:
        return (("kvctl", "0.1.0"), ("python", "3.11.7"))


WELL_DAEMON = DaemonFacts(
    version="0.1.0", pid=77, uid=1000, draining=False, capacity_bytes=16 * GIB, populated_bytes=4 * GIB,
    locked_bytes=4 * GIB, disks=(DISK,), disk_bytes=16 * GIB, disk_assigned_bytes=GIB, keeper="systemd",
    huge_bytes=4 * GIB,
)  # fmt: skip


def shmem(setting: str) -> FakeHost:
    return FakeHost(texts={**WELL_TEXTS, "/sys/kernel/mm/transparent_hugepage/shmem_enabled": setting})


def test_a_well_set_up_machine_has_nothing_but_ok() -> None:
    checks = doctor.examine(FakeHost(), RUN, WELL_DAEMON)
    assert {check.verdict for check in checks} == {OK}
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.found and not check.remedy for check in checks)


def test_a_machine_that_shows_nothing_fails_nowhere() -> None:
    blind = FakeHost(texts={}, folders={}, entries={}, shm=None, release="plan9")
    verdicts = {check.verdict for check in doctor.examine(blind, RUN, None)}
    assert FAIL not in verdicts


class TestDaemon:
    def test_that_is_absent_is_skipped(self) -> None:
        assert said(doctor.check_daemon(None, "")) == [(SKIP, "none is running")]

    def test_that_does_not_answer_fails_with_the_remedy_it_came_with(self) -> None:
        (check,) = doctor.check_daemon(None, "no answer within 10 s; try again")
        assert (check.verdict, check.found, check.remedy) == (FAIL, "no answer within 10 s", "try again")

    def test_that_drains_is_a_warning(self) -> None:
        (check,) = doctor.check_daemon(replace(WELL_DAEMON, draining=True), "")
        assert (check.verdict, check.remedy) == (WARN, "kvctl undrain")

    def test_passes_its_own_warnings_on(self) -> None:
        _, check = doctor.check_daemon(replace(WELL_DAEMON, warnings=("not locked; do this",)), "")
        assert (check.verdict, check.found, check.remedy) == (WARN, "not locked", "do this")


class TestSockets:
    @pytest.mark.parametrize(
        ("entry", "verdict", "text"),
        [
            (Entry("directory", 0o755, 1000), OK, "mode 0755, uid 1000"),
            (Entry("directory", 0o700, 0), OK, "mode 0700, uid 0"),
            (Entry("directory", 0o775, 1000), FAIL, "mode 0775"),
            (Entry("directory", 0o1777, 0), FAIL, "mode 1777"),
            (Entry("directory", 0o755, 2000), FAIL, "uid 2000"),
            (Entry("other", 0o644, 1000), FAIL, "is not a directory"),
            (None, SKIP, "does not exist"),
        ],
    )
    def test_directory_is_safe_only_if_nobody_else_may_write(
        self, entry: Entry | None, verdict: Verdict, text: str
    ) -> None:
        check = next(iter(doctor.check_sockets(FakeHost(entries={RUN: entry} if entry else {}), RUN, WELL_DAEMON)))
        assert check.verdict is verdict
        assert text in check.found
        assert bool(check.remedy) == (verdict is not OK)

    def test_directory_that_is_nowhere_is_skipped(self) -> None:
        assert [check.verdict for check in doctor.check_sockets(FakeHost(), None, None)] == [SKIP]

    def test_only_sockets_are_looked_at(self) -> None:
        assert [check.name for check in doctor.check_sockets(FakeHost(), RUN, WELL_DAEMON)] == [
            "runtime dir",
            "control.sock",
        ]

    @pytest.mark.parametrize(
        ("listening", "verdict", "text"),
        [
            (Listener.ALIVE, OK, "somebody listens"),
            (Listener.STALE, WARN, "nobody listens"),
            (Listener.DENIED, FAIL, "closed to uid 1000"),
            (Listener.MISSING, SKIP, "went away"),
        ],
    )
    def test_show_who_is_behind_them(self, listening: Listener, verdict: Verdict, text: str) -> None:
        check = list(doctor.check_sockets(FakeHost(listening=listening), RUN, None))[1]
        assert check.verdict is verdict
        assert text in check.found

    def test_control_socket_open_to_others_fails_and_the_hot_one_does_not(self) -> None:
        entry = Entry("socket", 0o666, 1000)
        folder = Entry("directory", 0o755, 1000)
        host = FakeHost(
            folders={RUN: ("control.sock", "hot.sock")},
            entries={RUN: folder, f"{RUN}/control.sock": entry, f"{RUN}/hot.sock": entry},
        )
        _, control, hot = doctor.check_sockets(host, RUN, WELL_DAEMON)
        assert (control.verdict, control.remedy) == (FAIL, f"chmod 600 {RUN}/control.sock")
        assert hot.verdict is OK


class TestMemory:
    def test_is_enough_if_it_holds_what_is_not_touched_yet(self) -> None:
        host = FakeHost(texts={"/proc/meminfo": meminfo(12 * GIB)})
        check = check_memory(host, WELL_DAEMON)
        assert check.verdict is OK
        assert check.found == "12.0 GiB available of 64.0 GiB; DRAM tier 16.0 GiB, 12.0 GiB of it not touched yet"

    def test_fails_if_it_does_not(self) -> None:
        host = FakeHost(texts={"/proc/meminfo": meminfo(12 * GIB - 4096)})
        check = check_memory(host, WELL_DAEMON)
        assert check.verdict is FAIL
        assert "lower --dram" in check.remedy

    @pytest.mark.parametrize(
        ("groups", "files", "verdict"),
        [
            (
                "0::/system.slice/kvstored.service\n",
                {"/sys/fs/cgroup/system.slice/kvstored.service/memory.max": 8},
                FAIL,
            ),
            (
                "0::/system.slice/kvstored.service\n",
                {"/sys/fs/cgroup/system.slice/kvstored.service/memory.max": 16},
                OK,
            ),
            ("0::/a.slice/a-b.slice/kv.service\n", {"/sys/fs/cgroup/a.slice/memory.max": 8}, FAIL),
            (
                "0::/a.slice/a-b.slice/kv.service\n",
                {
                    "/sys/fs/cgroup/a.slice/a-b.slice/kv.service/memory.max": 64,
                    "/sys/fs/cgroup/a.slice/a-b.slice/memory.max": 8,
                    "/sys/fs/cgroup/a.slice/memory.max": 32,
                },
                FAIL,
            ),
            (
                "4:memory:/a/b\n0::/\n",
                {
                    "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": 64,
                    "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": 8,
                },
                FAIL,
            ),
            ("0::/a.slice/b.service\n", {"/sys/fs/cgroup/b.slice/memory.max": 8}, OK),
            ("0::/../hidden\n", {"/sys/fs/cgroup/memory.max": 8}, FAIL),
            ("5:cpu:/x\n4:memory:/pod\n0::/\n", {"/sys/fs/cgroup/memory/pod/memory.limit_in_bytes": 8}, FAIL),
            ("4:hugetlb,memory:/\n", {"/sys/fs/cgroup/memory/memory.limit_in_bytes": 8}, FAIL),
            ("0::/\n", {}, OK),
        ],
    )
    def test_counts_the_limit_of_the_daemons_cgroup(self, groups: str, files: dict[str, int], verdict: Verdict) -> None:
        texts = {path: f"{gibibytes * GIB}\n" for path, gibibytes in files.items()}
        host = FakeHost(texts={**WELL_TEXTS, **texts, "/proc/77/cgroup": groups})
        assert check_memory(host, WELL_DAEMON).verdict is verdict

    def test_names_the_group_whose_limit_is_the_tightest(self) -> None:
        texts = {"/proc/77/cgroup": "0::/a.slice/kv.service\n", "/sys/fs/cgroup/a.slice/memory.max": f"{8 * GIB}\n"}
        assert (
            "cgroup limit 8.0 GiB (/a.slice)"
            in check_memory(FakeHost(texts={**WELL_TEXTS, **texts}), WELL_DAEMON).found
        )

    @pytest.mark.parametrize("unlimited", ["max", "9223372036854771712"])
    def test_knows_a_cgroup_without_a_limit(self, unlimited: str) -> None:
        texts = {"/proc/77/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": unlimited}
        check = check_memory(FakeHost(texts={**WELL_TEXTS, **texts}), WELL_DAEMON)
        assert "cgroup" not in check.found

    def test_without_a_daemon_is_only_shown(self) -> None:
        check = check_memory(FakeHost(), None)
        assert (check.verdict, check.found) == (OK, "60.0 GiB available of 64.0 GiB; no daemon to compare with")


class TestMemlock:
    @pytest.mark.parametrize(
        ("limit", "capabilities", "verdict"),
        [
            ("unlimited", "0", OK),
            (16 * GIB, "0", OK),
            (8 << 20, "0000000000004000", OK),
            (8 << 20, "000001ffffffbfff", WARN),
            (16 * GIB - 1, "0", WARN),
        ],
    )
    def test_must_cover_the_dram_tier(self, limit: object, capabilities: str, verdict: Verdict) -> None:
        texts = {
            "/proc/77/limits": limits(locked=limit),
            "/proc/77/status": f"Name:\tkvstored\nCapEff:\t{capabilities}\n",
        }
        check = check_memlock(FakeHost(texts=texts), WELL_DAEMON)
        assert check.verdict is verdict
        assert ("LimitMEMLOCK=infinity" in check.remedy) == (verdict is WARN)

    def test_does_not_matter_once_all_is_locked(self) -> None:
        host = FakeHost(texts={"/proc/77/limits": limits(locked=65536)})
        assert check_memlock(host, replace(WELL_DAEMON, locked_bytes=16 * GIB)).verdict is OK

    def test_does_not_matter_to_a_daemon_told_not_to_lock(self) -> None:
        host = FakeHost(texts={"/proc/77/limits": limits(locked=65536)})
        assert check_memlock(host, replace(WELL_DAEMON, locks=False)).verdict is SKIP

    def test_without_a_daemon_is_this_shells(self) -> None:
        host = FakeHost(texts={"/proc/self/limits": limits(locked=8 << 20)})
        check = check_memlock(host, None)
        assert (check.verdict, check.found) == (WARN, "limit 8.0 MiB; no daemon to compare with")


class TestKeep:
    def test_says_who_holds_memory(self) -> None:
        check = doctor.check_keep(WELL_DAEMON)
        assert (check.verdict, check.found) == (OK, "blocks in memory are held by systemd over a restart")

    def test_is_a_choice_and_no_fault(self) -> None:
        check = doctor.check_keep(replace(WELL_DAEMON, keeper="none"))
        assert check.verdict is SKIP
        assert "--keep" in check.remedy
        assert doctor.check_keep(None).verdict is SKIP


class TestDisk:
    def test_that_is_well_shows_file_system_and_room(self) -> None:
        one, space = check_disks(FakeHost(), WELL_DAEMON, ())
        assert (one.verdict, one.found) == (OK, "/mnt/a/kv, ext4, 20.0 GiB free of 100.0 GiB")
        assert (space.verdict, space.found) == (OK, "20.0 GiB free; disk tier 16.0 GiB, 15.0 GiB of it not taken yet")

    def test_that_is_not_configured_is_skipped(self) -> None:
        assert said(check_disks(FakeHost(), None, ())) == [(SKIP, "no disk tier is configured")]
        assert said(check_disks(FakeHost(), replace(WELL_DAEMON, disks=()), ()))[0][0] is SKIP

    @pytest.mark.parametrize(
        ("entry", "ground", "verdict", "text"),
        [
            (None, None, FAIL, "does not exist"),
            (Entry("other", 0o600, 1000), None, FAIL, "is not a directory"),
            (Entry("directory", 0o777, 1000), None, WARN, "others may replace what lies there"),
            (Entry("directory", 0o700, 2000), None, WARN, "uid 2000"),
            (Entry("directory", 0o755, 0), None, OK, "ext4"),
            (
                Entry("directory", 0o755, 0),
                Ground("ext4", "Permission denied", direct=False),
                FAIL,
                "Permission denied",
            ),
            (Entry("directory", 0o700, 1000), Ground("ext4", "", direct=False), WARN, "no direct I/O"),
            (Entry("directory", 0o700, 1000), Ground("tmpfs", "", direct=True), WARN, "that is memory"),
            (Entry("directory", 0o700, 1000), Ground("overlay", "", direct=True), WARN, "container"),
            (Entry("directory", 0o700, 1000), Ground("nfs4", "", direct=True), WARN, "another machine"),
            (Entry("directory", 0o700, 1000), Ground("fuse.sshfs", "", direct=True), WARN, "another machine"),
            (Entry("directory", 0o700, 1000), Ground("", "", direct=True), OK, "unknown file system"),
        ],
    )
    def test_is_told_what_is_wrong_with_its_folder(
        self, entry: Entry | None, ground: Ground | None, verdict: Verdict, text: str
    ) -> None:
        well = FakeHost()
        host = replace(
            well, entries={DISK: entry} if entry else {}, grounds={DISK: ground} if ground else well.grounds
        )  # fmt: skip
        check = next(iter(check_disks(host, WELL_DAEMON, ())))
        assert check.verdict is verdict
        assert text in check.found
        assert bool(check.remedy) == (verdict is not OK)

    def test_of_another_user_is_not_tried_in_that_users_stead(self) -> None:
        host = FakeHost(uid=5, grounds={DISK: Ground("ext4", "Permission denied", direct=False)})
        assert next(iter(check_disks(host, WELL_DAEMON, ()))).verdict is OK

    def test_that_is_to_be_one_may_be_looked_at_before_there_is_a_daemon(self) -> None:
        absent, there = check_disks(FakeHost(), None, ("/mnt/new", DISK))
        assert (absent.name, absent.verdict, absent.remedy) == ("disk 1", SKIP, "kvstored makes it when it starts")
        assert (there.name, there.verdict) == ("disk 2", OK)

    def test_space_counts_a_file_system_once(self) -> None:
        other = "/mnt/a/other"
        daemon = replace(WELL_DAEMON, disks=(DISK, other), disk_bytes=25 * GIB, disk_assigned_bytes=0)
        drives = {DISK: Space(100 * GIB, 20 * GIB, device=1), other: Space(100 * GIB, 20 * GIB, device=1)}
        *_, space = check_disks(FakeHost(drives=drives), daemon, ())
        assert (space.name, space.verdict) == ("disk space", WARN)
        assert "lower --disk-size" in space.remedy
        drives[other] = Space(100 * GIB, 20 * GIB, device=2)
        *_, space = check_disks(FakeHost(drives=drives), daemon, ())
        assert (space.verdict, space.found[:13]) == (OK, "40.0 GiB free")

    @pytest.mark.parametrize(
        ("path", "kind"),
        [("/", "ext4"), ("/mnt", "ext4"), ("/mnt/a", "xfs"), ("/mnt/ab", "ext4"), ("/mnt/a/x y/z", "tmpfs")],
    )
    def test_file_system_is_that_of_the_nearest_mount(self, path: str, kind: str) -> None:
        mounts = (
            "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
            "30 22 8:2 / /mnt/a rw shared:2 master:1 - xfs /dev/vdb rw\n"
            "31 30 0:5 / /mnt/a/x\\040y rw - tmpfs tmpfs rw\n"
            "garbage\n"
        )
        assert file_system(mounts, path) == kind
        assert file_system("", path) == ""


class TestOtherLimits:
    @pytest.mark.parametrize(("shm", "verdict"), [(Space(GIB, 0), OK), (Space(64 << 20, 64 << 20), WARN), (None, WARN)])
    def test_shm_of_a_default_container_is_a_warning(self, shm: Space | None, verdict: Verdict) -> None:
        assert check_shm(FakeHost(shm=shm)).verdict is verdict

    @pytest.mark.parametrize(
        ("setting", "verdict"),
        [
            ("always within_size [advise] never deny force", OK),
            ("always within_size advise [never] deny force", OK),
            ("always within_size advise never [deny] force", WARN),
            ("", SKIP),
        ],
    )
    def test_huge_pages_are_those_of_shared_memory_and_only_deny_keeps_the_daemon_from_them(
        self, setting: str, verdict: Verdict
    ) -> None:
        assert check_hugepages(shmem(setting), None).verdict is verdict

    @pytest.mark.parametrize(
        ("huge_bytes", "wished", "verdict"), [(4 * GIB, True, OK), (GIB, True, WARN), (0, False, SKIP)]
    )
    def test_how_much_lies_in_huge_pages_is_what_the_daemon_found(
        self, huge_bytes: int, wished: bool, verdict: Verdict
    ) -> None:
        daemon = replace(WELL_DAEMON, huge_bytes=huge_bytes, huge_pages=wished)
        check = check_hugepages(FakeHost(), daemon)
        assert check.verdict is verdict
        assert (f"{huge_bytes / (4 * GIB):.0%} of 4.0 GiB" in check.found) == wished, check.found
        assert bool(check.remedy) == (verdict is WARN)

    @pytest.mark.parametrize(("limit", "verdict"), [(1024, WARN), (2047, WARN), (2048, OK), ("unlimited", OK)])
    def test_open_files_cover_every_arena_and_session(self, limit: object, verdict: Verdict) -> None:
        host = FakeHost(texts={"/proc/77/limits": limits(open_files=limit)})
        check = check_open_files(host, WELL_DAEMON)
        assert check.verdict is verdict
        assert ("LimitNOFILE=2048" in check.remedy) == (verdict is WARN)

    def test_without_memfd_nothing_works(self) -> None:
        check = doctor.check_memfd(FakeHost(memfd="Operation not permitted"))
        assert (check.verdict, check.found) == (FAIL, "memfd_create: Operation not permitted")


class TestVersions:
    def test_of_both_sides_agree(self) -> None:
        check = doctor.check_versions(FakeHost(), WELL_DAEMON)
        assert (check.verdict, check.found) == (OK, "kvctl 0.1.0, kvstored 0.1.0, python 3.11.7")

    def test_that_differ_are_a_warning(self) -> None:
        assert doctor.check_versions(FakeHost(), replace(WELL_DAEMON, version="0.2.0")).verdict is WARN

    @pytest.mark.parametrize(
        ("release", "verdict", "text"),
        [
            ("6.18.4", OK, "6.18.4"),
            ("6.5.0-rc1", OK, "6.5.0"),
            ("6.4.9", WARN, "SO_PEERPIDFD"),
            ("5.14.0-427.el9.x86_64", WARN, "SO_PEERPIDFD"),
            ("5.10.0-30-amd64", FAIL, "MADV_POPULATE_WRITE"),
            ("unknown", SKIP, "unknown"),
        ],
    )
    def test_of_the_kernel_decide_what_the_daemon_can_do(self, release: str, verdict: Verdict, text: str) -> None:
        check = doctor.check_kernel(FakeHost(release=release))
        assert check.verdict is verdict
        assert text in check.found


class TestGpu:
    def test_is_told_by_its_files(self) -> None:
        check = doctor.check_gpu(FakeHost())
        assert (check.verdict, check.found) == (OK, "nvidia0, nvidia1; driver 570.86.15")

    def test_is_none_on_most_machines(self) -> None:
        assert doctor.check_gpu(FakeHost(texts={}, folders={})) == Check("GPU", SKIP, "none")

    def test_half_there_is_a_warning(self) -> None:
        assert "no driver" in doctor.check_gpu(FakeHost(texts={})).found
        assert "no device" in doctor.check_gpu(FakeHost(folders={})).found
        assert {doctor.check_gpu(host).verdict for host in (FakeHost(texts={}), FakeHost(folders={}))} == {WARN}


def said(checks: Iterable[Check]) -> list[tuple[Verdict, str]]:
    return [(check.verdict, check.found) for check in checks]


@pytest.mark.parametrize(
    ("mode", "group", "verdict"),
    [(0o600, "none", OK), (0o660, "none", FAIL), (0o660, "ops", OK), (0o666, "ops", FAIL)],
)
def test_a_control_socket_for_an_admin_group_is_as_wide_as_that(mode: int, group: str, verdict: Verdict) -> None:
    host = FakeHost()
    host.entries = {**host.entries, f"{RUN}/control.sock": Entry("socket", mode, 1000)}
    found = doctor.check_sockets(host, RUN, replace(WELL_DAEMON, admin_group=group))
    assert {check.name: check.verdict for check in found}["control.sock"] is verdict
