"""Batch normalisation over several ranks: the operator and networks against one process with the whole batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import answers_by_rank
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scan_fast.models.backbones import SmallResNet
from scan_fast.models.batch_norm import BatchNormAct2d
from scan_fast.models.sync_batch_norm import SyncBatchNorm2d, SyncBatchNormAct2d, synchronized
from scan_fast.ops import native
from scan_fast.ops.batch_norm import batch_norm
from scan_fast.ops.collectives import rows_of_all_ranks
from scan_fast.ops.dispatch import Impl
from scan_fast.ops.sync_batch_norm import sync_batch_norm


class Case(NamedTuple):
    """A call: rows of each rank, shape of a row, and options."""

    counts: tuple[int, int]
    shape: tuple[int, ...]
    impl: Impl = "auto"
    dtype: torch.dtype = torch.float32
    residual: bool = False
    relu: bool = False
    mean: float = 0.4
    running: bool = True


IMAGE = (20, 6, 6)
LARGE = (64, 16, 16)  # a rank with 17 of them computes in two parts, the second of one image
CASES = [
    Case((4, 4), IMAGE, "native", residual=True, relu=True),
    Case((4, 4), IMAGE, "reference", residual=True, relu=True),
    Case((5, 2), IMAGE, "native", relu=True),
    Case((1, 6), IMAGE, "reference", relu=True),
    Case((5, 2), IMAGE, "native", residual=True),
    Case((5, 2), IMAGE, "reference", residual=True),
    Case((9, 7), IMAGE, "native", mean=1e3),
    Case((9, 7), IMAGE, "reference", mean=1e3),
    Case((17, 7), LARGE, "native", residual=True, relu=True),
    Case((17, 7), LARGE, "reference", residual=True, relu=True),
    Case((17, 7), LARGE, "native", torch.bfloat16, residual=True, relu=True),
    Case((17, 7), LARGE, "reference", torch.bfloat16, residual=True, relu=True),
    Case((4, 4), IMAGE, "native", torch.float16, relu=True),
    Case((4, 4), IMAGE, "reference", torch.float16, mean=30.0),
    Case((4, 4), IMAGE, "native", torch.bfloat16, mean=30.0),
    Case((2, 1), (16, 1, 1), "native"),
    Case((7, 5), (9,)),
    Case((11, 1), (9,), residual=True, relu=True),
    Case((30, 34), (9,), dtype=torch.bfloat16),
    Case((7, 5), (9,), mean=1e3),
    Case((3, 4), (6, 5)),
    Case((2, 4), (4, 3, 2, 5), relu=True),
    Case((6, 0), (9,)),
    Case((0, 6), IMAGE, residual=True, relu=True),
    Case((4, 3), IMAGE, running=False),
    Case((4, 3), IMAGE, dtype=torch.float64, residual=True, relu=True),
]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error of a result, relative to its Euclidean norm."""


def computable(case: Case) -> bool:
    return case.impl != "native" or native.is_available()


