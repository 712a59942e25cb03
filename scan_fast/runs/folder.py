"""The run folder: every file is written beside its final name and renamed, so a kill or a full disk loses nothing.

Layout::

    config.yaml      the resolved configuration          metrics.jsonl    one line per stage and epoch
    summary.json     metrics and seconds per stage       checkpoints/     <stage>.pt while training, <stage>-final.pt
    embeddings.npz   train, test: (N, D) float32         neighbors.npz    train, test: (N, k) int64; *_similarity
    assignments.csv  one row per image                   confusion.*      with labels: figure and CSV
    model.pt         the predictor                       report.html      one file, opens from disk
    skipped.csv      images left out as unreadable       precision.json   what precision=auto came to, and why
    decode-cache.json   the files that need not be decoded again to know that they are good
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import numpy as np
import torch

from ..atomic import remove_leftovers, write_bytes
from ..errors import ConfigError, RunError
from . import artifacts
from .artifacts import Artifact
from .config import Config, build_config, differences

try:
    import fcntl
except ImportError:  # Windows: no advisory locks
    fcntl = None  # type: ignore[assignment]


T = TypeVar("T")

PRECISION_FILE = "precision.json"
DECODE_CACHE_FILE = "decode-cache.json"

_WRITTEN_BY = {
    "checkpoints/pretext-final.pt": "pretext",
    "embeddings.npz": "mine",
    "neighbors.npz": "mine",
    "checkpoints/clustering-final.pt": "cluster",
    "checkpoints/selflabel-final.pt": "selflabel",
}
"""The command that makes each finished result."""


class RunFolder:
    """One experiment on disk. Use as a context manager: it holds a lock, so that two processes never share it."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self._config: Config | None = None
        self._lock: TextIO | None = None

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path, config: Config) -> RunFolder:
        """Return the folder for ``config``: a new one, or that of the same experiment. Entering it writes config.yaml.

        A folder in which nothing has been computed yet takes any configuration, so that a first mistake can be mended.

        Raises:
            RunError: if it belongs to another experiment (with the differences) or to no experiment.
        """
        run = cls(path)
        run._config = config
        run._check_fits(config)
        return run

    def _check_fits(self, config: Config) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another --out")
        content = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        # What a process that was killed or refused at its very beginning has left behind does not count.
        content -= {
            ".lock",
            "skipped.csv",
            "tensorboard",
            PRECISION_FILE,
            DECODE_CACHE_FILE,
            *(name for name in content if name.startswith(".") and name.endswith(".tmp")),
        }
        if "config.yaml" not in content and content:
            raise RunError(f"{self.path} is not empty and is no run folder; choose another --out")
        changed = differences(self.config(), config) if content > {"config.yaml"} else []
        if changed:
            raise RunError(
                f"{self.path} holds another experiment ({'; '.join(changed)}); "
                "undo the change, or choose another folder with --out"
            )

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open a folder that a run has made.

        Raises:
            RunError: if there is none.
        """
        run = cls(path)
        if not run.has("config.yaml"):
            raise RunError(f"{run.path} is no run folder (it has no config.yaml); give the folder that a run printed")
        return run

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            handle = (self.path / ".lock").open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.close()
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise RunError(f"{self.path} is in use by another scan-fast process") from error
                raise
            self._lock = handle
        for folder in (self.path, self.path / artifacts.CHECKPOINTS):
            remove_leftovers(folder)
        if self._config is not None:
            try:
                self._check_fits(self._config)  # another process may have come first
                self.write_text("config.yaml", self._config.to_yaml())
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- reading ---------------------------------------------------------------------------------------------------

    def path_of(self, artifact: Artifact[Any]) -> Path:
        """Return the path of an artifact, whether or not it is there."""
        return self.path / artifact.name

    def has(self, name: str | Artifact[Any]) -> bool:
        """Return whether a file of that name is there."""
        return (self.path / (name if isinstance(name, str) else name.name)).is_file()

    def read(self, artifact: Artifact[T]) -> T:
        """Read an artifact.

        Raises:
            RunError: if it is missing or damaged; the message says what to do.
            OSError: if it cannot be opened.
        """
        if not self.has(artifact):
            raise RunError(f"{self.path} has no {artifact.name}; run `scan-fast {artifact.command} {self.path}` first")
        advice = artifact.repair.format(command=artifact.command, folder=self.path)
        return artifacts.read(artifact, self.path_of(artifact), advice)

    def write(self, artifact: Artifact[T], content: T) -> Path:
        """Write an artifact atomically and return its path.

        Raises:
            OSError: if it cannot be written.
        """
        path = self.path_of(artifact)
        artifacts.write(artifact, content, path)
        return path

    def config(self) -> Config:
        """Read the resolved configuration."""
        import yaml

        try:
            return build_config(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (ConfigError, yaml.YAMLError) as error:
            raise RunError(f"{self.path / 'config.yaml'} cannot be read: {error}") from error

    def summary(self) -> dict[str, Any]:
        """Read summary.json, or start one."""
        if not self.has("summary.json"):
            return {"seed": None, "stages": {}, "seconds": 0.0}
        return self.read_json("summary.json")

    def read_bytes(self, name: str) -> bytes:
        """Read a file as it is."""
        return (self.path / name).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file.

        Raises:
            RunError: if it is damaged; the message says what to do.
        """
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._damaged(name, error) from error
        return content

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read an .npz file.

        Raises:
            RunError: if it is damaged; the message says what to do.
        """
        try:
            with np.load(self.path / name) as file:
                return {key: file[key] for key in file.files}
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # zipfile and NumPy raise BadZipFile, EOFError, ValueError and more
            raise self._damaged(name, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line that a kill cut short is left out."""
        entries = []
        if self.has("metrics.jsonl"):
            for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return entries

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Read a file that :meth:`save` wrote.

        Raises:
            RunError: if it is damaged; the message says what to do.
        """
        try:
            state: dict[str, Any] = torch.load(self.path / name, map_location=device, weights_only=True)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError and more
            raise self._damaged(name, error) from error
        return state

    def _damaged(self, name: str, error: Exception) -> RunError:
        """Return the error for a file whose content is broken, as a failing disk leaves it."""
        stage = _WRITTEN_BY.get(name)
        if stage is None:
            advice = "remove it, and the same command goes on from what else there is"
        else:
            advice = f"repeat what wrote it: scan-fast {stage} {self.path} --again"
        return RunError(f"{self.path / name} is damaged ({type(error).__name__}); {advice}")

    # -- writing ---------------------------------------------------------------------------------------------------

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file atomically: all of it is on disk under its name, or the former one still is."""
        target = self.path / name
        write_bytes(target, content)
        return target

    def write_text(self, name: str, content: str) -> Path:
        """Write a text file atomically."""
        return self.write_bytes(name, content.encode())

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file atomically."""
        return self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_arrays(self, name: str, **arrays: np.ndarray) -> Path:
        """Write an .npz file atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return self.write_bytes(name, buffer.getvalue())

    def save(self, name: str, state: Mapping[str, Any]) -> Path:
        """Write tensors and plain values atomically, readable with ``torch.load(weights_only=True)``."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        return self.write_bytes(name, buffer.getvalue())

    def remove(self, *names: str) -> None:
        """Remove files where they are there."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def drop_metrics(self, stage: str, first_epoch: int) -> None:
        """Forget a stage's metrics from an epoch on: the stage is about to do these epochs again."""
        if not self.has("metrics.jsonl"):
            return
        kept = [e for e in self.metrics() if e.get("stage") != stage or e.get("epoch", -1) < first_epoch]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        if text != (self.path / "metrics.jsonl").read_text(encoding="utf-8"):
            self.write_text("metrics.jsonl", text)

    def finish_stage(self, stage: str, seconds: float, results: Mapping[str, Any], seed: int) -> None:
        """Enter a finished stage into summary.json."""
        summary = self.summary()
        summary["seed"] = seed
        summary["stages"][stage] = {"seconds": round(seconds, 3), **results}
        summary["seconds"] = round(sum(entry["seconds"] for entry in summary["stages"].values()), 3)
        self.write_json("summary.json", summary)

    def finished(self, stage: str) -> bool:
        """Return whether a stage has been entered into summary.json."""
        return stage in self.summary()["stages"]
