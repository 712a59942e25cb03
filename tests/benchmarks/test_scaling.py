"""The simulator of runs on several ranks: its bytes are those of real steps on two processes, its times near them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from driving import TINY, fill
from rank_runs import free_port
from ranks import answers_by_rank
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ranks.machine import RESULTS, Machine, h200
from benchmarks.ranks.network import buckets, pretext_network
from benchmarks.ranks.plan import plan
from benchmarks.ranks.stages import IMAGES, Mining, Training, describe
from benchmarks.ranks.traffic import ALL_GATHER, ALL_REDUCE, BROADCAST, SEND, Message, TrafficCounter, by_collective
from benchmarks.scaling import described, main
from scan_fast.cli import main as command_line
from scan_fast.losses import NTXentLoss
from scan_fast.models.heads import PretextModel
from scan_fast.ops.collectives import all_gather
from scan_fast.runs.config import find_config, load_config
from scan_fast.training import loop
from scan_fast.training.step import TrainingStep

WORLD = 2
SECONDS = 180


@contextmanager
def group(rank: int, store: str, world: int) -> Iterator[None]:
    """Meet the other processes for a while."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- the counter ----------------------------------------------------------------------------------------------------


def counted_calls(rank: int, store: str, world: int, results: Any) -> None:
    """Make a call of each collective with tensors of known size."""
    with group(rank, store, world), TrafficCounter() as counter:
        dist.all_reduce(torch.zeros(7))
        dist.all_reduce(torch.zeros(3, dtype=torch.float64))
        dist.all_gather([torch.zeros(5), torch.zeros(5)], torch.zeros(5))
        dist.all_gather_into_tensor(torch.zeros(2 * 6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
        dist.broadcast(torch.zeros(11), src=0)
        if rank == 0:
            dist.send(torch.zeros(13), dst=1)
        else:
            dist.recv(torch.zeros(13), src=0)
        other = 1 - rank
        pair = [dist.P2POp(dist.isend, torch.zeros(4), other), dist.P2POp(dist.irecv, torch.zeros(4), other)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        dist.barrier()
        results.put((rank, counter.counted(), dict(counter.payload)))


def test_the_counter_sees_every_collective(tmp_path: Path) -> None:
    for rank, found, payload in answers_by_rank(counted_calls, tmp_path, WORLD, seconds=SECONDS):
        sent = (16, 1) if rank else (16 + 52, 2)
        expected = {ALL_REDUCE: (28 + 24, 2), ALL_GATHER: (20 + 48, 2), BROADCAST: (44, 1), SEND: sent}
        assert found == expected
        assert payload[ALL_REDUCE, "float64"] == 24 and payload[ALL_GATHER, "int64"] == 48


class Layers(nn.Module):
    """Linear layers beside each other."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for size in sizes)

    def forward(self, rows: list[Tensor]) -> Tensor:
        """Return the sum of all outputs."""
        return torch.stack([layer(x).sum() for layer, x in zip(self.layers, rows, strict=True)]).sum()


def counted_backward(rank: int, store: str, world: int, sizes: list[int], results: Any) -> None:
    """Count the gradients of linear layers that DistributedDataParallel sends, from its fifth step on."""
    with group(rank, store, world):
        network = DistributedDataParallel(Layers(sizes), static_graph=True)
        counter = TrafficCounter()
        for _ in range(5):
            counter.clear()
            with counter:
                network([torch.ones(1, size) for size in sizes]).backward()
        results.put((rank, counter.counted()))


@pytest.mark.parametrize("sizes", [[8, 8], [600, 700, 20, 800, 8], [2700, 100, 2700]])
def test_gradients_travel_in_the_predicted_buckets(sizes: list[int], tmp_path: Path) -> None:
    expected = {ALL_REDUCE: (4 * sum(size**2 for size in sizes), buckets([4 * size**2 for size in sizes]))}
    for _, found in answers_by_rank(counted_backward, tmp_path, WORLD, sizes, seconds=SECONDS):
        assert found == expected


# ---- bytes of a step ------------------------------------------------------------------------------------------------

SMALL = ("model.backbone=resnet_digits", "pretext.batch_size=16", "precision=float32")


def digits(*changes: str) -> dict[str, Training | Mining]:
    """Return the predicted stages of a run on the digits."""
    config = load_config(find_config("digits"), [*SMALL, *changes])
    return {stage.name: stage for stage in describe(config, *IMAGES["digits"]).stages}


def counted_simclr(rank: int, store: str, world: int, changes: list[str], results: Any) -> None:
    """Count a SimCLR step of plain PyTorch: DistributedDataParallel, and the loss over all ranks."""
    config = load_config(find_config("digits"), [*SMALL, *changes])
    with group(rank, store, world):
        network = DistributedDataParallel(PretextModel(config.model))
        loss = NTXentLoss(0.2, anchors=config.pretext.method.anchors, gather_distributed=True)  # type: ignore[union-attr]
        images = config.pretext.batch_size // world
        counter = TrafficCounter()
        for _ in range(5):
            counter.clear()
            with counter:
                loss(*network(torch.randn(2 * images, 3, 8, 8)).chunk(2)).backward()
        results.put((rank, counter.counted()))


@pytest.mark.parametrize("anchors", ["both", "first"])
def test_bytes_of_a_plain_simclr_step(anchors: str, tmp_path: Path) -> None:
    changes = [f"pretext.method.anchors={anchors}", "pretext.batch_size=24"]
    stage = digits(*changes)["pretext"]
    assert isinstance(stage, Training)
    own_statistics = dataclasses.replace(stage, norm_forward=0, norm_backward=0, buffers=True)
    expected = by_collective(own_statistics.messages(WORLD))
    for _, found in answers_by_rank(counted_simclr, tmp_path, WORLD, changes, seconds=SECONDS):
        assert found == expected


STAGES = ("pretext", "clustering", "selflabel")
STEPS = ("pretext.epochs=3", "clustering.epochs=3", "selflabel.epochs=3")
"""Six steps a stage: DistributedDataParallel sends more in the first four."""


def as_rank(rank: int, world: int, port: int) -> None:
    """Set the variables that torchrun sets."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**place, **address}.items()})


def counted_run(rank: int, store: str, world: int, port: int, words: list[str], results: Any) -> None:
    """Run the command line as torchrun starts it, and count the collectives of the last two steps of each stage."""
    counts: dict[str, list[dict[str, tuple[int, int]]]] = {}

    class CountedStep(TrainingStep):
        def __call__(self, batch: Any) -> None:
            with TrafficCounter() as counter:
                super().__call__(batch)
            assert isinstance(self._stage, loop.Stage)
            counts.setdefault(self._stage.name, []).append(counter.counted())

    loop.__dict__["TrainingStep"] = CountedStep
    as_rank(rank, world, port)
    code = command_line(words)
    results.put((rank, code, {name: found[-2:] for name, found in counts.items()}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [],
        [
            *("model.sync_batch_norm=false", "pretext.method.anchors=first"),
            *("clustering.objective.prior=estimated", "clustering.initialize=kmeans"),
        ],
        ["pretext.method.small_views=1", "pretext.method.small_view.size=6", "selflabel.ema=null"],
        ["pretext.method.batch_statistics=per_view", "selflabel.ema_mode=write_back", "model.projector=mlp_bn"],
        ["clustering.update=heads", "clustering.cached_views=2", "selflabel=null"],
    ],
    ids=["as configured", "own statistics and a prior", "small views", "statistics of views", "frozen"],
)
def test_bytes_of_the_steps_of_a_run(changes: list[str], tmp_path: Path) -> None:
    settings = [*TINY, *STEPS, *changes]
    config = load_config(find_config("digits"), settings)
    stages = [stage for stage in describe(config, 160, 449, 8).stages if isinstance(stage, Training)]
    expected = {stage.name: [by_collective(stage.messages(WORLD))] * 2 for stage in stages}
    assert set(expected) == {name for name in STAGES if name != "selflabel" or config.selflabel is not None}
    words = ["run", "digits", *settings, "--out", str(tmp_path / "run"), "--quiet"]
    for _, code, found in answers_by_rank(counted_run, tmp_path, WORLD, free_port(), words, seconds=SECONDS):
        assert code == 0
        assert found == expected


def counted_mining(rank: int, store: str, world: int, port: int, words: list[str], results: Any) -> None:
    """Count what mining sends, ranks to ranks, while the command line runs as torchrun starts it."""
    as_rank(rank, world, port)
    with TrafficCounter() as counter:
        code = command_line(words)
    results.put((rank, code, counter.counted()[SEND]))


@pytest.mark.slow
def test_bytes_of_the_search(tmp_path: Path) -> None:
    """Both splits have an even number of blocks of 20 images, so that the ranks have equal shares."""
    settings = [*TINY, "data.labels=none", "evaluation.batch_size=20", "mining.test_k=5", "data.test_fraction=0.25"]
    folder = str(tmp_path / "images")
    fill(Path(folder), 160)
    words = ["--data", folder, *settings, "--out", str(tmp_path / "run"), "--quiet"]
    settings_of_files = ["model.backbone=resnet_digits", "data.image_size=16", "clustering.n_clusters=3"]
    assert command_line(["pretext", *words, *settings_of_files]) == 0
    config = load_config(find_config("folder"), [*settings, *settings_of_files])
    mined = [next(stage for stage in describe(config, n, 0, 16).stages if isinstance(stage, Mining)) for n in (120, 40)]
    messages = [message for stage in mined for message in stage.messages(WORLD) if message.collective == SEND]
    blocks, rest = ([m for m in messages if (m.kind == "blocks") == is_block] for is_block in (True, False))
    words = ["mine", str(tmp_path / "run"), "--quiet"]
    answers = answers_by_rank(counted_mining, tmp_path, WORLD, free_port(), words, seconds=SECONDS)
    assert [code for _, code, _ in answers] == [0, 0]
    for (_, _, found), sent in zip(answers, (blocks, [*blocks, *rest]), strict=True):
        assert found == (sum(m.bytes for m in sent), sum(m.calls for m in sent))


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    stage = digits()["pretext"]
    with pytest.raises(ValueError, match="batch of 16 images cannot be divided among 3 ranks"):
        stage.messages(3)
    assert stage.messages(1) == []


# ---- times ----------------------------------------------------------------------------------------------------------

LARGE, TRIES = 1_000_000, 60
MIXED = (
    Message("gradients", ALL_REDUCE, 3 * 4 * 500_000, 3),
    Message("statistics", ALL_REDUCE, 20 * 4 * 200, 20),
    Message("embeddings", ALL_GATHER, 4 * 300_000, 1),
)


def seconds_of(collective: str, numbers: int) -> float:
    """Return the time of one call, the shortest of many; all ranks begin together."""
    x, times = torch.zeros(numbers), []
    for _ in range(TRIES):
        dist.barrier()
        begin = time.perf_counter()
        if collective == ALL_REDUCE:
            dist.all_reduce(x)
        else:
            all_gather(x)
        times.append(time.perf_counter() - begin)
    return min(times)


def timed_collectives(rank: int, store: str, world: int, results: Any) -> None:
    """Time a latency, a rate, and a mixture of collectives."""
    with group(rank, store, world):
        latency, large = seconds_of(ALL_REDUCE, 1), seconds_of(ALL_REDUCE, LARGE)
        mixture = sum(m.calls * seconds_of(m.collective, int(m.bytes / m.calls / 4)) for m in MIXED)
        results.put((rank, latency, large, mixture))


@pytest.mark.serial
def test_times_of_collectives_follow_from_latency_and_rate(tmp_path: Path) -> None:
    """Latency and rate of all-reduces of two sizes predict a mixture of collectives of other sizes."""
    answers = answers_by_rank(timed_collectives, tmp_path, WORLD, seconds=SECONDS)
    latency, large, mixture = (max(answer[place] for answer in answers) for place in (1, 2, 3))
    machine = dataclasses.replace(h200(), link_seconds=latency, link=4 * LARGE / (large - latency))
    assert mixture / 2 < machine.seconds(MIXED, WORLD) < mixture * 2


def test_one_gpu_takes_about_as_long_as_was_measured() -> None:
    """CIFAR-10 by the rates of a SimCLR step; stages two and three were measured apart from it."""
    file = json.loads((RESULTS / "cifar10-fast-h200.json").read_text())
    found = {stage.name: stage.seconds for stage in plan(described("cifar10", [], None), h200(), 1).stages}
    for name in ("pretext", "clustering", "selflabel"):
        measured = file["stages"][name]["seconds"]
        assert measured / 1.5 < found[name] < 1.5 * measured, name


def simple(**changes: Any) -> Machine:
    """Return machines of two GPUs with round figures."""
    figures = {"gpus": 2, "link": 1e9, "network": 1e8, "link_seconds": 1e-3, "network_seconds": 2e-3}
    return dataclasses.replace(h200(), **(figures | changes))


def test_a_network_between_machines_is_slower_than_a_link() -> None:
    messages = [Message("gradients", ALL_REDUCE, 1e9, 10)]
    assert simple().seconds(messages, 1) == 0
    assert simple().seconds(messages, 2) == pytest.approx(0.01 + 1.0)
    assert simple().seconds(messages, 4) == pytest.approx(0.02 + 15.0)


def test_gradients_hide_behind_the_backward_pass_only() -> None:
    run = described("cifar10", ["selflabel=null"], None)
    slow = plan(run, simple(link=1e6, overlap=1.0), 2).stages[0]
    fast = plan(run, simple(link=1e12, link_seconds=0, overlap=1.0), 2).stages[0]
    none = plan(run, simple(link=1e12, link_seconds=0, overlap=0.0), 2).stages[0]
    assert slow.bound == "communication" and slow.hidden < slow.compute
    assert fast.bound == "computing" and fast.seconds < none.seconds
    assert none.hidden == 0


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_more_gpus_share_the_work_but_not_what_every_rank_keeps() -> None:
    run = described("imagenet", ["pretext.method=simclr", "pretext.batch_size=4096"], None)
    few, many = plan(run, h200(), 8), plan(run, h200(), 64)
    assert many.machines == 8 and few.problems == () == many.problems
    for one, other in zip(few.stages, many.stages, strict=True):
        assert other.compute == pytest.approx(one.compute / 8)
        assert other.host == one.host and other.first == one.first
    mining = few.stages[1]
    assert mining.first == 1_281_167 * (4 * 2048 + 12 * 50)
    assert mining.step_messages[0].bytes == pytest.approx(1_281_167 * 2048 * 4 * 7 / 8)


def test_a_billion_images_do_not_fit_and_the_plan_says_where() -> None:
    changes = ["pretext.method=simclr", "pretext.batch_size=4096", "mining.features=projection", "mining.k=20"]
    found = plan(described("imagenet", changes, 10**9), h200(), 64)
    assert any(problem.startswith("mining: ") and "host memory" in problem for problem in found.problems)
    search = 2 * 1e18 * 128 / 64 / h200().search_flops
    assert search < found.stages[1].compute < 1.1 * search


def test_the_command_prints_the_plan_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    main(["--config", "cifar10", "--gpus", "2,4", "--network", "10", "--json", str(file), "pretext.epochs=3"])
    text = capsys.readouterr().out
    assert "Computed, not measured" in text and "| 4 | pretext |" in text and "| pretext: gradients |" in text
    assert "benchmarks/results/step-h200.json" in text and "| network | 1e+10 | given |" in text
    result = json.loads(file.read_text())
    assert [entry["ranks"] for entry in result["plans"]] == [2, 4]
    assert [stage["name"] for stage in result["plans"][0]["stages"]] == ["pretext", "mining", "clustering", "selflabel"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0"], "whole numbers above 0"),
        (["--config", "cifar10", "--gpus", "3"], "cannot be divided among 3"),
        (["--config", "stl10"], "--config must be one of"),
        (["pretext.method=byol"], "pretext.method must be simclr or weights"),
        (["clustering.objective=temi"], "clustering.objective must be scan"),
    ],
)
def test_what_is_not_predicted_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_sizes_of_a_network_are_those_that_it_has() -> None:
    config = load_config(find_config("cifar10"), []).model
    network = pretext_network(config, 32)
    model = PretextModel(config)
    assert sum(network.parameters) == sum(p.numel() for p in model.parameters()) and network.features == 512
    assert sum(network.channels) == sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert network.multiply_adds == pytest.approx(5.557e8, rel=1e-3)
