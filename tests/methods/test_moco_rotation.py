"""MoCo and RotNet: what their losses compare, what they keep, and that they learn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from driving import opened
from interruptions import InterruptedPretext
from pretext_training import small_model, trained
from torch import Tensor
from torch.nn import functional as F

from scan_fast.errors import ConfigError
from scan_fast.losses import nt_xent
from scan_fast.methods import MoCoSettings, PretextMethod, RotationSettings
from scan_fast.methods.moco import MoCo
from scan_fast.methods.rotation import Rotation
from scan_fast.models.heads import PretextModel
from scan_fast.runs.config import find_config, load_config
from scan_fast.stages.handover import Handover
from scan_fast.stages.mining import run_mining
from scan_fast.stages.pretext import Pretext, run_pretext
from scan_fast.training.context import Context

VIEW = "pretext.method.view={kind: affine, degrees: 20, translate: 0.15, cutout: 3}"


def _moco(**settings: float | int) -> MoCo:
    torch.manual_seed(0)
    method = MoCoSettings.model_validate({"queue_size": 7, "momentum": 0.9, **settings}).build(small_model(), 8)
    assert isinstance(method, MoCo)
    return method


def _step(method: PretextMethod, images: Sequence[Tensor]) -> Tensor:
    """Take one step of gradient descent, as the stage does, and return the loss."""
    loss, metrics = method.loss(images)
    assert metrics["loss"] is loss
    loss.backward()
    with torch.no_grad():
        for module in (method.model, *method.modules()):
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    method.after_step()
    return loss.detach()


def test_queries_are_compared_with_keys_and_the_queue() -> None:
    method = _moco(temperature=0.3)
    images = [torch.randn(3, 3, 8, 8) for _ in range(2)]
    queries, keys = method.model(images[0]), method.average.model(images[1])
    expected = nt_xent(queries, keys, 0.3, anchors="first", queue=method.queue, impl="reference")
    loss, _ = method.loss(images)
    torch.testing.assert_close(loss, expected)
    assert loss > nt_xent(queries, keys, 0.3, anchors="first")
    loss.backward()
    assert all(parameter.grad is not None for parameter in method.model.parameters())
    assert all(parameter.grad is None for parameter in method.average.model.parameters())
    assert [view.side for view in method.views(0, 1)] == [8, 8]


def test_the_queue_holds_the_latest_keys() -> None:
    """The oldest rows are replaced, across the end of the queue as well, and only after the step."""
    method = _moco()
    rows = list(method.queue.clone())
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(7))
    for _ in range(5):
        images = [torch.randn(3, 3, 8, 8) for _ in range(2)]
        before = method.queue.clone()
        method.loss(images)
        assert method.queue.equal(before)
        expected = F.normalize(copy.deepcopy(method.average.model)(images[1]), dim=1)
        method.after_step()
        rows = [*rows[3:], *expected]
        held = {tuple(row.tolist()) for row in method.queue}
        assert held == {tuple(row.tolist()) for row in rows}


def test_a_batch_longer_than_the_queue_leaves_its_last_keys() -> None:
    method = _moco(queue_size=4)
    method.loss([torch.randn(6, 3, 8, 8) for _ in range(2)])
    keys = method._keys
    method.after_step()
    assert {tuple(row.tolist()) for row in method.queue} == {tuple(row.tolist()) for row in keys[2:]}


def test_the_key_network_follows_slowly() -> None:
    method = _moco(momentum=0.75)
    name, weight = next(iter(method.model.named_parameters()))
    before = dict(method.average.model.named_parameters())[name].clone()
    _step(method, [torch.randn(6, 3, 8, 8) for _ in range(2)])
    after = dict(method.average.model.named_parameters())[name]
    assert not after.equal(before)
    torch.testing.assert_close(after, 0.75 * before + 0.25 * weight)
    assert method.average.model.training


def test_the_state_of_moco_holds_everything() -> None:
    """Two steps after a restart in another object give the same bits."""
    method, other = _moco(), _moco()
    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randn(3, 3, 8, 8, generator=generator) for _ in range(2)] for _ in range(4)]
    for images in batches[:2]:
        _step(method, images)
    assert not other.queue.equal(method.queue)
    other.model.load_state_dict(method.model.state_dict())
    other.load_state(method.state())
    for images in batches[2:]:
        assert _step(method, images).equal(_step(other, images))
    assert other.queue.equal(method.queue)


def test_the_queue_fits_the_number_of_images() -> None:
    assert MoCoSettings().for_run(1_000_000, 1).queue_size == 65_536
    assert MoCoSettings().for_run(1600, 1).queue_size == 200
    assert MoCoSettings().for_run(3, 1).queue_size == 1
    assert MoCoSettings(queue_size=100).for_run(100, 1).queue_size == 100
    message = "pretext.method.queue_size=101 is more than the 100 images.* give at most 100"
    with pytest.raises(ConfigError, match=message):
        MoCoSettings(queue_size=101).for_run(100, 1)


def test_the_key_network_follows_faster_in_short_trainings() -> None:
    assert MoCoSettings().for_run(1000, 99_999).momentum == 0.99
    assert MoCoSettings().for_run(1000, 100_000).momentum == 0.999
    assert MoCoSettings(momentum=0.5).for_run(1000, 100_000).momentum == 0.5


def test_all_four_rotations_are_classified() -> None:
    torch.manual_seed(0)
    method = RotationSettings().build(small_model().eval(), 8)
    assert isinstance(method, Rotation)
    (view,) = method.views(0, 1)
    assert view.side == 8 and RotationSettings().passes(8) == 4
    images = torch.randn(5, 3, 8, 8)
    turned = torch.stack([images, *(torch.rot90(images, turn, (2, 3)) for turn in (1, 2, 3))], dim=1).flatten(0, 1)
    logits = method.classifier(method.model.features(turned))
    expected = F.cross_entropy(logits, torch.arange(4).repeat(5))
    loss, metrics = method.loss([images])
    torch.testing.assert_close(loss, expected)
    assert metrics["rotation_acc"] == (logits.argmax(dim=1) == torch.arange(4).repeat(5)).float().mean()
    loss.backward()
    assert method.classifier.weight.grad is not None
    assert all(parameter.grad is None for parameter in method.model.contrastive_head.parameters())


def test_rotation_learns_which_way_is_up() -> None:
    """Images that are bright at the top can be told from their rotations."""
    torch.manual_seed(0)
    method = RotationSettings().build(small_model(), 8)
    for _ in range(30):
        images = 0.3 * torch.randn(16, 3, 8, 8) + torch.linspace(1, -1, 8)[:, None]
        _, metrics = method.loss([images])
        _step(method, [images])
    assert metrics["rotation_acc"] > 0.9


def test_rotation_refuses_mining_in_the_space_of_the_projector() -> None:
    message = "pretext.method=rotation trains no projector, so it needs mining.features=backbone"
    with pytest.raises(ConfigError, match=message):
        load_config(find_config("digits"), ["pretext.method=rotation"])
    load_config(find_config("digits"), ["pretext.method=rotation", "mining.features=backbone"])


@pytest.mark.parametrize("kind", ["moco", "rotation"])
def test_both_resume_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    settings = [f"pretext.method={kind}", "pretext.method.view.kind=affine", "mining.features=backbone"]

    def result_of(folder: Path, stages: Sequence[type[Pretext]]) -> dict[str, Tensor]:
        def build(context: Context, model: PretextModel) -> PretextMethod:
            if kind == "rotation":
                model.contrastive_head = torch.nn.Identity()  # it is not trained
            method = context.config.pretext.method.for_run(len(context.splits.train), 100)
            return method.build(model, context.side)

        model, method = trained(folder, stages, build, *settings)
        state = method.state()
        return {**model.state_dict(), **({"queue": state["queue"]} if kind == "moco" else state["classifier"])}

    whole, parts = (
        result_of(tmp_path / "whole", [Pretext]),
        result_of(tmp_path / "parts", [InterruptedPretext, Pretext]),
    )
    assert whole.keys() == parts.keys()
    assert all(value.equal(parts[name]) for name, value in whole.items())


def test_a_run_with_moco_learns_the_digits(tmp_path: Path) -> None:
    """Neighbours after some epochs are better than those of the random network."""
    words = ["model.width=0.5", "data.limit=600", "pretext.epochs=12", "pretext.batch_size=64", "pretext.method=moco"]
    words += [VIEW, "pretext.method.momentum=0.9", "pretext.method.temperature=0.15", "mining.k=5"]
    purity = []
    for name, changes in (("random", ["pretext.optimizer.lr=1e-9"]), ("learned", [])):
        with opened(tmp_path / name, *words, *changes) as context:
            run_pretext(context, Handover())
            run_mining(context, Handover())
            purity.append(context.run.summary().stages["mining"]["purity"])
    assert purity[1] > purity[0] + 0.1
