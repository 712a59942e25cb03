"""Plans of a run on a user's own images: what it starts from, how long it takes, and what fits into given minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError, MissingPackageError
from .models.backbones import DESCRIPTOR, ModelConfig, multiply_adds
from .models.heads import PretextModel
from .models.pretrained import can_fetch, weights_at_hand
from .models.published import PUBLISHED
from .runs.config import Config
from .training.context import Context, resolved_model

PRESET_KEYS = ("model.", "pretext", "clustering.update", "clustering.objective", "selflabel")
"""Beginnings of keys that belong to training: who gives one does not mean pretrained features."""

ON_CPU = ("dinov2-small", "efficientnet-lite0", "torchvision:resnet50")
ON_GPU = ("dinov2-base", "dinov2-small", "torchvision:resnet50")
"""Backbones to look for, the first one that can be had. Those that are on the machine come before all downloads."""


@dataclass(frozen=True)
class Start:
    """The start of a run on a folder: pretrained weights or none.

    Attributes:
        settings: configuration values by dotted key.
        text: one line that says so.
    """

    settings: Mapping[str, Any]
    text: str


def choose_start(given: Iterable[str], model: Mapping[str, Any], device: str) -> Start | None:
    """Choose between pretrained features and training from scratch.

    Args:
        given: dotted keys of the command line; a preset or a setting of training decides, so that nothing is chosen.
        model: the given values of the section ``model``.
        device: "cpu" or "cuda".

    Returns:
        The start, None if the command line has decided.
    """
    keys = list(given)
    if "preset" in keys:
        return None
    backbone = str(model.get("backbone", ""))
    known = bool(model.get("weights") or model.get("pretrained") or backbone in PUBLISHED)
    if known or backbone == DESCRIPTOR:
        rest = [key for key in keys if key.startswith(PRESET_KEYS) and not key.startswith("model.")]
        return Start({"preset": "pretrained" if known else "descriptor"}, "") if not rest else None
    if any(key.startswith(PRESET_KEYS) for key in keys):
        return None
    names = ON_GPU if device == "cuda" else ON_CPU
    for having, words in ((weights_at_hand, "whose weights are on this machine"), (can_fetch, "to be fetched")):
        for name in names:
            config = ModelConfig(backbone=name, pretrained=True)
            if _had(having, config):
                settings = {"preset": "pretrained", "model.backbone": name, "model.pretrained": True}
                return Start(settings, f"features of the pretrained network {name}, {words}; nothing is trained")
    missing = "no weights of a pretrained network are on this machine, and none can be fetched"
    better = "with model.backbone=NAME model.weights=FILE it finds far better groups"
    if device == "cuda":
        return Start({"preset": "fast"}, f"training from scratch: {missing}; {better}, in minutes")
    return Start(
        {"preset": "descriptor"},
        f"edges and colours are compared, and nothing is trained: {missing}; {better}. preset=fast trains a network "
        "from these images, which takes hours on a processor",
    )


def _had(having: Callable[[ModelConfig], Any], config: ModelConfig) -> bool:
    try:
        return bool(having(config))
    except MissingPackageError:
        return False


# -- time --------------------------------------------------------------------------------------------------------------

SHORT = 2e13
"""Multiply-adds of a run that is not timed beforehand: it is over in about a minute."""
TIMED_IMAGES = 32
ROUNDS = 3
TRAINING_SHARE = 0.9
"""Share of the given minutes for the learned stages; the rest is for reading images, mining and the report."""
SHARES = {"pretext": 0.7, "clustering": 0.15, "selflabel": 0.15}
"""Shares of the training time by stage."""
FEWEST_EPOCHS = 50
"""Epochs of the pretext stage below which smaller images and then a narrower network are taken before fewer epochs."""
SIDES = (128, 96, 64, 48, 32)
WIDTHS = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Cost:
    """Seconds that one image takes.

    Attributes:
        forward: through the network.
        training: through the network and back, for one view.
    """

    forward: float
    training: float


@dataclass(frozen=True)
class Estimate:
    """Expected seconds by stage."""

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = [f"{name} {duration(seconds)}" for name, seconds in self.seconds.items() if seconds >= 1]
        return (
            f"about {duration(self.total)} ({', '.join(parts)})" if len(parts) > 1 else f"about {duration(self.total)}"
        )


def duration(seconds: float) -> str:
    """Return a duration in words, such as ``2 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


