"""Selection of the GPU kernel set. test_trust.py tests whether kernels are trusted."""

import os
import subprocess
import sys

import pytest

from scan_fast import gpu_status
from scan_fast.ops import native
from scan_fast.ops.families import FAMILIES


def test_an_unknown_choice_of_gpu_kernels_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAN_FAST_GPU_KERNELS", "fast")
    with pytest.raises(ValueError, match=r'SCAN_FAST_GPU_KERNELS must be "auto", "portable" or "sm90", got \'fast\''):
        native.kernel_choice()


@pytest.mark.skipif(not native.build_info().get("sm90_kernels"), reason="the module has no kernels for sm_90a")
@pytest.mark.parametrize("choice", ["auto", "portable", "sm90"])
def test_sm90_kernels_are_enabled_at_import_on_request(choice: str) -> None:
    script = "from scan_fast.ops import native; print(*sorted(native.SM90_FAMILIES))"
    environment = {**os.environ, "SCAN_FAST_GPU_KERNELS": choice}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == (sorted(native.GPU_KERNELS) if choice == "sm90" else [])


def test_every_source_on_record_belongs_to_a_family() -> None:
    table = [source for family in FAMILIES.values() for source in (family.portable, family.sm90) if source is not None]
    assert sorted(table) == sorted(gpu_status.records())
