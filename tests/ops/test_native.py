"""Which kernels the operators take on a GPU."""

from collections.abc import Iterator

import pytest

from scan_fast import gpu_status
from scan_fast.ops import native


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    native._prefer_sm90("auto")


def test_an_unknown_choice_of_gpu_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r'SCAN_FAST_GPU_KERNELS must be "auto", "portable" or "sm90", got \'fast\''):
        native._prefer_sm90("fast")


@pytest.mark.skipif(not native.build_info().get("sm90_kernels"), reason="the module has no kernels for sm_90a")
def test_kernels_for_sm90_are_taken_where_they_passed_or_are_asked_for(
    restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = set(native.GPU_KERNELS)
    assert native._prefer_sm90("sm90") == families
    assert native._prefer_sm90("portable") == set()
    for status, expected in (("never run", set()), ("unverified", set()), ("verified", families)):
        known = {sources[0]: {"status": status} for sources in native.GPU_KERNELS.values()}
        monkeypatch.setattr(gpu_status, "records", lambda known=known: known)
        assert native._prefer_sm90("auto") == expected


def test_every_source_for_sm90_belongs_to_a_family() -> None:
    listed = {name for name in gpu_status.records() if name.endswith("_sm90")}
    assert listed == {sources[0] for sources in native.GPU_KERNELS.values()}
