"""Runs that start from files of the SCAN project, and files of that project that runs write."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from driving import TINY, assignments, contents, fill, left_out, run_here, summary
from PIL import Image
from reference_files import Clusters, Net18, Pretext, cifar10, normalised, prefixed, settled, write

from scan_fast.data.datasets import open_splits
from scan_fast.errors import RunError, WeightsError
from scan_fast.models import ClusterModel, ModelConfig, PretextModel, read_original
from scan_fast.models.reference_writer import dump_original
from scan_fast.runs.artifacts import CONFIG, EMBEDDINGS, NEIGHBORS
from scan_fast.runs.config import find_config, load_config
from scan_fast.runs.folder import RunFolder

WIDTH = 8
N_TRAIN, N_TEST = 60, 40
RUN = (
    "data.download=false",
    "model.width=0.125",
    "clustering.epochs=1",
    "clustering.batch_size=30",
    "selflabel.epochs=1",
    "selflabel.batch_size=30",
    "selflabel.threshold=0.1",
    "evaluation.baselines=false",
    "evaluation.thumbnails=0",
    "evaluation.map=false",
    "precision=float32",
    "runtime.threads=1",
    "preset=paper",
)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    torch.manual_seed(0)
    train, test = cifar10(tmp_path / "data", N_TRAIN, N_TEST, monkeypatch)
    root = f"data.root={tmp_path / 'data'}"
    # After heads of a file nothing is trained in stage two.
    after_heads = left_out(RUN, "clustering.epochs", "clustering.batch_size")
    return {"train": train, "test": test, "words": (*RUN, root), "after_heads": (*after_heads, root)}


def rows_with_self(n: int, k: int) -> np.ndarray:
    """Neighbours that no search would find: the next images in order, after the image itself."""
    return (np.arange(n)[:, None] + np.arange(k + 1)) % n


def test_clustering_starts_from_a_pretext_file_and_its_neighbours(images: dict[str, Any], tmp_path: Path) -> None:
    model = settled(Pretext(Net18(WIDTH), 8 * WIDTH, linear=True, dim=16), images["train"])
    content = {"model": prefixed(model.state_dict()), "optimizer": {}, "epoch": 500}
    file = write(tmp_path / "pretext.pth.tar", content, legacy=True)
    given = {"train": rows_with_self(N_TRAIN, 20), "test": rows_with_self(N_TEST, 5)}
    given["train"][3] = [4, 3, *range(5, 24)]  # a copy comes first
    for split, rows in given.items():
        np.save(tmp_path / f"{split}.npy", rows)
    out = tmp_path / "run"
    words = ("--from", file, "--neighbors", tmp_path / "train.npy", tmp_path / "test.npy")
    result = run_here("cluster", "cifar10", *images["words"], *words, "--out", out)
    assert result.code == 0, result.err
    assert list(summary(out)["stages"]) == ["pretext", "mining", "clustering"]
    run = RunFolder(out)
    mined, embedded = run.read(NEIGHBORS), run.read(EMBEDDINGS).rows
    expected = given["train"][:, 1:].copy()
    expected[3] = [4, *range(5, 24)]
    assert mined.index["train"].tolist() == expected.tolist()
    assert mined.index["test"].tolist() == given["test"][:, 1:].tolist()
    for split in ("train", "test"):
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(model(normalised(images[split])), dim=1).numpy()
        np.testing.assert_allclose(embedded[split], vectors, atol=1e-5)
        similarity = np.einsum("nd,nkd->nk", vectors, vectors[mined.index[split]])
        np.testing.assert_allclose(mined.similarity[split], similarity, atol=1e-5)
    # All is in the run folder: it goes on without the words, from any folder.
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["pretext"]["method"] == {"kind": "weights", "file": str(file)}
    assert config["mining"]["files"] == [str(tmp_path / "train.npy"), str(tmp_path / "test.npy")]
    assert (config["model"]["projector"], config["model"]["projection_dim"]) == ("linear", 16)
    result = run_here("run", out)
    assert result.code == 0, result.err
    assert len(assignments(out)) == N_TRAIN + N_TEST
    assert "pretext: finished before" in result.out
    # The same configuration repeats it elsewhere, a stage at a time.
    again = run_here("cluster", out / "config.yaml", "--out", tmp_path / "again", "--quiet")
    assert again.code == 0, again.err
    assert RunFolder(tmp_path / "again").read(NEIGHBORS).index["train"].tolist() == expected.tolist()


def test_self_labelling_starts_from_a_scan_file(images: dict[str, Any], tmp_path: Path) -> None:
    model = settled(Clusters(Net18(WIDTH), 8 * WIDTH, 10, 3), images["train"])
    file = write(tmp_path / "scan.pth.tar", {"model": model.state_dict(), "head": np.int64(2)}, legacy=True)
    out = tmp_path / "run"
    result = run_here("selflabel", "cifar10", *images["after_heads"], "--from", file, "--out", out)
    assert result.code == 0, result.err
    stages = summary(out)["stages"]
    assert list(stages) == ["clustering", "selflabel"]
    assert stages["clustering"]["file_head"] == 2
    stored = torch.load(out / "checkpoints" / "clustering-final.pt", weights_only=True)["model"]
    assert torch.equal(stored["cluster_head.0.weight"], model.cluster_head[2].weight)
    assert torch.equal(stored["backbone.conv1.weight"], model.backbone.conv1.weight)
    with torch.no_grad():
        probabilities = model(normalised(images["test"]))[2].softmax(dim=1)
    confidence = float(probabilities.max(dim=1).values.mean())
    assert stages["clustering"]["test"]["confidence"] == pytest.approx(confidence, abs=1e-5)
    trained = torch.load(out / "checkpoints" / "selflabel-final.pt", weights_only=True)["model"]
    assert not torch.equal(trained["cluster_head.0.weight"], model.cluster_head[2].weight)
    assert len(assignments(out)) == N_TRAIN + N_TEST
    assert (out / "report.html").is_file()
    assert yaml.safe_load((out / "config.yaml").read_text())["clustering"]["weights"] == str(file)
    assert run_here("evaluate", out).code == 0
    export = ("export", out, "--format", "reference", "--out", tmp_path / "x", "--stage")
    for stage in ("pretext", "mining"):
        told = (
            f"has no {stage} stage (clustering.weights={file} takes its place); --stage clustering or selflabel can be"
        )
        assert told in run_here(*export, stage).refusal()
    with pytest.raises(RunError, match=r"neighbors\.npz and no mining stage \(clustering\.weights="):
        RunFolder(out).require(NEIGHBORS)
    assert run_here(*export, "clustering").code == 2  # a network that the project does not have
    # Repeated and continued without the words, and the file is not needed after its stage.
    file.unlink()
    result = run_here("selflabel", out, "--again", "--quiet")
    assert result.code == 0, result.err
    refused = run_here("cluster", out, "--again").refusal()
    assert f"there is no weight file {file}" in refused


def test_a_whole_run_goes_on_after_what_the_file_holds(images: dict[str, Any], tmp_path: Path) -> None:
    model = settled(Clusters(Net18(WIDTH), 8 * WIDTH, 10, 2), images["train"])
    file = write(tmp_path / "zoo.pth.tar", model.state_dict())
    refused = run_here("run", "cifar10", *images["after_heads"], "--from", file).refusal()
    assert "does not say which is the best: name one with clustering.weights_head=H, H from 0 to 1" in refused
    result = run_here("run", "cifar10", *images["after_heads"], "--from", file, "clustering.weights_head=1")
    assert result.code == 0, result.err
    (out,) = (Path("runs")).iterdir()
    assert out.name == "cifar10-10-paper-seed0-from-zoo"
    assert list(summary(out)["stages"]) == ["clustering", "selflabel"]
    assert yaml.safe_load((out / "config.yaml").read_text())["clustering"]["weights_head"] == 1


def test_normalisation_that_a_file_does_not_say_is_told(images: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images["train"][:16]):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    model = settled(Clusters(Net18(WIDTH), 8 * WIDTH, 10), images["train"])
    file = write(tmp_path / "scan.pth.tar", {"model": model.state_dict(), "head": 0})
    settings = left_out(RUN, "preset=paper", "data.download=false", "clustering.epochs", "clustering.batch_size")
    words = ("selflabel", "--data", folder, "--from", file, *settings, "model.backbone=resnet18_cifar")
    told = f"{file} does not say how its images were normalised: mean 0.485, 0.456, 0.406 and standard deviation 0.229"
    result = run_here(*words, "--out", tmp_path / "assumed")
    assert result.code == 0, result.err
    assert told in result.out
    own = ("data.mean=[0.49,0.48,0.44]", "data.std=[0.2,0.2,0.2]")
    result = run_here(*words, *own, "--out", tmp_path / "told")
    assert result.code == 0, result.err
    assert "normalised" not in result.out


def test_what_cannot_be_gone_on_from_is_refused(images: dict[str, Any], tmp_path: Path) -> None:
    pretext = write(tmp_path / "pretext.pth.tar", Pretext(Net18(WIDTH), 8 * WIDTH, dim=16).state_dict())
    scan = write(tmp_path / "scan.pth.tar", Clusters(Net18(WIDTH), 8 * WIDTH, 14).state_dict())
    words = images["after_heads"]

    def refusal(command: str, *more: object) -> str:
        return run_here(command, "cifar10", *words, *more).refusal()

    assert "is a pretext file, which has no cluster heads; scan-fast cluster" in refusal("selflabel", "--from", pretext)
    assert "has cluster heads; scan-fast selflabel goes on from it" in refusal("cluster", "--from", scan)
    text = refusal("selflabel", "--from", scan)
    assert "has 14 clusters, the configuration has clustering.n_clusters=10; clustering.n_clusters=14 takes" in text
    assert "the cluster heads 0 to 0, there is no head 3" in refusal(
        "selflabel", "--from", scan, "clustering.n_clusters=14", "clustering.weights_head=3"
    )
    assert "after cluster heads of a file set selflabel.epochs" in refusal(
        "run", "--from", scan, "clustering.n_clusters=14", "--minutes", 3
    )
    assert "nothing is mined after" in refusal(
        "run", "--from", scan, "--neighbors", "x.npy", "clustering.n_clusters=14"
    )
    assert "set clustering.n_clusters" not in refusal("selflabel", "--from", tmp_path / "absent.pth.tar")
    np.save(tmp_path / "n.npy", rows_with_self(50, 20))
    text = refusal("cluster", "--from", pretext, "--neighbors", tmp_path / "n.npy", "--out", tmp_path / "a")
    assert "n.npy is of 50 images, there are 60 train images" in text
    np.save(tmp_path / "n.npy", rows_with_self(60, 10))
    text = refusal("cluster", "--from", pretext, "--neighbors", tmp_path / "n.npy", "--out", tmp_path / "b")
    assert "has 10 neighbours of each image, mining.k is 20; set mining.k=10" in text
    text = refusal("cluster", "--from", pretext, "model.width=0.25", "--out", tmp_path / "c")
    assert "8 channels at first, the configuration has 16; set model.width=0.125" in text
    text = refusal("mine", "clustering.weights=x.pth.tar", "--out", tmp_path / "d")
    assert "this configuration has no mining stage (clustering.weights=" in text
    assert "x.pth.tar takes its place)" in text
    text = refusal("selflabel", "clustering.weights=x.pth.tar", "selflabel=null", "--out", tmp_path / "d")
    assert "this configuration has no selflabel stage (selflabel: null)" in text
    text = refusal("selflabel", "--from", scan, "clustering.n_clusters=14", "mining.files=[x.npy]")
    assert "nothing is mined after clustering.weights=" in text
    text = refusal("run", "clustering.weights_head=1", "--out", tmp_path / "e")
    assert "weights_head=1 needs weights" in text


def test_wrong_neighbours_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = load_config(find_config("digits"), TINY)
    splits = open_splits(config.data)
    assert splits.test is not None
    n_train, n_test = len(splits.train), len(splits.test)
    files = {"train": tmp_path / "train.npy", "test": tmp_path / "test.npy"}
    few, other = tmp_path / "few.npy", tmp_path / "other.npy"
    np.save(files["train"], rows_with_self(n_train, 6))
    np.save(files["test"], rows_with_self(n_test, 5))
    np.save(few, rows_with_self(n_train, 4))
    np.save(other, rows_with_self(n_train - 1, 5))
    out = tmp_path / "new" / "run"
    words = ("digits", *TINY, "--out", out, "--quiet")
    set_files = f"mining.files=[{other}]"
    for told, refused in (
        ("mining.k is 5; set mining.k=4", run_here("run", *words, "--neighbors", few)),
        ("there is no file of neighbours", run_here("cluster", *words, "--neighbors", files["train"], "absent.npy")),
        (f"is of {n_train - 1} images, there are {n_train} train", run_here("mine", *words, "--neighbors", other)),
        (f"is of {n_train - 1} images", run_here("pretext", *words, set_files)),
        (f"is of {n_train - 1} images", run_here("suggest-k", *words, set_files)),
        (f"is of {n_train - 1} images", run_here("sweep", *words, set_files, "--seeds", "0,1")),
    ):
        assert told in refused.refusal()
        assert not out.parent.exists()
    # A begun run stays as it is, too.
    assert run_here("pretext", *words, "selflabel=null").code == 0
    before = contents(out)
    assert "is of" in run_here("mine", out, "--neighbors", other, "--again").refusal()
    assert contents(out) == before
    result = run_here("run", *words, "selflabel=null", "--neighbors", *files.values())
    assert "holds another experiment (mining.files: None -> " in result.refusal()
    # The same folder takes the corrected command.
    assert run_here("mine", out, "--neighbors", *files.values(), "--again", "--quiet").code == 0
    assert RunFolder(out).read(NEIGHBORS).index["train"].tolist() == rows_with_self(n_train, 6)[:, 1:6].tolist()
    # The files are not needed any more.
    for file in files.values():
        file.unlink()
    result = run_here("run", out, "--quiet")
    assert (result.code, result.err) == (0, "")


def test_a_run_with_given_neighbours_can_be_finished_early(tmp_path: Path) -> None:
    file, out = tmp_path / "train.npy", tmp_path / "run"
    splits = open_splits(load_config(find_config("digits"), TINY).data)
    np.save(file, rows_with_self(len(splits.train), 5))
    words = ("digits", *TINY, f"mining.files=[{file}]", "clustering.true_neighbors=true", "--out", out, "--quiet")
    assert run_here("pretext", *words).code == 0
    result = run_here("run", out, "--finish", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert len(assignments(tmp_path / "run-so-far")) > 0


# -- files for the project ---------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_command_runs_what_a_file_holds(tmp_path: Path, legacy: bool) -> None:
    proof = tmp_path / "executed"
    evil = Malicious(f"touch {proof}")
    state = Clusters(Net18(WIDTH), 8 * WIDTH, 10).state_dict()
    fill(tmp_path / "images" / "a", 3)
    contents = (
        evil,
        {"model": state, "head": evil},
        {"model": state, "head": 0, "optimizer": {"state": [evil]}},
        {"state_dict": {"module.encoder_q.conv1.weight": evil}},
    )
    data = ("--config", "cifar10", "--data", tmp_path / "images")
    commands: tuple[tuple[object, ...], ...] = (
        ("evaluate", *data),
        ("predict", *data),
        ("embed", *data, "--out", tmp_path / "x"),
        ("export", "--config", "cifar10", "--out", tmp_path / "x"),
        ("export", "--format", "reference", "--out", tmp_path / "x"),
        ("evaluate", "--data", tmp_path / "images"),
    )
    for content in contents:
        path = write(tmp_path / "model.pth.tar", content, legacy)
        for command, *words in commands:
            refused = run_here(command, path, *words).refusal()
            assert "weights_only" not in refused
        for command in ("run", "cluster", "selflabel"):
            refused = run_here(command, "cifar10", "--from", path, "data.root=nowhere").refusal()
            assert "was refused: it holds more than tensors and plain values" in refused
            assert "weights_only" not in refused
    assert not proof.exists()


def full_run(tmp_path: Path, *words: str) -> Path:
    """A run of the project's own ResNet-18 on few images of digits."""
    small = [word for word in TINY if not word.startswith(("model.width", "data.limit"))]
    out = tmp_path / "full"
    result = run_here(
        "run", "digits", *small, "data.limit=64", "data.image_size=8", "model.backbone=resnet18_cifar", "model.width=1",
        "pretext.epochs=1", "clustering.epochs=1", "selflabel.epochs=1", *words, "--out", out, "--quiet",
    )  # fmt: skip
    assert result.code == 0, result.err
    return out


