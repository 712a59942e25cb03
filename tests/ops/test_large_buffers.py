"""The memory pool of large CPU results: reused, bounded, and never shared by two live tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scan_fast.ops import native, reference

pytestmark = pytest.mark.skipif(not native.is_available(), reason="needs the compiled module")

CAPACITY = 256 << 20


def _gradients(logits: Tensor) -> tuple[Tensor, Tensor]:
    anchors, neighbors = logits.clone().requires_grad_(), logits.flip(0).requires_grad_()
    loss = torch.ops.scan_fast.scan_loss(anchors, neighbors, 2.0)[0]
    first, second = torch.autograd.grad(loss, (anchors, neighbors))
    return first, second


def test_freed_memory_serves_the_next_call() -> None:
    native._C.release_pooled()
    logits = torch.randn(1024, 512)  # 2 MB per gradient
    addresses = {gradient.data_ptr() for gradient in _gradients(logits)}
    assert native._C.pooled_bytes() >= 4 << 20
    again = _gradients(logits)
    assert {gradient.data_ptr() for gradient in again} == addresses
    assert native._C.pooled_bytes() == 0


def test_live_gradients_are_not_overwritten() -> None:
    inputs = [torch.randn(1024, 300, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    kept = [_gradients(logits) for logits in inputs]
    spans = sorted((g.data_ptr(), g.data_ptr() + g.numel() * 4) for pair in kept for g in pair)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    for logits, (ours, _) in zip(inputs, kept, strict=True):
        exact = logits.double().requires_grad_()
        loss = reference.scan_loss(exact[None], logits.flip(0).double()[None], 2.0)[0].sum()
        (expected,) = torch.autograd.grad(loss, exact)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-9)


def test_the_pool_is_bounded_and_can_be_released() -> None:
    logits = torch.randn(4096, 4096)  # 64 MB per gradient
    kept = [_gradients(logits) for _ in range(3)]
    del kept
    assert 0 < native._C.pooled_bytes() <= CAPACITY
    native._C.release_pooled()
    assert native._C.pooled_bytes() == 0


def test_small_and_empty_results_do_not_touch_the_pool() -> None:
    native._C.release_pooled()
    _gradients(torch.randn(64, 10))
    assert native._C.pooled_bytes() == 0


def test_pooled_tensors_are_ordinary_tensors() -> None:
    shared, resized = _gradients(torch.randn(1024, 512))
    copy = shared.clone()
    shared.share_memory_()
    assert torch.equal(shared, copy)
    copy = resized.clone()
    resized.resize_(2048, 512)
    assert torch.equal(resized[:1024], copy)
