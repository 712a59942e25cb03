"""The optimisers: those of torch, and Muon for the matrices of a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.config import OptimizerConfig

ITERATIONS = 5
"""Newton-Schulz iterations of each update; five bring the singular values between about 0.7 and 1.2."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as published with Muon: steep at zero, so that small singular values grow fast."""
RMS = 0.2
"""Root mean square of an update before the learning rate, which is that of a typical update of Adam."""
LEAST = 8
"""Fewer rows or columns make a weight an input or output layer, such as a stem with three channels."""


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    The update of a weight (R, C, ...), as a matrix of R rows, is the nearest matrix with orthogonal rows or columns, up
    to the error of five Newton-Schulz iterations. So all directions of a weight learn at the same rate. Updates are
    scaled to the size of Adam's (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so that one learning rate serves
    both.

    Args:
        parameters: weights of two dimensions or more, or groups of them.
        lr: learning rate.
        momentum: of the moving average of the gradients, whose Nesterov form is made orthogonal.
        weight_decay: decoupled, per unit of the learning rate.

    Raises:
        ValueError: for a weight with fewer than two dimensions.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < 2:
                    raise ValueError(f"Muon needs weights of two dimensions or more, got {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if "average" not in self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
            gradients: list[Tensor] = [weight.grad for weight in weights]
            averages: list[Tensor] = [self.state[weight]["average"] for weight in weights]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            directions = torch._foreach_lerp(gradients, averages, momentum)
            matrices = orthogonal([direction.flatten(1) for direction in directions])
            torch._foreach_mul_(matrices, [RMS * max(matrix.shape) ** 0.5 for matrix in matrices])
            # The rate may be a tensor on the device.
            torch._foreach_mul_(matrices, lr)
            torch._foreach_mul_(weights, 1 - lr * decay)
            torch._foreach_sub_(weights, [m.reshape(w.shape) for m, w in zip(matrices, weights, strict=True)])


def orthogonal(matrices: Sequence[Tensor], iterations: int = ITERATIONS) -> list[Tensor]:
    """Return for each matrix about the nearest one with orthonormal rows (or columns, if there are fewer of them).

    Matrices with the same number of these are iterated together, because a GPU computes many small products at once in
    little more time than one.

    Args:
        matrices: each (R, C) real floating point, all of one dtype and device.
        iterations: Newton-Schulz iterations.

    Returns:
        of the same shapes and dtype; zeros for zeros.
    """
    if not matrices:
        return []
    a, b, c = COEFFICIENTS
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    norms = torch._foreach_norm(wide)
    torch._foreach_add_(norms, 1e-7)
    wide = list(torch._foreach_div(wide, norms))
    by_rows: dict[int, list[int]] = {}
    for number, x in enumerate(wide):
        by_rows.setdefault(x.shape[0], []).append(number)
    for numbers in by_rows.values() if iterations else ():
        # Every iterate is a polynomial of the first Gram matrix times x. So the iteration runs on the Gram matrix,
        # which is a ninth of the weight of a 3x3 convolution, and x is multiplied once.
        gram, factor = torch.stack([wide[number] @ wide[number].mT for number in numbers]), None
        for iteration in range(iterations):
            power = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            power.diagonal(dim1=1, dim2=2).add_(a)
            factor = power if factor is None else power @ factor
            if iteration < iterations - 1:
                gram = power @ (power @ gram)
        assert factor is not None
        for number, part in zip(numbers, factor, strict=True):
            wide[number] = part @ wide[number]
    return [x if x.shape == matrix.shape else x.mT for x, matrix in zip(wide, matrices, strict=True)]


class Together:
    """Several optimisers of different parameters, used as one.

    Attributes:
        optimizers: the optimisers.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimisers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)


AnyOptimizer = torch.optim.Optimizer | Together


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> AnyOptimizer:
    """Build the optimiser, fused if torch has it. Without ``decay_all``, biases and normalisation weights do not decay.

    With ``muon``, the hidden weights are Muon's, and AdamW updates the others: biases, normalisation, and layers with
    fewer than eight inputs or outputs.

    On a GPU the learning rate is a device tensor (see :func:`write_learning_rate`), which a captured step needs.
    """
    optimizer: AnyOptimizer
    if config.name == "muon":
        hidden = [p for p in parameters if is_hidden(p)]
        others = [p for p in parameters if not is_hidden(p)]
        decay = config.weight_decay
        muon = Muon(hidden, config.lr, config.momentum, decay) if hidden else None
        adam = torch.optim.AdamW(_groups(others, config.decay_all), lr=config.lr, weight_decay=decay, fused=True)
        optimizer = adam if muon is None else muon if not others else Together(muon, adam)
    else:
        groups = _groups(parameters, config.decay_all)
        common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
        if config.name == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
        else:
            optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name](groups, **common)
    fit_to_device(optimizer)
    return optimizer


def is_hidden(parameter: nn.Parameter) -> bool:
    """True for the weight of a layer between others, by its shape."""
    return parameter.ndim > 1 and min(parameter.shape[:2]) >= LEAST


def _groups(parameters: list[nn.Parameter], decay_all: bool) -> list[dict[str, Any]]:
    if decay_all:
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def fit_to_device(optimizer: AnyOptimizer) -> None:
    """Move learning rates to the device of the weights, after building or after loading another device's state."""
    for group in optimizer.param_groups:
        on_gpu = any(parameter.is_cuda for parameter in group["params"])
        lr = float(group["lr"])
        group["lr"] = torch.tensor(lr, device=group["params"][0].device) if on_gpu else lr
        if "capturable" in group:
            group["capturable"] = on_gpu


def write_learning_rate(optimizer: AnyOptimizer, rate: float) -> None:
    """Set the learning rate of all groups without a host synchronisation."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
