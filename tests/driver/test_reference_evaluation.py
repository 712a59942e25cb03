"""``scan-fast evaluate FILE --config NAME`` and what applies such files, against plain networks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from driving import fill, run_here
from PIL import Image
from reference_files import (
    Clusters,
    Net18,
    Pretext,
    cifar10,
    labels_of,
    normalised,
    pictures,
    prefixed,
    settled,
    write,
)
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from scan_fast.errors import WeightsError
from scan_fast.reference import open_reference

WIDTH = 8
SMALL = ("model.width=0.125", "runtime.threads=1")
"""The project's networks with an eighth of the channels."""


class Images:
    """A small CIFAR-10 and the words that name it."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.train, self.test = cifar10(root, 60, 40, patch)
        self.train_labels, self.test_labels = (
            np.array(labels_of(root, name)) for name in ("data_batch_1", "test_batch")
        )
        self.words = ("--config", "cifar10", f"data.root={root}", "data.download=false", *SMALL)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    torch.manual_seed(0)
    return Images(tmp_path / "data", monkeypatch)


def accuracy(clusters: np.ndarray, labels: np.ndarray, k: int) -> float:
    counts = np.zeros((k, 10))
    np.add.at(counts, (clusters, labels), 1)
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / len(labels))


def nearest(vectors: torch.Tensor, k: int) -> torch.Tensor:
    unit = F.normalize(vectors, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(k, dim=1).indices


def scan_loss(probabilities: torch.Tensor, neighbors: torch.Tensor) -> float:
    own = torch.arange(len(probabilities))[:, None]
    pairs = torch.cat([own, neighbors], dim=1)
    agreement = (probabilities[:, None] * probabilities[pairs]).sum(dim=2)
    mean = probabilities.mean(dim=0)
    return float(-agreement.log().mean() + (mean * mean.log()).sum())


@pytest.fixture
def clusters(data: Images) -> Any:
    return settled(Clusters(Net18(WIDTH), 8 * WIDTH, 10, 3), data.train)


def contents(model: Any, best: Any) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters())
    return {
        "model": {"model": model.state_dict(), "head": best},
        "checkpoint": {
            "optimizer": optimizer.state_dict(),
            "model": prefixed(model.state_dict()),
            "epoch": 50,
            "best_loss": np.float32(-2.0),
            "best_loss_head": best,
        },
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ["model", "checkpoint"])
def test_a_scan_file_is_evaluated_on_the_test_images(
    data: Images, clusters: Any, tmp_path: Path, form: str, legacy: bool
) -> None:
    path = write(tmp_path / f"{form}.pth.tar", contents(clusters, np.int64(2))[form], legacy)
    result = run_here("evaluate", path, *data.words, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    with torch.no_grad():
        probabilities = clusters(normalised(data.test))[2].softmax(dim=1)
    assert found["acc"] == pytest.approx(accuracy(probabilities.argmax(dim=1).numpy(), data.test_labels, 10), abs=1e-9)
    assert 0.1 < found["acc"] < 1  # the heads tell images apart
    assert found["confidence"] == pytest.approx(float(probabilities.max(dim=1).values.mean()), abs=1e-5)
    assert (found["images"], found["head"], found["heads"], found["kind"]) == (40, 2, 3, "scan")
    assert found["assumed"]["preset"] == "paper"
    shown = run_here("evaluate", path, *data.words)
    assert "assumes resnet18_cifar (no max-pooling) and images of 32 x 32 pixels" in shown.out


def test_a_self_label_file_and_another_head(data: Images, clusters: Any, tmp_path: Path) -> None:
    single = settled(Clusters(Net18(WIDTH), 8 * WIDTH, 10), data.train)
    path = write(tmp_path / "selflabel.pth.tar", single.state_dict())
    with torch.no_grad():
        own = single(normalised(data.test))[0].argmax(dim=1).numpy()
        other = clusters(normalised(data.test))[1].argmax(dim=1).numpy()
    found = json.loads(run_here("evaluate", path, *data.words, "--json").out)
    assert found["acc"] == pytest.approx(accuracy(own, data.test_labels, 10))
    path = write(tmp_path / "scan.pth.tar", {"model": clusters.state_dict(), "head": 2})
    found = json.loads(run_here("evaluate", path, *data.words, "--head", 1, "--json").out)
    assert found["acc"] == pytest.approx(accuracy(other, data.test_labels, 10))
    refused = run_here("evaluate", path, *data.words, "--head", 3).refusal()
    assert "it has the cluster heads 0 to 2, there is no head 3" in refused


def test_heads_without_a_best_one_are_compared(data: Images, clusters: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "zoo.pth.tar", clusters.state_dict(), legacy=True)
    found = json.loads(run_here("evaluate", path, *data.words, "--json").out)
    with torch.no_grad():
        x = normalised(data.test)
        neighbors = nearest(clusters.backbone(x), 5)
        probabilities = [logits.softmax(dim=1) for logits in clusters(x)]
    losses = [scan_loss(p, neighbors) for p in probabilities]
    assert [row["selection_loss"] for row in found["head_metrics"]] == pytest.approx(losses, abs=1e-5)
    best = int(np.argmin(losses))
    assert found["head"] == best
    accuracies = [accuracy(p.argmax(dim=1).numpy(), data.test_labels, 10) for p in probabilities]
    assert [row["acc"] for row in found["head_metrics"]] == pytest.approx(accuracies)
    assert found["acc"] == pytest.approx(accuracies[best])
    text = run_here("evaluate", path, *data.words).out
    assert f"head {best} has the lowest selection loss" in text
    # Neighbours of a file take the place of the search; the first column is the image itself.
    given = torch.cat([torch.arange(40)[:, None], torch.roll(torch.arange(40), 1)[:, None]], dim=1)
    np.save(tmp_path / "topk-val-neighbors.npy", given.numpy())
    words = (*data.words, "--neighbors", tmp_path / "topk-val-neighbors.npy", "--json")
    found = json.loads(run_here("evaluate", path, *words).out)
    losses = [scan_loss(p, given[:, 1:]) for p in probabilities]
    assert [row["selection_loss"] for row in found["head_metrics"]] == pytest.approx(losses, abs=1e-5)


def test_over_clustering_is_said_and_evaluated(data: Images, tmp_path: Path) -> None:
    model = settled(Clusters(Net18(WIDTH), 8 * WIDTH, 14), data.train)
    path = write(tmp_path / "over.pth.tar", model.state_dict())
    result = run_here("evaluate", path, *data.words)
    assert "the file has 14 clusters, the configuration 10; 14 are evaluated" in result.out
    with torch.no_grad():
        assigned = model(normalised(data.test))[0].argmax(dim=1).numpy()
    majority = sum(np.bincount(data.test_labels[assigned == k]).max() for k in set(assigned.tolist()))
    found = json.loads(run_here("evaluate", path, *data.words, "--json").out)
    assert found["acc_many_to_one"] == pytest.approx(majority / 40)


@pytest.mark.parametrize("linear", [False, True], ids=["mlp", "linear"])
def test_a_pretext_file_is_evaluated_by_its_neighbours(data: Images, tmp_path: Path, linear: bool) -> None:
    model = settled(Pretext(Net18(WIDTH), 8 * WIDTH, linear, dim=16), data.train)
    content = {"optimizer": {}, "model": model.state_dict(), "epoch": 500} if linear else model.state_dict()
    path = write(tmp_path / "pretext.pth.tar", content, legacy=True)
    found = json.loads(run_here("evaluate", path, *data.words, "pretext.monitor_k=7", "--json").out)
    with torch.no_grad():
        bank, queries = (F.normalize(model(normalised(images)), dim=1) for images in (data.train, data.test))
    similarity, index = (queries @ bank.T).topk(7, dim=1)
    votes = torch.zeros(40, 10).scatter_add_(1, torch.from_numpy(data.train_labels)[index], (similarity / 0.1).exp())
    assert found["knn_acc"] == pytest.approx(float((votes.argmax(dim=1).numpy() == data.test_labels).mean()))
    for name, vectors, labels in (("train", bank, data.train_labels), ("val", queries, data.test_labels)):
        for k in (1, 5, 20):
            expected = (labels[nearest(vectors, k).numpy()] == labels[:, None]).mean()
            assert found["purity"][name][str(k)] == pytest.approx(expected), (name, k)
    assert (found["features"], found["images"]) == ("projection", {"train": 60, "val": 40})
    # A backbone's features instead, and a folder of other images by leaving one out.
    folder = tmp_path / "others"
    images, classes = pictures(30, seed=5, classes=3)
    for number, label in enumerate(classes):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(folder / str(label) / f"{number:02d}.png")
    words = (*data.words, "mining.features=backbone", "pretext.monitor_k=5", "--data", folder, "--json")
    found = json.loads(run_here("evaluate", path, *words).out)
    order = np.lexsort((np.arange(30), np.asarray(classes)))
    with torch.no_grad():
        vectors = model.backbone(normalised(images[order]))
    sorted_labels = np.array(classes)[order]
    expected = (sorted_labels[nearest(vectors, 5).numpy()] == sorted_labels[:, None]).mean()
    assert found["purity"]["images"]["5"] == pytest.approx(expected)


def moco_like() -> torch.nn.Module:
    """A small bottleneck ResNet with MoCo's projector; the configuration names the same network."""
    torch.manual_seed(1)
    model = torchvision.models.resnet50(weights=None)
    model.fc = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 128))
    return model


