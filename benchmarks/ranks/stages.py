"""The stages of a run as work: passes through networks, collectives, searches, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scan_fast.data.loader import steps_per_epoch
from scan_fast.methods import SimCLRSettings, WeightsSettings
from scan_fast.objectives import SCANSettings
from scan_fast.runs.config import Config, OptimizerConfig

from .network import Network, cluster_network, pretext_network
from .traffic import ALL_GATHER, ALL_REDUCE, BROADCAST, SEND, Message

IMAGES = {
    "cifar10": (50_000, 10_000, 32),
    "cifar20": (50_000, 10_000, 32),
    "digits": (1_348, 449, 8),
    "imagenet": (1_281_167, 50_000, 256),
    "imagenet50": (64_274, 2_500, 256),
    "imagenet100": (128_545, 5_000, 256),
    "imagenet200": (256_558, 10_000, 256),
    "tinyimagenet32": (100_000, 10_000, 32),
}
"""Training images, test images and their side, of the shipped configurations that train all stages on one split."""
NAME_BYTES = 300
"""Bytes of an image's path, header and what is computed from them, which every rank keeps."""
INDEX_BYTES, SIMILARITY_BYTES = 8, 4
DESCRIBED = 5
"""Integers that describe embeddings to the other ranks before each NT-Xent loss."""


@dataclass(frozen=True)
class Training:
    """A learned stage.

    Attributes:
        name: of the stage.
        network: that is trained.
        images, batch, epochs: images of an epoch, of a step (all ranks together), and number of epochs.
        side: of the views in pixels.
        trained: views of an image that pass forward and back.
        forward: views of an image that pass forward only.
        decoded: image files that are read for an image of the batch; 0 if features are kept.
        norm_forward, norm_backward: passes through each batch normalisation in a step, forward and back; 0 without
            common statistics.
        buffers: send the statistics of rank 0 to all before each step, because each rank has its own.
        loss: collectives of the loss by the number of a rank's images in a step.
        state: float32 numbers that the optimiser keeps for each parameter.
        checked: images that pass forward for evaluations, in all.
        gathered: float32 numbers of all images that an evaluation hands to every rank, in all.
        widest: bytes of the largest result that an evaluation hands to every GPU.
        ring: bytes of embeddings that pass round the ring of a kNN check, in all.
        compared: multiply-adds of these checks, in all.
        kept: bytes of features that every rank keeps on its device.
        before: views that pass forward before the first step, in all.
    """

    name: str
    network: Network
    images: int
    batch: int
    epochs: int
    side: int
    trained: float
    forward: float
    decoded: float
    norm_forward: int
    norm_backward: int
    buffers: bool
    loss: Callable[[int], list[Message]]
    state: int
    checked: float
    gathered: float
    widest: float = 0.0
    ring: float = 0.0
    compared: float = 0.0
    kept: float = 0.0
    before: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps of all epochs."""
        return self.epochs * steps_per_epoch(self.images, self.batch)

    def messages(self, ranks: int) -> list[Message]:
        """Return the collectives of a step.

        Raises:
            ValueError: if the batch cannot be divided among so many ranks.
        """
        batch = min(self.batch, self.images)
        if batch % ranks:
            raise ValueError(f"a batch of {batch} images cannot be divided among {ranks} ranks ({self.name})")
        if ranks == 1:
            return []
        network = self.network
        found = [Message("gradients", ALL_REDUCE, network.gradient_bytes, network.buckets)]
        layers, channels = len(network.channels), sum(network.channels)
        if layers and self.norm_forward:
            statistics = 8 * (2 * channels + layers)
            found.append(Message("statistics", ALL_REDUCE, self.norm_forward * statistics, self.norm_forward * layers))
            found.append(
                Message("their gradients", ALL_REDUCE, self.norm_backward * 16 * channels, self.norm_backward * layers)
            )
        if layers and self.buffers:
            found.append(Message("buffers", BROADCAST, 8 * channels + 8 * layers, 2))
        return found + self.loss(batch // ranks)


@dataclass(frozen=True)
class Mining:
    """The neighbour search: N rows of D float32 numbers, k neighbours each; ``checked`` images pass forward before."""

    images: int
    dimensions: int
    k: int
    checked: float
    network: Network
    side: int
    name: str = "mining"

    def messages(self, ranks: int) -> list[Message]:
        """Return all collectives of the stage."""
        if ranks == 1:
            return []
        rows, own = 4 * self.dimensions * self.images, self.images / ranks
        lists = (INDEX_BYTES + SIMILARITY_BYTES) * self.k
        return [
            Message("blocks", SEND, rows * (ranks - 1) / ranks, ranks - 1),
            Message("rows to rank 0", SEND, rows / ranks, 1),
            Message("lists to rank 0", SEND, own * lists, 2),
            Message("lists to all", BROADCAST, self.images * lists, 1),
        ]


@dataclass(frozen=True)
class Run:
    """The stages of a run, in order, and what its ranks keep.

    Attributes:
        name: of the configuration.
        images, test: number of images.
        crop: how images are read, see ``data.crop``.
        classes: C.
        k: neighbours of an image.
        stages: learned stages and mining.
    """

    name: str
    images: int
    test: int
    crop: str
    classes: int
    k: int
    stages: tuple[Training | Mining, ...]


def nt_xent_messages(samples: int, dimensions: int, element: int, views: int, pairs: int = 1) -> list[Message]:
    """Return the collectives of the NT-Xent loss.

    Args:
        samples: n, images of a rank.
        dimensions: D of the embeddings.
        element: bytes of a number of them.
        views: of each image that are anchors, 1 or 2.
        pairs: number of losses of a step.
    """
    return [
        Message("description", ALL_GATHER, pairs * 8 * DESCRIBED, pairs),
        Message("embeddings", ALL_GATHER, pairs * 2 * samples * dimensions * element, pairs),
        Message("anchors", ALL_GATHER, pairs * 3 * views * samples * 4, pairs),
    ]


def scan_messages(heads: int, classes: int, *, prior: bool = False) -> list[Message]:
    """Return the collectives of the SCAN loss: the sums of all heads' probabilities, float32; with a prior twice."""
    calls = 1 + prior
    return [Message("mean probabilities", ALL_REDUCE, calls * 4 * heads * classes, calls)]


