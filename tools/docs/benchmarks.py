"""Writes docs/benchmarks.md and its plots from benchmarks/results/: ``python -m tools.docs.benchmarks``.

A result made with ``--quick`` is refused: it is a rehearsal. The tables of measurements in docs/recipes.md,
docs/own-images.md and docs/reproducing.md are written too; the rest of these pages is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ablations, crops, dtypes, partitions, pretext, spaces
from benchmarks.environment import CPU_CLASSES, cpu_class
from benchmarks.family import human_seconds
from benchmarks.trials import figures, tables
from benchmarks.trials.command import titles
from scan_fast.ops.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
FILLED = (ROOT / "docs" / "recipes.md", ROOT / "docs" / "own-images.md", ROOT / "docs" / "reproducing.md")
ORDER = ("targets", "accuracy", "gpu_run", "end_to_end", "gpu_suite", "step", *FAMILIES, "views")
SHARES = ("of_product_peak", "of_convolution_peak", "of_convolutions", "of_pytorch_convolutions")
APART = ("gpu_run", "gpu_suite", "step")
"""Results of tools that tools.docs.record does not run: they need a GPU, or are made on another machine."""
INTRODUCTION = """# Benchmarks

`python -m tools.docs.benchmarks` writes this page from the files under `benchmarks/results/`. Each of them names its
hardware, versions and commit. To measure everything on your machine, which should be idle otherwise, and to rewrite
this page:

    python -m tools.docs.record --device cpu     # one at a time: python -m benchmarks.NAME --device cpu --json FILE

