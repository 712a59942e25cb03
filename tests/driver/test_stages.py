"""What each stage promises: which weights move, what is drawn, what is kept."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from driving import TINY, metrics, opened, run_here, summary, tiny_config
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from scan_fast.data.loader import epoch_batches, steps_per_epoch
from scan_fast.errors import ConfigError, RunError
from scan_fast.evaluation.model_selection import selection_loss
from scan_fast.losses import nt_xent, scan_loss, self_label_loss
from scan_fast.models.heads import ClusterModel, PretextModel
from scan_fast.random import stream_key
from scan_fast.runs import artifacts
from scan_fast.runs.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from scan_fast.runs.folder import RunFolder
from scan_fast.stages.clustering import Clustering, start_from_kmeans
from scan_fast.stages.handover import Handover
from scan_fast.stages.inputs import cluster_model, pretext_model, selflabelled_model
from scan_fast.stages.mining import search
from scan_fast.stages.pipeline import STAGES, run_stage
from scan_fast.stages.pretext import Pretext
from scan_fast.stages.selflabel import SelfLabel
from scan_fast.training.context import Context
from scan_fast.training.inference import forward_all
from scan_fast.training.loop import Stage, set_learning_rate, train
from scan_fast.training.optimizers import build_optimizer


def do(name: str, context: Context) -> None:
    """Run one stage as a process of its own would: nothing is handed over."""
    run_stage(context, STAGES[name], Handover())


def pretext_stage(context: Context) -> Pretext:
    model = PretextModel(context.model_config)
    method = context.config.pretext.method.build(model, context.splits.train.size)
    return Pretext(context, model, method, Handover())


def states(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k.startswith(prefix)}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(one[key].equal(two[key]) for key in one)


# -- the loop ----------------------------------------------------------------------------------------------------------


class Line(Stage[Tensor]):
    """Fits a number to the images' indices, and notes what the loop did."""

    name = "line"

    def __init__(self, n: int, training: TrainingConfig) -> None:
        self.model = nn.Linear(1, 1)
        self.training, self.n_images = training, n
        self.seen: list[list[int]] = []
        self.epochs: list[tuple[int, bool]] = []

    def batch(self, epoch: int, indices: Tensor) -> Tensor:
        self.seen.append(indices.tolist())
        return indices.float()[:, None]

    def step(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.model(batch).square().mean()
        return loss, {"loss": loss, "one": torch.tensor(1.0)}

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        self.epochs.append((epoch, last))
        return {"epochs": float(epoch)}


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    training = TrainingConfig(epochs=3, batch_size=7, optimizer=OptimizerConfig(lr=1e-6))
    with opened(tmp_path / "run") as context:
        stage = Line(30, training)
        train(stage, context)
    # Four full batches of seven; the two images over are others in each epoch.
    epochs = [[i for batch in stage.seen[start : start + 4] for i in batch] for start in (0, 4, 8)]
    assert all(len(set(epoch)) == 28 and set(epoch) <= set(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stage.epochs == [(1, False), (2, False), (3, True)]
    lines = [entry for entry in metrics(tmp_path / "run") if entry["stage"] == "line"]
    assert [(e["epoch"], e["step"], e["one"], e["epochs"]) for e in lines] == [
        (1, 4, 1, 1),
        (2, 8, 1, 2),
        (3, 12, 1, 3),
    ]


def test_batches_start_in_mid_epoch_where_they_were_left() -> None:
    key = stream_key(3, "pretext")
    whole = list(epoch_batches(key, 5, 50, 8))
    assert len(whole) == steps_per_epoch(50, 8) == 6
    for start in range(7):
        rest = list(epoch_batches(key, 5, 50, 8, start_step=start))
        assert [b.tolist() for b in rest] == [b.tolist() for b in whole[start:]]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    words = ["digits", "--out", tmp_path / "run", "--quiet", "model.width=0.25", "data.limit=128", "runtime.threads=1"]
    words += ["pretext.batch_size=64", "pretext.epochs=40", "pretext.optimizer.name=sgd", "pretext.optimizer.lr=1e30"]
    message = run_here("pretext", *words).refusal()
    assert "pretext: the loss is nan" in message or "pretext: the loss is inf" in message or "not finite" in message
    assert "lower pretext.optimizer.lr (now 1e+30)" in message


class Diverging(Line):
    """Has a loss, or a weight, that is not finite from a step on."""

    def __init__(self, n: int, training: TrainingConfig, fault: str, first: int) -> None:
        super().__init__(n, training)
        self.fault, self.first, self.steps = fault, first, 0

    def step(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, named = super().step(batch)
        self.steps += 1
        if self.steps >= self.first and self.fault == "loss":
            loss = loss * float("nan")
            named["loss"] = loss
        return loss, named

    def after_step(self) -> None:
        if self.steps >= self.first and self.fault == "weight":
            with torch.no_grad():
                assert isinstance(self.model.weight, Tensor)
                self.model.weight.fill_(float("inf"))


@pytest.mark.parametrize("fault", ["loss", "weight"])
@pytest.mark.parametrize("first", [3, 4, 6])
def test_a_checkpoint_is_never_overwritten_by_one_that_is_not_finite(fault: str, first: int, tmp_path: Path) -> None:
    """With a checkpoint after each of four steps per epoch: that of the last good step stays."""
    training = TrainingConfig(epochs=3, batch_size=7, optimizer=OptimizerConfig(lr=1e-6))
    with opened(tmp_path / "run", "runtime.checkpoint_seconds=0") as context:
        with pytest.raises(RunError, match=r"line: (the loss is nan|a weight is not finite) in epoch"):
            train(Diverging(30, training, fault, first), context)
        state = context.run.read(artifacts.checkpoint("line"))
    assert 4 * state.epoch + state.step == first - 1
    assert all(bool(value.isfinite().all()) for value in state.model.values())
    assert bool(state.totals["loss"].isfinite())


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_the_learning_rate_follows_the_schedule(every: Literal["epoch", "step"]) -> None:
    schedule = ScheduleConfig(name="cosine", floor=0.01, warmup_epochs=1, every=every)
    training = TrainingConfig(epochs=5, optimizer=OptimizerConfig(lr=0.3), schedule=schedule)
    optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], training.optimizer)
    for epoch in range(5):
        for step in range(4):
            set_learning_rate(optimizer, training, epoch, step, 4)
            position = epoch + (step / 4 if every == "step" else 0)
            if epoch == 0:
                # A ramp from zero; with one rate per epoch it has one value.
                ramp = (step + 1) / 5 if every == "step" else 1 / 2
                assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * ramp)
            else:
                cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * (position - 1) / 4)) / 2
                assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * cosine)


