"""The three losses as functions and as modules.

All accept float32, bfloat16 and float16 (float64 through ``impl="reference"``), any strides, autocast and
``torch.compile(fullgraph=True)``; they compute in float32 and return float32.
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops import nt_xent as _nt_xent
from .ops import scan_loss as _scan_loss
from .ops import self_label as _self_label
from .ops.native import Impl


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float = 0.5,
    *,
    anchors: str = "both",
    reduction: str = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy of two views (SimCLR, https://arxiv.org/abs/2002.05709, eq. 1).

    Args:
        z0: (N, D) embeddings of the first views, any scale; they are L2-normalised inside.
        z1: (N, D) embeddings of the second views; row i belongs to the same image as row i of ``z0``.
        temperature: positive divisor of the cosine similarities.
        anchors: ``"both"`` for the symmetric loss over 2N anchors, ``"first"`` for the N rows of ``z0`` only, as the
            original SCAN code trains. The negatives are all other 2N - 2 rows in both cases.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the anchors.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    ``torch.set_float32_matmul_precision("medium")`` lets the kernel round the operands of its matrix products to 16
    bits, as it lets ``torch.matmul``: several times as fast where the processor has such products, with gradients good
    to about a hundredth. On a CPU ``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` does the same.

    Returns:
        A float32 scalar, or (2N,) / (N,) losses for ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, dtype, device, temperature, anchors, reduction or impl.

    Example:
        >>> loss = nt_xent(torch.randn(8, 16), torch.randn(8, 16), temperature=0.1)
    """
    return _nt_xent.nt_xent(z0, z1, temperature, anchors=anchors, reduction=reduction, impl=impl)


class NTXentLoss(nn.Module):
    """The module form of :func:`nt_xent`, call-compatible with the common ``NTXentLoss(temperature)(out0, out1)``.

    Args:
        temperature: positive divisor of the cosine similarities.
        anchors: ``"both"`` or ``"first"``, see :func:`nt_xent`.
        gather_distributed: use the rows of all ranks as negatives. Each rank returns the mean over its own anchors;
            averaging gradients over ranks, as DistributedDataParallel does, then gives the gradient of the mean over
            all anchors. Without an initialised process group it changes nothing.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        anchors: str = "both",
        gather_distributed: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.anchors = anchors
        self.gather_distributed = gather_distributed
        self.impl: Impl = impl

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Return the mean loss over the anchors, a float32 scalar."""
        if self.gather_distributed:
            return _nt_xent.nt_xent_distributed(z0, z1, self.temperature, anchors=self.anchors, impl=self.impl)
        return nt_xent(z0, z1, self.temperature, anchors=self.anchors, impl=self.impl)

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"temperature={self.temperature}, anchors={self.anchors!r}, gather_distributed={self.gather_distributed}"


def scan_loss(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float = 2.0, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The SCAN loss (https://arxiv.org/abs/2005.12320, eq. 2): neighbours agree, clusters spread.

    ``total = consistency - entropy_weight * entropy``, where consistency is the mean of ``-log <p_anchor, p_neighbor>``
    and entropy is that of the mean anchor prediction. The total is usually negative. The consistency is computed in log
    space: it equals the original where that is healthy, and keeps its gradient where confident predictions disagree.

    Args:
        anchors: logits (B, C), or (H, B, C) for H heads.
        neighbors: logits of the same shape, row i for a neighbour of anchor i.
        entropy_weight: weight of the entropy term; the paper's experiments use 5.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        (total, consistency, entropy), float32: scalars for (B, C), each (H,) for (H, B, C).

    Raises:
        ValueError: for a wrong shape, dtype, device, entropy_weight or impl, and for an empty batch.
    """
    return _scan_loss.scan_loss(anchors, neighbors, entropy_weight, impl=impl)


class SCANLoss(nn.Module):
    """The module form of :func:`scan_loss`."""

    def __init__(self, entropy_weight: float = 2.0, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.entropy_weight = entropy_weight
        self.impl: Impl = impl

    def forward(self, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (total, consistency, entropy)."""
        return scan_loss(anchors, neighbors, self.entropy_weight, impl=self.impl)

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"entropy_weight={self.entropy_weight}"


def self_label_loss(
    weak: Tensor, strong: Tensor, threshold: float = 0.99, *, balance: bool = True, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Self-labelling (https://arxiv.org/abs/2005.12320, section 2.3): cross-entropy on confident images.

    Args:
        weak: (B, C) logits of the weakly augmented images, which give the labels; no gradient flows into them.
        strong: (B, C) logits of the strongly augmented images, which learn them.
        threshold: an image is confident where its largest weak probability is strictly above this.
        balance: weigh each class that occurs among the confident images equally.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        (loss, n_confident): a float32 scalar, zero where nothing is confident, and an int64 scalar on the device, so
        that no call waits for the GPU.

    Raises:
        ValueError: for a wrong shape, dtype, device, threshold or impl, and for an empty batch.
    """
    return _self_label.self_label_loss(weak, strong, threshold, balance=balance, impl=impl)


class SelfLabelLoss(nn.Module):
    """The module form of :func:`self_label_loss`; it returns the loss alone."""

    def __init__(self, threshold: float = 0.99, apply_class_balancing: bool = True, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.threshold = threshold
        self.apply_class_balancing = apply_class_balancing
        self.impl: Impl = impl

    def forward(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the loss, a float32 scalar; zero (with a zero gradient) where nothing is confident."""
        return self_label_loss(weak, strong, self.threshold, balance=self.apply_class_balancing, impl=self.impl)[0]

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"threshold={self.threshold}, apply_class_balancing={self.apply_class_balancing}"
