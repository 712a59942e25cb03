"""The end-to-end benchmark: both sides compute the same, its counts are right, its result is what it measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import baseline, baseline_images, end_to_end, family, layers, targets
from benchmarks.stage_pairs import (
    Images,
    Pair,
    compare_losses,
    largest_difference,
    make_pair,
    open_images,
    training_flops,
    write_images,
)
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.convolution import Conv2d
from scan_fast.models.heads import ClusterModel, PretextModel
from scan_fast.runs.artifacts import NEIGHBORS
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import Neighbors
from scan_fast.runs.tracker import Tracker
from scan_fast.training.context import Context, open_context
from scan_fast.views.parameters import STRONG_OPERATIONS, AffineView, SimCLRView, StrongView
from tools.docs import benchmarks as pages

SMALL = ("model.width=0.125", "pretext.batch_size=16", "clustering.batch_size=16", "selflabel.batch_size=16")
PRESETS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "fast": ("preset=fast",),
    # Frozen backbone, ten heads, as on ImageNet; labels without balancing; a linear projector.
    "heads": ("clustering.update=heads", "clustering.heads=10", "selflabel.balance=false", "model.projector=linear"),
}


@pytest.fixture(scope="module", params=PRESETS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Context, Images]]:
    folder = tmp_path_factory.mktemp("end_to_end")
    config = end_to_end.settings("cifar10", "cpu", [*SMALL, "mining.k=5", *PRESETS[request.param]])
    images = open_images(config, write_images(folder / "images", 64), None)
    run = RunFolder.open(folder / "run", config)
    with run:
        context = open_context(config, run, Tracker(run, quiet=True), images.splits)
        near = (np.arange(64)[:, None] + np.arange(1, 6)) % 64
        similarity = np.ones(near.shape, dtype=np.float32)
        neighbors = Neighbors({"train": near, "test": near}, {"train": similarity, "test": similarity})
        run.write(NEIGHBORS, neighbors)
        run.finish_stage("mining", 0.0, {}, 0)
        yield context, images


def pair(name: str, context: Context, images: Images) -> Pair:
    torch.manual_seed(1)
    former: torch.nn.Module | None = None
    if name == "clustering":
        former = PretextModel(context.model_config)
    elif name == "selflabel":
        former = ClusterModel(context.model_config, context.n_clusters)
        # Sure of some images and not of others, so that the threshold matters.
        head = former.cluster_head[0]
        assert isinstance(head, torch.nn.Linear)
        head.weight.data *= 3
    return make_pair(name, context, images, former, workers=0)


def doubled(both: Pair) -> Pair:
    average = getattr(both.ours, "average", None)
    networks = [both.ours.model, None if average is None else average.model, both.baseline.model]
    networks.append(getattr(both.baseline, "teacher", None))
    for network in networks:
        if network is not None:
            network.double()
    return both


@pytest.mark.parametrize("name", ["pretext", "clustering", "selflabel"])
def test_losses_agree_step_by_step(name: str, opened: tuple[Context, Images]) -> None:
    context, images = opened
    losses = compare_losses(lambda c: doubled(pair(name, c, images)), context, 4, 16, torch.float64)
    assert len(losses) == 4
    assert largest_difference(losses) < 1e-9, losses
    # The weights moved: had they not, agreement after the first step would say nothing.
    assert len({round(ours, 4) for ours, _ in losses}) == 4
    # The compiled losses in float32.
    losses = compare_losses(lambda c: pair(name, c, images), context, steps=3, batch_size=16)
    assert largest_difference(losses[:1]) < 2e-6, losses
    assert largest_difference(losses) < 3e-2, losses


def test_disagreement_is_seen(opened: tuple[Context, Images]) -> None:
    context, images = opened

    def other_temperature(c: Context) -> Pair:
        both = pair("pretext", c, images)
        method = c.config.pretext.method.model_copy(update={"temperature": 0.11})
        both.baseline.config = c.config.pretext.model_copy(update={"method": method})
        return both

    losses = compare_losses(other_temperature, context, steps=1, batch_size=16)
    assert largest_difference(losses) > 2e-5


def test_the_networks_have_the_flops_of_resnet18() -> None:
    network = baseline.ContrastiveModel(ModelConfig(projection_dim=128))
    nothing = baseline_images.Pairs(
        2, lambda i: Image.new("RGB", (32, 32)), lambda i: torch.zeros(1), lambda i: torch.zeros(1)
    )
    config = end_to_end.settings("cifar10", "cpu", []).pretext
    stage = baseline.SimCLR(network, config, nothing, torch.device("cpu"), workers=0)
    stem = 32 * 32 * 64 * 27
    blocks = 4 * 32 * 32 * 64 * 576
    for side, width in ((16, 128), (8, 256), (4, 512)):
        blocks += side * side * width * (9 * width // 2 + 3 * 9 * width + width // 2)
    heads = 512 * 512 + 512 * 128
    # Two views; a product each for output, gradient of the input (the stem has none) and gradient of the weight.
    exact = 2 * 2 * (3 * (stem + blocks + heads) - stem)
    assert training_flops(stage, 32) == pytest.approx(exact, rel=1e-12)


def test_baseline_views_are_the_configured_ones() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

    def pixels(view: Any) -> Tensor:
        out = baseline_images.transform(view, mean, std)(image)
        return (out * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255

    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    still = StrongView(size=32, operations=0, cutout=0, flip=1.0)
    torch.testing.assert_close(pixels(still), exact.flip(2), atol=1e-3, rtol=0)
    whole = SimCLRView(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=1.0)
    grey = pixels(whole)
    torch.testing.assert_close(grey[0], grey[2], atol=1e-3, rtol=0)
    torch.testing.assert_close(
        grey[0], (exact * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0), atol=1, rtol=0
    )
    affine = AffineView(size=32, degrees=0, translate=0, scale=(1, 1), shear=0, brightness=0, contrast=0, cutout=0)
    torch.testing.assert_close(pixels(affine), exact, atol=1e-3, rtol=0)


def test_every_strong_operation_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {}

    def note(name: str) -> Any:
        def unchanged(image: Image.Image, value: float) -> Image.Image:
            seen.setdefault(name, []).append(value)
            return image

        return unchanged

    monkeypatch.setattr(baseline_images, "STRONG", {name: note(name) for name, _, _ in STRONG_OPERATIONS})
    baseline_images.RandomOperations(2000)(Image.new("RGB", (4, 4)))
    for name, low, high in STRONG_OPERATIONS:
        assert 80 < len(seen[name]) < 220
        assert low <= min(seen[name]) < low + 0.2 * (high - low)
        assert high >= max(seen[name]) > high - 0.2 * (high - low)


def test_cutout_boxes() -> None:
    sides = []
    for _ in range(300):
        hole = baseline_images.Cutout(6)(torch.ones(3, 12, 12))[0] == 0
        rows, columns = hole.any(dim=1).nonzero(), hole.any(dim=0).nonzero()
        assert int(hole.sum()) == len(rows) * len(columns)
        sides.append(max(len(rows), len(columns)))
    assert set(sides) >= {0, 2, 4, 6} and max(sides) == 6


def test_baseline_mining_finds_the_neighbours() -> None:
    pytest.importorskip("faiss")
    x = torch.nn.functional.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    similarity = x.double() @ x.double().T
    similarity.fill_diagonal_(-2)
    assert torch.equal(baseline.mine(x, 5), similarity.topk(5).indices)


def test_the_command_measures_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "result.json"
    words = [*SMALL, "--device", "cpu", "--images", "48", "--quick", "--json", str(file), "mining.k=5"]
    monkeypatch.setattr("sys.argv", ["end_to_end", *words])
    monkeypatch.setattr(end_to_end, "default_workers", lambda: 1)
    kept = []

    def last(*words: Any) -> dict[str, Any]:
        kept.extend(json.loads(file.read_text())["stages"])  # an interruption from here on loses no stage
        return family.run_family(*words)

    monkeypatch.setattr(end_to_end, "run_family", last)
    end_to_end.main()
    result = json.loads(file.read_text())
    assert kept == result["stages"]
    assert [entry["stage"] for entry in result["stages"]] == list(end_to_end.STAGES)
    for entry in result["stages"]:
        assert entry["ratio"] == pytest.approx(entry["baseline"]["seconds"] / entry["ours"]["seconds"])
        assert entry["images"] == (96 if entry["stage"] == "mining" else 48)
        if entry["stage"] != "mining":
            assert entry["loss_difference"] < 3e-2
            assert 0 < entry["ours"]["of_product_peak"] < 1.5
            assert 0 < entry["ours"]["of_pytorch_convolutions"] < 10
            assert 0 < entry["ours"]["of_convolutions"] < 1.5 and "of_convolutions" not in entry["baseline"]
            assert set(entry["ours"]["parts"]) == set(end_to_end.PARTS)
    assert "differ by" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="quick"):
        pages.load(tmp_path)
    # What the page and the targets make of it.
    file.write_text(json.dumps(result | {"quick": False}))
    pages.write(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"| **{result['stages'][0]['ratio']:.2f}** |" in page
    of_all = {target for of_kind in targets.STAGE_TARGETS.values() for target in of_kind}
    values = {target: target.value(result) for target in of_all}
    share = result["stages"][0]["ours"]["of_pytorch_convolutions"]
    assert values[targets.StageTarget("pretext", convolutions=0.9)] == share
    assert values[targets.StageTarget("pretext", times=4.0)] == result["stages"][0]["ratio"]
    # The search of a rehearsal is too small to be judged.
    search = targets.StageTarget("search", times=3.0)
    assert values[search] is None
    result["search"]["size"] = targets.SEARCH_SIZE
    speeds = {entry["name"]: entry["seconds"] for entry in result["search"]["contenders"]}
    assert search.value(result) == pytest.approx(speeds["faiss IndexFlatIP"] / speeds["scan-fast"])
    assert all(target.is_met(value) for target, value in values.items() if target.differ is not None)


@pytest.mark.parametrize("name", ["pretext", "selflabel"])
def test_the_convolutions_of_a_step_are_those_of_the_network(name: str, opened: tuple[Context, Images]) -> None:
    context, images = opened
    both = pair(name, context, images)
    alone = layers.convolutions_of_step(both.ours, context)
    flops = 0.0
    for call, count in alone.counts.items():
        layer = alone.layers[call]
        height, width = (-(-size // layer.stride[0]) for size in call.shape[-2:])  # the padding is that of "same"
        products = 2 * call.shape[0] * height * width * layer.weight.numel()
        flops += count * products * (1 + sum(call.gradients))
    # Beyond them, the network has the products of its heads.
    all_products = training_flops(both.baseline, images.splits.train.size) * both.ours.training.batch_size
    assert 0.97 * all_products < flops < all_products
    called = []

    def note(layer: Conv2d, x: Tensor) -> Tensor:
        called.append(layer)
        return torch.nn.Conv2d.forward(layer, x)

    with mock.patch.object(Conv2d, "forward", note):
        assert alone.seconds(1) > 0 and called
        called.clear()
        assert alone.seconds(1, pytorch=True) > 0 and not called


def test_stage_targets_are_missed_by_less_and_by_nothing() -> None:
    ours = {"of_pytorch_convolutions": 0.89}
    result = {"stages": [{"stage": "pretext", "ratio": 3.9, "losses": [[1.0, 1.1]], "ours": ours}]}
    near = targets.StageTarget("pretext", convolutions=0.9)
    for target in (targets.StageTarget("pretext", times=4.0), targets.StageTarget("pretext", differ=1e-5), near):
        assert not target.is_met(target.value(result))
        assert not target.is_met(target.value({"stages": []}))
    assert targets.StageTarget("pretext", times=3.9).is_met(3.9)
    assert near.value(result) == 0.89 and near.is_met(0.9) and not near.is_met(None)
    assert str(near) == "end_to_end pretext: PyTorch's convolutions alone take 90% of an epoch"
    # A result that is older than the figure.
    assert near.value({"stages": [{"stage": "pretext", "ours": {}}]}) is None
    assert not targets.StageTarget("search", times=1.0).is_met(targets.StageTarget("search", times=1.0).value(result))