def problem(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Return x, residual, the vectors of the channels, and the upstream gradient, of all ranks."""
    generator = torch.Generator().manual_seed(len(case.shape) + sum(case.counts))
    shape = (sum(case.counts), *case.shape)
    x, residual, upstream = (torch.randn(shape, generator=generator) for _ in range(3))
    # Rows of increasing size and mean: the statistics of the ranks differ.
    slope = torch.linspace(0.5, 2, len(x)).view(-1, *[1] * len(case.shape))
    x = (case.mean + slope * (x + slope)).to(case.dtype)
    residual, upstream = residual.to(case.dtype), upstream.to(case.dtype)
    if len(case.shape) == 3:
        x, residual, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, upstream))
    names = ("weight", "bias", "running_mean", "running_var")
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    vectors = {name: 0.5 + torch.rand(case.shape[0], generator=generator).to(dtype) for name in names}
    return x, residual, vectors, upstream


def results(call: Callable[..., Tensor], case: Case, values: Any, **options: Any) -> dict[str, Tensor]:
    """Return the output, the gradients of the sum of output times upstream gradient, and the running statistics."""
    x, residual, vectors, upstream = values
    leaves = {"x": x, "residual": residual, "weight": vectors["weight"], "bias": vectors["bias"]}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    running = [vectors[name].clone() if case.running else None for name in ("running_mean", "running_var")]
    extra = leaves["residual"] if case.residual else None
    y = call(leaves["x"], leaves["weight"], leaves["bias"], *running, residual=extra, momentum=0.3, **options)
    wanted = {name: t for name, t in leaves.items() if case.residual or name != "residual"}
    gradients = torch.autograd.grad(y, list(wanted.values()), upstream)
    found = {"y": y.detach(), **{f"grad_{name}": g for name, g in zip(wanted, gradients, strict=True)}}
    if case.running:
        found.update(zip(("running_mean", "running_var"), (t for t in running if t is not None), strict=True))
    assert found["y"].dtype == case.dtype == found["grad_x"].dtype
    assert found["y"].stride() == x.stride() or len(x) < 2
    return found


def errors(rank: int, case: Case) -> dict[str, tuple[float, float, float]]:
    """Return for each result its error against float64, that of one process in this dtype, and its norm."""
    values = x, residual, vectors, upstream = problem(case)

    def own(t: Tensor) -> Tensor:
        part = t.split(case.counts)[rank]
        return part.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else part

    local = results(
        sync_batch_norm, case, (own(x), own(residual), vectors, own(upstream)), relu=case.relu, impl=case.impl
    )
    found = {}
    for name, value in local.items():
        if name.startswith("running"):
            found[name] = value.double()  # every rank has those of all rows
        elif value.ndim == 1:
            found[name] = value.double()
            dist.all_reduce(found[name])
        else:
            # Elements in the order of their indices, whatever the layout.
            rows = rows_of_all_ranks(value.double().reshape(len(value), x[0].numel()), case.counts)
            found[name] = rows.view(x.shape)
    plain = results(batch_norm, case, values, relu=case.relu, impl="reference", training=True)

    def error(result: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        # Rounding may move a value across zero, where both gradients of the ReLU are right: the sign is the result's.
        gate = (result["y"] > 0).double() if case.relu else 1.0
        doubles = (x.double(), residual.double(), {k: v.double() for k, v in vectors.items()}, upstream * gate)
        exact = results(
            batch_norm, case._replace(dtype=torch.float64), doubles, relu=False, impl="reference", training=True
        )
        exact["y"] = exact["y"].relu() if case.relu else exact["y"]
        assert result.keys() == exact.keys()
        return {
            name: (float((result[name].double() - value).norm()), float(value.norm())) for name, value in exact.items()
        }

    ours, theirs = error(found), error(plain)
    return {name: (ours[name][0], theirs[name][0], ours[name][1]) for name in ours}


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return layers in float64, by name, with the shape of a row each."""
    torch.manual_seed(5)
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "1d": (nn.BatchNorm1d(6), (6,)),
        "1d, sequences": (nn.BatchNorm1d(6, eps=0.1), (6, 4)),
        "2d": (nn.BatchNorm2d(6, momentum=0.7), (6, 3, 2)),
        "3d": (nn.BatchNorm3d(6), (6, 3, 2, 2)),
        "fused": (BatchNormAct2d(6), (6, 3, 2)),
        "fused, no ReLU": (BatchNormAct2d(6, relu=False), (6, 3, 2)),
        "cumulative": (nn.BatchNorm1d(6, momentum=None), (6,)),
        "not affine": (nn.BatchNorm1d(6, affine=False), (6,)),
        "not tracked": (nn.BatchNorm2d(6, track_running_stats=False), (6, 3, 2)),
    }
    without_bias = nn.BatchNorm1d(6)
    without_bias.register_parameter("bias", None)
    found["no bias"] = (without_bias, (6,))
    try:
        from timm.layers import BatchNormAct2d as NormThenAct2d
    except ImportError:
        pass
    else:
        found["timm"] = (NormThenAct2d(6, act_layer=nn.PReLU), (6, 3, 2))
    for layer, _ in found.values():
        for parameter in layer.double().parameters():
            nn.init.uniform_(parameter, 0.2, 1.0)
    return found


