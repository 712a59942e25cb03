"""Short names of pretrained backbones, published weights without a network, and the images that weights expect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import TINY, TINY_FOLDER, fill, left_out, opened, run_here, summary
from PIL import Image
from torch import nn

from scan_fast.errors import ConfigError, WeightsError
from scan_fast.info import collect, render
from scan_fast.models.backbones import ModelConfig, build_backbone, check_image_size, multiply_adds
from scan_fast.models.downloads import published_weights
from scan_fast.models.pretrained import (
    can_fetch,
    prepare_weights,
    pretrained_input,
    weights_at_hand,
    weights_digest,
    weights_licence,
)
from scan_fast.models.published import PUBLISHED
from scan_fast.models.saved import SavedModel
from scan_fast.predictor import Predictor
from scan_fast.runs.config import find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.training.context import open_context

timm = pytest.importorskip("timm")

FROZEN = (
    "pretext.method=none",
    "mining.features=backbone",
    "clustering.update=heads",
    "clustering.epochs=1",
    "clustering.heads=1",
    "evaluation.batch_size=16",
    "selflabel=null",
)
"""The shortest run from finished weights."""


def written(name: str, file: Path, **options: Any) -> nn.Module:
    """Save a new network of timm with its classifier, as if it was published."""
    torch.manual_seed(4)
    model: nn.Module = timm.create_model(name, **options)
    torch.save(model.state_dict(), file)
    return model.eval()


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_states_what_the_networks_are(name: str) -> None:
    entry = PUBLISHED[name]
    config = ModelConfig(backbone=name).for_images(entry.side)
    settings = timm.models.get_pretrained_cfg(entry.backbone.removeprefix("timm:"))
    with torch.device("meta"):
        backbone = build_backbone(config.from_scratch())
        whole = timm.create_model(entry.backbone.removeprefix("timm:"), num_classes=settings.num_classes)
    assert backbone.out_features == entry.features
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(entry.parameters, abs=0.05)
    assert multiply_adds(config, entry.side) / 1e9 == pytest.approx(entry.multiply_adds, abs=0.005)
    # Files hold the classifier as well, in four bytes a number.
    entries = whole.state_dict().values()
    assert 4 * sum(value.numel() for value in entries) / 1e6 == pytest.approx(entry.download, abs=0.6)
    assert entry.licence.lower() == settings.license == weights_licence(config).lower()  # type: ignore[union-attr]
    expected = pretrained_input(config)
    assert expected is not None and expected.size == entry.side
    assert expected.mean == settings.mean and expected.interpolation == settings.interpolation
    assert published_weights(config.network).repository == settings.hf_hub_id  # type: ignore[union-attr]
    check_image_size(config, entry.side)


def test_a_short_name_means_its_published_weights_unless_told_otherwise() -> None:
    config = ModelConfig(backbone="dinov2-small")
    assert config.pretrained is True and config.has_weights
    assert config.network == "timm:vit_small_patch14_dinov2.lvd142m"
    assert ModelConfig(backbone="dinov2-small", pretrained=False).pretrained is False
    assert ModelConfig(backbone="dinov2-small", weights=Path("a.pth")).pretrained is False
    assert ModelConfig(backbone="timm:resnet18").pretrained is False
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
    # A network that this run has trained is built again without asking for weights.
    assert ModelConfig.model_validate(config.from_scratch().model_dump(mode="json")).has_weights is False


def test_the_nearest_name_is_offered_and_all_are_listed() -> None:
    with pytest.raises(ValueError, match="did you mean 'dinov2-small'") as error:
        ModelConfig(backbone="dinov2-smal")
    docstring, page = str(ModelConfig.__doc__), render(collect())
    for name, entry in PUBLISHED.items():
        assert name in str(error.value) and f"``{name}``" in docstring
        assert f"{name} " in page and entry.licence in page


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `") and "`timm:" in line]
    assert rows == [
        f"| `{name}` | `{e.backbone}` | {e.side} | {e.features} | {e.multiply_adds:.2f} G | {e.parameters:.1f} M | "
        f"{e.download} MB | {e.licence} | {e.training} |"
        for name, e in PUBLISHED.items()
    ]


def test_a_network_with_positions_is_built_for_the_images() -> None:
    config = ModelConfig(backbone="timm:vit_tiny_patch16_224").for_images(96)
    assert config.image_size == 96
    with torch.device("meta"):
        assert build_backbone(config).state_dict()["pos_embed"].shape[1] == 6 * 6 + 1
    check_image_size(config, 96)
    check_image_size(config, 64)  # other views than the ones it is built for
    with pytest.raises(ConfigError, match="does not take images of 100 x 100 pixels"):
        check_image_size(ModelConfig(backbone="timm:vit_tiny_patch16_224").for_images(100), 100)
    assert ModelConfig(backbone="timm:resnet18").for_images(96).image_size is None
    assert ModelConfig(backbone="resnet18_cifar").for_images(96).image_size is None


# -- published files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches that are empty and servers that do not answer; return the folder of files that are put there by hand."""
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("backbone", ["timm:test_resnet.r160_in1k", "torchvision:resnet18", "efficientnet-lite0"])
def test_without_a_network_the_end_is_quick(backbone: str, offline: Path) -> None:
    config = ModelConfig(backbone=backbone, pretrained=True)
    begin = time.monotonic()
    assert weights_at_hand(config) is None and weights_digest(config) is None
    assert can_fetch(config) is False
    with pytest.raises(WeightsError) as error:
        prepare_weights(config)
    assert time.monotonic() - begin < 8
    message = str(error.value)
    assert f"model.backbone={backbone}: the weights" in message and "was not reached" in message
    assert "give model.weights=FILE" in message and str(offline) in message and "model.pretrained=false" in message


