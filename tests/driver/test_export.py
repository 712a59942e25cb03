"""Exported models predict the same without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import scan_fast
from scan_fast.cli import main
from scan_fast.data.datasets import source_from
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import ClusterModel
from scan_fast.predictor import Predictor
from scan_fast.runs.digests import seal


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet_digits", width=0.5)
    model = ClusterModel(config, 4)
    model(torch.randn(64, 3, 8, 8))  # batch statistics that are not the initial ones
    state = {
        "format": 1,
        "stage": "selflabel",
        "model": config.model_dump(mode="json"),
        "n_clusters": 4,
        "size": 8,
        "view_size": 8,
        "crop": "image",
        "decode": "exact",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "state_dict": model.state_dict(),
    }
    with (tmp_path / "model.pt").open("w+b") as file:
        torch.save(state, file)
        seal(file)
    return tmp_path / "model.pt"


def test_exported_program_predicts_the_same(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert main(["export", str(model_file), "--out", str(out)]) == 0
    images = torch.randint(0, 256, (7, 8, 8, 3), dtype=torch.uint8)
    expected = Predictor.load(model_file).probabilities(source_from(images))
    program = torch.export.load(out).module()
    torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-6)
    assert program(images[:1]).shape == (1, 4)


def test_an_exported_program_describes_itself(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert main(["export", str(model_file), "--out", str(out)]) == 0
    extra = {"scan_fast.json": ""}
    torch.export.load(out, extra_files=extra)
    facts = json.loads(extra["scan_fast.json"])
    assert facts["clusters"] == "4"
    assert facts["backbone"] == "resnet_digits"
    assert facts["producer"] == f"scan-fast {scan_fast.__version__}"
    assert json.loads(facts["mean"]) == [0.4, 0.5, 0.6]


def test_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "m.pt2")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_exported_onnx_model_predicts_the_same(model_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    out = tmp_path / "onnx" / "model.onnx"
    assert main(["export", str(model_file), "--format", "onnx", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]  # the weights are in it
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    expected = Predictor.load(model_file).probabilities(source_from(images))
    proto = pytest.importorskip("onnx").load(str(out))
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["input"].startswith("images: (batch, 8, 8, 3) uint8, RGB in 0..255")
    assert proto.graph.input[0].doc_string == facts["input"]
    assert proto.graph.output[0].doc_string == "probabilities: (batch, 4) float32, of clusters 0..3; rows sum to 1"
    assert (facts["clusters"], facts["std"]) == ("4", "[0.2, 0.25, 0.3]")
    session = reference.ReferenceEvaluator(str(out))
    for n in (3, 1):
        found = torch.from_numpy(session.run(None, {"images": images[:n].numpy()})[0])
        torch.testing.assert_close(found, expected[:n], rtol=1e-4, atol=1e-6)
