"""The command line: ``scan-fast run configs/cifar10.yaml``, ``scan-fast run --data my_photos --clusters 12``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

from . import __version__, applying, commands, distributed, experiments, queries
from .completion import SHELLS
from .errors import ScanFastError
from .parsing import EXIT_USAGE, Parser, split_overrides
from .text import show, shown_lines

IMAGES = "a folder of images, or PREFIX:ARGUMENT as in data.source, such as webdataset:SHARDS"
CONFIGURATION = "a configuration: a YAML file, or the name of a shipped one such as digits; `scan-fast config --list`"

REFERENCE = "a finished run folder or its model.pt; with --config, a weight file of the SCAN project or of MoCo v2"

EXIT_DEFECT, EXIT_INTERRUPTED = 1, 130

STAGES = ("run", "pretext", "mine", "cluster", "selflabel", "suggest-k")
TOGETHER = (*STAGES, "evaluate", "predict", "embed", "probe", "sweep", "ablate")
"""Commands that several processes carry out together; rank 0 alone carries out the others."""

DEFECT = (
    "this is a defect of scan-fast and no mistake of yours; please report it to the project's issue tracker, with the "
    "command, the lines above and the output of `scan-fast info`"
)

EXAMPLES = """\
to begin:
  scan-fast run digits                            all stages on a small data set, in half a minute
  scan-fast run --data my_photos --clusters 12    group your own images
  scan-fast predict RUN --data new_photos         assign new images to the groups

`scan-fast COMMAND --help` explains a command."""

OVERRIDES = """\
section.key=value words change the configuration, and may stand anywhere:
  scan-fast run cifar10 preset=paper pretext.epochs=50
`scan-fast config --keys` explains every key."""

PREDICTED = """\
the columns:
  path, cluster    the image, and the group that it fits best, from 0
  confidence       the probability of this group
  margin           confidence minus the probability of the second best group
  similarity       cosine similarity, -1 to 1, to the nearest group's mean image in feature space
  unlike           1 if that is lower than of 99 in 100 training images: the image may belong to no group
A model.pt that was written before there were similarity and unlike has no such columns."""

PROBED = """\
A classifier is multinomial logistic regression on standardised features. Of each class the same share of the labels is
drawn, at least one. The weight decay is chosen by a part of the drawn labels. Nothing is fine-tuned, and the run is not
changed. Images are held out by a hash of their names if there are no test images."""

OF_REFERENCE = """\
With --config, section.key=value words change the configuration; `scan-fast config --keys` explains every key."""

MEASURED = """\
a weight file of the SCAN project (pretext, SCAN, self-label) or of MoCo v2, on the images of a configuration:
  scan-fast evaluate scan_cifar-10.pth.tar --config cifar10 data.root=DIR
It has no settings of its own; --config says what its network sees. SCAN and self-label files are compared with the
classes; of pretext files, kNN accuracy and the purity of the nearest neighbours are measured."""

STARTED = """\

from a weight file of the SCAN project or of MoCo v2:
  scan-fast cluster cifar10 --from simclr_cifar-10.pth.tar     stage two on the representation of the file
  scan-fast selflabel cifar10 --from scan_cifar-10.pth.tar     stage three on its clusters"""

EXPORTED = """\
The model maps images (batch, S, S, 3) uint8 to probabilities (batch, K) float32; normalization is part of it. It
describes itself: size, normalization, backbone, number of groups. ONNX: metadata_props; pt2: scan_fast.json, by
torch.export.load(FILE, extra_files={"scan_fast.json": ""}).