def test_a_file_put_there_by_hand_is_taken_without_a_network(offline: Path, tmp_path: Path) -> None:
    offline.mkdir(parents=True)
    config = ModelConfig(backbone="timm:test_resnet.r160_in1k", pretrained=True)
    download = published_weights(config.network)
    assert download is not None
    torch.manual_seed(5)
    model = timm.create_model("test_resnet").eval()
    from safetensors.torch import save_file

    save_file(model.state_dict(), download.place)
    assert weights_at_hand(config) == str(download.place) and weights_digest(config) is not None
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        found = build_backbone(config).eval()(images)
        torch.testing.assert_close(found, model.forward_head(model.forward_features(images), pre_logits=True))
    download.place.write_bytes(download.place.read_bytes()[:1000])
    with pytest.raises(
        WeightsError, match=r"is not readable as the weights of timm:test_resnet\.r160_in1k .*remove it"
    ):
        build_backbone(config)


def test_torchvisions_file_is_taken_from_its_cache(offline: Path) -> None:
    from torchvision.models import resnet18

    offline.mkdir(parents=True)
    config = ModelConfig(backbone="torchvision:resnet18", pretrained=True)
    download = published_weights(config.network)
    assert download is not None and download.place == offline / "resnet18-f37072fd.pth"
    whole = resnet18()
    torch.save(whole.state_dict(), download.place)
    assert torch.equal(build_backbone(config).state_dict()["conv1.weight"], whole.conv1.weight)
    download.place.write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="is not readable as the weights of torchvision:resnet18; remove it"):
        build_backbone(config)


