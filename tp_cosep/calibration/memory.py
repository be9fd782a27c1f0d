"""What measuring a model and choosing its channels take, in bytes, before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from tp_cosep.errors import InputError

__all__ = ["MemoryEstimate", "check", "class_bytes", "estimate", "second_bytes"]

_FLOAT64 = 8
_MIB = 2**20
# Whole profiles are made in chunks of this size, see tp_cosep.functional.separability.
_CHUNK = 64 * _MIB


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a selector takes beside the model and its data.

    Attributes:
        class_moments: Means and squared deviations of every class: classes × components × cells × 16 over all layers.
        second_moments: Of what layers read, and what is inverted of them: 16 (f + 1)² for a layer with f inputs.
        selection: While the channels of the widest layer are chosen: ten matrices of n × n, and for separability six
            arrays of classes × n × cells, in double precision, and 64 MiB of profiles. An upper estimate.
        cells: Cells per dimension that this is for; ``None`` for every pixel.
    """

    class_moments: int
    second_moments: int
    selection: int
    cells: int | None

    @property
    def measuring(self) -> int:
        """Bytes while data is seen, which ``memory_budget`` bounds."""
        return self.class_moments + self.second_moments

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.measuring + self.selection

    def __str__(self) -> str:
        return (
            f"{self.total / _MIB:,.0f} MiB: class moments {self.class_moments / _MIB:,.0f}, second moments "
            f"{self.second_moments / _MIB:,.0f}, selection {self.selection / _MIB:,.0f}"
        )


def class_bytes(shapes: Iterable[tuple[int, ...]], n_classes: int, cells: int | None) -> int:
    """Bytes of class moments.

    Args:
        shapes: Components and positions of every layer's tensors.
        n_classes: Number of classes.
        cells: Cells per dimension that maps are pooled to; ``None`` for every position.

    Returns:
        The sum over the layers.
    """
    counts = (n * prod(length if cells is None else min(cells, length) for length in at) for n, *at in shapes)
    return 2 * _FLOAT64 * n_classes * sum(counts)


def second_bytes(n_features: Iterable[int]) -> int:
    """Bytes of the second moments of layers with so many features each, and of their inverses."""
    return sum(2 * _FLOAT64 * (n + 1) ** 2 for n in n_features)


def estimate(
    shapes: Mapping[str, tuple[int, ...]],
    n_features: Iterable[int],
    n_classes: int,
    cells: int | None,
    *,
    by_separability: bool,
) -> MemoryEstimate:
    """What measuring and choosing take.

    Args:
        shapes: Of the tensors of which class moments are taken, by layer and observed tensor.
        n_features: Features of the layers of which second moments are taken.
        n_classes: Number of classes.
        cells: Cells per dimension.
        by_separability: Whether channels are compared by profiles over all pairs of classes.

    Returns:
        The estimate.
    """
    n_features = list(n_features)
    widest = max([*(n for n, *_ in shapes.values()), *n_features], default=0)
    selection = 10 * _FLOAT64 * widest**2 + _CHUNK
    if by_separability:
        selection += 3 * max((class_bytes([shape], n_classes, cells) for shape in shapes.values()), default=0)
    return MemoryEstimate(class_bytes(shapes.values(), n_classes, cells), second_bytes(n_features), selection, cells)


def check(
    needed: MemoryEstimate,
    shapes: Mapping[str, tuple[int, ...]],
    n_features: Mapping[str, int],
    *,
    memory_budget: int,
    n_classes: int,
) -> None:
    """Refuse to measure what does not fit, before anything is measured.

    Args:
        needed: What measuring takes.
        shapes: As for :func:`estimate`.
        n_features: As for :func:`estimate`, by layer.
        memory_budget: Bytes that it may take.
        n_classes: As for :func:`estimate`.

    Raises:
        InputError: If it takes more.
    """
    if needed.measuring <= memory_budget:
        return
    sizes = {name: second_bytes([n]) for name, n in n_features.items()}
    for name, shape in shapes.items():
        sizes[name] = sizes.get(name, 0) + class_bytes([shape], n_classes, needed.cells)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    finest = max((max(at, default=1) for _, *at in shapes.values()), default=1)
    fewer = range(1, min(finest, needed.cells or finest))
    fitting = [s for s in fewer if class_bytes(shapes.values(), n_classes, s) + needed.second_moments <= memory_budget]
    advice = f"set spatial={fitting[-1]}, which fits, or spatial='auto'; or " if fitting else ""
    other = ", or use CoSePSelector(weights=None), which requires no second moments" if needed.second_moments else ""
    raise InputError(
        f"fit: measuring needs {needed.measuring / _MIB:,.0f} MiB ({needed.class_moments / _MIB:,.0f} for the moments "
        f"of {n_classes} classes, {needed.second_moments / _MIB:,.0f} for second moments), the memory_budget is "
        f"{memory_budget / _MIB:,.0f} MiB; the largest: "
        f"{', '.join(f'{name} {size / _MIB:,.0f} MiB' for name, size in largest)}; {advice}raise memory_budget, leave "
        f"layers out by ignored_layers= or layers={other}."
    )
