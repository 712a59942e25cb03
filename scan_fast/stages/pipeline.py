"""The stages in order: what each takes and leaves, and what a finished run leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import distributed
from ..evaluation.metrics import metric_titles
from ..methods import WeightsSettings
from ..models.heads import ClusterModel
from ..report import write_report
from ..runs import artifacts
from ..runs.artifacts import Artifact
from ..runs.records import TAKEN, Summary
from ..runs.tracker import Tracker
from ..training.backbone import note_backbone
from ..training.context import Context
from ..training.process import kept_memory
from . import clustering, mining, number, pretext, selflabel
from .assessment import Outputs, assess, outputs
from .embedding import knn_check
from .handover import CLUSTERING_LOGITS, EMBEDDINGS, FEATURES, SELFLABEL_LOGITS, UNIT_FEATURES, Handover
from .inputs import cluster_model, pretext_model, selflabelled_model
from .results import baselines, write_results, write_skipped


@dataclass(frozen=True)
class PipelineStage:
    """One stage of a run.

    Attributes:
        name: name in files, in the configuration and on the screen; :data:`.runs.artifacts.COMMANDS` has its command.
        run: does the stage.
        inputs: artifacts that it reads.
        outputs: artifacts that it writes.
        takes: values that it reuses if an earlier stage of this process computed them (see :mod:`.handover`).
        hands_on: values that it computes and holds for later stages.
    """

    name: str
    run: Callable[[Context, Handover], None]
    inputs: tuple[Artifact[Any], ...]
    outputs: tuple[Artifact[Any], ...]
    takes: tuple[str, ...] = ()
    hands_on: tuple[str, ...] = ()


PIPELINE = (
    PipelineStage(
        pretext.NAME,
        pretext.run_pretext,
        inputs=(),
        outputs=(artifacts.PRETEXT_MODEL,),
        hands_on=(EMBEDDINGS, FEATURES, UNIT_FEATURES),
    ),
    PipelineStage(
        mining.NAME,
        mining.run_mining,
        inputs=(artifacts.PRETEXT_MODEL,),
        outputs=(artifacts.EMBEDDINGS, artifacts.NEIGHBORS),
        takes=(EMBEDDINGS, FEATURES, UNIT_FEATURES),
    ),
    PipelineStage(
        number.NAME,
        number.run_number,
        inputs=(artifacts.EMBEDDINGS,),
        outputs=(artifacts.SUGGESTION,),
    ),
    PipelineStage(
        clustering.NAME,
        clustering.run_clustering,
        inputs=(artifacts.PRETEXT_MODEL, artifacts.EMBEDDINGS, artifacts.NEIGHBORS),
        outputs=(artifacts.CLUSTER_MODEL,),
        takes=(FEATURES,),
        hands_on=(CLUSTERING_LOGITS,),
    ),
    PipelineStage(
        selflabel.NAME,
        selflabel.run_selflabel,
        inputs=(artifacts.CLUSTER_MODEL, artifacts.NEIGHBORS),
        outputs=(artifacts.SELFLABEL_MODEL,),
        takes=(CLUSTERING_LOGITS,),
        hands_on=(SELFLABEL_LOGITS,),
    ),
)
"""All stages in order."""

COLUMNS = ("acc_many_to_one", "acc", "nmi", "ari")
"""Metrics in the table that ends a run."""

STAGES = {stage.name: stage for stage in PIPELINE}

FINISH_TAKES = (CLUSTERING_LOGITS, SELFLABEL_LOGITS, FEATURES)
"""Values that :func:`finish` reuses. Self-labelling, which changes the backbone, drops the features."""


def stages_of(context: Context) -> list[str]:
    """Return the names of the stages that this configuration has."""
    left_out = set() if context.suggests_number else {number.NAME}
    return [name for name in STAGES if name not in left_out and context.config.why_without(name) is None]


def preceding(context: Context, names: Sequence[str]) -> list[str]:
    """Return the stages before the named ones that take files instead of training, and what only they hold up.

    With weights of a file (``pretext.method=weights``, ``clustering.weights``) a single stage needs no other command
    before it.
    """
    config, order = context.config, stages_of(context)
    before = order[: order.index(names[0])]
    if config.clustering.weights is None:
        if not isinstance(config.pretext.method, WeightsSettings):
            return []
        before = [name for name in before if name in (pretext.NAME, mining.NAME, number.NAME)]
    return [name for name in before if not context.run.finished(name)]


def forget(context: Context, first: str) -> None:
    """Remove what a stage and those after it have written, so that they are done again.

    Raises:
        RunError: if a result that they may start from is damaged. Nothing is removed then.
    """
    names = list(STAGES)
    for name in names[: names.index(first)]:
        for artifact in STAGES[name].outputs:
            if context.run.finished(name) and context.run.has(artifact):
                context.run.check(artifact)
    context.run.forget(names[names.index(first) :])


def run_stages(context: Context, names: Sequence[str], *, results: bool = True) -> None:
    """Do the named stages that are not finished, and then what a run leaves behind.

    Args:
        context: the run.
        names: the stages, in order.
        results: write the results and the report after the last stage.
    """
    with kept_memory():
        _run_stages(context, names, results)


def _run_stages(context: Context, names: Sequence[str], results: bool) -> None:
    run, tracker = context.run, context.tracker
    tracker.say(f"backbone: {note_backbone(context)}")
    skipped = write_skipped(context)
    if skipped:
        path, reason = skipped[0]
        listed = f"{len(skipped)} unreadable image{'s' if len(skipped) > 1 else ''} ({artifacts.SKIPPED.name})"
        tracker.say(f"left out {listed}, the first is {path}: {reason}")
    if mining.NAME in names and not run.finished(mining.NAME):
        mining.check_files(context)
    handover = Handover()
    did_something = False
    for name in names:
        if run.finished(name):
            tracker.say(f"{name}: {_done_before(context, name)}")
            continue
        run_stage(context, STAGES[name], handover)
        did_something = True
        entry = run.summary().stages[name]
        shown = {**entry, **entry.get(context.reported, {})}
        keys = ("knn_acc", "purity", "acc_many_to_one", "acc", "nmi", "ari")
        notes = [f"{key} {shown[key]:.4f}" for key in keys if key in shown]
        tracker.say(f"{name}: done in {entry['seconds']:.1f} s  {'  '.join(notes)}")
        mining.say_purity(context, entry)
    last = stages_of(context)[-1]
    complete = all(run.has(artifact) for artifact in (artifacts.ASSIGNMENTS, artifacts.MODEL, artifacts.REPORT))
    if results and run.finished(last) and (did_something or not complete):
        finish(context, handover)


def _done_before(context: Context, name: str) -> str:
    """Return in words when or by which other run a finished stage was done."""
    entry = context.run.summary().stages[name]
    taken = entry.get(TAKEN)
    if taken is None:
        return f"finished before, in {entry['seconds']:.1f} s"
    folder = os.path.normpath(context.run.path / taken["from"])
    return f"taken from {folder}, where it took {taken['seconds']:.1f} s with seed {taken['seed']}"


def run_stage(context: Context, stage: PipelineStage, handover: Handover) -> None:
    """Run one stage: check its inputs, let it use the values that it declares, drop those that nobody needs later.

    Raises:
        RunError: if an input is missing; the message names the command that writes it.
    """
    present = stages_of(context)
    for artifact in stage.inputs:
        if artifact.stage in present:
            context.run.require(artifact)
    handover.drop(stage.hands_on)  # values of a former model
    handover.declare((*stage.takes, *stage.hands_on))
    context.run.begin_stage()
    stage.run(context, handover)
    later = PIPELINE[PIPELINE.index(stage) + 1 :]
    needed = {name for other in later for name in other.takes}.union(FINISH_TAKES)
    handover.drop(handover.names() - needed)


def finish(context: Context, handover: Handover) -> None:
    """Write the results of the last stage, the baselines and the report."""
    handover.declare(FINISH_TAKES)
    if context.config.selflabel is not None:
        model, stage = selflabelled_model(context), selflabel.NAME
    else:
        model, stage = cluster_model(context)[0], clustering.NAME
    write_results(context, model, stage, handover)
    summary = context.run.summary()
    if context.config.evaluation.baselines and summary.baselines is None:
        summary.baselines = baselines(context)
        context.run.write(artifacts.SUMMARY, summary)
    make_report(context)


@dataclass(frozen=True)
class Evaluation:
    """A finished run, measured again.

    Attributes:
        summary: the updated summary.
        stage: the last stage that has cluster heads; None if none is finished.
        outputs: the result of its model for the reported split; None likewise.
    """

    summary: Summary
    stage: str | None
    outputs: Outputs | None


def evaluate(context: Context, *, features: bool = False) -> Evaluation:
    """Measure every finished stage again from its weights, and the baselines; update the summary.

    Args:
        context: the run.
        features: also return the features of the reported split.
    """
    summary = context.run.summary()
    stages = summary.stages
    if pretext.NAME in stages:
        stages[pretext.NAME] |= knn_check(context, pretext_model(context))
    if mining.NAME in stages:
        mining.measure_purity(context, stages[mining.NAME])
        mining.say_purity(context, stages[mining.NAME])
    models: dict[str, Callable[[Context], ClusterModel]] = {
        clustering.NAME: lambda context: cluster_model(context)[0],
        selflabel.NAME: selflabelled_model,
    }
    last: str | None = None
    found: Outputs | None = None
    for name, load in models.items():
        if name in stages:
            model, last = load(context), name
            for split, source in context.clustered.items():
                of_split = outputs(context, model, source, features=features and split == context.reported)
                stages[name][split] = assess(context, of_split.logits, split)
                found = of_split if split == context.reported else found
    summary.baselines = baselines(context)
    context.run.write(artifacts.SUMMARY, summary)
    return Evaluation(summary, last, found)


def make_report(context: Context) -> None:
    """Write report.html; with several ranks, rank 0 does."""
    distributed.on_first(lambda: _write_report(context))


def _write_report(context: Context) -> None:
    images = sum(len(source) for source in context.clustered.values())
    context.tracker.say(f"report: thumbnails, map and near-duplicates of {images:,} images")
    write_report(context.run, context.clustered, title=context.config.name)


def print_summary(context: Context, tracker: Tracker) -> None:
    """Print the table that ends a run, and the path of its folder."""
    summary = context.run.summary()
    labelled = context.n_classes is not None and context.clustered[context.reported].labels is not None
    measured = {key for entry in summary.stages.values() for key in entry.get(context.reported, {})}
    titles = {key: title for key, title in metric_titles(measured or COLUMNS[1:]).items() if key in COLUMNS}
    columns = titles if labelled else {}
    rows = []
    for name, title in (("kmeans_pixels", "k-means on pixels"), ("kmeans_features", "k-means on features")):
        baseline = (summary.baselines or {}).get(name)
        if baseline and labelled:
            rows.append([title, *(f"{baseline[f'{key}_mean']:.3f}" for key in columns), "", ""])
    for name in stages_of(context):
        entry = summary.stages.get(name)
        if entry is None:
            continue
        scores = entry.get(context.reported, {})
        extra = next((f"{key} {entry[key]:.3f}" for key in ("knn_acc", "purity") if key in entry), "")
        if "clusters_used" in scores:
            extra = f"{scores['clusters_used']:.0f} clusters used"
        shown = [f"{scores[key]:.3f}" if key in scores else "" for key in columns]
        rows.append([name, *shown, extra, f"{entry['seconds']:.1f}"])
    rows.append(["all stages", *("" for _ in columns), "", f"{summary.seconds:.1f}"])
    images = "images" if context.splits.test is None else "test images"
    heading = ["stage", *columns.values(), "", "seconds"]
    tracker.table(f"{context.config.name} ({images})", heading, rows)
    tracker.say(f"run folder: {context.run.path}")
    if context.run.has(artifacts.REPORT):
        tracker.say(f"report:     {context.run.path_of(artifacts.REPORT)}")