Method: all contenders run in turns in one process. The results of operations are compared with float64 before they are
timed. Times are medians over the rounds, with the 10th and 90th percentile. "Of limit" compares with the time that the
same machine needs for the unavoidable arithmetic or traffic, at rates measured in the same process. Memory is the peak
beyond inputs and outputs, counting native allocations. "Eager" is the operation as training code usually writes it
(`benchmarks/eager.py`); the baseline of whole stages is `benchmarks/baseline.py`. The CUDA kernels that have run on a
GPU are listed in [gpu-status.md](gpu-status.md).
"""


def load(folder: Path) -> list[dict[str, Any]]:
    """Read the results of a folder that this page shows, in its order."""
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if result.get("benchmark") not in ORDER:
            continue
        if result.get("quick"):
            raise SystemExit(f"{file} was measured with --quick; measure it again without")
        results.append(result | {"file": file.name})

    def place(result: dict[str, Any]) -> tuple[bool, int, int]:
        of_class = 0
        if result["device"] == "cpu":
            of_class = list(CPU_CLASSES).index(cpu_class(result["environment"]["build"]))
        return result["device"] != "cpu", ORDER.index(result["benchmark"]), of_class

    return sorted(results, key=place)


def render(results: Sequence[dict[str, Any]], plots: dict[str, str]) -> str:
    """Return the page; ``plots`` maps a result's file name to its picture's path relative to docs/."""
    if not results:
        return INTRODUCTION + "\nNo results have been committed yet.\n"
    parts = [INTRODUCTION]
    for result in results:
        title, origin = result.get("title", "Targets"), _origin(result)
        parts.append(f"\n## {title} ({_where(result)})\n\n{origin}. `benchmarks/results/{result['file']}`\n")
        if result["benchmark"] in _SECTIONS:
            parts.append(_SECTIONS[result["benchmark"]](result))
            continue
        if result["file"] in plots:
            parts.append(f"\n![{result['title']}]({plots[result['file']]})\n")
        parts += [f"\n{case['size']}\n\n{_table(case['contenders'])}" for case in result["cases"]]
    return "".join(parts)


def _where(result: dict[str, Any]) -> str:
    """Return the kind of device, with which results of the same benchmark can be told apart."""
    if result["device"] == "cuda":
        return "GPU"
    return f"CPU with {CPU_CLASSES[cpu_class(result['environment']['build'])]}"


def _origin(result: dict[str, Any]) -> str:
    e = result["environment"]
    threads = "one thread" if e["threads"] == 1 else f"{e['threads']} threads"
    lines = [f"{e['device']}, {threads}, torch {e['torch']}, {_commit(e)}"]
    if "ceilings" in result:
        rates = result["ceilings"]
        products = ", ".join(
            f"{name.removeprefix('gemm_')} products {rate / 1e12:.3g} Tflop/s"
            for name, rate in rates.items()
            if name.startswith("gemm_")
        )
        if "tiles_bfloat16" in rates:
            products += f", AMX tiles {rates['tiles_bfloat16'] / 1e12:.3g} Tflop/s"
        lines.append(f"measured ceilings: {products}, copy {rates['copy_bytes'] / 1e9:.3g} GB/s")
    return "; ".join(lines)


def _commit(environment: dict[str, Any]) -> str:
    commit, _, changes = str(environment["commit"]).partition(" ")
    return f"commit `{commit[:12]}`{f' {changes}' if changes else ''}"


def _targets(result: dict[str, Any]) -> str:
    rows = ["\n| target | measured | |\n|---|---:|---|\n"]
    for line in result["targets"]:
        value = "not measured" if line["measured"] is None else f"{line['measured']:.3g}"
        rows.append(f"| {line['target']} | {value} | {'met' if line['met'] else '**missed**'} |\n")
    return "".join(rows)


def _accuracy(result: dict[str, Any]) -> str:
    results, config = result["results"], result["config"]
    seeds = ", ".join(map(str, results["seeds"]))
    several = len(results["seeds"]) > 1
    of_seeds = f"seeds {seeds}: mean and standard deviation" if several else f"seed {seeds}"
    rows = [f"\nPreset `{config['preset']}`, {of_seeds}.\n\n| | |\n|---|---:|\n"]
    for name, entry in results.items():
        if name != "seeds":
            digits = 1 if name.endswith("seconds") else 4
            spread = f" ± {entry['std']:.{digits}f}" if several else ""
            rows.append(f"| {name} | {entry['mean']:.{digits}f}{spread} |\n")
    return "".join(rows) + _epochs(result.get("epochs", {}))


def _epochs(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of the figures after single epochs of a run; of several runs it would be long, so it is empty."""
    entries = [(seed, entry) for seed, found in runs.items() for entry in found]
    if not entries or len(runs) > 1:
        return ""
    names = list(dict.fromkeys(key for _, entry in entries for key in entry if key not in ("stage", "epoch")))
    rows = [f"\n| seed | after | {' | '.join(names)} |\n|---:|---|{'---:|' * len(names)}\n"]
    for seed, entry in entries:
        cells = [f"{entry[name]:.4g}" if name in entry else "" for name in names]
        rows.append(f"| {seed} | {entry['stage']}, epoch {entry['epoch']} | {' | '.join(cells)} |\n")
    return "".join(rows)