def test_a_runs_networks_become_files_of_the_project_and_come_back(tmp_path: Path) -> None:
    out = full_run(tmp_path)
    stored = {
        stage: torch.load(out / "checkpoints" / f"{stage}-final.pt", weights_only=True)
        for stage in ("pretext", "clustering", "selflabel")
    }
    kinds = {"pretext": "pretext", "clustering": "scan", "selflabel": "selflabel"}
    plain = {
        "pretext": Pretext(Net18(), 512, dim=64),
        "clustering": Clusters(Net18(), 512, 10, 2),
        "selflabel": Clusters(Net18(), 512, 10),
    }
    for stage, content in stored.items():
        path = tmp_path / f"{stage}.pth.tar"
        result = run_here("export", out, "--format", "reference", "--stage", stage, "--out", path)
        assert result.code == 0, result.err
        assert path.read_bytes()[:2] != b"PK"  # the format before PyTorch 1.6
        raw = torch.load(path, weights_only=True)
        if stage == "clustering":
            assert set(raw) == {"model", "head"}
            assert type(raw["head"]) is int
            assert raw["head"] == content["head"]
            raw = raw["model"]
        plain[stage].load_state_dict(raw, strict=True)
        read = read_original(path)
        assert read.kind == kinds[stage]
        assert read.head == {"pretext": None, "clustering": content.get("head"), "selflabel": 0}[stage]
        assert set(read.state_dict) == set(content["model"])
        assert all(torch.equal(read.state_dict[name], value) for name, value in content["model"].items())
    assert run_here("export", out, "--format", "reference", "--out", tmp_path / "last").code == 0
    assert read_original(tmp_path / "last").kind == "selflabel"
    # A model.pt alone
    words = ("export", out / "model.pt", "--format", "reference", "--out", tmp_path / "single")
    assert run_here(*words).code == 0
    assert torch.equal(
        read_original(tmp_path / "single").state_dict["backbone.conv1.weight"],
        stored["selflabel"]["model"]["backbone.conv1.weight"],
    )
    assert "is of the stage selflabel; give the run folder" in run_here(*words, "--stage", "pretext").refusal()


