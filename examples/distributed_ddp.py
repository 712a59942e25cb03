"""NT-Xent and SCAN over the images of all processes, in DistributedDataParallel.

Run it with ``torchrun --nproc-per-node 2 examples/distributed_ddp.py``. It takes seconds, on GPUs (NCCL) if there is
one for each process, and otherwise on the CPU (gloo). Any number of processes prints the same losses, because NT-Xent
compares an image with those of all processes, and SCAN's entropy is that of all. With ``--no-gather`` both take the
images of their own process only, as losses that know nothing of the others: losses and gradient then depend on the
number of processes.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scan_fast import NTXentLoss, SCANLoss

parser = argparse.ArgumentParser(description="NT-Xent and SCAN over all processes, in DistributedDataParallel")
parser.add_argument("--batch", type=int, default=64, help="images in a step, over all processes")
parser.add_argument("--no-gather", dest="gather", action="store_false", help="take the images of the own process only")
options = parser.parse_args()

if "WORLD_SIZE" not in os.environ:
    raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/distributed_ddp.py")
world, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
if options.batch < world or options.batch % world:
    raise SystemExit(f"--batch must be a positive multiple of the number of processes, {world}, got {options.batch}")
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
if on_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpus else "gloo")


def two_views(samples: range) -> Tensor:
    """Return two noisy views of each sample, all first views before all second ones. A sample's number is its seed."""
    views = []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        views.append(torch.randn(64, generator=generator) + 0.5 * torch.randn(2, 64, generator=generator))
    return torch.stack(views, dim=1).flatten(0, 1).to(device)


class Network(nn.Module):
    """Features, with a projector for NT-Xent and a cluster head for SCAN."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.projector, self.head = nn.Linear(128, 32), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (2n, 32) and the logits of 10 clusters (2n, 10)."""
        features = self.features(x)
        return self.projector(features), self.head(features)


def loss_of(model: nn.Module, samples: range, gather: bool) -> Tensor:
    """Return the loss of some samples, which takes in those of all processes if asked to."""
    embeddings, logits = model(two_views(samples))  # one forward pass for both views
    contrast: Tensor = NTXentLoss(temperature=0.1, gather_distributed=gather)(*embeddings.chunk(2))
    # The other view of an image stands for its neighbour here.
    clusters, _, _ = SCANLoss(entropy_weight=5.0, gather_distributed=gather)(*logits.chunk(2))
    return contrast + clusters


torch.manual_seed(0)
network = Network().to(device)
model = DistributedDataParallel(network, device_ids=[local_rank] if on_gpus else None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.03)

n = options.batch // world  # images of this process: the next n of each global batch
for step in range(5):
    begin = step * options.batch + rank * n
    loss = loss_of(model, range(begin, begin + n), gather=options.gather)
    optimizer.zero_grad()
    loss.backward()  # DistributedDataParallel averages the gradients of all processes
    optimizer.step()

    mean = loss.detach().clone()  # a process has the mean over its own images
    dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step}: loss {mean / world:.6f}")

# The averaged gradient is that of one process with the whole batch.
begin = 5 * options.batch
optimizer.zero_grad()
loss_of(model, range(begin + rank * n, begin + (rank + 1) * n), gather=options.gather).backward()
if rank == 0:
    averaged = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    whole = torch.autograd.grad(
        loss_of(network, range(begin, begin + options.batch), gather=False), list(network.parameters())
    )
    differences = [(a - w).abs().max() / w.abs().max() for a, w in zip(averaged, whole, strict=True)]
    print(f"largest relative difference of the gradient from that of one process: {max(differences):.1e}")

dist.destroy_process_group()
time.sleep(0.5)  # PyTorch 2.14 aborts if Python ends while gloo's threads still release tensors