def _end_to_end(result: dict[str, Any]) -> str:
    config = result["config"]
    parts = [
        f"\nSettings of `{config['name']}`, preset `{config['preset']}`, {result['images']}; both sides in turns, an "
        f"epoch each, the baseline with {result['workers']} loader workers. Ours opened the images in "
        f"{result['open_seconds']:.2f} s. The peaks are the rates of a large matrix product and of one forward "
        "convolution; the network's convolutions, forward and backward, were measured alone, and so were PyTorch's for "
        "the same layers.\n\n"
        "| stage | | median | range | cold | images/s | of product peak | of convolution peak | in convolutions "
        f"| PyTorch's alone | x baseline |\n|---|---|{'---:|' * 9}\n"
    ]
    for entry in result["stages"]:
        for side in ("ours", "baseline"):
            r = entry[side]
            shares = [f"{r[key]:.0%}" if key in r else "" for key in SHARES]
            cells = [
                f"{side}, {r['precision']}" if "precision" in r else side,
                human_seconds(r["seconds"]),
                f"{human_seconds(r['seconds_min'])} - {human_seconds(r['seconds_max'])}",
                human_seconds(r["cold_seconds"]),
                f"{r['images_per_second']:,.0f}",
                *shares,
                f"**{entry['ratio']:.2f}**" if side == "ours" else "",
            ]
            parts.append(f"| {entry['stage']} | {' | '.join(cells)} |\n")
    names = ("views", "forward", "loss", "backward", "optimiser", "waiting")
    parts.append(f"\nWhere a step's time goes:\n\n| stage | | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}\n")
    for entry in result["stages"]:
        for side in ("ours", "baseline"):
            if "parts" in entry[side]:
                cells = [human_seconds(entry[side]["parts"].get(name, 0.0)) for name in names]
                parts.append(f"| {entry['stage']} | {side} | {' | '.join(cells)} |\n")
    parts.append("\nThe losses of float32 steps on the same views, ours and the baseline's:\n\n")
    for entry in result["stages"]:
        if "losses" in entry:
            shown = ", ".join(f"{ours:.6f} / {theirs:.6f}" for ours, theirs in entry["losses"])
            parts.append(f"- {entry['stage']}: {shown}\n")
    if "search" in result:
        parts.append(f"\nThe search of mining alone, {result['search']['size']}:\n\n")
        parts.append(_table(result["search"]["contenders"]))
    return "".join(parts)


def _views(result: dict[str, Any]) -> str:
    parts = []
    for case in result["results"]:
        base = case["rates"]["torchvision on PIL, parameters given"]["views_per_second"]
        threads = ", one thread, CPU time" if result["device"] == "cpu" else ""
        parts.append(f"\n{case['view']}, {case['source']} -> {case['side']} pixels{threads}\n\n")
        parts.append("| | views/s | range | x torchvision on PIL |\n|---|---:|---:|---:|\n")
        for name, rate in case["rates"].items():
            value, low, high = rate["views_per_second"], rate["lowest"], rate["highest"]
            parts.append(f"| {name} | {value:,.0f} | {low:,.0f} - {high:,.0f} | {value / base:.1f} |\n")
        equal = ", ".join(f"{pair} {share:.3%}" for pair, share in case["parity"].items())
        parts.append(f"\nEqual pixel values: {equal}.\n")
    return "".join(parts)


def _gpu_run(result: dict[str, Any]) -> str:
    planned, full = result["plan"]["epochs"], result["plan"]["full_epochs"]
    epochs = ", ".join(f"{name} {count} of {full[name]}" for name, count in planned.items())
    parts = [
        f"\nEpochs: {epochs}. {result['seconds']:.0f} s from the archive of images to the last stage.\n\n"
        "| stage | seconds | | train | test |\n|---|---:|---|---:|---:|\n"
    ]
    for name, entry in result["stages"].items():
        seconds = f"{entry['seconds']:.1f}"
        found = [("kNN accuracy", None, entry["knn_acc"])] if "knn_acc" in entry else []
        if "purity_at" in entry:
            at = entry["purity_at"]
            found += [(f"purity at {k}", at["train"][k], at["test"][k]) for k in at["train"]]
        found += [
            (key.upper(), entry["train"][key], entry["test"][key]) for key in ("acc", "nmi", "ari") if "test" in entry
        ]
        for number, (title, *values) in enumerate(found):
            cells = ["" if value is None else f"{100 * value:.1f} %" for value in values]
            parts.append(
                f"| {'' if number else name} | {'' if number else seconds} | {title} | {' | '.join(cells)} |\n"
            )
    return "".join(parts) + _epochs(result.get("epochs", {}))


