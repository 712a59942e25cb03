"""Folder layouts, splits and configurations, on images that the tests write."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError

from scan_fast.data import DataConfig, FileSource, ImagePaths, open_splits
from scan_fast.data.datasets import STATISTICS
from scan_fast.data.folders import default_size
from scan_fast.data.kinds.cifar import CIFAR20_COARSE, CIFAR20_NAMES
from scan_fast.data.kinds.folder import SUBSETS
from scan_fast.errors import DataError


def images(folder: Path, *names: str, size: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        level = sum(map(ord, name)) % 256
        Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(folder / name)


def many(folder: Path, n: int) -> None:
    images(folder, *(f"{i:03d}.png" for i in range(n)))


def opened(root: Path, **options: object) -> Any:
    return open_splits(DataConfig.model_validate({"root": root, "image_size": 8, **options}))


@pytest.mark.parametrize("test_name", ["test", "val", "validation", "Test"])
def test_split_folders_with_classes(tmp_path: Path, test_name: str) -> None:
    for part in ("train", test_name):
        for name in ("cat", "ant", "bee"):
            many(tmp_path / part / name, 2)
    splits = opened(tmp_path)
    assert splits.train.class_names == splits.test.class_names == ["ant", "bee", "cat"]
    assert splits.train.labels.tolist() == splits.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.train.paths[0] == "train/ant/000.png" and splits.test.paths[-1] == f"{test_name}/cat/001.png"
    assert splits.pretext is None and (splits.mean, splits.std) == STATISTICS["imagenet"]


def test_what_lies_beside_the_splits_is_named(tmp_path: Path) -> None:
    for part in ("train", "test", "val", "later"):
        many(tmp_path / part, 2)
    many(tmp_path, 1)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    splits = opened(tmp_path)
    assert (len(splits.train), len(splits.test), splits.unused) == (2, 2, ["000.png", "later", "val"])
    assert not opened(tmp_path / "val").unused
    shutil.rmtree(tmp_path / "test")
    assert opened(tmp_path).unused == ["000.png", "later"]


def test_one_sub_folder_per_class_is_split_by_hash(tmp_path: Path) -> None:
    for name in ("b", "a"):
        many(tmp_path / name, 150)
    splits = opened(tmp_path, test_fraction=0.2)
    assert set(splits.train.paths).isdisjoint(splits.test.paths)
    assert len(splits.train) + len(splits.test) == 300
    # Binomial with 300 draws at 0.2: 60, deviation 7.
    assert 35 < len(splits.test) < 85
    for part in (splits.train, splits.test):
        assert part.labels.tolist() == ["ab".index(path[0]) for path in part.paths]
        assert part.paths == sorted(part.paths)
    # New files leave the old ones where they were.
    before = set(splits.test.paths)
    many(tmp_path / "c", 50)
    after = opened(tmp_path, test_fraction=0.2)
    assert {p for p in after.test.paths if p[0] != "c"} == before


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    many(tmp_path, 40)
    splits = opened(tmp_path)
    assert splits.train.labels is None and splits.train.class_names is None
    assert len(splits.train) == 40 and splits.test is None
    splits = opened(tmp_path, test_fraction=0.1)
    assert len(splits.train) + len(splits.test) == 40 and len(splits.test) > 0


def test_images_beside_and_inside_sub_folders_are_all_taken_without_labels(tmp_path: Path) -> None:
    many(tmp_path, 5)
    many(tmp_path / "more", 5)
    splits = opened(tmp_path)
    assert len(splits.train) == 10 and splits.train.labels is None


def test_a_train_folder_alone_is_split(tmp_path: Path) -> None:
    many(tmp_path / "train" / "a", 20)
    many(tmp_path / "train" / "b", 20)
    splits = opened(tmp_path)
    assert splits.train.class_names == ["a", "b"] and splits.train.paths[0].startswith("train/a/")


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_both_parts_of_a_tiny_folder_hold_an_image(tmp_path: Path, fraction: float) -> None:
    many(tmp_path, 3)
    splits = opened(tmp_path, test_fraction=fraction)
    assert {len(splits.train), len(splits.test)} == {1, 2}


def test_files_that_are_not_images_do_not_count(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.PnG", "d.bmp", "e.gif", "f.webp", "g.tif", "h.TIFF", "i.ppm", "j.pgm"):
        images(tmp_path / "x", name)
        images(tmp_path / "y", name)
    images(tmp_path / ".hidden", "a.png")
    images(tmp_path / "x", ".b.png")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    (tmp_path / "labels.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    splits = opened(tmp_path)
    assert len(splits.train) == 20
    assert splits.train.class_names == ["x", "y"]


def test_folder_errors_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        opened(tmp_path / "nowhere")
    (tmp_path / "file.png").write_bytes(b"x")
    with pytest.raises(DataError, match="is not a folder"):
        opened(tmp_path / "file.png")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"no images found in .*void: looked for .*\*\.jpg"):
        opened(tmp_path / "void")
    images(tmp_path / "one", "a.png")
    with pytest.raises(DataError, match=r"data\.test_fraction=0\.1 holds images out, but there is only a\.png"):
        opened(tmp_path / "one", test_fraction=0.1)
    assert opened(tmp_path / "one").train.paths == ["a.png"]
    with pytest.raises(DataError, match=r"data\.root must name the folder"):
        open_splits(DataConfig(source="folder"))


def test_splits_with_other_classes_are_refused_unless_labels_are_off(tmp_path: Path) -> None:
    for part, names in (("train", "abc"), ("test", "abd")):
        for name in names:
            many(tmp_path / part / name, 2)
    with pytest.raises(DataError, match=r"only in train: \['c'\], only in test: \['d'\].*data\.labels=none"):
        opened(tmp_path)
    splits = opened(tmp_path, labels="none")
    assert splits.train.labels is None and splits.test.class_names is None and len(splits.test) == 6


def test_validation_and_test_without_train_are_not_taken_for_classes(tmp_path: Path) -> None:
    many(tmp_path / "validation", 3)
    many(tmp_path / "test", 3)
    with pytest.raises(DataError, match=r"has test/ but no train/"):
        opened(tmp_path)


def test_labels_none_ignores_class_folders(tmp_path: Path) -> None:
    many(tmp_path / "a", 10)
    many(tmp_path / "b", 10)
    splits = opened(tmp_path, labels="none")
    assert splits.train.labels is None and splits.train.class_names is None
    assert splits.train.paths == opened(tmp_path).train.paths


def test_unreadable_images_are_skipped_on_request(tmp_path: Path) -> None:
    many(tmp_path, 30)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        opened(tmp_path)
    splits = opened(tmp_path, on_error="skip")
    assert len(splits.train) == 30
    assert [path for path, _ in splits.train.skipped] == ["broken.jpg"]


def test_limit_draws_some_training_images(tmp_path: Path) -> None:
    many(tmp_path, 60)
    whole, some = opened(tmp_path, test_fraction=0.1), opened(tmp_path, limit=10, test_fraction=0.1)
    assert len(some.train) == 10 and set(some.train.paths) < set(whole.train.paths)
    assert some.train.paths != whole.train.paths[:10] and some.test.paths == whole.test.paths
    assert opened(tmp_path, limit=10, test_fraction=0.1).train.paths == some.train.paths
    assert len(opened(tmp_path, limit=1000, test_fraction=0.1).train) == len(whole.train)


def test_classes_file_chooses_and_orders(tmp_path: Path) -> None:
    for name in ("n1", "n2", "n3"):
        many(tmp_path / "train" / name, 3)
        many(tmp_path / "val" / name, 2)
    (tmp_path / "list.txt").write_text("n3 third\n\nn1 first one\n")
    for source in ("folder", "imagenet"):
        splits = opened(tmp_path, source=source, classes_file=tmp_path / "list.txt")
        assert splits.train.class_names == ["n3", "n1"]
        assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert splits.train.paths[0] == "train/n3/000.png" and len(splits.test) == 4
    whole = opened(tmp_path, source="imagenet")
    assert whole.train.class_names == ["n1", "n2", "n3"]
    with pytest.raises(DataError, match="lacks 50 of the 50 class folders, first n01"):
        opened(tmp_path, source="imagenet", classes_file="imagenet_50.txt")
    with pytest.raises(DataError, match=r"shipped lists are imagenet_100.txt, imagenet_200.txt, imagenet_50.txt"):
        opened(tmp_path, source="imagenet", classes_file="imagenet_51.txt")
    (tmp_path / "list.txt").write_text("n1\nn1\n")
    with pytest.raises(DataError, match="each class folder once"):
        opened(tmp_path, classes_file=tmp_path / "list.txt")


def test_shipped_subsets_are_nested() -> None:
    lists = {n: (SUBSETS / f"imagenet_{n}.txt").read_text().split() for n in (50, 100, 200)}
    assert all(len(set(names)) == n and names == sorted(names) for n, names in lists.items())
    assert set(lists[50]) < set(lists[100]) < set(lists[200])


def test_imagenet_needs_both_splits(tmp_path: Path) -> None:
    many(tmp_path / "train" / "n1", 2)
    with pytest.raises(DataError, match=r"must hold train/ and val/"):
        opened(tmp_path, source="imagenet")


@pytest.mark.parametrize(
    ("side", "expected"), [(28, 32), (40, 32), (41, 64), (80, 64), (100, 96), (129, 128), (500, 128)]
)
def test_default_size_follows_the_median_side(tmp_path: Path, side: int, expected: int) -> None:
    images(tmp_path, "a.png", "b.png", "c.png", size=side)
    images(tmp_path, "small.png", size=3)
    (tmp_path / "broken.png").write_bytes(b"")
    assert default_size(ImagePaths(sorted(tmp_path.iterdir()))) == expected
    (tmp_path / "broken.png").unlink()
    assert open_splits(DataConfig(root=tmp_path)).train.size == expected


def test_root_may_start_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    many(tmp_path / "mine", 4)
    assert len(open_splits(DataConfig(root=Path("~/mine"))).train) >= 2


def test_digits_are_split_the_same_every_time() -> None:
    from sklearn.datasets import load_digits

    splits = open_splits(DataConfig(source="digits"))
    again = open_splits(DataConfig(source="digits"))
    assert splits.test is not None
    assert splits.train.paths == again.train.paths and len(splits.train) == 1348 and len(splits.test) == 449
    numbers = [int(path.rsplit("/", 1)[1]) for path in (*splits.train.paths, *splits.test.paths)]
    assert sorted(numbers) == list(range(1797))
    digits = load_digits()
    for source in (splits.train, splits.test):
        own = [int(path.rsplit("/", 1)[1]) for path in source.paths]
        assert source.labels is not None
        assert source.labels.tolist() == digits.target[own].tolist()
        pixels = source.read(torch.arange(len(source)))
        assert torch.equal(pixels[..., 0], pixels[..., 2]) and int(pixels.max()) == 255
        assert np.abs(pixels[..., 1].numpy() / 255 * 16 - digits.images[own]).max() < 0.05
        # Every class is well represented in either part.
        assert int(source.labels.bincount(minlength=10).min()) > len(source) // 16
    everything = torch.cat([s.read(torch.arange(len(s))) for s in (splits.train, splits.test)]).float() / 255
    assert abs(float(everything.mean()) - splits.mean[0]) < 1e-4
    assert abs(float(everything.std()) - splits.std[0]) < 1e-4
    assert open_splits(DataConfig(source="digits", image_size=16)).train.size == 16


def test_statistics_may_be_set() -> None:
    splits = open_splits(DataConfig(source="digits", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    assert splits.mean == (0.1, 0.2, 0.3) and splits.std == (0.4, 0.5, 0.6)


def test_cifar20_superclasses() -> None:
    """Five fine classes each; spot checks against the published table of the data set."""
    assert np.bincount(CIFAR20_COARSE).tolist() == [5] * 20 and len(CIFAR20_NAMES) == 20
    fine = {"apple": 0, "aquarium_fish": 1, "baby": 2, "bear": 3, "bee": 6, "maple_tree": 47, "rocket": 69, "worm": 99}
    coarse = {name: CIFAR20_NAMES[CIFAR20_COARSE[number]] for name, number in fine.items()}
    assert coarse == {
        "apple": "fruit_and_vegetables",
        "aquarium_fish": "fish",
        "baby": "people",
        "bear": "large_carnivores",
        "bee": "insects",
        "maple_tree": "trees",
        "rocket": "vehicles_2",
        "worm": "non-insect_invertebrates",
    }


@pytest.mark.parametrize("source", ["cifar10", "cifar20", "stl10"])
def test_a_missing_dataset_says_how_to_get_it(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=rf"{source} cannot be opened in .*data\.download=true"):
        open_splits(DataConfig.model_validate({"source": source, "root": tmp_path, "download": False}))


def test_configuration_is_strict() -> None:
    for wrong in ({"source": "cifar"}, {"test_fraction": 1.5}, {"limit": 0}, {"image_sise": 3}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)


def test_file_sources_come_from_folders(tmp_path: Path) -> None:
    many(tmp_path, 4)
    assert isinstance(opened(tmp_path).train, FileSource)


def made_files(folder: Path, contents: dict[str, bytes]) -> dict[str, str]:
    """Write files and return their checksums, which torchvision compares."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}


