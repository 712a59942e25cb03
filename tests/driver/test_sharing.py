"""Stages that several runs share: the same bits as those of a run that did them itself, also after an interruption."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import TINY, Death, Process, contents, fill, picture, results, run_here, summary, weights
from interruptions import Interrupted
from reference_files import Clusters, Net18, write

from scan_fast.data.datasets import open_splits
from scan_fast.errors import RunError
from scan_fast.runs.artifacts import CONFIG
from scan_fast.runs.config import find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.sharing import STEPS, Planned, dependencies, run_all, take
from scan_fast.stages import clustering

SHARE = ("sweep", "digits", *TINY, "--share-pretext", "--quiet")


def without_notes(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a run without the notes of what it took."""
    stages = facts["summary.json"]["stages"]
    plain = {stage: {k: v for k, v in entry.items() if k != "taken"} for stage, entry in stages.items()}
    return facts | {"summary.json": facts["summary.json"] | {"stages": plain}}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two seeds that share the pretext stage of seed 0; to be looked at only."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    result = run_here(*SHARE, "--seeds", "0,3", "--out", folder)
    assert (result.code, result.err) == (0, "")
    return folder


def test_a_run_that_takes_ends_in_the_bits_of_one_that_trained(swept: Path) -> None:
    assert run_here("run", "digits", *TINY, "seed=0", "--out", "alone", "--quiet").code == 0
    assert without_notes(results(swept / "seed0")) == results(Path("alone"))
    first, other = results(swept / "seed0"), results(swept / "seed3")
    same = {name for name in first if first[name] == other[name]}
    assert any(name.startswith("pretext-final.pt") for name in same)
    assert all(name in same for name in first if name.startswith(("pretext-final.pt", "embeddings", "neighbors")))
    assert not any("cluster_head" in name for name in same)


def test_what_was_taken_is_noted_and_counted_once(swept: Path) -> None:
    shared = {folder.name.partition("-")[0]: folder for folder in (swept / "shared").iterdir()}
    assert set(shared) == {"pretext", "mining"}
    spent = {stage: summary(folder)["stages"][stage]["seconds"] for stage, folder in shared.items()}
    own = []
    for seed in (0, 3):
        run = swept / f"seed{seed}"
        stages = summary(run)["stages"]
        for stage in ("pretext", "mining"):
            note = stages[stage]["taken"]
            assert stages[stage]["seconds"] == 0
            assert note == {"from": f"../shared/{shared[stage].name}", "seed": 0, "seconds": spent[stage]}
            assert (run / note["from"]).resolve() == shared[stage]
        assert "taken" not in stages["clustering"] and stages["clustering"]["seconds"] > 0
        own.append(stages["clustering"]["seconds"] + stages["selflabel"]["seconds"])
    found = json.loads((swept / "sweep.json").read_text())["seconds"]
    assert found["values"] == pytest.approx(own, abs=1e-6)
    assert found["shared"] == {shared[stage].name: seconds for stage, seconds in spent.items()}
    assert found["total"] == pytest.approx(sum(own) + sum(spent.values()), abs=2e-3)
    assert not list((swept / "shared").rglob("report.html"))


