"""Files of weights for any backbone: every wrapping loads all of it, and anything else is refused."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scan_fast.errors import WeightsError
from scan_fast.models.backbones import ModelConfig, build_backbone
from scan_fast.models.heads import ClusterModel, PretextModel
from scan_fast.models.pretrained import prepare_weights, weights_digest, weights_origin
from scan_fast.models.weight_files import load_weight_file, read_checkpoint

timm = pytest.importorskip("timm")
safetensors_torch = pytest.importorskip("safetensors.torch")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network of timm with its classifier and batch statistics that no new network has."""
    torch.manual_seed(1)
    model: nn.Module = timm.create_model("test_resnet", num_classes=7)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


def features(model: Any, images: Tensor) -> Tensor:
    """Return what timm's network gives without its classifier."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def projector(prefix: str = "") -> State:
    return {f"{prefix}projector.0.weight": torch.randn(4, 4), f"{prefix}projector.0.bias": torch.randn(4)}


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "without counters": lambda s: {n: v for n, v in s.items() if not n.endswith("num_batches_tracked")},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},
    "model_state": lambda s: {"model_state": prefixed(s, "_orig_mod.module.")},
    "nested": lambda s: {"checkpoint": {"net": prefixed(s, "trunk.")}},
    "module": lambda s: prefixed(s, "module."),
    "backbone and projector": lambda s: {"model": {**prefixed(s, "module.backbone."), **projector("module.")}},
    "encoder": lambda s: prefixed(s, "encoder."),
    "own prefix": lambda s: prefixed(s, "anything.inside."),
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "teacher": lambda s: {
        "student": prefixed(zeros(s), "backbone."),
        "teacher": {**prefixed(s, "backbone."), "head.mlp.0.weight": torch.randn(2, 2)},
    },
    "ema": lambda s: {"model": zeros(s), "model_ema": s},
    "moco": lambda s: {
        "state_dict": {
            **prefixed(s, "module.encoder_q."),
            **prefixed(zeros(s), "module.encoder_k."),
            "module.queue": torch.randn(3, 3),
            "module.queue_ptr": torch.zeros(1),
        }
    },
    "half precision": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_of_a_state_dict_loads(wrapping: str, network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](network.state_dict()), file)
    config = ModelConfig(backbone="timm:test_resnet", weights=file)
    left_out = prepare_weights(config)
    assert any(name.endswith("fc") for name in left_out), left_out
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        found = build_backbone(config).eval()(images)
    tolerance = 0.02 if wrapping == "half precision" else 0.0
    torch.testing.assert_close(found, features(network, images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_recognised_by_their_content(suffix: str, network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    safetensors_torch.save_file(network.state_dict(), file)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        found = build_backbone(ModelConfig(backbone="timm:test_resnet", weights=file)).eval()(images)
    torch.testing.assert_close(found, features(network, images), rtol=0, atol=0)


def test_the_older_format_of_torch_save_loads(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth.tar"
    torch.save({"state_dict": network.state_dict()}, file, _use_new_zipfile_serialization=False)
    assert prepare_weights(ModelConfig(backbone="timm:test_resnet", weights=file)) == ["fc"]


def test_torchvisions_and_the_projects_own_networks_load(tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v3_small

    whole = mobilenet_v3_small().eval()
    torch.save(whole.state_dict(), tmp_path / "mobilenet.pth")
    config = ModelConfig(backbone="torchvision:mobilenet_v3_small", weights=tmp_path / "mobilenet.pth")
    assert prepare_weights(config) == ["classifier.3"]  # classifier.0 stays, as a part of the backbone
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(whole.classifier[3](build_backbone(config).eval()(images)), whole(images))
    own = ModelConfig(backbone="resnet18_cifar", width=0.125)
    for number, model in enumerate((PretextModel(own), ClusterModel(own, 3, 2))):
        file = tmp_path / f"own{number}.pt"
        torch.save({"model": model.state_dict(), "head": 1}, file)
        filled = build_backbone(own.model_copy(update={"weights": file}))
        for name, value in filled.state_dict().items():
            assert torch.equal(value, model.state_dict()[f"backbone.{name}"]), name


def test_names_of_efficientnet_pytorch_are_those_of_timm_in_order(tmp_path: Path) -> None:
    """The blocks are counted through there and grouped by stage here; both hold their entries in the same order."""
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_b0"):
        torch.manual_seed(2)
        whole = timm.create_model(name)
        stages = [f"blocks.{i}.{j}." for i, stage in enumerate(whole.blocks) for j in range(len(stage))]
        renamed: State = {}
        for entry, value in whole.state_dict().items():
            place = next((place for place in stages if entry.startswith(place)), None)
            if place is None:
                top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
                first, _, rest = entry.partition(".")
                renamed[f"{top.get(first, '_fc')}.{rest}"] = value
                continue
            inside, _, rest = entry.removeprefix(place).partition(".")
            first_stage = place.startswith("blocks.0.")
            table = {
                "conv_pw": "_project_conv" if first_stage else "_expand_conv",
                "bn1": "_bn1" if first_stage else "_bn0",
                "conv_dw": "_depthwise_conv",
                "bn2": "_bn2" if first_stage else "_bn1",
                "conv_pwl": "_project_conv",
                "bn3": "_bn2",
                "se": "_se",
            }
            new = f"_blocks.{stages.index(place)}.{table[inside]}.{rest}"
            renamed[new.replace("._se.conv_", "._se_")] = value
        assert len(renamed) == len(whole.state_dict())
        torch.save(renamed, tmp_path / f"{name}.pth")
        config = ModelConfig(backbone=f"timm:{name}", weights=tmp_path / f"{name}.pth")
        assert prepare_weights(config) == ["classifier"]
        for entry, value in build_backbone(config).state_dict().items():
            assert torch.equal(value, whole.state_dict()[entry]), entry


def test_position_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    """The official DINOv2 files have positions for 518 pixels and a mask token, which only its training needs."""
    name = "vit_small_patch14_dinov2.lvd142m"
    small = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    torch.manual_seed(3)
    official = timm.create_model(name, num_classes=0, **small).state_dict()
    assert official["pos_embed"].shape[1] == 37 * 37 + 1
    module = timm.create_model(name, num_classes=0, img_size=224, **small).eval()
    timms = timm.create_model(
        name, num_classes=0, img_size=224, pretrained=True, pretrained_cfg_overlay={"state_dict": official}, **small
    ).eval()
    torch.save({**official, "mask_token": torch.zeros(1, 48)}, tmp_path / "dinov2.pth")
    load_weight_file(module, tmp_path / "dinov2.pth", f"timm:{name}")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(module(images), timms(images), rtol=0, atol=0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(file: Path, backbone: str = "timm:test_resnet") -> str:
    """Return the message of the refusal, before and while a network is built."""
    config = ModelConfig(backbone=backbone, weights=file)
    with pytest.raises(WeightsError) as early:
        prepare_weights(config)
    with pytest.raises(WeightsError) as late:
        build_backbone(config)
    assert str(early.value).startswith(str(late.value))
    assert "\n" not in str(early.value)
    return str(early.value)


def test_another_network_is_named(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "r18.pth")
    message = refusal(tmp_path / "r18.pth")
    assert "does not hold the weights of timm:test_resnet" in message and "of its" in message and "missing" in message
    assert message.endswith("they fit resnet18-imagenet: set model.backbone=resnet18-imagenet")


def test_an_incomplete_file_is_refused(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    lacking = [name for name in state if not name.endswith("num_batches_tracked")][5]
    torch.save({name: value for name, value in state.items() if name != lacking}, tmp_path / "less.pth")
    assert f"1 missing ({lacking})" in refusal(tmp_path / "less.pth")
    names = list(state)
    torch.save({name: state[name] for name in names[: len(names) // 2]}, tmp_path / "half.pth")
    message = refusal(tmp_path / "half.pth")
    assert f"{len(names) // 2} of its {len(names) - 2} entries fit" in message, message  # two are the classifier's


def test_entries_of_another_shape_or_unknown_names_are_refused(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    first = next(iter(state))
    torch.save({**state, first: state[first][:1]}, tmp_path / "shape.pth")
    assert f"1 of another shape ({first}: " in refusal(tmp_path / "shape.pth")
    torch.save({**state, "layer9.weight": torch.zeros(1)}, tmp_path / "more.pth")
    assert "1 unknown (layer9.weight)" in refusal(tmp_path / "more.pth")
    # A name of a classifier within a module that the backbone has is a difference as well.
    torch.save({**state, "layer1.head.weight": torch.zeros(1)}, tmp_path / "inside.pth")
    assert "1 unknown (layer1.head.weight)" in refusal(tmp_path / "inside.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float, network: nn.Module, tmp_path: Path) -> None:
    state = {name: entry.clone() for name, entry in network.state_dict().items()}
    state["conv1.0.weight"].view(-1)[0] = value
    torch.save(state, tmp_path / "nan.pth")
    assert "1 entries are not finite (conv1.0.weight)" in refusal(tmp_path / "nan.pth")


def test_files_of_another_kind_are_refused(network: nn.Module, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pth") == f"there is no weight file {tmp_path / 'none.pth'}"
    assert "there is no weight file" in refusal(tmp_path)
    (tmp_path / "text.pth").write_text("these are no weights\n")
    assert "text.pth" in refusal(tmp_path / "text.pth")
    (tmp_path / "empty.pth").touch()
    assert "empty.pth is not a readable weight file" in refusal(tmp_path / "empty.pth")
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "plain.pth")
    assert "plain.pth holds no weights" in refusal(tmp_path / "plain.pth")
    torch.save(network, tmp_path / "module.pth")
    assert "it holds more than tensors and plain values" in refusal(tmp_path / "module.pth")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    safetensors_torch.save_file(network.state_dict(), whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    assert "cut.safetensors is not a readable weight file" in refusal(cut)
    torch.save(network.state_dict(), tmp_path / "zip.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "zip.pth").read_bytes()[:-2000])
    assert "cut.pth is not a readable weight file" in refusal(tmp_path / "cut.pth")


class Runs:
    """An object that runs a command when it is unpickled."""

    def __init__(self, function: Any, argument: str) -> None:
        self.content = function, (argument,)

    def __reduce__(self) -> Any:
        return self.content


def archive(path: Path, kind: str, content: bytes) -> Path:
    """Write an archive with one file in it, or what PyTorch 0.1 wrote."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("notes.txt", content)
    else:
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def test_every_refusal_names_the_kind_of_file_and_never_advises_to_run_it(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    evil, evaluated = Runs(os.system, f"touch {proof}"), Runs(eval, f"open({str(proof)!r}, 'w')")
    whole = io.BytesIO()
    torch.save({"w": torch.zeros(9)}, whole)
    cases: list[tuple[str, Path]] = [
        ("it is a tar archive; extract", archive(tmp_path / "tar", "tar", pickle.dumps(evil, 2))),
        ("a zip archive that torch.save did not write", archive(tmp_path / "zip", "zip", b"x")),
    ]

    def add(message: str, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        cases.append((message, tmp_path / name))

    for number, (content, name) in enumerate(((evil, f"{os.system.__module__}.system"), (evaluated, "eval"))):
        for legacy in (False, True):
            saved = io.BytesIO()
            torch.save({"a": torch.zeros(1), "b": [content]}, saved, _use_new_zipfile_serialization=not legacy)
            add(rf"it holds more than tensors and plain values \({name}\)", f"e{number}{legacy}", saved.getvalue())
        for protocol in range(6):
            message = r"more than tensors and plain values \(" if protocol < 4 else "in another pickle protocol than 2"
            add(message, f"p{number}{protocol}", pickle.dumps(content, protocol))
    arrays = io.BytesIO()
    np.save(arrays, np.array([evil], dtype=object), allow_pickle=True)
    add(r"it is a NumPy array \(\.npy\)", "objects", arrays.getvalue())
    arrays = io.BytesIO()
    np.savez(arrays, a=np.zeros(3))
    add(r"an archive of NumPy arrays \(\.npz\)", "arrays", arrays.getvalue())
    add("it is empty", "nothing", b"")
    add("it is a web page, which the server sent", "page", b"\n<!DOCTYPE html><html><title>Virus scan warning</title>")
    add("it is compressed; unpack it", "packed", gzip.compress(whole.getvalue()))
    add("it is cut off or damaged; download", "half", whole.getvalue()[:-40])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script")
    cases.append(("it is a TorchScript archive, which holds code", tmp_path / "script"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing beside the refusal
        for message, path in cases:
            text = refusal(path)
            assert re.search(message, text), text
            assert not re.search(r"weights_only|safe_globals|trust|\n", text), text
    assert not proof.exists()


def test_every_damaged_file_is_refused_in_words(tmp_path: Path) -> None:
    """Torch raises struct.error, AssertionError and others for some of them."""
    for legacy in (False, True):
        saved = io.BytesIO()
        state = {"w": torch.zeros(2), "b": np.float64(0)}
        torch.save(state, saved, _use_new_zipfile_serialization=not legacy)
        data, path = saved.getvalue(), tmp_path / "cut"
        for end in range(0, len(data), 9):
            path.write_bytes(data[:end])
            with pytest.raises(WeightsError, match=r"is not a readable weight file: |was refused: "):
                read_checkpoint(path)
        if legacy:  # the numbers at the end show no damage
            for place in range(0, len(data) - 40, 3):
                path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
                try:
                    read_checkpoint(path)
                except WeightsError as error:
                    assert re.search("is not a readable weight file|was refused", str(error))
                    assert "safe_globals" not in str(error)


def test_entries_that_are_not_plain_numbers_are_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    weight = network.state_dict()["0.weight"]
    for changed in (weight.to_sparse(), weight.to(torch.complex64), weight.to("meta")):
        torch.save({"0.weight": changed, "0.bias": torch.zeros(2)}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=r"1 entries that are not plain real numbers \(0\.weight\)"):
            load_weight_file(network, tmp_path / "w.pth", "a linear layer")


def test_a_refused_file_leaves_the_network_as_it_was(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save({**state, "layer9.weight": torch.zeros(1)}, tmp_path / "more.pth")
    module = build_backbone(ModelConfig(backbone="timm:test_resnet"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(WeightsError):
        load_weight_file(module, tmp_path / "more.pth", "timm:test_resnet")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "timm:resnet18", "pretrained": True}, "takes the place of pretrained=true"),
        ({"backbone": "auto"}, "needs the backbone that they are of"),
    ],
)
def test_settings_that_contradict_a_file_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(weights=Path("a.pth"), **settings)


def test_the_path_is_absolute_and_the_digest_is_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(backbone="resnet18_cifar", weights=Path("w.pth"))
    assert config.weights == tmp_path / "w.pth" and weights_origin(config) == str(tmp_path / "w.pth")
    assert weights_digest(config) is None
    (tmp_path / "w.pth").write_bytes(b"one")
    first = weights_digest(config)
    assert first is not None and len(first) == 32
    (tmp_path / "w.pth").write_bytes(b"other")
    assert weights_digest(config) not in (None, first)
    assert config.from_scratch().weights is None and weights_digest(config.from_scratch()) is None