CPU_PRESET = "cpu"
"""The preset of a configuration that is made for processors."""


def processor_advice(context: Context, expected: Estimate, presets: Iterable[str]) -> str | None:
    """Return the line that points out the preset for processors to a run that takes another one; None if not needed.

    Args:
        context: the run.
        expected: its time.
        presets: those that its configuration has.
    """
    preset = context.config.preset
    if context.device.type != "cpu" or preset == CPU_PRESET or CPU_PRESET not in presets:
        return None
    return (
        f"preset={CPU_PRESET} is made for processors: a smaller network and fewer epochs; preset={preset} takes about "
        f"{duration(expected.total)} here"
    )


def estimate(context: Context, finished: Iterable[str] = ()) -> Estimate | None:
    """Estimate a run by timing a few steps of its network; None if it is short.

    Args:
        context: the run.
        finished: stages that are done.
    """
    config, n = context.config, len(context.splits.train)
    side = context.plain_view.side
    passes = _passes(config, side, finished)
    work = multiply_adds(context.model_config, side) * n * sum(f + 3 * t for f, t in passes.values())
    if work < SHORT:
        return None
    cost = measure(context)
    return Estimate({name: n * (f * cost.forward + t * cost.training) for name, (f, t) in passes.items()})


def _passes(config: Config, side: int, finished: Iterable[str] = ()) -> dict[str, tuple[float, float]]:
    """Return by stage how often an image passes forward only, and in training."""
    passes = {}
    pretext, clustering, selflabel = config.pretext, config.clustering, config.selflabel
    trains = pretext.method.trains
    views = pretext.method.passes(side) if trains else 0.0
    checks = pretext.epochs / pretext.monitor_every if trains and pretext.monitor_every else 0.0
    passes["pretext"] = (1.0 + checks, views * pretext.epochs)
    if clustering.weights is not None:
        passes = {"clustering": (1.0, 0.0)}
    elif clustering.update == "full":
        passes["clustering"] = (clustering.epochs / clustering.evaluate_every, 2.0 * clustering.epochs)
    elif clustering.update == "heads":
        passes["clustering"] = (float(clustering.cached_views or 2 * clustering.epochs), 0.0)
    if selflabel is not None:
        passes["selflabel"] = (selflabel.epochs * (1 + 1 / selflabel.evaluate_every), float(selflabel.epochs))
    return {name: value for name, value in passes.items() if name not in set(finished)}


def measure(context: Context, side: int | None = None, width: float | None = None) -> Cost:
    """Time the network and the views of a run on a few images.

    Args:
        context: the run.
        side: side of the images; that of the run by default.
        width: width of the network; that of the run by default.
    """
    source, config = context.splits.train, context.config
    rows = torch.arange(min(TIMED_IMAGES, len(source)))
    trained = config.pretext.method
    own = getattr(trained, "view", None)
    view = context.plain_view if own is None else own.resolved(context.side)
    views = context.views_of(source, "estimate")
    model_config = resolved_model(config.model, side or source.size) if side else context.model_config
    if width is not None:
        model_config = model_config.model_copy(update={"width": width})
    autocast = context.precision == torch.bfloat16  # found out before gradients are switched off
    with torch.random.fork_rng(devices=[]):
        model = context.place(PretextModel(model_config.from_scratch()))
        rendering = _median(lambda: views(view, rows, epoch=0, view_index=0), context.device)
        size = side or context.plain_view.side
        images = torch.randn(len(rows), 3, size, size).to(context.device, memory_format=torch.channels_last)

        def forward() -> None:
            with torch.no_grad(), torch.autocast(context.device.type, torch.bfloat16, enabled=autocast):
                model.eval()
                model(images)

        def training() -> None:
            with torch.enable_grad(), torch.autocast(context.device.type, torch.bfloat16, enabled=autocast):
                model.train()
                loss = model(images).float().square().mean()
            loss.backward()

        steps = (forward, training) if trained.trains or config.selflabel is not None else (forward,)
        seconds = [_median(step, context.device) for step in steps]
    return Cost((seconds[0] + rendering) / len(rows), (seconds[-1] + rendering) / len(rows))


