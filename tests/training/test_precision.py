"""`precision: auto` on a processor: checked, noted, kept. Threads and memory of the process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import accept_files, opened, summary
from torch import Tensor

from scan_fast.models import batch_norm
from scan_fast.models.backbones import ModelConfig, build_backbone
from scan_fast.ops.batch_norm import batch_norm as fused_batch_norm
from scan_fast.training import precision
from scan_fast.training.precision import choose_on_cpu
from scan_fast.training.process import core_limit, kept_memory, set_threads

SMALL = ModelConfig(backbone="resnet_digits", width=0.25)
has_products = pytest.mark.skipif(
    not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
    reason="this processor has no bfloat16 products",
)


@pytest.fixture(autouse=True)
def _no_cached_trial() -> Iterator[None]:
    precision._errors.cache_clear()
    yield
    precision._errors.cache_clear()


def disturbed(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let something happen to every activation of one dtype."""
    layer = fused_batch_norm
    monkeypatch.setattr(batch_norm, "batch_norm", lambda x, *more, **named: layer(change(x), *more, **named))


@has_products
def test_a_right_dtype_is_taken_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice depends on the machine's kind and not on its load, so that two runs agree."""

    def slow(x: Tensor) -> Tensor:
        time.sleep(0.05 * (x.dtype == torch.bfloat16))
        return x

    choice = choose_on_cpu(SMALL, 8)
    precision._errors.cache_clear()
    disturbed(monkeypatch, slow)
    assert choose_on_cpu(SMALL, 8) == choice
    assert choice.dtype == torch.bfloat16, choice.reason


def test_a_processor_without_bfloat16_products_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    choice = choose_on_cpu(SMALL, 8)
    assert (choice.dtype, choice.reason) == (torch.float32, "this processor has no bfloat16 products")


@has_products
@pytest.mark.parametrize("fault", ["forward", "backward", "nan"])
def test_a_wrong_dtype_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.flip(-1) if fault == "forward" else x * float("nan") if fault == "nan" else x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.flip(-1)

    # In 2x2 and smaller maps alone, where such faults have been seen.
    disturbed(
        monkeypatch,
        lambda x: Wrong.apply(x) if x.dtype == torch.bfloat16 and x.ndim == 4 and x.shape[-1] == 4 else x,
    )
    choice = choose_on_cpu(SMALL, 8)
    assert choice.dtype == torch.float32
    assert "wrong" in choice.reason


def test_the_choice_is_noted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "run", "precision=auto") as context:
        first = context.precision
    note = json.loads((tmp_path / "run" / "precision.json").read_text())
    assert f"torch.{note['precision']}" == str(first)
    # Nothing is computed yet, so the folder may still take another configuration: another network is tried.
    with opened(tmp_path / "run", "precision=auto", "model.width=0.5") as context:
        assert context.precision in (torch.float32, torch.bfloat16)
        assert json.loads((tmp_path / "run" / "precision.json").read_text())["tried"]["model"]["width"] == 0.5
    for name in ("bfloat16", "float32"):
        note["precision"] = name
        (tmp_path / "run" / "precision.json").write_text(json.dumps(note))
        accept_files(tmp_path / "run")
        with opened(tmp_path / "run", "precision=auto") as context:
            assert context.precision == getattr(torch, name)
            assert context.autocast()._enabled == (name == "bfloat16")  # type: ignore[attr-defined]
    with opened(tmp_path / "run", "precision=float32") as context:
        assert context.precision == torch.float32


def test_a_configured_dtype_is_not_tried(finished_run: Path) -> None:
    assert summary(finished_run)["stages"]
    assert not (finished_run / "precision.json").exists()


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_the_share_of_a_container(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert core_limit(tmp_path) == limit


def test_threads_are_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(3)
    assert torch.get_num_threads() == 3
    set_threads(None)
    assert torch.get_num_threads() <= 3


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_memory_stays_while_it_is_asked_for() -> None:
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.empty(1 << 22).zero_()  # 16 MB, 4,096 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    usual = faults()
    with kept_memory():
        faults()
        kept = faults()
    assert kept < 1000
    assert usual > 10 * kept or usual < 1000  # another C library, or huge pages


def test_frozen_networks_are_tried_with_their_weights_and_forward_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(SMALL)
    file = tmp_path / "weights.pth"
    torch.save(backbone.state_dict(), file)
    model = ModelConfig(backbone=SMALL.backbone, width=SMALL.width, weights=file)
    choice = choose_on_cpu(model, 8, trains=False)
    if choice.precision == "bfloat16":
        assert "of the features" in choice.reason
    else:
        assert "no bfloat16 products" in choice.reason
    # A bound below the rounding of 8 bits.
    monkeypatch.setattr(precision, "OUTPUT_ERROR", 1e-6)
    assert choose_on_cpu(model, 8, trains=False).precision == "float32"
