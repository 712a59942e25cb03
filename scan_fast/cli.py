"""The command line: ``scan-fast run configs/cifar10.yaml``, ``scan-fast run --data my_photos --clusters 12``."""

from __future__ import annotations

import argparse
import errno
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__, commands
from .errors import ScanFastError

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")

IMAGES = "a folder of images, or PREFIX:ARGUMENT as in data.source, such as webdataset:SHARDS"

EXIT_DEFECT, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

DEFECT = (
    "this is a defect of scan-fast and no mistake of yours; please report it to the project's issue tracker, with the "
    "command, the lines above and the output of `scan-fast info`"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"scan-fast: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="scan-fast", description="Group images without labels: SimCLR, neighbour mining, SCAN, self-labelling."
    )
    parser.add_argument("--version", action="version", version=f"scan-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    stages = {
        "run": ((), "all stages: images in, clusters, a predictor and a report out; an unfinished run continues"),
        "pretext": (("pretext",), "stage one: learn a representation without labels (SimCLR)"),
        "mine": (("mining",), "find the nearest neighbours of every image"),
        "cluster": (("clustering",), "stage two: train the cluster heads (SCAN loss)"),
        "selflabel": (("selflabel",), "stage three: learn from confident images"),
    }
    for name, (names, text) in stages.items():
        sub = command(name, commands.train, f"{text}; section.key=value words change the configuration")
        sub.set_defaults(stages=names)
        sub.add_argument(
            "target",
            nargs="?",
            help="a configuration (YAML file or the name of a shipped one) or an existing run folder",
        )
        sub.set_defaults(overrides=[])
        sub.add_argument("--data", metavar="IMAGES", help=f"{IMAGES}, instead of a configuration")
        sub.add_argument("--clusters", type=int, metavar="K", help="the number of groups (clustering.n_clusters)")
        sub.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME)")
        sub.add_argument("--again", action="store_true", help="repeat this stage and those after it")
        sub.add_argument("--quiet", action="store_true", help="print errors only")

    sub = command("evaluate", commands.evaluate, "measure every finished stage of a run, and k-means for comparison")
    sub.add_argument("target", type=Path, help="a run folder")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")

    sub = command("predict", commands.predict, "assign new images to the clusters of a run (CSV)")
    sub.add_argument("target", type=Path, help="a finished run folder or its model.pt")
    sub.add_argument("--data", required=True, metavar="IMAGES", help=IMAGES)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the CSV file (default: standard output)")
    sub.add_argument("--device", default="auto")

    sub = command("embed", commands.embed, "write the feature vectors of images (.npz with features and paths)")
    sub.add_argument("target", type=Path, help="a finished run folder or its model.pt")
    sub.add_argument("--data", required=True, metavar="IMAGES", help=IMAGES)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file")
    sub.add_argument("--device", default="auto")

    sub = command("export", commands.export, "write a model that runs without this package")
    sub.add_argument("target", type=Path, help="a finished run folder or its model.pt")
    sub.add_argument("--format", choices=("pt2", "onnx"), default="pt2", help="torch.export or ONNX (default: pt2)")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")

    sub = command("report", commands.report, "write report.html of a finished run again")
    sub.add_argument("target", type=Path, help="a run folder")
    sub.add_argument("--thumbnails", type=int, metavar="N", help="how many images get one (evaluation.thumbnails)")
    sub.add_argument("--single-file", action="store_true", help="write report-single.html, one file that can be sent")

    sub = command("name", commands.name, 'give groups names: scan-fast name RUN 3 "red shoes" 5 boots')
    sub.add_argument("target", type=Path, help="a run folder")
    sub.add_argument("names", nargs="*", metavar="GROUP NAME", help="pairs of a group's number and its name")
    sub.add_argument("--list", action="store_true", help="print the names")
    sub.add_argument("--clear", action="store_true", help="remove the names of the groups given, or all names")

    sub = command("folders", commands.folders, "one folder per group, with links to the images or copies of them")
    sub.add_argument("target", type=Path, help="a run folder")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, outside that of the images")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--link", action="store_true", help="symbolic links, or hard links, or else copies (the default)")
    how.add_argument("--copy", action="store_true", help="copies")

    sub = command("sweep", commands.sweep, "the same run with several seeds: mean and standard deviation")
    sub.add_argument("target", help="a configuration")
    sub.set_defaults(overrides=[])
    sub.add_argument("--seeds", default="0-2", help="such as 0-9 or 0,3,7 (default: %(default)s)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="holds one run folder per seed (default: runs/NAME-sweep)")
    sub.add_argument("--quiet", action="store_true", help="print the final table only")

    sub = command("bench", commands.bench, "measure kernels, views or whole runs against their peers (benchmarks.NAME)")
    table = commands.benchmarks()
    width = max(map(len, table), default=0)
    if table:
        sub.epilog = "benchmarks:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in table.items())
    sub.add_argument("name", metavar="NAME", help="a benchmark of the source repository")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments, such as --device cpu --json FILE")

    sub = command("info", commands.info, "what was built, and what each operation runs on")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    sub.add_argument(
        "--check",
        action="store_true",
        help="test all kernels on the GPU now; exit code 1 if one is wrong, 2 without GPU",
    )
    sub.add_argument("--device", help="with --check: cuda (the default), cuda:N, or cpu for the CPU kernels")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 is success. An error that the user can act on is one line on standard error, and exit code 2. Any other error is a
    defect of the program: a traceback, and exit code 1. An interrupted command exits with 130.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A name may look like a configuration value.
    rest, overrides = (words, []) if words[:1] == ["name"] else split_overrides(words)
    parser = build_parser()
    options = parser.parse_args(rest)
    if overrides and "overrides" not in options:
        parser.error(f"{options.command} takes no configuration values, got {overrides[0]}")
    options.overrides = overrides
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        again = " without --again" if getattr(options, "again", False) else ""
        print(f"scan-fast: interrupted; the same command{again} continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        message = explain(error)
        if message is None or options.traceback:
            traceback.print_exc()
        print(f"scan-fast: {message or DEFECT}", file=sys.stderr)
        return EXIT_DEFECT if message is None else EXIT_USAGE


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the ``section.key=value`` words out of a command line: they may stand anywhere among the options."""
    rest: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        value_of_option = bool(rest) and rest[-1] in (
            "--data",
            "--out",
            "--clusters",
            "--seeds",
            "--device",
            "--format",
            "--thumbnails",
        )
        is_override = _OVERRIDE.match(word) is not None and not value_of_option
        (overrides if is_override else rest).append(word)
    return rest, overrides


def explain(error: Exception) -> str | None:
    """Return one line for an error that the user can act on, None for a defect of the program."""
    if isinstance(error, ScanFastError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"{place}the disk is full; free some space, and the same command continues"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{place}not writable or not readable ({error.strerror}); choose another folder with --out"
        return f"{place}{error.strerror or ' '.join(str(error).split())}"
    # torch.OutOfMemoryError is of the GPU. Its CPU allocator raises a plain RuntimeError.
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory ({str(error).splitlines()[0]}); lower the batch_size of this stage"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error):
        return "out of memory; lower the batch_size of this stage, or set data.resident=files"
    return None


if __name__ == "__main__":
    sys.exit(main())