def test_the_command_line_without_a_network_ends_with_one_line(tmp_path: Path) -> None:
    fill(tmp_path / "photos", 12)
    closed = "http://127.0.0.1:9"
    settings = {"HF_ENDPOINT": closed, "HTTPS_PROXY": closed, "HTTP_PROXY": closed, "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "torch")}
    words = ["run", "--data", str(tmp_path / "photos"), "--clusters", "2", "model.backbone=dinov2-small"]
    code = (
        "import sys, time; import scan_fast.stages.pipeline; from scan_fast.cli import main; t = time.monotonic();"
        f"code = main({[*words, '--out', str(tmp_path / 'run')]!r}); print(time.monotonic() - t); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 10
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "timm/vit_small_patch14_dinov2.lvd142m of the Hugging Face Hub" in lines[0], lines


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "crop"),
    [
        ("tf_efficientnet_lite0", "image"),  # bicubic
        ("resnet18.tv_in1k", "image"),  # bilinear
        ("test_vit.r160_in1k", "image"),  # another share is cut out
        ("tf_efficientnet_lite0", "file"),
        ("resnet18.tv_in1k", "file"),
    ],
)
def test_a_view_is_the_weights_own_transform_of_a_square_image(name: str, crop: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    written(name, file)
    pictures = []
    for number in range(12):
        y, x = np.mgrid[:320, :320]
        waves = [np.sin(x / (3 + number)) + np.cos(y / 5), np.sin((x + y) / 9), np.cos(x * y / 900)]
        pixels = np.stack([(wave - wave.min()) / np.ptp(wave) * 255 for wave in waves], axis=-1).astype(np.uint8)
        pictures.append(Image.fromarray(pixels))
    fill(tmp_path / "photos", 12, make=lambda number: pictures[number])
    words = (
        *TINY_FOLDER,
        f"data.root={tmp_path / 'photos'}",
        "data.image_size=null",
        f"data.crop={crop}",
        "data.test_fraction=0.3",
    )
    config = load_config(
        find_config("folder"),
        [
            *(word for word in words if not word.startswith("model.")),
            f"model={{backbone: 'timm:{name}', weights: '{file}'}}",
            "clustering.n_clusters=2",
        ],
    )
    run = RunFolder.open(tmp_path / "run", config)
    with run:
        context = open_context(config, run, Tracker(run, quiet=True))
        source = context.splits.train
        views = context.views_of(source, "evaluation")
        indices = torch.arange(len(source))
        found = views.render([(context.plain_view, 0)], indices, epoch=0)[0]
    settings = timm.models.get_pretrained_cfg(name)
    side = settings.input_size[-1]
    assert found.shape == (len(source), 3, side, side)
    transform = timm.data.create_transform(
        (3, side, side),
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        crop_pct=settings.crop_pct,
    )
    std = torch.tensor(settings.std).view(3, 1, 1)
    for row, path in enumerate(source.paths):
        expected = transform(Image.open(tmp_path / "photos" / path))
        difference = ((found[row] - expected) * std * 255).abs()  # in pixel values
        if crop == "file":  # the box ends at the pixels that timm's filter sees beyond it
            difference = difference[:, 3:-3, 3:-3]
        # Whole pixel values between a resize and a cut are rounded once more than those of one step.
        assert difference.max() < 1.01 and difference.mean() < 0.01, (difference.max(), difference.mean())


@pytest.mark.parametrize(("before", "after"), [(8, 40), (40, 24)])
def test_bicubic_squares_are_pils(before: int, after: int, tmp_path: Path) -> None:
    from scan_fast.data.datasets import DataConfig, source_from

    pixels = torch.randint(0, 256, (5, before, before, 3), dtype=torch.uint8)
    source = source_from(pixels, DataConfig(image_size=after, interpolation="bicubic"))
    assert source.size == after
    found = source.read(torch.arange(5)).int()
    for row in range(5):
        image = Image.fromarray(pixels[row].numpy()).resize((after, after), Image.Resampling.BICUBIC)
        assert (found[row] - torch.from_numpy(np.array(image)).int()).abs().max() <= 2
    # Files go through PIL itself.
    fill(tmp_path, 2, make=lambda row: Image.fromarray(pixels[row].numpy()))
    files = source_from(tmp_path, DataConfig(image_size=after, interpolation="bicubic"))
    for row in range(2):
        image = Image.fromarray(pixels[row].numpy()).resize((after, after), Image.Resampling.BICUBIC)
        assert np.array_equal(files.read(torch.tensor([row]))[0].numpy(), np.array(image))


def test_a_data_set_of_small_images_is_enlarged_for_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    written("test_vit.r160_in1k", file)
    model = f"model={{backbone: 'timm:test_vit', weights: '{file}', width: 1}}"
    with opened(tmp_path / "run", model) as context:
        assert (context.splits.train.size, context.side, context.model_config.image_size) == (168, 160, 160)
        assert context.plain_view.side == 160
        assert context.splits.train.source.images.shape[1] == 8  # type: ignore[attr-defined]
        assert context.splits.train.read(torch.tensor([3])).shape == (1, 168, 168, 3)
    with opened(tmp_path / "chosen", model, "data.image_size=96") as context:
        assert (context.splits.train.size, context.side, context.model_config.image_size) == (96, 96, 96)


# -- runs --------------------------------------------------------------------------------------------------------------


def words_of(file: Path, out: Path) -> list[str]:
    tiny = left_out(TINY, "model.", "pretext.", "selflabel.", "clustering.", "data.limit")
    model = f"model={{backbone: 'timm:test_resnet.r160_in1k', weights: '{file}', width: 1}}"
    return ["run", "digits", *tiny, "data.limit=60", *FROZEN, model, "--out", str(out)]


def test_a_run_from_a_file_notes_its_weights_and_refuses_others(tmp_path: Path) -> None:
    file, out = tmp_path / "weights.pth", tmp_path / "run"
    written("test_resnet.r160_in1k", file)
    words = words_of(file, out)
    first = run_here(words[0], words[1], *words[2:])
    assert first.code == 0, first.err
    line = next(line for line in first.out.splitlines() if line.startswith("backbone: "))
    assert f"timm:test_resnet.r160_in1k with weights of {file}, 160 x 160 pixels, bilinear, " in line
    assert "auto" not in line and f"left out of {file}: fc" in first.out
    noted = summary(out)["backbone"]
    assert noted == json.loads((out / "backbone.json").read_text())
    assert noted["network"] == "timm:test_resnet.r160_in1k" and noted["image_size"] == 160
    assert noted["weights"] == str(file) and len(noted["digest"]) == 32 and noted["interpolation"] == "bilinear"
    assert noted["mean"] == list(timm.models.get_pretrained_cfg("test_resnet.r160_in1k").mean)

    # The finished model needs the file no more, and is applied to images as it was trained.
    moved = file.rename(tmp_path / "moved.pth")
    predictor = Predictor.load(out)
    assert predictor.saved.interpolation == "bilinear" and predictor.saved.view_size == 160
    assert predictor.saved.model.weights is None
    assert run_here("evaluate", out, "--json").code == 0
    assert run_here("cluster", out, "--again").code == 0

    written("test_resnet.r160_in1k", file)
    with torch.no_grad():
        state = torch.load(moved, weights_only=True)
        state["conv1.0.weight"] += 1
    torch.save(state, file)
    message = run_here("cluster", out, "--again").refusal()
    assert "was begun with other weights" in message and "restore the file" in message
    assert run_here("run", out, "--again").code == 0
    assert summary(out)["backbone"]["digest"] != noted["digest"]


def test_a_missing_file_is_refused_before_images_are_read(tmp_path: Path) -> None:
    words = words_of(tmp_path / "none.pth", tmp_path / "run")
    words = [word if word != "digits" else "folder" for word in words] + [
        f"data.root={tmp_path / 'nowhere'}",
        "clustering.objective.prior=uniform",
    ]
    assert "there is no weight file" in run_here(*words).refusal()


def test_a_saved_model_of_before_the_filter_was_noted_still_loads(tmp_path: Path) -> None:
    from scan_fast.models.heads import ClusterModel

    config = ModelConfig(backbone="resnet_digits", width=0.25)
    state = ClusterModel(config, 2).state_dict()
    saved = SavedModel("clustering", config, 2, 8, 8, "image", "exact", (0.5,) * 3, (0.5,) * 3, state)
    with (tmp_path / "model.pt").open("wb") as file:
        saved.dump(file)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content["interpolation"]
    torch.save(content, tmp_path / "model.pt")
    with (tmp_path / "model.pt").open("rb") as file:
        assert SavedModel.load(file).interpolation == "bilinear"
    del content["size"]
    torch.save(content, tmp_path / "model.pt")
    with (tmp_path / "model.pt").open("rb") as file, pytest.raises(ValueError, match="it lacks size"):
        SavedModel.load(file)
