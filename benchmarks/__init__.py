"""Benchmarks: ``python -m benchmarks.NAME [--device cpu|cuda] [--json FILE]``, or ``scan-fast bench NAME ...``."""

BENCHMARKS = {
    "nt_xent": "NT-Xent loss, forward and backward",
    "scan_loss": "SCAN loss, forward and backward",
    "self_label": "self-label loss, forward and backward",
    "neighbors": "exact top-k neighbour search",
    "sharded_search": "exact top-k neighbour search over several ranks: memory and traffic",
    "batch_norm": "batch normalisation, residual and ReLU in training",
    "convolution": "convolution in bfloat16, forward and both gradients",
    "gaussian": "SIGReg and VISReg, alone and in a training step",
    "augment": "the kernel that renders views",
    "views": "augmented views per second, by renderer",
    "streaming": "a folder of images that is decoded at each use",
    "spaces": "neighbours in the projection, in the backbone's features and in both: purity, and k-means",
    "pretext": "stage one against lightly: quality and time of the same recipe",
    "step": "the parts of a SimCLR step's time",
    "end_to_end": "every stage of a run, compared with plain PyTorch",
    "scaling": "predicted time, traffic and memory on several GPUs",
    "accuracy": "accuracy of a configuration over seeds",
    "partitions": "groups of frozen features against k-means and Ward's linkage",
    "trials": "quality and cost of changes to a configuration",
    "ablations": "the ablations of the SCAN paper",
    "crops": "crops of ImageNet's images against torchvision's",
    "dtypes": "mining and the choice of a head in float32 and in bfloat16",
    "targets": "the promises of this project, measured",
    "gpu_run": "CIFAR-10 on a GPU in the minutes that are left",
}
"""Name and description of each benchmark that ``scan-fast bench`` offers."""
