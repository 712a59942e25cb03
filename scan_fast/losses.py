"""The losses, as functions, and those with a compiled kernel as modules, too.

:func:`nt_xent`, :func:`scan_loss` and :func:`self_label_loss` have a compiled kernel. All three accept float32,
bfloat16 and float16 inputs with any strides, and float64 with ``impl="reference"``. They work under autocast and in
``torch.compile(fullgraph=True)``, compute in float32 and return float32. A backward pass is computed when autograd asks
for it, so ``retain_graph=True`` works; a double backward raises RuntimeError. Within forward-mode differentiation
(``torch.func.jvp``, ``torch.autograd.forward_ad``) ``impl="auto"`` computes the reference, and ``impl="native"``
raises. The same input gives the same bits.

With several processes a loss of a batch is that of all ranks' rows if it is told so (``gather_distributed=True``):
:class:`NTXentLoss`, :class:`SCANLoss`, :class:`SelfLabelLoss`, :func:`sigreg_loss` and :func:`visreg_loss`. The mean of
the ranks' results, and the gradients that DistributedDataParallel averages, are those of one process with all rows.

``impl`` picks the implementation: ``"native"`` is the compiled kernel, ``"reference"`` the same formula in plain
PyTorch. ``"auto"`` takes the kernel if there is one for the device, and otherwise the reference, with one warning.

:func:`sigreg_loss` and :func:`visreg_loss` are plain PyTorch. A kernel would not pay: on one thread of an AMD EPYC they
take 0.2 and 0.3 % of a small network's training step (``python -m benchmarks.gaussian``).
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops import gaussian as _gaussian
from .ops import nt_xent as _nt_xent
from .ops import scan_loss as _scan_loss
from .ops import self_label as _self_label
from .ops.dispatch import Impl


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float = 0.5,
    *,
    anchors: str = "both",
    queue: Tensor | None = None,
    reduction: str = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Compute NT-Xent, the normalized temperature-scaled cross-entropy of two views.

    Source: SimCLR, https://arxiv.org/abs/2002.05709, equation 1. The 2N x 2N similarity matrix is never stored.

    ``torch.set_float32_matmul_precision("medium")`` allows the kernel to round the operands of its matrix products to
    16 bits, as it allows ``torch.matmul`` to. This is several times as fast on a processor with 16-bit matrix units,
    and gradients have a relative error of about 0.01. On a CPU,
    ``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` has the same effect.

    Args:
        z0: (N, D) embeddings of the first views. They are L2-normalized inside, so their scale does not matter.
        z1: (N, D) embeddings of the second views. Row i belongs to the same image as row i of ``z0``.
        temperature: Positive divisor of the cosine similarities.
        anchors: ``"both"``: the symmetric loss over 2N anchors. ``"first"``: the N rows of ``z0`` only, as in the
            reference implementation of SCAN. The negatives are all other 2N - 2 rows in both cases.
        queue: (Q, D) further negatives of every anchor, such as the keys of earlier batches in MoCo
            (https://arxiv.org/abs/1911.05722), of the dtype and on the device of ``z0``. They are L2-normalized inside
            and get no gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the anchors.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        A float32 scalar. With ``reduction="none"``, (2N,) losses for ``anchors="both"`` and (N,) for ``"first"``.

    Raises:
        ValueError: For a wrong shape, dtype, device, temperature, anchors, queue, reduction or impl.

    Example:
        >>> loss = nt_xent(torch.randn(8, 16), torch.randn(8, 16), temperature=0.1)
    """
    return _nt_xent.nt_xent(z0, z1, temperature, anchors=anchors, queue=queue, reduction=reduction, impl=impl)


