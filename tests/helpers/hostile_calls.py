"""Calls of the operators with arguments that once crashed the process, read foreign memory or were silently wrong.

``python tests/helpers/hostile_calls.py NAME`` makes one of them, to see in a process of its own what it does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import operator_cases
import torch
from operator_cases import Arguments, Draw

from scan_fast.ops import native
from scan_fast.ops.augment import Operation

LEAST, MOST = -(2**63), 2**63 - 1
NAN = float("nan")


def changed(name: str, seed: int = 1, **changes: Any) -> Callable[[], object]:
    """Return a call of an operator with some valid arguments replaced; a function gets all of them."""

    def call() -> object:
        arguments = operator_cases.CASES[name].make(Draw(seed))
        for key, value in changes.items():
            assert key in arguments
            arguments[key] = value(arguments) if callable(value) else value
        return operator_cases.call(name, arguments)

    return call


def view_with(operation: Operation, *numbers: float) -> Callable[[], object]:
    """Return a call that renders 64 pixels by 64 with one operation."""
    row = [0, 0, 8, 8, 0, 0, 0, 0, 0, int(operation), *torch.tensor(numbers).view(torch.int32).tolist()]
    row += [0] * (16 - len(row))
    recipes = torch.tensor([row], dtype=torch.int32)
    images = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    three = [1.0, 1.0, 1.0]
    return lambda: torch.ops.scan_fast.augment(images, None, recipes, 64, three, three, torch.float32)


def shrunk(name: str) -> Callable[[Arguments], torch.Tensor]:
    """Return a function that takes an argument's memory away, but for a few bytes."""

    def change(arguments: Arguments) -> torch.Tensor:
        tensor: torch.Tensor = arguments[name].clone(memory_format=torch.preserve_format)
        tensor.untyped_storage().resize_(4)
        return tensor

    return change


def cut(name: str, rows: int = 1) -> Callable[[Arguments], torch.Tensor]:
    return lambda arguments: arguments[name][:rows].clone()


def filled(name: str, value: int) -> Callable[[Arguments], torch.Tensor]:
    return lambda arguments: torch.full_like(arguments[name], value)


def gemm(a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...], layout: str = "nn") -> Callable[[], object]:
    left, right, result = torch.zeros(a), torch.zeros(b), torch.zeros(c)

    def call() -> None:
        native._C.gemm(left, right, result, layout, 1.0, 0.0)

    return call


def wide_targets(value: int) -> Callable[[], object]:
    """Return a call with 200 classes, whose backward pass on a CPU writes at the place of the target."""
    strong = torch.zeros(4, 200)
    target = torch.full((4,), value, dtype=torch.int32)
    one = torch.ones(())
    return lambda: torch.ops.scan_fast.self_label_backward(one, strong, target, torch.ones(4), torch.ones(4, 2))


def neighbors(rows: int, dim: int, **options: Any) -> Callable[[], object]:
    x = torch.randn(rows, dim, dtype=options.get("dtype"))
    return lambda: torch.ops.scan_fast.topk_neighbors(x, x, options.get("k", 1), True, False)


def small_image(name: str, *others: Any) -> Callable[[], object]:
    """Return a call with an image of one pixel and a kernel of two, which does not fit."""
    x = operator_cases.images(torch.zeros(1, 32, 1, 1, dtype=torch.bfloat16))
    weight = operator_cases.images(torch.zeros(32, 32, 2, 2))
    return lambda: operator_cases.operator_of(name)(x, weight, *others)


