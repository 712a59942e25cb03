"""Valid arguments of every operator in ``torch.ops.scan_fast``, to be spoiled by the tests of hostile arguments.

Tensors are small, drawn from a seed. Backward operators get what their forward operators return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scan_fast.ops import reference
from scan_fast.ops.augment import RECIPE_HEADER, RECIPE_STEP, Operation

Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operator_of(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.scan_fast, name).default


def call(name: str, arguments: Arguments) -> list[Any]:
    """Return the results of an operator as a list."""
    result = operator_of(name)(*arguments.values())
    return list(result) if isinstance(result, tuple | list) else [result]


class Draw:
    """Random numbers of a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=self.generator).to(dtype)

    def bytes(self, *sizes: int) -> Tensor:
        return torch.randint(0, 256, sizes, generator=self.generator).to(torch.uint8)

    def dtype(self) -> torch.dtype:
        return DTYPES[self.integer(0, 2)]

    def flag(self) -> bool:
        return bool(self.integer(0, 1))


def images(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def recipes(draw: Draw, count: int, height: int, width: int, size: int) -> Tensor:
    """Return recipes with every operation somewhere."""
    steps = draw.integer(0, 3)
    rows = torch.zeros(count, RECIPE_HEADER + steps * RECIPE_STEP, dtype=torch.int32)
    for row in rows:
        box = draw.integer(1, height), draw.integer(1, width)
        row[0], row[1] = draw.integer(0, height - box[0]), draw.integer(0, width - box[1])
        row[2], row[3], row[4] = *box, draw.integer(0, 1)
        row[7], row[8] = draw.integer(0, size), draw.integer(0, size)
        for step in range(steps):
            words = row[RECIPE_HEADER + step * RECIPE_STEP :][:RECIPE_STEP]
            words[0] = draw.integer(0, len(Operation) - 1)
            numbers = draw.normal(RECIPE_STEP - 1).abs()
            words[1:] = numbers.view(torch.int32)
    return rows


def augment(draw: Draw) -> Arguments:
    n, height, width, size = (draw.integer(1, most) for most in (5, 20, 20, 20))
    chosen = torch.tensor([draw.integer(0, n - 1) for _ in range(draw.integer(0, 6))])
    indices = chosen.long() if draw.flag() else None
    count = n if indices is None else len(indices)
    dtype = (torch.uint8, torch.float32, torch.bfloat16)[draw.integer(0, 2)]
    return {
        "images": draw.bytes(n, height, width, 3),
        "indices": indices,
        "recipes": recipes(draw, count, height, width, size),
        "size": size,
        "scale": [0.01, 0.02, 0.03],
        "shift": [-0.5, 0.25, -1.5],
        "dtype": dtype,
    }


def batch_norm(draw: Draw) -> Arguments:
    n, channels, height, width = (draw.integer(1, most) for most in (4, 40, 5, 5))
    dtype, training = draw.dtype(), draw.flag() and n * height * width > 1
    return {
        "x": images(draw.normal(n, channels, height, width, dtype=dtype)),
        "residual": images(draw.normal(n, channels, height, width, dtype=dtype)) if draw.flag() else None,
        "weight": draw.normal(channels),
        "bias": draw.normal(channels),
        "running_mean": draw.normal(channels),
        "running_var": draw.normal(channels).abs() + 0.5,
        "training": training,
        "momentum": 0.1,
        "eps": 1e-5,
        "relu": draw.flag(),
    }


def batch_norm_forward(draw: Draw) -> Arguments:
    return {**batch_norm(draw), "keep_mask": draw.flag()}


def batch_norm_backward(draw: Draw) -> Arguments:
    a = {**batch_norm(draw), "keep_mask": True}
    _, mean, inv_std, mask = call("batch_norm_forward", a)
    return {
        "grad_y": images(draw.normal(*a["x"].shape, dtype=a["x"].dtype)),
        **{name: a[name] for name in ("x", "weight", "bias")},
        "mean": mean,
        "inv_std": inv_std,
        "mask": mask,
        "training": a["training"],
        "relu": a["relu"],
        "with_residual": a["residual"] is not None,
    }


def convolution(draw: Draw) -> Arguments:
    kernel = draw.integer(1, 3)
    side, channels, filters = draw.integer(kernel, 6), 32 * draw.integer(1, 2), 32
    return {
        "x": images(draw.normal(draw.integer(1, 34), channels, side, draw.integer(kernel, 6), dtype=torch.bfloat16)),
        "weight": images(draw.normal(filters, channels, kernel, kernel)),
        "stride": draw.integer(1, 2),
        "padding": draw.integer(0, kernel - 1),
    }


def _grad_y(draw: Draw, a: Arguments) -> Tensor:
    y = torch.nn.functional.conv2d(a["x"].float(), a["weight"], stride=a["stride"], padding=a["padding"])
    return images(draw.normal(*y.shape, dtype=a["x"].dtype))


def conv2d_grad_input(draw: Draw) -> Arguments:
    a = convolution(draw)
    addend = images(draw.normal(*a["x"].shape, dtype=torch.bfloat16)) if draw.flag() else None
    sizes = list(a["x"].shape)
    return {"grad_y": _grad_y(draw, a), "weight": a["weight"], "addend": addend, "sizes": sizes, **_steps(a)}


def _steps(a: Arguments) -> Arguments:
    return {"stride": a["stride"], "padding": a["padding"]}


def conv2d_grad_weight(draw: Draw) -> Arguments:
    a = convolution(draw)
    return {"grad_y": _grad_y(draw, a), "x": a["x"], "kernel": a["weight"].shape[2], **_steps(a)}


def conv2d_grad_weight_float32(draw: Draw) -> Arguments:
    a = convolution(draw)
    a["x"], a["weight"] = images(a["x"][:2, : draw.integer(1, 20)].float()), a["weight"][: draw.integer(1, 9)]
    a["weight"] = images(a["weight"][:, : a["x"].shape[1]])
    return {"grad_y": _grad_y(draw, a), "x": a["x"], "kernel": a["weight"].shape[2], **_steps(a)}


def conv2d_is_usable(draw: Draw) -> Arguments:
    a = convolution(draw)
    return {"x": list(a["x"].shape), "weight": list(a["weight"].shape), **_steps(a)}


def topk_neighbors(draw: Draw) -> Arguments:
    n, dim, dtype = draw.integer(1, 150), draw.integer(1, 40), draw.dtype()
    database = draw.normal(n, dim, dtype=dtype)
    queries = database if draw.flag() else draw.normal(draw.integer(0, n), dim, dtype=dtype)
    return {
        "queries": queries,
        "database": database,
        "k": draw.integer(1, min(n, 9)),
        "normalize": draw.flag(),
        "exclude_self": draw.flag(),
    }


def nt_xent_forward(draw: Draw) -> Arguments:
    n, dim, dtype = draw.integer(1, 90), draw.integer(1, 40), draw.dtype()
    begin = draw.integer(0, n - 1)
    return {
        "z0": draw.normal(n, dim, dtype=dtype),
        "z1": draw.normal(n, dim, dtype=dtype),
        "temperature": (0.1, 0.02)[draw.integer(0, 1)],
        "both_anchors": draw.flag(),
        "sample_begin": begin,
        "sample_count": draw.integer(1, n - begin),
    }


def nt_xent_backward(draw: Draw) -> Arguments:
    a = nt_xent_forward(draw)
    whole = {**a, "sample_begin": 0, "sample_count": a["z0"].shape[0]}
    losses, lse, unit, inv_norm = call("nt_xent_forward", whole)
    rest = {name: a[name] for name in ("temperature", "both_anchors", "sample_begin", "sample_count")}
    saved = {"losses": losses, "lse": lse, "unit": unit, "inv_norm": inv_norm}
    return {"grad_losses": draw.normal(len(losses)), **saved, **rest, "dtype": a["z0"].dtype}


def scan_loss(draw: Draw) -> Arguments:
    shape = [draw.integer(1, 60), draw.integer(1, 90)]
    if draw.flag():
        shape.insert(0, draw.integer(1, 3))
    dtype = draw.dtype()
    return {
        "anchors": draw.normal(*shape, dtype=dtype),
        "neighbors": draw.normal(*shape, dtype=dtype),
        "entropy_weight": 2.0,
    }


def scan_loss_backward(draw: Draw) -> Arguments:
    a = scan_loss(draw)
    *results, mean_prob, row_stats = call("scan_loss_forward", a)
    gradients = {
        f"grad_{name}": draw.normal(*result.shape) if draw.flag() else None
        for name, result in zip(("total", "consistency", "entropy"), results, strict=True)
    }
    saved = {"mean_prob": mean_prob, "row_stats": row_stats}
    logits = {name: a[name] for name in ("anchors", "neighbors")}
    return {**gradients, **logits, **saved, "entropy_weight": 2.0}


def self_label(draw: Draw) -> Arguments:
    shape, dtype = (draw.integer(1, 60), draw.integer(1, 90)), draw.dtype()
    return {
        "weak": 4 * draw.normal(*shape, dtype=dtype),
        "strong": draw.normal(*shape, dtype=dtype),
        "threshold": 0.3,
        "balance": draw.flag(),
    }


def self_label_backward(draw: Draw) -> Arguments:
    a = self_label(draw)
    _, _, target, row_weight, row_stats = call("self_label_forward", a)
    saved = {"target": target, "row_weight": row_weight, "row_stats": row_stats}
    return {"grad_loss": draw.normal(), "strong": a["strong"], **saved}


# ---- what plain PyTorch computes: the first results of the operators, as far as they have a meaning of their own ----


def batch_norm_reference(a: Arguments) -> list[Tensor]:
    moved = [a["running_mean"].clone(), a["running_var"].clone()]
    y = reference.batch_norm(
        a["x"], a["residual"], a["weight"], a["bias"], *moved,
        training=a["training"], momentum=a["momentum"], eps=a["eps"], relu=a["relu"],
    )  # fmt: skip
    return [y]


def convolution_reference(a: Arguments) -> list[Tensor]:
    weight = a["weight"].to(a["x"].dtype).float()
    return [torch.nn.functional.conv2d(a["x"].float(), weight, None, a["stride"], a["padding"])]


def topk_reference(a: Arguments) -> list[Tensor]:
    return list(reference.topk_neighbors(*a.values()))


def nt_xent_reference(a: Arguments) -> list[Tensor]:
    losses = reference.nt_xent(a["z0"].double(), a["z1"].double(), a["temperature"], a["both_anchors"], None)
    begin, end = a["sample_begin"], a["sample_begin"] + a["sample_count"]
    return [losses.view(2 if a["both_anchors"] else 1, -1)[:, begin:end].flatten()]


def scan_loss_reference(a: Arguments) -> list[Tensor]:
    anchors, neighbors = a["anchors"].double(), a["neighbors"].double()
    if anchors.ndim == 2:
        anchors, neighbors = anchors[None], neighbors[None]
    results = reference.scan_loss(anchors, neighbors, a["entropy_weight"])
    return [result.view(a["anchors"].shape[:-2]) for result in results]


def self_label_reference(a: Arguments) -> list[Tensor]:
    # Confidence is decided in float32, as the kernel does.
    return list(reference.self_label_loss(a["weak"].float(), a["strong"].float(), a["threshold"], a["balance"]))


@dataclass(frozen=True)
class Case:
    """An operator's valid arguments and, if it has one, its reference.

    Attributes:
        make: returns arguments by name, in order.
        reference: returns the first results, from the same arguments.
        tolerance: of the comparison with the reference, relative and absolute.
        updated: names of arguments that are updated in place.
    """

    make: Callable[[Draw], Arguments]
    reference: Callable[[Arguments], list[Tensor]] | None = None
    tolerance: float = 2e-3
    updated: tuple[str, ...] = field(default=())


_RUNNING = ("running_mean", "running_var")
CASES = {
    "augment": Case(augment),
    "batch_norm": Case(batch_norm, batch_norm_reference, 3e-2, _RUNNING),
    "batch_norm_forward": Case(batch_norm_forward, batch_norm_reference, 3e-2, _RUNNING),
    "batch_norm_backward": Case(batch_norm_backward),
    "conv2d": Case(convolution, convolution_reference, 5e-2),
    "conv2d_fork": Case(convolution, convolution_reference, 5e-2),
    "conv2d_forward": Case(convolution, convolution_reference, 5e-2),
    "conv2d_grad_input": Case(conv2d_grad_input),
    "conv2d_grad_weight": Case(conv2d_grad_weight),
    "conv2d_grad_weight_float32": Case(conv2d_grad_weight_float32),
    "conv2d_is_usable": Case(conv2d_is_usable),
    "nt_xent_forward": Case(nt_xent_forward, nt_xent_reference),
    "nt_xent_backward": Case(nt_xent_backward),
    "scan_loss": Case(scan_loss, scan_loss_reference),
    "scan_loss_forward": Case(scan_loss, scan_loss_reference),
    "scan_loss_backward": Case(scan_loss_backward),
    "self_label": Case(self_label, self_label_reference),
    "self_label_forward": Case(self_label, self_label_reference),
    "self_label_backward": Case(self_label_backward),
    "topk_neighbors": Case(topk_neighbors, topk_reference),
}