def test_a_moco_file_is_evaluated_with_imagenets_statistics(tmp_path: Path) -> None:
    model = moco_like()
    images, labels = pictures(8, 48, seed=7, classes=2)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    x = normalised(images, mean, std)
    with torch.no_grad():
        for _ in range(10):
            model.train()(x)
        model.eval()
        projector, model.fc = model.fc, torch.nn.Identity()
        features = model(x)
        model.fc = projector
    path = write(
        tmp_path / "moco.pth.tar", {"epoch": 800, "state_dict": prefixed(model.state_dict(), "module.encoder_q.")}
    )
    folder = tmp_path / "images"
    for number, label in enumerate(labels):
        (folder / f"n{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(folder / f"n{label}" / f"{number}.png")
    words = ("--config", "imagenet50", "data.image_size=48", "clustering.view.size=48")
    result = run_here("embed", path, *words, "--data", folder, "--out", tmp_path / "f.npz")
    assert result.code == 0, result.err
    order = np.lexsort((np.arange(8), np.asarray(labels)))
    with np.load(tmp_path / "f.npz") as file:
        assert np.abs(file["features"] - features[order].numpy()).max() < 1e-5 * float(features.abs().max())
    found = json.loads(run_here("evaluate", path, *words, "--data", folder, "--json").out)
    sorted_labels = np.array(labels)[order]
    expected = (sorted_labels[nearest(features[order], 1).numpy()] == sorted_labels[:, None]).mean()
    assert found["purity"]["images"]["1"] == pytest.approx(expected)
    assert (found["kind"], found["features"]) == ("moco", "backbone")
    assert found["assumed"]["mean"] == [0.485, 0.456, 0.406]
    # 224 x 224 pixels out of 256 without the settings of this test
    form = open_reference(path, "imagenet50").image_format()
    assert (form.size, form.view_size) == (256, 224)


def test_predict_embed_and_export_take_the_file(data: Images, clusters: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "scan.pth.tar", {"model": clusters.state_dict(), "head": np.int64(1)}, legacy=True)
    folder = tmp_path / "new"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(data.test[number]).save(folder / f"{number}.png")
    with torch.no_grad():
        features = clusters.backbone(normalised(data.test[:6]))
        probabilities = clusters(normalised(data.test[:6]))[1].softmax(dim=1)
    # Nothing of the data set is opened: its folder does not exist.
    words = ("--config", "cifar10", "data.root=nowhere", "data.download=false", *SMALL)
    result = run_here("predict", path, *words, "--data", folder)
    assert result.code == 0, result.err
    assert "assumes resnet18_cifar" in result.err
    rows = [line.split(",") for line in result.out.splitlines()[1:]]
    assert [int(row[1]) for row in rows] == probabilities.argmax(dim=1).tolist()
    assert [float(row[2]) for row in rows] == pytest.approx(probabilities.max(dim=1).values.tolist(), abs=1e-5)
    assert run_here("embed", path, *words, "--data", folder, "--out", tmp_path / "f.npz").code == 0
    with np.load(tmp_path / "f.npz") as file:
        np.testing.assert_allclose(file["features"], features.numpy(), atol=1e-5)
    result = run_here("export", path, *words, "--head", 1, "--out", tmp_path / "m.pt2")
    assert result.code == 0, result.err
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(torch.from_numpy(data.test[:6])), probabilities, rtol=1e-5, atol=1e-5)