def _gpu_suite(result: dict[str, Any]) -> str:
    parts = [f"\n{t['family']} {t['timing']}\n\n{_table(t['contenders'])}" for t in result["timings"]]
    parts.append(
        "\nA SimCLR step: ResNet-18 on 512 images of 32 pixels, bfloat16, with its views\n\n"
        "| | a step | views/s |\n|---|---:|---:|\n"
    )
    for way in (entry for entry in result["step"] if "way" in entry):
        if "seconds" in way:
            cells = [human_seconds(way["seconds"]), f"{way['views_per_second']:,.0f}"]
        else:
            cells = [str(way.get("failed") or way.get("skipped")).replace("|", "/"), ""]
        parts.append(f"| {way['way']} | {' | '.join(cells)} |\n")
    return "".join(parts)


def _step(result: dict[str, Any]) -> str:
    config, pretext = result["config"], result["config"]["pretext"]
    parts = [
        f"\nStage one of `{config['name']}`, preset `{config['preset']}`, batches of {pretext['batch_size']}, "
        f"{pretext['optimizer']['name']}, {result['precision']}.\n\n"
        "| | a step | views/s | of product peak | views alone | first step |\n|---|---:|---:|---:|---:|---:|\n"
    ]
    for name, way in result["ways"].items():
        if "failed" in way:
            parts.append(f"| {name} | {way['failed'].replace('|', '/')} | | | | |\n")
            continue
        cells = [
            human_seconds(way["seconds"]),
            f"{way['views_per_second']:,.0f}",
            f"{way['of_product_peak']:.0%}",
            human_seconds(way["views_seconds"]),
            human_seconds(way["first_step_seconds"]),
        ]
        parts.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(parts)


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "targets": _targets,
    "accuracy": _accuracy,
    "gpu_run": _gpu_run,
    "gpu_suite": _gpu_suite,
    "step": _step,
    "end_to_end": _end_to_end,
    "views": _views,
}


def _table(contenders: Sequence[dict[str, Any]]) -> str:
    eager = next((r["seconds"] for r in contenders if r["name"] == "eager" and "seconds" in r), None)
    with_calls = any("call_seconds" in r for r in contenders)
    calls = " per call |" if with_calls else ""
    rows = [f"| | median | 10 - 90 % |{calls} x eager | of limit | memory |\n|---|---:|---:|{'---:|' if calls else ''}"]
    rows.append("---:|---:|---:|\n")
    for r in contenders:
        if "seconds" not in r:
            reason = str(r.get("skipped") or r.get("failed")).replace("|", "/")
            rows.append(f"| {r['name']} | {reason} |{' |' * (5 if with_calls else 4)}\n")
            continue
        cells = [
            human_seconds(r["seconds"]),
            f"{human_seconds(r['seconds_p10'])} - {human_seconds(r['seconds_p90'])}",
            *([human_seconds(r["call_seconds"]) if "call_seconds" in r else ""] if with_calls else []),
            f"{eager / r['seconds']:.2f}" if eager else "",
            f"{r['of_limit']:.0%} ({r['bound']})" if "of_limit" in r else "",
            f"{r['memory_bytes'] / 2**20:.1f} MiB" if r.get("memory_bytes") is not None else "",
        ]
        rows.append(f"| {r['name']} | {' | '.join(cells)} |\n")
    return "".join(rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw median times over sizes, one line per contender that was measured at two sizes or more, and the limit."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # The same input gives the same file: no date, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "scan-fast"
    sizes = [case["size"] for case in result["cases"]]
    names = dict.fromkeys(r["name"] for case in result["cases"] for r in case["contenders"])
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name in names:
        cases = (case["contenders"] for case in result["cases"])
        of_name: list[dict[str, Any]] = [next((r for r in case if r["name"] == name), {}) for case in cases]
        points = [(i, r["seconds"]) for i, r in enumerate(of_name) if "seconds" in r]
        if len(points) < 2:
            continue
        ours = name.startswith("scan-fast")
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if ours else 1.2)
        if ours:
            limits = [(i, r["limit_seconds"]) for i, r in enumerate(of_name) if "limit_seconds" in r]
            axes.plot(*zip(*limits, strict=True), ":", color=line.get_color(), label=f"{name}, limit")
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylabel("seconds per call")
    axes.set_title(result["title"])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(results_folder: Path, page: Path) -> None:
    """Write the page and its plots."""
    results = load(results_folder)
    plots = {}
    for result in results:
        if "cases" in result and len(result["cases"]) > 1:
            picture = page.parent / "benchmarks" / (Path(result["file"]).stem + ".svg")
            plot(result, picture)
            plots[result["file"]] = f"benchmarks/{picture.name}"
    page.write_text(render(results, plots))


