"""NT-Xent forward and backward: ``python -m benchmarks.nt_xent [--device cpu|cuda] [--sizes 8192x128 ...]``.

A size is 2N x D: 2N anchors, the rows of both views, of D dimensions. All contenders compute the mean over both views.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import scan_fast
from scan_fast.ops import native, reference

from . import eager, peers
from .ceilings import Work
from .harness import Case, Contender, Family, Tensors, main

TEMPERATURE = 0.1
INF_CL = "Inf-CL (no self mask, TF32)"
MEMEFF = "memeff CLIP loss (no self mask)"
SIGLIP = "siglip-kernel (sigmoid, bfloat16)"
SIGLIP_BIAS = -10.0


def _training_step(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensors]:
    def run(z0: Tensor, z1: Tensor) -> Tensors:
        loss = loss_of(z0, z1)
        return (loss.detach(), *torch.autograd.grad(loss, (z0, z1)))

    return run


def _exact(z0: Tensor, z1: Tensor) -> Tensors:
    """The loss and its gradients in float64, block by block: (2N, 2N) doubles would not always fit."""
    n = z0.shape[0]
    z = torch.cat([z0, z1]).detach().double()
    norm = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    u = z / norm
    rows = torch.arange(2 * n, device=z.device)
    positive = (rows + n) % (2 * n)

    def logits(start: int, stop: int) -> Tensor:
        block = u[start:stop] @ u.T / TEMPERATURE
        return block.masked_fill_(rows[start:stop, None] == rows, -torch.inf)

    blocks = [(start, min(start + 1024, 2 * n)) for start in range(0, 2 * n, 1024)]
    lse = torch.cat([logits(start, stop).logsumexp(dim=1) for start, stop in blocks])
    loss = (lse - (u * u[positive]).sum(dim=1) / TEMPERATURE).mean()
    # dL/du_i = (sum_j (P_ij + P_ji) u_j - 2 u_pos(i)) / (2N tau), where P is the softmax matrix.
    grad_u = torch.empty_like(u)
    for start, stop in blocks:
        block = logits(start, stop)
        weight = (block - lse[start:stop, None]).exp_() + (block - lse).exp_()
        grad_u[start:stop] = (weight @ u - 2 * u[positive[start:stop]]) / (2 * n * TEMPERATURE)
    grad = (grad_u - u * (u * grad_u).sum(dim=1, keepdim=True)) / norm
    return loss, grad[:n], grad[n:]


def _with_self_pairs(z0: Tensor, z1: Tensor) -> Tensors:
    """What Inf-CL's kernels compute for the same rows: the diagonal is not masked."""
    z0, z1 = (z.detach().double().requires_grad_() for z in (z0, z1))
    u = F.normalize(torch.cat([z0, z1]), dim=1)
    n = z0.shape[0]
    positive = (torch.arange(2 * n, device=u.device) + n) % (2 * n)
    loss = F.cross_entropy(u @ u.T / TEMPERATURE, positive)
    return (loss.detach(), *torch.autograd.grad(loss, (z0, z1)))


def _lightly(z0: Tensor, z1: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    loss: Tensor = NTXentLoss(temperature=TEMPERATURE)(z0, z1)
    return loss


def _metric_learning(z0: Tensor, z1: Tensor) -> Tensor:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    loss: Tensor = SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))(z0, z1)
    return loss


