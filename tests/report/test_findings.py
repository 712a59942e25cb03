"""Copies, outliers, linked groups and the map of a run of files."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
from report_runs import Page, grouped_run, photograph, plain_sources, report_of, write_run

from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def test_copies_are_listed_and_similar_photographs_are_not(tmp_path: Path) -> None:
    folder, run = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for seed in range(8):
        photograph(seed, (400, 300)).save(folder / f"{seed}.jpg", quality=92)
    shutil.copy(folder / "0.jpg", folder / "exact.jpg")
    photograph(1, (400, 300)).resize((200, 150)).save(folder / "small.png")
    photograph(2, (400, 300)).save(folder / "poor.jpg", quality=25)
    photograph(2, (400, 300)).resize((800, 600)).save(folder / "large.jpg", quality=90)
    names = [*(f"{seed}.jpg" for seed in range(8)), "exact.jpg", "small.png", "poor.jpg", "large.jpg"]
    seeds = [*range(8), 0, 1, 2, 2]
    # To the network, photographs 3 to 7 are nearly the same: their pixels say that they are not.
    generator = np.random.default_rng(0)
    kinds = generator.normal(size=(4, 24))[np.minimum(seeds, 3)]
    source = grouped_run(run, folder, names, kinds + generator.normal(0, 0.02, kinds.shape))
    page = Page(report_of(run, {"train": source}))

    rows = rows_of(run / "duplicates.csv")
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    found = {tuple(row["path"] for row in group): [row["kind"] for row in group] for group in groups.values()}
    assert found == {
        ("large.jpg", "2.jpg", "poor.jpg"): ["near"] * 3,
        ("0.jpg", "exact.jpg"): ["exact"] * 2,
        ("1.jpg", "small.png"): ["near"] * 2,
    }
    for group in groups.values():
        assert [row["best"] for row in group] == ["best"] + [""] * (len(group) - 1)
    first = rows[0]
    assert (first["width"], first["height"], first["bytes"]) == (
        "800",
        "600",
        str(os.path.getsize(folder / "large.jpg")),
    )
    assert float(first["similarity"]) == 1 and 0.9 < float(rows[1]["similarity"]) < 1
    assert page.data["copies"] == [[11, 2, 10], [0, 8], [1, 9]]
    assert "3 pictures have copies, 7 images in all." in page.words
    assert page.words.count("same file content") == 2


def test_exact_copies_are_found_without_embeddings(tmp_path: Path) -> None:
    folder, run = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    photograph(0).save(folder / "a.jpg")
    shutil.copy(folder / "a.jpg", folder / "b.jpg")
    photograph(1).save(folder / "c.jpg")
    report_of(run, {"train": grouped_run(run, folder, ["a.jpg", "b.jpg", "c.jpg"])})
    assert [row["path"] for row in rows_of(run / "duplicates.csv")] == ["a.jpg", "b.jpg"]
    assert not (run / "map.npz").exists()


def test_copies_in_memory_are_found_by_their_pixels(tmp_path: Path) -> None:
    rows = [(f"{i}", "all", 0, "0.9", "0.8") for i in range(6)]
    write_run(tmp_path, rows, n_clusters=None)
    embeddings = unit(np.random.default_rng(0).normal(size=(6, 8)))
    embeddings[4] = embeddings[1]
    np.savez(tmp_path / "embeddings.npz", all=embeddings.astype(np.float32))
    sources = plain_sources(rows)
    sources["all"].images[4] = sources["all"].images[1]  # type: ignore[attr-defined]
    report_of(tmp_path, sources)
    assert [(row["path"], row["kind"]) for row in rows_of(tmp_path / "duplicates.csv")] == [
        ("1", "exact"),
        ("4", "exact"),
    ]


def test_outliers_and_groups_that_may_be_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    n = 120
    rows = [(f"{i}", "all", [0, 1, 2][i % 3], "0.9", "0.8") for i in range(n)]
    # Groups 0 and 1 are one blob.
    means = np.repeat(np.eye(2, 12), [80, 40], axis=0)
    order = np.argsort([row[2] == 2 for row in rows], kind="stable")
    embeddings = np.empty((n, 12))
    embeddings[order] = means + generator.normal(0, 0.08, (n, 12))
    embeddings[50] = generator.normal(size=12)
    write_run(tmp_path, rows)
    np.savez(tmp_path / "embeddings.npz", all=unit(embeddings).astype(np.float32))
    page = Page(report_of(tmp_path, plain_sources(rows)))
    outliers = rows_of(tmp_path / "outliers.csv")
    assert outliers[0]["path"] == "50" and float(outliers[0]["score"]) > 5
    assert outliers[0]["cluster"] == str(rows[50][2])
    assert page.data["odd"][0] == 50
    assert "Groups that may be one: #0 and #1." in page.words
    assert "group 0 and group 1" in page.words


def test_the_map_is_made_once_for_the_same_embeddings(tmp_path: Path) -> None:
    rows = [(f"{i}", "all", i % 2, "0.9", "0.8") for i in range(30)]
    write_run(tmp_path, rows, n_clusters=2)
    embeddings = unit(np.random.default_rng(0).normal(size=(30, 8))).astype(np.float32)
    np.savez(tmp_path / "embeddings.npz", all=embeddings)
    data = Page(report_of(tmp_path, plain_sources(rows))).data
    run = RunFolder(tmp_path)
    known = run.read(artifacts.MAP)
    assert known.positions.shape == (30, 2)
    np.testing.assert_allclose(np.array(data["x"]) / 9999, known.positions[:, 0], atol=1e-4)
    known.positions[:] = 0.25
    run.write(artifacts.MAP, known)
    assert set(Page(report_of(tmp_path, plain_sources(rows))).data["x"]) == {2500}
    np.savez(tmp_path / "embeddings.npz", all=embeddings[::-1])
    assert len(set(Page(report_of(tmp_path, plain_sources(rows))).data["x"])) > 20
    # Without a map there is no view of it.
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("evaluation: {map: false}\n")
    page = Page(report_of(tmp_path, plain_sources(rows)))
    assert page.data["x"] is None and "map" not in page.values("section", "id")
