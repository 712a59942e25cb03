"""Which images the clustering stage pairs: neighbours, views of one image, or neighbours of the same class (oracle)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from driving import TINY, fill, opened, results, run_here, summary
from torch import Tensor

from scan_fast.errors import ConfigError
from scan_fast.models.heads import ClusterModel
from scan_fast.random import stream_key
from scan_fast.runs import artifacts
from scan_fast.runs.config import find_config, load_config
from scan_fast.stages.clustering import Clustering, Partners
from scan_fast.stages.handover import Handover

NEIGHBORS = torch.tensor([[1, 2, 3], [2, 3, 0], [3, 0, 1], [3, 3, 3]])
LABELS = torch.tensor([0, 1, 0, 2])


def allowed(partners: Partners) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(partners.index, partners.counts.tolist(), strict=True)]


def test_partners_without_labels_are_the_neighbours() -> None:
    assert allowed(Partners(NEIGHBORS, False)) == NEIGHBORS.tolist()
    assert allowed(Partners(NEIGHBORS, True)) == [[i, *row] for i, row in enumerate(NEIGHBORS.tolist())]
    for include_self in (True, False):
        assert allowed(Partners(NEIGHBORS[:, :0], include_self)) == [[0], [1], [2], [3]]


def test_partners_of_the_oracle_are_of_the_same_class() -> None:
    """Image 3 has no neighbour but itself, which stands for missing ones, and image 1 none of its class."""
    partners = Partners(NEIGHBORS, False, LABELS)
    assert allowed(partners) == [[2], [1], [0], [3]]
    assert partners.alone == 2
    assert allowed(Partners(NEIGHBORS, True, LABELS)) == [[0, 2], [1], [2, 0], [3]]
    everyone_alike = Partners(NEIGHBORS, False, torch.zeros(4, dtype=torch.int64))
    assert allowed(everyone_alike) == [[1, 2, 3], [2, 3, 0], [3, 0, 1], [3]]


def chosen(folder: Path, *overrides: str, epochs: int = 1) -> tuple[list[Tensor], Clustering]:
    """Return the partners that the stage draws of all images in each epoch."""
    words = ["clustering.view={kind: plain}", *overrides]
    with opened(folder, *words, again=True) as context:
        stage = Clustering(context, ClusterModel(context.model_config, 10, 1), Handover())
        stage._views = lambda view, images, **_: images  # type: ignore[assignment]
        stage._views.key = stream_key(0, "clustering")
        return [stage.batch(epoch, torch.arange(160))[1] for epoch in range(epochs)], stage


@pytest.mark.parametrize("include_self", ["true", "false"])
def test_no_neighbours_means_two_views_of_one_image(include_self: str, finished: Path) -> None:
    drawn, stage = chosen(finished, "clustering.neighbors=0", f"clustering.include_self={include_self}", epochs=3)
    assert all(partners.equal(torch.arange(160)) for partners in drawn)
    with opened(finished, "clustering.neighbors=0", again=True) as context:
        stage = Clustering(context, ClusterModel(context.model_config, 10, 1), Handover())
        anchors, others = stage.batch(0, torch.arange(8))
        assert not anchors.equal(others)


def test_the_oracle_draws_evenly_from_neighbours_of_the_class(finished: Path) -> None:
    settings = ("clustering.true_neighbors=true", "clustering.neighbors=4", "clustering.include_self=false")
    drawn, stage = chosen(finished, *settings, epochs=200)
    labels, own = stage.source.labels, torch.arange(160)
    assert labels is not None
    mined = stage.context.run.read(artifacts.NEIGHBORS).index["train"][:, :4]
    same = labels[torch.from_numpy(mined)] == labels[:, None]
    for partners in drawn:
        assert (labels[partners] == labels).all()
        assert (partners == own).equal(~same.any(dim=1))
    assert same.any(dim=1).sum() == 160 - stage.partners.alone and 0 < same.sum() < 640
    image = int(same.sum(dim=1).argmax())
    counts = Counter(int(partners[image]) for partners in drawn)
    assert set(counts) == {int(mined[image, j]) for j in range(4) if same[image, j]}
    expected = 200 / len(counts)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())
    assert chosen(finished, *settings)[0][0].equal(drawn[0])  # a function of seed, epoch and image


def test_the_summary_names_the_oracle(tmp_path: Path) -> None:
    words = ("run", "digits", *TINY, "selflabel=null", "--quiet", "--out")
    assert run_here(*words, tmp_path / "usual").code == 0
    assert "label_oracle" not in summary(tmp_path / "usual")["stages"]["clustering"]
    done = run_here(*words[:-2], "clustering.true_neighbors=true", "--out", tmp_path / "oracle")
    assert done.code == 0
    assert "clustering: oracle: labels choose the neighbours that train; " in done.out
    note = summary(tmp_path / "oracle")["stages"]["clustering"]["label_oracle"]
    assert note["true_neighbors"] is True and 0 < note["images_without"] < 160
    usual, oracle = (results(tmp_path / name) for name in ("usual", "oracle"))
    assert {k for k in usual if "neighbors" in k} and all(usual[k] == oracle[k] for k in usual if "neighbors" in k)
    assert any(usual[k] != oracle[k] for k in usual if k.startswith("clustering-final.pt"))


def test_settings_of_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    oracle = "clustering.true_neighbors=true"
    for words, message in (
        (
            [oracle, "clustering.neighbors=0"],
            "true_neighbors chooses among mined neighbours, and neighbors=0 takes none",
        ),
        ([oracle, "clustering.update=features", "mining.features=backbone"], "update=features has none"),
        (["clustering.neighbors=-1"], "clustering.neighbors: input should be greater than or equal to 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(find_config("digits"), words)
    images, out = tmp_path / "images", tmp_path / "out"
    fill(images, 12)
    run = ("run", "--data", images, "--clusters", 3, "preset=fast", "mining.k=3", "--out", out)
    message = run_here(*run, oracle).refusal()
    assert "clustering.true_neighbors=true draws neighbours by their labels, and these images have none" in message
    assert "clustering.neighbors=4 is more than the mining.k=3" in run_here(*run, "clustering.neighbors=4").refusal()
