"""Boxes of files decoded by DALI against PIL: files, pixels, and broken files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image, ImageOps
from torch import Tensor

from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource, ImageFiles
from scan_fast.errors import DataError
from scan_fast.views import DaliRenderer, FusedRenderer, PlainView, SimCLRView, ViewMaker, decode_dali, render_dali
from scan_fast.views.decode_dali import DaliDecoder
from scan_fast.views.parameters import View

pytestmark = pytest.mark.skipif(not render_dali.is_installed(), reason=f"DALI is not installed: {render_dali.INSTALL}")

MEAN, STD = (0.5,) * 3, (0.25,) * 3
FRAME = 48
EXIF_ORIENTATION = 0x0112


@pytest.fixture(params=["cpu", "cuda"])
def decoder(request: pytest.FixtureRequest) -> DaliDecoder:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from scan_fast.views import dali_graphs

    return DaliDecoder(dali_graphs, torch.device(request.param))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write photographs of each orientation, with and without chroma subsampling, colour and grey, and other files."""
    root = tmp_path_factory.mktemp("files")
    sizes = [(150, 220), (220, 150), (97, 131), (300, 300)]
    for i in range(16):
        pixels = Image.fromarray(varied(6, *sizes[i % 4], seed=i)[0].numpy())
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 1 + i % 8
        options: dict[str, Any] = {"quality": 95, "exif": exif, "subsampling": i % 3, "progressive": i % 5 == 0}
        if i == 7:
            pixels = pixels.convert("L")
            del options["subsampling"]
        pixels.save(root / f"{i:02d}.jpg", **options)
    Image.fromarray(varied(1, 80, 120)[0].numpy()).save(root / "16.png")
    Image.fromarray(varied(1, 80, 120)[0].numpy()).convert("CMYK").save(root / "17.jpg")
    return root


def open_files(root: Path, **options: Any) -> ImageFiles:
    names = sorted(path.name for path in root.iterdir())
    return FileSource(ImagePaths(names, root), None, FRAME, workers=2, resident=False, **options).files