def test_decay_leaves_biases_and_normalisation_alone_where_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for decay_all in (True, False):
        subject = copy.deepcopy(model)
        config = OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.5, decay_all=decay_all)
        optimizer = build_optimizer(list(subject.parameters()), config)
        for parameter in subject.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for old, new in zip(model.parameters(), subject.parameters(), strict=True):
            factor = 0.95 if decay_all or old.ndim > 1 else 1.0
            torch.testing.assert_close(new, old * factor)


# -- stage one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["both", "first"])
def test_pretext_step_is_nt_xent_of_both_views_in_one_pass(anchors: str, tmp_path: Path) -> None:
    with opened(tmp_path / "run", f"pretext.method.anchors={anchors}") as context:
        torch.manual_seed(0)
        stage = pretext_stage(context)
        stage.train_mode()
        batch = stage.batch(0, torch.arange(12))
        assert not batch[0].equal(batch[1])
        expected = copy.deepcopy(stage.model)(torch.cat(list(batch)))
        loss, _ = stage.step(batch)
        torch.testing.assert_close(loss, nt_xent(expected[:12], expected[12:], 0.2, anchors=anchors))
        # Each image has its parameters whatever batch it is in.
        again = stage.batch(0, torch.tensor([7, 3]))
        assert again[0].equal(batch[0][[7, 3]])
        assert not stage.batch(1, torch.arange(12))[0].equal(batch[0])


