from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image
from torchvision.transforms import functional as tv

from scan_fast.data import (
    DataConfig,
    FileSource,
    ImagePaths,
    Source,
    SubsetSource,
    TensorSource,
    source_from,
)
from scan_fast.errors import DataError


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pictures(folder: Path, n: int, size: int = 12) -> list[str]:
    """Write images 000.png, 001.png, ... and return their names."""
    images = varied(n, size, size).numpy()
    return [save(folder / f"{i:03d}.png", image).name for i, image in enumerate(images)]


def cut(path: Path, length: int) -> None:
    """Truncate a file to `length` bytes, or by -`length` bytes if it is negative."""
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize("shape", [(6, 10, 10, 3), (6, 10, 10, 1), (6, 10, 10)])
def test_tensor_source_reads_what_it_was_given(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    source = TensorSource(images, torch.arange(6))
    assert isinstance(source, Source) and len(source) == 6 and source.size == 10 and source.resident
    got = source.read(torch.tensor([3, 0, 3]))
    expected = images[[3, 0, 3]].reshape(3, 10, 10, -1).expand(-1, -1, -1, 3)
    assert torch.equal(got, expected)
    assert len(set(source.paths)) == 6


def test_tensor_source_cuts_the_centre_square_and_resizes_with_antialias() -> None:
    images = varied(8, 20, 31)
    got = TensorSource(images, size=9).read(torch.arange(8))
    for i in range(8):
        square = tv.crop(Image.fromarray(images[i].numpy()), 0, 5, 20, 20)
        expected = tv.pil_to_tensor(square.resize((9, 9), Image.Resampling.BILINEAR)).permute(1, 2, 0)
        assert int((got[i].int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 4, 3), "must be uint8"),
        (torch.zeros((2, 3, 4, 4), dtype=torch.uint8), r"got \(2, 3, 4, 4\)"),
        (torch.zeros((0, 4, 4, 3), dtype=torch.uint8), "must not be empty"),
        (torch.zeros((4, 4), dtype=torch.uint8), r"got \(4, 4\)"),
    ],
)
def test_tensor_source_refuses_other_arrays(images: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TensorSource(images)


def test_annotations_of_another_length_are_refused() -> None:
    images = torch.zeros((2, 4, 4, 3), dtype=torch.uint8)
    with pytest.raises(DataError, match="labels must be"):
        TensorSource(images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="paths must name each of the 2 images, got 1"):
        TensorSource(images, None, ["a"])


@pytest.mark.parametrize("resident", [False, True])
def test_file_source_reads_files_in_any_order(tmp_path: Path, resident: bool) -> None:
    files = [f"a b/{name}" for name in pictures(tmp_path / "a b", 7)]
    source = FileSource(ImagePaths(files, tmp_path), torch.arange(7), 12, resident=resident, workers=2)
    assert source.resident == resident
    assert source.paths[3] == "a b/003.png"
    order = torch.tensor([6, 0, 6, 2])
    assert torch.equal(source.read(order), varied(7, 12, 12)[order])
    assert source.read(order[:0]).shape == (0, 12, 12, 3)


@pytest.mark.parametrize("resident", [False, True])
def test_a_broken_file_is_named_or_skipped(tmp_path: Path, resident: bool) -> None:
    files = pictures(tmp_path, 5)
    cut(tmp_path / files[1], 30)
    cut(tmp_path / files[3], 0)
    labels = torch.tensor([5, 6, 7, 8, 9])
    with pytest.raises(DataError, match=r"001\.png.*data\.on_error=skip"):
        FileSource(ImagePaths(files, tmp_path), labels, 12, resident=resident)
    source = FileSource(ImagePaths(files, tmp_path), labels, 12, on_error="skip", resident=resident)
    assert source.paths == ["000.png", "002.png", "004.png"]
    assert source.labels is not None and source.labels.tolist() == [5, 7, 9]
    assert [path for path, _ in source.skipped] == ["001.png", "003.png"]
    assert all(reason for _, reason in source.skipped)
    assert torch.equal(source.read(torch.arange(3)), varied(5, 12, 12)[[0, 2, 4]])


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_file_cut_in_its_pixels_is_found_before_training(tmp_path: Path, resident: bool, suffix: str) -> None:
    """The header is intact, so only the end of the file, or decoding it, shows the error."""
    files = [f"{i}.{suffix}" for i in range(3)]
    for name, image in zip(files, varied(3, 64, 64).numpy(), strict=True):
        save(tmp_path / name, image)
    cut(tmp_path / files[2], -600)
    with pytest.raises(DataError, match=rf"2\.{suffix}"):
        FileSource(ImagePaths(files, tmp_path), None, 64, resident=resident)
    source = FileSource(ImagePaths(files, tmp_path), None, 64, on_error="skip", resident=resident)
    assert len(source) == 2 and [path for path, _ in source.skipped] == [files[2]]
    # What a camera or a server has appended does no harm.
    for name in files[:2]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\0\n")
    assert len(FileSource(ImagePaths(files[:2], tmp_path), None, 64, resident=resident)) == 2


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    files = pictures(tmp_path, 3)
    source = FileSource(ImagePaths(files, tmp_path), None, 12, resident=False)
    (tmp_path / files[2]).unlink()
    with pytest.raises(DataError, match=r"cannot read image .*002\.png"):
        source.read(torch.arange(3))


def test_only_broken_files_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"nothing")
    with pytest.raises(
        DataError, match=r"0 readable of 1 images: .*a\.jpg: UnidentifiedImageError: cannot identify image file$"
    ):
        FileSource(ImagePaths([file]), None, 8, on_error="skip")


