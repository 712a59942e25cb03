"""Files of weights from anyone: nothing of them runs, none takes more memory than it has bytes, no advice is unsafe."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import save_sealed
from hostile_files import Marker

from scan_fast.array_files import ObjectsError, read_npy, read_npz
from scan_fast.errors import ScanFastError, WeightsError
from scan_fast.models.backbones import ModelConfig, build_backbone
from scan_fast.models.heads import ClusterModel
from scan_fast.models.saved import SavedModel
from scan_fast.models.tensor_files import RefusedError, read_tensors
from scan_fast.models.weight_files import read_checkpoint
from scan_fast.predictor import Predictor
from scan_fast.runs.reading import load_arrays, load_tensors
from scan_fast.runs.records import Checkpoint, StageResult

HUGE = 1 << 60


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, file, **options)
    return file.getvalue()


def changed(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive with its members changed."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return result.getvalue()


def with_numel(content: bytes, old: int, new: int) -> bytes:
    """Return a file whose storage of ``old`` elements (below 2^16, above 255) is said to have ``new``."""
    stated = b"\x8a\x08" + new.to_bytes(8, "little") if new >= 1 << 31 else b"J" + struct.pack("<i", new)
    return content.replace(b"M" + struct.pack("<H", old), stated)


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """Let the process take only so many bytes of addresses more."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_sound_files_of_both_formats_are_read() -> None:
    content: dict[str, Any] = {
        "a": torch.arange(300.0),
        "b": torch.zeros(2, 3, dtype=torch.bfloat16),
        "view": torch.arange(12).view(3, 4)[:, 1:],
        "again": {"lr": 0.1, "names": ["x", None, True], "count": 1 << 40, (1, "x"): np.float64(3)},
        "ordered": OrderedDict(x=torch.nn.Parameter(torch.ones(2))),
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        found = read_tensors(io.BytesIO(saved(content, **options)))
        assert torch.equal(found["view"], content["view"]) and found["again"] == content["again"]
        assert torch.equal(found["ordered"]["x"], torch.ones(2)) and list(found) == list(content)


@pytest.mark.parametrize("new", [1000, 1 << 29, HUGE])
@pytest.mark.parametrize("older", [False, True])
def test_storages_that_do_not_fit_are_refused(new: int, older: bool) -> None:
    """torch.load reads beyond the end of such a member, or takes memory for all of it."""
    plain = saved({"a": torch.arange(300.0)}, _use_new_zipfile_serialization=not older)
    lying = with_numel(plain, 300, new) if older else changed(plain, lambda _, data: with_numel(data, 300, new))
    assert lying != plain
    with little_memory(), pytest.raises(ValueError, match=r"are said to|not from torch.save"):
        read_tensors(io.BytesIO(lying))


def test_archives_that_inflate_are_refused() -> None:
    plain = saved({"a": torch.zeros(1 << 20)})
    packed = changed(plain, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert len(packed) < len(plain) // 100
    with pytest.raises(ValueError, match=r"is compressed, and torch.save does not compress"):
        read_tensors(io.BytesIO(packed))


@pytest.mark.parametrize("shape", [(HUGE,), (1 << 20, 1 << 20)])
def test_tensors_that_repeat_their_elements_without_end_are_refused(shape: tuple[int, ...]) -> None:
    content = saved({"model": {"a": torch.zeros(()).expand(shape)}})
    for load in (read_tensors, load_tensors, StageResult.load):
        with pytest.raises(ValueError, match="its tensor 'a' has the shape"):
            load(io.BytesIO(content))
    torch.testing.assert_close(read_tensors(io.BytesIO(saved(torch.ones(1).expand(4)))), torch.ones(4))


def pickled(*parts: bytes) -> bytes:
    """Return an archive of torch.save with another pickle."""
    content = b"\x80\x02" + b"".join(parts) + b"."
    return changed(saved([]), lambda name, data: content if name.endswith("data.pkl") else data)


def test_values_that_take_memory_or_the_stack_are_refused() -> None:
    cases = {
        # 16 GiB of zero bytes from a hundred bytes of a file
        "bytearray": pickled(b"cbuiltins\nbytearray\n", b"\x8a\x05" + (1 << 34).to_bytes(5, "little"), b"\x85R"),
        # the hash of a deeply nested tuple
        "keys": pickled(b"}", b")" + b"\x85" * 100_000, b"K\x01s"),
        "nested": pickled(b")" + b"\x85" * 1_000),
        "type": pickled(b"cnumpy\ndtype\n", b"X\x0b\x00\x00\x00V2000000000", b"\x85R"),
    }
    for name, content in cases.items():
        with little_memory(), pytest.raises(ValueError, match=r"it holds|nested") as info:
            read_tensors(io.BytesIO(content))
        assert "weights_only" not in str(info.value), name


def test_no_refusal_of_a_load_advises_to_run_the_file(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    objects = saved({"format": 1, "model": Marker(marker)})
    older = saved({"model": Marker(marker)}, _use_new_zipfile_serialization=False)
    plain = pickle.dumps({"model": Marker(marker)}, protocol=2)
    loads: list[Callable[[Any], Any]] = [SavedModel.load, StageResult.load, Checkpoint.load, load_tensors, read_tensors]
    for content in (objects, older, plain):
        for load in loads:
            with pytest.raises(ValueError) as info:
                load(io.BytesIO(content))
            assert "it holds more than tensors and plain values (" in str(info.value)
            assert not {"weights_only", "add_safe_globals", "allowlist"} & set(str(info.value).split("=")[0].split())
            assert "weights_only" not in str(info.value) and "safe_globals" not in str(info.value)
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(WeightsError, match="was refused: it holds more than tensors") as refused:
            read_checkpoint(tmp_path / "file.pth")
        assert "weights_only" not in str(refused.value)
    assert not marker.exists()


def test_a_file_that_was_put_into_torchvisions_cache_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    place.parent.mkdir()
    marker = tmp_path / "executed"
    torch.save({"conv1.weight": Marker(marker)}, place)
    with pytest.raises(WeightsError, match="is not readable as the weights of torchvision:resnet18; remove it"):
        build_backbone(ModelConfig(backbone="torchvision:resnet18", pretrained=True))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["hf-hub:someone/net", "local-dir:/tmp/net", "resnet18.hf-hub:x", "../net", "a/b"])
def test_a_backbone_is_no_place_to_load_from(name: str) -> None:
    for library in ("timm", "torchvision"):
        with pytest.raises(ValueError, match="backbone must be the name of a network of the library"):
            ModelConfig(backbone=f"{library}:{name}")


# -- model.pt ----------------------------------------------------------------------------------------------------------


def model_content(**changes: Any) -> dict[str, Any]:
    """Return what model.pt holds, with changes; ``model`` is changed inside."""
    settings = ModelConfig(backbone="resnet_digits", width=0.25)
    content = {
        "format": 1,
        "stage": "selflabel",
        "model": settings.model_dump(mode="json") | changes.pop("model", {}),
        "n_clusters": 3,
        "size": 8,
        "view_size": 8,
        "crop": "image",
        "decode": "exact",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "state_dict": ClusterModel(settings, 3).state_dict(),
        "interpolation": "bilinear",
        "centers": torch.eye(3, 16),
        "least_similarity": torch.zeros(3),
    }
    return content | changes


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "resnet18-imagenet", "width": 1.0, "pretrained": True},
        {"backbone": "torchvision:resnet18", "width": 1.0, "pretrained": True},
        {"backbone": "dinov2-small", "width": 1.0, "pretrained": True},
        {"weights": "/etc/passwd"},
    ],
)
def test_loading_a_model_asks_for_nothing_else(settings: dict[str, Any], tmp_path: Path, no_network: None) -> None:
    """Neither a download nor another file: the weights are in the model.pt."""
    save_sealed(model_content(model=settings), tmp_path / "model.pt")
    try:
        predictor = Predictor.load(tmp_path / "model.pt")
    except WeightsError as error:
        assert "do not fit" in str(error) or "cannot be built" in str(error)
        assert settings.get("pretrained")
    else:
        assert predictor.saved.model.weights is None
        again: Predictor = pickle.loads(pickle.dumps(predictor))
        assert again.n_clusters == 3