@pytest.mark.parametrize(("source", "name"), [("cifar10", "CIFAR10"), ("cifar20", "CIFAR100")])
def test_cifar_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str) -> None:
    """Small files in CIFAR's format: pickled dictionaries of planar rows."""
    dataset = getattr(torchvision.datasets, name)
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    fine = [0, 1, 2, 3, 6, 9, 5] if name == "CIFAR10" else [0, 1, 2, 3, 6, 47, 99]
    key = "labels" if name == "CIFAR10" else "fine_labels"
    parts = {"one": slice(0, 3), "two": slice(3, 5), "test": slice(5, 7)}
    contents = {p: pickle.dumps({"data": planes[cut].reshape(-1, 3072), key: fine[cut]}) for p, cut in parts.items()}
    contents["meta"] = pickle.dumps({dataset.meta["key"]: [str(i) for i in range(100)]})
    sums = made_files(tmp_path / dataset.base_folder, contents)
    monkeypatch.setattr(dataset, "train_list", [["one", sums["one"]], ["two", sums["two"]]])
    monkeypatch.setattr(dataset, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(dataset, "meta", {"filename": "meta", "key": dataset.meta["key"], "md5": sums["meta"]})

    splits = open_splits(DataConfig.model_validate({"source": source, "root": tmp_path, "download": False}))
    images = torch.from_numpy(planes).permute(0, 2, 3, 1)
    assert splits.test is not None
    assert torch.equal(splits.train.read(torch.arange(5)), images[:5])
    assert torch.equal(splits.test.read(torch.arange(2)), images[5:])
    expected = fine if source == "cifar10" else [CIFAR20_COARSE[label] for label in fine]
    assert splits.train.labels is not None and splits.test.labels is not None
    assert splits.train.labels.tolist() + splits.test.labels.tolist() == expected
    assert splits.train.paths[1] == f"{source}/train/1" and splits.pretext is None
    assert (splits.mean, splits.std) == STATISTICS[source]


def test_stl10_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files in STL-10's format: planar images stored column by column; the unlabelled ones join the pretext."""
    dataset = torchvision.datasets.STL10
    planes = np.random.default_rng(0).integers(0, 256, (9, 3, 96, 96), dtype=np.uint8)
    stored = planes.transpose(0, 1, 3, 2)
    contents = {
        "train_X.bin": stored[:3].tobytes(),
        "train_y.bin": bytes([1, 10, 4]),
        "unlabeled_X.bin": stored[3:7].tobytes(),
        "test_X.bin": stored[7:].tobytes(),
        "test_y.bin": bytes([2, 3]),
        "class_names.txt": b"\n".join(b"name%d" % i for i in range(10)),
    }
    sums = made_files(tmp_path / dataset.base_folder, contents)
    train_list = [[f, sums[f]] for f in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")]
    monkeypatch.setattr(dataset, "train_list", train_list)
    monkeypatch.setattr(dataset, "test_list", [[f, sums[f]] for f in ("test_X.bin", "test_y.bin")])

    splits = open_splits(DataConfig(source="stl10", root=tmp_path, download=False))
    images = torch.from_numpy(planes).permute(0, 2, 3, 1)
    assert splits.test is not None
    assert torch.equal(splits.train.read(torch.arange(3)), images[:3])
    assert torch.equal(splits.test.read(torch.arange(2)), images[7:])
    assert splits.train.labels is not None and splits.test.labels is not None
    assert splits.train.labels.tolist() == [0, 9, 3] and splits.test.labels.tolist() == [1, 2]
    assert splits.pretext is not None and splits.pretext.labels is None
    assert torch.equal(splits.pretext.read(torch.arange(7)), images[:7])
    assert splits.pretext.paths[:3] == splits.train.paths and splits.pretext.paths[3] == "stl10/unlabeled/00000"
    limited = open_splits(DataConfig(source="stl10", root=tmp_path, download=False, limit=2)).pretext
    assert limited is not None and len(limited) == 2
