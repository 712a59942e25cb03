"""ImageClusterer on arrays: cluster images, assign new ones, save and load.

Run it with ``python examples/cluster_arrays.py``. It takes about ten seconds on two cores. The settings make the run
short; leave them out for your own images.
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from scan_fast import ImageClusterer

digits = load_digits()
# Pixels are uint8 in 0..255. These come as floats in 0..16; floats in [0, 1] become (x * 255).round().astype("uint8").
images = (digits.images * (255 / 16)).round().astype("uint8")  # (1797, 8, 8)
known, new = images[:800], images[800:1000]

settings = {
    "model.backbone": "resnet_digits",
    "model.width": 0.5,
    "data.image_size": 8,
    # Digits must not be mirrored or recolored: small rotations and shifts instead of the photographs' views.
    "pretext.method.view": {"kind": "affine", "size": 8},
    "clustering.view": {"kind": "affine", "size": 8},
    "selflabel.view": {"kind": "affine", "size": 8},
    "pretext.epochs": 15,
    "pretext.batch_size": 128,
    "pretext.optimizer": {"name": "adam", "lr": 2.0e-3},
    "clustering.epochs": 8,
    "clustering.optimizer.lr": 2.0e-3,
    "selflabel.epochs": 3,
}
clusterer = ImageClusterer(n_clusters=10, random_state=0, settings=settings).fit(known)
print("images in each cluster:", np.bincount(clusterer.labels_, minlength=10))
print(f"adjusted Rand index: {adjusted_rand_score(digits.target[:800], clusterer.labels_):.2f}")

clusters = clusterer.predict(new)
confidence = clusterer.predict_proba(new).max(axis=1)
features = clusterer.transform(new)
print(f"new images: clusters {clusters[:5]}, confidence {confidence[:5].round(2)}, features {features.shape}")

with tempfile.TemporaryDirectory() as folder:
    clusterer.save(Path(folder) / "model.pt")
    loaded = ImageClusterer.load(Path(folder) / "model.pt")
print("loaded model agrees:", bool((loaded.predict(new) == clusters).all()))
