"""The losses and the search in a training loop of your own: SimCLR, SCAN and self-labelling in plain PyTorch.

Run it with ``python examples/training_loop.py``. It takes about ten seconds on two cores.
"""

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from scan_fast import nt_xent, scan_loss, self_label_loss, topk_neighbors

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8)
labels = torch.from_numpy(digits.target)  # used for the accuracy at the end only


def views(batch: Tensor) -> Tensor:
    """Rotate, scale, shift and blur each image at random."""
    n = len(batch)
    angle, zoom = (torch.rand(n) - 0.5) * 0.7, 1 + (torch.rand(n) - 0.5) * 0.3
    cos, sin, shift = zoom * angle.cos(), zoom * angle.sin(), (torch.rand(2, n) - 0.5) * 0.4
    matrix = torch.stack((cos, -sin, shift[0], sin, cos, shift[1]), dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(batch.shape), align_corners=False)
    moved = F.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


class Network(nn.Module):
    """Two convolutions, a projector for SimCLR and a cluster head for SCAN."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
        self.head = nn.Linear(256, 10)


network = Network()
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)


def step(loss: Tensor) -> None:
    """Update the network."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# 1. A representation: two views of an image attract, all other images repel.
for _ in range(20):
    for rows in torch.randperm(len(images)).split(128):
        both = torch.cat((views(images[rows]), views(images[rows])))
        z0, z1 = network.projector(network.features(both)).chunk(2)
        loss = nt_xent(z0, z1, temperature=0.2)
        step(loss)
print(f"SimCLR: loss {loss:.2f}")

# 2. Nearest neighbours of every image, the image itself left out.
with torch.no_grad():
    network.eval()
    similarity, neighbors = topk_neighbors(network.projector(network.features(images)), k=10)
print(f"neighbours of the same digit: {(labels[neighbors] == labels[:, None]).float().mean():.1%}")

# 3. Clusters: an image and one of its neighbours get the same one, and all clusters are used. The entropy is
# that of a batch, so batches are large.
network.train()
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for _ in range(40):
    for rows in torch.randperm(len(images)).split(512):
        partners = neighbors[rows, torch.randint(10, (len(rows),))]
        pairs = torch.cat((views(images[rows]), views(images[partners])))
        anchor, neighbor = network.head(network.features(pairs)).chunk(2)
        total, consistency, entropy = scan_loss(anchor, neighbor, entropy_weight=5.0)
        step(total)
print(f"SCAN: consistency {consistency:.3f}, entropy {entropy:.2f} of at most 2.30")

# 4. Self-labelling: confident images teach their own augmented views.
for _ in range(5):
    confident = 0
    for rows in torch.randperm(len(images)).split(128):
        with torch.no_grad():
            weak = network.head(network.features(images[rows]))
        loss, n_confident = self_label_loss(weak, network.head(network.features(views(images[rows]))), threshold=0.9)
        step(loss)
        confident += int(n_confident)
print(f"self-labelling: {confident / len(images):.0%} of the images confident")

with torch.no_grad():
    network.eval()
    clusters = network.head(network.features(images)).argmax(dim=1)
counts = torch.zeros(10, 10).index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
matched = counts[linear_sum_assignment(-counts)].sum() / len(labels)
print(f"accuracy: {matched:.1%}")
