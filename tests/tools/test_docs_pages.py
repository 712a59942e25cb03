"""Pages that are written from results: they show what the files say, and the committed ones are up to date."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tools.docs import benchmarks as pages
from tools.docs import record

CEILINGS = {"gemm_float32": 1e12, "gemm_bfloat16": 4e12, "copy_bytes": 1e10}


def result_file(folder: Path, **changes: Any) -> None:
    entry = {"error": 0.0, "seconds_p10": 1e-3, "seconds_p90": 3e-3, "rounds": 5}
    ours = entry | {"name": "scan-fast", "seconds": 1e-3, "limit_seconds": 5e-4, "of_limit": 0.5, "bound": "memory"}
    plain = entry | {"name": "eager", "seconds": 2e-3, "memory_bytes": 3 * 2**20}
    absent = {"name": "peer", "skipped": "not | installed"}
    build = {"cpu_isa": "avx512", "cpu_amx_bf16": True}
    environment = {"device": "a CPU", "threads": 2, "torch": "9", "commit": "abc", "build": build}
    result = {
        "benchmark": "scan_loss",
        "title": "SCAN",
        "device": "cpu",
        "environment": environment,
        "ceilings": CEILINGS,
        "quick": False,
        "cases": [{"size": size, "contenders": [ours, plain, absent]} for size in ("8x2", "9x3")],
    }
    (folder / "cpu-scan_loss.json").write_text(json.dumps(result | changes))


def test_results_of_several_classes_of_processor_stand_side_by_side(tmp_path: Path) -> None:
    builds = {"a": {"cpu_isa": "avx2"}, "b": {"cpu_isa": "avx512"}, "c": {"cpu_isa": "avx512", "cpu_amx_bf16": True}}
    for name, build in builds.items():
        environment = {"device": f"processor {name}", "threads": 2, "torch": "9", "commit": "abc", "build": build}
        line = {"target": f"target of {name}", "measured": 2.0, "met": True}
        result = {"benchmark": "targets", "device": "cpu", "environment": environment, "targets": [line]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = pages.render(pages.load(tmp_path), {})
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [f"## Targets (CPU with {name})" for name in ("AMX", "AVX-512", "AVX2")]
    for name, section in zip("cba", page.split("\n## ")[1:], strict=True):
        assert f"processor {name}, 2 threads" in section and f"| target of {name} | 2 | met |" in section


def test_the_report_shows_what_the_files_say(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    result_file(tmp_path)
    pages.write(tmp_path, page)
    text = page.read_text()
    assert "| scan-fast | 1 ms | 1 ms - 3 ms | 2.00 | 50% (memory) |  |" in text
    assert "| eager | 2 ms | 1 ms - 3 ms | 1.00 |  | 3.0 MiB |" in text
    assert "not / installed" in text
    picture = page.parent / "benchmarks" / "cpu-scan_loss.svg"
    assert "(benchmarks/cpu-scan_loss.svg)" in text
    drawn = picture.read_bytes()
    pages.write(tmp_path, page)
    assert picture.read_bytes() == drawn
    result_file(tmp_path, quick=True)
    with pytest.raises(SystemExit, match="--quick"):
        pages.write(tmp_path, page)


def test_the_committed_page_shows_the_committed_results(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    pages.write(pages.RESULTS, page)
    assert page.read_text() == pages.PAGE.read_text()


def test_the_table_has_means_and_deviations(tmp_path: Path) -> None:
    seeds = {
        str(s): {"pretext": {"knn_acc": 0.9 + s / 100, "cpu_seconds": 10.4 + s}, "mining": {"purity": 0.5}}
        for s in (0, 2)
    }
    result = {
        "config": "digits",
        "set": ["mining.k=3"],
        "environment": {"device": "a processor", "threads": 2, "torch": "2.14", "commit": "0123456789abcdef"},
        "trials": {"base": {"changes": [], "seeds": seeds}, "more": {"changes": ["a.b=1"], "seeds": {"0": seeds["0"]}}},
    }
    (tmp_path / "t.json").write_text(json.dumps(result))
    page = pages.fill("before\n<!-- trials: t.json -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert "| trial | changes | seeds | kNN | pretext, s | purity |" in page
    assert "| base |  | 2 | 91.0 ± 1.4 | 11 | 50.0 ± 0.0 |" in page
    assert "| more | `a.b=1` | 1 | 90.0 | 10 | 50.0 |" in page
    assert "a processor, 2 threads, torch 2.14, commit `0123456789ab`; configuration `digits` with `mining.k=3`" in page
    assert "old" not in page and page.startswith("before\n") and page.endswith("<!-- end -->\nafter\n")
    assert pages.fill(page, tmp_path) == page


@pytest.mark.parametrize("page", pages.FILLED, ids=lambda page: page.stem)
def test_the_committed_tables_show_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- end -->" in text
    assert pages.fill(text, pages.RESULTS) == text


def test_the_table_of_partitions_has_every_method(tmp_path: Path) -> None:
    scores = {"acc": 0.5, "nmi": 0.25, "ari": 0.125}
    entry = {"images": 1234, "classes": 10, "class_sizes": [7, 80], "suggested": [9, 11, 9], "seconds": 2.04}
    result = {
        "environment": {"device": "a processor", "threads": 2, "torch": "2.14", "commit": "0123456789abcdef"},
        "results": {"birds": {**entry, "kmeans": scores, "ward": scores, "scan_fast": {**scores, "acc": 0.75}}},
    }
    (tmp_path / "p.json").write_text(json.dumps(result))
    page = pages.fill("<!-- partitions: p.json -->\n<!-- end -->", tmp_path)
    assert (
        "| birds | 1,234 | 10 | 7-80 | 50.0 / 25.0 / 12.5 | 50.0 / 25.0 / 12.5 | 75.0 / 25.0 / 12.5 | 9, 11, 9 | 2.0 |"
        in page
    )
    assert "a processor, 2 threads, torch 2.14, commit `0123456789ab`. `benchmarks/results/p.json`" in page


def test_the_table_of_an_ablation_has_every_variant(tmp_path: Path) -> None:
    figures = {"mean": 0.875, "std": 0.0125, "best": 0.9, "best_seed": 3, "values": [0.9, 0.85]}
    entry = {"acc": figures, "nmi": figures, "seconds": {"mean": 12.4, "std": 1.0, "values": [11.4, 13.4]}}
    result = {
        "environment": {"device": "a processor", "threads": 2, "torch": "2.14", "commit": "0123456789abcdef"},
        "config": "digits",
        "set": ["mining.k=9"],
        "seeds": [3, 4],
        "share_pretext": True,
        "variants": {"0": {"seconds": entry["seconds"]}, "5": entry},
    }
    (tmp_path / "a.json").write_text(json.dumps(result))
    page = pages.fill("<!-- ablation: a.json -->\nold\n<!-- end -->", tmp_path)
    assert "| variant | ACC | best | NMI | seconds |\n|---|---:|---:|---:|---:|\n" in page
    assert "| 5 | 87.5 ± 1.2 | 90.0 (seed 3) | 87.5 ± 1.2 | 12 |" in page
    assert "| 0 |  |  |  | 12 |" in page
    assert "seeds 3, 4: mean ± standard deviation, one representation for all. a processor, 2 threads" in page
    assert "configuration `digits` with `mining.k=9`. `benchmarks/results/a.json`" in page
    assert "old" not in page and pages.fill(page, tmp_path) == page


def test_a_table_that_is_not_measured_yet_says_so(tmp_path: Path) -> None:
    page = pages.fill("<!-- ablation: none.json -->\n<!-- end -->", tmp_path)
    assert "Not measured yet (`none.json`)." in page
    assert pages.fill(page, tmp_path) == page


def test_the_record_has_a_command_for_everything(tmp_path: Path) -> None:
    suffixes = {"cpu-amx": "", "cpu-avx512": "-avx512", "cpu-avx2": "-avx2", "cuda": ""}
    for kind, suffix in suffixes.items():
        device = kind[:4].rstrip("-")
        for name in record.NAMES:
            assert importlib.util.find_spec(f"benchmarks.{name}") is not None
            words = record.command(name, kind, tmp_path, Path("/images"))
            assert words[words.index("--device") + 1] == device
            assert words[words.index("--json") + 1] == str(tmp_path / f"{device}-{name}{suffix}.json")
            assert ("/images" in words) == (name == "end_to_end")
        words = record.command("targets", kind, tmp_path, None)
        assert words[words.index("--end-to-end") + 1] == str(tmp_path / f"{device}-end_to_end{suffix}.json")
    assert {*record.NAMES} == {*pages.ORDER} - {*pages.APART}


def test_tables_of_plans_and_of_two_sizes_are_filled_in(tmp_path: Path) -> None:
    environment = {"device": "a CPU", "threads": 1, "torch": "2.11.0", "commit": "abcdef0123456789"}
    for name, epochs, gain in (("small", 10, 0.1), ("large", 40, 0.2)):
        runs = {
            trial: {str(seed): {"mining": {"purity": value + seed / 100, "cpu_seconds": 6.0}} for seed in (0, 1)}
            for trial, value in (("base", 0.7), ("more", 0.7 + gain))
        }
        starts = {str(seed): {"mining": {"purity": 0.5}} for seed in (0, 1)}
        result = {
            "benchmark": "trials",
            "config": "digits",
            "set": [f"pretext.epochs={epochs}"],
            "environment": environment,
            "environments": [environment],
            "untrained": {"k": starts},
            "trials": {
                trial: {"changes": [], "predicted": f"{trial}: so so", "untrained": "k", "seeds": seeds}
                for trial, seeds in runs.items()
            },
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = "<!-- plan: small.json -->\n<!-- end -->\n\n<!-- compare: small.json large.json -->\n<!-- end -->\n"
    text = pages.fill(page, tmp_path)
    assert "| base |  | base: so so |" in text and "a CPU, one thread, torch 2.11.0, commit `abcdef012345`" in text
    assert "| more | 2 | 80.5 ± 0.7 | 6.0 ± 0.0 | 30.5 ± 0.7 | 305.0 ± 7.1 | 1 | yes |" in text
    assert "| trial | purity, `pretext.epochs=10` | place | purity, `pretext.epochs=40` | place |" in text
    assert "Rank correlation: Spearman 1.00, Kendall 1.00. The same order have 1 of 1 pairs." in text
    assert text.endswith("Percent. `benchmarks/results/small.json` `benchmarks/results/large.json`\n\n<!-- end -->\n")
    assert pages.fill(text, tmp_path) == text
    missing = pages.fill("<!-- compare: small.json none.json -->\n<!-- end -->\n", tmp_path)
    assert "Not measured yet (`none.json`)." in missing
    (tmp_path / "small.json").write_text(json.dumps({**result, "environments": [environment, {}]}))
    assert "Begun on 1 other machine or commit." in pages.fill("<!-- plan: small.json --><!-- end -->", tmp_path)


def test_a_gpu_run_and_a_step_are_shown() -> None:
    run = {
        "plan": {"epochs": {"pretext": 3}, "full_epochs": {"pretext": 200}},
        "seconds": 61.2,
        "stages": {
            "pretext": {"seconds": 50.0, "knn_acc": 0.5},
            "mining": {"seconds": 0.5, "purity_at": {"train": {"5": 0.4}, "test": {"5": 0.3}}},
            "clustering": {
                "seconds": 9.0,
                "train": {"acc": 0.2, "nmi": 0.1, "ari": 0.1},
                "test": {"acc": 0.25, "nmi": 0.1, "ari": 0.1},
            },
        },
        "epochs": {"0": [{"stage": "pretext", "epoch": 3, "knn_acc": 0.5}]},
    }
    text = pages._gpu_run(run)
    assert "pretext 3 of 200. 61 s" in text and "| mining | 0.5 | purity at 5 | 40.0 % | 30.0 % |" in text
    assert "| clustering | 9.0 | ACC | 20.0 % | 25.0 % |" in text and "| 0 | pretext, epoch 3 | 0.5 |" in text
    way = {
        "seconds": 0.01,
        "views_per_second": 1024.0,
        "of_product_peak": 0.5,
        "views_seconds": 0.001,
        "first_step_seconds": 1.0,
    }
    step = {
        "config": {"name": "c", "preset": "p", "pretext": {"batch_size": 512, "optimizer": {"name": "sgd"}}},
        "precision": "bfloat16",
        "ways": {"plain": way, "compiled": {"failed": "RuntimeError: a | b"}},
    }
    text = pages._step(step)
    assert "| plain | 10 ms | 1,024 | 50% |" in text and "| compiled | RuntimeError: a / b |" in text
