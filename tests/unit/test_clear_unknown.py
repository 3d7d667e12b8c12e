"""Whoever clears what no client has named in this life: what of it lies on disk, where nobody can look, goes too."""

import pytest

from kvproto.ids import NamespaceDigest
from kvstore.report import ClearReport, ClearScope
from kvstore.tier.disk import DiskLimits
from kvstore.tier.orders import WHOLE, Order, Outcome, Owe
from tests.core import Core
from tests.drive import FakeDrive
from tests.unit.test_disk import SEGMENT_BYTES, make
from tests.unit.test_remote import FarSide

DIGEST = NamespaceDigest(b"\x07" * 32)
SCOPES = [
    ClearScope("gone"), ClearScope("gone", DIGEST), ClearScope("gone", DIGEST, (bytes(32),)),  # type: ignore[arg-type]
    ClearScope(None, DIGEST),
]  # fmt: skip


def clear(core: Core, scope: ClearScope, far: FarSide | None = None, *, dry_run: bool = False) -> list[ClearReport]:
    """What the operator was told, after all work."""
    answers: list[ClearReport] = []
    core.store.clear(scope, answers.append, dry_run=dry_run)
    for _ in range(5):
        core.finish_all()
        core.work_all()
        if far is not None:
            far.work()
        core.settle()
    return answers


@pytest.mark.parametrize("remote", [False, True])
def test_without_a_disk_tier_in_this_life_it_is_noted_that_all_of_the_tenant_goes(remote: bool) -> None:
    core, scope = make(), ClearScope("gone")
    far = FarSide(core) if remote else None
    core.store.disk.switch_off()
    assert len(clear(core, scope, far, dry_run=True)) == 1, "kvctl asks before it acts"
    assert core.drive.owed_tenants == set(), "a dry run"
    (report,) = clear(core, scope, far)
    assert (report.blocks, report.dry_run) == (0, False)
    assert core.drive.owed_tenants == {"gone"}


@pytest.mark.parametrize("remote", [False, True])
def test_segments_of_a_tenant_that_nobody_knows_are_removed(remote: bool) -> None:
    core = make()
    far = FarSide(core) if remote else None
    core.store.disk.closed.found({1001: "gone", 1002: "other"})
    for number in (1001, 1002):
        core.drive.files[number] = bytearray(b"nobody can read this")
    assert len(clear(core, ClearScope("gone"), far)) == 1
    assert [number for number in (1001, 1002) if number in core.drive.files] == [1002]


def test_segments_that_nobody_sees_are_owed() -> None:
    core = make()
    core.store.disk.closed.found_unseen({7: "gone", 8: "other", 9: ""})
    assert len(clear(core, ClearScope("gone"))) == 1
    assert core.drive.owed == {(7, WHOLE), (9, WHOLE)}


@pytest.mark.parametrize("scope", SCOPES[1:], ids=str)
def test_a_namespace_that_nobody_knows_costs_nobody_what_is_hidden(scope: ClearScope) -> None:
    """It may be a typing error, and all of a tenant, or of everybody, would go. The control is the test before."""
    core = make()
    core.store.disk.closed.found_unseen({7: "gone", 8: "other", 9: ""})
    core.store.disk.closed.found({1001: "gone"})
    with pytest.raises(KeyError):
        clear(core, scope)
    assert not scope.keys or not core.drive.owed
    if not scope.keys:
        assert len(clear(core, scope, FarSide(core))) == 1, "beyond this host it may be known"
    assert core.drive.owed == set()


def test_it_is_answered_once_that_is_noted() -> None:
    core = make()
    core.store.disk.switch_off()
    answers: list[ClearReport] = []
    core.store.clear(ClearScope("gone"), answers.append, dry_run=False)
    core.store.tick()
    assert any(isinstance(batch[0], Owe) for batch in core.drive.waiting)
    assert answers == [], "not before it is noted"
    core.work_all()
    assert len(answers) == 1


def test_what_could_not_be_noted_is_tried_again_with_the_next() -> None:
    core = make()
    core.store.disk.closed.found_unseen({7: "gone"})

    def refuse(order: Order) -> Outcome | None:
        return Outcome.FAILED if isinstance(order, Owe) else None

    core.drive.fault = refuse
    assert len(clear(core, ClearScope("gone"))) == 1
    core.drive.fault = lambda _order: None
    assert len(clear(core, ClearScope("gone"))) == 1
    assert core.drive.owed == {(7, WHOLE)}


def test_while_disk_is_still_being_read_nobody_can_tell() -> None:
    limits = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES)
    core = Core(disk=limits, drive=FakeDrive(SEGMENT_BYTES))
    answers: list[ClearReport] = []
    for dry_run in (True, False):
        core.store.clear(ClearScope("gone"), answers.append, dry_run=dry_run)
    assert [report.dry_run for report in answers] == [True]
    core.store.disk.closed.found_unseen({7: "gone"})
    core.open_disk()
    core.work_all()
    assert [report.dry_run for report in answers] == [True, False]
    assert core.drive.owed == {(7, WHOLE)}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_a_name_of_which_nothing_can_lie_anywhere_is_an_error(scope: ClearScope, dry_run: bool) -> None:
    core = make()
    if scope.tenant is not None:
        core.store.disk.closed.found({1001: "other"})
        core.store.disk.closed.found_unseen({7: "other"})
    with pytest.raises(KeyError, match="no tenant is called gone" if scope.tenant else "no namespace 0707"):
        clear(core, scope, dry_run=dry_run)
    assert not core.drive.waiting, "and nothing was begun"


def test_keys_that_cannot_be_named_to_the_far_side_are_an_error_and_nothing_goes() -> None:
    core = make()
    far = FarSide(core)
    core.store.disk.closed.found_unseen({7: "gone"})
    with pytest.raises(KeyError):
        clear(core, SCOPES[2], far)
    assert core.drive.owed == set()
    clear(core, ClearScope("gone"), far)
    assert core.drive.owed == {(7, WHOLE)}, "the control"
