"""Reads CIFAR-10 (JPEG) from its archive, and keeps the decoded images in one file of uint8 tensors."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from scan_fast.data.datasets import STATISTICS, Splits
from scan_fast.data.decode import to_rgb
from scan_fast.data.formats import IMAGE_SUFFIXES
from scan_fast.data.sources import Source, SubsetSource, TensorSource
from scan_fast.errors import DataError
from scan_fast.random import permutation, stream_key

SPLITS = ("train", "test")
_CHUNK = 256


def checksum(archive: Path) -> str:
    """Return the SHA-256 of an archive.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with archive.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"the archive {archive} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def open_archive(archive: Path, folder: Path, limit: int | None = None, say: Callable[[str], None] = print) -> Splits:
    """Return the images of an archive of ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, in memory.

    Args:
        archive: a tar file, compressed or not. All images have one size.
        folder: gets the decoded images, under the checksum of the archive.
        limit: the number of images of each split, drawn at random, always the same; all by default.
        say: prints how long decoding took.

    Raises:
        DataError: if the archive is missing or damaged, or holds something else.
    """
    kept = folder / f"images-{checksum(archive)[:16]}.pt"
    begin = time.perf_counter()
    if kept.is_file():
        content = torch.load(kept, weights_only=True)
        how = "read from an earlier decoding"
    else:
        content = decode_archive(archive)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{kept.name}")
        torch.save(content, temporary)
        os.replace(temporary, kept)
        how = "decoded"
    train, test = (_source(content, split, limit) for split in SPLITS)
    say(f"images: {len(train)} training and {len(test)} test images {how} in {time.perf_counter() - begin:.1f} s")
    mean, std = STATISTICS["cifar10"]
    return Splits(train=train, test=test, pretext=None, mean=mean, std=std)


def _source(content: dict[str, list[str] | torch.Tensor], split: str, limit: int | None) -> Source:
    images, labels, paths = (content[f"{split}_{name}"] for name in ("images", "labels", "paths"))
    whole = TensorSource(images, labels, paths, content["classes"])  # type: ignore[arg-type]
    if limit is None or limit >= len(whole):
        return whole
    return SubsetSource(whole, permutation(stream_key(0, f"{split} limit"), 0, len(whole))[:limit].sort().values)


def decode_archive(archive: Path) -> dict[str, list[str] | torch.Tensor]:
    """Return the classes, and for each split images (N, S, S, 3) uint8, labels (N,) int64 and paths, ordered by path.

    Raises:
        DataError: as :func:`open_archive`.
    """
    files = dict(sorted(_read(archive).items()))
    folders = [PurePosixPath(path).parts[:2] for path in files]
    names = {split: sorted({name for where, name in folders if where == split}) for split in SPLITS}
    if not names["train"] or names["train"] != names["test"]:
        raise DataError(
            f"the archive {archive} must hold train/<class>/*.jpg and test/<class>/*.jpg of the same classes, "
            f"it has {len(names['train'])} and {len(names['test'])}"
        )
    content: dict[str, list[str] | torch.Tensor] = {"classes": names["train"]}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for split in SPLITS:
            paths = [path for path in files if path.startswith(f"{split}/")]
            chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
            decoded = [image for part in pool.map(lambda part: _decode(part, files), chunks) for image in part]
            odd = next((i for i, image in enumerate(decoded) if image.shape != decoded[0].shape), None)
            if odd is not None:
                sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in (decoded[0], decoded[odd])]
                raise DataError(
                    f"the images must have one size: {paths[0]} has {sizes[0]}, {paths[odd]} has {sizes[1]}"
                )
            content[f"{split}_images"] = torch.from_numpy(np.stack(decoded))
            content[f"{split}_labels"] = torch.tensor(
                [names["train"].index(PurePosixPath(path).parts[1]) for path in paths], dtype=torch.int64
            )
            content[f"{split}_paths"] = paths
    return content


def _read(archive: Path) -> dict[str, bytes]:
    """Return the bytes of each image file of the archive by path."""
    files = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if len(path.parts) != 3 or path.parts[0] not in SPLITS:
                    raise DataError(f"the archive {archive} must hold train/<class>/*.jpg, it holds {member.name}")
                file = tar.extractfile(member)
                assert file is not None  # of a regular file
                files[str(path)] = file.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"the archive {archive} is damaged: {' '.join(str(error).split())}; copy it again") from error
    return files


def _decode(paths: list[str], files: dict[str, bytes]) -> list[np.ndarray]:
    images = []
    for path in paths:
        try:
            with Image.open(io.BytesIO(files[path])) as image:
                images.append(np.asarray(to_rgb(image)))
        except Exception as error:  # PIL raises OSError, ValueError, SyntaxError and others
            raise DataError(f"{path} in the archive is no image that can be read: {error}") from error
    return images