def test_an_stl_file_has_a_max_pooling_and_imagenets_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    images, _ = pictures(8, 96, seed=3)
    model = settled(Clusters(Net18(WIDTH, max_pool=True), 8 * WIDTH, 10), images, mean, std)
    path = write(tmp_path / "stl.pth.tar", model.state_dict(), legacy=True)
    folder = tmp_path / "new"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    result = run_here("predict", path, "--config", "stl10", *SMALL, "--data", folder)
    assert result.code == 0, result.err
    assert "assumes resnet18_stl (one max-pooling) and images of 96 x 96 pixels with mean 0.485" in result.err
    with torch.no_grad():
        probabilities = model(normalised(images, mean, std))[0].softmax(dim=1)
    rows = [line.split(",") for line in result.out.splitlines()[1:]]
    assert [int(row[1]) for row in rows] == probabilities.argmax(dim=1).tolist()
    assert [float(row[2]) for row in rows] == pytest.approx(probabilities.max(dim=1).values.tolist(), abs=1e-5)


def test_heads_without_a_best_one_need_a_head(clusters: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "zoo.pth.tar", clusters.state_dict())
    fill(tmp_path / "new", 3)
    words = ("--config", "cifar10", *SMALL)
    for command in (("predict",), ("export", "--out", tmp_path / "m.pt2")):
        more = ("--data", tmp_path / "new") if command[0] == "predict" else ()
        refused = run_here(command[0], path, *words, *command[1:], *more).refusal()
        assert "it has 3 cluster heads and does not say which is the best: name one with --head H" in refused
    result = run_here("predict", path, *words, "--head", 2, "--data", tmp_path / "new")
    assert result.code == 0
    assert len(result.out.splitlines()) == 4