def test_a_pickled_predictor_asks_for_nothing_else(no_network: None) -> None:
    content = SavedModel.load(io.BytesIO(saved(model_content())))
    forged = ModelConfig(backbone="resnet_digits", width=0.25, weights=Path("/etc/passwd"))
    predictor = Predictor(content)
    object.__setattr__(predictor.saved, "model", forged)
    assert pickle.loads(pickle.dumps(predictor)).n_clusters == 3


WRONG: dict[str, Any] = {
    "stage": [None, 3, torch.zeros(1), "x" * 1000],
    "model": [{"width": 1e9}, {"width": float("nan")}, {"backbone": 3}, {"backbone": "timm:hf-hub:a/b"}],
    "n_clusters": [10**9, -1, True, "3", 3.0, None, torch.tensor(3), 1 << 200],
    "size": [10**7, 0, "8", None, 1 << 70],
    "view_size": [10**7, 0, [8], 1 << 70],
    "crop": ["none", 3, ["image"]],
    "decode": ["none", {}],
    "mean": [(0.5, 0.5), (0.5, 0.5, "x"), (0.5, 0.5, float("inf")), None, torch.zeros(3)],
    "std": [(0.2, 0.2, 0.0), (0.2, 0.2, float("nan")), 3],
    "state_dict": [None, {}, {"a": 1}, {1: torch.zeros(1)}, [torch.zeros(1)]],
    "interpolation": ["nearest", 0],
    "centers": [torch.eye(2, 16), torch.zeros(3), "x", torch.full((3, 16), float("nan")), torch.eye(3, 16).to_sparse()],
    "least_similarity": [torch.zeros(2), None, 1, torch.zeros(3, dtype=torch.int64)],
    "format": [torch.ones(2), "1", None, [1]],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_model_with_wrong_fields_is_one_line(field: str, tmp_path: Path) -> None:
    for value in WRONG[field]:
        save_sealed(model_content(**{field: value}), tmp_path / "model.pt")
        with little_memory(), pytest.raises(ScanFastError, match=r"model\.pt") as info:
            Predictor.load(tmp_path / "model.pt")
        assert len(str(info.value)) < 1000 and "\n" not in str(info.value), value


def test_a_network_that_its_weights_do_not_fill_is_not_built(tmp_path: Path) -> None:
    """The settings ask for gigabytes or more, the file has a few kilobytes."""
    for settings in (
        {"backbone": "resnet18_cifar", "width": 16},
        {"cluster_head": "mlp", "cluster_hidden_dim": 10**11},
        {"cluster_head": "mlp", "cluster_hidden_dim": 1 << 70},
    ):
        content = model_content(model=settings, n_clusters=1_000_000)
        del content["centers"], content["least_similarity"]
        save_sealed(content, tmp_path / "model.pt")
        with little_memory(), pytest.raises(WeightsError, match=r"do not fit|cannot be built|must be below"):
            Predictor.load(tmp_path / "model.pt")
    for entry in (torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)):
        content = model_content()
        content["state_dict"]["cluster_head.0.bias"] = entry
        save_sealed(content, tmp_path / "model.pt")
        with pytest.raises(WeightsError, match="1 entries that are not plain real numbers"):
            Predictor.load(tmp_path / "model.pt")


