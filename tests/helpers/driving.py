"""Runs the command line in this process or in one that can be killed, and compares run folders bit by bit."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from PIL import Image

import scan_fast
from scan_fast.cli import main
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.digests import Journal, digest_of, seal
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.runs.verification import accept
from scan_fast.training.context import Context, open_context

TINY = (
    "model.width=0.25",
    "data.limit=160",
    "pretext.epochs=2",
    "pretext.batch_size=64",
    "pretext.method.temperature=0.2",
    "pretext.optimizer.lr=0.002",
    "mining.k=5",
    "clustering.epochs=2",
    "clustering.batch_size=64",
    "clustering.heads=2",
    "clustering.objective.entropy_weight=5",
    "clustering.objective.prior=uniform",
    "clustering.initialize=random",
    "selflabel.epochs=2",
    "selflabel.batch_size=64",
    "selflabel.threshold=0.1",
    "selflabel.ema=0.9",
    "evaluation.baselines=false",
    "evaluation.thumbnails=0",
    "evaluation.map=false",
    "precision=float32",
    "runtime.threads=1",
    "runtime.device=cpu",  # the same bits again are promised there
)
"""Digits in a second: 160 images, two steps an epoch, two epochs a stage; and what tests count on."""

TINY_FOLDER = (
    "model.backbone=resnet_digits",
    "model.width=0.25",
    "data.image_size=16",
    "data.workers=2",
    "pretext.epochs=1",
    "pretext.batch_size=16",
    "mining.k=3",
    "clustering.epochs=1",
    "clustering.batch_size=16",
    "clustering.heads=2",
    "clustering.view.cutout=4",
    "selflabel.epochs=1",
    "selflabel.batch_size=16",
    "selflabel.view.cutout=4",
    "precision=float32",
    "runtime.threads=1",
    "runtime.device=cpu",  # the same bits again are promised there
)
"""The same for small folders of images."""


def left_out(words: Sequence[str], *beginnings: str) -> list[str]:
    """Return the words without those that begin like this, as a setting that has no effect is refused."""
    return [word for word in words if not word.startswith(beginnings)]


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """Check that the command refused as every command must: code 2 and one line on standard error; return it."""
        assert self.code == 2, (self.code, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("scan-fast: "), self.err
        return lines[0]


def run_here(*words: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def tiny_config(*overrides: str) -> Config:
    """Return the tiny digits configuration with changes."""
    return load_config(find_config("digits"), [*TINY, *overrides])


# -- processes ---------------------------------------------------------------------------------------------------------

# A server that has imported everything forks the processes, so each starts in a moment; what is killed is real.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["driving", "scan_fast.stages.pipeline", "sklearn.cluster", "sklearn.datasets"])


def _start_server() -> None:
    # It imports by its own search path, whatever folder the tests are in.
    folders = [str(Path(__file__).parent), str(Path(scan_fast.__file__).parents[1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        forkserver.ensure_running()


def rank_results() -> Any:
    """Return a queue that takes the answers of processes of :func:`rank_process`."""
    _start_server()
    return _processes.SimpleQueue()


def rank_process(function: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """Return a process, not yet started, that calls a function; one thread computes in it."""
    return _processes.Process(target=_call, args=(function, arguments))


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may hold objects of Python, and an interpreter that ends meanwhile aborts.
    os._exit(0)


@dataclass
class Death:
    """Kill the process at the ``at``-th renaming of a file (from 1), before or after it; ``name`` counts one only.

    Another signal than SIGKILL is sent once.
    """

    at: int
    before: bool = False
    name: str | None = None
    signal: int = signal.SIGKILL


class Arrangement(Protocol):
    """What changes a process before its command begins."""

    def arrange(self) -> None:
        """Change this process."""


def _child(words: Sequence[str], log: str, death: Death | Arrangement | None, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if death is not None:
        # A shell starts jobs in the background with interrupts ignored, and their children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if isinstance(death, Death):
            _arrange(death)
        else:
            death.arrange()
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arrange(death: Death) -> None:
    replace, seen = os.replace, 0

    def deadly(source: Any, target: Any) -> None:
        nonlocal seen
        counts = death.name is None or Path(target).name == death.name
        seen += counts
        due = counts and seen == death.at
        if not (due and death.before):
            replace(source, target)
        if due:
            os.kill(os.getpid(), death.signal)

    os.replace = deadly  # type: ignore[assignment]


class Process:
    """A command in a process of its own, with these environment variables besides those that it inherits."""

    def __init__(
        self,
        *words: object,
        log: Path,
        death: Death | Arrangement | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        _start_server()
        self._log = log
        arguments = ([str(word) for word in words], str(log), death, environment or {})
        self.process = _processes.Process(target=_child, args=arguments)
        self.process.start()

    def signal(self, number: int) -> None:
        """Send a signal; a command that has just ended by itself gets none."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def result(self, timeout: float = 120) -> Result:
        """Wait for the end; a negative code is the signal that ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the command still runs after {timeout} s")
        texts = [Path(f"{self._log}.{ending}").read_text() for ending in ("out", "err")]
        code = self.process.exitcode
        assert code is not None
        return Result(code, *texts)


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    """Return once a condition holds; it must within some seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# -- what is in a run folder -------------------------------------------------------------------------------------------


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's shape, type and bits."""
    array = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{array.dtype}{tuple(array.shape)}".encode() + array.numpy().tobytes()).hexdigest()