def self_label_messages(classes: int) -> list[Message]:
    """Return the collectives of the self-label loss: the numbers of confident images by class, float32."""
    return [Message("confident images", ALL_REDUCE, 4 * classes)]


def describe(config: Config, images: int, test: int, side: int) -> Run:
    """Return what a configuration asks for.

    Args:
        config: of the run; its images are not opened.
        images: number of training images.
        test: number of test images, 0 if there are none.
        side: of the images in pixels.

    Raises:
        ValueError: for a pretext method or an objective whose collectives are not described here, or without a number
            of clusters.
    """
    classes = config.clustering.n_clusters
    if not isinstance(classes, int):
        raise ValueError(f"clustering.n_clusters must be a number here, got {classes!r}")
    plain = config.clustering.view.size or side
    pretext = pretext_network(config.model, plain)
    projected = config.mining.features == "projection"
    dimensions = config.model.projection_dim if projected else pretext.features
    everything = images + test
    stages: list[Training | Mining] = []
    method = config.pretext.method
    if isinstance(method, SimCLRSettings):
        stages.append(_pretext(config, method, images, everything, side, dimensions))
    elif not isinstance(method, WeightsSettings):
        raise ValueError(f"pretext.method must be simclr or weights here, got {method.kind!r}")
    stages.append(Mining(images, dimensions, min(config.mining.k, images - 1), everything, pretext, plain))
    stages.append(_clustering(config, classes, images, test, plain))
    if config.selflabel is not None:
        stages.append(_selflabel(config, classes, images, test, plain))
    return Run(config.name, images, test, config.data.crop, classes, config.mining.k, tuple(stages))


def _state(optimizer: OptimizerConfig) -> int:
    return 1 if optimizer.name in ("sgd", "muon") else 2