class NTXentLoss(nn.Module):
    """Module of :func:`nt_xent`. Call it as ``NTXentLoss(temperature)(z0, z1)``, as other packages' losses.

    Args:
        temperature: Positive divisor of the cosine similarities.
        anchors: ``"both"`` or ``"first"``, see :func:`nt_xent`.
        gather_distributed: Use the rows of all ranks as negatives. Each rank returns the mean over its own anchors.
            DistributedDataParallel averages gradients over ranks, which gives the gradient of the mean over all
            anchors. Has no effect without an initialized process group.
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

    def forward(self, z0: Tensor, z1: Tensor, queue: Tensor | None = None) -> Tensor:
        """Return the mean loss over the anchors of two (N, D) batches, a float32 scalar.

        ``queue`` holds (Q, D) further negatives, see :func:`nt_xent`. With ``gather_distributed`` every rank passes the
        same.
        """
        if self.gather_distributed:
            return _nt_xent.nt_xent_distributed(
                z0, z1, self.temperature, anchors=self.anchors, queue=queue, impl=self.impl
            )
        return nt_xent(z0, z1, self.temperature, anchors=self.anchors, queue=queue, impl=self.impl)

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"temperature={self.temperature}, anchors={self.anchors!r}, gather_distributed={self.gather_distributed}"


def scan_loss(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float = 2.0, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SCAN loss: neighbours get the same cluster, and clusters get the same number of images.

    Source: SCAN, https://arxiv.org/abs/2005.12320, equation 2.

    ``total = consistency - entropy_weight * entropy``. The consistency is the mean of ``-log <p_anchor, p_neighbor>``
    over the batch. The entropy is that of the batch's mean anchor prediction; it is at most ``log C``, and the total is
    usually negative. The consistency is computed in log space, so there is a gradient if confident predictions
    disagree. That of the reference implementation, a binary cross-entropy, vanishes for similarities below 1e-12.

    Args:
        anchors: (B, C) logits of the anchors, or (H, B, C) for H heads.
        neighbors: Logits of the same shape. Row i belongs to a neighbour of anchor i.
        entropy_weight: Weight of the entropy term. The default, 2.0, is that of ``SCANLoss`` in the reference
            implementation, so that code can be moved over unchanged. All configurations of the reference
            implementation and of this package set 5.0. With a small weight, all images can end in one cluster, which
            minimizes the consistency term alone. A large one evens out the cluster sizes, whatever the images.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``(total, consistency, entropy)``, float32: scalars for (B, C), each (H,) for (H, B, C).

    Raises:
        ValueError: For a wrong shape, dtype, device, entropy_weight or impl, or an empty batch.

    Example:
        >>> total, consistency, entropy = scan_loss(torch.randn(8, 10), torch.randn(8, 10), entropy_weight=5.0)
    """
    return _scan_loss.scan_loss(anchors, neighbors, entropy_weight, impl=impl)


