"""The kernel families: the one table of their names, operators and CUDA sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The kernels of one operation.

    Attributes:
        name: of the family, and of its folder below csrc/.
        operator: the entry operator below ``torch.ops.scan_fast``, by which a build's kernels are found.
        portable: the CUDA source that every GPU can run, named as in gpu_status.json; None where there is none.
        sm90: the CUDA source for GPUs of compute capability 9.0. It covers some of the problems: the portable one does
            the rest there, so that it has to be right as well.
        reference: what the kernels compute, and what runs instead of them.
    """

    name: str
    operator: str
    portable: str | None
    sm90: str | None
    reference: str

    def source(self, kernels: str) -> str | None:
        """Return the CUDA source of a kernel set, ``"portable"`` or ``"sm90"``."""
        return {"portable": self.portable, "sm90": self.sm90}[kernels]


FAMILIES = {
    family.name: family
    for family in (
        Family("augment", "augment", "augment/augment_cuda", None, "scan_fast.views.TorchRenderer"),
        Family("batch_norm", "batch_norm_forward", "batch_norm/batch_norm_cuda", None, "reference.batch_norm"),
        Family("convolution", "conv2d_forward", None, None, "torch.nn.functional.conv2d"),
        Family(
            "neighbors",
            "topk_neighbors",
            "neighbors/neighbors_cuda",
            "neighbors/neighbors_sm90",
            "reference.topk_neighbors",
        ),
        Family("nt_xent", "nt_xent_forward", "nt_xent/nt_xent_cuda", "nt_xent/nt_xent_sm90", "reference.nt_xent"),
        Family("scan_loss", "scan_loss_forward", "scan_loss/scan_loss_cuda", None, "reference.scan_loss"),
        Family("self_label", "self_label_forward", "self_label/self_label_cuda", None, "reference.self_label_loss"),
    )
}
"""All families by name."""

GPU_FAMILIES = tuple(family for family in FAMILIES.values() if family.portable is not None)
"""The families with CUDA kernels."""

FAMILY_OF = {family.operator: family.name for family in FAMILIES.values()}
"""The name of the family of each entry operator."""
