"""NT-Xent over the images of all processes, with the weights in shards: FSDP2, ``fully_shard``.

Run it with ``torchrun --nproc-per-node 2 examples/distributed_fsdp.py``. It takes seconds, on GPUs (NCCL) if
there is one for each process, and otherwise on the CPU (gloo). Any number of processes prints the same losses, because
an image is compared with those of all processes. With ``--no-gather`` it is compared with those of its own process
only, as by a loss that knows nothing of the others: losses and gradient then depend on the number of processes.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scan_fast import NTXentLoss

parser = argparse.ArgumentParser(description="NT-Xent over all processes, with the weights in shards")
parser.add_argument("--batch", type=int, default=64, help="images in a step, over all processes")
parser.add_argument(
    "--no-gather", dest="gather", action="store_false", help="compare an image with those of its own process only"
)
options = parser.parse_args()

if "WORLD_SIZE" not in os.environ:
    raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/distributed_fsdp.py")
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


def new_network() -> nn.Sequential:
    """Return the network before training, the same in every process: fully_shard does not send rank 0's weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(device)


def loss_of(model: nn.Module, samples: range, gather: bool) -> Tensor:
    """Return the loss of some samples, with those of all processes as negatives if asked to."""
    z0, z1 = model(two_views(samples)).chunk(2)  # one forward pass for both views
    loss: Tensor = NTXentLoss(temperature=0.1, gather_distributed=gather)(z0, z1)
    return loss


network = new_network()
mesh = init_device_mesh(device.type, (world,))
for layer in (network[0], network[2], network):  # the layers first, then what is left
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.SGD(network.parameters(), lr=0.03)  # after fully_shard: the parameters are others now

n = options.batch // world  # images of this process: the next n of each global batch
for step in range(5):
    begin = step * options.batch + rank * n
    loss = loss_of(network, range(begin, begin + n), gather=options.gather)
    optimizer.zero_grad()
    loss.backward()  # each process gets its shard of the gradient, averaged over all processes
    optimizer.step()

    mean = loss.detach().clone()  # a process has the mean over its own images
    dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step}: loss {mean / world:.6f}")

# The averaged gradient is that of one process with the whole batch. All processes must help to collect the shards.
begin = 5 * options.batch
optimizer.zero_grad()
loss_of(network, range(begin + rank * n, begin + (rank + 1) * n), gather=options.gather).backward()
shards = (parameter.grad for parameter in network.parameters())
averaged = [shard.full_tensor() for shard in shards if isinstance(shard, DTensor)]
weights = {name: shard.full_tensor() for name, shard in network.state_dict().items()}
if rank == 0:
    single = new_network()
    single.load_state_dict(weights)
    whole = torch.autograd.grad(
        loss_of(single, range(begin, begin + options.batch), gather=False), list(single.parameters())
    )
    differences = [(a - w).abs().max() / w.abs().max() for a, w in zip(averaged, whole, strict=True)]
    print(f"largest relative difference of the gradient from that of one process: {max(differences):.1e}")

dist.destroy_process_group()
time.sleep(0.5)  # PyTorch 2.14 aborts if Python ends while gloo's threads still release tensors
