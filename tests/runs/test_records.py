"""The records of a run: what is written is read back, and what is damaged is refused with a reason."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from scan_fast.runs.images import ImageRecord
from scan_fast.runs.records import (
    Checkpoint,
    Embeddings,
    MetricsEntry,
    Neighbors,
    PrecisionRecord,
    StageResult,
    Summary,
    dump_metrics,
    load_metrics,
)


def read_back(record: Any) -> Any:
    file = io.BytesIO()
    record.dump(file)
    file.seek(0)
    return type(record).load(file)


CHECKPOINT = Checkpoint(
    model={"w": torch.arange(3.0)},
    optimizer={"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
    stage={"best": None, "pair": (1, "x")},
    n_images=160,
    epoch=2,
    step=1,
    totals={"loss": torch.tensor(1.5, dtype=torch.float64)},
    seconds=3.25,
)


def test_the_summary_is_read_back() -> None:
    summary = Summary(
        7, {"pretext": {"seconds": 1.2345, "knn_acc": 0.5}, "mining": {"seconds": 2}}, {"kmeans": {"a": 1}}
    )
    assert read_back(summary) == summary
    content = summary.to_dict()
    assert list(content) == ["seed", "stages", "seconds", "baselines"]
    assert content["seconds"] == 3.234
    assert Summary().to_dict() == {"seed": None, "stages": {}, "seconds": 0}
    assert read_back(Summary()) == Summary()


def test_metrics_are_read_back_without_lines_that_were_cut_short() -> None:
    entries = [MetricsEntry("pretext", e, 5 * e, 0.5, {"loss": 1 / e}) for e in (1, 2)]
    file = io.BytesIO()
    dump_metrics(entries, file)
    assert json.loads(file.getvalue().splitlines()[1]) == {
        "stage": "pretext",
        "epoch": 2,
        "step": 10,
        "time": 0.5,
        "loss": 0.5,
    }
    for end in (b'{"stage": "pre', b'{"stage": "s", "epoch": 1}', b"[1]", b"\xff\xfe", b'{"epoch": 1}', b"7"):
        assert load_metrics(io.BytesIO(file.getvalue() + end)) == entries


def test_precision_is_read_back() -> None:
    record = PrecisionRecord("bfloat16", "twice as fast", {"side": 8})
    assert read_back(record) == record


def test_arrays_are_read_back_by_split() -> None:
    rows = {split: np.eye(n, 3, dtype=np.float32) for split, n in (("train", 5), ("test", 2))}
    embeddings = read_back(Embeddings(rows))
    index = {split: np.full((len(r), 2), -1, dtype=np.int64) for split, r in rows.items()}
    similarity = {split: np.full((len(r), 2), -np.inf, dtype=np.float32) for split, r in rows.items()}
    neighbors = read_back(Neighbors(index, similarity))
    for wanted, found in ((rows, embeddings.rows), (index, neighbors.index), (similarity, neighbors.similarity)):
        assert list(found) == ["train", "test"]
        for split, array in wanted.items():
            assert found[split].dtype == array.dtype
            np.testing.assert_array_equal(found[split], array)


def test_checkpoints_are_read_back() -> None:
    found = read_back(CHECKPOINT)
    assert found.model["w"].equal(CHECKPOINT.model["w"])
    assert found.optimizer == CHECKPOINT.optimizer
    assert found.totals["loss"].dtype == torch.float64
    rest = ("stage", "n_images", "epoch", "step", "seconds")
    assert [getattr(found, name) for name in rest] == [getattr(CHECKPOINT, name) for name in rest]
    result = read_back(StageResult({"w": torch.ones(2)}, {"head": 1, "loss": 0.5}))
    assert result.model["w"].tolist() == [1, 1]
    assert result.record == {"head": 1, "loss": 0.5}


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def arrays(**content: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **content)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        (Summary, b"", "Expecting value"),
        (Summary, b"[]", "it must hold a mapping, it holds list"),
        (Summary, b"{}", "stages must hold"),
        (Summary, b'{"stages": {"pretext": {"seconds": "x"}}}', "stages must hold"),
        (Summary, b'{"stages": {}, "baselines": 3}', "baselines must hold"),
        (Summary, b"\xff", "invalid start byte"),
        (PrecisionRecord, b'{"precision": "float32"}', "must hold precision, reason and tried"),
        (Embeddings, b"", "it is no .npz of arrays"),
        (Embeddings, arrays(train=np.eye(2))[:200], "it is no .npz of arrays"),
        (Neighbors, arrays(train=np.eye(2)), "every split must have its indices and similarities, got train"),
        (Checkpoint, b"", "it is no file of tensors"),
        (Checkpoint, saved({"x": 1}), "it is no checkpoint of a stage, it holds x"),
        (Checkpoint, saved([1]), "it must hold a mapping, it holds list"),
        (Checkpoint, saved({"x": 1})[:100], "it is no file of tensors"),
        (StageResult, saved({"weights": {}}), "it is no result of a stage, it holds weights"),
    ],
)
def test_what_is_damaged_is_refused_with_a_reason(kind: Any, content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        kind.load(io.BytesIO(content))


def test_the_images_of_a_run_are_read_back() -> None:
    """Names may be any bytes but zero; fingerprints use all 64 bits."""
    names = ["a/b.png", "new\nline.png", "bad\udcff.png", "図.png", " "]
    marks = np.array([0, 1, 2**63, 2**64 - 1, 7], dtype=np.uint64)
    record = image_record(names, marks, {"train": 3, "test": 2})
    again = read_back(record)
    for name, value in vars(record).items():
        assert np.array_equal(getattr(again, name), value), name
    assert again.digest == record.digest
    assert again.split("test").names == names[3:] and again.split("test").fingerprints.tolist() == [2**64 - 1, 7]
    assert read_back(image_record([], marks[:0], {"train": 0})).names == []


def test_the_digest_of_images_depends_on_contents_names_order_and_splits() -> None:
    names, marks = ["a", "b", "c"], np.array([1, 2, 3], dtype=np.uint64)
    first = image_record(names, marks, {"train": 2, "test": 1})
    others = [
        image_record(["a", "x", "c"], marks, first.splits),
        image_record(names, marks + np.uint64(1), first.splits),
        image_record(["b", "a", "c"], marks[[1, 0, 2]], first.splits),
        image_record(names, marks, {"train": 1, "test": 2}),
        image_record(["a", "bc", ""], marks, first.splits),
    ]
    assert len({each.digest for each in (first, *others)}) == 6
    # Not on what belongs to a disk, or is for reporting only.
    touched = replace(first, mtimes=np.arange(3), stamps=np.ones((3, 4), np.int64), labels=np.zeros(3, np.int64))
    assert touched.digest == first.digest


def image_record(names: list[str], marks: np.ndarray, splits: dict[str, int]) -> ImageRecord:
    n = len(names)
    stamps = np.arange(4 * n).reshape(n, 4)
    return ImageRecord(names, marks, "quick", stamps, np.full(n, -1), splits, np.arange(n) - 1, ["cat", "図"])


def test_a_record_of_other_arrays_is_refused() -> None:
    whole = io.BytesIO()
    image_record(["a", "b"], np.zeros(2, np.uint64), {"train": 2}).dump(whole)
    whole.seek(0)
    with np.load(whole) as file:
        good = {name: file[name] for name in file.files}
    for arrays, message in (
        ({"train": np.zeros(3)}, "it must hold began, class_names, counts, .*, it holds train"),
        (good | {"fingerprints": np.zeros(1, np.uint64)}, r"fingerprints must be \(2,\) uint64 for its 2 names"),
        (good | {"fingerprints": np.zeros(2)}, r"got \(2,\) float64"),
        (good | {"stamps": np.zeros((2, 3), np.int64)}, r"stamps must be \(2, 4\) int64"),
        (good | {"counts": np.array([3])}, r"in splits of \[3\]"),
        (good | {"kind": np.array("ends")}, "of the kind 'ends'"),
    ):
        file = io.BytesIO()
        np.savez(file, **arrays)
        file.seek(0)
        with pytest.raises(ValueError, match=message):
            ImageRecord.load(file)
