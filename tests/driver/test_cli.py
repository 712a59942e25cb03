"""The commands beside training: predict, embed, evaluate, report, sweep, and the command line itself."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from driving import TINY, accept_files, assignments, contents, fill, results, run_here, summary, tiny_config, weights

import scan_fast
from benchmarks import BENCHMARKS
from scan_fast.cli import build_parser
from scan_fast.data.datasets import DataConfig, open_splits, source_from
from scan_fast.ops.families import FAMILIES
from scan_fast.parsing import split_overrides
from scan_fast.predictor import Predictor


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predict_writes_a_row_for_each_image(finished_run: Path, images: Path, tmp_path: Path) -> None:
    result = run_here("predict", finished_run, "--data", images)
    assert (result.code, result.err) == (0, "")
    table = rows(result.out)
    assert [row["path"] for row in table] == [f"{number:03d}.png" for number in range(36)]
    assert list(table[0]) == ["path", "cluster", "confidence", "margin", "similarity", "unlike"]
    predictor = Predictor.load(finished_run)
    expected = predictor.probabilities(source_from(images, DataConfig(image_size=predictor.size)))
    for row, probabilities in zip(table, expected, strict=True):
        top = probabilities.sort(descending=True).values
        assert int(row["cluster"]) == int(probabilities.argmax())
        assert float(row["confidence"]) == pytest.approx(float(top[0]), abs=1e-6)
        assert float(row["margin"]) == pytest.approx(float(top[0] - top[1]), abs=2e-6)
    written = run_here("predict", finished_run / "model.pt", "--data", images, "--out", tmp_path / "table.csv")
    assert (written.code, written.out) == (0, "")
    assert (tmp_path / "table.csv").read_text() == result.out


def test_the_predictor_agrees_with_the_runs_own_table(finished_run: Path, tmp_path: Path) -> None:
    source = open_splits(tiny_config().data).test
    assert source is not None
    probabilities = Predictor.load(finished_run).probabilities(source)
    table = {row["path"]: row for row in assignments(finished_run)}
    assert len(source) == 449
    for path, row in zip(source.paths, probabilities, strict=True):
        assert int(table[path]["cluster"]) == int(row.argmax())
        assert float(table[path]["confidence"]) == pytest.approx(float(row.max()), abs=1e-5)


def test_embed_writes_features_and_paths(finished_run: Path, images: Path, tmp_path: Path) -> None:
    result = run_here("embed", finished_run, "--data", images, "--out", tmp_path / "features.npz")
    assert (result.code, result.err) == (0, "")
    with np.load(tmp_path / "features.npz") as file:
        features, paths = file["features"], file["paths"]
    assert features.shape == (36, 16)
    assert features.dtype == np.float32
    assert paths.tolist() == [f"{number:03d}.png" for number in range(36)]
    fill(tmp_path / "single", 1, first=5)
    assert run_here("embed", finished_run, "--data", tmp_path / "single", "--out", tmp_path / "one.npz").code == 0
    with np.load(tmp_path / "one.npz") as file:
        np.testing.assert_allclose(file["features"][0], features[5], atol=1e-5)


def test_evaluate_measures_again_and_changes_no_weight(finished: Path, finished_run: Path) -> None:
    before = {name: content for name, (_, content) in contents(finished).items() if name != "summary.json"}
    numbers = summary(finished)
    changed = json.loads((finished / "summary.json").read_text())
    changed["stages"]["selflabel"]["test"]["acc"] = -1
    changed["stages"]["pretext"]["knn_acc"] = -1
    (finished / "summary.json").write_text(json.dumps(changed))
    accept_files(finished)
    result = run_here("evaluate", finished, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["stages"] == numbers["stages"]
    assert set(found["baselines"]) == {"kmeans_pixels", "kmeans_features"}
    assert 0.5 < found["baselines"]["kmeans_pixels"]["acc_mean"] < 0.95
    final = found.pop("final")
    assert (final["stage"], final["split"], final["images"]) == ("selflabel", "test", 449)
    assert {key: final[key] for key in ("acc", "nmi", "ami", "acc_top5")} == {
        key: numbers["stages"]["selflabel"]["test"][key] for key in ("acc", "nmi", "ami", "acc_top5")
    }
    assert summary(finished) == found
    after = {name: content for name, (_, content) in contents(finished).items() if name != "summary.json"}
    assert after == before
    assert weights(finished / "model.pt") == weights(finished_run / "model.pt")


def test_evaluate_prints_a_table(finished: Path) -> None:
    result = run_here("evaluate", finished)
    assert result.code == 0
    for word in ("k-means on pixels", "pretext", "mining", "clustering", "selflabel", "ACC", "run folder:"):
        assert word.split()[0] in result.out


def test_report_is_written_again(finished: Path) -> None:
    (finished / "report.html").write_text("old")
    result = run_here("report", finished)
    assert (result.code, result.err) == (0, "")
    assert str(finished / "report.html") in result.out.replace("\n", "")
    assert (finished / "report.html").read_text().startswith("<!")


def test_sweep_is_the_mean_over_seeds_and_goes_on(tmp_path: Path) -> None:
    words = ("sweep", "digits", *TINY, "--seeds", "1,3", "--out", "sweep", "--quiet")
    result = run_here(*words)
    assert (result.code, result.err) == (0, "")
    found = json.loads(Path("sweep/sweep.json").read_text())
    values = [summary(Path(f"sweep/seed{seed}"))["stages"]["selflabel"]["test"]["acc"] for seed in (1, 3)]
    assert found["seeds"] == [1, 3]
    entry = found["selflabel test acc"]
    assert entry["values"] == values
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert entry["std"] == pytest.approx(np.std(values, ddof=1))
    assert {"pretext knn_acc", "mining purity", "clustering test nmi", "seconds"} <= set(found)
    before = contents(Path("sweep/seed1"))
    # A third seed; the first two are left as they are, and seed 3 alone equals a run of that seed.
    assert run_here("sweep", "digits", *TINY, "--seeds", "1-3", "--out", "sweep", "--quiet").code == 0
    assert contents(Path("sweep/seed1")) == before
    assert json.loads(Path("sweep/sweep.json").read_text())["seeds"] == [1, 2, 3]
    assert run_here("run", "digits", *TINY, "seed=3", "--out", "alone", "--quiet").code == 0
    assert results(Path("alone")) == results(Path("sweep/seed3"))


@pytest.mark.parametrize("seeds", ["", "a", "3-1", "1,1", "1-", "0-2,2"])
def test_refused_seeds(seeds: str) -> None:
    assert "--seeds must" in run_here("sweep", "digits", *TINY, "--seeds", seeds).refusal()


def test_stage_commands_make_the_same_run(finished_run: Path) -> None:
    words = ("digits", *TINY, "--out", "out", "--quiet")
    for command in ("pretext", "mine", "cluster", "selflabel"):
        result = run_here(command, *words)
        assert (result.code, result.err) == (0, "")
    assert results(Path("out")) == results(finished_run)
    assert Path("out/report.html").exists()


def test_the_default_folder_says_what_it_holds(images: Path) -> None:
    words = [*TINY, "data.image_size=16", "model.backbone=resnet_digits", "data.limit=30", "clustering.view.cutout=4"]
    result = run_here("pretext", "--data", images, "--clusters", 3, *words)
    assert result.code == 0, result.err
    assert [path.name for path in Path("runs").iterdir()] == ["images-3-fast-seed0"]


def test_quiet_prints_nothing_and_progress_goes_to_standard_output(images: Path) -> None:
    assert run_here("pretext", "digits", *TINY, "--out", "a", "--quiet").out == ""
    result = run_here("pretext", "digits", *TINY, "--out", "b")
    assert result.err == ""
    assert "160 training and 449 test images, 10 clusters, resnet_digits on" in result.out
    assert "pretext: epoch 2/2  loss" in result.out


def test_bench_runs_a_benchmark(tmp_path: Path) -> None:
    words = ("self_label", "--device", "cpu", "--quick", "--sizes", "64x10", "--contenders", "scan-fast", "eager")
    result = run_here("bench", *words, "--json", tmp_path / "out.json")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["benchmark"], [case["size"] for case in found["cases"]]) == ("self_label", ["64x10"])


def test_bench_lists_the_benchmarks() -> None:
    """The table has every module and package that can be run, but for the helper that measures memory."""
    folder = Path(scan_fast.__file__).parents[1] / "benchmarks"
    runnable = {file.stem for file in folder.glob("*.py") if 'if __name__ == "__main__":' in file.read_text()}
    runnable |= {file.parent.name for file in folder.glob("*/__main__.py")}
    assert set(BENCHMARKS) == runnable - {"memory"}
    text = run_here("bench", "--help").out
    for name, description in BENCHMARKS.items():
        assert f"  {name} " in text
        assert description in text
    message = run_here("bench", "nothing").refusal()
    assert f"bench must be one of {', '.join(BENCHMARKS)}, got 'nothing'" in message


def test_bench_without_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("scan_fast.commands.SOURCE", tmp_path)
    assert "are part of the source repository" in run_here("bench", "nt_xent").refusal()
    assert run_here("bench", "--help").code == 0


def test_overrides_may_stand_anywhere() -> None:
    words = ["run", "a.b=1", "digits", "--out", "x=y", "c.d.e=[1, 2]", "--data", "p.q=r", "--quiet"]
    assert split_overrides(words, build_parser()) == (
        ["run", "digits", "--out", "x=y", "--data", "p.q=r", "--quiet"],
        ["a.b=1", "c.d.e=[1, 2]"],
    )


def test_info_names_what_each_operation_runs_on() -> None:
    result = run_here("info", "--json")
    assert (result.code, result.err) == (0, "")
    facts = json.loads(result.out)
    assert facts["scan_fast"] == scan_fast.__version__
    assert set(facts["operations"]) == {family.function for family in FAMILIES.values()}
    text = run_here("info").out
    for name, on in facts["operations"].items():
        assert set(on.values()) <= {"native", "reference"}
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert line.removeprefix(f"  {name} ").split() == ["cpu:", on["cpu"], "cuda:", on["cuda"]]


def test_as_a_program(tmp_path: Path) -> None:
    root = Path(scan_fast.__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    words = [sys.executable, "-m", "scan_fast.cli", "run", "digits", "pretext.epoch=3"]
    refused = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "scan-fast: unknown key pretext.epoch: did you mean pretext.epochs?\n"


def test_version_and_help() -> None:
    assert run_here("--version").out == f"scan-fast {scan_fast.__version__}\n"
    listed = run_here("--help").out.split()
    assert {"run", "pretext", "mine", "cluster", "selflabel", "evaluate", "sweep"} <= set(listed)


def test_a_folder_called_folder_is_no_run_folder(images: Path, tmp_path: Path) -> None:
    """``--data`` uses the configuration of that name, whatever lies in the working directory."""
    (tmp_path / "folder").mkdir()
    message = run_here("run", "--data", images, "--clusters", 100, "--out", tmp_path / "run", "--quiet").refusal()
    assert "36 images are too few for 100 clusters" in message