def _inf_cl(z0: Tensor, z1: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    u = F.normalize(torch.cat([z0, z1]), dim=1)
    n = z0.shape[0]
    positive = (torch.arange(2 * n, device=u.device) + n) % (2 * n)
    loss: Tensor = cal_flash_loss(u, u, positive, 1 / TEMPERATURE, head_dim=u.shape[1]).mean()
    return loss


def _memeff(z0: Tensor, z1: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    # With the views exchanged as the other tower, its two softmaxes are both ours, but for the diagonal.
    loss: Tensor = MemoryEfficientCLIPLoss(TEMPERATURE, stable=False)(torch.cat([z0, z1]), torch.cat([z1, z0]))
    return loss


def _siglip(z0: Tensor, z1: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    first, second = (F.normalize(torch.cat(pair), dim=1).bfloat16() for pair in ((z0, z1), (z1, z0)))
    log_scale, bias = (torch.tensor(value, device=z0.device) for value in (-math.log(TEMPERATURE), SIGLIP_BIAS))
    loss: Tensor = fused_siglip_loss(first, second, log_scale, bias)
    return loss.float()


def _sigmoid_loss(z0: Tensor, z1: Tensor) -> Tensors:
    """What siglip-kernel computes: each of the (2N)^2 pairs is judged by itself."""
    z0, z1 = (z.detach().double().requires_grad_() for z in (z0, z1))
    first, second = (F.normalize(torch.cat(pair), dim=1) for pair in ((z0, z1), (z1, z0)))
    logits = first @ second.T / TEMPERATURE + SIGLIP_BIAS
    loss = (F.softplus(logits).sum() - logits.diagonal().sum()) / len(first)
    return (loss.detach(), *torch.autograd.grad(loss, (z0, z1)))


def work(rows: int, dim: int, device: str, unit: str) -> Work:
    """Return the unavoidable work of forward and backward without storing the similarities.

    Similarities are symmetric: formed once in the forward pass (M^2 D flops) and once in the backward pass (M^2 D on
    the CPU, where both halves of a tile pair are added at once; 2 M^2 D on CUDA, where a block owns its rows), and the
    product with the embeddings is 2 M^2 D. Exponentials likewise.
    """
    square = float(rows) * rows
    cuda = device == "cuda"
    return Work(
        flops=(5 if cuda else 4) * square * dim,
        exponentials=(1.5 if cuda else 1) * square,
        bytes=(4 + 2 + 2 + 4.0) * rows * dim,
        unit=unit,
    )


def _metric_learning_skip(rows: int, device: str) -> str:
    reason = peers.missing("pytorch_metric_learning")
    # Every positive pair meets every negative pair: (2N)^3 floats, several times over.
    need = 6 * 4 * rows**3
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else 2 << 30
    return reason or ("" if need < room else f"needs about {need / 2**30:.0f} GiB at this size")


def _eager(z0: Tensor, z1: Tensor) -> Tensor:
    return eager.nt_xent(z0, z1, TEMPERATURE)


def _eager_autocast(z0: Tensor, z1: Tensor) -> Tensor:
    with torch.autocast(z0.device.type, dtype=torch.bfloat16):
        return eager.nt_xent(z0, z1, TEMPERATURE)


def _ours(z0: Tensor, z1: Tensor) -> Tensor:
    return scan_fast.nt_xent(z0, z1, TEMPERATURE, impl="native")


def _reference(z0: Tensor, z1: Tensor) -> Tensor:
    return reference.nt_xent(z0, z1, TEMPERATURE, both_anchors=True).mean()


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``8192x128``."""
    rows, dim = (int(part) for part in size.split("x"))
    if rows % 2:
        raise ValueError(f"a size is 2N x D with an even 2N, got {size!r}")

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        z0 = torch.randn(rows // 2, dim, generator=generator)
        z1 = z0 + torch.randn(rows // 2, dim, generator=generator)
        return tuple(z.to(device).requires_grad_() for z in (z0, z1))

    no_kernel = peers.no_kernel("nt_xent_forward", device)
    cuda = device == "cuda"
    reduced_unit = "gemm_float16" if cuda else "gemm_bfloat16"
    full = work(rows, dim, device, "gemm_float32")
    if cuda:
        # float32 accuracy from 16-bit units: three products for one.
        exact16 = work(rows, dim, device, reduced_unit)
        full = Work(3 * exact16.flops, exact16.bytes, exact16.exponentials, reduced_unit)
    reduced = work(rows, dim, device, reduced_unit)
    no_reduced = no_kernel or ("" if cuda or _cpu_has_bf16() else "the processor has no fast bfloat16 products")
    room = torch.cuda.get_device_properties(0).total_memory if cuda else 12 << 30
    too_large = "" if 24 * rows * rows < room else "the matrix of logits would not fit"
    contenders = [
        Contender("scan-fast", _training_step(_ours), 1e-4, full, skipped=no_kernel),
        Contender("scan-fast 16-bit", _training_step(_ours), 2e-2, reduced, "medium", skipped=no_reduced),
        Contender("eager", _training_step(_eager), 1e-4, skipped=too_large),
        Contender("eager autocast bfloat16", _training_step(_eager_autocast), 5e-2, skipped=too_large),
        Contender("torch.compile", _training_step(peers.compiled(_eager)), 1e-4, compiles=True, skipped=too_large),
        Contender("lightly", _training_step(_lightly), 1e-4, skipped=too_large or peers.missing("lightly")),
        Contender(
            "pytorch-metric-learning",
            _training_step(_metric_learning),
            1e-4,
            capturable=False,
            skipped=_metric_learning_skip(rows, device),
        ),
    ]
    if cuda:
        contenders.insert(3, Contender("eager TF32", _training_step(_eager), 5e-2, precision="high", skipped=too_large))
        for name, loss, package, exact in (
            (INF_CL, _inf_cl, "inf_cl", _with_self_pairs),
            (MEMEFF, _memeff, "memeff", _with_self_pairs),
            (SIGLIP, _siglip, "siglip_kernel", _sigmoid_loss),
        ):
            skipped = too_large or peers.missing(package)
            contenders.append(Contender(name, _training_step(loss), 5e-2, reference=exact, skipped=skipped))
    return Case(size, inputs, _exact, contenders)


def _cpu_has_bf16() -> bool:
    return bool(native.build_info().get("cpu_gemm_bf16"))


FAMILY = Family(
    name="nt_xent",
    title="NT-Xent forward and backward, float32",
    case=case,
    sizes={
        "cpu": ("256x128", "1024x128", "4096x128", "8192x128"),
        "cuda": ("1024x128", "8192x128", "65536x128", "8192x512"),
    },
    quick_sizes=("128x64", "256x128"),
    memory_sizes={"cpu": ("8192x128",), "cuda": ("8192x128", "65536x128")},
)

if __name__ == "__main__":
    main(FAMILY)
