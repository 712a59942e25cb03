"""Patterns, splits and labels of container files, and what is wrong with damaged ones."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from containers import Item, encoded, write_huggingface, write_parquet, write_tar
from images import varied

from scan_fast.data import DataConfig, Splits, open_splits, source_from
from scan_fast.data.containers import class_numbers, expand_braces, find_files, split_files
from scan_fast.data.kinds import absolute_source
from scan_fast.errors import DataError

PIXELS = varied(12, 20, 20).numpy()
JPEG = [encoded(pixels) for pixels in PIXELS]


def paths_of(source: str, **options: object) -> list[str]:
    config = DataConfig.model_validate({"image_size": 8, **options})
    return source_from(source, config).paths


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("x-{008..011}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(DataError, match=r"the range \{3\.\.1\} is descending; write \{1\.\.3\}"):
        expand_braces("{3..1}.tar")


def test_files_are_found_by_pattern(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b/c.tar", "note.txt", "[x].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def found(pattern: str, root: Path | None = tmp_path) -> list[str]:
        return [Path(file).relative_to(tmp_path).as_posix() for file in find_files(pattern, root, (".tar",))]

    assert found("a-{0..1}.tar") == found("a-?.tar") == ["a-0.tar", "a-1.tar"]
    assert found(str(tmp_path), None) == ["[x].tar", "a-0.tar", "a-1.tar", "b/c.tar"]
    assert found("**/c.tar") == ["b/c.tar"] and found("[x].tar") == ["[x].tar"]
    with pytest.raises(DataError, match=r"a-2\.tar matches no file"):
        found("a-{0..2}.tar")
    with pytest.raises(DataError, match=r"no files found in .*empty: looked for \*\.tar"):
        (tmp_path / "empty").mkdir()
        found("empty")
    with pytest.raises(DataError, match="only local files are read"):
        found("https://example.org/{000..010}.tar")


def test_splits_follow_the_names_of_files_and_folders() -> None:
    def split(*files: str) -> tuple[list[str], list[str] | None, list[str]]:
        train, test, unused = split_files([f"/data/{file}" for file in files])
        return [f[6:] for f in train], None if test is None else [f[6:] for f in test], [f[6:] for f in unused]

    hub = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet")
    assert split(*hub) == (list(hub[:2]), [hub[2]], [])
    assert split("train/0.tar", "val/0.tar", "test/0.tar") == (["train/0.tar"], ["test/0.tar"], ["val/0.tar"])
    assert split("train-0.tar", "extra-0.tar") == (["train-0.tar", "extra-0.tar"], None, [])
    assert split("training.tar", "tests.tar") == (["training.tar", "tests.tar"], None, [])
    with pytest.raises(DataError, match=r"extra-0\.tar belongs to no split by its name"):
        split("train-0.tar", "test-0.tar", "extra-0.tar")


def test_labels_are_numbered_in_order() -> None:
    numbers, names = class_numbers(["10", "9", "10"])
    assert numbers is not None and numbers.tolist() == [1, 0, 1] and names == ["9", "10"]
    numbers, names = class_numbers(["b", "10", "9"])
    assert numbers is not None and numbers.tolist() == [2, 0, 1] and names == ["10", "9", "b"]
    assert class_numbers([1, None]) == (None, None) and class_numbers([]) == (None, None)


def test_a_sample_is_its_image_and_its_label(tmp_path: Path) -> None:
    members = {
        "__meta__.json": b"{}",
        "readme.txt": b"no image",
        "a/0001.jpg": JPEG[0],
        "a/0001.seg.png": encoded(PIXELS[1], "PNG"),
        "a/0001.json": json.dumps({"label": 3}).encode(),
        "b/0001.JPG": JPEG[2],
        "b/0001.cls": b"12\n",
        "b/0002.left.jpg": JPEG[3],
        "b/0002.cls": b"3",
    }
    write_tar(tmp_path / "x.tar", members)
    source = source_from(f"webdataset:{tmp_path}/x.tar", DataConfig(image_size=20))
    assert source.paths == ["x.tar: a/0001.jpg", "x.tar: b/0001.JPG", "x.tar: b/0002.left.jpg"]
    assert source.labels is not None and source.labels.tolist() == [0, 1, 0] and source.class_names == ["3", "12"]
    pixels = source.read(torch.arange(3))
    for number, data in enumerate((JPEG[0], JPEG[2], JPEG[3])):
        (tmp_path / "x.jpg").write_bytes(data)
        file = source_from([tmp_path / "x.jpg"], DataConfig(image_size=20))
        assert torch.equal(pixels[number], file.read(torch.tensor([0]))[0])


def test_ambiguous_samples_and_labels_are_named_or_skipped(tmp_path: Path) -> None:
    members = {f"{i}.jpg": data for i, data in enumerate(JPEG[:4])}
    write_tar(tmp_path / "x.tar", members | {"4.jpg": JPEG[4], "4.png": JPEG[4], "5.jpg": JPEG[5], "5.json": b"{"})
    source = f"webdataset:{tmp_path}/x.tar"
    with pytest.raises(DataError, match=r"x\.tar: 4: the sample has 2 images: 4\.jpg, 4\.png"):
        paths_of(source)
    config = DataConfig(source=source, on_error="skip", image_size=8)
    skipped = dict(open_splits(config).train.skipped)
    assert list(skipped) == ["x.tar: 4", "x.tar: 5"] and "its label cannot be read" in skipped["x.tar: 5"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            (tmp_path / "0.jpg").write_bytes(JPEG[0])
            archive.add(tmp_path / "0.jpg", "0.jpg")
    with pytest.raises(DataError, match=r"holds 0\.jpg twice"):
        paths_of(source)


def test_damaged_and_compressed_shards(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    source = f"webdataset:{path}"
    write_tar(path, {f"{i}.jpg": data for i, data in enumerate(JPEG)})
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        offset = archive.getmember("8.jpg").offset_data
    path.write_bytes(content[: offset + 100])
    with pytest.raises(DataError, match=r"cannot read image .*x\.tar"):
        paths_of(source)
    config = DataConfig(source=source, on_error="skip", image_size=8)
    splits = open_splits(config)
    assert len(splits.train) == 8 and splits.test is None
    path.write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match=r"no images found in .*x\.tar.*ReadError"):
        paths_of(source)
    with tarfile.open(path, "w:gz") as archive:
        (tmp_path / "0.jpg").write_bytes(JPEG[0])
        archive.add(tmp_path / "0.jpg", "0.jpg")
    with pytest.raises(DataError, match=r"x\.tar is compressed"):
        paths_of(source)
    write_tar(path, {"a.txt": b"text"})
    with pytest.raises(DataError, match=r"no images found in .*x\.tar: looked for members such as 0001\.jpg"):
        paths_of(source)


def test_parquet_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "x.parquet"
    source = f"parquet:{file}"

    def written(**columns: object) -> list[str]:
        pq.write_table(pa.table(columns), file)
        return paths_of(source)

    assert written(image=JPEG) == [f"x.parquet row {i}" for i in range(12)]
    assert len(written(photo=pa.array(JPEG, pa.large_binary()), name=["a"] * 12)) == 12
    assert len(written(image=JPEG, mask=JPEG)) == 12
    with pytest.raises(DataError, match=r"must have a column image .*it has left \(binary\), right \(binary\)"):
        written(left=JPEG, right=JPEG)
    with pytest.raises(DataError, match=r"must have a column image .*it has image \(int64\)"):
        written(image=[1, 2])
    with pytest.raises(DataError, match=r"cannot read image .*x\.parquet row 2: ValueError: the row holds no image"):
        written(image=[*JPEG[:2], None])
    (tmp_path / "beside.jpg").write_bytes(JPEG[0])
    assert len(written(image=[{"bytes": None, "path": "beside.jpg"}, {"bytes": JPEG[1], "path": None}])) == 2
    with pytest.raises(DataError, match="have no rows"):
        written(image=pa.array([], pa.binary()))
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        paths_of(source)


def test_rows_of_many_groups_are_read_in_any_order(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    items = [Item(str(i), JPEG[i % 12], str(i % 12)) for i in range(90)]
    source = source_from(write_parquet(tmp_path, items), DataConfig(image_size=20, resident="files", workers=6))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    one_each = source.read(torch.arange(12))
    assert torch.equal(source.read(order), one_each[order % 12])
    assert source.labels is not None and torch.equal(source.labels, torch.arange(90) % 12)


def test_containers_that_vanish_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"{i}.jpg": data for i, data in enumerate(JPEG)})
    source = source_from(f"webdataset:{tmp_path}/x.tar", DataConfig(image_size=8, resident="files"))
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*x\.tar: 3\.jpg: FileNotFoundError"):
        source.read(torch.tensor([3]))


def test_hugging_face_splits_and_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["x", "y"])})

    def part(first: int, labels: list[int]) -> object:
        rows = [{"bytes": data, "path": None} for data in JPEG[first : first + len(labels)]]
        return datasets.Dataset.from_dict({"img": rows, "fine": labels}, features=features)

    found = {"a": part(0, [1, 0, 1]), "b": part(3, [0, 1]), "hidden": part(5, [-1, -1])}
    datasets.DatasetDict(found).save_to_disk(tmp_path)

    def opened(splits: str) -> Splits:
        return open_splits(DataConfig(source=f"hf:{tmp_path}{splits}", image_size=8))

    both = opened(":a:b")
    assert both.train.paths == ["a row 0", "a row 1", "a row 2"]
    assert both.test is not None and both.test.paths == ["b row 0", "b row 1"]
    assert both.train.labels is not None
    assert both.train.labels.tolist() == [1, 0, 1] and both.train.class_names == ["x", "y"]
    assert opened(":a:hidden").train.labels is None
    assert len(opened(":a").train) == 3 and opened(":a").test is None
    with pytest.raises(DataError, match=r"has no split train but a, b, hidden; name one or two, such as hf:.*:a"):
        opened("")
    with pytest.raises(DataError, match=r"there is no split 'c'; its splits are a, b, hidden"):
        opened(":c")
    with pytest.raises(DataError, match="names 3 splits"):
        opened(":a:b:hidden")
    with pytest.raises(DataError, match=r"hf:.*nowhere.* cannot be opened"):
        open_splits(DataConfig(source=f"hf:{tmp_path}/nowhere", download=False))


def test_hugging_face_reads_local_folders_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    photos = tmp_path / "photos"
    for i, data in enumerate(JPEG):
        of_class = photos / "xy"[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        (of_class / f"{i:02d}.jpg").write_bytes(data)
    config = DataConfig(root=tmp_path / "cache", image_size=20, resident="files")
    source = source_from(f"hf:{photos}", config)
    assert source.labels is not None and source.labels.tolist() == [0] * 6 + [1] * 6
    assert source.class_names == ["x", "y"]
    folder = source_from(photos, DataConfig(image_size=20))
    assert torch.equal(source.read(torch.arange(12)), folder.read(torch.arange(12)))
    write_parquet(tmp_path / "rows", [Item(str(i), data, "xy"[i % 2]) for i, data in enumerate(JPEG)], per_file=12)
    rows = source_from(f"hf:{tmp_path}/rows/train-00000.parquet", config)
    assert torch.equal(rows.read(torch.arange(0, 12, 2)), folder.read(torch.arange(6)))
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    paths = [str(path) for path in sorted(photos.rglob("*.jpg"), key=lambda path: path.name)]
    for name, column in (("binary", JPEG), ("paths", paths)):
        pq.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet")
        plain = source_from(f"hf:{tmp_path}/{name}.parquet", config)
        assert torch.equal(plain.read(torch.arange(0, 12, 2)), folder.read(torch.arange(6))), name


def test_hugging_face_configurations_are_named_after_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "two"
    for name, rows in (("small", JPEG[:5]), ("large", JPEG[5:])):
        write_parquet(root / name, [Item(str(i), data, "x") for i, data in enumerate(rows)], per_file=12)
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: small\n  data_files: small/*.parquet\n"
        "- config_name: large\n  data_files: large/*.parquet\n---\n"
    )
    config = DataConfig(root=tmp_path / "cache", image_size=8)
    assert len(source_from(f"hf:{root}#small", config)) == 5
    assert len(source_from(f"hf:{root}#large:train[:4]", config)) == 4
    with pytest.raises(
        DataError, match=r"(?s)hf:.*two cannot be opened: .*\['small', 'large'\].*such as hf:.*two#small"
    ):
        source_from(f"hf:{root}", config)
    with pytest.raises(DataError, match=r"hf:.*two#middle cannot be opened: ValueError: .*'middle' not found"):
        source_from(f"hf:{root}#middle", config)
    monkeypatch.chdir(tmp_path)
    assert absolute_source("hf:two#small:train") == f"hf:{root}#small:train"
    saved = write_huggingface(tmp_path / "saved", [Item(str(i), data, "x") for i, data in enumerate(JPEG)])
    with pytest.raises(DataError, match="a saved data set has no configurations"):
        source_from(f"{saved}#small", config)
