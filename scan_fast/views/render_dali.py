"""DALI renderer: renders the views of the other renderers with NVIDIA DALI's operators, on a GPU or the CPU.

It takes the same parameters and renders the same views: each operation is within one of PIL's pixel values. The
pipelines are in :mod:`scan_fast.views.dali_graphs`. `equalize` uses torch, because DALI's follows OpenCV's formula. A
crop that shrinks may differ more at its edge, where DALI repeats the outermost pixels for the filter. DALI draws
nothing at random, so a view depends only on its parameters, and DALI needs no checkpoint.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..data.files import ImageFiles
from ..errors import MissingPackageError
from ..ops import native
from ..ops.augment import Operation
from . import color, geometry
from .decode_dali import DaliDecoder
from .normalization import scale_and_shift
from .parameters import STRONG_INDEX, Params, SimCLRView, View
from .render_fused import operations_of

if TYPE_CHECKING:
    from types import ModuleType

INSTALL = "pip install nvidia-dali-cuda130"

# Pixels per run of the crop pipeline, whose samples are images: many small images, which share DALI's cost per run, or
# few large ones. Each later operation has one run for the same number of images.
_RUN_PIXELS = {"cpu": 1 << 23, "cuda": 1 << 24}
_RUN_IMAGES = 8192
_GPU_THREADS = 4
_CACHED_PIXELS = 1 << 16


def is_installed() -> bool:
    """Return whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _graphs() -> ModuleType:
    if not is_installed():
        raise MissingPackageError(f"data.renderer=dali needs DALI, which is not installed: {INSTALL}")
    from . import dali_graphs

    return dali_graphs


