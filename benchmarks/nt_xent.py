"""NT-Xent forward and backward: ``python -m benchmarks.nt_xent [--device cpu|cuda] [--sizes 8192x128 ...]``.

A size is 2N x D: 2N anchors, the rows of both views, of D dimensions. All contenders compute the mean over both views.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import scan_fast
from scan_fast.ops import native, reference

from . import eager, peers
from .ceilings import Work
from .family import Family, Target, main
from .harness import Case, Contender, Tensors, training_step

TEMPERATURE = 0.1
INF_CL = "Inf-CL (no self mask, TF32)"
MEMEFF = "memeff CLIP loss (no self mask)"
SIGLIP = "siglip-kernel (sigmoid, bfloat16)"
SIGLIP_BIAS = -10.0


def exact_losses(z0: Tensor, z1: Tensor, upstream: Tensor, both: bool, rows_per_block: int = 1024) -> Tensors:
    """Return the losses of all anchors and the two gradients in float64, block by block: (2N, 2N) doubles may not fit.

    Args:
        z0, z1: (N, D) float64.
        upstream: (2N,), or (N,) if only the rows of ``z0`` are anchors; the gradient of each anchor's loss.
        both: whether the rows of ``z1`` are anchors, too.
        rows_per_block: anchors handled at a time.
    """
    n, device = len(z0), z0.device
    anchors = 2 * n if both else n
    z, weight = torch.cat([z0, z1]), upstream.double()
    norm = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    u = z / norm
    rows = torch.arange(2 * n, device=device)
    positive = rows.roll(n)[:anchors]
    losses, grad_u = u.new_empty(anchors), torch.zeros_like(u)
    for start in range(0, anchors, rows_per_block):
        block = slice(start, min(start + rows_per_block, anchors))
        logits = (u[block] @ u.T / TEMPERATURE).masked_fill_(rows[block, None] == rows, -torch.inf)
        lse = logits.logsumexp(dim=1, keepdim=True)
        losses[block] = lse[:, 0] - logits.gather(1, positive[block, None])[:, 0]
        share = (logits - lse).exp_() * weight[block, None]
        grad_u[block] += share @ u - weight[block, None] * u[positive[block]]
        grad_u += share.T @ u[block]
    grad_u.index_add_(0, positive, u[:anchors] * weight[:, None], alpha=-1)
    grad_u /= TEMPERATURE
    grad = (grad_u - u * (u * grad_u).sum(dim=1, keepdim=True)) / norm
    return losses, grad[:n], grad[n:]


def _exact(z0: Tensor, z1: Tensor) -> Tensors:
    rows = 2 * len(z0)
    upstream = z0.new_full((rows,), 1 / rows, dtype=torch.float64)
    losses, *grads = exact_losses(z0.detach().double(), z1.detach().double(), upstream, both=True)
    return (losses.mean(), *grads)


def _with_self_pairs(z0: Tensor, z1: Tensor) -> Tensors:
    """Compute what Inf-CL's kernels do for the same rows: the diagonal is not masked."""
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

    # With the views exchanged as the other tower, both its softmaxes equal ours except for the diagonal.
    loss: Tensor = MemoryEfficientCLIPLoss(TEMPERATURE, stable=False)(torch.cat([z0, z1]), torch.cat([z1, z0]))
    return loss