def test_pretext_views_grow_when_the_configuration_says_so(tmp_path: Path) -> None:
    with opened(tmp_path / "run", "pretext.epochs=10", "pretext.method.resolutions=[[0.35, 4], [0.7, 6]]") as context:
        stage = pretext_stage(context)
        sizes = [stage.batch(epoch, torch.arange(2))[1].shape for epoch in range(10)]
        assert sizes == [(2, 3, size, size) for size in [4] * 4 + [6] * 3 + [8] * 3]
        assert train(stage, context).seconds > 0  # every size passes the network
        # What is evaluated, and what the later stages see, has the whole size.
        assert context.plain_view.size == 8


def test_weights_of_a_pretext_model_are_taken_as_they_are(tmp_path: Path) -> None:
    with opened(tmp_path / "source") as context:
        torch.manual_seed(5)
        model = PretextModel(context.model_config)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
    overrides = ("pretext.method=weights", f"pretext.method.file={tmp_path / 'weights.pt'}")
    with opened(tmp_path / "run", *overrides) as context:
        do("pretext", context)
        assert equal(states(pretext_model(context)), states(model))


# -- mining ------------------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_embeddings(finished_run: Path) -> None:
    with np.load(finished_run / "embeddings.npz") as e, np.load(finished_run / "neighbors.npz") as n:
        for split, k in (("train", 5), ("test", 5)):
            similarity = e[split].astype(np.float64) @ e[split].astype(np.float64).T
            np.fill_diagonal(similarity, -np.inf)
            best = -np.sort(-similarity, axis=1)[:, :k]
            np.testing.assert_allclose(n[f"{split}_similarity"], best, atol=1e-6)
            np.testing.assert_allclose(np.take_along_axis(similarity, n[split], axis=1), best, atol=1e-6)
            assert not (n[split] == np.arange(len(n[split]))[:, None]).any()


