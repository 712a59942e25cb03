"""The stages in order, each from what the former wrote in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from ..evaluation.metrics import neighbor_purity
from ..models.heads import ClusterModel
from ..report import write_report
from ..runs.tracker import Tracker
from ..training.context import Context
from ..training.inference import forward_all, splits_of
from ..training.process import kept_memory
from .clustering import NAME as CLUSTERING
from .clustering import load_clustering, run_clustering
from .mining import NAME as MINING
from .mining import load_neighbors, run_mining
from .pretext import NAME as PRETEXT
from .pretext import knn_monitor, load_pretext, run_pretext
from .results import assess, baselines, write_results, write_skipped
from .selflabel import NAME as SELFLABEL
from .selflabel import load_self_labelling, run_self_labelling

STAGES: dict[str, Callable[[Context], None]] = {
    PRETEXT: run_pretext,
    MINING: run_mining,
    CLUSTERING: run_clustering,
    SELFLABEL: run_self_labelling,
}

_FILES = {
    PRETEXT: ("checkpoints/pretext-final.pt",),
    MINING: ("embeddings.npz", "neighbors.npz"),
    CLUSTERING: ("checkpoints/clustering-final.pt",),
    SELFLABEL: ("checkpoints/selflabel-final.pt",),
}
_RESULT_FILES = ("assignments.csv", "model.pt", "report.html", "confusion.csv", "confusion.png")


def stages_of(context: Context) -> list[str]:
    """Return the names of the stages that this configuration has."""
    return [name for name in STAGES if name != SELFLABEL or context.config.selflabel is not None]


def forget(context: Context, first: str) -> None:
    """Remove what a stage and those after it have written, so that they are done again."""
    names = list(STAGES)
    names = names[names.index(first) :]
    summary = context.run.summary()
    summary["stages"] = {name: entry for name, entry in summary["stages"].items() if name not in names}
    summary.pop("baselines", None)
    # In this order, so that a kill in between leaves no finished stage without its files, and no checkpoint from which
    # a stage would go on that should begin again.
    for name in names:
        context.run.remove(f"checkpoints/{name}.pt")
    context.run.write_json("summary.json", summary)
    for name in names:
        context.run.drop_metrics(name, 0)
        context.run.remove(*_FILES[name])
    context.run.remove(*_RESULT_FILES)


def run_stages(context: Context, names: Sequence[str]) -> None:
    """Do the named stages that are not finished, and then what a run leaves behind."""
    with kept_memory():
        _run_stages(context, names)


def _run_stages(context: Context, names: Sequence[str]) -> None:
    run, tracker = context.run, context.tracker
    skipped = write_skipped(context)
    if skipped:
        path, reason = skipped[0]
        tracker.say(f"left out {len(skipped)} unreadable images (skipped.csv), the first is {path}: {reason}")
    did_something = False
    for name in names:
        if run.finished(name):
            tracker.say(f"{name}: finished before, in {run.summary()['stages'][name]['seconds']:.1f} s")
            continue
        STAGES[name](context)
        did_something = True
        entry = run.summary()["stages"][name]
        shown = {**entry, **entry.get("test", {})}
        notes = [f"{key} {shown[key]:.4f}" for key in ("knn_acc", "purity", "acc", "nmi", "ari") if key in shown]
        tracker.say(f"{name}: done in {entry['seconds']:.1f} s  {'  '.join(notes)}")
    last = stages_of(context)[-1]
    if run.finished(last) and (did_something or not run.has("report.html")):
        finish(context)


def finish(context: Context) -> None:
    """Write the results of the last stage, the baselines and the report."""
    if context.config.selflabel is not None:
        model, stage = load_self_labelling(context), SELFLABEL
    else:
        model, stage = load_clustering(context)[0], CLUSTERING
    write_results(context, model, stage)
    if context.config.evaluation.baselines and "baselines" not in context.run.summary():
        summary = context.run.summary()
        summary["baselines"] = baselines(context)
        context.run.write_json("summary.json", summary)
    make_report(context)


def evaluate(context: Context) -> dict[str, Any]:
    """Measure every finished stage again from its weights, and the baselines; update and return summary.json."""
    summary = context.run.summary()
    stages = summary["stages"]
    if PRETEXT in stages:
        stages[PRETEXT] |= knn_monitor(context, load_pretext(context))
    if MINING in stages:
        for split, key in (("train", "purity"), ("test", "test_purity")):
            labels = splits_of(context)[split].labels
            if labels is not None:
                stages[MINING][key] = neighbor_purity(load_neighbors(context)[split], labels)
    models: dict[str, Callable[[Context], ClusterModel]] = {
        CLUSTERING: lambda context: load_clustering(context)[0],
        SELFLABEL: load_self_labelling,
    }
    for name, load in models.items():
        if name in stages:
            model = load(context)
            for split, source in splits_of(context).items():
                stages[name][split] = assess(context, forward_all(context, model, model, source)[0].cpu(), split)
    summary["baselines"] = baselines(context)
    context.run.write_json("summary.json", summary)
    return summary


def make_report(context: Context) -> None:
    """Write report.html."""

    def images(split: str, rows: list[int]) -> list[Image.Image]:
        return [Image.fromarray(array.numpy()) for array in splits_of(context)[split].read(torch.tensor(rows)).cpu()]

    write_report(context.run, images, title=context.config.name)


def print_summary(context: Context, tracker: Tracker) -> None:
    """Print the table that ends a run, and where its folder is."""
    summary = context.run.summary()
    columns = ("acc", "nmi", "ari")
    rows = []
    for name, title in (("kmeans_pixels", "k-means on pixels"), ("kmeans_features", "k-means on features")):
        entry = summary.get("baselines", {}).get(name)
        if entry:
            rows.append([title, *(f"{entry[f'{key}_mean']:.3f}" for key in columns), "", ""])
    for name in stages_of(context):
        entry = summary["stages"].get(name)
        if entry is None:
            continue
        test = entry.get("test", {})
        extra = next((f"{key} {entry[key]:.3f}" for key in ("knn_acc", "purity") if key in entry), "")
        if "clusters_used" in test:
            extra = f"{test['clusters_used']:.0f} clusters used"
        rows.append(
            [name, *(f"{test[key]:.3f}" if key in test else "" for key in columns), extra, f"{entry['seconds']:.1f}"]
        )
    rows.append(["all stages", "", "", "", "", f"{summary['seconds']:.1f}"])
    tracker.table(f"{context.config.name} (test images)", ["stage", "ACC", "NMI", "ARI", "", "seconds"], rows)
    tracker.say(f"run folder: {context.run.path}")
    if context.run.has("report.html"):
        tracker.say(f"report:     {context.run.path / 'report.html'}")
