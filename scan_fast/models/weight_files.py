"""Weight files of any origin: reading them safely, finding a backbone in them, and comparing its entries strictly."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingPackageError, WeightsError
from .tensor_files import RefusedError, read_tensors
from .timm_networks import converted
from .weight_names import from_efficientnet_pytorch, left_out, preference, prefixes
from .weights import load_strict, unusable_entries

_SHOWN = 4


class MisfitError(WeightsError):
    """A weight file that is sound but holds another network."""


@dataclass(frozen=True)
class FittedWeights:
    """Entries of a file that are all that a backbone needs.

    Attributes:
        state_dict: for the backbone, by its names; every name and shape agrees.
        left_out: names, without the part after the last dot, of what the file holds besides.
        place: the keys and the prefix under which the entries lie in the file; "" at the top.
    """

    state_dict: dict[str, Tensor]
    left_out: list[str]
    place: str


def load_weight_file(module: nn.Module, path: Path, network: str) -> None:
    """Fill a backbone with the weights of a file.

    Args:
        module: the backbone; it is left untouched if an error is raised.
        path: a file as :func:`read_checkpoint` takes it.
        network: what the module is, such as ``timm:resnet18``; its names decide on the conversions that are tried.

    Raises:
        WeightsError: if the file is missing, damaged, or does not hold exactly this backbone.
    """
    load_strict(module, fit_weight_file(module, path, network).state_dict, what=f"the weights of {path}")


def fit_weight_file(module: nn.Module, path: Path, network: str) -> FittedWeights:
    """Find a backbone's entries in a weight file.

    The file may hold a plain state dict or a checkpoint with state dicts under any keys. The names may have a prefix,
    be those of timm's or torchvision's network, of its authors (as far as timm converts them), or of
    EfficientNet-PyTorch. Entries of classifiers, projectors and further copies of the network are left out.

    Args:
        module: the backbone, which may be on the device "meta".
        path: the file.
        network: see :func:`load_weight_file`.

    Raises:
        WeightsError: if the file is missing, damaged, or holds numbers that are not finite.
        MisfitError: if it does not hold exactly this backbone; the message counts what fits.
        MissingPackageError: for a .safetensors file if the package safetensors is not installed.
    """
    content = read_checkpoint(path)
    found = sorted(_state_dicts(content), key=lambda item: (preference(item[0]), item[0].count("/"), item[0]))
    if not found:
        raise WeightsError(f"{path} holds no weights: there are no names with tensors in it")
    best: _Comparison | None = None
    for key, entries in found:
        for attempt in _attempts(module, network, key, entries):
            if not attempt.problems:
                _check_finite(path, attempt.state_dict)
                return FittedWeights(attempt.state_dict, attempt.left_out, attempt.place)
            if best is None or attempt.rank > best.rank:
                best = attempt
    assert best is not None
    raise MisfitError(
        f"{path} does not hold the weights of {network}: {best.fitting} of its {best.size} entries fit; "
        + "; ".join(best.problems)
    )


@dataclass(frozen=True)
class _Comparison:
    """A backbone's entries in one reading of a state dict, and what speaks against it."""

    state_dict: dict[str, Tensor]
    left_out: list[str]
    place: str
    fitting: int
    size: int
    problems: list[str]

    @property
    def rank(self) -> tuple[int, int]:
        return self.fitting, -len(self.problems)


def _attempts(module: nn.Module, network: str, key: str, entries: Mapping[str, Tensor]) -> Iterator[_Comparison]:
    own = module.state_dict()
    anchor = next(iter(own), "")
    library, _, name = network.partition(":")
    conversions: list[Callable[[Mapping[str, Tensor]], Mapping[str, Tensor] | None]] = [lambda state: state]
    if library == "timm":
        conversions.append(functools.partial(from_efficientnet_pytorch, module))
        conversions.append(functools.partial(converted, module, name))
    candidates = prefixes(entries, anchor)
    for convert in conversions:
        for prefix in candidates:
            inside = {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)}
            state = convert(inside)
            if state:
                # Further copies of the network, such as MoCo's key encoder, lie under other prefixes.
                first = next(iter(inside))
                copies = tuple(o for o in candidates if not prefix.startswith(o) and o + first in entries)
                outside = [n for n in entries if not n.startswith(prefix)]
                place = "/".join(filter(None, (key, prefix.rstrip("."))))
                yield _compare(module, own, state, outside, copies, place)


def _compare(
    module: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    outside: list[str],
    copies: tuple[str, ...],
    place: str,
) -> _Comparison:
    state_dict: dict[str, Tensor] = {}
    missing, shapes = [], []
    for name, value in own.items():
        given = state.get(name)
        if given is None:
            if name.endswith("num_batches_tracked"):  # older files lack it, and evaluation does not use it
                state_dict[name] = torch.zeros((), dtype=value.dtype)
            else:
                missing.append(name)
        elif given.shape != value.shape:
            shapes.append(f"{name}: {tuple(given.shape)} instead of {tuple(value.shape)}")
        else:
            state_dict[name] = given
    firsts = {name.split(".", 1)[0] for name in own}
    classifiers: tuple[str, ...] = getattr(module, "classifier_names", ())
    others = [name for name in state if name not in own]
    unknown = [name for name in others if not left_out(name, firsts, classifiers)]
    unknown += [name for name in outside if not (name.startswith(copies) or left_out(name, firsts, ()))]
    fitting = sum(name in state for name in state_dict)
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in (("missing", missing), ("of another shape", shapes), ("unknown", unknown))
        if names
    ]
    dropped = sorted({name.rpartition(".")[0] or name for name in (*others, *outside)})
    return _Comparison(state_dict, dropped, place, fitting, len(own), problems)


def _check_finite(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    if unusable := unusable_entries(state_dict):
        more = ", ..." if len(unusable) > _SHOWN else ""
        raise WeightsError(
            f"{path} has {len(unusable)} entries that are not plain real numbers ({', '.join(unusable[:_SHOWN])}{more})"
        )
    wrong = [name for name, value in state_dict.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        more = ", ..." if len(wrong) > _SHOWN else ""
        raise WeightsError(
            f"{path} is damaged: {len(wrong)} entries are not finite ({', '.join(wrong[:_SHOWN])}{more})"
        )


def _state_dicts(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the path of keys and the tensors of every state dict in a checkpoint."""
    if not isinstance(content, Mapping) or depth > 3:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from _state_dicts(value, f"{key}/{name}" if key else name, depth + 1)


# -- files -------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Any:
    """Return the content of a weight file: of safetensors, or of torch.save in its format of today or the older one.

    Nothing but tensors and plain values is read, so that a foreign file cannot run code.

    Raises:
        WeightsError: if the file is missing, damaged, or holds anything else.
        MissingPackageError: for a .safetensors file if the package safetensors is not installed.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:  # eight bytes of length, then JSON
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingPackageError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable weight file: {error}") from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return read_tensors(file)
        except RefusedError as error:
            raise WeightsError(f"{path} was refused: {error}") from error
        except ValueError as error:
            raise WeightsError(f"{path} is not a readable weight file: {error}") from error


def file_digest(path: Path) -> str:
    """Return the BLAKE2b digest of a file's bytes, 32 hexadecimal digits.

    Raises:
        OSError: if it cannot be read.
    """
    status = path.stat()
    return _digest(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@functools.lru_cache(maxsize=16)
def _digest(path: Path, state: tuple[int, ...]) -> str:
    # The state is in the key, so that a file that was replaced or written to is read again. Its last part, the time of
    # change of the entry, is the one that no program can set.
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
