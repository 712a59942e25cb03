"""Configuration of the images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from ..schema import Settings
from .encoded import IdentityKind
from .kinds import Triple, find_kind
from .placement import Crop, Resident, image_bytes, kept_on_host
from .resize import Interpolation


class DataConfig(Settings):
    """Images that a run works on.

    Attributes:
        source: a data set (digits, cifar10, cifar20, stl10, tinyimagenet, imagenet), "folder" for your own images, or
            images in containers: hf:DATASET[#CONFIGURATION][:SPLIT[:SPLIT]] (Hugging Face, from the Hub or a local
            folder), webdataset:SHARDS (tar files) or parquet:GLOB. Shards and files may be a folder, or a pattern with
            {000..010} and wildcards.
        root: folder of the images; for data sets that are downloaded, the folder they are kept in (default
            ~/.cache/scan-fast/data; for hf, the library's own); for webdataset and parquet, the folder that relative
            patterns start from.
        download: whether a missing data set may be downloaded.
        image_size: side of the stored square images in pixels. Default: that of the weights that the model starts from,
            if there are any; else the data set's own; 224 for ImageNet; for folders and containers 32, 64, 96 or 128 by
            the median shorter side (see `folders.default_size`).
        interpolation: filter that resizes a decoded square, antialiased as in PIL. "auto": that of the weights that the
            model starts from, else bilinear.
        mean, std: per-channel normalization in [0, 1]. Default: that of the pretrained weights if there are any, else
            the data set's, else ImageNet's.
        limit: train on this many images only, drawn at random, the same for every seed.
        test_fraction: fraction that is held out for testing if the source brings no test split. 0: none, so that
            every image is trained on and reported.
        classes_file: file with the name of one class folder per line, in the order of the labels; imagenet_50.txt,
            imagenet_100.txt and imagenet_200.txt without a folder are SCAN's ImageNet subsets.
        labels: "auto" reads labels if there are any, for reporting only; "none" ignores them.
        on_error: "raise" at an unreadable image, or "skip" it and list it in skipped.csv.
        resident: memory that keeps decoded images. "host": main memory, decoded once. "device": likewise, then moved to
            the run's GPU. "files": none; images are decoded at each use (sources without encoded images stay on the
            host). "auto": the host if they take at most half of its free memory, and then the GPU if they take at most
            a quarter of its free memory. Results are the same.
        identity: what tells whether an image is still the one that a run began with. "content": a digest of all bytes
            of its file. A file whose size, times of change and inode are as they were is not read again. "quick", for
            slow disks: size, first and last 8 KiB, and for files above 16 KiB the time of change. Then a file that was
            copied or touched counts as another, and one with its former time that was changed in the middle as the
            same. The images in containers are read whole in any case.
        crop: pixels that the boxes of views are cut from. "image": the square image of image_size pixels. "file": the
            same region of the encoded image at full resolution, so that small boxes of large photographs stay sharp and
            nothing is resized twice. "whole": the whole image, resized so that its shorter side has image_size pixels,
            as torchvision's Resize does; random crops then fall anywhere in an oblong image, and plain views are its
            centre. With "file" and "whole" images are decoded at each use. Sources without encoded images use "image".
        shuffle: order of the images in an epoch. "images": any order, at random. "shards", for tar files and Parquet on
            slow or remote disks: at random, too, but each tar file or row group is read in one stretch, together with
            up to 127 others, and by one process.
        decode: "exact" decodes every pixel before an image is resized; "scaled" decodes a JPEG at 1/2, 1/4 or 1/8 as
            long as every region cut from it stays at least twice as large as its result, which takes a fraction of the
            time for large photographs and changes pixel values slightly.
        workers: decoding threads; by default one per core, at most 16.
        renderer: implementation of the views: "fused" (one native kernel, on the devices it is compiled for), "dali"
            (NVIDIA DALI, on a GPU or the CPU), "torch" (torch operations, on any device), or "auto" for fused if
            possible, else torch.
    """

    source: str = "folder"
    root: Path | None = None
    download: bool = True
    image_size: int | None = Field(default=None, ge=1)
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    mean: Triple | None = None
    std: Triple | None = None
    limit: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.0, ge=0, lt=1)
    classes_file: Path | None = None
    labels: Literal["auto", "none"] = "auto"
    on_error: Literal["raise", "skip"] = "raise"
    resident: Resident = "auto"
    identity: IdentityKind = "content"
    crop: Crop = "image"
    shuffle: Literal["images", "shards"] = "images"
    decode: Literal["exact", "scaled"] = "exact"
    workers: int | None = Field(default=None, ge=1)
    renderer: Literal["auto", "torch", "dali", "fused"] = "auto"

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        find_kind(source)
        return source

    @model_validator(mode="after")
    def _files_are_read(self) -> Self:
        if self.crop != "image" and self.resident in ("host", "device"):
            raise ValueError(
                f"crop={self.crop} decodes at each use: set resident to auto or files, not {self.resident}"
            )
        return self

    @property
    def filter(self) -> Interpolation:
        """The filter of the resize; "auto" is bilinear unless the run's weights have replaced it."""
        return "bilinear" if self.interpolation == "auto" else self.interpolation

    def keeps(self, n: int, size: int) -> bool:
        """Return whether n encoded images are decoded once and kept, as square images of `size` pixels."""
        return self.crop == "image" and kept_on_host(self.resident, image_bytes(n, size))
