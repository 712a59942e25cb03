"""The original images behind the rows of an assignments table."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping

from PIL import Image

from ..data.encoded import EncodedImages, Identity
from ..data.sources import Source
from ..evaluation.pictures import pixel_digest
from ..runs.tables import Assignments

_WHOLE = 1 << 15
"""A side in pixels that no picture exceeds: asks for a picture in full size."""


class Originals:
    """The images of a table, by their number in it.

    All methods but :meth:`picture` and :meth:`content` read nothing but headers that are known already and the status
    of files. All are thread-safe.

    Args:
        sources: the images by split.
        table: the assignments. An image that is no longer among those of its split counts as lost.
    """

    def __init__(self, sources: Mapping[str, Source], table: Assignments) -> None:
        self._places: list[tuple[Source, int] | None] = [None] * len(table.paths)
        self._identities: dict[int, Identity | None] = {}
        rows = {split: {path: i for i, path in enumerate(s.paths)} for split, s in sources.items()}
        for number, (path, split) in enumerate(zip(table.paths, table.splits, strict=True)):
            row = rows.get(split, {}).get(path)
            if row is not None:
                self._places[number] = (sources[split], row)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def lost(self) -> int:
        """The number of images that are no longer there."""
        return sum(place is None for place in self._places)

    def picture(self, number: int, side: int) -> Image.Image | None:
        """Return an image upright in mode RGB, the longer side at most ``side`` pixels; None if it cannot be read."""
        place = self._places[number]
        if place is None:
            return None
        try:
            return place[0].original(place[1], side)
        except (OSError, ValueError):  # DataError is a ValueError
            return None

    def identity(self, number: int) -> str | None:
        """Return a text that is another one if the image has changed; None if nothing but its pixels tells."""
        found = self._identity(number)
        return None if found is None else "|".join(map(str, found))

    def file(self, number: int) -> str | None:
        """Return the absolute path of the file that holds this image alone; None if there is none."""
        found = self._identity(number)
        # An item of a container is called by the container's path, two slashes and its own name.
        return None if found is None or "//" in found.key[1:] else found.key

    def n_bytes(self, number: int) -> int:
        """Return the size of the image's own file in bytes, 0 if it has none."""
        found = self._identity(number)
        return 0 if found is None or self.file(number) is None else found.size

    def size(self, number: int) -> tuple[int, int]:
        """Return width and height of the upright image in pixels, (0, 0) if they are not known."""
        place = self._places[number]
        if place is None:
            return 0, 0
        source, row = place
        if source.files is None:
            return source.size, source.size
        header = source.files.header(row)
        return int(header.width), int(header.height)

    def content(self, number: int) -> bytes:
        """Return the encoded image; of an image in memory, a PNG.

        Raises:
            OSError: if it cannot be read, or is lost.
        """
        found = self._encoded(number)
        if found is None:
            picture = self.picture(number, _WHOLE)
            if picture is None:
                raise FileNotFoundError(f"image {number} of the assignments is no longer there")
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            return buffer.getvalue()
        encoded = found[0].encoded(found[1])
        if isinstance(encoded, bytes):
            return encoded
        with open(encoded, "rb") as file:
            return file.read()

    def digest(self, number: int) -> bytes | None:
        """Return a digest of the encoded image, or of the pixels of one in memory; None if it cannot be read."""
        if self._encoded(number) is None:
            picture = self.picture(number, _WHOLE)
            return None if picture is None else pixel_digest(picture)
        try:
            return hashlib.blake2b(self.content(number), digest_size=16).digest()
        except (OSError, ValueError):
            return None

    def folders(self) -> set[str]:
        """Return the folders whose image files these are; containers count for nothing."""
        found: set[str] = set()
        for number, place in enumerate(self._places):
            files = None if place is None else place[0].files
            if files is not None and files.images.root and files.images.root not in found:
                if self.file(number) is None:
                    continue
                found.add(files.images.root)
        return {os.path.abspath(root) for root in found}

    def _identity(self, number: int) -> Identity | None:
        if number not in self._identities:
            found = self._encoded(number)
            try:
                self._identities[number] = None if found is None else found[0].identity(found[1])
            except OSError:  # the file is gone
                self._identities[number] = None
        return self._identities[number]

    def _encoded(self, number: int) -> tuple[EncodedImages, int] | None:
        place = self._places[number]
        if place is None or place[0].files is None:
            return None
        return place[0].files.images, place[1]
