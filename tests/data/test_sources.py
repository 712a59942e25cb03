from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image
from torchvision.transforms import functional as tv

from scan_fast.data import DataConfig, DataError, FileSource, Source, SubsetSource, TensorSource, source_from
from scan_fast.data import decode as decoding


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pictures(folder: Path, n: int, size: int = 12) -> list[str]:
    """Write images 000.png and so on, and return their names."""
    images = varied(n, size, size).numpy()
    return [save(folder / f"{i:03d}.png", image).name for i, image in enumerate(images)]


def cut(path: Path, length: int) -> None:
    """Cut a file to its first bytes, or by its last ones."""
    path.write_bytes(path.read_bytes()[:length])


def decode(path: Path, size: int, smallest: int | None = None) -> np.ndarray:
    return decoding.square(decoding.decode(path, smallest=smallest)[1], size).numpy()


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
    source = FileSource(files, torch.arange(7), 12, root=tmp_path, resident=resident, workers=2)
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
        FileSource(files, labels, 12, root=tmp_path, resident=resident)
    source = FileSource(files, labels, 12, root=tmp_path, on_error="skip", resident=resident)
    assert source.paths == ["000.png", "002.png", "004.png"]
    assert source.labels is not None and source.labels.tolist() == [5, 7, 9]
    assert [path for path, _ in source.skipped] == ["001.png", "003.png"]
    assert all(reason for _, reason in source.skipped)
    assert torch.equal(source.read(torch.arange(3)), varied(5, 12, 12)[[0, 2, 4]])


@pytest.mark.parametrize("resident", [False, True])
def test_a_file_cut_in_its_pixels_is_found_before_training(tmp_path: Path, resident: bool) -> None:
    """Its header is fine, so only decoding shows it; with skip that is done up front even for sets read on demand."""
    files = pictures(tmp_path, 3, size=64)
    cut(tmp_path / files[2], -2000)
    source = FileSource(files, None, 64, root=tmp_path, on_error="skip", resident=resident)
    assert len(source) == 2 and len(source.skipped) == 1


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    files = pictures(tmp_path, 3)
    source = FileSource(files, None, 12, root=tmp_path, resident=False)
    (tmp_path / files[2]).unlink()
    with pytest.raises(DataError, match=r"cannot read image .*002\.png"):
        source.read(torch.arange(3))


def test_only_broken_files_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of the 1 image files could be read"):
        FileSource([file], None, 8, on_error="skip")


GREY = np.linspace(0, 255, 16 * 16).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "tif", "tiff", "pgm", "PNG"])
def test_grey_levels_survive_every_lossless_format(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    file = save(tmp_path / f"x.{suffix}", GREY, **options)
    assert np.array_equal(decode(file, 16), np.repeat(GREY[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    for suffix in ("png", "tif"):
        file = save(tmp_path / f"x.{suffix}", GREY.astype(np.uint16) * 257)
        assert np.array_equal(decode(file, 16)[..., 1], GREY)
    floats = save(tmp_path / "f.tif", (GREY / 255).astype(np.float32))
    assert np.array_equal(decode(floats, 16)[..., 0], GREY)


def test_transparency_lies_on_black(tmp_path: Path) -> None:
    rgba = np.full((8, 8, 4), 200, dtype=np.uint8)
    rgba[:, :4, 3] = 0
    rgba[:, 4:, 3] = 255
    expected = np.full((8, 8, 3), 200, dtype=np.uint8)
    expected[:, :4] = 0
    assert np.array_equal(decode(save(tmp_path / "a.png", rgba), 8), expected)
    assert np.array_equal(decode(save(tmp_path / "la.png", rgba, "LA"), 8), expected)
    palette = Image.fromarray(rgba).convert("RGB").quantize(4)
    palette.putpixel((0, 0), 1)
    palette.info["transparency"] = int(np.array(palette)[4, 4])
    palette.save(tmp_path / "p.png", transparency=palette.info["transparency"])
    assert decode(tmp_path / "p.png", 8)[4, 4].tolist() == [0, 0, 0]


def test_palette_one_bit_and_cmyk_are_converted(tmp_path: Path) -> None:
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[:4, :, 0] = 250
    colours[4:, :, 2] = 130
    for name, image in (
        ("p.png", Image.fromarray(colours).quantize(8)),
        ("p.gif", Image.fromarray(colours).quantize(8)),
        ("c.tif", Image.fromarray(colours).convert("CMYK")),
    ):
        image.save(tmp_path / name)
        assert np.abs(decode(tmp_path / name, 8).astype(int) - colours).max() <= 2, name
    Image.fromarray(colours[..., 0] > 100).save(tmp_path / "one.png")
    assert np.array_equal(decode(tmp_path / "one.png", 8)[..., 2], np.where(colours[..., 0] > 100, 255, 0))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), level, dtype=np.uint8)) for level in (40, 160, 240)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "x.gif", 8).mean() == 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """Written so that the viewer's upright image has its bright quarter at the top left."""
    upright = np.zeros((16, 16), dtype=np.uint8)
    upright[:8, :8] = 255
    upright[:8, 8:] = 120
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    image = Image.fromarray(upright)
    stored = image if undo is None else image.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    got = decode(tmp_path / "x.jpg", 16)[..., 0].astype(int)
    assert np.abs(got - upright).max() < 30


def test_oblong_files_are_cut_to_the_centre_and_resized(tmp_path: Path) -> None:
    y, x = np.mgrid[0:300, 0:200]
    smooth = np.stack((y * 255 // 299, x * 255 // 199, (x + y) * 255 // 498), axis=2).astype(np.uint8)
    expected = np.array(Image.fromarray(smooth[50:250]).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    # The order of PIL's two passes depends on the shape it is given, and moves a pixel by one level at most.
    assert np.abs(decode(save(tmp_path / "a.png", smooth), 32) - expected).max() <= 1
    # A JPEG is decoded at a reduced scale first, which moves smooth colours by little.
    assert np.abs(decode(save(tmp_path / "a.jpg", smooth, quality=95), 32) - expected).max() <= 6


def test_subset_renumbers_everything(tmp_path: Path) -> None:
    source = TensorSource(varied(9, 8, 8), torch.arange(9), class_names=[str(i) for i in range(9)])
    subset = SubsetSource(source, torch.tensor([7, 2, 4]))
    assert isinstance(subset, Source) and len(subset) == 3
    assert subset.labels is not None and subset.labels.tolist() == [7, 2, 4]
    assert subset.paths == [source.paths[i] for i in (7, 2, 4)]
    assert torch.equal(subset.read(torch.tensor([2, 0])), source.read(torch.tensor([4, 7])))


class Items(torch.utils.data.Dataset):
    def __init__(self, items: list) -> None:
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
