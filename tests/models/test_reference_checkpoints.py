"""Reading the original project's and MoCo's files, from files written as those projects write them."""

from __future__ import annotations

import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision

from scan_fast.errors import WeightsError
from scan_fast.models import ClusterModel, ModelConfig, PretextModel, load_strict, read_original

SMALL = ModelConfig(width=0.125)  # the published names with an eighth of the channels


def prefixed(state: dict[str, Any], prefix: str = "module.") -> dict[str, Any]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def optimizer_state(model: torch.nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.fixture(params=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def write(content: Any) -> Path:
        path = tmp_path / "model.pth.tar"
        torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return write


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_pretext(save: Any) -> None:
    model = PretextModel(SMALL)
    for content in (
        model.state_dict(),
        {"optimizer": optimizer_state(model), "model": model.state_dict(), "epoch": 500},
        prefixed(model.state_dict()),
    ):
        weights = read_original(save(content))
        assert (weights.kind, weights.head, weights.n_heads, weights.n_clusters) == ("pretext", None, 0, None)
        assert weights.architecture == "resnet18"
        assert_same(weights.state_dict, model.state_dict())


@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_pretext_weights_load_into_our_models(save: Any, projector: Literal["mlp", "linear"]) -> None:
    source = PretextModel(ModelConfig(width=0.125, projector=projector))
    weights = read_original(save(source.state_dict()))
    target = PretextModel(ModelConfig(width=0.125, projector=projector))
    load_strict(target, weights.state_dict, what="the pretext weights")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(target.eval()(x), source.eval()(x))


@pytest.mark.parametrize("head", [1, np.int64(1), np.argmin([2.0, 1.0]), np.int32(1)], ids=repr)
def test_scan(save: Any, head: Any) -> None:
    model = ClusterModel(SMALL, 5, n_heads=3)
    weights = read_original(save({"model": model.state_dict(), "head": head}))
    assert (weights.kind, weights.head, weights.n_heads, weights.n_clusters) == ("scan", 1, 3, 5)
    assert_same(weights.state_dict, model.state_dict())


def test_scan_checkpoint(save: Any) -> None:
    model = ClusterModel(SMALL, 5, n_heads=2)
    content = {
        "optimizer": optimizer_state(model),
        "model": prefixed(model.state_dict()),
        "epoch": 50,
        "best_loss": np.min(np.array([-2.0, -1.0], dtype=np.float32)),
        "best_loss_head": np.argmin([3.0, 1.0]),
    }
    weights = read_original(save(content))
    assert (weights.kind, weights.head) == ("scan", 1)
    assert_same(weights.state_dict, model.state_dict())


def test_selflabel(save: Any) -> None:
    model = ClusterModel(SMALL, 5)
    for content in (
        model.state_dict(),
        {"optimizer": optimizer_state(model), "model": prefixed(model.state_dict()), "epoch": 200},
    ):
        weights = read_original(save(content))
        assert (weights.kind, weights.head, weights.n_heads) == ("selflabel", 0, 1)
        assert_same(weights.state_dict, model.state_dict())


def test_several_heads_without_a_best_one(save: Any) -> None:
    model = ClusterModel(SMALL, 5, n_heads=3)
    weights = read_original(save(model.state_dict()))
    assert (weights.kind, weights.head, weights.n_heads, weights.n_clusters) == ("scan", None, 3, 5)
    with pytest.raises(WeightsError, match="does not say which is the best: name one with --head H, H from 0 to 2"):
        weights.best_head()
    with pytest.raises(WeightsError, match="heads 0 to 2, there is no head 3"):
        weights.best_head(3)
    assert torch.equal(weights.with_head(2)["cluster_head.0.weight"], model.state_dict()["cluster_head.2.weight"])
    load_strict(ClusterModel(SMALL, 5), weights.with_head(2), what="the head")


def test_scalars_of_numpy_before_version_2(tmp_path: Path) -> None:
    """NumPy 2 moved the constructor of scalars; published files name the old place."""
    path = tmp_path / "model.pth.tar"
    model = ClusterModel(SMALL, 3)
    torch.save({"model": model.state_dict(), "head": np.int64(0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    new, old = b"cnumpy._core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nscalar\n"
    assert new in data or old in data
    path.write_bytes(data.replace(new, old))
    assert read_original(path).head == 0


def moco_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return prefixed(model.state_dict(), "module.encoder_q.")


def small_moco() -> torch.nn.Module:
    """A bottleneck ResNet with MoCo v2's projector, small: the names are those of the official ResNet-50."""
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=4)
    model.fc = torch.nn.Sequential(torch.nn.Linear(2048, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return model


def test_moco(save: Any) -> None:
    model = small_moco()
    content: dict[str, Any] = {"epoch": 800, "arch": "resnet50", "state_dict": moco_state(model)}
    weights = read_original(save(content))
    assert (weights.kind, weights.head, weights.architecture) == ("moco", None, "resnet50")
    expected = {
        ("contrastive_head." + name[3:] if name.startswith("fc.") else "backbone." + name): value
        for name, value in model.state_dict().items()
    }
    assert_same(weights.state_dict, expected)
    # A checkpoint of MoCo's own training holds the key encoder and the queue as well.
    content["state_dict"] |= prefixed(model.state_dict(), "module.encoder_k.")
    content["state_dict"] |= {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)}
    assert_same(read_original(save(content)).state_dict, expected)


def test_official_names_fit_our_resnet50(tmp_path: Path) -> None:
    with torch.device("meta"):
        target = PretextModel(ModelConfig(backbone="resnet50"))
    names = {name.replace("contrastive_head.", "backbone.fc.") for name in target.state_dict()}
    content = {name.replace("backbone.", "module.encoder_q.", 1): torch.zeros(()) for name in names}
    torch.save({"state_dict": content}, tmp_path / "moco.pth.tar")
    assert set(read_original(tmp_path / "moco.pth.tar").state_dict) == set(target.state_dict())


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["head", "epoch"])
def test_a_malicious_file_is_refused_and_not_run(save: Any, tmp_path: Path, where: str) -> None:
    proof = tmp_path / "executed"
    path = save({"model": ClusterModel(SMALL, 3).state_dict(), where: Malicious(f"touch {proof}")})
    with pytest.raises(WeightsError, match="refused: it holds more than tensors") as info:
        read_original(path)
    assert "weights_only" not in str(info.value)
    assert not proof.exists()


def test_a_malicious_bare_pickle_is_refused(tmp_path: Path) -> None:
    proof, path = tmp_path / "executed", tmp_path / "model.pth.tar"
    path.write_bytes(pickle.dumps(Malicious(f"touch {proof}"), protocol=2))
    with pytest.raises(WeightsError):
        read_original(path)
    assert not proof.exists()


def cluster_state(**changes: Any) -> dict[str, Any]:
    return dict(ClusterModel(SMALL, 3).state_dict()) | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cluster_state(**{"backbone.layer5.0.conv1.weight": torch.zeros(1)}), "names that neither .*layer5"),
        (cluster_state(**{"cluster_head.2.bias": torch.zeros(1)}), r"heads \[0, 2\]"),
        (cluster_state(**{"cluster_head.1.bias": torch.zeros(3)}), "lacks 'cluster_head.1.weight'"),
        (
            cluster_state(**{"cluster_head.1.bias": torch.zeros(4), "cluster_head.1.weight": torch.zeros(4, 64)}),
            "different numbers of clusters: 'cluster_head.1.bias'",
        ),
        (cluster_state(**{"contrastive_head.bias": torch.zeros(1)}), "both a contrastive head and cluster heads"),
        (cluster_state(epoch=3), "entries that are no tensors: 'epoch'"),
        ({"model": cluster_state(), "head": 1}, "best head 1, but has 1 head, counted from 0"),
        ({"model": cluster_state(), "head": -1}, "whole number, got -1"),
        ({"model": cluster_state(), "head": np.float64(0.5)}, "whole number"),
        ({"model": cluster_state(), "scheduler": {}}, "unknown entries 'scheduler'"),
        ({"model": dict(PretextModel(SMALL).state_dict()), "head": 0}, "holds no cluster heads"),
        ({"backbone.conv1.weight": torch.zeros(1)}, "neither a contrastive head nor"),
        ({"contrastive_head.weight": torch.zeros(1)}, "holds no backbone"),
        ({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(1), "fc": torch.zeros(1)}}, "MoCo does not use"),
        ({"state_dict": {"module.queue": torch.zeros(1)}}, "no query encoder"),
        ({"state_dict": {}}, "holds no weights: expected names and tensors, got none"),
        ({"model": None, "head": 0}, "holds no weights: expected names and tensors, got a NoneType"),
        (
            cluster_state(**{"cluster_head.0.weight": torch.zeros(1, 64), "cluster_head.0.bias": torch.zeros(1)}),
            "heads of 1 clusters; at least 2",
        ),
        (
            cluster_state(**{"cluster_head.0.bias": torch.zeros(3, dtype=torch.int32)}),
            "not plain real numbers: 'cluster_head.0.bias'",
        ),
        (
            cluster_state(**{"cluster_head.0.weight": torch.zeros(3, 64).to_sparse()}),
            "not plain real numbers: 'cluster_head.0.weight'",
        ),
        (cluster_state(**{"backbone.conv1.weight": torch.zeros(8, 3, 3, 3, dtype=torch.cfloat)}), "not plain real"),
        (cluster_state(**{"backbone.conv1.weight": torch.zeros(8, 3, 3, 3, device="meta")}), "not plain real"),
        ([torch.zeros(1)], "holds a list"),
    ],
)
def test_unknown_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        read_original(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>quota exceeded</html>", b"PK\x03\x04 cut short"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(WeightsError, match=r"w\.pt"):
        warnings.simplefilter("ignore")
        read_original(path)
    with pytest.raises(WeightsError, match="no weight file"):
        read_original(tmp_path / "absent.pt")


def test_truncated_file_is_refused(save: Any) -> None:
    path = save(PretextModel(SMALL).state_dict())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match="not a readable weight file"):
        read_original(path)