def fill(text: str, results_folder: Path) -> str:
    """Put the tables of results into a page, between ``<!-- trials: FILE -->`` and ``<!-- end -->``.

    The word before the file is the benchmark: trials, partitions, ablation, crops, dtypes, spaces or pretext.
    ``plan`` shows trials with predictions, ranks and outcomes, and ``compare`` the order of the trials in two files:
    ``<!-- compare: A B -->``. A file that is not there yet is named.
    """

    def block(found: re.Match[str]) -> str:
        names = found[2].split()
        missing = next((name for name in names if not (results_folder / name).is_file()), None)
        if missing is not None:
            content = f"Not measured yet (`{missing}`)."
        else:
            results = [json.loads((results_folder / name).read_text()) for name in names]
            content = " ".join([_FILLED[found[1]](*results), *(f"`benchmarks/results/{name}`" for name in names)])
        return f"<!-- {found[1]}: {found[2]} -->\n\n{content}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(_FILLED)}): (\S+(?: \S+)?) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def _trials(result: dict[str, Any]) -> str:
    seconds = "seconds" if result.get("device") == "cuda" else "CPU seconds"
    return f"{tables.table(result)}\nPercent; {seconds} of a stage. {_configured(result)}"


def _plan(result: dict[str, Any]) -> str:
    if "environment" not in result:
        return f"{tables.plan(result)}\n"
    former = len(result["environments"]) - 1
    others = f" Begun on {former} other machine{'s' if former > 1 else ''} or commit{'s' if former > 1 else ''}."
    return f"{tables.plan(result)}\nPercent. {_configured(result)}{others if former else ''}"


def _compare(small: dict[str, Any], large: dict[str, Any]) -> str:
    found = figures.compare(small, large)
    return f"{tables.comparison(found, *titles(small, large))}\nPercent."


def _configured(result: dict[str, Any]) -> str:
    values = " ".join(result["set"])
    return f"{_origin(result)}; configuration `{result['config']}`{f' with `{values}`' if values else ''}."


def _ablation(result: dict[str, Any]) -> str:
    seeds = result["seeds"]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    one = ", one representation for all" if result["share_pretext"] else ""
    return f"{ablations.table(result)}\nPercent; seconds of one run; {which}{one}. {_configured(result)}"


def _partitions(result: dict[str, Any]) -> str:
    return f"{partitions.table(result)}\n{_origin(result)}."


def _crops(result: dict[str, Any]) -> str:
    return f"{crops.table(result)}\n{_origin(result)}."


def _dtypes(result: dict[str, Any]) -> str:
    return f"{dtypes.table(result)}\nPercent. {_origin(result)}."


def _spaces(result: dict[str, Any]) -> str:
    return f"{spaces.table(result)}\nPercent. {_origin(result)}."


def _pretext(result: dict[str, Any]) -> str:
    return f"{pretext.table(result)}\nPercent. {_configured(result)}"


_FILLED: dict[str, Callable[..., str]] = {
    "trials": _trials,
    "plan": _plan,
    "compare": _compare,
    "partitions": _partitions,
    "ablation": _ablation,
    "crops": _crops,
    "dtypes": _dtypes,
    "spaces": _spaces,
    "pretext": _pretext,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.benchmarks", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    write(options.results, options.page)
    for path in FILLED:
        path.write_text(fill(path.read_text(), RESULTS))
    print(f"wrote {', '.join(str(path) for path in (options.page, *FILLED))}")


if __name__ == "__main__":
    main()
