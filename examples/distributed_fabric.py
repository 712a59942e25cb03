"""NT-Xent over the images of all processes, in Lightning Fabric.

Run it with ``torchrun --nproc-per-node 2 examples/distributed_fabric.py`` after ``pip install lightning-fabric``. It
takes seconds, on GPUs (NCCL) if there is one for each process, and otherwise on the CPU (gloo). Any number of processes
prints the same losses, because an image is compared with those of all processes. With ``--no-gather`` it is compared
with those of its own process only, as by a loss that knows nothing of the others: losses and gradient then depend on
the number of processes.
"""

import argparse
import os
import time

import torch
from lightning_fabric import Fabric  # with the package lightning: from lightning.fabric import Fabric
from torch import Tensor, nn

from scan_fast import NTXentLoss

parser = argparse.ArgumentParser(description="NT-Xent over all processes, in Lightning Fabric")
parser.add_argument("--batch", type=int, default=64, help="images in a step, over all processes")
parser.add_argument(
    "--no-gather", dest="gather", action="store_false", help="compare an image with those of its own process only"
)
options = parser.parse_args()

if "WORLD_SIZE" not in os.environ:
    raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/distributed_fabric.py")
world, on_this_machine = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
if options.batch < world or options.batch % world:
    raise SystemExit(f"--batch must be a positive multiple of the number of processes, {world}, got {options.batch}")
fabric = Fabric(
    accelerator="cuda" if torch.cuda.device_count() >= on_this_machine else "cpu",
    strategy="ddp",
    devices=on_this_machine,
    num_nodes=world // on_this_machine,
)
fabric.launch()
rank = fabric.global_rank


def two_views(samples: range) -> Tensor:
    """Return two noisy views of each sample, all first views before all second ones. A sample's number is its seed."""
    views = []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        views.append(torch.randn(64, generator=generator) + 0.5 * torch.randn(2, 64, generator=generator))
    return fabric.to_device(torch.stack(views, dim=1).flatten(0, 1))


def loss_of(model: nn.Module, samples: range, gather: bool) -> Tensor:
    """Return the loss of some samples, with those of all processes as negatives if asked to."""
    z0, z1 = model(two_views(samples)).chunk(2)  # one forward pass for both views
    loss: Tensor = NTXentLoss(temperature=0.1, gather_distributed=gather)(z0, z1)
    return loss


torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.03))

n = options.batch // world  # images of this process: the next n of each global batch
for step in range(5):
    begin = step * options.batch + rank * n
    loss = loss_of(model, range(begin, begin + n), gather=options.gather)
    optimizer.zero_grad()
    fabric.backward(loss)  # averages the gradients of all processes
    optimizer.step()

    mean = fabric.all_reduce(loss.detach(), reduce_op="mean")  # a process has the mean over its own images
    if rank == 0:
        print(f"step {step}: loss {mean:.6f}")

# The averaged gradient is that of one process with the whole batch.
begin = 5 * options.batch
optimizer.zero_grad()
fabric.backward(loss_of(model, range(begin + rank * n, begin + (rank + 1) * n), gather=options.gather))
if rank == 0:
    averaged = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    whole = torch.autograd.grad(
        loss_of(network, range(begin, begin + options.batch), gather=False), list(network.parameters())
    )
    differences = [(a - w).abs().max() / w.abs().max() for a, w in zip(averaged, whole, strict=True)]
    print(f"largest relative difference of the gradient from that of one process: {max(differences):.1e}")

torch.distributed.destroy_process_group()  # Fabric does it for NCCL alone
time.sleep(0.5)  # PyTorch 2.14 aborts if Python ends while gloo's threads still release tensors
