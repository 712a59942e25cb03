"""Inputs that fuzzing has found to end in the wrong error, or in none: each once, made small."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scan_fast.ablation import configure, read_ablation, variants_of
from scan_fast.data.containers import expand_braces
from scan_fast.errors import ConfigError, DataError, UsageError
from scan_fast.runs import artifacts
from scan_fast.runs.artifacts import Artifact
from scan_fast.runs.config import build_config
from scan_fast.runs.digests import is_archive, seal
from scan_fast.runs.names import parse_group
from scan_fast.runs.variants import COLUMNS


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _parquet(**changed: Any) -> Callable[[], bytes]:
    def made() -> bytes:
        import pyarrow
        import pyarrow.parquet

        columns = {"path": ["a"], "cluster": [0], "confidence": [0.5], "margin": [0.5], "split": ["train"]} | changed
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        return file.getvalue()

    return made


_LONG = b"x" * 140_000
_ASSIGNMENTS = b"path,cluster,confidence,margin,split\n"
_ROWS, _INDEX = np.eye(2, dtype=np.float32), np.array([[1], [0]])
_VARIANTS = ",".join(COLUMNS).encode() + b"\n" + b"," * len(COLUMNS) + b"\n"

REFUSED: dict[str, tuple[Artifact[Any], bytes | Callable[[], bytes], str]] = {
    "assignments with a long cell": (artifacts.ASSIGNMENTS, _ASSIGNMENTS + _LONG, "no CSV"),
    "confusion with a long cell": (artifacts.CONFUSION, _LONG, "no CSV"),
    "copies with a long cell": (artifacts.DUPLICATES, _LONG, "no CSV"),
    "skipped with a long cell": (artifacts.SKIPPED, b"path,reason\n" + _LONG, "no CSV"),
    "variants with an open quote": (artifacts.ABLATION_TABLE, b'"', "no CSV"),
    "variants with a cell too many": (artifacts.ABLATION_TABLE, _VARIANTS, "1 cells too many"),
    "count beyond 64 bits": (artifacts.CONFUSION, b"x,a\na,9223372036854775808\n", "too large"),
    "cluster beyond 64 bits": (artifacts.ASSIGNMENTS, _ASSIGNMENTS + b"a,9223372036854775808,1,1,train\n", "be below"),
    "parquet with damaged metadata": (
        artifacts.ASSIGNMENTS_PARQUET,
        lambda: (data := _parquet()())[:-20] + b"\xff" * 8 + data[-12:],
        "no table of assignments",
    ),
    "parquet with texts for clusters": (artifacts.ASSIGNMENTS_PARQUET, _parquet(cluster=["a"]), "no table of"),
    "parquet with lists for names": (artifacts.ASSIGNMENTS_PARQUET, _parquet(path=[["a"]]), "no table of"),
    "parquet with an empty cell": (artifacts.ASSIGNMENTS_PARQUET, _parquet(cluster=[None]), "empty cells"),
    "parquet with a negative cluster": (artifacts.ASSIGNMENTS_PARQUET, _parquet(cluster=[-1]), "must be from 0 to"),
    "result of a stage with numbers for names": (artifacts.PRETEXT_MODEL, lambda: _saved({1: 2}), "it holds 1"),
    "embeddings of other numbers": (artifacts.EMBEDDINGS, _npz(train=_ROWS.astype(int)), "float32, got"),
    "embeddings that are no matrix": (artifacts.EMBEDDINGS, _npz(train=_ROWS[0]), r"got \(2,\) float32"),
    "neighbours beyond the images": (
        artifacts.NEIGHBORS,
        _npz(train=_INDEX + 1, train_similarity=_ROWS[:, :1]),
        "names image 2; its images are numbered from 0 to 1",
    ),
    "neighbours that are no numbers": (
        artifacts.NEIGHBORS,
        _npz(train=_INDEX.astype(str), train_similarity=_ROWS[:, :1]),
        "int64, got",
    ),
    "neighbours with too few similarities": (
        artifacts.NEIGHBORS,
        _npz(train=_INDEX, train_similarity=_ROWS[:1, :1]),
        "train_similarity must be",
    ),
}  # fmt: skip
"""An artifact, what is in its file, and a part of the reason for which it is refused."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_fuzzing_has_found_is_refused(name: str, tmp_path: Path) -> None:
    artifact, content, reason = REFUSED[name]
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content())
    if is_archive(artifact.name):
        with path.open("r+b") as file:
            seal(file)
    with pytest.raises(artifact.error, match=reason):
        artifacts.read(artifact, path)


def test_braces_that_stand_for_too_many_names_are_refused() -> None:
    assert expand_braces("a{08..10}{x,y}b") == [f"a{n}{c}b" for n in ("08", "09", "10") for c in "xy"]
    assert len(expand_braces("{a}" * 3000)[0]) == 3000
    for pattern in (
        "{0..999999999}",
        "{0.." + "9" * 5000 + "}",
        "{0..1000}{0..1000}",
        "{0..9}{0..9}{a,b}{0..9}{0..9}{0..9}",
    ):
        with pytest.raises(DataError, match="more than 100,000 paths"):
            expand_braces(pattern)


def test_a_value_that_cannot_be_shown_is_refused_in_short() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    wide = [[["a"] * 1000] * 1000] * 1000
    for value in (deep, wide, "a" * 10**6, int("f" * 5000, 16), [2**63]):
        with pytest.raises(ConfigError, match=r"pretext.*epochs") as refused:
            build_config({"pretext": {"epochs": value}})
        assert len(str(refused.value)) < 1000


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a group is a number from 0 to 2"):
        parse_group("9" * 5000, 3)
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"variants: {{a: {{clustering: {{n_clusters: {'9' * 5000}x}}}}}}")
    base = tmp_path / "base.yaml"
    base.write_text("clustering: {n_clusters: 3}\n")
    ablation = read_ablation(plan)
    with pytest.raises(ConfigError, match="n_clusters"):
        variants_of(ablation, configure(ablation, base, ()))