# -- NumPy -------------------------------------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], dtype: str = "<f8", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def npz(compression: int = zipfile.ZIP_STORED, **members: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    file.seek(0)
    return file


@pytest.mark.parametrize("shape", [(HUGE,), (1 << 40, 1 << 40), (3,), (-1,)])
def test_arrays_whose_shape_does_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with little_memory(), pytest.raises(ValueError, match=r"is said to hold an array|no array of numbers"):
        read_npy(io.BytesIO(npy(shape)))
    with little_memory(), pytest.raises(ValueError, match=r"it is no .npz of arrays: it is"):
        load_arrays(npz(a=npy(shape)))


def test_arrays_that_inflate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = npy((1 << 20,), "|u1", bytes(1 << 20))
    assert read_npz(npz(zipfile.ZIP_DEFLATED, a=zeros))["a"].shape == (1 << 20,)  # little is permitted in any case
    monkeypatch.setattr("scan_fast.array_files.ALWAYS", 0)
    with pytest.raises(ValueError, match=r"its arrays are said to have \d+ bytes, \d{3} times its size"):
        read_npz(npz(zipfile.ZIP_DEFLATED, a=zeros))
    noise = np.random.default_rng(0).integers(0, 4, 1 << 16).astype(np.uint8)
    assert np.array_equal(read_npz(npz(zipfile.ZIP_DEFLATED, a=npy((1 << 16,), "|u1", noise.tobytes())))["a"], noise)


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    content = npy((1,), "|O", pickle.dumps(Marker(marker)))
    for load in (lambda: read_npy(io.BytesIO(content)), lambda: read_npz(npz(a=content))):
        with pytest.raises(ObjectsError, match="it holds Python objects"):
            load()
    assert not marker.exists()


def test_the_refusal_is_an_error_of_its_own() -> None:
    with pytest.raises(RefusedError):
        read_tensors(io.BytesIO(saved({"a": json.JSONDecoder})))
