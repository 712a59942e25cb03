"""The preset for processors: a run of another one points it out, and it runs through all stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from containers import encoded
from driving import run_here
from images import varied

from scan_fast import planning
from scan_fast.runs.artifacts import CONFIG
from scan_fast.runs.folder import RunFolder

TINY_STAGES = (
    "model.width=0.0625",
    "pretext.epochs=1",
    "pretext.batch_size=32",
    "mining.k=3",
    "mining.test_k=2",
    "clustering.epochs=1",
    "clustering.batch_size=32",
    "clustering.heads=1",
    "selflabel.epochs=1",
    "selflabel.batch_size=32",
    "evaluation.baselines=false",
    "evaluation.map=false",
    "precision=float32",
    "runtime.threads=1",
    "runtime.device=cpu",
)


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes in the form of CIFAR-10 as files: train/CLASS/*.jpg and test/CLASS/*.jpg."""
    root = tmp_path_factory.mktemp("ten")
    pixels = varied(60, 32, 32).numpy()
    for number, image in enumerate(pixels):
        file = root / ("train" if number < 40 else "test") / f"class{number % 10}" / f"{number:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))
    return root


def words(root: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("data.source=folder", f"data.root={root}")
    return ("run", "cifar10", *data, *TINY_STAGES, "--out", out, *more)


def test_a_run_of_fast_on_a_processor_points_out_the_preset_for_it(
    ten_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SHORT", 0)
    result = run_here(*words(ten_classes, tmp_path / "out", "selflabel=null"))
    assert result.code == 0, result.err
    hints = [line for line in result.out.splitlines() if "preset=cpu" in line]
    assert len(hints) == 1 and "preset=cpu is made for processors" in hints[0]
    assert "preset=fast takes about " in hints[0] and hints[0].endswith(" here")
    # It says so and switches nothing.
    assert RunFolder(tmp_path / "out").read(CONFIG).preset == "fast"
    # Who has chosen, or goes on, is not told.
    for more in ((), ("preset=fast",)):
        again = run_here(*words(ten_classes, tmp_path / "out", "selflabel=null", *more))
        assert again.code == 0 and "preset=cpu" not in again.out


def test_too_few_minutes_on_a_processor_name_the_preset_for_it(ten_classes: Path, tmp_path: Path) -> None:
    message = run_here(*words(ten_classes, tmp_path / "out", "--minutes", 1e-7)).refusal()
    assert message.endswith("; give more minutes, or take the smaller network of preset=cpu")
    message = run_here(*words(ten_classes, tmp_path / "out", "preset=cpu", "--minutes", 1e-7)).refusal()
    assert message.endswith("; give more minutes")


def test_the_preset_for_processors_runs_through_all_stages_on_a_folder(ten_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_here(*words(ten_classes, out, "preset=cpu"))
    assert result.code == 0, result.err
    config = RunFolder(out).read(CONFIG)
    assert (config.preset, config.model.backbone, config.data.source) == ("cpu", "resnet10_pooled", "folder")
    for name in ("assignments.csv", "confusion.csv", "model.pt", "report.html", "neighbors.npz"):
        assert (out / name).is_file(), name
    clusters = np.loadtxt(out / "assignments.csv", delimiter=",", skiprows=1, usecols=1, dtype=int)
    assert len(clusters) == 60 and clusters.min() >= 0 and clusters.max() < 10
