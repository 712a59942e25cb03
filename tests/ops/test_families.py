"""The table of kernel families agrees with the sources, with the record of GPU runs and with the compiled module."""

from __future__ import annotations

from pathlib import Path

import pytest

from scan_fast import gpu_status
from scan_fast.ops import native
from scan_fast.ops.families import FAMILIES, GPU_FAMILIES, ROLES

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_every_source_is_listed_once() -> None:
    """A folder of csrc/ is a family, or shared; a source that the table does not name would not be built."""
    folders = {path.name for path in CSRC.iterdir() if path.is_dir()} - {"common", "testing", "tests"}
    assert folders == set(FAMILIES)
    for family in FAMILIES.values():
        listed = [name for files in family.sources.values() for name in files]
        present = [path.name for path in (CSRC / family.name).iterdir() if path.suffix in (".cpp", ".cu")]
        assert sorted(listed) == sorted(present)


def test_roles_decide_how_a_source_is_compiled() -> None:
    for family in FAMILIES.values():
        assert set(family.sources) <= set(ROLES) and family.sources["op"]
        for role, files in family.sources.items():
            suffix = ".cu" if role in ("cuda", "sm90") else ".cpp"
            assert all(name.endswith(suffix) for name in files), f"{family.name}: {role}"
        assert len(family.sources.get("cuda", ())) <= 1 and len(family.sources.get("sm90", ())) <= 1
        assert family.portable is not None or family.sm90 is None, (
            "the portable kernels compute what sm90 does not cover"
        )


def test_every_cuda_source_is_on_record() -> None:
    table = {source for family in GPU_FAMILIES for source in (family.portable, family.sm90) if source is not None}
    assert table == set(gpu_status.records()) == set(gpu_status.kernels_of(CSRC))


def test_the_emulator_does_not_count_as_source_of_a_kernel(tmp_path: Path) -> None:
    for folder in ("testing", "common", "loss"):
        (tmp_path / folder).mkdir()
    kernel, shared, emulator = (
        tmp_path / name for name in ("loss/loss_cuda.cu", "common/device.h", "testing/emulator.h")
    )
    kernel.write_text('#include "common/device.h"\n')
    shared.write_text('#include "testing/emulator.h"\n')
    emulator.write_text("int a;\n")
    before = gpu_status.source_hash(tmp_path, kernel)
    emulator.write_text("int b;\n")
    assert gpu_status.source_hash(tmp_path, kernel) == before
    shared.write_text('#include "testing/emulator.h"\nint c;\n')
    assert gpu_status.source_hash(tmp_path, kernel) != before


@pytest.mark.skipif(not native.is_available(), reason="no compiled module")
def test_what_the_cpu_kernels_require_is_a_fact_of_the_build() -> None:
    required = {family.cpu_requires for family in FAMILIES.values()} - {None}
    assert required == {"cpu_bf16_convolutions"}
    assert required <= set(native.build_info())