def test_embed_of_a_pretext_file_and_python(data: Images, tmp_path: Path) -> None:
    model = settled(Pretext(Net18(WIDTH), 8 * WIDTH, dim=16), data.train)
    path = write(tmp_path / "pretext.pth.tar", prefixed(model.state_dict()), legacy=True)
    folder = tmp_path / "new"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(data.test[number]).save(folder / f"{number}.png")
    with torch.no_grad():
        expected = model(normalised(data.test[:4]))
    words = ("--config", "cifar10", *SMALL, "--data", folder)
    assert run_here("embed", path, *words, "--out", tmp_path / "f.npz").code == 0
    with np.load(tmp_path / "f.npz") as file:
        np.testing.assert_allclose(file["features"], expected.numpy(), atol=1e-5)
    refused = run_here("predict", path, *words).refusal()
    assert "it is a pretext file, which has no cluster heads" in refused
    file = open_reference(path, "cifar10", SMALL)
    embedder = file.embedder()
    np.testing.assert_allclose(embedder.features(embedder.source(data.test[:4])), expected, atol=1e-5)
    with pytest.raises(WeightsError, match="no cluster heads"):
        file.predictor()


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (
            {},
            ("--config", "imagenet50"),
            "holds a ResNet-18, which is model.backbone=resnet18_cifar or resnet18_stl;",
        ),
        ({}, ("--config", "cifar10"), "with 8 channels at first, the configuration has 64; set model.width=0.125"),
        ({}, ("--config", "no-such"), "there is no configuration 'no-such'"),
        ({}, (), "is a selflabel file of the SCAN project: say with --config what its network sees"),
        ({}, ("data.root=x",), "data.root=x goes with --config"),
        ({}, ("--head", "1"), "--head goes with --config"),
        ({"fc.weight": torch.zeros(2)}, ("--config", "cifar10", *SMALL), "names that neither .* uses: 'fc.weight'"),
        ({"scheduler": {}}, ("--config", "cifar10", *SMALL), "entries that are no tensors: 'scheduler'"),
        ({"backbone.conv1.weight": None}, ("--config", "cifar10", *SMALL), "1 missing .backbone.conv1.weight"),
    ],
)
def test_bad_input_is_explained(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...], message: str) -> None:
    state = Clusters(Net18(WIDTH), 8 * WIDTH, 10).state_dict() | change
    path = write(tmp_path / "model.pth.tar", {name: value for name, value in state.items() if value is not None})
    fill(tmp_path / "images" / "a", 3)
    refused = run_here("evaluate", path, *words, "--data", tmp_path / "images").refusal()
    assert re.search(message, refused), refused
    assert "weights_only" not in refused