def _siglip(z0: Tensor, z1: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    first, second = (F.normalize(torch.cat(pair), dim=1).bfloat16() for pair in ((z0, z1), (z1, z0)))
    log_scale, bias = (torch.tensor(value, device=z0.device) for value in (-math.log(TEMPERATURE), SIGLIP_BIAS))
    loss: Tensor = fused_siglip_loss(first, second, log_scale, bias)
    return loss.float()


def _sigmoid_loss(z0: Tensor, z1: Tensor) -> Tensors:
    """Compute what siglip-kernel does: each of the (2N)^2 pairs is classified by itself."""
    z0, z1 = (z.detach().double().requires_grad_() for z in (z0, z1))
    first, second = (F.normalize(torch.cat(pair), dim=1) for pair in ((z0, z1), (z1, z0)))
    logits = first @ second.T / TEMPERATURE + SIGLIP_BIAS
    loss = (F.softplus(logits).sum() - logits.diagonal().sum()) / len(first)
    return (loss.detach(), *torch.autograd.grad(loss, (z0, z1)))


def work(rows: int, dim: int, device: str, unit: str) -> Work:
    """Return the unavoidable work of forward and backward without storing the similarities.

    Similarities are symmetric: formed once in the forward pass (M^2 D flops) and once in the backward pass (M^2 D on
    the CPU, where both halves of a tile pair are added at once; 2 M^2 D on CUDA, where a block owns its rows). The
    product with the embeddings is 2 M^2 D. Exponentials are counted alike.
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

    no_kernel = peers.no_kernel("nt_xent", device)
    cuda = device == "cuda"
    reduced_unit = "gemm_float16" if cuda else "gemm_bfloat16"
    full = work(rows, dim, device, "gemm_float32")
    if cuda:
        # float32 accuracy from 16-bit units: three products for one.
        exact16 = work(rows, dim, device, reduced_unit)
        full = Work(3 * exact16.flops, exact16.bytes, exact16.exponentials, reduced_unit)
    reduced = work(rows, dim, device, reduced_unit)
    no_reduced = no_kernel or ("" if cuda or _cpu_has_bf16() else "the CPU has no fast bfloat16 products")
    room = torch.cuda.get_device_properties(0).total_memory if cuda else 12 << 30
    too_large = "" if 24 * rows * rows < room else "the matrix of logits would not fit"
    contenders = [
        Contender("scan-fast", training_step(_ours), 1e-4, full, skipped=no_kernel),
        Contender("scan-fast 16-bit", training_step(_ours), 2e-2, reduced, "medium", skipped=no_reduced),
        Contender("eager", training_step(_eager), 1e-4, skipped=too_large),
        Contender("eager autocast bfloat16", training_step(_eager_autocast), 5e-2, skipped=too_large),
        Contender("torch.compile", training_step(peers.compiled(_eager)), 1e-4, compiles=True, skipped=too_large),
        Contender("lightly", training_step(_lightly), 1e-4, skipped=too_large or peers.missing("lightly")),
        Contender(
            "pytorch-metric-learning",
            training_step(_metric_learning),
            1e-4,
            capturable=False,
            skipped=_metric_learning_skip(rows, device),
        ),
    ]
    if cuda:
        contenders.insert(3, Contender("eager TF32", training_step(_eager), 5e-2, precision="high", skipped=too_large))
        for name, loss, package, exact in (
            (INF_CL, _inf_cl, "inf_cl", _with_self_pairs),
            (MEMEFF, _memeff, "memeff", _with_self_pairs),
            (SIGLIP, _siglip, "siglip_kernel", _sigmoid_loss),
        ):
            skipped = too_large or peers.missing(package)
            contenders.append(Contender(name, training_step(loss), 5e-2, reference=exact, skipped=skipped))
    return Case(size, inputs, _exact, contenders)


def _cpu_has_bf16() -> bool:
    build = native.build_info()
    return bool(build.get("cpu_gemm_bf16") or build.get("cpu_bf16_vectors"))


WITHOUT_AMX = (
    Target("1024x128", times=2.5),
    Target("4096x128", times=6.5),
    Target("8192x128", times=6.5),
    Target("8192x128", megabytes=32.0),
)
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
    suite_sizes=("8192x128", "1024x128", "65536x128", "8192x512"),
    targets={
        "cpu-amx": (
            Target("1024x128", times=2.2),
            Target("4096x128", times=6.0),
            Target("8192x128", times=5.5),
            Target("8192x128", "scan-fast 16-bit", times=12.0),
            Target("8192x128", megabytes=32.0),
        ),
        "cpu-avx512": WITHOUT_AMX,
        "cpu-avx2": WITHOUT_AMX,
        # Of an H200; forward and backward of a small batch are two launches of 4 us each.
        "cuda": (
            Target("1024x128", "scan-fast 16-bit", microseconds=12.0),
            Target("8192x128", "scan-fast 16-bit", share=0.6),
            Target("65536x128", "scan-fast 16-bit", share=0.65),
            Target("8192x128", "scan-fast 16-bit", times=10.0),
            Target("8192x128", "scan-fast 16-bit", "torch.compile", times=3.0),
            Target("8192x128", "scan-fast 16-bit", INF_CL, times=5.0),
        ),
    },
)

if __name__ == "__main__":
    main(FAMILY)
