"""What self-labelling keeps, which images it trusts, and when stages two and three end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import metrics, opened, run_here, summary
from torch import Tensor, nn

from scan_fast.evaluation.model_selection import modularity
from scan_fast.losses import self_label_loss
from scan_fast.runs import artifacts
from scan_fast.runs.artifacts import NEIGHBORS
from scan_fast.stages.clustering import Clustering
from scan_fast.stages.confidence import CERTAIN, per_class
from scan_fast.stages.handover import Handover
from scan_fast.stages.inputs import cluster_model, selflabelled_model
from scan_fast.stages.keeping import TOLERATED, KeptState
from scan_fast.stages.pipeline import STAGES, run_stage
from scan_fast.stages.selflabel import SelfLabel
from scan_fast.stages.stability import EVALUATIONS, Stability
from scan_fast.training.loop import train

RUINOUS = (
    "selflabel.optimizer={name: sgd, lr: 3, momentum: 0, weight_decay: 0}",
    "selflabel.ema=null",
    "selflabel.evaluate_every=1",
)


def logits_of(clusters: list[int], n_clusters: int = 4) -> Tensor:
    return 5 * nn.functional.one_hot(torch.tensor(clusters), n_clusters).float()


PAIRS = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])[:, None]
"""Each of eight images and the next one are neighbours."""
GOOD, MIXED = [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 0, 2, 3, 3, 2]
HALF_GOOD = [0, 0, 1, 1, 2, 3, 3, 2]
THREE = [0, 0, 1, 1, 2, 2, 2, 2]


def kept_epoch(*sequence: list[int]) -> int:
    best, model = KeptState(), nn.Linear(1, 1)
    for epoch, clusters in enumerate(sequence):
        best.judge(logits_of(clusters), PAIRS, model, epoch)
    return int(best.kept["epoch"])


def test_the_state_in_which_neighbours_share_clusters_is_kept() -> None:
    assert kept_epoch(MIXED, HALF_GOOD, GOOD, HALF_GOOD) == 2
    assert kept_epoch(GOOD, HALF_GOOD, MIXED) == 0
    assert kept_epoch(HALF_GOOD, GOOD, GOOD) == 1  # of equal ones the first


def test_a_state_that_lost_a_cluster_is_worse_than_any_that_has_not() -> None:
    score = modularity(torch.tensor([THREE, MIXED]), PAIRS, 4)
    assert float(score[0]) > float(score[1])
    assert kept_epoch(MIXED, THREE) == 0
    # A start that never used the fourth cluster does not miss it.
    assert kept_epoch([0, 1, 1, 0, 2, 2, 2, 2], THREE) == 1
    assert kept_epoch(THREE, GOOD) == 1


def test_a_guarded_state_is_the_last_that_has_not_collapsed() -> None:
    pairs = torch.cat([PAIRS, PAIRS + 8])
    start, slightly, worse = 2 * GOOD, [*GOOD, 0, 0, 1, 1, 2, 3, 3, 3], GOOD + MIXED
    lost = [0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 2, 2, 2, 2]
    scores = modularity(torch.tensor([start, slightly, worse]), pairs, 4).tolist()
    assert scores[2] < (1 - TOLERATED) * scores[0] < scores[1] < scores[0]

    def kept(*sequence: list[int], guarded: bool = True) -> int:
        state, model = KeptState(guarded), nn.Linear(1, 1)
        for epoch, clusters in enumerate(sequence):
            state.judge(logits_of(clusters), pairs, model, epoch)
        return int(state.kept["epoch"])

    assert kept(start, slightly) == 1 and kept(start, slightly, guarded=False) == 0
    assert kept(start, slightly, worse, worse) == 1  # compared with the start, not with the state before
    assert kept(start, worse, slightly) == 2
    assert kept(worse, lost) == 0  # whatever its score


def test_kept_weights_are_a_copy_and_survive_a_checkpoint() -> None:
    best, model = KeptState(), nn.Linear(1, 1)
    assert not best.started
    with pytest.raises(ValueError, match="no state was judged"):
        _ = best.kept
    weight = model.weight.detach().clone()
    assert best.judge(logits_of(HALF_GOOD), PAIRS, model, 0)[1]
    nn.init.constant_(model.weight, 7)
    again = KeptState()
    again.load_state(best.state())
    assert again.started and again.kept["model"]["weight"].equal(weight)
    assert not again.judge(logits_of(THREE), PAIRS, model, 1)[1]  # it still knows that there were four


@pytest.mark.parametrize("keep", ["best", "guarded", "last"])
def test_self_labelling_that_ruins_the_clusters_returns_the_clustering(keep: str, finished: Path) -> None:
    with opened(finished, *RUINOUS, f"selflabel.keep={keep}", again=True) as context:
        context.run.remove(artifacts.checkpoint("selflabel"))
        run_stage(context, STAGES["selflabel"], Handover())
        start, result = cluster_model(context)[0].state_dict(), selflabelled_model(context).state_dict()
        same = all(start[name].equal(value) for name, value in result.items())
        index = torch.from_numpy(context.run.read(NEIGHBORS).index[context.reported])
        neighbors = index[:, : context.config.mining.test_k]
        record = context.run.read(artifacts.SELFLABEL_MODEL).record
    stages = summary(finished)["stages"]
    if keep == "last":
        assert not same and record == {} and "selection_score" not in stages["selflabel"]
        return
    assert same and record["epoch"] == stages["selflabel"]["epoch"] == 0
    assert stages["selflabel"][context.reported] == stages["clustering"][context.reported]
    assert math.isfinite(record["selection_score"]) and len(neighbors) > 0
    lines = [entry for entry in metrics(finished) if entry["stage"] == "selflabel"]
    clusters = stages["clustering"][context.reported]["clusters_used"]
    least = record["selection_score"] * (1 if keep == "best" else 1 - TOLERATED)
    assert all(e["clusters_used"] < clusters or e["selection_score"] <= least for e in lines)


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_the_best_state_survives_an_interruption(ema: str, finished: Path) -> None:
    changes = (
        f"selflabel.ema={ema}",
        "selflabel.epochs=4",
        "selflabel.evaluate_every=1",
        "selflabel.optimizer.lr=0.01",
    )

    def result_of(stop_at: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        class Interrupted(SelfLabel):
            steps = 0

            def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                self.steps += 1
                if self.steps == stop_at:
                    raise KeyboardInterrupt
                return super().step(batch)

        with opened(finished, *changes, "runtime.checkpoint_seconds=0", again=True) as context:
            context.run.remove(artifacts.checkpoint("selflabel"))
            if stop_at is not None:
                with pytest.raises(KeyboardInterrupt):
                    train(Interrupted(context, cluster_model(context)[0], Handover()), context)
                state = context.run.read(artifacts.checkpoint("selflabel")).stage
                # Other names would keep runs of earlier versions from going on.
                assert set(state) == {"average", "best", "neighbors", "stability"}
                assert set(state["best"]) == {"kept", "first_used", "least"}
            run_stage(context, STAGES["selflabel"], Handover())
            kept = context.run.read(artifacts.SELFLABEL_MODEL)
        return kept.model, kept.record

    whole, interrupted = result_of(None), result_of(6)
    assert whole[1] == interrupted[1]
    assert all(value.equal(interrupted[0][name]) for name, value in whole[0].items())


def confident_of(weak: Tensor, threshold: float, fraction: float) -> list[int]:
    """The definition, image by image."""
    confidence, target = weak.softmax(dim=1).max(dim=1)
    found = []
    for label in target.unique().tolist():
        rows = [row for row in range(len(weak)) if int(target[row]) == label]
        rows.sort(key=lambda row: (-float(confidence[row]), row))
        quota = math.ceil(torch.tensor(fraction, dtype=torch.float32) * len(rows))
        found += [row for place, row in enumerate(rows) if place < quota or float(confidence[row]) > threshold]
    return sorted(found)


@pytest.mark.parametrize(("threshold", "fraction"), [(0.99, 0.5), (0.6, 0.1), (1.0, 0.3), (0.0, 0.01), (1.0, 1.0)])
@pytest.mark.parametrize(("n", "classes"), [(64, 10), (7, 2), (5, 40)])
def test_the_most_confident_of_each_class_count(n: int, classes: int, threshold: float, fraction: float) -> None:
    generator = torch.Generator().manual_seed(n)
    weak = 2 * torch.randn(n, classes, generator=generator)
    weak[1] = weak[0]  # a tie
    strong = torch.randn(n, classes, generator=generator, requires_grad=True)
    rows = confident_of(weak, threshold, fraction)
    assert len(rows) >= len(weak.argmax(dim=1).unique())
    loss, count = self_label_loss(per_class(weak, threshold, fraction), strong, CERTAIN, balance=False)
    assert int(count) == len(rows)
    expected = nn.functional.cross_entropy(strong[rows], weak[rows].argmax(dim=1))
    torch.testing.assert_close(loss, expected)
    (own,) = torch.autograd.grad(loss, strong)
    (other,) = torch.autograd.grad(expected, strong)
    torch.testing.assert_close(own, other)


def test_a_network_that_is_sure_of_nothing_learns_all_the_same(finished: Path) -> None:
    words = ("selflabel.threshold=1", "selflabel.confidence=per_class", "selflabel.fraction=0.25")
    with opened(finished, *words, again=True) as context:
        context.run.remove(artifacts.checkpoint("selflabel"))
        run_stage(context, STAGES["selflabel"], Handover())
    lines = [entry for entry in metrics(finished) if entry["stage"] == "selflabel"]
    assert lines and all(0.25 <= entry["confident"] < 0.5 and entry["loss"] > 0 for entry in lines)


def test_assignments_are_stable_after_three_calm_evaluations_in_a_row() -> None:
    stability = Stability(0.125)
    moves = [GOOD, [1, *GOOD[1:]], GOOD, MIXED, MIXED, MIXED]
    for epoch, clusters in enumerate(moves, start=1):
        stability.note(logits_of(clusters)[None], 0, epoch)
        assert not stability.reached
        copy = Stability(0.125)
        copy.load_state(stability.state())
        stability = copy
    stability.note(logits_of([1, *MIXED[1:]])[None], 0, 7)
    assert stability.reached and stability.changed == 0.125
    assert stability.notes(10) == {"stable": {"epoch": 7, "of": 10, "changed": 0.125}}
    words = stability.words("selflabel", 10)
    assert (
        words == "selflabel: ended after epoch 7/10: at most 12.5 % of the assignments changed in each of 3 evaluations"
    )
    assert stability.notes(7) == {} and stability.words("selflabel", 7) is None


def test_the_head_that_counts_is_compared_with_itself() -> None:
    stability = Stability(0.0)
    for epoch in range(1, 2 + EVALUATIONS):
        stability.note(torch.stack([logits_of(GOOD), logits_of(GOOD[::-1])]), epoch % 2, epoch)
    assert stability.reached


def test_without_a_limit_nothing_is_stable() -> None:
    stability = Stability(None)
    for epoch in range(9):
        stability.note(logits_of(GOOD)[None], 0, epoch)
    assert not stability.reached and stability.notes(20) == {}


@pytest.mark.parametrize("name", ["clustering", "selflabel"])
def test_a_stage_whose_assignments_stay_ends_early_and_says_so(name: str, finished: Path) -> None:
    words = [f"{name}.epochs=9", f"{name}.evaluate_every=1", f"{name}.stop_when_stable=0.9", "--again"]
    result = run_here("cluster" if name == "clustering" else name, finished, *words)
    assert result.code == 0, result.err
    lines = [entry["epoch"] for entry in metrics(finished) if entry["stage"] == name]
    assert lines == list(range(1, EVALUATIONS + 2))  # the first evaluation has none to be compared with
    entry = summary(finished)["stages"][name]
    assert (entry["stable"]["epoch"], entry["stable"]["of"]) == (EVALUATIONS + 1, 9)
    assert f"{name}: ended after epoch 4/9" in result.out


@pytest.mark.parametrize("kind", [Clustering, SelfLabel])
def test_a_stage_that_has_ended_early_does_not_go_on(kind: Any, finished: Path) -> None:
    name = kind.name
    words = (f"{name}.epochs=9", f"{name}.evaluate_every=1", f"{name}.stop_when_stable=0.9")
    with opened(finished, *words, again=True) as context:
        context.run.remove(artifacts.checkpoint(name))

        def stage() -> Any:
            return kind(context, cluster_model(context)[0], Handover())

        first = stage()
        train(first, context)
        ended = context.run.read(artifacts.checkpoint(name))
        again = stage()
        train(again, context)
        assert (ended.epoch, ended.step) == (EVALUATIONS + 1, 0)
        assert context.run.read(artifacts.checkpoint(name)).seconds == ended.seconds
        assert again.finished() and again.stability.notes(9) == first.stability.notes(9)