def layer_differences(rank: int, world: int) -> dict[str, float]:
    """Return the largest difference of each layer from the plain one with all rows, after two steps."""
    found = {}
    for name, (layer, shape) in layers().items():
        plain, changed = copy.deepcopy(layer), synchronized(layer)
        wrapped = DistributedDataParallel(changed) if any(True for _ in changed.parameters()) else changed
        worst = 0.0
        for step in range(2):
            torch.manual_seed(step)
            x = torch.randn(3 * world, *shape, dtype=torch.float64) + torch.arange(6.0).view(6, *[1] * (len(shape) - 1))
            x *= torch.linspace(1, 3, len(x)).view(-1, *[1] * len(shape))
            upstream = torch.randn_like(x)
            mine = x.chunk(world)[rank].clone().requires_grad_()
            whole = x.requires_grad_()
            y, expected = wrapped(mine), plain(whole)
            (y * upstream.chunk(world)[rank]).sum(dim=1).mean().backward()
            (expected * upstream).sum(dim=1).mean().backward()
            assert mine.grad is not None and whole.grad is not None
            pairs = [(y, expected.chunk(world)[rank]), (mine.grad / world, whole.grad.chunk(world)[rank])]
            pairs += [(a.grad, b.grad) for a, b in zip(changed.parameters(), plain.parameters(), strict=True)]
            pairs += list(zip(changed.buffers(), plain.buffers(), strict=True))
            worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in pairs))
        found[name] = worst
    return found


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    backbone = SmallResNet([16, 24], (1, 2))
    head = (nn.Linear(24, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    model = nn.Sequential(backbone, *head).to(dtype).to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
    return model


def images(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 10, 10, generator=generator) * torch.linspace(0.5, 2, count).view(-1, 1, 1, 1)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def network_differences(rank: int, world: int, dtype: torch.dtype) -> dict[str, float]:
    """Return relative differences of gradients, statistics and outputs from one process with the whole batch."""

    def loss(y: Tensor) -> Tensor:
        return (y - torch.arange(4, dtype=y.dtype)).square().sum(dim=1).mean()

    batch = images(4 * world, dtype)
    plain = network(dtype)
    wrapped = DistributedDataParallel(synchronized(network(dtype)))
    ours = wrapped.module
    loss(plain(batch)).backward()
    loss(wrapped(batch.chunk(world)[rank].contiguous(memory_format=torch.channels_last))).backward()
    pairs = {}
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        pairs[name] = (a.grad, b.grad)
    expected = dict(plain.named_buffers())
    pairs.update({name: (a.double(), expected[name].double()) for name, a in ours.named_buffers()})
    with torch.no_grad():
        pairs["evaluation"] = (wrapped.eval()(batch), plain.eval()(batch))
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def refusals() -> list[str]:
    """Return the messages of calls that cannot be computed. All ranks make the same calls."""
    x, one = torch.randn(3, 4), torch.ones(4)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, one, one, None, None), {"impl": "fast"}),
        ((x[0], one, one, None, None), {}),
        ((x.long(), one, one, None, None), {}),
        ((x, one[:3], one, None, None), {}),
        ((x, one, one, None, one.clone()), {}),
        ((x, one, one, None, None), {"residual": x[:2]}),
        ((x[: int(dist.get_rank() == 0)], one, one, None, None), {}),
    ]
    messages = []
    for arguments, options in calls:
        try:
            sync_batch_norm(*arguments, **options)
            messages.append("nothing was raised")
        except ValueError as error:
            messages.append(str(error))
    return messages


def _one_rank(rank: int, store_path: str, world: int, answers: Any) -> None:
    """Run one rank in its own process: put (rank, errors of networks, cases and layers, error texts) into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store_path}", rank=rank, world_size=world)
    networks = {dtype: network_differences(rank, world, dtype) for dtype in (torch.float32, torch.float64)}
    if world == 2:
        cases = [errors(rank, case) if computable(case) else None for case in CASES]
        answers.put((rank, networks, cases, layer_differences(rank, world), refusals()))
    else:
        answers.put((rank, networks))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Any]]:
    """Return the number of ranks and the answers of each."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("no gloo")
    world = int(request.param)
    return world, answers_by_rank(_one_rank, tmp_path_factory.mktemp("ranks"), world, seconds=300)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_normalise_the_whole_batch(case: Case, ranks: tuple[int, list[Any]]) -> None:
    if not computable(case):
        pytest.skip("the compiled module is not built")
    for _, _, cases, *_ in ranks[1]:
        found = cases[CASES.index(case)]
        assert found.keys() >= {"y", "grad_x", "grad_weight", "grad_bias"}
        assert case.residual == ("grad_residual" in found) and case.running == ("running_var" in found)
        for name, (error, plain, size) in found.items():
            # Float32 keeps few digits of a value beside a large mean, in one process as well.
            allowed = 2 * plain if case.mean > 100 else 0.0
            limit = LIMITS[case.dtype if name in ("y", "grad_x", "grad_residual") else torch.float32]
            if case.dtype == torch.float64:
                limit = LIMITS[torch.float64]
            assert error <= limit * size + allowed, f"{name}: {error:.1e} of {size:.1e}, in one process {plain:.1e}"


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_layers_of_ranks_equal_plain_ones_with_all_rows(ranks: tuple[int, list[Any]]) -> None:
    for *_, differences, _ in ranks[1]:
        assert differences.keys() == layers().keys()
        assert max(differences.values()) < 1e-12, differences


