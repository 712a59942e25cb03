"""Ablations: files that fit every data set, tables that are those of the runs, mistakes that are found first."""

from __future__ import annotations

import csv
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from driving import TINY, contents, fill, picture, run_here, summary
from interruptions import Interrupted

from scan_fast.ablation import Ablation, configure, find_ablation, shipped_ablations, variants_of
from scan_fast.errors import ConfigError
from scan_fast.runs import artifacts
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.stages import clustering

SHORT = (
    *("preset=fast", "model.backbone=resnet_digits", "model.width=0.25", "data.image_size=16", "pretext.epochs=1"),
    *("pretext.batch_size=16", "mining.k=3", "clustering.epochs=2", "clustering.batch_size=16", "clustering.heads=1"),
    *("clustering.view.cutout=4", "selflabel.epochs=1", "selflabel.batch_size=16", "selflabel.view.cutout=4"),
    *("clustering.objective.prior=uniform", "clustering.initialize=random", "evaluation.baselines=false"),
    *("evaluation.thumbnails=0", "evaluation.map=false", "precision=float32", "runtime.threads=1"),
)
"""A small folder in a second."""


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder of 36 images of three classes."""
    for kind in range(3):
        fill(tmp_path / "classes" / f"class{kind}", 12, make=lambda n, kind=kind: picture(3 * n + kind))  # type: ignore[misc]
    return tmp_path / "classes"


def plan(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def ablated(folder: Path, *words: object) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Run an ablation, and return ablation.json and the rows of ablation.csv."""
    result = run_here("ablate", *words, "--out", folder, "--quiet")
    assert (result.code, result.err) == (0, "")
    with (folder / "ablation.csv").open(newline="") as file:
        return json.loads((folder / "ablation.json").read_text()), list(csv.DictReader(file))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_runs(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("threshold", "folder", f"data.root={classes}", *SHORT, "--variants", "0.99,0.8", "--seeds", "0-1")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # interrupted in the clustering stage of the first seed
        patch.setattr(clustering, "Clustering", Interrupted)
        assert run_here("ablate", *words, "runtime.checkpoint_seconds=0", "--out", out, "--quiet").code == 130
    assert not (out / "ablation.json").exists()
    found, rows = ablated(out, *words)
    assert [row["variant"] for row in rows] == list(found["variants"]) == ["0.8", "0.99"]
    for row in rows:
        name = row["variant"]
        entry = found["variants"][name]
        assert entry["changes"] == {"selflabel.threshold": float(name)}
        assert (entry["stage"], entry["acc_is"], row["seeds"]) == ("selflabel", "acc", "2")
        stages = [summary(out / name / f"seed{seed}")["stages"] for seed in (0, 1)]
        for measure in ("acc", "nmi", "ari"):
            values = [each["selflabel"]["train"][measure] for each in stages]
            assert entry[measure]["values"] == values
            assert float(row[f"{measure}_mean"]) == pytest.approx(statistics.mean(values))
            assert float(row[f"{measure}_std"]) == pytest.approx(statistics.stdev(values))
            assert float(row[f"{measure}_best"]) == max(values)
            assert values[entry[measure]["best_seed"]] == max(values)
        assert entry["purity"]["values"] == [each["mining"]["purity"] for each in stages]
        whole = [sum(s["seconds"] + s.get("taken", {}).get("seconds", 0) for s in each.values()) for each in stages]
        assert entry["seconds"]["values"] == pytest.approx(whole)
        assert all(set(each) == {"pretext", "mining", "clustering", "selflabel"} for each in stages)
        assert all("taken" in each["clustering"] and "taken" not in each["selflabel"] for each in stages)
    own = [summary(out / name / f"seed{seed}")["seconds"] for name in ("0.8", "0.99") for seed in (0, 1)]
    shared = [summary(folder)["seconds"] for folder in (out / "shared").iterdir()]
    assert len(shared) == 6
    assert found["seconds"]["total"] == pytest.approx(sum(own) + sum(shared), abs=2e-3)
    table = artifacts.read(artifacts.ABLATION_TABLE, out / "ablation.csv")
    assert [row["acc_mean"] for row in table.rows] == [e["acc"]["mean"] for e in found["variants"].values()]
    before = {name: file for name, file in contents(out).items() if "ablation" not in name}
    shown = run_here("ablate", *words, "--out", out, "--quiet").out
    assert {name: file for name, file in contents(out).items() if "ablation" not in name} == before
    best = found["variants"]["0.8"]["acc"]
    assert f"{100 * best['mean']:.1f} ± {100 * best['std']:.1f}" in shown
    assert f"{100 * best['best']:.1f} (seed {best['best_seed']})" in shown


def test_seeds_share_the_pretext_stage_if_they_are_to(tmp_path: Path) -> None:
    words = ("selflabel", "digits", *TINY, "--seeds", "0,2", "--share-pretext")
    found, _ = ablated(tmp_path / "out", *words)
    runs = [tmp_path / "out" / name / f"seed{seed}" for name in ("with", "without") for seed in (0, 2)]
    assert len({os.stat(run / "neighbors.npz").st_ino for run in runs}) == 1
    assert len({os.stat(run / "checkpoints/clustering-final.pt").st_ino for run in runs}) == 2
    assert found["variants"]["without"]["stage"] == "clustering"
    assert found["share_pretext"] is True
    stages = {name.rpartition("-")[0] for name in found["seconds"]["shared"]}
    assert stages == {"pretext-seed0", "mining-seed0", "clustering-seed0", "clustering-seed2"}
    shown = json.loads(run_here("ablate", *words, "--out", tmp_path / "out", "--json").out)
    assert shown == found


def test_ablations_and_sweeps_with_one_folder_learn_once(tmp_path: Path) -> None:
    words = ("digits", *TINY, "--quiet", "--seeds", "0", "--shared", tmp_path / "all")
    assert run_here("ablate", "threshold", *words, "--variants", "0.8", "--out", tmp_path / "a").code == 0
    first = contents(tmp_path / "all")
    assert {name.partition("-seed0")[0] for name in first} == {"pretext", "mining"}
    assert run_here("ablate", "overclustering", *words, "--out", tmp_path / "b").code == 0
    assert run_here("sweep", *words, "--out", tmp_path / "c").code == 0
    assert run_here("ablate", "selflabel", *words, "mining.k=4", "--out", tmp_path / "d").code == 0
    found = contents(tmp_path / "all")
    assert {name: found[name] for name in first} == first
    added = {name.partition("/")[0].partition("-seed0")[0] for name in found if name not in first}
    assert added == {"mining", "clustering"}  # of four neighbours; and clustering, with and without self-labelling
    runs = [tmp_path / name for name in ("a/0.8/seed0", "b/2x/seed0", "c/seed0", "d/with/seed0")]
    assert len({os.stat(run / "checkpoints/pretext-final.pt").st_ino for run in runs}) == 1
    assert len({os.stat(run / "neighbors.npz").st_ino for run in runs[:3]}) == 1


def test_more_clusters_than_classes_take_their_most_frequent_class(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found, rows = ablated(out, "overclustering", "folder", f"data.root={classes}", *SHORT, "--seeds", "0")
    stages = {name: summary(out / name / "seed0")["stages"]["selflabel"]["train"] for name in ("1x", "2x")}
    assert found["variants"]["1x"]["acc_is"] == "acc"
    assert found["variants"]["2x"]["acc_is"] == "acc_many_to_one"
    assert float(rows[0]["acc_mean"]) == stages["1x"]["acc"]
    assert float(rows[1]["acc_mean"]) == stages["2x"]["acc_many_to_one"]
    assert found["variants"]["2x"]["changes"] == {"clustering.n_clusters": "2x"}
    assert (out / "2x/seed0/config.yaml").read_text().count("n_clusters: 6") == 1


def test_images_without_classes_are_compared_in_time(tmp_path: Path) -> None:
    fill(tmp_path / "flat", 24)
    words = ("threshold", "folder", f"data.root={tmp_path / 'flat'}", "clustering.n_clusters=3", *SHORT)
    found, rows = ablated(tmp_path / "out", *words, "--variants", "0.8", "--seeds", "0")
    assert rows[0]["acc_mean"] == rows[0]["purity_mean"] == ""
    assert float(rows[0]["seconds_mean"]) == pytest.approx(found["variants"]["0.8"]["seconds"]["mean"])


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("treshold",), "there is no ablation 'treshold' (did you mean threshold?)"),
        ((), "say which ablation"),
        (("threshold", "digit"), "did you mean digits?"),
        (("threshold", "digits", "--seeds", "2-1"), "--seeds must"),
        (("threshold", "digits", "--seeds", "a"), "--seeds must look like 0-9"),
        (("threshold", "digits", "--variants", "0.8,0.98"), "no variant '0.98' (did you mean 0.9"),
        (("--list", "threshold"), "--list goes with nothing else"),
        (("selflabel", "digits", "selflabel=null"), "without and with are the same for this configuration"),
        (("threshold", "digits", "selflabel=null"), "variant 0.8: selflabel.threshold cannot be changed"),
        (
            ("overclustering", "digits", "clustering.n_clusters=auto"),
            "variant 1x: the number of clusters must be known",
        ),
        (("threshold", "digits", "mining.k=2000"), "variant 0.8: mining.k=2000 must be below the number"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(words: tuple[str, ...], told: str) -> None:
    assert told in run_here("ablate", *words, "--out", "out").refusal()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("variants: {a: {selflabel: {treshold: 0.5}}}", "variant a: unknown key selflabel.treshold: did you mean"),
        ("variants: {a: {selflabel: {threshold: 2}}}", "variant a: selflabel.threshold: input should be less than"),
        ("variants: {a: {}, b: {pretext: {method: {kind: mocha}}}}", "variant b: pretext.method"),
        ("variants: {a: {}, b: {clustering: {view: {from: pretext.method.sight}}}}", "no such value"),
        ("base: {mining: {q: 3}}\nvariants: {a: {}}", "base: unknown key mining.q"),
        ("variants: {}", "must have variants"),
        ("title: nothing", "must have variants"),
        ("variants: [a, b]", "variants must be names with their changes"),
        ("variants: {a: 3}", "a must hold sections"),
        ("variants: {a/b: {}}", "a name that a folder can have, got 'a/b'"),
        ("variants: {shared: {}}", "a name that a folder can have, got 'shared'"),
        ("variant: {a: {}}\nvariants: {a: {}}", "unknown key variant: did you mean variants?"),
        ("variants: [", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_file_are_told(text: str, told: str, tmp_path: Path) -> None:
    refusal = run_here("ablate", plan(tmp_path / "own.yaml", text), "digits", *TINY, "--out", "out").refusal()
    assert told in refusal
    assert not Path("out").exists()


def test_a_later_variant_that_does_not_fit_the_images_stops_the_first(classes: Path, tmp_path: Path) -> None:
    file = plan(tmp_path / "own.yaml", "variants: {few: {mining: {k: 3}}, many: {mining: {k: 50}}}")
    words = ("ablate", file, "folder", f"data.root={classes}", *SHORT, "--out", "out")
    assert (
        "ablation own, variant many: mining.k=50 must be below the number of images, 36" in run_here(*words).refusal()
    )
    assert not Path("out").exists()


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    words = ("ablate", "threshold", "digits", *TINY, "--variants", "0.8", "--seeds", "0", "--quiet", "--out", "out")
    assert run_here(*words).code == 0
    before = contents(Path("out"))
    refusal = run_here(*words, "clustering.epochs=3").refusal()
    assert "0.8/seed0 holds another experiment (clustering.epochs: 2 -> 3)" in refusal
    assert contents(Path("out")) == before


# -- configurations ----------------------------------------------------------------------------------------------------


def varied(values: dict[str, Any], config: Config) -> Config:
    """Return the configuration of a variant."""
    return variants_of(Ablation("own", "own", "", {}, {"it": values}), config)["it"]


def test_a_change_of_kind_keeps_what_the_new_kind_has_too() -> None:
    config = load_config(find_config("digits"), ["clustering.view.cutout=2"])
    view = varied({"clustering": {"view": {"kind": "strong"}}}, config).clustering.view.model_dump()
    assert (view["kind"], view["cutout"], view["operations"]) == ("strong", 2, 4)
    given = varied({"clustering": {"view": {"kind": "strong", "cutout": 1}}}, config).clustering.view.model_dump()
    assert given["cutout"] == 1
    bare = varied({"clustering": {"view": "strong"}}, config).clustering.view.model_dump()
    assert bare == view
    method = varied(
        {"pretext": {"method": {"kind": "visreg"}}, "model": {"projector": "mlp_bn"}, "mining": {"k": 7}}, config
    ).pretext.method
    assert method.kind == "visreg"
    assert method.model_dump()["view"] == config.pretext.method.model_dump()["view"]
    assert not hasattr(method, "temperature")


def test_a_value_may_come_from_another_place() -> None:
    config = load_config(find_config("cifar10"), ["preset=paper"])
    assert config.clustering.view.kind == "strong"
    other = varied({"clustering": {"view": {"from": "pretext.method.view"}}, "selflabel": None}, config)
    assert other.clustering.view.model_dump() == config.pretext.method.model_dump()["view"]
    assert other.clustering.view.kind == "simclr"
    assert other.selflabel is None


def test_base_comes_before_the_words_of_the_command_line() -> None:
    ablation = Ablation("own", "own", "", {"mining": {"k": 50}}, {"it": {}})
    assert configure(ablation, find_config("digits"), []).mining.k == 50
    config = configure(ablation, find_config("digits"), ["mining.k=30", "preset=reference"])
    assert (config.mining.k, config.preset) == (30, "reference")
    assert config.clustering.include_self


@pytest.mark.parametrize("words", [("cifar10", "preset=paper"), ("stl10", "preset=paper"), ("digits",), ("folder",)])
@pytest.mark.parametrize("name", sorted(shipped_ablations()))
def test_shipped_ablations_fit(name: str, words: tuple[str, ...]) -> None:
    ablation = find_ablation(name)
    config = configure(ablation, find_config(words[0]), [*words[1:], "clustering.n_clusters=10"])
    found = variants_of(ablation, config)
    assert len(found) == len(ablation.variants) >= 2
    assert "The paper found" in ablation.found
    for variant in found.values():
        # The data set's own view survives every change of the method.
        assert variant.pretext.method.model_dump().get("view") == config.pretext.method.model_dump()["view"]


def test_ablations_are_listed() -> None:
    result = run_here("ablate", "--list")
    assert (result.code, result.err) == (0, "")
    assert set(shipped_ablations()) == {
        *("augmentation", "neighbors", "oracle", "overclustering", "pretext", "selflabel", "threshold")
    }
    for name in shipped_ablations():
        ablation = find_ablation(name)
        assert ablation.title in result.out and ablation.found in result.out
        assert ", ".join(ablation.variants) in result.out


def test_a_pretrained_folder_has_no_view_to_take() -> None:
    ablation = find_ablation("augmentation")
    config = configure(ablation, find_config("folder"), ["preset=pretrained"])
    with pytest.raises(ConfigError, match=r"variant simclr: from: pretext\.method\.view: this"):
        variants_of(ablation, config)