def shared_statistics() -> object:
    arguments = operator_cases.CASES["batch_norm_forward"].make(Draw(3))
    arguments["running_var"] = arguments["running_mean"]
    arguments["training"] = True
    return operator_cases.call("batch_norm_forward", arguments)


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    # augment
    "bilinear nan": (view_with(Operation.BILINEAR, 1, NAN, 0, 0, 1, 0), "image 0 has the bilinear coefficient nan"),
    "bilinear cancels": (view_with(Operation.BILINEAR, 3e38, -3e38, 0, 0, 1, 0), "bilinear coefficient 3e\\+38"),
    "brightness nan": (view_with(Operation.BRIGHTNESS, NAN), "factor nan, which must be finite"),
    "contrast inf": (view_with(Operation.CONTRAST, float("inf")), "factor inf, which must be finite"),
    "saturation nan": (view_with(Operation.SATURATION, NAN), "factor nan, which must be finite"),
    "sharpness nan": (view_with(Operation.SHARPNESS, NAN), "factor nan, which must be finite"),
    "hue nan": (view_with(Operation.HUE, NAN), "shifts the hue by nan"),
    "hue far": (view_with(Operation.HUE, 1e9), "shifts the hue by 1e\\+09"),
    "solarize nan": (view_with(Operation.SOLARIZE, NAN), "threshold NaN"),
    "posterize nan": (view_with(Operation.POSTERIZE, NAN), "0 to 8 are possible"),
    "scale nan": (changed("augment", scale=[NAN, 1.0, 1.0]), "scale must be a finite number"),
    "shift beyond float32": (changed("augment", shift=[0.0, 1e300, 0.0]), "shift must be a finite number"),
    "images without memory": (changed("augment", images=shrunk("images")), "images must lie within its storage"),
    "recipes without memory": (changed("augment", recipes=shrunk("recipes")), "recipes must lie within its storage"),
    # batch normalisation
    "one tensor for both statistics": (shared_statistics, "running_mean is updated in place and must not share"),
    "short mask": (
        changed("batch_norm_backward", seed=4, mask=cut("mask"), relu=True, with_residual=True),
        "mask must be",
    ),
    "x without memory": (changed("batch_norm_backward", x=shrunk("x")), "x must lie within its storage"),
    "eps nan": (changed("batch_norm_forward", eps=NAN), "eps must not be negative, got nan"),
    "momentum inf": (changed("batch_norm", momentum=float("inf")), "momentum must be a finite number"),
    # convolution
    "kernel larger than the image": (small_image("conv2d_forward", 2, 0), "must not be larger than the padded image"),
    "huge padding": (changed("conv2d_grad_weight_float32", padding=2**62), "both at most 4096"),
    "huge stride": (changed("conv2d_forward", stride=MOST), "both at most 4096"),
    "huge kernel": (changed("conv2d_grad_weight_float32", kernel=2**31), "kernel must be at most 4096"),
    "huge sizes": (changed("conv2d_is_usable", x=[1, 32, MOST, 4]), "sizes must be from 0"),
    "negative sizes": (changed("conv2d_grad_input", sizes=[-1, 32, 4, 4]), "sizes must be from 0"),
    "weight without memory": (changed("conv2d_forward", weight=shrunk("weight")), "weight must lie within its storage"),
    # neighbours
    "no columns": (neighbors(4, 0), "D from 1 on"),
    "no columns, many rows": (neighbors(300, 0, k=3), "D from 1 on"),
    "complex": (neighbors(9, 3, dtype=torch.complex64), "float32, bfloat16 or float16, got ComplexFloat"),
    "least k": (changed("topk_neighbors", k=LEAST), "k must be from 1"),
    "queries without memory": (changed("topk_neighbors", queries=shrunk("queries")), "queries must lie within"),
    # NT-Xent
    "samples overflow": (changed("nt_xent_forward", sample_begin=1, sample_count=MOST), "must be a part of the"),
    "samples overflow, backward": (
        changed("nt_xent_backward", sample_begin=MOST, sample_count=1),
        "must be a part of the",
    ),
    "short inv_norm": (changed("nt_xent_backward", inv_norm=cut("inv_norm")), "inv_norm must be"),
    "odd unit": (changed("nt_xent_backward", unit=lambda a: a["unit"][:-1]), "unit must be the"),
    "flat unit": (changed("nt_xent_backward", unit=lambda a: a["unit"].flatten()), "unit must be the"),
    "int losses": (changed("nt_xent_backward", losses=lambda a: a["losses"].int()), "losses must be"),
    "short gradient": (changed("nt_xent_backward", grad_losses=cut("grad_losses")), "grad_losses must be"),
    "int8 gradient": (changed("nt_xent_backward", dtype=torch.int8), "there is no kernel for Char"),
    "temperature inf": (changed("nt_xent_forward", temperature=float("inf")), "temperature must be finite"),
    "temperature 1e-300": (changed("nt_xent_forward", temperature=1e-300), "temperature must be finite"),
    "two dtypes": (changed("nt_xent_forward", z1=lambda a: a["z1"].double()), "must share one device and dtype"),
    # SCAN loss
    "short grad_total": (
        changed("scan_loss_backward", grad_total=torch.zeros(0), grad_entropy=None),
        "grad_total must be",
    ),
    "double row_stats": (
        changed("scan_loss_backward", row_stats=lambda a: a["row_stats"].double()),
        "row_stats must be",
    ),
    "mean_prob without memory": (
        changed("scan_loss_backward", mean_prob=shrunk("mean_prob")),
        "mean_prob must lie within its storage",
    ),
    "entropy_weight nan": (changed("scan_loss_forward", entropy_weight=NAN), "entropy_weight must be a finite number"),
    # self-labelling
    "target past the end": (wide_targets(2**30), "target must be from 0 to 199, got 1073741824"),
    "target negative": (wide_targets(-(2**31)), "target must be from 0 to 199, got -2147483648"),
    "target equals classes": (wide_targets(200), "target must be from 0 to 199, got 200"),
    "threshold nan": (changed("self_label", threshold=NAN), "threshold must be in"),
    "no classes": (lambda: torch.ops.scan_fast.self_label_backward(
        torch.ones(()), torch.zeros(3, 0), torch.zeros(3, dtype=torch.int32), torch.ones(3), torch.ones(3, 2)
    ), "must be .* and not empty"),
    "wide gradient": (changed("self_label_backward", grad_loss=torch.ones(2)), "grad_loss must be 1 floating-point"),
    # the module's own functions
    "product of other shapes": (gemm((4, 8), (5000, 3000), (4, 3000)), "must have shapes of a product nn"),
    "result too small": (gemm((400, 8), (8, 300), (1, 1)), "must have shapes of a product nn"),
    "vectors": (gemm((4,), (4,), (4,)), "a must be a matrix"),
    "unknown layout": (gemm((4, 4), (4, 4), (4, 4), "tt"), "layout must be nn, nt or tn, got tt"),
    "buffer of huge size": (lambda: native._C.empty_large([2**32, 2**32], torch.float32), "overflow"),
    "buffer of negative size": (lambda: native._C.empty_large([-(2**40)], torch.float32), "negative"),
}  # fmt: skip
"""By name: the call, and what its error says."""


if __name__ == "__main__":
    print(CALLS[sys.argv[1]][0]())