@pytest.mark.parametrize("backend", ["auto", "reference", "faiss"])
def test_backends_agree_and_duplicates_are_no_self(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    rows[10:17] = rows[3]  # more duplicates than neighbours
    similarity, index = search(rows, 4, backend)
    assert not (index == torch.arange(40)[:, None]).any()
    torch.testing.assert_close(similarity, search(rows, 4, "reference")[0])
    assert all(set(index[i].tolist()) <= {3, *range(10, 17)} for i in (3, *range(10, 17)))


def test_features_of_the_backbone_can_be_mined(finished: Path) -> None:
    with opened(finished, "mining.features=backbone", again=True) as context:
        do("mining", context)
        model = pretext_model(context)
        expected = forward_all(context, model, model.features, context.clustered["test"])
        with np.load(finished / "embeddings.npz") as e:
            np.testing.assert_array_equal(e["test"], nn.functional.normalize(expected, dim=1).numpy())


# -- stage two ---------------------------------------------------------------------------------------------------------


def test_clustering_step_sums_the_heads_and_separates_the_batch_statistics(finished: Path) -> None:
    with opened(finished, again=True) as context:
        torch.manual_seed(0)
        stage = Clustering(context, ClusterModel(context.model_config, 10, 2), Handover())
        stage.train_mode()
        anchors, neighbors = stage.batch(0, torch.arange(16))
        model = copy.deepcopy(stage.model)
        total, _, _ = scan_loss(model(anchors), model(neighbors), 5.0)
        loss, shown = stage.step((anchors, neighbors))
        torch.testing.assert_close(loss, total.sum())
        torch.testing.assert_close(shown["loss"], total.mean())
        assert equal(states(model), states(stage.model))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("use", [None, 2])
def test_neighbours_are_drawn_evenly(include_self: bool, use: int | None, finished: Path) -> None:
    overrides = [f"clustering.include_self={str(include_self).lower()}", "clustering.view={kind: plain}"]
    overrides += [f"clustering.neighbors={use}"] if use else []
    with opened(finished, *overrides, again=True) as context:
        stage = Clustering(context, ClusterModel(context.model_config, 10, 1), Handover())
        with np.load(finished / "neighbors.npz") as file:
            mined = file["train"][:, :use]
        drawn: Counter[int] = Counter()
        everyone = torch.arange(160)
        stage._views = lambda view, images, **_: images  # type: ignore[assignment]
        stage._views.key = stream_key(0, "clustering")
        for epoch in range(200):
            anchors, chosen = stage.batch(epoch, everyone)
            assert anchors.equal(everyone)
            own = chosen == everyone
            position = (torch.from_numpy(mined) == chosen[:, None]).int().argmax(dim=1) + 1
            position[own] = 0
            assert all(int(c) in (*mined[i], i) for i, c in enumerate(chosen))
            drawn.update(position.tolist())
    choices = range(0 if include_self else 1, (use or 5) + 1)
    assert set(drawn) == set(choices)
    expected = 200 * 160 / len(choices)
    # Six standard deviations of a binomial count.
    assert all(abs(drawn[c] - expected) < 6 * expected**0.5 for c in choices)


def test_heads_only_leaves_the_backbone_alone_in_every_bit(finished: Path) -> None:
    with opened(finished, "clustering.update=heads", again=True) as context:
        context.run.remove(artifacts.checkpoint("clustering"))
        do("clustering", context)
        backbone = states(cluster_model(context)[0], "backbone.")
        assert equal(backbone, states(pretext_model(context), "backbone."))
        checkpoint = context.run.read(artifacts.checkpoint("clustering"))
        assert len(checkpoint.optimizer["state"]) == 2 * 2  # weight and bias of two heads
    assert "running_mean" in "".join(backbone)


def test_heads_train_on_cached_views(finished: Path) -> None:
    heads = ("clustering.update=heads", "clustering.heads=2")
    everyone = torch.arange(160)
    with opened(finished, *heads, "clustering.cached_views=1", again=True) as context:
        model = context.place(ClusterModel(context.model_config, 10, 2)).eval()
        cached, fresh = (Clustering(context, model, Handover()) for _ in range(2))
        cached.prepare()
        # The first cached view is that of a first epoch; a neighbour is seen as anyone else is.
        anchors, neighbors = cached.batch(0, everyone)
        with torch.no_grad():
            expected = model.features(fresh.batch(0, everyone)[0])
        torch.testing.assert_close(anchors, expected)
        assert {tuple(row) for row in neighbors.tolist()} <= {tuple(row) for row in anchors.tolist()}
        assert cached.batch(5, everyone)[0].equal(anchors)
        total, _, _ = scan_loss(model.heads(anchors), model.heads(neighbors), 5.0)
        loss, _ = cached.step((anchors, neighbors))
        torch.testing.assert_close(loss, total.sum())
    with opened(finished, *heads, "clustering.cached_views=3", again=True) as context:
        stage = Clustering(context, model, Handover())
        stage.prepare()
        seen = {tuple(stage.batch(epoch, everyone)[0][7].tolist()) for epoch in range(30)}
        assert len(seen) == 3


def test_cached_views_survive_an_interruption(finished: Path) -> None:
    overrides = ("clustering.update=heads", "clustering.cached_views=2", "runtime.checkpoint_seconds=0")

    class Interrupted(Clustering):
        steps = 0

        def step(self, batch: Any) -> Any:
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt
            return super().step(batch)

    def result_of(kinds: list[type[Clustering]]) -> dict[str, Tensor]:
        with opened(finished, *overrides, again=True) as context:
            context.run.remove(artifacts.checkpoint("clustering"))
            for kind in kinds:
                torch.manual_seed(0)
                stage = kind(context, context.place(ClusterModel(context.model_config, 10, 2)), Handover())
                with contextlib.suppress(KeyboardInterrupt):
                    train(stage, context)
            return states(stage.model)

    assert equal(result_of([Interrupted, Clustering]), result_of([Clustering]))


def test_cached_views_are_for_frozen_backbones() -> None:
    with pytest.raises(ConfigError, match="cached_views is for update=heads only"):
        tiny_config("clustering.cached_views=2")


def test_full_training_moves_the_backbone_and_its_statistics(finished: Path) -> None:
    with opened(finished, again=True) as context:
        one, two = (states(load(context), "backbone.") for load in (pretext_model, lambda c: cluster_model(c)[0]))
        assert not any(one[key].equal(two[key]) for key in one if "conv" in key or "running" in key)


def test_the_head_and_the_epoch_of_lowest_selection_loss_are_kept(finished: Path) -> None:
    noted: list[tuple[float, int, int]] = []

    class Watched(Clustering):
        def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
            logits = forward_all(self.context, self.model, self.model, self.context.clustered["test"])
            neighbors = torch.from_numpy(self.context.run.read(artifacts.NEIGHBORS).index["test"])
            totals = selection_loss(logits.log_softmax(dim=-1), neighbors)[0]
            noted.extend((float(total), epoch, head) for head, total in enumerate(totals))
            return super().end_epoch(epoch, last)

    # A rate so high that later epochs are not simply better.
    with opened(
        finished, "clustering.heads=4", "clustering.epochs=5", "clustering.optimizer.lr=0.05", again=True
    ) as context:
        context.run.remove(artifacts.checkpoint("clustering"))
        torch.manual_seed(0)
        stage = Watched(context, ClusterModel(context.model_config, 10, 4), Handover())
        train(stage, context)
    loss, epoch, head = min(noted)
    assert len(noted) == 20
    assert (stage.best["loss"], stage.best["epoch"], stage.best["head"]) == (pytest.approx(loss), epoch, head)
    lines = [e for e in metrics(finished) if e["stage"] == "clustering"]
    assert min(e["selection_loss"] for e in lines) == pytest.approx(loss, rel=1e-5)


def test_the_result_is_the_chosen_head(finished_run: Path, tmp_path: Path) -> None:
    entry = summary(finished_run)["stages"]["clustering"]
    best = torch.load(finished_run / "checkpoints" / "clustering-final.pt", weights_only=True)
    assert (best["head"], best["epoch"]) == (entry["head"], entry["epoch"])
    with opened(tmp_path / "other") as context:
        context.run = RunFolder(finished_run)
        model, _ = cluster_model(context)
    assert model.n_heads == 1
    assert model.state_dict()["cluster_head.0.weight"].equal(best["model"][f"cluster_head.{best['head']}.weight"])


@pytest.mark.parametrize("mined", [True, False])
def test_kmeans_start_gives_each_head_its_kmeans_solution(finished: Path, mined: bool) -> None:
    """The solution is that of the embeddings that were mined, or of the unit features if there are none."""
    with opened(finished, again=True) as context:
        embeddings = context.run.read(artifacts.EMBEDDINGS).rows["train"]
        if not mined:
            context.run.path_of(artifacts.EMBEDDINGS).unlink()
        model = ClusterModel(context.model_config, 4, 2)
        model.backbone.load_state_dict(pretext_model(context).backbone.state_dict())
        before = states(model)
        start_from_kmeans(context, model, Handover())
        assert equal(states(model, "backbone."), {k: v for k, v in before.items() if k.startswith("backbone.")})
        features = forward_all(context, model, model.features, context.splits.train)
        logits = forward_all(context, model, model, context.splits.train)
        again = copy.deepcopy(model)
        start_from_kmeans(context, again, Handover())
        assert equal(states(again), states(model))
    unit = embeddings if mined else nn.functional.normalize(features, dim=1).numpy()
    for head in range(2):
        kmeans = KMeans(4, n_init=3, random_state=head).fit(unit.astype(np.float64))
        # The heads are linear in some components of the features, fewer than images, so images on a border may move.
        assert adjusted_rand_score(kmeans.labels_, logits[head].argmax(dim=1).numpy()) > (0.4 if mined else 0.6)
    confidence = logits.softmax(dim=2).amax(dim=2)
    assert float(confidence.min()) < 0.9


# -- stage three -------------------------------------------------------------------------------------------------------


def selflabel(context: Context) -> SelfLabel:
    return SelfLabel(context, cluster_model(context)[0], Handover())


def test_nothing_confident_costs_nothing(finished: Path) -> None:
    with opened(finished, "selflabel.threshold=1", "selflabel.optimizer.weight_decay=0", again=True) as context:
        context.run.remove(artifacts.checkpoint("selflabel"))
        do("selflabel", context)
        before, after = cluster_model(context)[0], selflabelled_model(context)
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            assert bool(torch.isfinite(new).all()), name
            # The digits' recipe may use a teacher; without a gradient neither it nor its student moves.
            torch.testing.assert_close(new, old)
    assert all(e["confident"] == 0 and e["loss"] == 0 for e in metrics(finished) if e["stage"] == "selflabel")


@pytest.mark.parametrize("ema", [None, 0.9])
def test_labels_come_from_the_teacher_in_evaluation_or_the_student_in_training_mode(
    ema: float | None, finished: Path
) -> None:
    overrides = (f"selflabel.ema={'null' if ema is None else ema}", "selflabel.ema_mode=teacher")
    with opened(finished, *overrides, again=True) as context:
        stage = selflabel(context)
        stage.train_mode()
        weak, strong = stage.batch(0, torch.arange(32))
        model = copy.deepcopy(stage.model)
        giver = model if ema is None else copy.deepcopy(model).eval()
        with torch.no_grad():
            labels = giver(weak)[0]
        expected, confident = self_label_loss(labels, model(strong)[0], 0.1, balance=True)
        loss, shown = stage.step((weak, strong))
        torch.testing.assert_close(loss, expected)
        assert float(shown["confident"]) == pytest.approx(float(confident) / 32)
        assert float(loss.detach()) > 0
        # Without a teacher, the plain images move the batch statistics too: two passes instead of one.
        assert equal(states(stage.model), states(model))
        assert (stage.average is None) == (ema is None)


def test_the_teacher_follows_weights_and_statistics(finished: Path) -> None:
    with opened(finished, "selflabel.ema=0.75", "selflabel.ema_mode=teacher", again=True) as context:
        stage = selflabel(context)
        start = states(stage.model)
        generator = torch.Generator().manual_seed(0)
        for value in stage.model.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) + 3 if value.is_floating_point() else value + 5)
        moved = states(stage.model)
        stage.after_step()
        assert equal(states(stage.model), moved)
        assert stage.average is not None and stage.result is stage.average.model
        for name, value in states(stage.result).items():
            expected = 0.75 * start[name] + 0.25 * moved[name] if value.is_floating_point() else moved[name]
            torch.testing.assert_close(value, expected)