--format reference writes weights under the names of the SCAN project, model.pth.tar. With --stage mining it writes the
nearest neighbours that a run has mined, as that project's topk-train-neighbors.npy and, of test images,
topk-val-neighbors.npy: int64 (N, k + 1), the image itself first:
  scan-fast export RUN --format reference --stage mining --out DIR"""

CHECKED = """\
Each file is compared when a command reads it, too. A file that was damaged is named with the command that writes it
again. Thumbnails are not compared: they are pictures for the report, and `scan-fast report RUN` makes them again."""

COMPLETION = """\
  bash    scan-fast completion bash > ~/.local/share/bash-completion/completions/scan-fast
  zsh     scan-fast completion zsh > DIR/_scan-fast, with DIR in $fpath before compinit
  fish    scan-fast completion fish > ~/.config/fish/completions/scan-fast.fish"""


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="scan-fast",
        description="Group images without labels: SimCLR, neighbour mining, SCAN, self-labelling.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scan-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Parser:
        sub: Parser = subparsers.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    def configured(sub: Parser, target: str) -> None:
        """Add the words of a command that reads a configuration or makes one for --data."""
        sub.add_argument("target", nargs="?", metavar="CONFIG|RUN", help=target)
        sub.set_defaults(overrides=[])
        sub.add_argument("--data", metavar="IMAGES", help=f"{IMAGES}, instead of a configuration")
        sub.add_argument(
            "--clusters", type=_clusters, metavar="K", help="the number of groups, or auto (clustering.n_clusters)"
        )

    def with_model(sub: Parser) -> None:
        """Add the words of a command that applies a finished model to images."""
        sub.add_argument("target", type=Path, metavar="RUN", help=REFERENCE)
        of_reference(sub)
        sub.add_argument(
            "--data",
            required=True,
            nargs="+",
            metavar="IMAGES",
            help=f"{IMAGES}; or one or more image files",
        )
        sub.add_argument(
            "--on-error",
            choices=("raise", "skip"),
            default="raise",
            help="at an image that cannot be read: stop with its name, or leave it out (default: %(default)s)",
        )
        device(sub)

    def of_reference(sub: Parser) -> None:
        """Add the words of a command that takes a file of the reference."""
        sub.set_defaults(overrides=[])
        sub.add_argument(
            "--config",
            metavar="CONFIG",
            help="what a weight file of the SCAN project sees: a YAML file or, such as cifar10, "
            "the name of a shipped configuration, with preset=paper; section.key=value words change it",
        )
        sub.add_argument("--head", type=_head, metavar="H", help="with --config: the cluster head to use, from 0")

    def device(sub: Parser) -> None:
        sub.add_argument(
            "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)"
        )

    stages = {
        "run": ((), "group images: all stages, then a table, a report and a model; an unfinished run continues"),
        "pretext": (("pretext",), "stage one alone: learn a representation without labels (SimCLR)"),
        "mine": (("mining",), "the step after stage one alone: find the nearest neighbours of every image"),
        "cluster": (("clustering",), "stage two alone: train the cluster heads (SCAN loss)"),
        "selflabel": (("selflabel",), "stage three alone: learn from confident images"),
    }
    for name, (names, text) in stages.items():
        sub = command(name, commands.train, text)
        sub.epilog = OVERRIDES
        sub.set_defaults(stages=names)
        configured(sub, f"{CONFIGURATION} lists them; or an existing run folder")
        sub.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME)")
        sub.set_defaults(start=None, neighbors=None)
        if name != "pretext":
            sub.epilog += STARTED
            sub.add_argument(
                "--from", dest="start", type=Path, metavar="FILE", help="go on after a weight file of the SCAN project"
            )
        if name in ("run", "mine", "cluster"):
            sub.add_argument(
                "--neighbors",
                type=Path,
                nargs="+",
                metavar="FILE",
                help="take neighbours of the training images, and "
                "then of the test images, from topk-*-neighbors.npy (mining.files)",
            )
        again = "repeat this stage and those after it" if names else "repeat all stages"
        sub.add_argument("--again", action="store_true", help=f"{again}, although they are finished")
        sub.add_argument("--quiet", action="store_true", help="print errors only")
        sub.set_defaults(minutes=None, finish=False)
        if not names:
            sub.add_argument(
                "--minutes",
                type=_minutes,
                metavar="M",
                help="train as much as fits into M minutes: fewer epochs, smaller images or a narrower network",
            )
            sub.add_argument(
                "--finish",
                action="store_true",
                help="group by what an interrupted run has learned so far, in RUN-so-far; the run can continue",
            )

    sub = command("suggest-k", commands.suggest_k, "suggest how many groups the images fall into, with the scores")
    sub.epilog = OVERRIDES
    configured(sub, f"{CONFIGURATION} lists them; or a run folder, whose features are used")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME)")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
    sub.add_argument("--quiet", action="store_true", help="print the result only")

    sub = command("predict", applying.predict, "assign new images to the groups of a finished run (CSV)")
    sub.epilog = f"{PREDICTED}\n{OF_REFERENCE}"
    with_model(sub)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the CSV file (default: standard output)")

    sub = command("evaluate", applying.evaluate, "compare groups with classes: of a run's own images, or of others")
    sub.epilog = f"{MEASURED}\n{OF_REFERENCE}"
    sub.add_argument(
        "target",
        type=Path,
        metavar="RUN",
        help="a run folder; with --data also its model.pt; with --config a weight file of the SCAN project or MoCo v2",
    )
    of_reference(sub)
    sub.add_argument(
        "--neighbors",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="with --config: take the nearest neighbours from topk-*-neighbors.npy instead of searching them",
    )
    sub.add_argument(
        "--data",
        metavar="IMAGES",
        help="measure the finished model on these images: a folder with a sub-folder per class, or PREFIX:ARGUMENT "
        "with labels; without --data, every stage is measured again on the run's own images, and k-means beside it",
    )
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON, and all that tables leave out")
    sub.add_argument(
        "--prototypes",
        type=Path,
        metavar="FILE.png",
        help="write one typical image of each cluster to a picture, and to a table, FILE.csv; classes are not needed",
    )
    sub.add_argument("--device", help="with --data or --config: auto (the default), cpu, cuda or cuda:N")

    sub = command("probe", applying.probe, "measure frozen features by linear classifiers that learn from few labels")
    sub.epilog = PROBED
    sub.add_argument("target", type=Path, metavar="RUN", help="a finished run folder; with --data also its model.pt")
    sub.add_argument("--data", metavar="IMAGES", help="labelled images to learn from (default: those of the run)")
    sub.add_argument("--test", metavar="IMAGES", help="with --data: the images to measure on (default: a fifth of it)")
    sub.add_argument(
        "--labels",
        default="1,10,100",
        metavar="PERCENT",
        help="shares of the labels to learn from, in percent (default: %(default)s)",
    )
    sub.add_argument(
        "--draws", type=int, default=3, metavar="N", help="how often fewer than all are drawn (default: %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
    device(sub)

    sub = command("compare", queries.compare, "show several runs in one table, and how far their groups agree")
    sub.add_argument("targets", nargs="+", metavar="RUN", help="run folders")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a CSV file as well")

    sub = command("check", queries.check, "compare every file of a run with the digest that it was written with")
    sub.epilog = CHECKED
    sub.add_argument("target", type=Path, metavar="RUN|FILE", help="a run folder, or a model.pt")
    sub.add_argument(
        "--accept",
        action="store_true",
        help="give files without a digest one, and files that were changed on purpose a new one, if they can be read",
    )

    sub = command("config", commands.config, "print a configuration with all of its values, or explain its keys")
    sub.epilog = OVERRIDES
    configured(sub, f"{CONFIGURATION} lists them; or a run folder (default: folder, the one that --data takes)")
    sub.add_argument("--list", action="store_true", help="list the shipped configurations and their presets")
    sub.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="list every key with its type, default and meaning; those that contain PATTERN, or match it if it has a *",
    )

    sub = command("embed", applying.embed, "write the feature vectors of images (.npz with features and paths)")
    sub.epilog = OF_REFERENCE
    with_model(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file")

    sub = command("export", applying.export, "write a model that runs without this package")
    sub.add_argument("target", type=Path, metavar="RUN", help=REFERENCE)
    of_reference(sub)
    sub.add_argument(
        "--format",
        choices=("pt2", "onnx", "reference"),
        default="pt2",
        help="torch.export, ONNX, or the SCAN project's weight file (default: pt2)",
    )
    sub.add_argument(
        "--stage",
        choices=("pretext", "mining", "clustering", "selflabel"),
        help="with --format reference: the stage whose result is written (default: the last one with a network)",
    )
    sub.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file to write; with --stage mining a folder"
    )
    sub.epilog = f"{EXPORTED}\n{OF_REFERENCE}"

    sub = command("report", applying.report, "write report.html of a finished run again")
    sub.add_argument("target", type=Path, metavar="RUN", help="a run folder")
    sub.add_argument("--thumbnails", type=int, metavar="N", help="how many images get one (evaluation.thumbnails)")
    sub.add_argument("--single-file", action="store_true", help="write report-single.html, one file that can be sent")

    sub = command("name", applying.name, 'give groups names: scan-fast name RUN 3 "red shoes" 5 boots')
    sub.add_argument("target", type=Path, metavar="RUN", help="a run folder")
    sub.add_argument("names", nargs="*", metavar="GROUP NAME", help="pairs of a group's number and its name")
    sub.add_argument("--list", action="store_true", help="print the names")
    sub.add_argument("--clear", action="store_true", help="remove the names of the groups given, or all names")

    sub = command("folders", applying.folders, "one folder per group, with links to the images or copies of them")
    sub.add_argument("target", type=Path, metavar="RUN", help="a run folder")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, outside that of the images")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--link", action="store_true", help="symbolic links, or hard links, or else copies (the default)")
    how.add_argument("--copy", action="store_true", help="copies")

    def repeated(sub: Parser, kept: str, share: str) -> None:
        """Add the words of a command that repeats runs with several seeds."""
        sub.epilog = OVERRIDES
        sub.set_defaults(overrides=[])
        sub.add_argument("--seeds", default="0-2", help="such as 0-9 or 0,3,7 (default: %(default)s)")
        sub.add_argument("--share-pretext", action="store_true", help=share)
        sub.add_argument("--out", type=Path, metavar="DIR", help=kept)
        sub.add_argument(
            "--shared",
            type=Path,
            metavar="DIR",
            help="holds the stages that are shared (default: shared, in --out); sweeps and ablations with one DIR do "
            "them once for all",
        )
        sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
        sub.add_argument("--quiet", action="store_true", help="print the final table only")

    share = "learn the representation and mine neighbours once, with the configuration's own seed, for all seeds"
    sub = command("sweep", experiments.sweep, "repeat a run with several seeds: mean, standard deviation and best")
    sub.add_argument("target", metavar="CONFIG", help=f"{CONFIGURATION} lists them")
    repeated(sub, "holds one run folder per seed (default: runs/NAME-sweep)", share)

    sub = command("ablate", experiments.ablate, "compare variants of a configuration, such as those of the SCAN paper")
    sub.add_argument("name", nargs="?", metavar="NAME", help="an ablation: a name that --list shows, or a YAML file")
    sub.add_argument(
        "target", nargs="?", default="digits", metavar="CONFIG", help=f"{CONFIGURATION} lists them (default: digits)"
    )
    sub.add_argument("--list", action="store_true", help="list the ablations, with what the paper found")
    sub.add_argument("--variants", metavar="NAMES", help="some of the variants only, such as 0.9,0.99")
    repeated(
        sub,
        "holds the run folders, VARIANT/seedN (default: runs/CONFIG-NAME)",
        f"{share}; without it, variants share with each other what they agree in, seed by seed",
    )

    sub = command("bench", commands.bench, "measure kernels, views or whole runs against their peers (benchmarks.NAME)")
    table = commands.benchmarks()
    width = max(map(len, table), default=0)
    if table:
        sub.epilog = "benchmarks:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in table.items())
    sub.add_argument("name", metavar="NAME", help="a benchmark of the source repository")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments, such as --device cpu --json FILE")

    sub = command("info", commands.info, "show what was built, and what each operation runs on")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    sub.add_argument(
        "--check",
        action="store_true",
        help="test all kernels on the GPU now; exit code 1 if one is wrong, 2 without GPU",
    )
    sub.add_argument("--device", help="with --check: cuda (the default), cuda:N, or cpu for the CPU kernels")

    sub = command("completion", queries.completion, "print a script that completes scan-fast's words in a shell")
    sub.epilog = COMPLETION
    sub.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    sub.set_defaults(parser=parser)
    return parser


def _clusters(text: str) -> int | str:
    """Read the value of --clusters."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2, or auto, got {text!r}") from None


