"""Machines: rates of a GPU, of the processor that decodes, and of the links between ranks, each with its source."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .traffic import Message, wire_bytes

RESULTS = Path(__file__).resolve().parents[1] / "results"
STEP, KERNELS, CROPS = "step-h200.json", "kernels-h200.json", "crops-cpu.json"
SMALL_SIDE = 96
"""Side in pixels up to which images count as small, as those whose step was measured."""


@dataclass(frozen=True)
class Machine:
    """Machines of one kind, and what connects their GPUs.

    Attributes:
        gpus: GPUs, and so ranks, of a machine.
        cores: processor cores of a machine for decoding images.
        product_flops: 16-bit matrix products of a GPU, flop/s.
        utilisation: share of them that training reaches on images of more than 96 pixels.
        small_utilisation: the same on smaller images.
        search_flops: neighbour search of float32 rows, flop/s of a GPU.
        decoded: images that a core decodes in a second, by ``data.crop``.
        link: bytes/s that a GPU sends to another one of its machine.
        network: bytes/s that a machine sends to another one.
        link_seconds: latency of a collective within a machine.
        network_seconds: latency of a collective across machines.
        overlap: share of the backward pass during which gradients travel.
        memory: bytes of a GPU.
        host_memory: bytes of a machine.
        disk: bytes/s that rank 0 writes.
        sources: the source of each figure, by attribute.
    """

    gpus: int
    cores: int
    product_flops: float
    utilisation: float
    small_utilisation: float
    search_flops: float
    decoded: dict[str, float]
    link: float
    network: float
    link_seconds: float
    network_seconds: float
    overlap: float
    memory: float
    host_memory: float
    disk: float
    sources: dict[str, str] = field(default_factory=dict)

    def machines(self, ranks: int) -> int:
        """Return the number of machines for so many ranks."""
        return -(-ranks // self.gpus)

    def flops(self, side: int) -> float:
        """Return the flop/s of training on images of ``side`` pixels."""
        return self.product_flops * (self.small_utilisation if side <= SMALL_SIDE else self.utilisation)

    def seconds(self, messages: Iterable[Message], ranks: int) -> float:
        """Return the time of collectives, one after another: a latency for each, and the bytes over the slowest link.

        Across machines a ring leaves each machine once, so the network of a machine carries what one rank sends.
        """
        if ranks == 1:
            return 0.0
        across = ranks > self.gpus
        latency = self.network_seconds if across else self.link_seconds
        rate = min(self.link, self.network) if across else self.link
        return sum(
            message.calls * latency + wire_bytes(message.collective, message.bytes, ranks) / rate
            for message in messages
        )


def h200(results: Path = RESULTS) -> Machine:
    """Return machines of eight NVIDIA H200, with the rates that this repository has measured on one of them."""
    step = json.loads((results / STEP).read_text())
    kernels = json.loads((results / KERNELS).read_text())
    crops = json.loads((results / CROPS).read_text())
    return Machine(
        gpus=8,
        cores=128,
        product_flops=step["ceilings"]["gemm_bfloat16"],
        utilisation=0.15,
        small_utilisation=step["ways"]["plain"]["of_product_peak"],
        search_flops=_search_flops(kernels) / 2,
        decoded=crops["rates"],
        link=360e9,
        network=50e9,
        link_seconds=20e-6,
        network_seconds=50e-6,
        overlap=0.9,
        memory=139 * 2**30,
        host_memory=2e12,
        disk=1e9,
        sources={
            "product_flops": f"measured, benchmarks/results/{STEP}",
            "small_utilisation": f"measured with ResNet-18 at 32 pixels, benchmarks/results/{STEP}",
            "utilisation": "assumed, not measured. timm's ResNet-50 trains 2,600 images/s on an A100 (issue 1491 of "
            "huggingface/pytorch-image-models), a fifth of that GPU's products; an H200 has more products per byte",
            "search_flops": f"half of what was measured with 50,000 rows, benchmarks/results/{KERNELS}: there each "
            "pair was computed once, which blocks of different ranks do not allow",
            "decoded": f"measured with one thread of a processor, benchmarks/results/{CROPS}",
            "link": "assumed: 80 % of 450 GB/s, NVLink of the fourth generation",
            "network": "assumed: one adapter of 400 Gbit/s for each machine",
            "link_seconds": "assumed",
            "network_seconds": "assumed",
            "overlap": "assumed",
            "cores": "assumed: 16 for each GPU",
            "memory": "of the GPU that was measured",
            "host_memory": "assumed",
            "disk": "assumed",
        },
    )


def _search_flops(kernels: dict[str, Any]) -> float:
    """Return 2 N^2 D / seconds of the fastest measured search of 50,000 rows of 512 numbers."""
    seconds = [
        contender["seconds"]
        for timing in kernels["timings"]
        if timing["family"] == "neighbors" and timing["timing"] == "50000x512x20"
        for contender in timing["contenders"]
        if contender["name"] == "scan-fast sm90"
    ]
    return 2 * 50_000**2 * 512 / min(seconds)
