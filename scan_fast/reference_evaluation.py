"""``scan-fast evaluate FILE --config NAME``: files of the reference, measured on images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_option import check_labelled
from .errors import UsageError
from .text import show

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .data.sources import Source
    from .reference import ReferenceFile


def evaluate_reference(options: argparse.Namespace) -> None:
    """Measure the network of a file on images with classes.

    Raises:
        DataError: if the images cannot be read, or have no classes.
        WeightsError: if the file cannot be used with the configuration.
    """
    from .devices import choose_device
    from .evaluating import check_prototypes
    from .reference import open_reference

    check_prototypes(options.prototypes)
    device = choose_device(options.device or "auto", "--device")
    file = open_reference(options.target, options.config, options.overrides, options.head)
    if file.is_pretext:
        if options.prototypes is not None:
            raise UsageError(f"--prototypes: {file.path} is a {file.weights.kind} file, which has no clusters")
        if options.head is not None:
            raise UsageError(f"--head: {file.path} is a {file.weights.kind} file, which has no cluster heads")
        _evaluate_pretext(file, options, device)
    else:
        _evaluate_clusters(file, options, device)


def _evaluate_clusters(file: ReferenceFile, options: argparse.Namespace, device: torch.device) -> None:
    from .evaluating import check_classes, show_evaluation
    from .runs.tracker import print_table

    weights, shown = file.weights, options.head
    several = weights.head is None and shown is None
    if options.data is None:
        splits = file.splits()
        source = splits.train if splits.test is None else splits.test
        predictor = file.predictor(0 if several else shown, device, splits)
        images = f"the {'images' if splits.test is None else 'test images'} of {file.config.name}"
    else:
        predictor = file.predictor(0 if several else shown, device)
        check_labelled(options.data)
        source, images = predictor.source(options.data, setting="--data"), str(options.data)
    if options.prototypes is None:
        check_classes(source, images)
    neighbors = _given_neighbors(options, [source], [images])
    form = predictor.form
    features = predictor.features(source)
    notes = [file.describe(form)]
    if isinstance(file.stated_clusters, int) and file.stated_clusters != weights.n_clusters:
        notes.append(
            f"the file has {weights.n_clusters} clusters, the configuration {file.stated_clusters}; "
            f"{weights.n_clusters} are evaluated"
        )
    further: dict[str, Any] = {"file": str(file.path), "kind": weights.kind, "heads": weights.n_heads}
    heads = list(range(weights.n_heads)) if several else [weights.best_head(shown)]
    rows: list[dict[str, Any]] = []
    if several or neighbors:
        nearest = neighbors[0] if neighbors else None
        rows = _head_rows(file, predictor, heads, source, features, nearest)
        further["head_metrics"] = rows
    best = min(rows, key=lambda row: row["selection_loss"])["head"] if several else heads[0]
    further |= {"head": best, "assumed": file.assumed(form)}
    if not options.json:
        for note in notes:
            show(note)
        if rows:
            keys = list(rows[0])
            table = [[str(row["head"]), *(f"{row[key]:.4f}" for key in keys[1:])] for row in rows]
            print_table("heads", keys, table)
        if several:
            print(f"head {best} has the lowest selection loss, which uses no labels; what follows is of this head")
    chosen = file.with_features(predictor, best, source, features)
    title = f"{file.path}, head {best} of {weights.n_heads}, on {images}"
    show_evaluation(chosen, source, title, as_json=options.json, prototypes=options.prototypes, further=further)


def _head_rows(
    file: ReferenceFile, predictor: Any, heads: Sequence[int], source: Source, features: Tensor, nearest: Tensor | None
) -> list[dict[str, Any]]:
    """Return selection loss and metrics of each head."""
    from .evaluation.metrics import clustering_metrics
    from .evaluation.model_selection import selection_loss
    from .neighbors import topk_neighbors

    labels, names = source.labels, source.class_names
    if nearest is None:
        nearest = topk_neighbors(features, min(file.config.mining.test_k, len(features) - 1))[1]
    rows = []
    for head in heads:
        probabilities = file.with_features(predictor, head, source, features).probabilities(source)
        loss = selection_loss(probabilities[None], nearest)[0]
        clusters, k = probabilities.argmax(dim=1).numpy(), probabilities.shape[1]
        row: dict[str, Any] = {"head": head, "selection_loss": float(loss[0])}
        if labels is not None and names is not None:
            row |= clustering_metrics(clusters, labels.numpy(), k, len(names), probabilities.numpy())
        rows.append(row)
    return rows


def _evaluate_pretext(file: ReferenceFile, options: argparse.Namespace, device: torch.device) -> None:
    from .evaluating import check_classes
    from .evaluation.metrics import PURITY_AT, purity_at
    from .evaluation.probes import knn_accuracy
    from .neighbors import topk_neighbors
    from .runs.tracker import print_table

    sources: dict[str, Source] = {}
    if options.data is None:
        splits = file.splits()
        network = file.embedder(device, splits)
        sources["train"] = splits.train
        if splits.test is not None:
            sources["val"] = splits.test
    else:
        network = file.embedder(device)
        check_labelled(options.data)
        sources["images"] = network.source(options.data, setting="--data")
    images = file.config.name if options.data is None else str(options.data)
    for source in sources.values():
        check_classes(source, images)
    named = [images] if options.data is not None else [f"{images} ({name})" for name in sources]
    given = _given_neighbors(options, list(sources.values()), named)
    vectors = {name: network.features(source) for name, source in sources.items()}
    first, *others = sources
    bank, queried = sources[first], sources[others[0]] if others else None
    assert bank.labels is not None
    monitor = file.config.pretext
    accuracy = knn_accuracy(
        vectors[first],
        bank.labels,
        vectors[others[0]] if others else None,
        None if queried is None else queried.labels,
        k=monitor.monitor_k,
        temperature=monitor.monitor_temperature,
    )
    purity: dict[str, dict[str, float]] = {}
    for number, (name, source) in enumerate(sources.items()):
        assert source.labels is not None
        most = min(max(PURITY_AT), len(source) - 1)
        found = given[number] if number < len(given) else topk_neighbors(vectors[name], most)[1]
        purity[name] = {str(k): value for k, value in purity_at(found.numpy(), source.labels).items()}
    features = file.config.mining.features
    if options.json:
        facts = {
            "file": str(file.path),
            "kind": file.weights.kind,
            "images": {name: len(source) for name, source in sources.items()},
            "features": features,
            "knn_acc": accuracy,
            "knn_k": monitor.monitor_k,
            "purity": purity,
            "assumed": file.assumed(network.form),
        }
        print(json.dumps(facts, indent=2))
        return
    show(file.describe(network.form))
    space = "the projector's output" if features == "projection" else "the backbone's features"
    voting = min(monitor.monitor_k, len(bank) - (queried is None))
    rows = [[f"kNN accuracy, {voting} neighbours", f"{accuracy:.4f}"]]
    for name, values in purity.items():
        of = f"{name}, {len(sources[name]):,} images"
        rows += [[f"purity of the {k} nearest ({of})", f"{value:.4f}"] for k, value in values.items()]
    print_table(f"{file.path} on {images}: {space}", ["", ""], rows)


def _given_neighbors(options: argparse.Namespace, sources: Sequence[Source], names: Sequence[str]) -> list[Tensor]:
    """Return the neighbours in the files that --neighbors names, in the order of the images."""
    import torch

    from .data.neighbor_files import read_neighbors

    files: list[Path] = options.neighbors or []
    if len(files) > len(sources):
        raise UsageError(
            f"--neighbors: {len(files)} files were given, for {' and '.join(names)} at most {len(sources)}"
        )
    return [
        torch.from_numpy(read_neighbors(file, len(source), f"images of {name}"))
        for file, source, name in zip(files, sources, names, strict=False)
    ]
