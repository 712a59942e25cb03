"""Every file that a run leaves on disk: its name, its content, when it is written, and how to repair it.

An :class:`Artifact` ties a name in the run folder to the two functions that write and read its content. All of them are
listed here. :meth:`.folder.RunFolder.write` and :meth:`.folder.RunFolder.read` carry them to disk and back, with the
digests that show damage (:mod:`.digests`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from .. import distributed
from ..atomic import atomic_file
from ..data.decode_cache import DecodeCache
from ..errors import MissingPackageError, RunError, ScanFastError, WeightsError
from ..models.saved import SavedModel
from .config import Config, build_config
from .digests import JOURNAL, DamagedError, Journal, UnsealedError, check_seal, digest_of, is_archive, seal
from .environment import EnvironmentRecord
from .findings import Duplicates, Outliers
from .images import ImageRecord
from .names import GroupNames
from .plain_yaml import parse_yaml
from .reading import load_json
from .records import (
    BackboneRecord,
    Checkpoint,
    Embeddings,
    ImageMap,
    MetricsEntry,
    Neighbors,
    PrecisionRecord,
    StageResult,
    SuggestedNumber,
    Summary,
    dump_json,
    dump_metrics,
    load_metrics,
)
from .tables import Assignments, Confusion, Skipped
from .variants import VariantTable

T = TypeVar("T")

COMMANDS: dict[str, str] = {
    "pretext": "pretext",
    "mining": "mine",
    "number": "suggest-k",
    "clustering": "cluster",
    "selflabel": "selflabel",
}
"""The command line's name of each stage."""

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints and results of the learned stages."""

REPORT_FOLDER = "report"
"""The folder of what report.html shows; its sub-folder holds the thumbnails, which later reports use again."""
THUMBNAILS = f"{REPORT_FOLDER}/thumbnails"
"""JPEG and PNG files, named by a digest of the image that each shows."""

_REMOVE = "remove it, and the same command continues with the rest"
_REPEAT = "repeat what wrote it: scan-fast {command} {folder} --again"
_REPORT_AGAIN = "remove it, and `scan-fast report {folder}` writes it again"
_RUN_AGAIN = "remove it, and `scan-fast run {folder}` writes it again"


@dataclass(frozen=True)
class Artifact(Generic[T]):
    """A file of a run folder.

    Attributes:
        name: the path in the run folder.
        dump: writes the content to a binary file.
        load: reads it; raises ValueError, with the reason, for anything else.
        stage: the stage that writes it and whose repetition removes it; None if it belongs to the run as a whole.
        repair: advice for a damaged file; ``{folder}`` and ``{command}`` are filled in.
        error: the class of the error for a damaged file.
        grows: lines are appended to the file, so each line has a digest, and one that was cut short is left out.
    """

    name: str
    dump: Callable[[T, BinaryIO], None]
    load: Callable[[BinaryIO], T]
    stage: str | None = None
    repair: str = _REMOVE
    error: type[ScanFastError] = RunError
    grows: bool = False

    @property
    def command(self) -> str:
        """The command that writes the file."""
        return COMMANDS.get(self.stage or "", "run")


def write(
    artifact: Artifact[T], content: T, path: Path, journal: Journal | None = None, *, follow_links: bool = True
) -> None:
    """Write an artifact to a file atomically. With several ranks, rank 0 does.

    Args:
        artifact: the kind of file.
        content: what it is to hold.
        path: the file. Missing folders are created, unless there is a journal.
        journal: takes the digest of a file that does not carry its own; None leaves it without one.
        follow_links: write to what a symbolic link points to; otherwise the link is replaced.

    Raises:
        OSError: if the file cannot be written.
    """

    def dump() -> None:
        with atomic_file(path, make_folders=journal is None, follow_links=follow_links) as file:
            if not (file.readable() and file.seekable()):
                buffer = io.BytesIO()
                _dump(artifact, content, buffer)
                file.write(buffer.getbuffer())
                return
            _dump(artifact, content, file)
            if journal is not None and not is_archive(artifact.name):
                file.seek(0)
                enter(artifact, file.read(), path, journal)

    distributed.on_first(dump)


def _dump(artifact: Artifact[T], content: T, file: BinaryIO) -> None:
    artifact.dump(content, file)
    file.flush()
    if is_archive(artifact.name):
        seal(file)


def enter(artifact: Artifact[Any], content: bytes, path: Path, journal: Journal) -> None:
    """Enter the digest of what a file that does not carry its own is about to hold.

    Raises:
        OSError: if the journal cannot be written.
    """
    if artifact.grows:
        known = journal.known_lines(artifact.name)
        for line in _lines(content):
            if (digest := digest_of(line)) not in known:
                journal.add(artifact.name, digest)
        return
    # A killed process leaves the former file, which therefore stays acceptable, unless it is damaged.
    former = digest_of(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    journal.add(artifact.name, digest_of(content), former if former in journal.known(artifact.name) else None)


def read(artifact: Artifact[T], path: Path, advice: str = "", journal: Journal | None = None) -> T:
    """Read an artifact from a file whose digest is right.

    Args:
        artifact: the kind of file.
        path: the file.
        advice: the end of the message for a damaged file.
        journal: has the digest of a file that does not carry its own; without it, such a file is not compared.

    Raises:
        OSError: if the file cannot be opened.
        ScanFastError: ``artifact.error``, if the content is damaged or of another kind.
    """
    with path.open("rb") as file:
        try:
            return artifact.load(checked(artifact, file, journal))
        except (OSError, MemoryError, MissingPackageError):
            raise
        except Exception as error:  # content that was made on purpose may be anything
            if not isinstance(error, ValueError):
                error = ValueError(f"its content is of another kind ({type(error).__name__})")
            raise artifact.error(problem(path, error, advice)) from error


def problem(path: Path, error: ValueError, advice: str = "") -> str:
    """Return the message for a file that cannot be used."""
    if isinstance(error, UnsealedError):
        target = path if is_archive(path.name) else path.parent
        otherwise = f"; else {advice}" if advice else ""
        advice = f"`scan-fast check {target} --accept` gives it one, if you know that it is right{otherwise}"
    return f"{path} cannot be read: {' '.join(str(error).split())}{advice and f'; {advice}'}"


def checked(artifact: Artifact[Any], file: BinaryIO, journal: Journal | None) -> BinaryIO:
    """Return a file, at its beginning, whose content has the right digest.

    Raises:
        UnsealedError: if there is no digest of it.
        DamagedError: if it has another one.
        OSError: if the file or the journal cannot be read.
    """
    if is_archive(artifact.name):
        check_seal(file)
        return file
    if journal is None:
        return file
    content = file.read()
    if artifact.grows:
        known, lines = journal.known_lines(artifact.name), _lines(content)
        for number, line in enumerate(lines, 1):
            if digest_of(line) not in known:
                raise DamagedError(f"line {number} is not what was written")
        # What was cut short is a part of a line. A whole line with one more byte has another line feed.
        if digest_of(content[sum(map(len, lines)) + len(lines) : -1]) in known:
            raise DamagedError(f"line {len(lines) + 1} is not what was written")
    else:
        found = journal.known(artifact.name)
        if not found:
            raise UnsealedError(f"{JOURNAL} has no digest of it")
        if digest_of(content) not in found:
            raise DamagedError("its content is not what was written")
    return io.BytesIO(content)


def _lines(content: bytes) -> list[bytes]:
    """Return the whole lines of a file that grows; what follows the last line feed was cut short."""
    return content.split(b"\n")[:-1]


# -- codecs of contents that are defined elsewhere ---------------------------------------------------------------------


def _dump_config(config: Config, file: BinaryIO) -> None:
    file.write(config.to_yaml().encode())


def _load_config(file: BinaryIO) -> Config:
    return build_config(parse_yaml(file.read().decode()))


def _dump_decode_cache(cache: DecodeCache, file: BinaryIO) -> None:
    file.write(cache.to_bytes())


def _load_decode_cache(file: BinaryIO) -> DecodeCache:
    return DecodeCache(file.read())


def _dump_bytes(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _load_bytes(file: BinaryIO) -> bytes:
    return file.read()


def _dump_page(page: str, file: BinaryIO) -> None:
    # File names that are not valid text may hold lone surrogates, which UTF-8 cannot express.
    file.write(page.encode("utf-8", errors="replace"))


def _load_page(file: BinaryIO) -> str:
    return file.read().decode()


def _stage_result(stage: str) -> Artifact[StageResult]:
    return Artifact(f"{CHECKPOINTS}/{stage}-final.pt", StageResult.dump, StageResult.load, stage, _REPEAT)


# -- the table ---------------------------------------------------------------------------------------------------------

CONFIG_COPY = Artifact(".config.yaml", _dump_config, _load_config)
"""A second copy of the configuration, because no command can make it again."""
CONFIG = Artifact(
    "config.yaml",
    _dump_config,
    _load_config,
    repair=f"`cp {{folder}}/{CONFIG_COPY.name} {{folder}}/config.yaml` restores it; give changes as key=value words",
)
"""The resolved configuration; ``scan-fast run FOLDER`` reads it."""
SUMMARY = Artifact("summary.json", Summary.dump, Summary.load)
"""Metrics and seconds per finished stage, and the baselines."""
METRICS: Artifact[list[MetricsEntry]] = Artifact("metrics.jsonl", dump_metrics, load_metrics, grows=True)
"""One line per stage and epoch."""

PRECISION = Artifact("precision.json", PrecisionRecord.dump, PrecisionRecord.load)
"""The dtype that ``precision=auto`` stands for, and why."""
ENVIRONMENT = Artifact("environment.json", EnvironmentRecord.dump, EnvironmentRecord.load)
"""Threads, versions, processor and device: what the bits of a run depend on besides its configuration."""
BACKBONE = Artifact("backbone.json", BackboneRecord.dump, BackboneRecord.load)
"""The network, its images and the weights that it starts from, with their digest."""
DECODE_CACHE = Artifact("decode-cache.json", _dump_decode_cache, _load_decode_cache)
"""The files that ``data.on_error=skip`` has found good; only changed ones are decoded again."""
SKIPPED = Artifact("skipped.csv", Skipped.dump, Skipped.load)
"""The images left out as unreadable, with the reason."""
IMAGES = Artifact("images.npz", ImageRecord.dump, ImageRecord.load)
"""Names, fingerprints and labels of the images, so that a run does not continue on others."""

PRETEXT_MODEL = _stage_result("pretext")
"""The trained backbone and projector."""
EMBEDDINGS = Artifact("embeddings.npz", Embeddings.dump, Embeddings.load, "mining", _REPEAT)
"""Unit rows, in the order of the images."""
NEIGHBORS = Artifact("neighbors.npz", Neighbors.dump, Neighbors.load, "mining", _REPEAT)
"""The nearest neighbours of every image."""
SUGGESTION = Artifact("suggested-k.json", SuggestedNumber.dump, SuggestedNumber.load, "number", _REPEAT)
"""The suggested number of groups, with the scores of all numbers that were tried."""
CLUSTER_MODEL = _stage_result("clustering")
"""The best epoch with all heads, and which head is the best."""
SELFLABEL_MODEL = _stage_result("selflabel")
"""The self-labelled model."""

ASSIGNMENTS = Artifact("assignments.csv", Assignments.dump, Assignments.load, repair=_RUN_AGAIN)
"""One row per image: path, cluster, confidence, margin, split and, if known, label."""
ASSIGNMENTS_PARQUET = Artifact(
    "assignments.parquet", Assignments.dump_parquet, Assignments.load_parquet, repair=_RUN_AGAIN
)
"""The same as Parquet, if pyarrow is installed."""
CONFUSION = Artifact("confusion.csv", Confusion.dump, Confusion.load, repair=_RUN_AGAIN)
"""With labels: counts of true classes by assigned classes."""
CONFUSION_FIGURE = Artifact("confusion.png", _dump_bytes, _load_bytes, repair=_RUN_AGAIN)
"""The same as a picture."""
MODEL = Artifact("model.pt", SavedModel.dump, SavedModel.load, repair=_RUN_AGAIN, error=WeightsError)
"""The predictor: ``scan-fast predict``, ``ImageClusterer.load``."""
REPORT = Artifact("report.html", _dump_page, _load_page, repair=_RUN_AGAIN)
"""One page that opens from disk; of more than a few hundred images it needs the folder of its files beside it."""
SINGLE_REPORT = Artifact("report-single.html", _dump_page, _load_page, repair=_REPORT_AGAIN)
"""The same page with thumbnails of at most a few hundred images inside, to be sent as one file."""
REPORT_DATA = Artifact(f"{REPORT_FOLDER}/data.js", _dump_page, _load_page, repair=_REPORT_AGAIN)
"""The data of the page: one entry per image in each column."""
MAP = Artifact("map.npz", ImageMap.dump, ImageMap.load, "mining", repair=_REPORT_AGAIN)
"""The place of each image on the report's map."""
DUPLICATES = Artifact("duplicates.csv", Duplicates.dump, Duplicates.load, repair=_REPORT_AGAIN)
"""Copies among the images, in groups."""
OUTLIERS = Artifact("outliers.csv", Outliers.dump, Outliers.load, repair=_REPORT_AGAIN)
"""Images that are far from their neighbours."""
NAMES = Artifact("names.json", GroupNames.dump, GroupNames.load, repair="remove it, and name the groups again")
"""The names that a user gave to groups: written by ``scan-fast name`` and never removed by a run."""


