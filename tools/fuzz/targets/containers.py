"""Files beside or around images: shards, tables, lists of classes and labels, nearest neighbours."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torchvision.datasets  # noqa: F401  (imported when it is needed; here once for all processes)

from scan_fast.data.containers import find_files, split_files
from scan_fast.data.datasets import DataConfig, open_splits, source_from
from scan_fast.data.neighbor_files import read_neighbors
from scan_fast.data.sources import Source
from scan_fast.errors import DataError, MissingPackageError

from ..archives import NPY_TOKENS, change_npy, random_array
from ..mutations import TEXTS, WHOLE, as_json, bytes_like, change_tree, mutate
from ..pictures import pictures
from ..target import Target, WrongResult, write

_TAR_TOKENS = (
    b"ustar\x0000", b"ustar  \0", b"././@LongLink", b"0000000", b"7777777", b"\x80\0\0\0\0\0\0\0\0\0\0\1",
    b"GNU.sparse.major=1\n", b"12 size=99\n",
    b"11 path=/x\n", b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"5", b"\0" * 512,
)  # fmt: skip
_PARQUET_TOKENS = (
    b"PAR1",
    b"\x15\x00",
    b"\x15\x02",
    b"ARROW:schema",
    b"image",
    b"bytes",
    b"path",
    b"label",
    b"\x1f\x8b",
    b"\x19\x18",
)


def check_source(source: Source, wanted: int | None = None) -> None:
    """Read all images of a source.

    Raises:
        WrongResult: if they are fewer than the source says, or not of its size.
    """
    images = source.read(torch.arange(len(source)))
    if tuple(images.shape[:3]) != (len(source), source.size, source.size) or len(source.paths) != len(source):
        raise WrongResult(
            f"{len(source)} images of {source.size} pixels, {len(source.paths)} names, got {tuple(images.shape)}"
        )
    if source.labels is not None:
        names = source.class_names or []
        if len(source.labels) != len(source) or not 0 <= int(source.labels.min()) <= int(source.labels.max()) < len(
            names
        ):
            raise WrongResult(
                f"the labels {source.labels.tolist()} do not fit {len(source)} images of {len(names)} classes"
            )
    if wanted is not None and len(source) + len(source.skipped) != wanted:
        raise WrongResult(f"of {wanted} images {len(source)} are read and {len(source.skipped)} left out")


def _settings(rng: Random) -> dict[str, Any]:
    return {
        "image_size": 8,
        "on_error": rng.choice(("raise", "skip")),
        "resident": rng.choice(("files", "host")),
        "labels": rng.choice(("auto", "auto", "none")),
        "download": False,
        "workers": 1,
    }


class _Container(Target):
    permitted: ClassVar[tuple[type[BaseException], ...]] = (DataError, MissingPackageError, OSError)

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        found = pictures()
        self._pictures = [found[name] for name in ("plain.png", "baseline.jpg", "grey.jpg", "plain.gif")]


class Shards(_Container):
    """Tar files of images and labels."""

    name = "tar-shards"
    share = 40
    memory_mib = 3000  # as for images

    def draw(self, rng: Random) -> Any:
        """Return the bytes of a tar file, and settings."""
        members: list[tuple[str, bytes]] = []
        for number in range(rng.choice((1, 2, 3))):
            members.append((f"a/{number:03d}.png", rng.choice(self._pictures)))
            kind = rng.random()
            if kind < 0.4:
                word = str(rng.choice((0, 1, "cat", *WHOLE, *TEXTS)))
                members.append((f"a/{number:03d}.cls", word.encode("utf-8", "surrogatepass")))
            elif kind < 0.8:
                label = change_tree(rng, {"label": 1, "cls": "cat"}) if rng.random() < 0.5 else {"label": number}
                members.append((f"a/{number:03d}.json", as_json(label)))
        file = io.BytesIO()
        form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if rng.random() < 0.1:
                    info.name = rng.choice((*TEXTS, "../../x.png", "/x.png", f"{'d/' * 120}x.png")) or "x"
                if rng.random() < 0.05:
                    info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
                    info.linkname = "/etc/passwd"
                info.size = len(content) if info.isreg() else 0
                try:
                    archive.addfile(info, io.BytesIO(content))
                except (ValueError, UnicodeError):  # a name that the format does not hold
                    continue
        data = file.getvalue()
        data = data[: -rng.choice((1, 512, 1024, 8192))] if rng.random() < 0.3 else data
        return data if rng.random() < 0.3 else mutate(rng, data, (), _TAR_TOKENS), _settings(rng)

    def feed(self, given: Any, folder: Path) -> None:
        """Open the shard."""
        data, settings = given
        write(folder, "0.tar", data)
        check_source(source_from(f"webdataset:{folder}/0.tar", DataConfig(**settings)))


class ParquetTables(_Container):
    """Parquet files with images."""

    name = "parquet-tables"
    share = 25
    memory_mib = 3000  # as for images

    def draw(self, rng: Random) -> Any:
        """Return rows of a table, how its file is changed, and settings. The file itself is written in :meth:`feed`."""
        rows: list[dict[str, Any]] = []
        for number in range(rng.choice((0, 1, 2, 3))):
            image: dict[str, Any] = {"bytes": rng.choice(self._pictures), "path": None}
            if rng.random() < 0.15:
                image = {"bytes": None, "path": rng.choice((None, "0.png", "/etc/passwd", "../x", "", "\0", "."))}
            rows.append({"image": image, "label": rng.choice((number, number, None))})
        return rows, rng.random() < 0.3, rng.randrange(1 << 30), _settings(rng)

    def feed(self, given: Any, folder: Path) -> None:
        """Write the table, change its bytes, open it."""
        rows, sound, number, settings = given
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        schema = pyarrow.schema([("image", kind), ("label", pyarrow.int64())])
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file, row_group_size=2)
        data = file.getvalue()
        write(folder, "0.png", self._pictures[0])
        write(folder, "0.parquet", data if sound else mutate(Random(number), data, (), _PARQUET_TOKENS))
        check_source(source_from(f"parquet:{folder}/0.parquet", DataConfig(**settings)), len(rows) if sound else None)


class Neighbours(_Container):
    """Files of nearest neighbours."""

    name = "neighbor-files"
    share = 30
    permitted = (DataError,)

    def draw(self, rng: Random) -> Any:
        """Return the bytes of a file and the number of images."""
        n = rng.choice((1, 3, 3, 6))
        array: Any = np.array(
            [[row, *(rng.randrange(n) for _ in range(3))] for row in range(n)],
            dtype=rng.choice(("i8", "i4", "u8", "i2")),
        )
        if rng.random() < 0.3:
            array = random_array(rng)
        elif rng.random() < 0.3:
            array[rng.randrange(n), rng.randrange(4)] = rng.choice(
                (n, n - 1, 0, 100, *((-1,) if array.dtype.kind == "i" else ()))
            )
        file = io.BytesIO()
        np.save(file, array)
        data = file.getvalue()
        kind = rng.random()
        if kind < 0.3:
            data = change_npy(rng, data)
        elif kind < 0.6:
            data = mutate(rng, data, (), NPY_TOKENS)
        return data, n

    def feed(self, given: Any, folder: Path) -> None:
        """Read the neighbours."""
        data, n = given
        found = read_neighbors(write(folder, "a.npy", data), n)
        if found.dtype != np.int64 or found.ndim != 2 or len(found) != n or found.min() < -1 or found.max() >= n:
            raise WrongResult(f"{found.dtype} {found.shape} of {n} images")


class Patterns(_Container):
    """Patterns that select files, and the splits that their names tell."""

    name = "file-patterns"
    share = 20
    _parts = (
        "{",
        "}",
        "..",
        "0..3",
        "{0..2}",
        "{a,b}",
        "{000..011}",
        "{9..1}",
        "*",
        "**",
        "?",
        "[",
        "]",
        "[!a]",
        "/",
        "a",
        ".tar",
        "train-0.tar",
        "val/",
    )

    def draw(self, rng: Random) -> Any:
        """Return a pattern and the names of files."""
        parts = [rng.choice((*self._parts, *TEXTS, *map(str, WHOLE))) for _ in range(rng.randrange(1, 7))]
        if rng.random() < 0.05:
            parts.append("{0.." + rng.choice(("1000", "9" * 9, "9" * 18, "9" * 5000, "7")) + "}")
        names = ("train-0.tar", "test-0.tar", "a.tar", "val/1.tar", "val/train.tar", "{.tar", "[0].tar", "b")
        # Folders outside, or wildcards of any depth in them, would be walked through.
        outside = "/~" if "**" in "".join(parts) else ""
        pattern = "".join(parts).translate({ord(mark): None for mark in outside}).lstrip("{/~")
        return pattern, rng.sample(names, rng.randrange(1, 5))

    def feed(self, given: Any, folder: Path) -> None:
        """Find the files, and split them."""
        pattern, names = given
        (folder / "val").mkdir()
        for name in names:
            write(folder, name, b"")
        files = find_files(pattern, folder, (".tar",))
        train, test, unused = split_files(files)
        if sorted([*train, *(test or ()), *unused]) != files:
            raise WrongResult(f"of {files} {train} are trained on, {test} held out and {unused} not used")


class Lists(_Container):
    """Lists of classes and labels, and data sets with pickles, in their folders."""

    name = "label-files"
    share = 25

    def draw(self, rng: Random) -> Any:
        """Return the files of a folder by name, and settings."""
        settings = _settings(rng)
        text = mutate if rng.random() < 0.8 else _unchanged
        kind = rng.random()
        if kind < 0.35:
            classes = text(
                rng, b"n01 cat\nn02 dog\n", (b"a\nb\n",), (b"\n", b"\r", b"..", b"/", b"\x85", b"\0", b"\xff", b" ")
            )
            return {"n01/a.png": 0, "n02/b.png": 0, "classes.txt": classes}, {
                **settings,
                "source": rng.choice(("folder", "imagenet")),
            }
        if kind < 0.7:
            files: dict[str, Any] = {
                "train/n01/a.png": 0,
                "train/n02/b.png": 0,
                "val/images/v0.png": 0,
                "val/images/v1.png": 0,
            }
            lists = {
                "val/val_annotations.txt": b"v0.png\tn01\t0\t0\t6\t6\nv1.png\tn02\t0\t0\t6\t6\n",
                "wnids.txt": b"n01\nn02\n",
                "words.txt": b"n01\tcat, felis\nn02\tdog\n",
            }
            for name, content in lists.items():
                if rng.random() < 0.8:
                    files[name] = text(rng, content, list(lists.values())) if rng.random() < 0.6 else content
            return files, {**settings, "source": "tinyimagenet"}
        batch = pickle.dumps(
            {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0, 1], b"label_names": [b"a"]}, protocol=2
        )
        evil = b"cos\nsystem\n(S'true'\ntR."
        names = (
            "data_batch_1",
            "data_batch_2",
            "data_batch_3",
            "data_batch_4",
            "data_batch_5",
            "test_batch",
            "batches.meta",
        )
        prefix, source = rng.choice(
            (("cifar-10-batches-py", "cifar10"), ("cifar-100-python", "cifar20"), ("stl10_binary", "stl10"))
        )
        chosen = {
            f"{prefix}/{name}": rng.choice((evil, mutate(rng, batch), bytes_like(rng, 64)))
            for name in (*names, "train", "test", "meta", "train_X.bin")
        }
        return chosen, {**settings, "source": source}

    def feed(self, given: Any, folder: Path) -> None:
        """Open the data set."""
        files, settings = given
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(folder, name, self._pictures[0] if content == 0 else content)
        config = DataConfig(
            root=folder, classes_file=folder / "classes.txt" if "classes.txt" in files else None, **settings
        )
        splits = open_splits(config)
        for source in (splits.train, splits.test):
            if source is not None:
                check_source(source)


def _unchanged(rng: Random, data: bytes, others: Any = (), tokens: Any = ()) -> bytes:
    return data


CONTAINERS: tuple[type[Target], ...] = (Shards, ParquetTables, Neighbours, Patterns, Lists)