def _median(step: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):  # the first one prepares buffers and kernels
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[ROUNDS // 2]


def fit_minutes(context: Context, minutes: float, presets: Iterable[str] = ()) -> Config:
    """Return the configuration with epochs, image size and width that fit into the given minutes.

    Full size and width are kept if so many epochs of the pretext stage fit; otherwise images become smaller, then the
    network narrower, and at last the epochs fewer. Pretrained features take the time that they take.

    Args:
        context: the run as configured; nothing of it is done yet.
        minutes: for the whole run, above 0.
        presets: those that the configuration has, for the advice if the time is too short.

    Raises:
        ConfigError: if not one epoch of each stage fits.
    """
    config = context.config
    if not config.pretext.method.trains:
        return config
    n, side = len(context.splits.train), context.side
    budget = 60 * minutes * TRAINING_SHARE
    options = _options(context, side)
    for size, width in options:
        epochs = _epochs(config, n, size, measure(context, size, width), budget)
        if epochs["pretext"] >= min(FEWEST_EPOCHS, config.pretext.epochs) or (size, width) == options[-1]:
            break
    if min(epochs.values()) < 1:
        known = set(presets)
        other = ", or use pretrained features (preset=pretrained)" if "pretrained" in known else ""
        if context.device.type == "cpu" and CPU_PRESET in known and config.preset != CPU_PRESET:
            other = f", or take the smaller network of preset={CPU_PRESET}"
        least = minutes / max(min(epochs.values()), 1e-9)
        raise ConfigError(
            f"--minutes {minutes:g} is too short for {n} images: one pass of each stage takes about "
            f"{duration(60 * least)}; give more minutes{other}"
        )
    return _with_epochs(config, {name: int(value) for name, value in epochs.items()}, size, width, side)


def _options(context: Context, side: int) -> list[tuple[int, float]]:
    sides = (
        [side, *(smaller for smaller in SIDES if smaller < side)] if context.config.data.image_size is None else [side]
    )
    options = [(size, context.config.model.width) for size in sides]
    if context.config.model.backbone == "auto":
        # Narrow networks are the project's own; the one for larger images is torchvision's and has no width.
        narrow = min(sides)
        options += [(narrow, width) for width in WIDTHS if width < context.config.model.width and narrow <= 112]
    return options


def _epochs(config: Config, n: int, side: int, cost: Cost, budget: float) -> dict[str, float]:
    """Return how many epochs of each stage fit, at most those configured."""
    passes = _passes(config, side)
    whole = sum(SHARES[name] for name in passes)
    epochs = {}
    for name, (forward, training) in passes.items():
        section = getattr(config, name)
        per_epoch = n * (forward * cost.forward + training * cost.training) / section.epochs
        epochs[name] = min(float(section.epochs), budget * SHARES[name] / whole / per_epoch)
    return epochs


def _with_epochs(config: Config, epochs: Mapping[str, int], size: int, width: float, side: int) -> Config:
    update: dict[str, Any] = {
        name: getattr(config, name).model_copy(update={"epochs": count}) for name, count in epochs.items()
    }
    if size != side:
        update["data"] = config.data.model_copy(update={"image_size": size})
    update["model"] = config.model.model_copy(update={"width": width})
    return config.model_copy(update=update)
