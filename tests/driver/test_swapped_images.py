"""Images that were exchanged, changed or renamed without a sign in size and time: named at every command and moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from containers import Item, encoded, write_parquet, write_shards
from driving import TINY_FOLDER, Death, Process, Result, picture, results, run_here, summary
from PIL import Image

from scan_fast.data import FileSource, ImagePaths, TensorSource
from scan_fast.data.encoded import fingerprint
from scan_fast.errors import DataError, RunError
from scan_fast.estimator import ImageClusterer
from scan_fast.training.images import all_equal

WORDS = (*TINY_FOLDER, "--clusters", "3", "--quiet", "evaluation.map=false", "evaluation.baselines=false")
SIDE = 100
"""An uncompressed picture of this side takes 30 kB: more than the first and last 8 KiB."""
EPOCH = 1_600_000_000 * 10**9


def bitmap(seed: int) -> Image.Image:
    return picture(seed, size=(SIDE, SIDE))


def same_times(folder: Path) -> None:
    """Give all files one time of change, as an archive that is unpacked may."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(EPOCH, EPOCH))


@pytest.fixture
def bitmaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of files of one size and one time of change, which a start takes for settled."""
    monkeypatch.setattr("scan_fast.data.encoded.SETTLED_NS", 0)
    folder = tmp_path / "bitmaps"
    folder.mkdir()
    for number in range(24):
        bitmap(number).save(folder / f"{number:03d}.bmp")
    same_times(folder)
    return folder


def swap(folder: Path) -> None:
    a, b, aside = folder / "004.bmp", folder / "011.bmp", folder / "aside"
    before = [path.stat() for path in (a, b)]
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    after = [path.stat() for path in (a, b)]
    assert [(s.st_size, s.st_mtime_ns) for s in before] == [(s.st_size, s.st_mtime_ns) for s in after]


def change_the_middle(folder: Path) -> None:
    path = folder / "004.bmp"
    data = bytearray(path.read_bytes())
    assert len(data) > 16384
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(EPOCH, EPOCH))


def rename(folder: Path) -> None:
    (folder / "004.bmp").rename(folder / "004b.bmp")


def add_and_remove(folder: Path) -> None:
    (folder / "004.bmp").unlink()
    bitmap(90).save(folder / "040.bmp")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped": (swap, "004.bmp has changed, 011.bmp has changed"),
    "middle": (change_the_middle, "004.bmp has changed"),
    "renamed": (rename, "004.bmp is gone, 004b.bmp is new"),
    "replaced": (add_and_remove, "004.bmp is gone, 040.bmp is new"),
}


@pytest.mark.parametrize(
    ("name", "resident", "on_error"),
    [
        *(("swapped", resident, on_error) for resident in ("host", "files") for on_error in ("raise", "skip")),
        ("middle", "files", "raise"),
        ("middle", "files", "skip"),
        ("renamed", "host", "raise"),
        ("replaced", "files", "skip"),
    ],
)
def test_every_command_between_stages_names_the_image(
    resident: str, on_error: str, name: str, bitmaps: Path, tmp_path: Path
) -> None:
    change, out = CHANGES[name], tmp_path / "out"
    settings = (*WORDS, f"data.resident={resident}", f"data.on_error={on_error}")
    assert run_here("pretext", "--data", bitmaps, *settings, "--out", out).code == 0
    assert run_here("mine", out, "--quiet").code == 0  # on the same images
    change[0](bitmaps)
    for command in ("mine", "cluster", "run", "evaluate", "suggest-k"):
        quiet = () if command == "evaluate" else ("--quiet",)
        assert change[1] in run_here(command, out, *quiet).refusal(), command


@pytest.mark.parametrize("name", ["swapped", "middle"])
def test_a_killed_run_does_not_continue(name: str, bitmaps: Path, tmp_path: Path) -> None:
    words = ("run", "--data", bitmaps, *WORDS, "data.resident=files", "data.on_error=skip", "--out", tmp_path / "out")
    killed = Process(*words, log=tmp_path / "log", death=Death(1, name="neighbors.npz")).result()
    assert killed.code == -signal.SIGKILL, killed.err
    CHANGES[name][0](bitmaps)
    assert CHANGES[name][1] in run_here(*words).refusal()


def test_a_finished_run_shows_no_other_images(bitmaps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here("run", "--data", bitmaps, *WORDS, "--out", out).code == 0
    swap(bitmaps)
    wanted = CHANGES["swapped"][1]
    assert wanted in run_here("report", out).refusal()
    assert wanted in run_here("folders", out, "--out", tmp_path / "sorted").refusal()
    named = run_here("name", out, "0", "first")
    assert named.code == 0 and f"cannot be written again: {out} holds a run on other images: {wanted}" in named.out
    swap(bitmaps)
    (bitmaps / "004.bmp").unlink()  # what is lost is shown by its name
    assert run_here("report", out).code == 0


def test_a_copy_of_the_images_is_the_same(bitmaps: Path, tmp_path: Path) -> None:
    words = ("run", "--data", bitmaps, *WORDS, "data.resident=files", "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    before = results(tmp_path / "out")
    for path in sorted(bitmaps.iterdir()):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert run_here(*words).code == 0
    assert results(tmp_path / "out") == before


def test_unchanged_files_are_not_read_again_and_others_are(
    bitmaps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pretext", "--data", bitmaps, *WORDS, "data.resident=files", "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    digested: list[str] = []

    def noting(image: bytes | str, *kind: object) -> int:
        digested.append(os.path.basename(str(image)))
        return fingerprint(image, *kind)  # type: ignore[arg-type]

    monkeypatch.setattr("scan_fast.data.checking.fingerprint", noting)
    assert run_here(*words).code == 0
    assert digested == []
    os.utime(bitmaps / "003.bmp", ns=(EPOCH + 1, EPOCH + 1))
    assert run_here(*words).code == 0
    assert run_here(*words).code == 0  # it is noted with its new time
    assert digested == ["003.bmp"]


def test_quick_goes_by_times_for_what_it_does_not_read(bitmaps: Path, tmp_path: Path) -> None:
    Image.new("L", (3, 3)).save(bitmaps / "small.png")
    words = ("run", "--data", bitmaps, *WORDS, "data.identity=quick", "data.on_error=skip", "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    os.utime(bitmaps / "small.png")  # read whole
    assert run_here(*words).code == 0
    swap(bitmaps)
    assert "004.bmp has changed, 011.bmp has changed" in run_here(*words).refusal()
    swap(bitmaps)
    os.utime(bitmaps / "002.bmp", ns=(EPOCH + 1, EPOCH + 1))
    message = run_here(*words).refusal()
    assert "002.bmp has another time of change, and data.identity=quick goes by it. Undo this" in message
    os.utime(bitmaps / "002.bmp", ns=(EPOCH, EPOCH))
    assert run_here(*words).code == 0
    # The run may go on with the other kind.
    content = [word.replace("quick", "content") if isinstance(word, str) else word for word in words]
    assert run_here(*content).code == 0
    change_the_middle(bitmaps)
    assert "004.bmp has changed" in run_here(*content).refusal()


def test_images_that_differ_in_the_middle_only_are_not_all_the_same(tmp_path: Path) -> None:
    names = [f"{number}.bmp" for number in range(3)]
    for number, name in enumerate(names):
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        pixels[SIDE // 2] = number
        Image.fromarray(pixels).save(tmp_path / name)
    source = FileSource(ImagePaths(names, tmp_path), None, SIDE, resident=False, identity="quick")
    assert len(set(source.files.fingerprints.tolist())) == 1
    assert not all_equal(source)


@pytest.mark.parametrize("identity", ["content", "quick"])
def test_a_file_that_changes_in_training(identity: str, bitmaps: Path) -> None:
    names = sorted(path.name for path in bitmaps.iterdir())
    source = FileSource(ImagePaths(names, bitmaps), None, 16, resident=False, identity=identity)  # type: ignore[arg-type]
    everything = torch.arange(24)
    source.read(everything)
    swap(bitmaps)
    with pytest.raises(DataError, match=r"00\d\.bmp: OSError: the file has changed"):
        source.read(everything)


def shards(folder: Path, order: list[int]) -> str:
    write_shards(folder, [Item(f"{i:03d}", encoded(np.asarray(bitmap(order[i]))), None) for i in range(24)])
    return f"webdataset:{folder}"


def parquet(folder: Path, order: list[int]) -> str:
    write_parquet(folder, [Item(f"{i:03d}", encoded(np.asarray(bitmap(order[i]))), None) for i in range(24)])
    return f"parquet:{folder}"


@pytest.mark.parametrize("write", [shards, parquet])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_members_of_a_container_that_are_swapped(
    on_error: str,
    write: Callable[[Path, list[int]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("scan_fast.data.encoded.SETTLED_NS", 0)
    order = list(range(24))
    source = write(tmp_path / "box", order)
    same_times(tmp_path / "box")
    settings = (*WORDS, "data.resident=files", f"data.on_error={on_error}")
    assert run_here("pretext", "--data", source, *settings, "--out", tmp_path / "out").code == 0
    order[4], order[11] = order[11], order[4]
    write(tmp_path / "box", order)
    same_times(tmp_path / "box")
    message = run_here("mine", tmp_path / "out", "--quiet").refusal()
    assert message.count("has changed") == 2, message


def test_an_estimator_on_other_arrays(tmp_path: Path) -> None:
    settings = {key: value for key, _, value in (word.partition("=") for word in TINY_FOLDER)}
    pixels = np.stack([np.asarray(picture(i, size=(16, 16))) for i in range(24)])

    def fit(images: np.ndarray) -> None:
        given = {key: yaml.safe_load(value) for key, value in settings.items()}
        ImageClusterer(3, out=tmp_path / "out", settings=given | {"evaluation.map": False}).fit(images)

    fit(pixels)
    noted = summary(tmp_path / "out")["images"]
    assert noted["count"] == 24 and len(noted["digest"]) == 32
    pixels[[4, 11]] = pixels[[11, 4]]
    with pytest.raises(RunError, match="image/0000004 has changed, image/0000011 has changed"):
        fit(pixels)


def test_a_record_that_was_removed_is_known_by_its_digest(bitmaps: Path, tmp_path: Path) -> None:
    words = ("run", "--data", bitmaps, *WORDS, "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    record = tmp_path / "out" / "images.npz"
    record.unlink()
    assert run_here(*words).code == 0 and record.is_file()
    record.unlink()
    swap(bitmaps)
    assert "its 24 images had another digest than these 24" in run_here(*words).refusal()


def test_a_start_names_the_images_that_it_does_not_use(bitmaps: Path, tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test", "val")):
        (tmp_path / "split" / part).mkdir(parents=True)
        for path in sorted(bitmaps.iterdir())[8 * number : 8 * number + 8]:
            path.rename(tmp_path / "split" / part / path.name)
    words = [word for word in WORDS if word != "--quiet"]
    result = run_here("run", "--data", tmp_path / "split", "--out", tmp_path / "run", *words)
    assert result.code == 0, result.err
    assert "images: val not used, beside the folders or files of the splits" in result.out
    assert "images: 16, digest" in result.out


def test_the_digest_tells_whether_two_runs_are_on_the_same_images(bitmaps: Path, tmp_path: Path) -> None:
    def run(name: str) -> Result:
        words = [word for word in WORDS if word != "--quiet"]
        result = run_here("pretext", "--data", bitmaps, *words, "--out", tmp_path / name)
        assert result.code == 0, result.err
        assert f"images: 24, digest {summary(tmp_path / name)['images']['digest']}" in result.out
        return result

    run("one")
    run("two")
    assert summary(tmp_path / "one")["images"] == summary(tmp_path / "two")["images"]
    swap(bitmaps)
    run("three")
    assert summary(tmp_path / "three")["images"]["digest"] != summary(tmp_path / "one")["images"]["digest"]


def test_pixels_of_small_arrays_are_identified_as_they_are_kept() -> None:
    from scan_fast.training.images import image_record

    pixels = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    kept = image_record({"train": TensorSource(pixels, size=64)}, "content")
    assert np.array_equal(kept.fingerprints, image_record({"train": TensorSource(pixels)}, "content").fingerprints)