SWEEP = Artifact("sweep.json", dump_json, load_json)
"""In the folder that holds the runs of a sweep: mean, deviation and best of their results."""
ABLATION = Artifact("ablation.json", dump_json, load_json)
"""In the folder that holds the runs of an ablation: the results of every variant."""
ABLATION_TABLE = Artifact("ablation.csv", VariantTable.dump, VariantTable.load)
"""The same as a table, one row for each variant."""

AT_START: tuple[Artifact[Any], ...] = (PRECISION, ENVIRONMENT, BACKBONE, DECODE_CACHE, SKIPPED, IMAGES)
"""Written before the first stage: a folder that holds nothing else has no results to protect."""
OF_STAGES: tuple[Artifact[Any], ...] = (
    *(PRETEXT_MODEL, EMBEDDINGS, NEIGHBORS),
    *(SUGGESTION, CLUSTER_MODEL, SELFLABEL_MODEL),
)
"""Written by the stages: repeating a stage removes its own and those of later stages."""
AT_END: tuple[Artifact[Any], ...] = (ASSIGNMENTS, CONFUSION, CONFUSION_FIGURE, MODEL, REPORT)
"""Written after the last stage: repeating any stage removes them."""
BESIDE_REPORT: tuple[Artifact[Any], ...] = (
    ASSIGNMENTS_PARQUET,
    SINGLE_REPORT,
    REPORT_DATA,
    MAP,
    DUPLICATES,
    OUTLIERS,
)
"""Written after the last stage, some only if they are asked for or possible. Repeating any stage removes them, but the
map stays as long as the stage that its images' embeddings come from is not repeated."""


def checkpoint(stage: str) -> Artifact[Checkpoint]:
    """Return the checkpoint of a learned stage that is training."""
    return Artifact(f"{CHECKPOINTS}/{stage}.pt", Checkpoint.dump, Checkpoint.load, stage)


def former_names(number: int) -> Artifact[GroupNames]:
    """Return where the names of a former grouping are kept, from 1."""
    return Artifact(f"names-former-{number}.json", GroupNames.dump, GroupNames.load)


def all_artifacts() -> list[Artifact[Any]]:
    """Return every kind of file of a run folder, but for the former names of groups."""
    stages = [stage for stage in COMMANDS if stage not in ("mining", "number")]
    own: list[Artifact[Any]] = [CONFIG, CONFIG_COPY, SUMMARY, METRICS, NAMES]
    return [*own, *AT_START, *OF_STAGES, *AT_END, *BESIDE_REPORT, *(checkpoint(stage) for stage in stages)]