def weights(path: Path) -> dict[str, str]:
    """Return the hash of each tensor in a file, by its place in it."""
    found: dict[str, str] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = tensor_hash(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, f"{name}.{key}")

    visit(torch.load(path, weights_only=True), path.name)
    assert found
    return found


def results(folder: Path) -> dict[str, Any]:
    """Return all that two equal runs must agree in: weights, embeddings, neighbours, assignments, metrics but times."""
    facts: dict[str, Any] = {}
    for path in [folder / "model.pt", *sorted(folder.glob("checkpoints/*-final.pt"))]:
        facts |= weights(path)
    for name in ("embeddings.npz", "neighbors.npz"):
        with np.load(folder / name) as file:
            for key in file.files:
                array = file[key]
                text = array.dtype.kind == "U"
                facts[f"{name}.{key}"] = str(array) if text else tensor_hash(torch.from_numpy(array))
    facts["assignments.csv"] = (folder / "assignments.csv").read_text()
    facts["metrics.jsonl"] = [{k: v for k, v in entry.items() if k != "time"} for entry in metrics(folder)]
    facts["summary.json"] = without_seconds(summary(folder))
    return facts


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, each of which must be whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    """Return summary.json."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def without_seconds(value: Any) -> Any:
    """Return nested values without the times."""
    if isinstance(value, list):
        return [without_seconds(inner) for inner in value]
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return value


def assignments(folder: Path) -> list[dict[str, str]]:
    """Return the rows of assignments.csv."""
    with (folder / "assignments.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time of change and content of every file but those that each command renews."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "config.yaml", ".config.yaml", "digests.txt")
    }


def save_sealed(content: Any, path: Path) -> None:
    """Write a file of torch.save whose digest is right, whatever it holds."""
    with path.open("w+b") as file:
        torch.save(content, file)
        seal(file)


def write_known(folder: Path, name: str, text: str) -> None:
    """Write a text file of a run folder and its digest, whatever it holds."""
    (folder / name).write_text(text)
    Journal(folder).add(name, digest_of(text.encode()))


def accept_files(folder: Path) -> None:
    """Give digests to the files of a run folder that a test has written itself."""
    accept(RunFolder(folder))


# -- images ------------------------------------------------------------------------------------------------------------


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (20, 20)) -> Image.Image:
    """Return an image of one of three kinds of texture, in any mode."""
    generator = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    wave = (np.sin(x / 2), np.sin(y / 2), np.sin((x + y) / 3))[seed % 3]
    grey = np.clip(128 + 90 * wave + generator.normal(0, 10, wave.shape), 0, 255)
    colour = np.stack([grey, np.roll(grey, 2, axis=0), 255 - grey], axis=-1).astype(np.uint8)
    return Image.fromarray(colour).convert(mode)


def fill(folder: Path, count: int, first: int = 0, make: Callable[[int], Image.Image] = picture) -> None:
    """Write images first, first + 1, ... as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        make(number).save(folder / f"{number:03d}.png")


@contextmanager
def opened(path: Path, *overrides: str, again: bool = False) -> Iterator[Context]:
    """Open a tiny run on digits; ``again`` takes another configuration than the folder's."""
    config = tiny_config(*overrides)
    run = RunFolder(path) if again else RunFolder.open(path, config)
    with run:
        yield open_context(config, run, Tracker(run, quiet=True))