def test_files_are_linked_and_stay_apart(swept: Path) -> None:
    (shared,) = (swept / "shared").glob("mining-*")
    inodes = {os.stat(folder / "neighbors.npz").st_ino for folder in (shared, swept / "seed0", swept / "seed3")}
    assert len(inodes) == 1
    assert run_here("sweep", "digits", *TINY, "--share-pretext", "--quiet", "--seeds", "0", "--out", "s").code == 0
    (source,) = Path("s/shared").glob("mining-*")
    before = contents(source)
    again = run_here("mine", Path("s/seed0"), "mining.k=4", "--again", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert "taken" not in summary(Path("s/seed0"))["stages"]["mining"]
    assert contents(source) == before


def test_the_seeds_that_are_asked_for_make_no_difference(swept: Path) -> None:
    assert run_here(*SHARE, "--seeds", "3", "--out", "other").code == 0
    assert without_notes(results(Path("other/seed3"))) == without_notes(results(swept / "seed3"))
    before = contents(Path("other/seed3"))
    assert run_here(*SHARE, "--seeds", "0-3", "--out", "other").code == 0
    assert contents(Path("other/seed3")) == before
    assert without_notes(results(Path("other/seed0"))) == without_notes(results(swept / "seed0"))


@pytest.mark.parametrize(
    ("name", "before", "at"),
    [
        ("pretext.pt", False, 1),
        ("pretext-final.pt", True, 2),
        ("pretext-final.pt", False, 3),
        ("neighbors.npz", False, 2),
        ("summary.json", True, 4),
        ("clustering-final.pt", False, 2),
    ],
)
def test_a_killed_sweep_continues(name: str, before: bool, at: int, swept: Path, tmp_path: Path) -> None:
    words = (*SHARE, "--seeds", "0,3", "runtime.checkpoint_seconds=0", "--out", tmp_path / "sweep")
    process = Process(*words, log=tmp_path / "log", death=Death(at, before, name))
    killed = process.result()
    assert killed.code == -signal.SIGKILL, killed.err
    assert run_here(*words).code == 0
    for seed in (0, 3):
        ours, theirs = (without_notes(results(folder / f"seed{seed}")) for folder in (tmp_path / "sweep", swept))
        assert ours == theirs
    assert not list((tmp_path / "sweep").rglob("*.tmp"))


def test_an_interrupted_sweep_continues(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*SHARE, "--seeds", "0,3", "runtime.checkpoint_seconds=0", "--out", "sweep")
    with monkeypatch.context() as patch:
        patch.setattr(clustering, "Clustering", Interrupted)
        result = run_here(*words)
    assert result.code == 130
    assert "the same command continues" in result.err
    assert "pretext" in summary(Path("sweep/seed0"))["stages"]
    assert not Path("sweep/seed3").exists()
    assert run_here(*words).code == 0
    assert without_notes(results(Path("sweep/seed3"))) == without_notes(results(swept / "seed3"))


def test_best_mean_and_deviation_are_of_the_values() -> None:
    words = ("sweep", "digits", *TINY, "clustering.n_clusters=12", "--seeds", "1-3", "--out", "s", "--json")
    result = run_here(*words)
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found == json.loads(Path("s/sweep.json").read_text())
    stages = [summary(Path(f"s/seed{seed}"))["stages"]["selflabel"]["test"] for seed in (1, 2, 3)]
    for key in ("acc", "acc_many_to_one", "nmi", "ari", "ami", "acc_top5"):
        entry, values = found[f"selflabel test {key}"], [stage[key] for stage in stages]
        assert entry["values"] == values
        assert entry["mean"] == pytest.approx(np.mean(values))
        assert entry["std"] == pytest.approx(np.std(values, ddof=1))
        assert entry["best"] == max(values)
        assert values[found["seeds"].index(entry["best_seed"])] == max(values)
    shown = run_here("sweep", "digits", *TINY, "clustering.n_clusters=12", "--seeds", "1-3", "--out", "s", "--quiet")
    best = found["selflabel test acc"]
    assert f"{best['best']:.4f} (seed {best['best_seed']})" in shown.out
    assert "all runs: " in shown.out


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_sweep_of_another_configuration_is_refused() -> None:
    words = ("sweep", "digits", *TINY, "selflabel=null", "--quiet", "--out", "s")
    assert run_here(*words, "--seeds", "0").code == 0
    before = contents(Path("s"))
    refusal = run_here(*words, "--seeds", "4", "clustering.epochs=3").refusal()
    assert "s holds a sweep of another configuration (clustering.epochs: 2 -> 3)" in refusal
    assert not Path("s/seed4").exists()
    for seeds in ("0,4", "0"):
        refusal = run_here(*words, "--seeds", seeds, "--share-pretext", "seed=1").refusal()
        assert "s/seed0 has the pretext stage of seed 0, not of seed 1: leave out --share-pretext" in refusal
    assert contents(Path("s")) == before
    # The pretext stage of seed 0 in its own run is the one that would be shared.
    assert run_here(*words, "--seeds", "0,4", "--share-pretext").code == 0
    refusal = run_here(*words, "--seeds", "0,4").refusal()
    assert "s/seed4 has the pretext stage of seed 0, not of seed 4: give --share-pretext" in refusal


@pytest.mark.parametrize("change", ["pretext.epochs=3", "mining.k=4", "data.limit=150", "evaluation.batch_size=100"])
def test_only_equal_settings_are_shared(change: str, swept: Path) -> None:
    (shared,) = (swept / "shared").glob("mining-*")
    other = load_config(find_config("digits"), [*TINY, change])
    key, _, value = change.partition("=")
    told = rf"taker cannot take pretext and mining of .*\({key}: \d+ -> {value}\)"
    with RunFolder.open(Path("taker"), other) as run, pytest.raises(RunError, match=told):
        take(run, RunFolder(shared), other, ["pretext", "mining"])
    assert not RunFolder(Path("taker")).summary().stages


def test_what_does_not_matter_may_differ(swept: Path) -> None:
    (shared,) = (swept / "shared").glob("mining-*")
    words = [*TINY, "seed=7", "clustering.epochs=1", "selflabel=null", "runtime.threads=2", "data.workers=1"]
    other = load_config(find_config("digits"), words)
    with RunFolder.open(Path("taker"), other) as run:
        take(run, RunFolder(shared), other, ["pretext", "mining"])
    assert run_here("run", "digits", *words, "--out", "taker", "--quiet").code == 0
    assert weights(Path("taker/checkpoints/pretext-final.pt")) == weights(shared / "checkpoints/pretext-final.pt")


def test_an_unfinished_stage_is_not_taken(swept: Path) -> None:
    (shared,) = (swept / "shared").glob("mining-*")
    config = load_config(find_config("digits"), TINY)
    with RunFolder.open(Path("taker"), config) as run, pytest.raises(RunError, match=r"has no .*clustering-final"):
        take(run, RunFolder(shared), config, ["pretext", "mining", "clustering"])


def test_images_that_have_changed_since_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "images", 24)
    words = ("sweep", "folder", f"data.root={tmp_path / 'images'}", *FOLDER, "--share-pretext", "--quiet", "--out", "s")
    assert run_here(*words, "--seeds", "0").code == 0
    picture(99).save(tmp_path / "images" / "007.png")
    refusal = run_here(*words, "--seeds", "1").refusal()
    assert "007.png has changed" in refusal