def test_a_resnet50_file_is_not_of_cifar(tmp_path: Path) -> None:
    model = moco_like()
    state = {
        "contrastive_head." + n[3:] if n.startswith("fc.") else f"backbone.{n}": v
        for n, v in model.state_dict().items()
    }
    path = write(tmp_path / "moco.pth.tar", state)
    fill(tmp_path / "images", 3)
    words = ("--data", tmp_path / "images", "--out", tmp_path / "f.npz")
    refused = run_here("embed", path, "--config", "cifar10", *words).refusal()
    assert "holds a ResNet-50, which is model.backbone=resnet50; the configuration has resnet18_cifar" in refused


def test_truncated_files_and_other_targets(finished_run: Path, tmp_path: Path) -> None:
    fill(tmp_path / "images", 3)
    more = ("--data", tmp_path / "images")
    for legacy in (False, True):
        path = write(tmp_path / "model.pth.tar", Clusters(Net18(WIDTH), 8 * WIDTH, 10).state_dict(), legacy)
        path.write_bytes(path.read_bytes()[:-20_000])
        refused = run_here("evaluate", path, "--config", "cifar10", *SMALL, *more).refusal()
        assert "model.pth.tar is not a readable weight file" in refused
    refused = run_here("predict", finished_run / "model.pt", "--config", "digits", *more).refusal()
    assert "is a model of scan-fast, which knows its images" in refused
    refused = run_here("predict", finished_run, "--config", "digits", *more).refusal()
    assert "is a folder; a configuration goes with a weight file" in refused
    refused = run_here("predict", tmp_path / "absent.pth.tar", "--config", "digits", *more).refusal()
    assert "there is no weight file" in refused


def test_a_configuration_without_the_papers_preset_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth.tar", Clusters(Net18(WIDTH), 8 * WIDTH, 10).state_dict())
    fill(tmp_path / "images" / "a", 3)
    refused = run_here("evaluate", path, "--config", "digits", "--data", tmp_path / "images").refusal()
    assert "holds a ResNet-18, which is model.backbone=resnet18_cifar or resnet18_stl" in refused
    assert "the configuration has resnet_digits" in refused


def test_neighbours_of_other_images_are_refused_by_the_name_of_these(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth.tar", Pretext(Net18(WIDTH), 8 * WIDTH).state_dict())
    fill(tmp_path / "images" / "a", 3)
    fill(tmp_path / "images" / "b", 3)
    np.save(tmp_path / "n.npy", np.arange(8).reshape(4, 2))
    words = ("--config", "cifar10", *SMALL, "--data", tmp_path / "images", "--neighbors")
    refused = run_here("evaluate", path, *words, tmp_path / "n.npy").refusal()
    assert f"n.npy is of 4 images, there are 6 images of {tmp_path / 'images'}" in refused
    assert "is not a readable .npy file: it is no array of NumPy" in run_here("evaluate", path, *words, path).refusal()


def test_embedded_vectors_are_not_normalised(tmp_path: Path) -> None:
    model: Any = Pretext(Net18(WIDTH), 8 * WIDTH).eval()
    with torch.no_grad():
        model.contrastive_head[2].weight.mul_(5)
        model.contrastive_head[2].bias.mul_(5)
    path = write(tmp_path / "pretext.pth.tar", model.state_dict())
    images = pictures(4)[0]
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    words = ("--config", "cifar10", *SMALL, "--data", tmp_path / "images", "--out", tmp_path / "f.npz")
    assert run_here("embed", path, *words).code == 0
    with torch.no_grad():
        expected = model(normalised(images))
    found = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.norm(dim=1).min() > 2
