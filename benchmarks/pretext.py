"""Stage one against the same recipe in lightly, from the same weights: quality and time.

    python -m benchmarks.pretext [--config cifar10] [--seeds 0 1 2] [--json FILE] [section.key=value ...]

lightly's side is written as its documentation shows it: ``SimCLRTransform`` on PIL images, ``NTXentLoss``,
``CosineWarmupScheduler``, ``torch.optim.SGD``, a plain network in contiguous float32. Images, batch size, epochs,
network, first weights and settings of optimiser and views are those of the configuration, by default ``RECIPE``. Crops
and random numbers are each side's own. Both sides run in turns in one process; the figures of both are computed by the
same code, from the embeddings of the plain images: the accuracy of a kNN vote on the images that metrics are reported
of, and the purity of the training images' neighbours. Seconds are those of training, CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scan_fast.data.datasets import Splits, open_splits
from scan_fast.data.sources import Source
from scan_fast.errors import ConfigError
from scan_fast.evaluation.metrics import purity_at
from scan_fast.methods import SimCLRSettings
from scan_fast.models.heads import PretextModel
from scan_fast.neighbors import topk_neighbors
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.embedding import embed, knn_check
from scan_fast.stages.handover import Handover
from scan_fast.stages.pretext import Pretext, build_method, start_model
from scan_fast.sweep import statistics_of
from scan_fast.training.context import Context, open_context, seeded
from scan_fast.training.loop import train, warmup_epochs
from scan_fast.training.process import kept_memory
from scan_fast.views.parameters import SimCLRView

from . import baseline, peers
from .environment import describe
from .files import write_json
from .trials.plan import hidden
from .trials.running import clock_of
from .views import lightly_arguments

SIDES = ("scan-fast", "lightly")
RECIPE = (
    "preset=cpu",
    "precision=float32",
    "runtime.threads=1",
    "data.limit=4000",
    "model.stem=random",
    "pretext.epochs=5",
    "pretext.batch_size=128",
    "pretext.method.small_views=0",
    "pretext.method.batch_statistics=per_view",
    "pretext.optimizer={name: sgd, lr: 0.2, momentum: 0.9, nesterov: true, weight_decay: 1.0e-4, decay_all: true}",
)
"""Settings that lightly has, too: two views that pass apart, SGD that decays all weights, random first weights."""


class TwoViews(Dataset[list[Tensor]]):
    """Two random views of each image, by a transform of lightly."""

    def __init__(self, source: Source, transform: Any) -> None:
        self.images = source.read(torch.arange(len(source))).numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        views: list[Tensor] = self.transform(Image.fromarray(self.images[i]))
        return views


@torch.no_grad()
def quality(context: Context, model: PretextModel) -> dict[str, float]:
    """Return the accuracy of the kNN vote, and the purity of the training images' neighbours."""
    source, k = context.splits.train, context.config.mining.k
    assert source.labels is not None
    shared = Handover()  # the check takes the same embeddings
    near = topk_neighbors(torch.nn.functional.normalize(embed(context, model, "train", shared), dim=1), k=k)[1]
    purity = purity_at(near.cpu().numpy(), source.labels.numpy(), [k])[k]
    return {"knn_acc": knn_check(context, model, shared)["knn_acc"], "purity": purity}


def train_ours(context: Context, model: PretextModel) -> None:
    """Train as a run does, without its check at the end."""
    with seeded(context.config.seed, "method"):
        method = build_method(context, model)
    stage = Pretext(context, model, method, Handover())
    stage.end_epoch = lambda epoch, last: {}  # type: ignore[method-assign]
    with kept_memory():
        train(stage, context)


def train_lightly(context: Context, network: nn.Module) -> None:
    """Train as lightly's documentation shows it."""
    from lightly.loss import NTXentLoss
    from lightly.transforms.simclr_transform import SimCLRTransform
    from lightly.utils.scheduler import CosineWarmupScheduler

    settings, splits = context.config.pretext, context.splits
    method, optimizer = settings.method, settings.optimizer
    assert isinstance(method, SimCLRSettings)
    view = context.view(method.view)
    assert isinstance(view, SimCLRView)
    transform = SimCLRTransform(**lightly_arguments(view, splits.mean, splits.std))
    images = TwoViews(splits.train, transform)
    loader = DataLoader(images, batch_size=min(settings.batch_size, len(images)), shuffle=True, drop_last=True)
    criterion = NTXentLoss(temperature=method.temperature)
    rule = torch.optim.SGD(
        network.parameters(),
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=optimizer.weight_decay,
    )
    schedule = CosineWarmupScheduler(
        rule,
        warmup_epochs=round(warmup_epochs(settings.schedule, settings.epochs) * len(loader)),
        max_epochs=settings.epochs * len(loader),
        end_value=settings.schedule.floor,
    )
    network.train()
    for _ in range(settings.epochs):
        for first, second in loader:
            loss = criterion(network(first.to(context.device)), network(second.to(context.device)))
            rule.zero_grad()
            loss.backward()
            rule.step()
            schedule.step()


