"""Files of run folders, read by the functions of their artifacts, below any digest."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from scan_fast.errors import ScanFastError
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.saved import SavedModel
from scan_fast.runs import artifacts
from scan_fast.runs.artifacts import Artifact
from scan_fast.runs.config import Config
from scan_fast.runs.digests import is_archive
from scan_fast.runs.findings import DuplicateRow, Duplicates, OutlierRow, Outliers
from scan_fast.runs.names import GroupNames
from scan_fast.runs.records import (
    BackboneRecord,
    Checkpoint,
    Embeddings,
    ImageMap,
    MetricsEntry,
    Neighbors,
    PrecisionRecord,
    StageResult,
    SuggestedNumber,
    Summary,
)
from scan_fast.runs.tables import Assignments, Confusion
from scan_fast.runs.variants import COLUMNS, VariantTable

from ..archives import (
    ZIP_TOKENS,
    change_npy,
    change_pickle,
    change_zip,
    npz_of,
    random_array,
    read_zip,
    write_zip,
)
from ..mutations import TEXTS, WHOLE, as_json, change_table, change_tree, deep, mutate
from ..small_run import small_run
from ..target import Target, WrongResult

_JSON_TOKENS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b'"\\ud800"',
    b"\\u0000",
    b"[]",
    b"{}",
    b"null",
    b"true",
    b'"',
    b",",
    b":",
    b"{",
    b"[",
)
_CSV_TOKENS = (b'"', b'""', b"\r", b"\n", b",", b"\0", b"\xff", b"\xef\xbb\xbf", b"nan", b"-1", b"1e999", b"9" * 400)

_READ_BACK: tuple[type[BaseException], ...] = (ValueError, ScanFastError)
"""Errors of ``Artifact.load``: ValueError by its contract, and what a user can act on."""


def contents() -> dict[str, tuple[Artifact[Any], Any]]:
    """Return a valid content of artifacts, by their names; pictures and pages are left out, as anything is one."""
    rows = np.eye(3, 2, dtype=np.float32)
    index = np.array([[1, 2], [0, 2], [0, -1]], dtype=np.int64)
    weights = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}
    stages: dict[str, dict[str, Any]] = {
        "pretext": {"seconds": 1.5, "loss": 0.5},
        "clustering": {"seconds": 2, "test": {"acc": 0.5}, "files": {}},
    }
    table = Assignments(
        ["a/1.png", "b,2.png", "c\n3.png"], np.array([0, 1, 1]), np.array([0.9, 0.5, 1.0]), np.array([0.8, 0.0, 1.0]),
        ["train", "train", "test"], ["x", "", "y"], names={1: "boots"},
    )  # fmt: skip
    saved = SavedModel(
        "clustering", ModelConfig(), 2, 8, 8, "image", "exact", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), weights, "bilinear",
        torch.eye(2), torch.ones(2),
    )  # fmt: skip
    checkpoint = Checkpoint(
        weights, {"state": {}, "param_groups": [{"lr": 0.1}]}, {"best": 1}, 3, 1, 0, {"loss": torch.ones(())}, 1.0
    )
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 1.5) | {"variant": "a", "seeds": 3}
    found: list[tuple[Artifact[Any], Any]] = [
        (artifacts.CONFIG, Config()),
        (artifacts.SUMMARY, Summary(0, stages, {"kmeans": {"acc": 0.5}}, {"network": "a"})),
        (artifacts.METRICS, [MetricsEntry("pretext", epoch, 2, 1e9, {"loss": 0.5}) for epoch in (1, 2)]),
        (artifacts.PRECISION, PrecisionRecord("float32", "it was given", {"width": 1})),
        (artifacts.BACKBONE, BackboneRecord("a", "b", 8, [0.5] * 3, [0.2] * 3, "bilinear", None, None, None, 100)),
        (artifacts.SUGGESTION, SuggestedNumber(3, [{"k": 3, "score": 0.5, "stability": 0.9, "way": "kmeans"}])),
        (artifacts.NAMES, GroupNames("0" * 32, {0: "shoes", 1: "boots"})),
        (artifacts.SWEEP, {"seeds": [0, 1], "mean": 0.5}),
        (artifacts.ABLATION, {"variants": {"a": {"mean": 0.5}}}),
        (artifacts.ASSIGNMENTS, table),
        (artifacts.ASSIGNMENTS_PARQUET, table),
        (artifacts.CONFUSION, Confusion.of(np.array([[1, 2], [3, 4]]), ["x", "y"])),
        (artifacts.DUPLICATES, Duplicates([DuplicateRow(*_row_of(DuplicateRow))])),
        (artifacts.OUTLIERS, Outliers([OutlierRow(*_row_of(OutlierRow))])),
        (artifacts.ABLATION_TABLE, VariantTable([row])),
        (artifacts.EMBEDDINGS, Embeddings({"train": rows, "test": rows}, "0" * 32)),
        (artifacts.NEIGHBORS, Neighbors({"train": index}, {"train": index.astype(np.float32)})),
        (artifacts.MAP, ImageMap(rows, "0" * 32)),
        (artifacts.PRETEXT_MODEL, StageResult(weights, {"epoch": 1})),
        (artifacts.checkpoint("pretext"), checkpoint),
        (artifacts.MODEL, saved),
    ]
    return {artifact.name: (artifact, content) for artifact, content in found}


def _row_of(kind: type[Any]) -> list[Any]:
    return [{"int": 1, "float": 0.5}.get(str(field.type), "a.png") for field in kind.__dataclass_fields__.values()]


def written(artifact: Artifact[Any], content: Any) -> bytes:
    """Return the bytes of an artifact; zip files without the time at which they were written."""
    file = io.BytesIO()
    artifact.dump(content, file)
    data = file.getvalue()
    return write_zip(read_zip(data)) if artifact.name.endswith(".npz") else data


class _Loaded(Target):
    """Artifacts with names of these suffixes; an input is the name and the bytes."""

    suffixes: tuple[str, ...]
    permitted = _READ_BACK

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        chosen = {name: entry for name, entry in contents().items() if name.endswith(self.suffixes)}
        self._artifacts = {name: artifact for name, (artifact, _) in chosen.items()}
        self._files = {name: written(*entry) for name, entry in chosen.items()}
        for artifact in (artifacts.IMAGES, artifacts.DECODE_CACHE, artifacts.SKIPPED, artifacts.CLUSTER_MODEL):
            if artifact.name.endswith(self.suffixes) and (small_run(shared) / artifact.name).is_file():
                data = (small_run(shared) / artifact.name).read_bytes()
                self._artifacts[artifact.name] = artifact
                self._files[artifact.name] = write_zip(read_zip(data)) if artifact.name.endswith(".npz") else data
        self._names = list(self._files)
        self._others = list(self._files.values())
        self._members = {name: read_zip(data) for name, data in self._files.items() if is_archive(name)}

    def draw(self, rng: Random) -> Any:
        """Return the name of an artifact, and a changed file."""
        name = rng.choice(self._names)
        return name, self.changed(rng, name, self._files[name])

    def changed(self, rng: Random, name: str, data: bytes) -> bytes:
        """Return a changed file."""
        raise NotImplementedError

    def feed(self, given: Any, folder: Path) -> None:
        """Read the file; what is accepted must be written and read again."""
        name, data = given
        artifact = self._artifacts[name]
        content = artifact.load(io.BytesIO(data))
        file = io.BytesIO()
        try:
            artifact.dump(content, file)
            artifact.load(io.BytesIO(file.getvalue()))
        except Exception as error:
            raise WrongResult(
                f"{name} was read, but not written and read again: {type(error).__name__}: {error}"
            ) from error


class JsonFiles(_Loaded):
    """JSON and lines of JSON."""

    name = "json-files"
    share = 150
    suffixes = (".json", ".jsonl")

    def changed(self, rng: Random, name: str, data: bytes) -> bytes:
        """Change bytes, or a value."""
        if rng.random() < 0.4:
            return mutate(rng, data, self._others, _JSON_TOKENS)
        if rng.random() < 0.003:
            return json.dumps({"a": [1]}).replace("1", "[" * 100_000).encode()
        lines = [json.loads(line) for line in (data.splitlines() if name.endswith(".jsonl") else [data])]
        at = rng.randrange(len(lines))
        lines[at] = change_tree(rng, lines[at])
        return b"\n".join(map(as_json, lines))


class CsvFiles(_Loaded):
    """Tables."""

    name = "csv-files"
    share = 120
    suffixes = (".csv",)

    def changed(self, rng: Random, name: str, data: bytes) -> bytes:
        """Change bytes, or cells and rows."""
        if rng.random() < 0.4:
            return mutate(rng, data, self._others, _CSV_TOKENS)
        rows = change_table(rng, list(csv.reader(io.StringIO(data.decode(), newline=""))))
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")


class ArrayFiles(_Loaded):
    """Archives of arrays."""

    name = "npz-files"
    share = 100
    suffixes = (".npz",)

    def changed(self, rng: Random, name: str, data: bytes) -> bytes:
        """Change bytes, members, headers of arrays, or whole arrays."""
        kind = rng.random()
        if kind < 0.25:
            return mutate(rng, data, self._others, ZIP_TOKENS)
        if kind < 0.6:
            others = [member for members in self._members.values() for member in members]
            return change_zip(rng, self._members[name], lambda _, content: change_npy(rng, content), others)
        with np.load(io.BytesIO(data)) as file:
            arrays = {key: file[key] for key in file.files}
        for _ in range(rng.choice((1, 1, 2))):
            arrays[rng.choice((*arrays, "x", "key", "x_similarity", "/a", "a/b"))] = random_array(rng)
        return npz_of(arrays)


class TensorFiles(_Loaded):
    """Files of torch.save: checkpoints, results of stages, models."""

    name = "tensor-files"
    share = 100
    suffixes = (".pt",)

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._trees = {name: torch.load(io.BytesIO(data), weights_only=True) for name, data in self._files.items()}
        self._pickles = [
            content for members in self._members.values() for at, content in members if at.endswith(".pkl")
        ]

    def changed(self, rng: Random, name: str, data: bytes) -> bytes:
        """Change bytes, members, opcodes of the pickle, or values."""
        kind = rng.random()
        if kind < 0.25:
            return mutate(rng, data, self._others, ZIP_TOKENS)
        if kind < 0.6:

            def change(member: str, content: bytes) -> bytes:
                return change_pickle(rng, content, self._pickles) if member.endswith(".pkl") else mutate(rng, content)

            members = self._members[name]
            weighted = [member for member in members if member[0].endswith(".pkl") or rng.random() < 0.5]
            return change_zip(rng, weighted if rng.random() < 0.1 else members, change)
        return saved_tree(rng, self._trees[name])


def saved_tree(rng: Random, tree: Any) -> bytes:
    """Return the file of a changed tree of tensors and plain values."""
    changed = change_tree(rng, copy.deepcopy(tree), tensors(rng))
    file = io.BytesIO()
    try:
        torch.save(changed, file)
    except Exception:  # a text that no pickle holds, or a tree that is too deep for one
        return b"PK"
    return file.getvalue()


def tensors(rng: Random) -> list[Any]:
    """Return tensors of unusual kinds, and plain values beside them."""
    return [
        torch.zeros(0),
        torch.full((2, 3), math.nan),
        torch.ones(2, 3, dtype=rng.choice((torch.int8, torch.float16, torch.bool, torch.complex64, torch.bfloat16))),
        torch.ones(2, 3).to_sparse(),
        torch.ones(1).expand(2, 3),
        torch.empty(2, 3, device="meta"),
        torch.nn.Parameter(torch.ones(2)),
        {1: torch.ones(2), (1, 2): 3},
        (1, 2),
        {1, 2},
        torch.Size([2]),
        rng.choice(TEXTS),
        rng.choice(WHOLE),
        deep(rng) if rng.random() < 0.01 else b"bytes",
    ]


class Others(_Loaded):
    """Configurations and tables in Parquet."""

    name = "other-files"
    share = 25
    suffixes = (".yaml", ".parquet")

    def changed(self, rng: Random, name: str, data: bytes) -> bytes:
        """Change bytes."""
        tokens: tuple[bytes, ...] = (b"PAR1", b"\x15\x00", b"ARROW:schema", b"\x1f\x8b")
        return mutate(rng, data, (), tokens if name.endswith(".parquet") else ())


LOADERS: tuple[type[Target], ...] = (JsonFiles, CsvFiles, ArrayFiles, TensorFiles, Others)
