"""Writes a predictor in a form that runs without this package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .predictor import Predictor

FORMATS = ("pt2", "onnx")


class ImagesToProbabilities(nn.Module):
    """The whole way of a prediction as one module: normalisation, network, softmax."""

    mean: Tensor
    std: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.model = predictor.model
        for name in ("mean", "std"):
            self.register_buffer(name, 255.0 * torch.tensor(predictor.state[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 images of the view's size S to (B, K) float32 probabilities."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        logits: Tensor = self.model((pixels - self.mean) / self.std)[0]
        return logits.softmax(dim=1)


def export(predictor: Predictor, path: Path, form: str) -> None:
    """Write ``path``: ``pt2`` for ``torch.export.load(path).module()``, ``onnx`` for ONNX runtimes; any batch size.

    Raises:
        ValueError: for another form.
        ImportError: where ``onnx`` is asked for and its packages are missing.
    """
    if form not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {form!r}")
    module = ImagesToProbabilities(predictor).eval()
    side = predictor.state["view_size"]
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8, device=predictor.device)
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    if form == "pt2":
        torch.export.save(program, path)
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--format onnx needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    torch.onnx.export(program, f=str(path), input_names=["images"], output_names=["probabilities"])
