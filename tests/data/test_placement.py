"""Placement of decoded images, and the rules of `auto`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image

from scan_fast.data import (
    DataConfig,
    FileSource,
    ImagePaths,
    SubsetSource,
    TensorSource,
    open_splits,
    placement,
)
from scan_fast.data.placement import free_memory, image_bytes, kept_on_host, move_to_device
from scan_fast.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, pixels in enumerate(varied(12, 40, 40).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def test_half_of_the_free_memory_is_the_limit() -> None:
    free = free_memory()
    assert 1 << 20 < free < 1 << 50
    assert kept_on_host("auto", free // 4) and not kept_on_host("auto", 2 * free)
    for size in (0, 1 << 60):
        assert kept_on_host("host", size) and kept_on_host("device", size) and not kept_on_host("files", size)
    assert image_bytes(50_000, 32) == 153_600_000


def test_a_control_group_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = free_memory()
    files = [tmp_path / name for name in ("max", "current", "stat")]
    monkeypatch.setattr(placement, "_CONTROL_GROUP_FILES", (tuple(map(str, files)),))
    for content, expected in (
        (("100000000", "70000000", "anon 5\ninactive_file 4000000\n"), 34_000_000),
        (("100000000", "170000000", "anon 5\n"), 0),
        (("max", "170000000", "anon 5\n"), None),
    ):
        for file, text in zip(files, content, strict=True):
            file.write_text(text)
        assert free_memory() == expected if expected is not None else free_memory() > machine // 4


def test_all_parts_are_kept_or_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training part alone fits in memory."""
    for free, resident in ((2 * 12 * 8 * 8 * 3, True), (2 * 12 * 8 * 8 * 3 - 2, False)):
        monkeypatch.setattr(placement, "free_memory", lambda free=free: free)
        splits = open_splits(DataConfig(root=folder, image_size=8, test_fraction=0.1))
        assert splits.test is not None
        assert splits.train.resident is splits.test.resident is resident
        assert splits.train.read(torch.arange(2)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("decode", ["exact", "scaled"])
def test_the_images_are_the_same_wherever_they_are(tmp_path: Path, decode: str) -> None:
    for i, pixels in enumerate(varied(12, 6, 8).numpy()):
        photograph = Image.fromarray(pixels).resize((240 + i, 170), Image.Resampling.BICUBIC)
        photograph.save(tmp_path / f"{i:02d}.jpg")
    parts = []
    for resident, workers in (("host", 1), ("files", 1), ("files", 5)):
        config = {"root": tmp_path, "image_size": 20, "resident": resident, "workers": workers, "decode": decode}
        splits = open_splits(DataConfig.model_validate(config))
        assert splits.train.resident == (resident == "host")
        parts.append(splits.train.read(torch.arange(len(splits.train)).flip(0)))
    assert torch.equal(parts[0], parts[1]) and torch.equal(parts[0], parts[2])


def test_no_gpu_no_device(folder: Path) -> None:
    cpu = torch.device("cpu")
    source = TensorSource(varied(4, 8, 8))
    assert not move_to_device([source], "auto", cpu)
    with pytest.raises(DataError, match=r"data\.resident=device needs a CUDA device, this run is on cpu"):
        move_to_device([source], "device", cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_gathered_on_the_gpu_without_waiting(folder: Path) -> None:
    device = torch.device("cuda")
    images = varied(9, 8, 8)
    whole = TensorSource(images)
    subset = SubsetSource(whole, torch.tensor([7, 2, 4]))
    streamed = FileSource(ImagePaths([f"{i:02d}.png" for i in range(12)], folder), None, 8, resident=False)
    assert not move_to_device([whole, streamed], "host", device)
    assert move_to_device([whole, subset, streamed], "auto", device)
    whole.read(torch.tensor([0]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [whole.read(torch.tensor([3, 0, 3])), subset.read(torch.tensor([2, 0]))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(batch.device.type == "cuda" for batch in batches)
    assert torch.equal(batches[0].cpu(), images[[3, 0, 3]]) and torch.equal(batches[1].cpu(), images[[4, 7]])
    assert not streamed.read(torch.tensor([0])).is_cuda


def test_files_are_handed_out_as_they_are(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 14)).save(folder / "a.jpg", exif=exif)
    names = ["03.png", "a.jpg", "05.png", "broken.png"]
    (folder / "broken.png").write_bytes(b"")
    source = FileSource(ImagePaths(names, folder), None, 8, on_error="skip", resident=False)
    subset = SubsetSource(source, torch.tensor([2, 1]))
    for files, order in ((source.files, ["03.png", "a.jpg", "05.png"]), (subset.files, ["05.png", "a.jpg"])):
        assert files is not None and files.names == order
        encoded = files.encoded(torch.arange(len(order)))
        assert [content.tobytes() for content in encoded] == [(folder / name).read_bytes() for name in order]
        rotated = order.index("a.jpg")
        assert files.jpeg.tolist() == [name == "a.jpg" for name in order]
        assert int(files.orientations[rotated]) == 6 and int(files.orientations.sum()) == 6 + len(order) - 1
        assert (int(files.heights[rotated]), int(files.widths[rotated])) == (30, 14)
        assert files.squares(torch.tensor([rotated, 0])).tolist() == [[8, 0, 14], [0, 0, 40]]
    assert TensorSource(varied(2, 8, 8)).files is None
    (folder / "03.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*03\.png"):
        source.files.encoded(torch.tensor([0]))
    assert np.array_equal(source.read(torch.tensor([1]))[0], np.zeros((8, 8, 3)))
