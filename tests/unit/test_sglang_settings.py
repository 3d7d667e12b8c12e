"""What users may say of the SGLang backend, and which versions it takes."""

import pytest

from kvclient.integrations.sglang_settings import HICACHE, Settings, version_trouble
from kvproto.errors import UsageError


def test_what_is_sglangs_own_is_let_through_and_the_rest_is_ours() -> None:
    own = dict.fromkeys(HICACHE, 1)
    assert Settings.parse(own) == Settings.parse(None) == Settings()
    given = Settings.parse(own | {"runtime_dir": "/run/x", "disk_wait_s": 3, "store": False})
    assert (given.runtime_dir, given.disk_wait_s, given.store) == ("/run/x", 3, False)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("runtime_dri", "x", "has no 'runtime_dri': one of accelerate, any_version"),
        ("store", 1, "must be true or false, not 1"),
        ("disk_wait_s", 60, "must be a number from 0 to 4, not 60"),
        ("disk_wait_s", True, "must be a number from 0 to 4, not True"),
        ("disk_wait_s", float("nan"), "must be a number from 0 to 4, not nan"),
        ("lookup_timeout_ms", 0, "must be a number from 1 to 5000, not 0"),
        ("tenant", None, "must be a string, not None"),
        ("runtime_dir", 7, "must be a string, not 7"),
        ("codec", None, "must be a string, not None"),
        ("codec", "zip", "one of raw, int8, .*, auto, not 'zip'"),
        ("codec", "fp8", 'changes values: say "lossy": true'),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(name: str, value: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Settings.parse({name: value})


def test_versions_that_were_not_tested_are_refused_unless_one_insists() -> None:
    assert version_trouble("0.5.23", any_version=False) == ""
    assert version_trouble("0.5.23.post1", any_version=False) == ""
    for other in ("0.5.22", "0.5.24", "0.6.0", "1.0", "0.5.x", "", "0.0.0.dev0"):
        trouble = version_trouble(other, any_version=False)
        assert "tested with SGLang 0.5.23" in trouble, other
        assert '"any_version": true' in trouble
        assert version_trouble(other, any_version=True) == ""