def measure_seed(config: Config, splits: Splits) -> dict[str, dict[str, float]]:
    """Train both sides from the same weights; return by side its figures and seconds, and those before training."""
    clock = clock_of(config.runtime.device)
    found = {}
    with tempfile.TemporaryDirectory() as temporary, RunFolder.open(Path(temporary) / "run", config) as run:
        context = open_context(config, run, Tracker(run, quiet=True), splits)
        with seeded(config.seed, "pretext"):
            model = start_model(context)
        found["untrained"] = quality(context, model)
        plain = baseline.ContrastiveModel(context.model_config)
        plain.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
        plain.to(context.device)
        begin = clock.now()
        train_ours(context, model)
        middle = clock.now()
        with seeded(config.seed, "lightly"):
            train_lightly(context, plain)
        end = clock.now()
        found["scan-fast"] = {**quality(context, model), clock.key: middle - begin}
        model.load_state_dict(plain.state_dict())
        found["lightly"] = {**quality(context, model), clock.key: end - middle}
    return found


def checked(config: Config) -> Config:
    """Return the configuration, if lightly can do what it says.

    Raises:
        ConfigError: names the first setting that it cannot.
    """
    method, settings = config.pretext.method, config.pretext
    wanted = {
        "pretext.method.kind=simclr": method.kind == "simclr",
        "pretext.optimizer.name=sgd": settings.optimizer.name == "sgd",
        "pretext.optimizer.decay_all=true": settings.optimizer.decay_all,
        "pretext.schedule.name=cosine": settings.schedule.name == "cosine",
        "pretext.schedule.every=step": settings.schedule.every == "step",
        "model.stem=random": config.model.stem == "random",
    }
    if isinstance(method, SimCLRSettings):
        wanted |= {
            "pretext.method.small_views=0": not method.small_views,
            "pretext.method.resolutions=[]": not method.resolutions,
            "pretext.method.anchors=both": method.anchors == "both",
            "pretext.method.view.kind=simclr": method.view.kind == "simclr",
        }
    for setting, holds in wanted.items():
        if not holds:
            raise ConfigError(f"the comparison with lightly needs {setting}")
    return config


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table with a row per side, and a line on the difference."""
    key = next(key for key in ("cpu_seconds", "seconds") if key in result["seeds"][0]["lightly"])
    rows = ["| side | kNN | purity | seconds |", "|---|---:|---:|---:|"]
    for side in ("untrained", *SIDES):
        runs = [seed[side] for seed in result["seeds"]]
        cells = []
        for name, factor in (("knn_acc", 100), ("purity", 100), (key, 1)):
            if name not in runs[0]:
                cells.append("")
                continue
            entry = statistics_of([factor * run[name] for run in runs])
            cells.append(f"{entry['mean']:.1f} ± {entry['std']:.1f}")
        rows.append(f"| {side} | {' | '.join(cells)} |")
    lines = []
    for name, title in (("knn_acc", "kNN"), ("purity", "purity")):
        gaps = [100 * (seed["scan-fast"][name] - seed["lightly"][name]) for seed in result["seeds"]]
        entry = statistics_of(gaps)
        lines.append(
            f"{title} differs by {entry['mean']:+.1f} (standard error {entry['std'] / math.sqrt(len(gaps)):.1f})"
        )
    ratio = statistics.median(seed["lightly"][key] / seed["scan-fast"][key] for seed in result["seeds"])
    text = f"{'; '.join(lines)}. lightly takes {ratio:.2f} times as long (median)."
    return "\n".join(rows) + f"\n\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cifar10", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    if reason := peers.missing("lightly"):
        parser.error(f"lightly is {reason}: pip install lightly")
    recipe = RECIPE if options.config == "cifar10" else ()
    words = [*recipe, *options.overrides]
    device = {"runtime.device": options.device}
    configs = [
        checked(load_config(find_config(options.config), words, {**device, "seed": seed})) for seed in options.seeds
    ]
    splits = open_splits(configs[0].data)
    result: dict[str, Any] = {"benchmark": "pretext", "device": options.device}
    result |= {"config": options.config, "set": hidden(words), "seeds": []}
    for config in configs:
        result["seeds"].append({"seed": config.seed, **measure_seed(config, splits)})
        print(result["seeds"][-1], flush=True)
    result["environment"] = describe(options.device)
    print(table(result))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