def _head(text: str) -> int:
    """Read the value of --head."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    """Read the value of --minutes."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 is success. An error that the user can act on is one line on standard error, and exit code 2. Any other error is a
    defect of the program: a traceback, and exit code 1. An interrupted command exits with 130.

    Of several processes, as torchrun starts them, rank 0 prints, and the rank that fails says why.
    """
    with ExitStack() as stack:
        if not distributed.is_first_by_environment():
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        code = _main(sys.argv[1:] if arguments is None else arguments)
        return distributed.end(code, exits=arguments is None)


def _main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        if options.command in TOGETHER:
            distributed.join()
        elif not distributed.is_first_by_environment():
            return 0
        code = int(options.run(options))
        distributed.leave()
        return code
    except KeyboardInterrupt:
        again = " without --again" if getattr(options, "again", False) else ""
        early = ", and with --finish it groups by what was learned so far" if options.command == "run" else ""
        if distributed.is_first_by_environment():
            print(f"scan-fast: interrupted; the same command{again} continues{early}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as raised:
        error = distributed.cause(raised)
        message = explain(error)
        shown = distributed.announce(message or f"{type(error).__name__}: {error}", error)
        if shown is not None:
            if message is None or options.traceback:
                print(shown_lines(traceback.format_exc()), file=sys.stderr, end="")
            show(f"scan-fast: {DEFECT if message is None else shown}", sys.stderr)
        return EXIT_DEFECT if message is None else EXIT_USAGE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command; rank 0 alone says what is wrong with them."""
    parser = build_parser()
    with ExitStack() as stack:
        if not distributed.is_first_by_environment():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        rest, overrides = split_overrides(arguments, parser)
        options = parser.parse_args(rest)
    options.overrides = overrides
    return options


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