class SCANLoss(nn.Module):
    """Module of :func:`scan_loss`.

    Args:
        entropy_weight: Weight of the entropy term. Set 5.0 to train as the configurations do; see :func:`scan_loss`.
        gather_distributed: Take the entropy of the mean prediction over the rows of all ranks, each of which must have
            as many rows as the others. The consistency is that of this rank's rows. So the mean over the ranks of each
            of the three results is that of the whole batch. DistributedDataParallel averages gradients over ranks,
            which gives the gradient of the whole batch if every rank minimizes the same function of the results. Only
            the mean predictions are sent, C numbers per head. Has no effect without an initialized process group.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.
    """

    def __init__(self, entropy_weight: float = 2.0, *, gather_distributed: bool = False, impl: Impl = "auto") -> None:
        super().__init__()
        self.entropy_weight = entropy_weight
        self.gather_distributed = gather_distributed
        self.impl: Impl = impl

    def forward(self, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (total, consistency, entropy) of logits (B, C) or (H, B, C), see :func:`scan_loss`."""
        if self.gather_distributed:
            return _scan_loss.scan_loss_distributed(anchors, neighbors, self.entropy_weight, impl=self.impl)
        return scan_loss(anchors, neighbors, self.entropy_weight, impl=self.impl)

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"entropy_weight={self.entropy_weight}, gather_distributed={self.gather_distributed}"


def self_label_loss(
    weak: Tensor, strong: Tensor, threshold: float = 0.99, *, balance: bool = True, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute the self-labelling loss: cross-entropy of confident images with their own predictions as labels.

    Source: SCAN, https://arxiv.org/abs/2005.12320, section 2.3.

    Args:
        weak: (B, C) logits of the weakly augmented images. Their largest entry is the label. They get no gradient.
        strong: (B, C) logits of the strongly augmented images.
        threshold: An image is confident if its largest weak probability is strictly above this.
        balance: Give each class that occurs among the confident images the same total weight.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``(loss, n_confident)``. The loss is a float32 scalar, zero (with zero gradient) if no image is confident. The
        count is an int64 scalar on the device of the logits, so that the call does not wait for a GPU.

    Raises:
        ValueError: For a wrong shape, dtype, device, threshold or impl, or an empty batch.

    Example:
        >>> loss, n_confident = self_label_loss(10 * torch.randn(8, 10), torch.randn(8, 10), threshold=0.9)
    """
    return _self_label.self_label_loss(weak, strong, threshold, balance=balance, impl=impl)


class SelfLabelLoss(nn.Module):
    """Module of :func:`self_label_loss` that returns the loss alone.

    Args:
        threshold: An image is confident if its largest weak probability is strictly above this.
        balance: Give each class that occurs among the confident images the same total weight.
        gather_distributed: Weigh an image by the confident images of all ranks. Each rank returns the number of ranks
            times the part of its own images, so the mean over the ranks is the loss of the whole batch. It is zero on a
            rank without a confident image. DistributedDataParallel averages gradients over ranks, which gives the
            gradient of the whole batch. Only the numbers of confident images are sent, one per class. Has no effect
            without an initialized process group.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.
    """

    def __init__(
        self,
        threshold: float = 0.99,
        balance: bool = True,
        *,
        gather_distributed: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.balance = balance
        self.gather_distributed = gather_distributed
        self.impl: Impl = impl

    def forward(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the loss of (B, C) logits, a float32 scalar; zero if no image is confident."""
        if self.gather_distributed:
            return _self_label.self_label_loss_distributed(
                weak, strong, self.threshold, balance=self.balance, impl=self.impl
            )[0]
        return self_label_loss(weak, strong, self.threshold, balance=self.balance, impl=self.impl)[0]

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"threshold={self.threshold}, balance={self.balance}, gather_distributed={self.gather_distributed}"


def sigreg_loss(z: Tensor, directions: Tensor, *, gather_distributed: bool = False) -> Tensor:
    """Compute SIGReg, the distance of a batch of embeddings from the standard normal distribution.

    Source: LeJEPA, https://arxiv.org/abs/2511.08544. On each direction, the characteristic function phi of the batch's
    projections is compared with that of the normal distribution: the integral of exp(-t^2 / 2) |phi(t) - exp(-t^2 /
    2)|^2 over t (Epps and Pulley, 1983), as a sum over 10 points from -3 to 3. The factor B of the statistical test is
    left out, so the size of the batch does not matter. Time and memory are linear in the batch.

    Take other random directions in every step. The term alone learns nothing: add a distance between the views of an
    image, as ``pretext.method=sigreg`` does.

    Args:
        z: (B, D) embeddings, float32, bfloat16, float16 or float64, not normalised. They are projected in float32, or
            in float64 if they are float64.
        directions: (K, D) directions. They are L2-normalized inside, so their length does not matter, and get no
            gradient.
        gather_distributed: Compare the rows of all ranks, of which there may be more on some. The directions of rank 0
            are used, and every rank returns the same. The gradient of a rank's rows is that of the sum of all ranks'
            results, so DistributedDataParallel, which averages over ranks, gives the gradient of the whole batch. Has
            no effect without an initialized process group.

    Returns:
        The mean over the directions, a float32 scalar, float64 for float64; near 0 for a standard normal distribution.
        One NaN in ``z`` makes it NaN.

    Raises:
        ValueError: For a wrong shape, dtype or device, for fewer than two rows, and if ranks differ in D, K or dtype.

    Example:
        >>> loss = sigreg_loss(torch.randn(64, 16), torch.randn(256, 16))
    """
    return _gaussian.sigreg(z, directions, gather_distributed=gather_distributed)


def visreg_loss(z: Tensor, directions: Tensor, *, gather_distributed: bool = False) -> Tensor:
    """Compute VISReg, the distance of a batch of embeddings from the standard normal distribution.

    Source: Wu, Balestriero and Levine, https://arxiv.org/abs/2606.02572. It is the sum of three mean squared
    differences: of the mean from 0, of the standard deviation from 1, and, with both taken out, of the sorted
    projections on each direction from the quantiles of the normal distribution.

    The gradient of the third leaves the scale alone, so after a collapse the second spreads the embeddings again. (The
    authors' code holds the scale constant in the gradient. The finite sample's third term then shrinks the embeddings,
    and outweighs the second near a collapse.)

    Take other random directions in every step, and add a distance between the views of an image, as
    ``pretext.method=visreg`` does.

    Args:
        z: (B, D) embeddings, float32, bfloat16, float16 or float64, not normalised. They are projected in float32, or
            in float64 if they are float64.
        directions: (K, D) directions. They are L2-normalized inside, so their length does not matter, and get no
            gradient.
        gather_distributed: Compare the rows of all ranks, of which there may be more on some. The rows are sent to
            every rank, and each sorts the projections on its share of the directions, which are those of rank 0. Every
            rank returns the same. The gradient is as in :func:`sigreg_loss`. Has no effect without an initialized
            process group.

    Returns:
        A float32 scalar, float64 for float64; near 0 for a standard normal distribution. One NaN in ``z`` makes it NaN.

    Raises:
        ValueError: For a wrong shape, dtype or device, for fewer than two rows, and if ranks differ in D, K or dtype.

    Example:
        >>> loss = visreg_loss(torch.randn(64, 16), torch.randn(256, 16))
    """
    return _gaussian.visreg(z, directions, gather_distributed=gather_distributed)
