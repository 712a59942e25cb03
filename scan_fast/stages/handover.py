"""Values that a finished stage hands to later stages of the same process, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

EMBEDDINGS = "embeddings"
"""By split, (N, D) float32: output of the finished pretext model's projector, not normalised."""
FEATURES = "features"
"""By split, (N, D) float32: output of the finished pretext model's backbone."""
UNIT_FEATURES = "unit features"
"""By split, (N, D) float32 rows of length one: features of a network that is not trained, computed or found."""
CLUSTERING_LOGITS = "clustering logits"
"""By split, (N, C) float32 on the CPU: output of the chosen head."""
SELFLABEL_LOGITS = "selflabel logits"
"""By split, (N, C) float32 on the CPU: output of the finished self-labelled model."""


class Handover:
    """Holds tensors by name and split while later stages need them.

    The pipeline owns it. A stage may only use names that it declares (:class:`.pipeline.PipelineStage`). A process
    that starts at a later stage finds nothing here and computes the same bits from the run folder.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], Tensor] = {}
        self._declared: frozenset[str] | None = None

    def declare(self, names: Iterable[str]) -> None:
        """Allow these names, and no others, until the next call."""
        self._declared = frozenset(names)

    def get(self, name: str, split: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return a value that is held, or compute and hold it."""
        self._check(name)
        if (name, split) not in self._values:
            self._values[name, split] = compute()
        return self._values[name, split]

    def put(self, name: str, split: str, value: Tensor) -> None:
        """Hold a value in place of a former one."""
        self._check(name)
        self._values[name, split] = value

    def drop(self, names: Iterable[str]) -> None:
        """Forget values, so that their memory is free."""
        dropped = set(names)
        self._values = {key: value for key, value in self._values.items() if key[0] not in dropped}

    def names(self) -> set[str]:
        """Return the names that are held."""
        return {name for name, _ in self._values}

    def _check(self, name: str) -> None:
        if self._declared is not None and name not in self._declared:
            raise KeyError(f"the stage does not declare {name!r}; it declares {', '.join(sorted(self._declared))}")