def boxes_of(n: int, seed: int = 0) -> Tensor:
    """Return (n, 4) boxes in a frame of FRAME units."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, FRAME // 2, (n, 2), generator=g)
    return torch.cat((start, torch.randint(8, FRAME // 2 + 1, (n, 2), generator=g)), dim=1)


def pil_crop(path: Path, box: list[int], side: int) -> np.ndarray:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    y0, x0, y1, x1 = (int(edge * v / FRAME + 0.5) for v in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    part = image.crop((left + x0, top + y0, left + x1, top + y1))
    return np.array(part.resize((side, side), Image.Resampling.BILINEAR))


def test_boxes_equal_pil(folder: Path, decoder: DaliDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    files, sides = open_files(folder), [96, 24]
    n = len(files)
    boxes = [boxes_of(n, seed) for seed in (1, 2)]
    by_pool: list[str] = []
    read: list[int] = []
    cut, read_bytes = ImageFiles.cut, ImageFiles._bytes

    def noted_cut(self: ImageFiles, indices: Tensor, *arguments: Any) -> list[Tensor]:
        by_pool.extend(self.names[i] for i in indices.tolist())
        return cut(self, indices, *arguments)

    def noted_bytes(self: ImageFiles, index: int) -> np.ndarray:
        read.append(index)
        return read_bytes(self, index)

    monkeypatch.setattr(ImageFiles, "cut", noted_cut)
    monkeypatch.setattr(ImageFiles, "_bytes", noted_bytes)
    got = decoder.cut(files, torch.arange(n), FRAME, boxes, sides)
    # All other files are decoded by DALI, and read once for both views.
    assert by_pool == ["16.png", "17.jpg"]
    assert sorted(read) == list(range(16))
    on_cpu = decoder.device.type == "cpu"
    for part, several, side in zip(got, boxes, sides, strict=True):
        assert part.device.type == decoder.device.type
        for row in range(n):
            expected = pil_crop(folder / files.names[row], several[row].tolist(), side)
            found = (part[row].cpu().int() - torch.from_numpy(expected).int()).abs()
            # A box that shrinks has the outermost pixels repeated for the filter; nvJPEG has its own
            # inverse transform.
            assert int(found[2:-2, 2:-2].max()) <= (1 if on_cpu else 6), files.names[row]
            assert float((found <= 1).float().mean()) > (0.97 if on_cpu else 0.9)


def test_bits_do_not_depend_on_the_batch(folder: Path, decoder: DaliDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    files, boxes = open_files(folder), boxes_of(18)
    (whole,) = decoder.cut(files, torch.arange(18), FRAME, [boxes], [32])
    monkeypatch.setattr(decode_dali, "_RUN_PIXELS", dict.fromkeys(("cpu", "cuda"), 5000))
    some = torch.tensor([17, 3, 8, 3, 16])
    (parts,) = decoder.cut(files, some, FRAME, [boxes[some]], [32])
    assert torch.equal(parts, whole[some])
    none = torch.empty(0, dtype=torch.int64)
    assert decoder.cut(files, none, FRAME, [boxes[:0]], [32])[0].shape == (0, 32, 32, 3)


def test_parts_hold_what_fits_and_every_row_once() -> None:
    wanted = {row: [(0, 0, height, 10)] for row, height in zip((4, 1, 7, 2, 9), (5, 5, 30, 1, 2), strict=True)}
    assert decode_dali._parts(wanted, 100) == [[4, 1], [7], [2, 9]]
    assert decode_dali._parts({}, 100) == []


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _overwrite(path: Path) -> None:
    path.write_bytes(b"\xff\xd8\xff\xe0 this was a photograph \xff\xd9")


@pytest.mark.parametrize("spoil", [_truncate, _overwrite, Path.unlink])
def test_broken_files_raise_the_error_of_the_pool(tmp_path: Path, decoder: DaliDecoder, spoil: Any) -> None:
    for i, pixels in enumerate(varied(5, 64, 64).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    files, boxes = open_files(tmp_path), boxes_of(5)
    spoil(tmp_path / "3.jpg")
    messages = []
    for cut in (files.cut, lambda *arguments: decoder.cut(files, *arguments)):
        with pytest.raises(DataError, match=r"cannot read image .*3\.jpg") as caught:
            cut(torch.arange(5), FRAME, [boxes], [32])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    good = torch.tensor([0, 4])
    (after,) = decoder.cut(files, good, FRAME, [boxes[good]], [32])
    assert (
        int((after.cpu().int() - files.cut(good, FRAME, [boxes[good]], [32])[0].int())[:, 2:-2, 2:-2].abs().max()) <= 6
    )


def test_a_replaced_file_is_named(tmp_path: Path, decoder: DaliDecoder) -> None:
    for i, pixels in enumerate(varied(3, 200, 200).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    files, boxes = open_files(tmp_path), boxes_of(3)
    Image.fromarray(varied(1, 40, 50)[0].numpy()).save(tmp_path / "1.jpg")
    for cut in (files.cut, lambda *arguments: decoder.cut(files, *arguments)):
        with pytest.raises(DataError, match=r"cannot read image .*1\.jpg: OSError: the file has changed\. It could be"):
            cut(torch.arange(3), FRAME, [boxes], [32])


def test_views_of_files_do_not_depend_on_interruptions(folder: Path) -> None:
    images = ImagePaths(sorted(p.name for p in folder.iterdir()), folder)
    source = FileSource(images, None, FRAME, workers=2, resident=False)
    views: list[tuple[View, int]] = [(SimCLRView(size=40), 0), (PlainView(size=24), 1)]

    def views_of(renderer: Any, batch: Tensor) -> list[Tensor]:
        return ViewMaker(source, renderer, 1, "pretext", crop="file").render(views, batch, epoch=2)

    batches = torch.arange(18).flip(0).split(6)
    renderer = DaliRenderer(MEAN, STD, "cpu", decodes=True)
    whole = [views_of(renderer, batch) for batch in batches]
    again = views_of(DaliRenderer(MEAN, STD, "cpu", threads=3, decodes=True), batches[2])
    assert all(torch.equal(one, two) for one, two in zip(whole[2], again, strict=True))
    fused = FusedRenderer(MEAN, STD, "cpu")
    for batch, several in zip(batches, whole, strict=True):
        for (view, _), got, expected in zip(views, several, views_of(fused, batch), strict=True):
            difference = (got - expected).abs() * 0.25 * 255
            assert float((difference <= 1.01).float().mean()) > (0.97 if isinstance(view, PlainView) else 0.9)
            assert float(difference.mean()) < 1


def test_on_the_cpu_the_pool_decodes_unless_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, boxes = open_files(folder), [boxes_of(18)]
    expected = files.cut(torch.arange(18), FRAME, boxes, [32])
    asked = DaliRenderer(MEAN, STD, "cpu", decodes=True).cut(files, torch.arange(18), FRAME, boxes, [32])
    assert not torch.equal(asked[0], expected[0])
    monkeypatch.setattr(DaliDecoder, "cut", None)
    found = DaliRenderer(MEAN, STD, "cpu").cut(files, torch.arange(18), FRAME, boxes, [32])
    assert torch.equal(found[0], expected[0])
