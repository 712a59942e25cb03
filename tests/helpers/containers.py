"""The same encoded images as a folder, as tar shards, as Parquet files and as a Hugging Face data set."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Writer = Callable[[Path, "list[Item]"], str]


class Item(NamedTuple):
    """An encoded image: its key, its bytes, its label and its split."""

    key: str
    data: bytes
    label: str | None = None
    split: str = "train"
    suffix: str = "jpg"


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def splits_of(items: Sequence[Item]) -> dict[str, list[Item]]:
    return {split: [x for x in items if x.split == split] for split in dict.fromkeys(x.split for x in items)}


def write_folder(root: Path, items: list[Item]) -> str:
    several = len(splits_of(items)) > 1
    for item in items:
        folder = root / (item.split if several else "") / (item.label or "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{item.key}.{item.suffix}").write_bytes(item.data)
    return str(root)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_shards(root: Path, items: list[Item], per_shard: int = 7) -> str:
    for split, own in splits_of(items).items():
        for number, start in enumerate(range(0, len(own), per_shard)):
            members = {}
            for item in own[start : start + per_shard]:
                members[f"{item.key}.{item.suffix}"] = item.data
                if item.label is not None:
                    members[f"{item.key}.cls"] = item.label.encode()
            write_tar(root / f"{split}-{number:03d}.tar", members)
    return f"webdataset:{root}"


def write_parquet(root: Path, items: list[Item], per_file: int = 11) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    for split, own in splits_of(items).items():
        for number, start in enumerate(range(0, len(own), per_file)):
            part = own[start : start + per_file]
            columns: dict[str, list[Any]] = {"image": [{"bytes": item.data, "path": None} for item in part]}
            if part[0].label is not None:
                columns["label"] = [item.label for item in part]
            pq.write_table(pa.table(columns), root / f"{split}-{number:05d}.parquet", row_group_size=4)
    return f"parquet:{root}/*.parquet"


def write_huggingface(root: Path, items: list[Item]) -> str:
    import datasets

    found = {}
    for split, own in splits_of(items).items():
        features = datasets.Features({"image": datasets.Image()})
        columns: dict[str, list[Any]] = {"image": [{"bytes": item.data, "path": None} for item in own]}
        if own[0].label is not None:
            features["label"] = datasets.ClassLabel(
                names=sorted({item.label for item in items if item.label is not None})
            )
            columns["label"] = [item.label for item in own]
        found[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(found).save_to_disk(root)
    return f"hf:{root}"


CONTAINERS: dict[str, Writer] = {"webdataset": write_shards, "parquet": write_parquet, "hf": write_huggingface}
