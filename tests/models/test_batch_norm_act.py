"""The layer with normalisation, residual and ReLU in one: nn.BatchNorm2d in all but its steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scan_fast.models.backbones import BasicBlock, SmallResNet
from scan_fast.models.batch_norm import BatchNormAct2d
from scan_fast.ops import native, reference


class PlainBlock(nn.Module):
    """A basic block of PyTorch's own layers, with the names of ours."""

    conv1: nn.Module
    conv2: nn.Module
    shortcut: nn.Sequential

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        for name in ("conv1", "conv2", "shortcut"):
            self.add_module(name, getattr(block, name))
        self.bn1, self.bn2 = plain_norm(block.bn1), plain_norm(block.bn2)
        if len(self.shortcut) > 0:
            norm = self.shortcut[1]
            assert isinstance(norm, BatchNormAct2d)
            self.shortcut[1] = plain_norm(norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PlainResNet(nn.Module):
    """Our network with PyTorch's own normalisation."""

    def __init__(self, network: SmallResNet) -> None:
        super().__init__()
        self.conv1, self.bn1 = network.conv1, plain_norm(network.bn1)
        self.blocks = [name for name, _ in network.named_children() if name.startswith("layer")]
        for name in self.blocks:
            self.add_module(name, nn.Sequential(*(PlainBlock(block) for block in getattr(network, name))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def plain_norm(layer: BatchNormAct2d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(layer.num_features)
    plain.load_state_dict(layer.state_dict())
    return plain


def network() -> SmallResNet:
    torch.manual_seed(3)
    model = SmallResNet([16, 24], (1, 2)).to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, BatchNormAct2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
    return model


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 10, 10).contiguous(memory_format=torch.channels_last)


def test_its_state_is_that_of_pytorchs_layer() -> None:
    ours, plain = BatchNormAct2d(12), nn.BatchNorm2d(12)
    assert isinstance(ours, nn.BatchNorm2d)
    assert {name: (t.shape, t.dtype) for name, t in ours.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in plain.state_dict().items()
    }
    x = torch.randn(3, 12, 4, 4)
    plain(x)
    ours.load_state_dict(plain.state_dict())
    assert ours.num_batches_tracked == 1
    ours(x.contiguous(memory_format=torch.channels_last))
    plain(x)
    assert ours.num_batches_tracked == 2
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))
    assert repr(BatchNormAct2d(12, relu=False)).endswith("relu=False)")


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_network_equals_its_plain_twin(channels_last: bool) -> None:
    ours = network()
    plain = PlainResNet(copy.deepcopy(ours)).to(memory_format=torch.channels_last)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for training in (True, True, False):
        x = images().contiguous(memory_format=layout)
        results = []
        for model in (ours, plain):
            model.train(training).zero_grad()
            y = model(x)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            results.append((y.detach(), dict(model.state_dict()), gradients))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-5)


def test_under_autocast_it_keeps_sixteen_bits() -> None:
    layer = BatchNormAct2d(16)
    x = images().repeat(1, 6, 1, 1)[:, :16].bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, residual=x)
    assert y.dtype == torch.bfloat16
    exact = F.relu(F.batch_norm(x.double(), None, None, training=True) + x.double())
    assert float((y.detach().double() - exact).norm() / exact.norm()) < 0.003


@pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built")
def test_networks_take_the_kernel_and_compiled_ones_the_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    def refuse(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("a layer fell back to plain PyTorch")

    ours = network()
    compiled, x = copy.deepcopy(ours), images()
    with monkeypatch.context() as patch:
        patch.setattr(reference, "batch_norm", refuse)
        y = ours(x)
    torch._dynamo.reset()
    found = torch.compile(compiled, backend=backend, fullgraph=True)(x)
    assert len(graphs) == 1 and "functional.batch_norm" in graphs[0] and "scan_fast" not in graphs[0]
    torch.testing.assert_close(found, y, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(dict(compiled.state_dict()), dict(ours.state_dict()), rtol=1e-4, atol=2e-5)