FOLDER = (
    *("preset=fast", "model.backbone=resnet_digits", "model.width=0.25", "data.image_size=16", "pretext.epochs=1"),
    *(
        "pretext.batch_size=8",
        "mining.k=3",
        "clustering.n_clusters=3",
        "clustering.epochs=1",
        "clustering.batch_size=8",
    ),
    *("clustering.heads=1", "clustering.view.cutout=4", "selflabel=null", "precision=float32", "runtime.threads=1"),
)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_stages_depend_on_the_sections_before_them() -> None:
    base = load_config(find_config("digits"), TINY)

    def changed(*words: str) -> list[str]:
        other = load_config(find_config("digits"), [*TINY, *words])
        return [
            step
            for step in ("pretext", "mining", "clustering")
            if dependencies(base, step) != dependencies(other, step)
        ]

    assert changed("seed=4", "runtime.threads=2", "selflabel.threshold=0.5", "name=other") == []
    assert changed("clustering.epochs=3") == ["clustering"]
    assert changed("mining.k=6") == ["mining", "clustering"]
    for word in (
        "pretext.epochs=3",
        "model.width=0.5",
        "data.limit=100",
        "precision=bfloat16",
        "mining.features=backbone",
    ):
        assert changed(word) == ["pretext", "mining", "clustering"]
    # A view of another size makes another plain view, by which the embeddings are computed.
    assert changed("clustering.view.size=6") == ["pretext", "mining", "clustering"]


def test_each_run_takes_what_others_need_too(tmp_path: Path) -> None:
    def plan(name: str, *words: str, pretext_seed: int | None = None) -> Planned:
        return Planned(tmp_path / name, load_config(find_config("digits"), [*TINY, *words]), f"{name}: ", pretext_seed)

    plans = [
        plan("a", "selflabel.threshold=0.2"),
        plan("b", "selflabel=null"),
        plan("c", "clustering.epochs=1"),
        plan("d", "mining.k=4"),
        plan("e", "seed=1"),
    ]
    outcome = run_all(plans, tmp_path / "shared", share=tuple(STEPS), always=False, quiet=True)
    shared = sorted(folder.name.rpartition("-")[0] for folder in (tmp_path / "shared").iterdir())
    assert shared == ["clustering-seed0", "mining-seed0", "pretext-seed0"]
    taken = {p.folder.name: {s for s, e in summary(p.folder)["stages"].items() if "taken" in e} for p in plans}
    both = {"pretext", "mining"}
    assert taken == {"a": both | {"clustering"}, "b": both | {"clustering"}, "c": both, "d": {"pretext"}, "e": set()}
    origins = {
        entry["taken"]["from"]
        for name in ("a", "b", "c", "d")
        for entry in [summary(tmp_path / name)["stages"]["pretext"]]
    }
    assert len(origins) == 1 and origins.pop().startswith("../shared/pretext-seed0-")
    assert outcome.seconds == pytest.approx(
        sum(s.seconds for s in outcome.summaries) + sum(outcome.shared_seconds.values()), abs=1e-3
    )
    assert set(outcome.shared_seconds) == {folder.name for folder in (tmp_path / "shared").iterdir()}
    alone = run_here("run", "digits", *TINY, "mining.k=4", "--out", tmp_path / "alone", "--quiet")
    assert alone.code == 0
    assert without_notes(results(tmp_path / "d")) == results(tmp_path / "alone")