def test_a_network_of_ranks_trains_as_one_process(ranks: tuple[int, list[Any]]) -> None:
    for _, networks, *_ in ranks[1]:
        for dtype, limit in ((torch.float32, 5e-5), (torch.float64, 1e-12)):
            assert len(networks[dtype]) > 40
            assert max(networks[dtype].values()) < limit, networks[dtype]


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_wrong_arguments_are_named_over_ranks(ranks: tuple[int, list[Any]]) -> None:
    for *_, messages in ranks[1]:
        assert [message.partition(",")[0] for message in messages] == [
            'impl must be "auto"',
            "x must be (N",
            "x must be (N",
            "weight must be (4",
            "running_mean and running_var must both be given",
            "residual must have the shape of x",
            "training needs more than one value per channel; all ranks together have 1",
        ]


def test_one_process_computes_what_the_plain_layers_do() -> None:
    for name, (layer, shape) in layers().items():
        x = torch.randn(5, *shape, dtype=torch.float64)
        plain, changed = layer, synchronized(copy.deepcopy(layer))
        assert type(changed) is not type(plain)
        for training in (True, False):
            y, expected = changed.train(training)(x), plain.train(training)(x)
            assert torch.equal(y, expected), name
        torch.testing.assert_close(dict(changed.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    case = Case((5, 2), IMAGE, residual=True, relu=True)
    values = problem(case)
    found = results(sync_batch_norm, case, values, relu=True)
    expected_results = results(batch_norm, case, values, relu=True, training=True)
    assert all(torch.equal(found[name], expected_results[name]) for name in expected_results)


def test_layers_change_in_place_and_keep_what_they_hold() -> None:
    model = network(torch.float32)
    model.append(model[2])  # one layer under two names
    model[2].eval()
    held = {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()}
    parts = dict(model.named_modules(remove_duplicate=False))
    weights = list(model.parameters())
    fused = model[0].bn1
    assert isinstance(fused, BatchNormAct2d)
    fused.relu, fused.momentum, fused.eps = False, 0.3, 0.01
    assert synchronized(model) is model
    assert {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()} == held
    assert dict(model.named_modules(remove_duplicate=False)) == parts
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert isinstance(model[0].bn1, SyncBatchNormAct2d) and isinstance(model[0].bn1, BatchNormAct2d)
    assert (fused.relu, fused.momentum, fused.eps) == (False, 0.3, 0.01)
    assert isinstance(model[2], nn.BatchNorm1d) and not model[2].training and model[0].bn1.training
    kinds = [type(layer) for layer in model.modules()]
    assert BatchNormAct2d not in kinds and nn.BatchNorm1d not in kinds
    assert [type(layer) for layer in synchronized(model).modules()] == kinds  # a second time


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_synchronised_layers_can_be_copied(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(*(synchronized(layer) for layer, _ in layers().values()))
    twin = copied(model)
    assert isinstance(twin, nn.Sequential)
    assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in model.modules()]
    assert {t.data_ptr() for t in twin.parameters()}.isdisjoint({t.data_ptr() for t in model.parameters()})
    for layer, other, (_, shape) in zip(model, twin, layers().values(), strict=True):
        x = torch.randn(4, *shape, dtype=torch.float64)
        assert torch.equal(layer(x), other(x))


def test_evaluation_and_loading_are_those_of_the_plain_network() -> None:
    plain = network(torch.float32)
    plain(images(6, torch.float32))
    changed = synchronized(copy.deepcopy(plain))
    x = images(3, torch.float32)
    assert torch.equal(changed.eval()(x), plain.eval()(x))
    fresh = synchronized(network(torch.float32))
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.eval()(x), plain(x))


class Doubled(nn.BatchNorm2d):
    """A layer with a step of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and double."""
        return 2 * super().forward(x)


def test_unknown_layers_are_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Doubled(3)))
    with pytest.raises(ValueError, match=r"layer '1.0' is a .*test_sync_batch_norm.Doubled, which has no counterpart"):
        synchronized(model)
    assert type(model[0]) is nn.BatchNorm2d
    for layer in (nn.SyncBatchNorm(3), nn.LazyBatchNorm1d()):
        with pytest.raises(ValueError, match=f"the module is a .*{type(layer).__name__}, which has no counterpart"):
            synchronized(layer)


def test_networks_of_timm_keep_their_activations() -> None:
    timm = pytest.importorskip("timm")
    plain = timm.create_model("efficientnet_lite0", num_classes=5)
    changed = synchronized(copy.deepcopy(plain))
    count = sum(isinstance(layer, SyncBatchNorm2d) for layer in changed.modules())
    assert count == sum(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules()) > 40
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        outputs = []
        for model in (plain, changed):
            torch.manual_seed(0)
            outputs.append(model.train(training)(x))
        assert torch.equal(*outputs)
