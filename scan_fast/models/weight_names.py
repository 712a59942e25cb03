"""Names in weight files: wrappers around a network, parts that a backbone leaves out, names of another project."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

_WRAPPERS = frozenset(
    (
        *("module", "_orig_mod", "model", "net", "network", "backbone", "encoder", "trunk", "visual", "base_model"),
        *("teacher", "student", "ema", "ema_model", "online", "target", "momentum", "online_encoder", "target_encoder"),
        *("encoder_q", "encoder_k", "base_encoder", "momentum_encoder", "online_network", "target_network"),
        *("teacher_backbone", "student_backbone", "backbone_momentum", "model_ema", "resnet", "vit", "image_encoder"),
    )
)
"""Names of modules that training code puts around a backbone."""

_FIRST = ("teacher", "model_ema", "state_dict_ema", "ema", "encoder_q", "online", "base_encoder")
_LAST = ("student", "encoder_k", "momentum", "target")

_LEFT_OUT = re.compile(
    r"_?fc|classifier|head|heads|head_dist|last_linear|projector|projection|projection_head|proj_head|contrastive_head|"
    r"cluster_head|predictor|prediction_head|prototypes|queue|queue_ptr|mask_token|dino_head|ibot_head|decoder\w*|"
    r"AuxLogits|aux\d?|n_averaged"
)
"""First part of the names that classifiers, projectors and what training needs besides the backbone have."""


def preference(name: str) -> int:
    """Return a rank that orders copies of a network in one file: averaged and query networks come first."""
    parts = re.split(r"[./]", name)
    if any(part.startswith(_FIRST) for part in parts):
        return 0
    return 2 if any(part.startswith(_LAST) for part in parts) else 1


def prefixes(names: Iterable[str], anchor: str) -> list[str]:
    """Return the prefixes under which a network may lie in a state dict, the preferred first.

    Args:
        names: the names of all entries.
        anchor: the name of one entry of the network; whatever precedes it in `names` is a candidate as well.
    """
    found = {""}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts[:-1], start=1):
            if part not in _WRAPPERS:
                break
            found.add(".".join(parts[:depth]) + ".")
        if name.endswith("." + anchor):
            found.add(name.removesuffix(anchor))
    return sorted(found, key=lambda prefix: (preference(prefix), len(prefix), prefix))


def left_out(name: str, own: Iterable[str], classifiers: Sequence[str]) -> bool:
    """Return whether an entry belongs to a classifier, a projector or training, which a backbone has no place for.

    Args:
        name: the entry, without the backbone's prefix.
        own: the first parts of the names of the backbone's entries.
        classifiers: the names of the classifiers that the backbone was built without.
    """
    if any(name.startswith(f"{classifier}.") for classifier in classifiers):
        return True
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    # If the backbone has a module of this name, an entry that it lacks is a difference of the networks.
    return _LEFT_OUT.fullmatch(parts[0]) is not None and parts[0] not in set(own)


# -- EfficientNet-PyTorch ----------------------------------------------------------------------------------------------

_EFFICIENTNET_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EFFICIENTNET_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
"""A block that expands its channels first."""
_EFFICIENTNET_FIRST_BLOCK = {
    **_EFFICIENTNET_BLOCK,
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
"""A block that starts with the depthwise convolution, so that every later part moves one place up."""
_BLOCK = re.compile(r"_blocks\.(\d+)\.(_\w+)\.(.+)")


def from_efficientnet_pytorch(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a state dict of the project EfficientNet-PyTorch under timm's names.

    Args:
        module: timm's network, whose blocks are grouped by stage; the other project counts them through.
        state_dict: entries such as ``_blocks.3._depthwise_conv.weight``.

    Returns:
        The renamed entries, or None if the names or the module are of another kind.
    """
    stages = getattr(module, "blocks", None)
    if "_conv_stem.weight" not in state_dict or not isinstance(stages, nn.Sequential):
        return None
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(list(stage.children())))]
    expanding = {match[1] for name in state_dict if (match := _BLOCK.fullmatch(name)) and match[2] == "_expand_conv"}
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            first, _, rest = name.partition(".")
            new = _EFFICIENTNET_TOP.get(first)
        else:
            number, part, rest = block.groups()
            inside = (_EFFICIENTNET_BLOCK if number in expanding else _EFFICIENTNET_FIRST_BLOCK).get(part)
            known = inside is not None and int(number) < len(places)
            new = f"{places[int(number)]}.{inside}" if known else None
        renamed[name if new is None else f"{new}.{rest}"] = value
    return renamed
