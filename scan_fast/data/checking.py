"""Check of all images of a source before any is used: by header, or by decoding; ranks share the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .. import distributed
from ..errors import DataError, MissingPackageError
from .agreement import fill_rows
from .decode import Header, decode, read_header, square
from .decode_cache import DecodeCache
from .encoded import Identity, fingerprint

if TYPE_CHECKING:
    from .files import ImageFiles

_SKIP_ADVICE = (
    "Remove or repair it, or leave unreadable images out with data.on_error=skip (predict and embed: --on-error skip)."
)
_ROUND = 256
"""Images per decoding thread between two looks for a failure."""


def check_all(
    files: ImageFiles,
    size: int,
    *,
    on_error: Literal["raise", "skip"],
    decode_all: bool,
    pixels: Tensor | None = None,
    decode_cache: DecodeCache | None = None,
) -> tuple[list[int], list[tuple[str, str]]]:
    """Decode every image, or only read its header, and note in `files` what is found.

    With several ranks each checks a part of the images, and all of them get the same results.

    Args:
        files: the images; their columns are filled.
        size: side of the square images, in pixels.
        on_error: "raise" at an unreadable image, or "skip" it.
        decode_all: decode every image.
        pixels: (N, size, size, 3) uint8 to be filled with the decoded images; None if they are not kept.
        decode_cache: what earlier starts have found out; images decoded here are entered.

    Returns:
        The numbers of the readable images, and (name, reason) of the others.

    Raises:
        DataError: if an image is unreadable and `on_error` is "raise": the first one, on all ranks.
    """
    known = decode_cache or DecodeCache()
    images = files.images

    def check(i: int) -> str | None:
        try:
            identity = images.identity(i)
            check_it = _decoded if decode_all else _header_read
            header, mark = check_it(files, i, size, pixels, known, identity)
            if images.identity(i) != identity:
                raise OSError("the file was changed while it was read")
        except Exception as error:  # plugins of PIL raise OSError, ValueError, SyntaxError, struct.error and others
            return reason_of(error, images.location(i))
        files.note(i, header, mark, identity)
        return None

    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    # All ranks take a round together, so that they fail together, and soon.
    step = _ROUND * sum(distributed.gathered(files.workers))
    for start in range(0, len(files), step):
        stop = min(start + step, len(files))
        parts = [(start + begin, start + end) for begin, end in distributed.shares(stop - start)]
        own = range(*parts[distributed.current().rank if len(parts) > 1 else 0])
        reasons = list(files.pool.map(check, own))
        failed = [(i, images.location(i), reason) for i, reason in zip(own, reasons, strict=True) if reason is not None]
        if len(parts) > 1:
            failed = _exchange(files, parts, failed, pixels)
        if failed and on_error == "raise":
            raise unreadable(*failed[0][1:])
        left_out = {i for i, _, _ in failed}
        kept += [i for i in range(start, stop) if i not in left_out]
        skipped += [(files.names[i], reason) for i, _, reason in failed]
    if decode_cache is not None:
        decode_cache.exchange()
    return kept, skipped


def _exchange(
    files: ImageFiles,
    parts: Sequence[tuple[int, int]],
    failed: list[tuple[int, str, str]],
    pixels: Tensor | None,
) -> list[tuple[int, str, str]]:
    """Give all ranks what each has found in its part; return the failures of all, by number."""
    rank = distributed.current().rank
    found = distributed.gathered((files.facts(*parts[rank]), failed))
    for other, (facts, _) in enumerate(found):
        if other != rank:
            files.note_facts(*parts[other], facts)
    if pixels is not None:
        fill_rows(pixels, parts)
    return [failure for _, several in found for failure in several]


def _header_read(
    files: ImageFiles, index: int, size: int, pixels: Tensor | None, known: DecodeCache, identity: Identity
) -> tuple[Header, int]:
    """Read the header of an image, and all of it unless its file is as an earlier start has noted it."""
    encoded = files.images.encoded(index)
    header, mark = read_header(encoded), known.fingerprint(files.names[index], identity, files.identity)
    return header, fingerprint(encoded, files.identity) if mark is None else mark


def _decoded(
    files: ImageFiles, index: int, size: int, pixels: Tensor | None, known: DecodeCache, identity: Identity
) -> tuple[Header, int]:
    """Decode an image, unless an earlier start did, and keep its square; return header and fingerprint."""
    found = known.recall(identity, files.identity)
    if found is not None and pixels is None:
        return found
    encoded = files.images.encoded(index)
    mark = fingerprint(encoded, files.identity)
    header, image = decode(encoded, smallest=2 * size if files.scaled else None)
    known.note(identity, header, mark, files.identity)
    if pixels is not None:
        pixels[index] = square(image, size, files.interpolation)
    return header, mark


def unreadable(location: str, reason: str) -> DataError:
    """Return the error that names an unreadable image and the remedies."""
    return DataError(f"cannot read image {location}: {reason}. {_SKIP_ADVICE}")


def none_readable(n: int, what: str, skipped: Sequence[tuple[str, str]]) -> DataError:
    """Return the error for n images of which none is readable; it names the first ones with their reasons."""
    return DataError(f"0 readable of {n} {what}: {'; '.join(f'{name}: {reason}' for name, reason in skipped[:3])}")


def reason_of(error: Exception, location: str) -> str:
    """Return in words why an image cannot be read; the message around it names the image."""
    if isinstance(error, MissingPackageError):
        return str(error)
    text = str(error).replace(f": {location!r}", "").replace(f" {location!r}", "")
    return f"{type(error).__name__}: {text}"
