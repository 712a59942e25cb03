"""Decode JPEG files with DALI, and only the parts that views need: with nvJPEG on a GPU, otherwise with libjpeg-turbo.

Other files, and files that DALI refuses, are left to the thread pool of :class:`~scan_fast.data.files.ImageFiles`. So
both ways skip and report the same files.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..data.decode import JPEG_END, Box, stored_box, upright
from ..data.files import ImageFiles, in_pixels

# Decoded pixels per run. A whole batch of photographs would take gigabytes.
_RUN_PIXELS = {"cpu": 1 << 24, "cuda": 1 << 27}
_RUN_FILES = 1024


class DaliDecoder:
    """Crop boxes out of files like :meth:`.files.ImageFiles.cut`, with DALI for the JPEG files.

    On the CPU the decoded pixel values are those of the thread pool, on a GPU those of nvJPEG. The resize is DALI's:
    within one of PIL's values, except at the edge of a box that shrinks, where DALI repeats the outermost pixels.
    What ``data.interpolation`` resizes bicubically is left to the thread pool.
    Images are never decoded at a reduced scale, for any ``data.decode``; instead, pixels outside the boxes are not
    decoded.

    Args:
        graphs: the module :mod:`scan_fast.views.dali_graphs`.
        device: device to decode and resize on.
    """

    def __init__(self, graphs: ModuleType, device: torch.device) -> None:
        self._graphs = graphs
        self.device = device
        self._pipelines: dict[tuple[Any, ...], Any] = {}
        # Decodes one batch at a time, while another one is rendered.
        self._lock = threading.Lock()

    def cut(
        self, files: ImageFiles, indices: Tensor, frame: int, boxes: Sequence[Tensor], sides: Sequence[int]
    ) -> list[Tensor]:
        """Crop boxes out of the centre squares of files, and resize them. Each file is read and decoded once.

        Args:
            files: the files.
            indices, frame, boxes, sides: as in :meth:`.files.ImageFiles.cut`.

        Returns:
            One (n, side, side, 3) uint8 tensor per side, on the device.

        Raises:
            DataError: for a file that can no longer be read.
        """
        if files.interpolation != "bilinear":
            return [images.to(self.device) for images in files.cut(indices, frame, boxes, sides)]
        out = [torch.empty((len(indices), side, side, 3), dtype=torch.uint8, device=self.device) for side in sides]
        numbers = indices.tolist()
        rows = files.jpeg[indices].nonzero().squeeze(1)
        # Decoders would fill in the missing part of a truncated file, so truncated files are left to the pool.
        data = {
            row: encoded
            for row, encoded in zip(rows.tolist(), files.encoded(indices[rows]), strict=True)
            if encoded[-2:].tobytes() == JPEG_END
        }
        corners = [several.tolist() for several in boxes]
        wanted = {row: _boxes(files, numbers[row], frame, [several[row] for several in corners]) for row in data}
        with self._lock:
            for part in _parts(wanted, _RUN_PIXELS[self.device.type]):
                if not self._decode(files, part, [numbers[row] for row in part], data, wanted, out):
                    for row in part:
                        del data[row]
        rest = torch.tensor([row for row in range(len(numbers)) if row not in data], dtype=torch.int64)
        if len(rest):
            found = files.cut(indices[rest], frame, [several[rest] for several in boxes], sides)
            for target, images in zip(out, found, strict=True):
                target[rest.to(self.device)] = images.to(self.device)
        return out

    def _decode(
        self,
        files: ImageFiles,
        part: list[int],
        numbers: list[int],
        data: dict[int, np.ndarray],
        wanted: dict[int, list[Box]],
        out: Sequence[Tensor],
    ) -> bool:
        """Fill these rows of `out`. Return False if DALI refuses one of the files."""
        sides = tuple(target.shape[1] for target in out)
        key = (sides, files.workers)
        if key not in self._pipelines:
            self._pipelines[key] = self._graphs.decode_pipeline(
                sides,
                batch_size=_RUN_FILES,
                num_threads=files.workers,
                device_id=None if self.device.type == "cpu" else self.device.index or 0,
                prefetch_queue_depth=1,
                seed=0,
            )
        pipeline = self._pipelines[key]
        whole, *views = (np.array([wanted[row][i] for row in part], dtype=np.int32) for i in range(1 + len(sides)))
        try:
            pipeline.feed_input("encoded", [data[row] for row in part])
            pipeline.feed_input("box", whole)
            for i, box in enumerate(views):
                box[:, :2] -= whole[:, :2]
                pipeline.feed_input(f"box{i}", box)
            if self.device.type == "cpu":
                results = pipeline.run()
            else:
                results = pipeline.run(cuda_stream=torch.cuda.current_stream(self.device))
        except (RuntimeError, ValueError, IndexError):
            # A pipeline that failed cannot run again.
            del self._pipelines[key]
            return False
        rows = torch.tensor(part, device=self.device)
        for target, result in zip(out, results, strict=True):
            target[rows] = from_dlpack(result.as_tensor())
            for row, number in zip(part, numbers, strict=True):
                orientation = int(files.orientations[number])
                if orientation != 1:
                    target[row] = upright(target[row], orientation)
        return True


def _boxes(files: ImageFiles, number: int, frame: int, boxes: Sequence[Sequence[int]]) -> list[Box]:
    """Return the box around all views of a file, and the boxes of the views, in pixels of the stored image."""
    header = files.header(number)
    views = [stored_box(in_pixels(box, frame, header.height, header.width), header) for box in boxes]
    top, left = (min(box[axis] for box in views) for axis in (0, 1))
    bottom, right = (max(box[axis] + box[axis + 2] for box in views) for axis in (0, 1))
    return [(top, left, bottom - top, right - left), *views]


def _parts(wanted: dict[int, list[Box]], pixels: int) -> list[list[int]]:
    """Split rows into parts whose boxes have at most `pixels` pixels together, or that are a single row."""
    parts: list[list[int]] = []
    room = 0
    for row, ((_, _, height, width), *_) in wanted.items():
        if not parts or room < height * width or len(parts[-1]) == _RUN_FILES:
            parts.append([])
            room = pixels
        parts[-1].append(row)
        room -= height * width
    return parts
