"""The losses over several ranks, against one process with all rows in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_checks import Checks, join, leave, mean_over_ranks, own_rows
from ranks import answers_by_rank
from torch import Tensor

from scan_fast import SCANLoss, SelfLabelLoss, scan_loss, self_label_loss
from scan_fast.ops import native, reference
from scan_fast.ops.dispatch import Impl
from scan_fast.ops.self_label import self_label_loss_distributed
from scan_fast.stages.confidence import per_class

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo"),
    pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built"),
]

WAYS: tuple[tuple[Impl, torch.dtype, float], ...] = (
    ("native", torch.float32, 1e-5),
    ("reference", torch.float32, 1e-5),
    ("reference", torch.float64, 1e-12),
    ("native", torch.bfloat16, 2**-7),
)
"""Implementation, dtype, and tolerance relative to the largest number."""
SHAPES = ((7, 5), (1, 2), (65, 10), (9, 1000), (3, 9, 33), (2, 1, 4), (4, 40, 12))
"""Logits of one rank."""
UPSTREAM = ((1.0, 0.0, 0.0), (0.7, -0.3, 1.1))
"""Weights of total, consistency and entropy in what is differentiated."""


def logits(shape: tuple[int, ...], world: int, seed: int, scale: float = 3.0) -> Tensor:
    """Return (..., world * n, C) float64 that every dtype holds exactly."""
    *heads, rows, classes = shape
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(*heads, world * rows, classes, generator=generator)
    return rounded(values)


def rounded(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).double()


def rounding(dtype: torch.dtype, rows: int) -> float:
    """Return the absolute error of a gradient: of a probability near 1 little is left, and float32 has rounded it."""
    return 0.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps / max(rows, 1)


def scan_cases(world: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield random logits, and some of which each rank sees other classes alone."""
    for number, shape in enumerate(SHAPES):
        yield str(shape), logits(shape, world, 2 * number), logits(shape, world, 2 * number + 1)
    parted = logits((6, 5), world, 50)
    parted[torch.arange(len(parted)), torch.arange(len(parted)) // 6 % 5] += 60.0
    parted = rounded(parted)
    yield "classes of one rank alone", parted, parted.roll(1, 0)


def check_scan(checks: Checks, rank: int, world: int) -> None:
    for name, anchors, neighbors in scan_cases(world):
        for upstream in UPSTREAM:
            exact = [x.clone().requires_grad_() for x in (anchors, neighbors)]
            results = scan_loss(exact[0], exact[1], 5.0, impl="reference")
            torch.stack([w * x.sum() for w, x in zip(upstream, results, strict=True)]).sum().backward()
            for impl, dtype, rtol in WAYS:
                own = [own_rows(x, rank, world, -2).to(dtype).requires_grad_() for x in (anchors, neighbors)]
                found = SCANLoss(5.0, gather_distributed=True, impl=impl)(*own)
                torch.stack([w * x.sum() for w, x in zip(upstream, found, strict=True)]).sum().backward()
                case = f"scan {name} {upstream} {impl} {dtype}"
                values = mean_over_ranks(torch.stack([x.detach().double() for x in found]))
                for part, value, expected in zip(("total", "consistency", "entropy"), values, results, strict=True):
                    checks.close(f"{case} {part}", value, expected, min(rtol, 1e-5))
                for part, x, whole in zip(("anchors", "neighbors"), own, exact, strict=True):
                    assert x.grad is not None and whole.grad is not None
                    checks.true(f"{case} dtype", x.grad.dtype == dtype)
                    # DistributedDataParallel divides by the number of ranks.
                    expected_rows, atol = own_rows(whole.grad, rank, world, -2), rounding(dtype, anchors.shape[-2])
                    checks.close(f"{case} {part}", x.grad / world, expected_rows, rtol, atol)


def check_scan_calls(checks: Checks, rank: int, world: int) -> None:
    """Check other ways to call: a rank without the kernel, no gradient, one gradient, two backward passes, errors."""
    anchors, neighbors = logits((3, 20, 7), world, 90), logits((3, 20, 7), world, 91)
    expected = scan_loss(anchors, neighbors, 2.0, impl="reference")
    own = [own_rows(x, rank, world, -2).float() for x in (anchors, neighbors)]
    first = own[0].clone().requires_grad_()
    mixed: tuple[Impl, Impl] = ("native", "reference")
    loss = SCANLoss(gather_distributed=True, impl=mixed[rank % 2])
    total = loss(first, own[1])[0]
    checks.close("mixed implementations", mean_over_ranks(total), expected[0], 1e-5)
    (once,) = torch.autograd.grad(total.sum(), first, retain_graph=True)
    checks.true("a second backward pass", once.equal(torch.autograd.grad(total.sum(), first)[0]))
    checks.true("the value without a gradient", loss(*own)[0].equal(total))
    native_loss = SCANLoss(gather_distributed=True, impl="native")
    (gradient,) = torch.autograd.grad(native_loss(first, own[1])[0].sum(), first, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    with pytest.raises(ValueError, match=r"neighbors must have the shape of anchors"):
        native_loss(own[0], own[1][:, 1:])
    with pytest.raises(ValueError, match=r"entropy_weight must be a finite number, got inf"):
        SCANLoss(float("inf"), gather_distributed=True)(*own)


def label_cases(world: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield weak and strong logits; in half of the random rows one class is sure."""
    for number, (rows, classes) in enumerate(((7, 10), (1, 2), (130, 33), (9, 1000), (40, 3))):
        weak, strong = logits((rows, classes), world, 100 + number, 1.0), logits((rows, classes), world, 200 + number)
        sure = torch.arange(0, world * rows, 2)
        weak[sure, (7 * sure) % classes] += 32.0
        yield f"({rows}, {classes})", rounded(weak), strong
    weak, strong = logits((6, 5), world, 120, 1.0), logits((6, 5), world, 121)
    of_rank = torch.arange(len(weak)) // 6
    parted = weak.clone()
    parted[torch.arange(len(weak)), of_rank % 5] += 32.0
    parted = rounded(parted)
    yield "other classes on each rank", parted, strong
    lacking = parted.clone()
    lacking[of_rank == 0] = 0.0
    endless = strong.clone()
    endless[of_rank == 0] = -torch.inf
    yield "a rank with no confident image", lacking, strong
    yield (
        "infinite logits of images that are not confident",
        lacking,
        torch.where(of_rank[:, None] == 0, endless, strong),
    )
    yield "no confident image", torch.zeros_like(weak), strong


def check_labels(checks: Checks, rank: int, world: int) -> None:
    for name, weak, strong in label_cases(world):
        for balance in (True, False):
            exact = strong.clone().requires_grad_()
            expected, count = reference.self_label_loss(weak, exact, 0.9, balance)
            (whole,) = torch.autograd.grad(expected, exact)
            for impl, dtype, rtol in WAYS:
                if name.startswith("infinite") and impl == "reference":
                    continue  # the value is right; the gradient of such a row is NaN in one process as well
                own_weak, own = own_rows(weak, rank, world).to(dtype), own_rows(strong, rank, world).to(dtype)
                own.requires_grad_()
                loss = SelfLabelLoss(0.9, balance, gather_distributed=True, impl=impl)
                found = loss(own_weak, own)
                (gradient,) = torch.autograd.grad(found, own)
                case = f"labels {name} {balance} {impl} {dtype}"
                given = self_label_loss_distributed(own_weak, own, 0.9, balance=balance, impl=impl)
                checks.true(f"{case} value of the function", given[0].equal(found))
                checks.true(f"{case} count's dtype", given[1].dtype == torch.int64)
                values = mean_over_ranks(torch.stack([x.detach().double() for x in (found, given[1])]))
                checks.close(f"{case} loss", values[0], expected, min(rtol, 1e-5))
                checks.close(f"{case} count", values[1] * world, count, 0)
                # A row of infinite logits has no gradient in float64 either, and must get zero here.
                expected_rows, atol = own_rows(whole, rank, world).nan_to_num(), rounding(dtype, int(count))
                checks.close(case, gradient / world, expected_rows, rtol, atol)
                checks.true(f"{case} dtype", gradient.dtype == dtype)
            if count == 0:
                checks.true(f"{name} is zero", bool(expected == 0) and not bool(gradient.any()))


def check_label_calls(checks: Checks, rank: int, world: int) -> None:
    weak, strong = logits((20, 7), world, 140, 9.0), logits((20, 7), world, 141)
    expected, _ = self_label_loss(weak, strong, 0.9, impl="reference")
    own_weak, own = own_rows(weak, rank, world).float(), own_rows(strong, rank, world).float().requires_grad_()
    mixed: tuple[Impl, Impl] = ("native", "reference")
    loss = SelfLabelLoss(0.9, gather_distributed=True, impl=mixed[rank % 2])
    found = loss(own_weak.requires_grad_(), own)
    checks.close("mixed implementations of labels", mean_over_ranks(found), expected, 1e-5)
    (once,) = torch.autograd.grad(found, own, retain_graph=True)
    checks.true("a second backward pass of labels", once.equal(torch.autograd.grad(found, own, retain_graph=True)[0]))
    found.backward()
    checks.true("weak logits get no gradient", own_weak.grad is None)
    with pytest.raises(ValueError, match="threshold must be in"):
        SelfLabelLoss(1.5, gather_distributed=True)(own_weak, own)


def check_confidence(checks: Checks, rank: int, world: int) -> None:
    """Check the most confident of each class, with ties across ranks, and rows that all ranks have."""
    cases = [logits((rows, classes), world, rows) for rows, classes in ((9, 4), (1, 2), (33, 7))]
    ties = logits((8, 3), world, 7).chunk(world)[0].repeat(world, 1)
    for number, weak in enumerate([*cases, ties, torch.zeros(world * 4, 3, dtype=torch.float64)]):
        for fraction in (0.01, 0.3, 0.5, 1.0):
            # The ranks decide by the same numbers as one process.
            expected = own_rows(per_class_of_one(weak.float(), 0.9, fraction), rank, world)
            found = per_class(own_rows(weak, rank, world).float(), 0.9, fraction)
            checks.true(f"most confident {number} {fraction}", found.equal(expected))


def per_class_of_one(weak: Tensor, threshold: float, fraction: float) -> Tensor:
    """Return what :func:`per_class` does for all rows at once, by a loop over the classes."""
    confidence, target = weak.softmax(dim=1).max(dim=1)
    result = torch.zeros_like(weak)
    for c in range(weak.shape[1]):
        rows = (target == c).nonzero()[:, 0]
        order = rows[confidence[rows].argsort(descending=True, stable=True)]
        number = int((torch.tensor(fraction) * len(rows)).ceil())
        kept = torch.cat([order[:number], rows[confidence[rows] > threshold]])
        result[kept, c] = 100.0
    return result


def one_rank_of_losses(rank: int, store: str, world: int, results: Any) -> None:
    join(rank, store, world)
    checks = Checks()
    for check in (check_scan, check_scan_calls, check_labels, check_label_calls, check_confidence):
        check(checks, rank, world)
    leave(rank, checks, results)


@pytest.mark.parametrize("world", [2, 4])
def test_the_losses_of_ranks_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    for _, differences, done in answers_by_rank(one_rank_of_losses, tmp_path, world, seconds=300):
        assert not differences, "\n".join(differences)
        assert done > 700


def test_without_other_ranks_the_losses_are_the_plain_ones() -> None:
    anchors, neighbors = logits((3, 8, 5), 1, 0).float(), logits((3, 8, 5), 1, 1).float()
    found, expected = SCANLoss(3.0, gather_distributed=True)(anchors, neighbors), scan_loss(anchors, neighbors, 3.0)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    loss = SelfLabelLoss(0.5, False, gather_distributed=True)(anchors[0], neighbors[0])
    assert loss.equal(self_label_loss(anchors[0], neighbors[0], 0.5, balance=False)[0])
    assert repr(SCANLoss()) == "SCANLoss(entropy_weight=2.0, gather_distributed=False)"
    assert repr(SelfLabelLoss()) == "SelfLabelLoss(threshold=0.99, balance=True, gather_distributed=False)"