class DaliRenderer:
    """Render views with DALI.

    Args:
        mean, std: per-channel normalisation in [0, 1].
        device: device to render on; images are moved there.
        dtype: dtype of the result, float32 or bfloat16.
        threads: DALI's CPU threads; by default torch's number on the CPU, and four with a GPU.
        decodes: decode JPEG files with DALI as well; by default on a GPU only. On the CPU its resize makes it slower
            than the thread pool of the other renderers (``python -m benchmarks.views --photos FOLDER``).

    Raises:
        MissingPackageError: if DALI is not installed.
        ValueError: for an invalid mean, std or dtype.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        decodes: bool | None = None,
    ) -> None:
        scale, shift = scale_and_shift(mean, std)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
        self._build = _graphs()
        self.device = torch.device(device)
        self.dtype = dtype
        on_cpu = self.device.type == "cpu"
        self.threads = threads or (torch.get_num_threads() if on_cpu else _GPU_THREADS)
        self._options = {
            "device_id": None if on_cpu else self.device.index or 0,
            "num_threads": self.threads,
            # Every run is fed and awaited explicitly; the loader prefetches.
            "prefetch_queue_depth": 1,
            "seed": 0,
        }
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32, device=self.device) for values in (scale, shift)
        )
        self._pipelines: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()
        decodes = not on_cpu if decodes is None else decodes
        self._decoder = DaliDecoder(self._build, self.device) if decodes else None

    @torch.no_grad()
    def __call__(self, images: Tensor, view: View, params: Params) -> Tensor:
        """Render one view.

        Args:
            images: (n, H, W, 3) uint8 on any device.
            view: view specification with a resolved size.
            params: parameters from ``view.sample`` for these images.

        Returns:
            (n, 3, size, size) normalised, channels_last, in the renderer's dtype and on its device.
        """
        pixels = self.pixels(images, view, params)
        n, side = len(images), view.side
        out = native.empty_large((n, side, side, 3), self.dtype, self.device)
        # By rows of pixels: torch is many times slower if the innermost dimension is the three channels.
        scale, shift = self._scale.repeat(side), self._shift.repeat(side)
        # In chunks that stay in a CPU's caches.
        part = max(1, _CACHED_PIXELS // side) if self.device.type == "cpu" else max(1, n * side)
        for some, target in zip(pixels.view(-1, 3 * side).split(part), out.view(-1, 3 * side).split(part), strict=True):
            values = target if self.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            values.copy_(some).mul_(scale).add_(shift)
            if values is not target:
                target.copy_(values)
        view_of = out.permute(0, 3, 1, 2)
        if "cutout" in params:
            view_of.masked_fill_(geometry.box_mask(params["cutout"].to(self.device), side), 0)
        return view_of

    @torch.no_grad()
    def pixels(self, images: Tensor, view: View, params: Params) -> Tensor:
        """Render one view without normalisation and cutout: (n, size, size, 3) uint8."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be (n, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
        images = images.to(self.device, non_blocking=True)
        params = {name: value.cpu() for name, value in params.items()}
        if len(images) == 0:
            return torch.empty((0, view.side, view.side, 3), dtype=torch.uint8, device=self.device)
        pixels = max(view.side**2, images.shape[1] * images.shape[2])
        size = min(_RUN_IMAGES, max(1, _RUN_PIXELS[self.device.type] // pixels))
        with self._lock:
            runs = [
                self._run(images[rows], view, {name: value[rows] for name, value in params.items()})
                for rows in (slice(start, start + size) for start in range(0, len(images), size))
            ]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def cut(
        self, files: ImageFiles, indices: Tensor, frame: int, boxes: Sequence[Tensor], sides: Sequence[int]
    ) -> list[Tensor]:
        """Crop boxes out of files with DALI, or with the thread pool if DALI does not decode."""
        if self._decoder is None:
            return files.cut(indices, frame, boxes, sides)
        return self._decoder.cut(files, indices, frame, boxes, sides)

    def _run(self, images: Tensor, view: View, params: Params) -> Tensor:
        """Render the images of one run: (n, S, S, 3) uint8."""
        out = self._crop(images, view, params)
        operations, arguments = (part.contiguous() for part in operations_of(view, params))
        arguments = _graph_arguments(operations, arguments)
        for code, amounts in zip(operations.unbind(1), arguments.unbind(1), strict=True):
            # IDENTITY is 0, so its images come first; they are unchanged.
            idle, *counts = code.bincount(minlength=1).tolist()
            rows = code.argsort(stable=True)[idle:]
            where = rows.to(self.device)
            some = native.empty_large((len(rows), *out.shape[1:]), torch.uint8, self.device)
            torch.index_select(out, 0, where, out=some)
            blocks = zip(where.split(counts), some.split(counts), amounts[rows].split(counts), strict=True)
            for number, (place, block, amount) in enumerate(blocks, start=1):
                if len(block):
                    _write_rows(out, place, self._apply(Operation(number), block, view, amount))
        return out

    def _crop(self, images: Tensor, view: View, params: Params) -> Tensor:
        """Crop, resize and mirror: a writable (n, S, S, 3) uint8 tensor."""
        side = view.side
        box = torch.stack([params[name] for name in ("top", "left", "height", "width")], dim=1).int()
        resize = bool((box[:, 2:] != side).any())
        if not resize and images.shape[1:3] == (side, side) and not bool(params["flip"].any()):
            return images.clone()
        size = torch.full((len(box), 2), float(side))
        size[params["flip"], 1] *= -1
        key = ("crop", resize)
        if key not in self._pipelines:
            self._pipelines[key] = self._build.crop_pipeline(resize, batch_size=_RUN_IMAGES, **self._options)
        feeds = {"images": images, "start": box[:, :2].contiguous(), "shape": box[:, 2:].contiguous(), "size": size}
        return from_dlpack(self._outputs(self._pipelines[key], feeds).as_tensor())

    def _apply(self, operation: Operation, pixels: Tensor, view: View, arguments: Tensor) -> Tensor:
        """Apply one operation to images, each with its own argument: (n, S, S, 3) uint8."""
        if operation == Operation.EQUALIZE:
            return _equalize(pixels)
        key = (operation, view.side, _largest_factor(view))
        if key not in self._pipelines:
            self._pipelines[key] = self._build.block_pipeline(*key, batch_size=self.threads, **self._options)
        # DALI distributes samples over its threads.
        blocks = self.threads if self.device.type == "cpu" else 1
        feeds = {"block": pixels.chunk(blocks), "arguments": arguments.chunk(blocks)}
        results = [from_dlpack(block) for block in self._outputs(self._pipelines[key], feeds)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _outputs(self, pipeline: Any, feeds: Mapping[str, Tensor | Sequence[Tensor]]) -> Any:
        for name, value in feeds.items():
            pipeline.feed_input(name, _array(value) if isinstance(value, Tensor) else [_array(v) for v in value])
        if self.device.type == "cpu":
            return pipeline.run()[0]
        return pipeline.run(cuda_stream=torch.cuda.current_stream(self.device))[0]


def _array(value: Tensor) -> Any:
    """Return an array that DALI uses without a copy. For torch tensors it requires a CUDA stream, even on the CPU."""
    return value.numpy() if value.device.type == "cpu" else value


def _write_rows(images: Tensor, rows: Tensor, some: Tensor) -> None:
    """Write images into these rows; on the CPU with NumPy, which is 8 times faster than index_copy_."""
    if images.device.type == "cpu":
        images.numpy()[rows.numpy()] = some.numpy()
    else:
        images.index_copy_(0, rows, some)


def _largest_factor(view: View) -> float:
    return 1 + max(view.saturation, view.contrast) if isinstance(view, SimCLRView) else 1.0


def _equalize(pixels: Tensor) -> Tensor:
    """Equalize (n, S, S, 3) uint8 with PIL's formula; DALI's operator uses OpenCV's, which differs by many values."""
    planar = pixels.permute(0, 3, 1, 2).float()
    kind = torch.full((len(pixels),), STRONG_INDEX["equalize"], device=pixels.device)
    table = color.tables(planar, kind, kind.float(), STRONG_INDEX)
    return color.apply_tables(planar, table).to(torch.uint8).permute(0, 2, 3, 1)


def _graph_arguments(operations: Tensor, arguments: Tensor) -> Tensor:
    """Convert the arguments of the fused kernel to those of the DALI graphs: (n, steps, 6) float32."""
    out = torch.zeros((*operations.shape, 6))
    out[..., : arguments.shape[-1]] = arguments.view(torch.float32)
    first = out[..., 0]

    def rows(operation: Operation) -> Tensor:
        return operations == int(operation)

    hue = rows(Operation.HUE)
    first[hue] = (first[hue].double() * 255).trunc().remainder(256).float()
    solarize = rows(Operation.SOLARIZE)
    first[solarize] = first[solarize].ceil()
    posterize = rows(Operation.POSTERIZE)
    first[posterize] = 256 - torch.exp2(8 - first[posterize])
    nearest = rows(Operation.NEAREST)
    if nearest.any():
        out[nearest] = _pixel_maps(arguments[nearest])
    return out


def _pixel_maps(fixed: Tensor) -> Tensor:
    """Convert PIL's steps in 16.16 fixed point back to maps of pixel centres, (n, 6) float32.

    Adds half a step, so that float32 does not round a position at a whole pixel down to the previous pixel.
    """
    start_x, ax, bx, start_y, dy, ey = (fixed.double() / 65536).unbind(1)
    half_step = 0.5 / 65536
    x0, y0 = start_x - (ax + bx) / 2 + half_step, start_y - (dy + ey) / 2 + half_step
    return torch.stack((ax, bx, x0, dy, ey, y0), dim=1).float()