def test_subset_renumbers_everything(tmp_path: Path) -> None:
    source = TensorSource(varied(9, 8, 8), torch.arange(9), class_names=[str(i) for i in range(9)])
    subset = SubsetSource(source, torch.tensor([7, 2, 4]))
    assert isinstance(subset, Source) and len(subset) == 3
    assert subset.labels is not None and subset.labels.tolist() == [7, 2, 4]
    assert subset.paths == [source.paths[i] for i in (7, 2, 4)]
    assert torch.equal(subset.read(torch.tensor([2, 0])), source.read(torch.tensor([4, 7])))


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


def test_source_from_datasets_of_every_kind_of_item() -> None:
    images = varied(6, 10, 10)
    kinds = {
        "pil": [Image.fromarray(i.numpy()) for i in images],
        "array": [i.numpy() for i in images],
        "tensor": list(images.permute(0, 3, 1, 2)),
        "float": list(images.permute(0, 3, 1, 2).float() / 255),
    }
    for name, items in kinds.items():
        assert torch.equal(source_from(Items(items)).read(torch.arange(6)), images), name
    labelled = source_from(Items([(im, i % 2) for i, im in enumerate(kinds["pil"])]))
    assert labelled.labels is not None and labelled.labels.tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(DataError, match=r"item 0: a float tensor must lie in \[0, 1\]"):
        source_from(Items([images[0].permute(2, 0, 1).float()]))
    with pytest.raises(DataError, match="item 0: an image must be"):
        source_from(Items([np.zeros((4, 4, 2), dtype=np.uint8)]))
    with pytest.raises(DataError, match="must not be empty"):
        source_from(Items([]))


def test_source_from_arrays_files_and_folders(tmp_path: Path) -> None:
    images = varied(6, 33, 33)
    assert torch.equal(source_from(images.numpy()).read(torch.arange(6)), images)
    assert torch.equal(source_from(images).read(torch.arange(6)), images)
    files = [save(tmp_path / "xy"[i % 2] / f"{i}.png", image) for i, image in enumerate(images.numpy())]
    from_list = source_from([str(f) for f in files], DataConfig(image_size=33))
    assert torch.equal(from_list.read(torch.arange(6)), images) and from_list.labels is None
    folder = source_from(tmp_path, DataConfig(image_size=33))
    assert folder.class_names == ["x", "y"] and folder.paths[0] == "x/0.png"
    # The folder's own default: 33 pixels are stored as 32.
    assert source_from(str(tmp_path)).size == 32
    for wrong, message in (
        ([], "empty list"),
        ([3], "file paths, got int"),
        (7, "got int"),
        (tmp_path / "no", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            source_from(wrong)
