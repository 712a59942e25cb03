"""Export of a predictor to formats that run without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .atomic import atomic_file
from .errors import MissingPackageError, UsageError
from .predictor import Predictor

FORMATS = ("pt2", "onnx")

METADATA = "scan_fast.json"
"""The name of the metadata among the extra files of a pt2 archive."""


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


def metadata(predictor: Predictor) -> dict[str, str]:
    """Return what the file says of its model: input, output, backbone and terms, as texts."""
    saved = predictor.saved
    side, k = saved.view_size, saved.n_clusters
    return {
        "producer": f"scan-fast {__version__}",
        "stage": saved.stage,
        "backbone": saved.model.backbone,
        "input": f"images: (batch, {side}, {side}, 3) uint8, RGB in 0..255: the centre square, resized with antialias",
        "image_size": str(side),
        "stored_size": str(saved.size),
        "normalization": f"in the model: (pixel / 255 - mean) / std, mean {list(saved.mean)}, std {list(saved.std)}",
        "mean": json.dumps(saved.mean),
        "std": json.dumps(saved.std),
        "output": f"probabilities: (batch, {k}) float32, of clusters 0..{k - 1}; rows sum to 1",
        "clusters": str(k),
        "license": "scan-fast, which made this file: Apache-2.0; the weights: terms of the training images and of the "
        "pretrained weights that training began with, if any",
    }


def export(predictor: Predictor, path: Path, form: str) -> None:
    """Write ``path`` atomically, for batches of any size.

    The file describes itself (:func:`metadata`): in ``metadata_props`` of an ONNX model, or in the extra file
    ``scan_fast.json`` of a pt2 archive.

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
    facts = metadata(predictor)
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8, device=predictor.device)
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    if form == "onnx":
        exported = torch.onnx.export(program, input_names=["images"], output_names=["probabilities"], verbose=False)
        assert exported is not None
        described = exported.model_proto
        _describe(described, facts)
        with atomic_file(path) as file:
            file.write(described.SerializeToString())
        return
    with atomic_file(path) as file:
        torch.export.save(program, file, extra_files={METADATA: json.dumps(facts, indent=2)})


def _describe(model: Any, facts: dict[str, str]) -> None:
    """Enter metadata into an ONNX ModelProto."""
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    model.doc_string = f"Assigns images to {facts['clusters']} clusters. Written by {facts['producer']}."
    model.graph.input[0].doc_string = facts["input"]
    model.graph.output[0].doc_string = facts["output"]


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "--format onnx needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from error
