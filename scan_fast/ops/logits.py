"""Argument checks for losses on two sets of logits."""

from __future__ import annotations

from torch import Tensor


def check_logits(first_name: str, first: Tensor, second_name: str, second: Tensor, dimensions: dict[int, str]) -> None:
    """Raise ValueError unless two tensors are floating-point logits of one shape, dtype and device, and not empty.

    Args:
        first_name: the first argument's name, for the message.
        first: reference for the shape, dtype and device.
        second_name: the second argument's name.
        second: tensor to compare with the first.
        dimensions: allowed numbers of dimensions, with the shape to print for each.
    """
    shape = first.shape
    if len(shape) not in dimensions:
        raise ValueError(f"{first_name} must be logits {' or '.join(dimensions.values())}, got shape {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{first_name} must not be empty, got shape {tuple(shape)}")
    if second.shape != shape:
        raise ValueError(
            f"{second_name} must have the shape of {first_name}, {tuple(shape)}, got {tuple(second.shape)}"
        )
    if second.dtype != first.dtype:
        raise ValueError(f"{second_name} must have the dtype of {first_name}, {first.dtype}, got {second.dtype}")
    if second.device != first.device:
        raise ValueError(f"{second_name} must be on the device of {first_name}, {first.device}, got {second.device}")
    if not first.dtype.is_floating_point:
        raise ValueError(f"{first_name} must be floating-point logits, got {first.dtype}")