def test_a_file_that_was_changed_in_place_is_noticed(tmp_path: Path) -> None:
    n = len(open_splits(load_config(find_config("digits"), TINY).data).train)
    file, weights_file = tmp_path / "train.npy", tmp_path / "scan.pth.tar"
    rows = (np.arange(n)[:, None] + np.arange(6)) % n

    def overwrite(content: bytes, path: Path) -> None:
        """Change the content, but neither size nor time of modification."""
        before = path.stat()
        assert before.st_size == len(content)
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def npy(values: np.ndarray) -> bytes:
        np.save(content := io.BytesIO(), values)
        return content.getvalue()

    file.write_bytes(npy(rows))
    words = ("sweep", "digits", *TINY, f"mining.files=[{file}]", "selflabel=null", "--share-pretext", "--quiet")
    shared = tmp_path / "shared"
    assert run_here(*words, "--seeds", "0", "--out", "first", "--shared", shared).code == 0
    (mined,) = shared.glob("mining-*")
    config = RunFolder(Path("first/seed0")).read(CONFIG)
    overwrite(npy((rows + np.array([0, 7, 7, 7, 7, 7])) % n), file)
    with RunFolder.open(Path("taker"), config) as run, pytest.raises(RunError, match=r"content of .*train\.npy: "):
        take(run, RunFolder(mined), config, ["pretext", "mining"])
    before = contents(Path("first"))
    told = run_here(*words, "--seeds", "0,1", "--out", "first", "--shared", shared).refusal()
    assert f"first/seed0 was begun with another content of {file}: restore the file" in told
    assert contents(Path("first")) == before
    assert not Path("first/seed1").exists()
    # Another folder gets the new neighbours; the representation does not depend on them.
    assert run_here(*words, "--seeds", "1", "--out", "second", "--shared", shared).code == 0
    assert len(list(shared.glob("mining-*"))) == 2
    assert len(list(shared.glob("pretext-*"))) == 1
    index = [np.load(Path(name) / "neighbors.npz")["train"][0].tolist() for name in ("first/seed0", "second/seed1")]
    assert index == [[1, 2, 3, 4, 5], [8, 9, 10, 11, 12]]
    # The file is not needed for runs that are finished.
    file.unlink()
    assert run_here(*words, "--seeds", "1", "--out", "second", "--shared", shared).code == 0

    weights_file.write_bytes(b"first")
    for word, known in (
        (f"clustering.weights={weights_file}", ["clustering"]),
        (f"pretext.method={{kind: weights, file: {weights_file}}}", list(STEPS)),
    ):
        started = load_config(find_config("digits"), ["clustering.n_clusters=10", word])
        facts = {step: dependencies(started, step) for step in STEPS}
        overwrite({b"first": b"other", b"other": b"third"}[weights_file.read_bytes()], weights_file)
        assert [step for step in STEPS if dependencies(started, step) != facts[step]] == known


def test_runs_that_start_from_cluster_heads_share_the_clustering_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = write(tmp_path / "scan.pth.tar", Clusters(Net18(8), 64, 10).state_dict())
    fixed = (
        "model.backbone=resnet18_cifar",
        "model.width=0.125",
        f"clustering.weights={file}",
        "clustering.n_clusters=10",
    )
    for share, made in ((("pretext", "mining"), []), (tuple(STEPS), ["clustering-seed0"])):
        folder = tmp_path / share[-1]
        plans = [
            Planned(
                folder / name, load_config(find_config("digits"), [*TINY, *fixed, f"selflabel.threshold={name}"]), ""
            )
            for name in ("0.1", "0.2")
        ]
        run_all(plans, folder / "shared", share=share, always=True, quiet=True)
        assert [path.name.rpartition("-")[0] for path in folder.glob("shared/*")] == made
        assert list(summary(folder / "0.1")["stages"]) == ["clustering", "selflabel"]


def test_taken_stages_are_announced_with_their_origin(swept: Path) -> None:
    (shared,) = (swept / "shared").glob("pretext-*")
    seconds = summary(shared)["stages"]["pretext"]["seconds"]
    shown = run_here("sweep", "digits", *TINY, "--share-pretext", "--seeds", "3", "--out", swept).out
    assert f"seed 3: pretext: taken from {shared}, where it took {seconds:.1f} s with seed 0" in shown
    spent = summary(swept / "seed3")["stages"]["selflabel"]["seconds"]
    assert spent > 0
    assert f"seed 3: selflabel: finished before, in {spent:.1f} s" in shown


def test_a_suggested_number_is_shared_with_the_groups(tmp_path: Path) -> None:
    config = load_config(find_config("digits"), [*TINY, "clustering.n_clusters=auto"])
    none = load_config(find_config("digits"), [*TINY, "clustering.n_clusters=auto", "selflabel=null"])
    plans = [Planned(tmp_path / name, each, "") for name, each in (("a", config), ("b", none))]
    run_all(plans, tmp_path / "shared", share=tuple(STEPS), always=False, quiet=True)
    for name in ("a", "b"):
        stages = summary(tmp_path / name)["stages"]
        assert [stage for stage, entry in stages.items() if "taken" in entry] == [
            "pretext",
            "mining",
            "number",
            "clustering",
        ]
        assert json.loads((tmp_path / name / "suggested-k.json").read_text())["k"] == stages["number"]["k"]