def test_write_back_replaces_the_weights_and_keeps_the_first_statistics(finished: Path) -> None:
    with opened(finished, "selflabel.ema=0.75", "selflabel.ema_mode=write_back", again=True) as context:
        stage = selflabel(context)
        start = states(stage.model)
        parameters = {name for name, _ in stage.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for value in stage.model.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) + 3 if value.is_floating_point() else value + 5)
        moved = states(stage.model)
        stage.after_step()
        assert stage.result is stage.model
        for name, value in states(stage.model).items():
            expected = 0.75 * start[name] + 0.25 * moved[name] if name in parameters else start[name]
            torch.testing.assert_close(value, expected)


def test_write_back_trains_with_a_small_part_of_the_rate(finished: Path) -> None:
    overrides = ("selflabel.ema=0.999", "selflabel.ema_mode=write_back", "selflabel.epochs=1")
    sgd = ("selflabel.optimizer={name: sgd, lr: 0.1, momentum: 0, weight_decay: 0}", "selflabel.batch_size=160")

    def step_of(*changes: str) -> Tensor:
        with opened(finished, *sgd, *changes, again=True) as context:
            context.run.remove(artifacts.checkpoint("selflabel"))
            stage = selflabel(context)
            before = stage.model.state_dict()["cluster_head.0.weight"].clone()
            train(stage, context)
            return stage.result.state_dict()["cluster_head.0.weight"] - before

    whole = step_of("selflabel.ema=null", "selflabel.epochs=1")
    assert float(whole.abs().max()) > 1e-3
    torch.testing.assert_close(step_of(*overrides), whole * 0.001, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("mode", ["teacher", "write_back"])
def test_averages_survive_an_interruption(mode: str, finished: Path, tmp_path: Path) -> None:
    overrides = ("selflabel.ema=0.9", f"selflabel.ema_mode={mode}", "runtime.checkpoint_seconds=0")

    def result_of(stop_at: int | None) -> dict[str, Tensor]:
        class Interrupted(SelfLabel):
            steps = 0

            def step(self, batch: Any) -> Any:
                self.steps += 1
                if self.steps == stop_at:
                    raise KeyboardInterrupt
                return super().step(batch)

        with opened(finished, *overrides, again=True) as context:
            context.run.remove(artifacts.checkpoint("selflabel"))
            if stop_at is not None:
                with pytest.raises(KeyboardInterrupt):
                    train(Interrupted(context, cluster_model(context)[0], Handover()), context)
            stage = selflabel(context)
            train(stage, context)
            return states(stage.result)

    assert equal(result_of(4), result_of(None))


def test_a_run_without_self_labelling_ends_with_the_clustering(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run_here("run", "digits", *TINY, "selflabel=null", "--out", folder, "--quiet")
    assert result.code == 0, result.err
    assert list(summary(folder)["stages"]) == ["pretext", "mining", "clustering"]
    model = torch.load(folder / "model.pt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "clustering-final.pt", weights_only=True)
    assert model["stage"] == "clustering"
    assert model["state_dict"]["cluster_head.0.bias"].equal(best["model"][f"cluster_head.{best['head']}.bias"])


# -- the context -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "backbone"), [(32, "resnet18_cifar"), (64, "resnet18_stl"), (128, "torchvision:resnet18")]
)
def test_the_backbone_follows_the_image_size(size: int, backbone: str, tmp_path: Path) -> None:
    with opened(tmp_path / "run", "model={backbone: auto}", f"data.image_size={size}") as context:
        assert context.model_config.backbone == backbone


@pytest.mark.parametrize("selflabel", ["selflabel.epochs=1", "selflabel=null"])
def test_evaluation_sees_the_centre_at_the_size_of_training(selflabel: str, tmp_path: Path) -> None:
    overrides = ("data.image_size=16", "clustering.view.size=12", selflabel)
    with opened(tmp_path / "run", *overrides) as context:
        assert context.plain_view.size == 12


def test_the_seed_decides_the_weights_and_torchs_generator_is_left_alone(tmp_path: Path) -> None:
    generator = torch.get_rng_state()
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with opened(tmp_path / name, f"seed={seed}", "pretext.epochs=1") as context:
            do("pretext", context)
            assert torch.get_rng_state().equal(generator)
            found.append(states(pretext_model(context)))
            torch.set_rng_state(generator)
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as context:
        for load, name in ((pretext_model, "pretext"), (cluster_model, "cluster"), (selflabelled_model, "selflabel")):
            with pytest.raises(RunError, match=f"run `scan-fast {name} "):
                load(context)
