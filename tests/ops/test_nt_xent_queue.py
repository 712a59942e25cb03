"""NT-Xent with a queue of further negatives, against a float64 oracle that is written out as a cross-entropy."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import answers_by_rank
from torch import Tensor

from scan_fast import NTXentLoss, nt_xent
from scan_fast.ops import native
from scan_fast.ops.dispatch import Impl

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IMPLS: list[Impl] = ["reference", "native"] if native.is_available() else ["reference"]
needs_native = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")


def batch(
    n: int, q: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return two correlated views and a queue whose rows have another length."""
    generator = torch.Generator().manual_seed(1000 * n + q)
    z0 = torch.randn(n, d, generator=generator)
    z1 = 0.5 * z0 + 0.5 * torch.randn(n, d, generator=generator)
    queue = 3 * torch.randn(q, d, generator=generator)
    z0, z1, queue = (z.to(device, dtype) for z in (z0, z1, queue))
    return z0.requires_grad_(), z1.requires_grad_(), queue


def oracle(
    z0: Tensor, z1: Tensor, queue: Tensor, temperature: float, anchors: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return losses and the leaves that they depend on, in float64: one cross-entropy per anchor, positive first."""
    leaves = tuple(z.detach().double().cpu().requires_grad_() for z in (z0, z1))
    first, second = (F.normalize(z, dim=1) for z in leaves)
    negatives = F.normalize(queue.double().cpu(), dim=1)
    losses = []
    views = ((first, second), (second, first))
    for ours, theirs in views if anchors == "both" else views[:1]:
        for i in range(len(ours)):
            others = [x for j in range(len(ours)) if j != i for x in (ours[j], theirs[j])]
            columns = torch.stack([theirs[i], *others, *negatives])
            losses.append(F.cross_entropy(columns @ ours[i] / temperature, torch.tensor(0)))
    return torch.stack(losses), leaves


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("anchors", ["both", "first"])
@pytest.mark.parametrize(("n", "q", "d"), [(1, 1, 3), (1, 2, 3), (3, 7, 5), (9, 40, 33), (20, 301, 150)])
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02, 0.004])
def test_a_queue_matches_the_definition(
    device: str, impl: Impl, anchors: str, n: int, q: int, d: int, temperature: float
) -> None:
    z0, z1, queue = batch(n, q, d, device=device)
    expected, leaves = oracle(z0, z1, queue, temperature, anchors)
    losses = nt_xent(z0, z1, temperature, anchors=anchors, queue=queue, reduction="none", impl=impl)
    resolution = max(1.0, 0.1 / temperature)
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=2e-6, atol=3e-6 * resolution)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7)).double()
    found = torch.autograd.grad(losses, (z0, z1), upstream.to(losses))
    for ours, exact in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        scale = max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=0, atol=2e-5 * resolution * scale)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("anchors", ["both", "first"])
@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_a_long_queue_against_the_reference(device: str, anchors: str, temperature: float) -> None:
    """So many rows that the CPU kernel divides them among several tasks for each block of the batch."""
    tensors = batch(150, 40_001, 24, device=device)
    results = []
    impls: list[Impl] = ["native", "reference", "reference"]
    for impl, double in zip(impls, (False, False, True), strict=True):
        z0, z1, queue = (z.detach().to(torch.float64 if double else torch.float32) for z in tensors)
        leaves = (z0.requires_grad_(), z1.requires_grad_())
        losses = nt_xent(*leaves, temperature, anchors=anchors, queue=queue, reduction="none", impl=impl)
        upstream = torch.linspace(-1, 2, len(losses), device=device).to(losses)
        results.append([losses, *torch.autograd.grad(losses, leaves, upstream)])
    for ours, plain, exact in zip(*results, strict=True):
        error, plain_error = ((x.double() - exact).abs().max() for x in (ours, plain))
        assert error <= 2 * plain_error + 1e-6 * exact.abs().max()


@needs_native
@pytest.mark.parametrize("temperature", [1e-8, 1e-4, 0.01, 0.03, 1e4])
@pytest.mark.parametrize("anchors", ["both", "first"])
def test_rows_of_the_queue_get_and_give_nothing_in_the_backward_pass(temperature: float, anchors: str) -> None:
    """Zero upstream gradients contribute exactly nothing, even for rows at the bounds of the similarities."""
    z0, z1, _ = batch(6, 0, 4)
    rows = torch.cat([z0.detach(), -z1.detach(), torch.zeros(2, 4), 1e30 * z0.detach(), 1e-30 * z1.detach()])
    ops, both = torch.ops.scan_fast, anchors == "both"
    first, second = rows.chunk(2)
    all0, all1 = torch.cat([z0.detach(), first]), torch.cat([z1.detach(), second])
    losses, lse, unit, inv_norm = ops.nt_xent_forward(all0, all1, temperature, both, 0, len(all0))
    per_view = torch.linspace(-1, 1, 6)
    upstream = F.pad(per_view, (0, len(first))).repeat(2 if both else 1)
    mask = upstream != 0
    results = []
    for stand_in in (losses, losses * mask):  # the true losses of the queue's anchors, and zeros
        values = lse if stand_in is losses else lse * mask
        saved = (stand_in, values, unit, inv_norm)
        results.append(ops.nt_xent_backward(upstream, *saved, temperature, both, 0, 6, torch.float32))
    for true, zeros in zip(*results, strict=True):
        assert torch.equal(true, zeros)
        assert true.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_queue_gets_no_gradient_and_an_empty_one_changes_nothing(impl: Impl) -> None:
    z0, z1, queue = batch(5, 6, 4)
    queue.requires_grad_()
    nt_xent(z0, z1, queue=queue, impl=impl).backward()
    assert queue.grad is None
    plain = nt_xent(z0, z1, impl=impl)
    assert torch.equal(nt_xent(z0, z1, queue=queue[:0], impl=impl), plain)
    assert nt_xent(z0, z1, queue=queue, impl=impl) > plain
    losses = nt_xent(z0, z1, queue=queue, reduction="none", impl=impl)
    for q in (queue, queue[:5]):
        losses = nt_xent(z0, z1, queue=q, reduction="none", impl=impl)
        torch.testing.assert_close(nt_xent(z0, z1, queue=q, reduction="sum", impl=impl), losses.sum())
        torch.testing.assert_close(nt_xent(z0, z1, queue=q, impl=impl), losses.mean())
        torch.testing.assert_close(NTXentLoss(0.5, impl=impl)(z0, z1, q), losses.mean())
        torch.testing.assert_close(NTXentLoss(0.5, impl=impl, gather_distributed=True)(z0, z1, queue=q), losses.mean())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("q", [12, 13])
def test_a_queue_with_other_strides_dtypes_and_autocast(device: str, impl: Impl, q: int) -> None:
    z0, z1, queue = batch(5, q, 4, device=device)
    expected = nt_xent(z0, z1, 0.2, queue=queue, impl=impl)
    grads = torch.autograd.grad(expected, (z0, z1))
    for strided in (queue.T.contiguous().T, torch.stack([queue, queue], dim=2)[..., 0]):
        assert not strided.is_contiguous()
        found = nt_xent(z0, z1, 0.2, queue=strided, impl=impl)
        torch.testing.assert_close(found, expected)
        for ours, exact in zip(torch.autograd.grad(found, (z0, z1)), grads, strict=True):
            torch.testing.assert_close(ours, exact)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(nt_xent(z0, z1, 0.2, queue=queue, impl=impl), expected, rtol=0, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        r0, r1, rounded = (z.detach().to(dtype) for z in (z0, z1, queue))
        expected = oracle(r0, r1, rounded, 0.2, "both")[0].mean()
        leaves = (r0.requires_grad_(), r1.requires_grad_())
        found = nt_xent(*leaves, 0.2, queue=rounded, impl=impl)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=1e-3 if device == "cuda" else 1e-6)
        assert all(g.dtype == dtype for g in torch.autograd.grad(found, leaves))


def test_a_float64_queue_goes_through_the_reference() -> None:
    z0, z1, queue = batch(3, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3, queue=queue, reduction="none"), (z0, z1))


@needs_native
@pytest.mark.parametrize("anchors", ["both", "first"])
@pytest.mark.parametrize("q", [16, 15])
def test_a_queue_compiles_without_graph_breaks(anchors: str, q: int) -> None:
    def step(a: Tensor, b: Tensor, queue: Tensor) -> Tensor:
        return nt_xent(2 * a, b, 0.2, anchors=anchors, queue=queue, impl="native") * 3

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (6, 7):
            z0, z1, queue = batch(n, q, 5)
            loss, expected = (f(z0, z1, queue) for f in (compiled, step))
            torch.testing.assert_close(loss, expected)
            grads = (torch.autograd.grad(x, (z0, z1)) for x in (loss, expected))
            for ours, exact in zip(*grads, strict=True):
                torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("queue", "message"),
    [
        ("keys", "queue must be a tensor, got str"),
        (torch.zeros(5), r"queue must have 2 dimensions \(Q, D\), got shape \(5,\)"),
        (torch.zeros(4, 6), r"queue must have 5 columns as z0, got shape \(4, 6\) for z0 of \(3, 5\)"),
        (torch.zeros(4, 5, dtype=torch.int64), "queue must be float32"),
        (
            torch.zeros(4, 5, dtype=torch.bfloat16),
            "z0 and queue must have the same dtype, got torch.float32 and",
        ),
        (torch.zeros(4, 5, device="meta"), "z0 and queue must be on the same device, got cpu and meta"),
    ],
)
def test_wrong_queues_raise(impl: Impl, queue: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.zeros(3, 5), torch.zeros(3, 5), queue=queue, impl=impl)
    with pytest.raises(ValueError, match=message):
        NTXentLoss(gather_distributed=True, impl=impl)(torch.zeros(3, 5), torch.zeros(3, 5), queue)


@needs_native
def test_a_nan_in_the_queue_is_not_hidden() -> None:
    for q, temperature in itertools.product((6, 7), (0.2, 0.01)):
        z0, z1, queue = batch(4, q, 3)
        queue[-1, 1] = torch.nan
        losses = nt_xent(z0, z1, temperature, queue=queue, reduction="none", impl="native")
        assert losses.isnan().all()


@needs_native
def test_a_queue_gives_the_same_bits_for_any_number_of_threads() -> None:
    z0, z1, queue = batch(300, 20_000, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = nt_xent(z0, z1, 0.1, anchors="first", queue=queue, impl="native")
            results.append([loss, *torch.autograd.grad(loss, (z0, z1))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def _rank(rank: int, store_path: str, world: int, n: int, results: Any) -> None:
    """Run one rank: put (rank, loss and gradients per case, the refusal of unequal queues) into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store_path}", rank=rank, world_size=world)
    answers = {}
    for impl, anchors, q in itertools.product(IMPLS, ("both", "first"), (10, 11)):
        *full, queue = batch(world * n, q, 7)
        z0, z1 = (z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in full)
        loss = NTXentLoss(0.2, anchors=anchors, gather_distributed=True, impl=impl)(z0, z1, queue)
        answers[impl, anchors, q] = (loss.item(), *(g.tolist() for g in torch.autograd.grad(loss, (z0, z1))))
    try:
        NTXentLoss(gather_distributed=True)(z0, z1, queue[rank:])
        refusal = "nothing was raised"
    except ValueError as error:
        refusal = str(error)
    results.put((rank, answers, refusal))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_two_processes_with_one_queue(tmp_path: Path) -> None:
    world, n = 2, 5
    by_rank = answers_by_rank(_rank, tmp_path, world, n, seconds=120)
    for impl, anchors, q in itertools.product(IMPLS, ("both", "first"), (10, 11)):
        expected, leaves = oracle(*batch(world * n, q, 7), 0.2, anchors)
        cases = [answers[impl, anchors, q] for _, answers, _ in by_rank]
        assert sum(case[0] for case in cases) / world == pytest.approx(expected.mean().item(), rel=1e-5)
        for view, exact in enumerate(torch.autograd.grad(expected.mean(), leaves)):
            ours = torch.cat([torch.tensor(case[1 + view]) for case in cases]) / world
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    assert all("every rank must pass the same queue, got rows by rank: 11, 10" in refusal for *_, refusal in by_rank)
