"""Batch normalisation fused with the residual addition and ReLU of a residual block."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.batch_norm import batch_norm


class BatchNormAct2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with an optional residual addition and ReLU, in one kernel.

    Parameters, buffers and results equal those of separate layers, except for their 16-bit rounding between layers.

    Args:
        channels: C.
        relu: apply ReLU last.
    """

    def __init__(self, channels: int, *, relu: bool = True) -> None:
        super().__init__(channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W), and a residual of that shape and dtype, to (B, C, H, W)."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            residual=residual,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, relu={self.relu}"