def _pretext(
    config: Config, method: SimCLRSettings, images: int, everything: int, side: int, dimensions: int
) -> Training:
    pretext = config.pretext
    view = method.side(side)
    network = pretext_network(config.model, view)
    sync = config.model.sync_batch_norm
    groups = 2 + method.small_views if method.batch_statistics == "per_view" else 1 + (method.small_views > 0)
    pairs, anchors = 1 + 2 * method.small_views, 2 if method.anchors == "both" else 1
    element = 4 if config.precision == "float32" else 2
    checks = -(-pretext.epochs // pretext.monitor_every) if pretext.monitor_every else 1

    def loss(samples: int) -> list[Message]:
        return nt_xent_messages(samples, config.model.projection_dim, element, anchors, pairs)

    return Training(
        name="pretext",
        network=network,
        images=images,
        batch=pretext.batch_size,
        epochs=pretext.epochs,
        side=view,
        trained=method.passes(side),
        forward=0.0,
        decoded=1,
        norm_forward=groups if sync else 0,
        norm_backward=groups if sync else 0,
        buffers=not sync,
        loss=loss,
        state=_state(pretext.optimizer),
        checked=checks * everything,
        gathered=0.0,
        ring=4.0 * checks * images * dimensions,
        compared=float(checks) * images * (everything - images or images) * dimensions,
    )


def _clustering(config: Config, classes: int, images: int, test: int, side: int) -> Training:
    settings = config.clustering
    objective = settings.objective
    if not isinstance(objective, SCANSettings):
        raise ValueError(f"clustering.objective must be scan here, got {objective.kind!r}")
    if settings.update == "features":
        raise ValueError("clustering.update=features trains no network, so there is nothing to predict")
    frozen, cached = settings.update == "heads", settings.cached_views
    network = cluster_network(config.model, side, classes, settings.heads, frozen=frozen)
    checks = -(-settings.epochs // settings.evaluate_every)
    reported = test or images
    sync = config.model.sync_batch_norm and not frozen
    views = 0 if cached is not None else 2
    return Training(
        name="clustering",
        network=network,
        images=images,
        batch=settings.batch_size,
        epochs=settings.epochs,
        side=side,
        trained=0.0 if frozen else views,
        forward=views if frozen else 0.0,
        decoded=views,
        norm_forward=2 if sync else 0,
        norm_backward=2 if sync else 0,
        buffers=not frozen and not sync,
        loss=lambda samples: scan_messages(settings.heads, classes, prior=objective.prior != "uniform"),
        state=_state(settings.optimizer),
        checked=_clustering_checked(config, checks * reported, images + test),
        # The centres of the clusters are computed from all features, if those were computed once.
        gathered=checks * reported * classes * settings.heads
        + (images + test) * classes
        + images * network.features * frozen,
        widest=4.0 * classes * max(images, reported * settings.heads),
        kept=4.0 * network.features * images * ((cached or 0) + frozen),
        before=float(images * (cached or 0)),
    )


def _clustering_checked(config: Config, evaluated: int, everything: int) -> float:
    """Return the images that pass forward for evaluations: a frozen backbone computes its features once."""
    if config.clustering.update == "full":
        return evaluated + everything
    return 0 if config.mining.features == "backbone" else everything


def _selflabel(config: Config, classes: int, images: int, test: int, side: int) -> Training:
    settings = config.selflabel
    assert settings is not None
    network = cluster_network(config.model, side, classes, 1, frozen=False)
    checks = 1 + -(-settings.epochs // settings.evaluate_every)
    reported = test or images
    sync = config.model.sync_batch_norm
    # Without a teacher the network gives the labels itself, in training mode.
    passes = 1 if settings.ema is not None and settings.ema_mode == "teacher" else 2
    return Training(
        name="selflabel",
        network=network,
        images=images,
        batch=settings.batch_size,
        epochs=settings.epochs,
        side=side,
        trained=1.0,
        forward=1.0,
        decoded=1,
        norm_forward=passes if sync else 0,
        norm_backward=1 if sync else 0,
        buffers=not sync,
        loss=lambda samples: self_label_messages(classes),
        state=_state(settings.optimizer) + (settings.ema is not None),
        checked=checks * reported + images + test,
        gathered=(checks * reported + images + test) * classes,
        widest=4.0 * classes * images,
    )
