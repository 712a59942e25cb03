"""Export of a predictor to formats that run without this package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .atomic import atomic_file
from .errors import MissingPackageError, UsageError
from .predictor import Predictor

FORMATS = ("pt2", "onnx")


class ImagesToProbabilities(nn.Module):
    """Normalisation, network and softmax of a predictor as one module."""

    mean: Tensor
    std: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.model = predictor.model
        for name, values in (("mean", predictor.saved.mean), ("std", predictor.saved.std)):
            self.register_buffer(name, 255.0 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 images of the view's size S to (B, K) float32 probabilities."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        logits: Tensor = self.model((pixels - self.mean) / self.std)[0]
        return logits.softmax(dim=1)


def export(predictor: Predictor, path: Path, form: str) -> None:
    """Write ``path`` atomically, for batches of any size.

    Args:
        predictor: the model.
        path: the file to write.
        form: "pt2" for ``torch.export.load(path).module()``, "onnx" for ONNX runtimes (one file, at most 2 GiB).

    Raises:
        UsageError: for another form.
        MissingPackageError: if ``onnx`` needs packages that are not installed.
        OSError: if the file cannot be written.
    """
    if form not in FORMATS:
        raise UsageError(f"the format must be one of {', '.join(FORMATS)}, got {form!r}")
    if form == "onnx":
        _require_onnx()
    module = ImagesToProbabilities(predictor).eval()
    side = predictor.saved.view_size
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8, device=predictor.device)
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    if form == "onnx":
        exported = torch.onnx.export(program, input_names=["images"], output_names=["probabilities"], verbose=False)
        assert exported is not None
        content = exported.model_proto.SerializeToString()
        with atomic_file(path) as file:
            file.write(content)
        return
    with atomic_file(path) as file:
        torch.export.save(program, file)


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "--format onnx needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from error
