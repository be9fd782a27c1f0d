"""Streaming class-conditional moments.

Layout, obeyed by every function here: activations are ``[samples, components, cells]``, moments are
``[classes, components, cells]`` in float64. A *component* is one prunable index (a channel or a
neuron), a *cell* is one spatial position after pooling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_cosep.errors import InputError

__all__ = ["ClassMoments", "to_cells"]

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def to_cells(activation: Tensor, *, channel_dim: int = 1, spatial: int | None = None) -> Tensor:
    """Bring an activation into the ``[samples, components, cells]`` layout.

    Each of the remaining (spatial or token) dimensions is average-pooled to at most ``spatial``
    cells. A dimension that is already shorter is left as it is.

    Args:
        activation: ``[samples, ...]`` with the components along ``channel_dim``.
        channel_dim: 1 for convolutions, -1 for linear layers.
        spatial: Cells per dimension, at least 1; ``None`` keeps every position (the papers' form).

    Returns:
        ``[samples, components, cells]``. Half-precision activations come back as float32, so that
        pooling does not round.

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

    Batches are merged with the pairwise update of Chan, Golub and LeVeque (1983): for two samples
    of sizes n_a, n_b and with δ = mean_b − mean_a, n = n_a + n_b,

        mean = mean_a + δ n_b / n,        M2 = M2_a + M2_b + δ² n_a n_b / n,

    where M2 is the sum of squared deviations. Everything is accumulated in float64 and each batch is
    centred before it is squared, so a large common offset costs no accuracy, and neither the order
    nor the split of the batches matters beyond rounding (about 1e-15 relative).

    A class exists as soon as one of its samples was seen: labels need not be contiguous, and a label
    that never occurs costs nothing.

    Attributes:
        classes: ``[classes]`` int64, the labels seen, ascending.
        count: ``[classes]`` int64, samples per class.
        mean: ``[classes, components, cells]`` float64.
        m2: ``[classes, components, cells]`` float64, sums of squared deviations.

    Example:
        >>> moments = ClassMoments()
        >>> moments.update(torch.tensor([[[1.0]], [[3.0]], [[7.0]]]), torch.tensor([4, 4, 9]))
        >>> moments.classes.tolist(), moments.mean.flatten().tolist(), moments.var.flatten().tolist()
        ([4, 9], [2.0, 7.0], [1.0, 0.0])
    """

    classes: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self) -> None:
        self.classes = torch.empty(0, dtype=torch.int64)
        self.count = torch.empty(0, dtype=torch.int64)
        self.mean = torch.empty(0, 0, 0, dtype=torch.float64)
        self.m2 = torch.empty(0, 0, 0, dtype=torch.float64)

    @classmethod
    def from_batch(cls, x: Tensor, labels: Tensor) -> ClassMoments:
        """Moments of one batch, in two passes: means first, then squared deviations from them.

        Args:
            x: ``[samples, components, cells]``, any floating-point type.
            labels: ``[samples]``, integers, at least 0.

        Returns:
            The moments of this batch alone, on the device of ``x``.

        Raises:
            InputError: If the shapes do not fit each other.
        """
        if x.dim() != 3 or labels.dim() != 1 or len(x) != len(labels):
            raise InputError(
                "moments: expected activations [samples, components, cells] with one label per sample, "
                f"got activations {tuple(x.shape)} and labels {tuple(labels.shape)}."
            )
        moments = cls()
        if len(labels) == 0:
            return moments
        moments.classes, rows = torch.unique(labels.to(x.device, torch.int64), return_inverse=True)
        n_classes = len(moments.classes)
        moments.count = torch.bincount(rows, minlength=n_classes)
        # A matrix product with the one-hot labels sums by class in a fixed order on every device;
        # index_add_ would not on a GPU.
        one_hot = F.one_hot(rows, n_classes).T.to(torch.float64)
        flat = x.flatten(1).to(torch.float64)
        mean = one_hot @ flat / moments.count[:, None]
        m2 = one_hot @ (flat - mean[rows]).square_()
        moments.mean = mean.view(n_classes, *x.shape[1:])
        moments.m2 = m2.view(n_classes, *x.shape[1:])
        return moments

    def update(self, x: Tensor, labels: Tensor) -> None:
        """Add a batch: ``[samples, components, cells]`` with one label per sample."""
        self.merge(ClassMoments.from_batch(x, labels))

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Add what another stream of the same layer has seen, in place.

        Returns:
            The moments themselves.

        Raises:
            InputError: If both hold data and their components or cells differ.
        """
        if other.n_classes == 0:
            return self
        if self.n_classes == 0:
            self.mean = other.mean.new_empty(0, *other.mean.shape[1:])
            self.m2, self.classes = self.mean.clone(), other.classes[:0]
            self.count = other.count[:0]
        if self.mean.shape[1:] != other.mean.shape[1:]:
            raise InputError(
                "moments: cannot merge moments of different layouts: "
                f"{_layout(self)} and {_layout(other)}; all inputs must have the same size, or "
                "set spatial= so that every map is pooled to the same cells."
            )
        self._add_classes(other.classes)
        rows = torch.searchsorted(self.classes, other.classes)
        n_a, n_b = self.count[rows], other.count
        n = n_a + n_b
        shape = (-1, 1, 1)
        delta = other.mean - self.mean[rows]
        self.mean[rows] += delta * (n_b / n.to(torch.float64)).view(shape)
        self.m2[rows] += other.m2 + delta.square_() * (n_a * n_b / n.to(torch.float64)).view(shape)
        self.count[rows] = n
        return self

    def _add_classes(self, classes: Tensor) -> None:
        union = torch.unique(torch.cat([self.classes, classes]))
        if len(union) == len(self.classes):
            return
        rows = torch.searchsorted(union, self.classes)
        for name in ("count", "mean", "m2"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(len(union), *old.shape[1:])
            new[rows] = old
            setattr(self, name, new)
        self.classes = union

    @property
    def n_classes(self) -> int:
        """Number of classes seen."""
        return len(self.classes)

    @property
    def is_empty(self) -> bool:
        """Whether no sample was seen."""
        return self.n_classes == 0

    @property
    def n_components(self) -> int:
        """Number of components (channels, neurons)."""
        return self.mean.shape[1]

    @property
    def n_cells(self) -> int:
        """Number of spatial cells per component."""
        return self.mean.shape[2]

    @property
    def var(self) -> Tensor:
        """``[classes, components, cells]``: the variance M2 / n of the samples seen (n, not n − 1)."""
        return self.m2 / self.count.to(torch.float64).view(-1, 1, 1)

    def without(self, classes: Tensor) -> ClassMoments:
        """The same moments with some classes left out."""
        keep = ~torch.isin(self.classes, classes.to(self.classes.device))
        kept = ClassMoments()
        kept.classes, kept.count = self.classes[keep], self.count[keep]
        kept.mean, kept.m2 = self.mean[keep], self.m2[keep]
        return kept

    def __repr__(self) -> str:
        return f"ClassMoments({_layout(self)}, n_samples={int(self.count.sum())})"


def _layout(moments: ClassMoments) -> str:
    return f"n_classes={moments.n_classes}, n_components={moments.n_components}, n_cells={moments.n_cells}"
