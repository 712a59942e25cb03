"""The folder of a run: a lock, and atomic writing and reading of the artifacts in it.

With several ranks, rank 0 alone reads and writes, and tells the others what it has found. So the folder need not be on
a disk that all machines share, and no two ranks see it in different states. All ranks must call the same methods.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from .. import distributed
from ..atomic import is_leftover, link_or_copy, open_to_append, remove_leftovers
from ..data.decode_cache import DecodeCache
from ..errors import RunError
from . import artifacts
from .artifacts import BACKBONE, CONFIG, CONFIG_COPY, ENVIRONMENT, METRICS, SUGGESTION, SUMMARY, Artifact
from .config import Config, differences
from .digests import JOURNAL, Journal, is_archive
from .environment import CHANGED
from .records import MetricsEntry, Summary
from .tables import Assignments

try:
    import fcntl
except ImportError:  # Windows: no advisory locks
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_LOCK = ".lock"
_TENSORBOARD = "tensorboard"


def _by_rank_0(method: F) -> F:
    """Let rank 0 do what a method does, and return its result on all ranks."""

    @functools.wraps(method)
    def on_first(*arguments: Any, **named: Any) -> Any:
        return distributed.on_first(lambda: method(*arguments, **named))

    return on_first  # type: ignore[return-value]


def _no_lock(path: Path) -> RunError:
    return RunError(f"{path} is no regular file, so it cannot be locked; remove it, and the same command continues")


class RunFolder:
    """One experiment on disk. As a context manager it holds a lock: one process at a time may write."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self.journal = Journal(self.path)
        self.images: dict[str, Any] | None = None
        """Number and digest of the images, once they are checked; they go to summary.json."""
        self.images_digest: str | None = None
        """The digest that results of stages carry, once the images are checked."""
        self.changes: tuple[str, ...] = ()
        """Differences between the environment of this process and that of the start of the run, in words."""
        self._config: Config | None = None
        self._lock: int | None = None
        self._folder: int | None = None

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path, config: Config) -> RunFolder:
        """Return the folder for ``config``: a new one, or that of the same experiment. Entering it writes config.yaml.

        A folder without results takes any configuration, so that a first mistake can be corrected.

        Raises:
            RunError: if it belongs to another experiment (with the differences) or to no experiment.
        """
        run = cls(path)
        run._config = config
        run._check_fits(config)
        return run

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open a folder that a run has made.

        Raises:
            RunError: if there is none.
        """
        run = cls(path)
        if not run.has(CONFIG):
            raise RunError(f"{run.path} is no run folder (it has no {CONFIG.name}); give the folder that a run printed")
        return run

    @_by_rank_0
    def _check_fits(self, config: Config) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another --out")
        entries = list(self.path.iterdir()) if self.path.is_dir() else []
        # A process that was killed or refused before its first stage leaves no results.
        harmless = {_LOCK, JOURNAL, CONFIG_COPY.name, _TENSORBOARD, *(artifact.name for artifact in artifacts.AT_START)}
        content = {entry.name for entry in entries if entry.name not in harmless and not is_leftover(entry)}
        if content and CONFIG.name not in content:
            raise RunError(f"{self.path} is not empty and is no run folder; choose another --out")
        changed = differences(self.read(CONFIG), config) if content > {CONFIG.name} else []
        if changed:
            raise RunError(
                f"{self.path} holds another experiment ({'; '.join(changed)}); "
                "undo the change, or choose another folder with --out"
            )

    def __enter__(self) -> RunFolder:
        distributed.on_first(self._open)
        return self

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._take_lock()
            for folder in (self.path, self.path / artifacts.CHECKPOINTS, self.path / artifacts.REPORT_FOLDER):
                remove_leftovers(folder)
            self.journal.shorten((METRICS.name,))
            if self._config is not None:
                self._check_fits(self._config)  # another process may have come first
                self.write(CONFIG, self._config)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        # Whatever lies there under this name: it is not followed, waited for, or cut to nothing.
        path = self.path / _LOCK
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise _no_lock(path) from error
            raise
        if not stat.S_ISREG(os.fstat(self._lock).st_mode):
            raise _no_lock(path)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise RunError(f"{self.path} is in use by another scan-fast process") from error
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in (self._lock, self._folder):
            if handle is not None:
                os.close(handle)
        self._lock = self._folder = None

    def _check_there(self) -> None:
        """Refuse to write if the folder was removed or replaced since it was opened."""
        if self._folder is None:
            return
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except FileNotFoundError:
            same = False
        if not same:
            raise RunError(
                f"{self.path} was removed or replaced while the run went on, so nothing more is written; put it back, "
                "and the same command continues"
            )

    # -- artifacts -------------------------------------------------------------------------------------------------

    def path_of(self, artifact: Artifact[Any]) -> Path:
        """Return the path of an artifact, whether or not it is there."""
        return self.path / artifact.name

    @_by_rank_0
    def has(self, artifact: Artifact[Any]) -> bool:
        """Return whether an artifact is there."""
        return self.path_of(artifact).is_file()

    @_by_rank_0
    def read(self, artifact: Artifact[T]) -> T:
        """Read an artifact.

        Raises:
            RunError: if it is missing or damaged; the message says what to do.
            OSError: if it cannot be opened.
        """
        if not self.has(artifact):
            raise self._missing(artifact)
        return artifacts.read(artifact, self.path_of(artifact), self.repair_of(artifact), self.journal)

    @_by_rank_0
    def require(self, artifact: Artifact[Any]) -> None:
        """Check that an artifact is there and that its stage is finished.

        Raises:
            RunError: names what is missing and the command that writes it.
        """
        if not self.has(artifact) or (artifact.stage is not None and not self.finished(artifact.stage)):
            raise self._missing(artifact)

    def _missing(self, artifact: Artifact[Any]) -> RunError:
        if artifact.stage is not None and self.has(CONFIG):
            why = self.read(CONFIG).why_without(artifact.stage)
            if why is not None:
                return RunError(f"{self.path} has no {artifact.name} and no {artifact.stage} stage ({why})")
        return RunError(f"{self.path} has no {artifact.name}; run `scan-fast {artifact.command} {self.path}` first")

    @_by_rank_0
    def write(self, artifact: Artifact[T], content: T) -> Path:
        """Write an artifact atomically and return its path.

        Raises:
            RunError: if the folder is no longer there.
            OSError: if it cannot be written.
        """
        path = self._place(artifact)
        if artifact.name == CONFIG.name:
            copy: Artifact[Any] = CONFIG_COPY
            artifacts.write(copy, content, self.path_of(copy), self.journal, follow_links=False)
        artifacts.write(artifact, content, path, self.journal, follow_links=False)
        return path

    def _place(self, artifact: Artifact[Any]) -> Path:
        """Return the path of an artifact that is about to be written; the folders around it are there."""
        self._check_there()
        path = self.path_of(artifact)
        path.parent.mkdir(parents=self._folder is None, exist_ok=True)
        return path

    @_by_rank_0
    def take(self, artifact: Artifact[T], source: RunFolder) -> None:
        """Give an artifact of another run a second name here: a hard link, or a copy.

        Raises:
            RunError: if it is missing or damaged there.
            OSError: if it cannot be read or written.
        """
        path, theirs = self._place(artifact), source.path_of(artifact)
        source.check(artifact)
        if not is_archive(artifact.name):
            artifacts.enter(artifact, theirs.read_bytes(), path, self.journal)
        link_or_copy(theirs, path)

    @_by_rank_0
    def check(self, artifact: Artifact[Any]) -> None:
        """Compare an artifact with its digest.

        Raises:
            RunError: if it is missing, damaged or without a digest; the message says what to do.
            OSError: if it cannot be opened.
        """
        if not self.has(artifact):
            raise self._missing(artifact)
        path = self.path_of(artifact)
        with path.open("rb") as file:
            try:
                artifacts.checked(artifact, file, self.journal)
            except ValueError as error:
                raise RunError(artifacts.problem(path, error, self.repair_of(artifact))) from error

    def repair_of(self, artifact: Artifact[Any]) -> str:
        """Return what to do about an artifact that cannot be used, in words."""
        return artifact.repair.format(command=artifact.command, folder=self.path)

    @_by_rank_0
    def decode_cache(self) -> DecodeCache:
        """Return what earlier starts have found out about the images, nothing if they have left no record.

        A damaged decode-cache.json counts as none, as it only saves time.
        """
        try:
            found = self.read(artifacts.DECODE_CACHE) if self.has(artifacts.DECODE_CACHE) else DecodeCache()
        except RunError:
            found = DecodeCache()
        found.marks = self.read(artifacts.IMAGES).marks if self.has(artifacts.IMAGES) else None
        return found

    @_by_rank_0
    def group_names(self, assignments: Assignments) -> dict[int, str]:
        """Return the names of the groups, none if there are none or they were given to another grouping.

        Raises:
            RunError: if names.json is damaged.
        """
        if not self.has(artifacts.NAMES):
            return {}
        known = self.read(artifacts.NAMES)
        return dict(known.names) if known.assignments == assignments.digest else {}

    @_by_rank_0
    def write_assignments(self, assignments: Assignments) -> None:
        """Write assignments.csv, and assignments.parquet if pyarrow is installed, with the names of the groups.

        Raises:
            OSError: if a file cannot be written.
        """
        table = replace(assignments, names=self.group_names(assignments))
        if find_spec("pyarrow") is not None:
            self.write(artifacts.ASSIGNMENTS_PARQUET, table)
        self.write(artifacts.ASSIGNMENTS, table)  # last: if it is there, both are

    @_by_rank_0
    def set_names_aside(self, assignments: Assignments) -> Path | None:
        """Rename names.json if its names were given to another grouping; return its new path."""
        if not self.has(artifacts.NAMES) or self.read(artifacts.NAMES).assignments == assignments.digest:
            return None
        numbers = itertools.count(1)
        aside = next(a for n in numbers if not self.has(a := artifacts.former_names(n)))
        names, place = self.path_of(artifacts.NAMES), self._place(aside)
        artifacts.enter(aside, names.read_bytes(), place, self.journal)
        return names.rename(place)

    @_by_rank_0
    def remove(self, *removed: Artifact[Any]) -> None:
        """Remove artifacts if they are there."""
        for artifact in removed:
            self.path_of(artifact).unlink(missing_ok=True)

    @property
    def n_clusters(self) -> int | None:
        """The number of clusters that the configuration gives or the run has suggested; None if classes decide."""
        wanted = self.read(CONFIG).clustering.n_clusters
        if isinstance(wanted, int):
            return wanted
        return self.read(SUGGESTION).k if self.has(SUGGESTION) else None

    def n_groups(self, table: Assignments) -> int:
        """Return the number of groups of a grouping; the last ones may be empty."""
        return max(int(table.clusters.max(initial=-1)) + 1, self.n_clusters or 0)

    # -- metrics ---------------------------------------------------------------------------------------------------

    @_by_rank_0
    def metrics(self) -> list[MetricsEntry]:
        """Return the entries of metrics.jsonl, none if it is missing."""
        return self.read(METRICS) if self.has(METRICS) else []

    @_by_rank_0
    def append_metrics(self, entry: MetricsEntry) -> None:
        """Append one line to metrics.jsonl. A crash may cut it short; readers then leave it out."""
        path, line = self._place(METRICS), entry.to_line().encode()
        artifacts.enter(METRICS, line, path, self.journal)
        with open_to_append(path) as file:
            file.write(line)

    @_by_rank_0
    def drop_metrics(self, stage: str, first_epoch: int) -> None:
        """Remove the metrics of a stage from an epoch on, and lines that were cut short."""
        if not self.has(METRICS):
            return
        kept = [entry for entry in self.metrics() if entry.stage != stage or entry.epoch < first_epoch]
        if "".join(entry.to_line() for entry in kept).encode() != self.path_of(METRICS).read_bytes():
            self.write(METRICS, kept)

    # -- stages ----------------------------------------------------------------------------------------------------

    @_by_rank_0
    def summary(self) -> Summary:
        """Return the content of summary.json, an empty one if it is missing."""
        return self.read(SUMMARY) if self.has(SUMMARY) else Summary()

    @_by_rank_0
    def finished(self, stage: str) -> bool:
        """Return whether a stage has been entered into summary.json."""
        return stage in self.summary().stages

    @_by_rank_0
    def has_results(self) -> bool:
        """Return whether a stage has finished or left a checkpoint."""
        return bool(self.summary().stages) or any((self.path / artifacts.CHECKPOINTS).glob("*.pt"))

    @_by_rank_0
    def begin_stage(self) -> None:
        """Note in environment.json if this process computes with something else than the start of the run did."""
        self._note_changes(self._environment_changes())

    def _environment_changes(self) -> list[str]:
        """Return the changes under which the stage at work has been computed, in words."""
        before = self.read(ENVIRONMENT).changes if self.has(ENVIRONMENT) else ()
        return list(dict.fromkeys((*before, *self.changes)))

    def _note_changes(self, changes: list[str]) -> None:
        if self.has(ENVIRONMENT) and (record := self.read(ENVIRONMENT)).changes != tuple(changes):
            self.write(ENVIRONMENT, replace(record, changes=tuple(changes)))

    @_by_rank_0
    def finish_stage(self, stage: str, seconds: float, results: Mapping[str, Any], seed: int) -> None:
        """Enter a finished stage into summary.json."""
        summary = self.summary()
        summary.seed = seed
        if self.has(BACKBONE):
            summary.backbone = asdict(self.read(BACKBONE))
        summary.images = self.images or summary.images
        changes = self._environment_changes()
        summary.stages[stage] = {"seconds": round(seconds, 3), **results, **({CHANGED: changes} if changes else {})}
        self.write(SUMMARY, summary)
        self._note_changes([])

    @_by_rank_0
    def forget(self, stages: Iterable[str]) -> None:
        """Remove the artifacts of stages, and those that follow the last stage, so that they are made again."""
        names = list(stages)
        self._note_changes([])
        summary = self.summary()
        summary.stages = {name: entry for name, entry in summary.stages.items() if name not in names}
        summary.baselines = None
        # In this order a kill leaves no finished stage without its artifacts, and no checkpoint from which a stage
        # would continue that should start over.
        for name in names:
            self.remove(artifacts.checkpoint(name))
        self.write(SUMMARY, summary)
        for name in names:
            self.drop_metrics(name, 0)
            self.remove(*(artifact for artifact in artifacts.OF_STAGES if artifact.stage == name))
        self.remove(*artifacts.AT_END, *(a for a in artifacts.BESIDE_REPORT if a.stage is None or a.stage in names))