def test_mined_neighbours_become_files_of_the_project_and_come_back(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "neighbours"
    words = ("export", finished_run, "--format", "reference", "--stage", "mining", "--out")
    result = run_here(*words, out)
    assert (result.code, result.err) == (0, "")
    files = [out / "topk-train-neighbors.npy", out / "topk-val-neighbors.npy"]
    assert result.out.splitlines() == list(map(str, files))
    mined = RunFolder(finished_run).read(NEIGHBORS).index
    for file, split in zip(files, ("train", "test"), strict=True):
        content = np.load(file)
        assert content.dtype == np.int64
        assert content[:, 0].tolist() == list(range(len(mined[split])))
        assert content[:, 1:].tolist() == mined[split].tolist()
    # Another run takes them: the same neighbours without a search.
    again = run_here("run", "digits", *TINY, "--neighbors", *files, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert f"are those of {files[0]}" in again.out
    taken = RunFolder(tmp_path / "again").read(NEIGHBORS).index
    assert all(taken[split].tolist() == mined[split].tolist() for split in mined)
    (tmp_path / "file").touch()
    assert "file is a file; the files of neighbours go to a folder" in run_here(*words, tmp_path / "file").refusal()
    folder = run_here("export", finished_run, "--format", "reference", "--out", out).refusal()
    assert f"{out} is a folder; give the file to write" in folder
    begun = RunFolder.open(tmp_path / "begun", RunFolder(finished_run).read(CONFIG))
    with begun:
        pass
    assert "has no neighbors.npz; run `scan-fast mine" in run_here("export", begun.path, *words[2:], out).refusal()


def test_networks_that_the_project_does_not_have_are_refused(finished_run: Path, tmp_path: Path) -> None:
    words = ("--format", "reference", "--out", tmp_path / "x")
    refused = run_here("export", finished_run, *words).refusal()
    assert "the SCAN project has no such network: model.backbone=resnet_digits" in refused
    assert (
        "--stage goes with --format reference"
        in run_here("export", finished_run, "--stage", "pretext", "--out", tmp_path / "x").refusal()
    )
    assert not (tmp_path / "x").exists()


def test_unwritable_settings() -> None:
    narrow = ModelConfig(width=0.5)
    with pytest.raises(WeightsError, match=r"model\.width=0\.5"):
        dump_original(io.BytesIO(), "selflabel", narrow, ClusterModel(narrow, 3).state_dict())
    of_pretext: tuple[tuple[dict[str, Any], str], ...] = (
        ({"projector": "mlp_bn"}, "model.projector=mlp_bn"),
        ({"hidden_dim": 32}, "model.hidden_dim=32 .it has the backbone's 512"),
    )
    for change, message in of_pretext:
        config = ModelConfig(**change)
        with pytest.raises(WeightsError, match=message):
            dump_original(io.BytesIO(), "pretext", config, PretextModel(config).state_dict())
    of_heads: tuple[tuple[dict[str, Any], str], ...] = (
        ({"cluster_head": "mlp"}, "cluster_head=mlp"),
        ({"unit_features": True}, "length one"),
    )
    for change, message in of_heads:
        config = ModelConfig(**change)
        with pytest.raises(WeightsError, match=message):
            dump_original(io.BytesIO(), "clustering", config, ClusterModel(config, 3).state_dict())
