"""Streaming class-conditional moments.

Layout of all functions: activations are ``[samples, components, cells]``, moments are ``[classes, components, cells]``
in float64. A *component* is one prunable index (a channel or a neuron), a *cell* is one spatial position after pooling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_cosep.errors import InputError

__all__ = ["ClassMoments", "to_cells"]

# Values that are added at once: several tensors of this size fit into a core's cache.
_PIECE = 2**17
_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def to_cells(activation: Tensor, *, channel_dim: int = 1, spatial: int | None = None) -> Tensor:
    """Bring an activation into the ``[samples, components, cells]`` layout.

    Each of the remaining (spatial or token) dimensions is average-pooled to at most ``spatial`` cells; shorter
    dimensions are kept.

    Args:
        activation: ``[samples, ...]`` with the components along ``channel_dim``.
        channel_dim: 1 for convolutions, -1 for linear layers.
        spatial: Cells per dimension, at least 1; ``None`` keeps every position, as in the papers.

    Returns:
        ``[samples, components, cells]``; float32 for half-precision activations, so that pooling does not round.

    Raises:
        InputError: If ``activation`` has fewer than two dimensions.

    Example:
        >>> to_cells(torch.ones(5, 3, 8, 8), spatial=2).shape
        torch.Size([5, 3, 4])
    """
    if activation.dim() < 2:
        raise InputError(
            f"activation: expected [samples, components, ...], got shape {tuple(activation.shape)}; "
            "a layer whose output has no batch dimension cannot be measured."
        )
    x = activation.movedim(channel_dim, 1)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    n_spatial = x.dim() - 2
    if n_spatial == 0:
        return x.unsqueeze(-1)
    if spatial is not None:
        if n_spatial > 3:
            x, n_spatial = x.flatten(2), 1
        size = [min(spatial, length) for length in x.shape[2:]]
        if list(x.shape[2:]) != size:
            x = _POOLS[n_spatial](x, size)  # type: ignore[arg-type]
    return x.flatten(2)


class ClassMoments:
    """Mean and variance of every component in every cell, per class, from a stream of batches.

    Batches are merged with the pairwise update of Chan, Golub and LeVeque (1983): for two samples of sizes n_a, n_b and
    with δ = mean_b − mean_a, n = n_a + n_b,

        mean = mean_a + δ n_b / n,        M2 = M2_a + M2_b + δ² n_a n_b / n,

    where M2 is the sum of squared deviations. Sums are float64 and each batch is centred before it is squared, so a
    large common offset costs no accuracy, and neither the order nor the split of the batches matters beyond rounding
    (about 1e-15 relative).

    A class exists once one of its samples has been seen: labels need not be contiguous, and a label that never occurs
    costs nothing. Without arguments the moments are empty.

    Args:
        classes: ``[classes]`` int64, labels, ascending.
        count: ``[classes]`` int64, samples per class, at least 1.
        mean: ``[classes, components, cells]`` float64, class means.
        m2: ``[classes, components, cells]`` float64, sums of squared deviations from the class means.

    Example:
        >>> moments = ClassMoments()
        >>> moments.update(torch.tensor([[[1.0]], [[3.0]], [[7.0]]]), torch.tensor([4, 4, 9]))
        >>> moments.classes.tolist(), moments.mean.flatten().tolist(), moments.var.flatten().tolist()
        ([4, 9], [2.0, 7.0], [1.0, 0.0])
    """

    def __init__(
        self,
        classes: Tensor | None = None,
        count: Tensor | None = None,
        mean: Tensor | None = None,
        m2: Tensor | None = None,
    ) -> None:
        # In order of arrival, with spare rows at the end, so that a new class does not move all others. The properties
        # sort them.
        self._classes = torch.empty(0, dtype=torch.int64) if classes is None else classes
        self._count = torch.empty(0, dtype=torch.int64) if count is None else count
        self._mean = torch.empty(0, 0, 0, dtype=torch.float64) if mean is None else mean
        self._m2 = torch.empty(0, 0, 0, dtype=torch.float64) if m2 is None else m2

    @classmethod
    def from_batch(cls, x: Tensor, labels: Tensor) -> ClassMoments:
        """Moments of one batch.

        Args:
            x: ``[samples, components, cells]``, any floating-point type.
            labels: ``[samples]``, integers, at least 0.

        Returns:
            The moments, on the device of ``x``.

        Raises:
            InputError: If the shapes do not fit each other.
        """
        moments = cls()
        moments.update(x, labels)
        return moments

    def update(self, x: Tensor, labels: Tensor) -> None:
        """Add a batch, in two passes over it: means first, then squared deviations from them.

        Args:
            x: ``[samples, components, cells]``, any floating-point type.
            labels: ``[samples]``, integers, at least 0.

        Raises:
            InputError: If the shapes do not fit each other, or components or cells differ from those of earlier
                batches.
        """
        if x.dim() != 3 or labels.dim() != 1 or len(x) != len(labels):
            raise InputError(
                "moments: expected activations [samples, components, cells] with one label per sample, "
                f"got activations {tuple(x.shape)} and labels {tuple(labels.shape)}."
            )
        if len(labels) == 0:
            return
        classes, of_sample = torch.unique(labels.to(x.device, torch.int64), return_inverse=True)
        count = torch.bincount(of_sample, minlength=len(classes))
        flat, is_one_each = x.flatten(1), len(classes) == len(labels)
        order = of_sample.argsort()
        # A matrix product with the one-hot labels sums by class in a fixed order on every device;
        # index_add_ would not on a GPU.
        sums = F.one_hot(of_sample, len(classes)).T.to(torch.float64)

        def part(columns: slice) -> tuple[Tensor, Tensor | None]:
            values = flat[:, columns].to(torch.float64)
            if is_one_each:
                return values[order], None
            mean = sums @ values / count[:, None]
            return mean, sums @ (values - mean[of_sample]).square_()

        self._combine(classes, count, x.shape[1:], part)

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Add the moments of another stream of the same layer, in place.

        Args:
            other: The moments to add.

        Returns:
            These moments, now of both streams.

        Raises:
            InputError: If both hold data and their components or cells differ.
        """
        if other.n_classes == 0:
            return self
        means, m2s = other._mean.flatten(1), other._m2.flatten(1)
        n = other.n_classes
        self._combine(
            other._classes,
            other._count[:n],
            other._mean.shape[1:],
            lambda columns: (means[:n, columns].clone(), m2s[:n, columns]),
        )
        return self

    def _combine(
        self,
        classes: Tensor,
        count: Tensor,
        shape: torch.Size,
        part: Callable[[slice], tuple[Tensor, Tensor | None]],
    ) -> None:
        """Add means and squared deviations of some classes.

        Args:
            classes: ``[classes]`` int64, distinct labels.
            count: ``[classes]`` int64, samples per class.
            shape: Components and cells.
            part: Means and sums of squared deviations ``[classes, columns]`` for a slice of the flattened components
                and cells; ``None`` for sums that are all 0.

        Raises:
            InputError: If components or cells differ from those of earlier batches.
        """
        if self.n_classes == 0:
            self._classes, self._count = classes[:0], count[:0]
            self._mean = torch.empty(0, *shape, dtype=torch.float64, device=classes.device)
            self._m2 = self._mean.clone()
        if self._mean.shape[1:] != shape:
            raise InputError(
                "moments: cannot merge moments of different layouts: "
                f"{_layout(self)} and n_components={shape[0]}, n_cells={shape[1]}; all inputs must have the same "
                "size, or set spatial= so that every map is pooled to the same cells."
            )
        rows = self._rows_of(classes)
        n_a, n_b = self._count[rows].double(), count.double()
        share, weight = (n_b / (n_a + n_b))[:, None], (n_a * n_b / (n_a + n_b))[:, None]
        means, m2s = self._mean.flatten(1), self._m2.flatten(1)
        # Some columns at a time: intermediate results stay in a core's cache.
        n_columns = max(1, _PIECE // len(classes))
        for start in range(0, means.shape[1], n_columns):
            columns = slice(start, start + n_columns)
            delta, m2 = part(columns)
            delta -= means[:, columns].index_select(0, rows)
            means[:, columns].index_add_(0, rows, delta * share)
            deviations = delta.square_().mul_(weight)
            m2s[:, columns].index_add_(0, rows, deviations if m2 is None else deviations.add_(m2))
        self._count[rows] += count

    def _rows_of(self, classes: Tensor) -> Tensor:
        """Rows of some classes; new classes get rows after all others."""
        new = classes[~torch.isin(classes, self._classes)]
        if len(new):
            n = self.n_classes + len(new)
            if n > len(self._mean):
                # Doubled, so that a batch with a new class does not always copy all rows. Rows that are never written
                # take address space but no memory.
                self._move_to(torch.arange(self.n_classes, device=classes.device), max(n, 2 * len(self._mean)))
            for x in (self._count, self._mean, self._m2):
                x[self.n_classes : n] = 0
            self._classes = torch.cat([self._classes, new])
        order = self._classes.argsort()
        return order[torch.searchsorted(self._classes[order], classes)]

    def _move_to(self, rows: Tensor, n_rows: int) -> None:
        """Move some rows to the front, with spare rows after them."""
        for name in ("_count", "_mean", "_m2"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(n_rows, *old.shape[1:])
            new[: len(rows)] = old[rows]
            setattr(self, name, new)

    def _sort(self) -> None:
        """Put the classes in ascending order, without spare rows."""
        if len(self._mean) == self.n_classes and bool((self._classes[1:] > self._classes[:-1]).all()):
            return
        order = self._classes.argsort()
        self._classes = self._classes[order]
        self._move_to(order, self.n_classes)

    @property
    def classes(self) -> Tensor:
        """``[classes]`` int64, the labels seen, ascending."""
        self._sort()
        return self._classes

    @property
    def count(self) -> Tensor:
        """``[classes]`` int64, samples per class."""
        self._sort()
        return self._count

    @property
    def mean(self) -> Tensor:
        """``[classes, components, cells]`` float64."""
        self._sort()
        return self._mean

    @property
    def m2(self) -> Tensor:
        """``[classes, components, cells]`` float64, sums of squared deviations."""
        self._sort()
        return self._m2

    @property
    def n_classes(self) -> int:
        """Number of classes seen."""
        return len(self._classes)

    @property
    def is_empty(self) -> bool:
        """Whether no sample was seen."""
        return self.n_classes == 0

    @property
    def n_components(self) -> int:
        """Number of components (channels, neurons)."""
        return self._mean.shape[1]

    @property
    def n_cells(self) -> int:
        """Number of spatial cells per component."""
        return self._mean.shape[2]

    @property
    def var(self) -> Tensor:
        """``[classes, components, cells]``: the variance M2 / n of the samples seen (n, not n − 1)."""
        return self.m2 / self.count.to(torch.float64).view(-1, 1, 1)

    def without(self, classes: Tensor) -> ClassMoments:
        """The moments of all classes but some, ``[n]`` int64 labels."""
        keep = ~torch.isin(self.classes, classes.to(self.classes.device))
        return ClassMoments(self.classes[keep], self.count[keep], self.mean[keep], self.m2[keep])

    def __repr__(self) -> str:
        return f"ClassMoments({_layout(self)}, n_samples={int(self.count.sum())})"


def _layout(moments: ClassMoments) -> str:
    return f"n_classes={moments.n_classes}, n_components={moments.n_components}, n_cells={moments.n_cells}"
