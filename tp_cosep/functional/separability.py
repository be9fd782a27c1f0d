"""Class separability of components: their profiles, and the distances between profiles.

Layout: statistics enter as :class:`tp_cosep.functional.class_moments.ClassMoments`, ``[classes, components, cells]``.
Class pairs are in the order of ``torch.triu_indices(C, C, 1)``, that is (0, 1), (0, 2), …, (C−2, C−1). Profiles are
``[components, pairs × cells]``.

Letters: μ, σ² are the mean and variance of a component's activation in a class; a and b are the two classes of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.class_pairs import Kernel, affinity_kernel, all_pairs, elementwise_kernel, sampled_pairs
from tp_cosep.functional.linalg import self_product

__all__ = [
    "METRICS",
    "PairMetric",
    "check_metric",
    "distances_from_gram",
    "pooled_gram",
    "profile_gram",
    "profiles",
]

#: ``metric(mean_a, var_a, mean_b, var_b) -> separability``: elementwise on tensors of one shape, with positive
#: variances; the result is finite, and 0 where both classes have the same distribution.
PairMetric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# A class whose variance is below this share of the component's whole variance counts as that share.
_REL_FLOOR = 1e-6
# Variance that rounding to float32 alone puts on a value x: (2^-23 x)² / 12.
_ROUNDING_FLOOR = 2.0**-46 / 12
_CHUNK_BYTES = 64 * 2**20


def _wasserstein(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    return torch.hypot(mean_a - mean_b, var_a.sqrt() - var_b.sqrt())


# Metrics as functions of e^−B, in place; rounding may put it above 1.
_OF_AFFINITY: dict[object, Callable[[Tensor], object]] = {
    "jm": lambda x: x.mul_(-2).add_(2).clamp_(min=0),
    "hellinger": lambda x: x.neg_().add_(1).clamp_(min=0).sqrt_(),
}

#: Names of metrics; :func:`profiles` has their formulas.
METRICS = ("hellinger", "jm", "wasserstein")


def check_metric(metric: str | PairMetric) -> None:
    """Check a metric.

    Args:
        metric: One of :data:`METRICS`, or a :data:`PairMetric`.

    Raises:
        InputError: If the name is unknown.
    """
    if not callable(metric) and metric not in METRICS:
        raise InputError(
            f"metric: expected one of {list(METRICS)} or a callable "
            f"(mean_a, var_a, mean_b, var_b) -> tensor, got {metric!r}."
        )


def _floored(mean: Tensor, var: Tensor) -> Tensor:
    """Variances raised to their floor, ``[classes, components, cells]``."""
    whole = var.mean(0) + mean.var(0, unbiased=False)
    floor = torch.maximum(_REL_FLOOR * whole, _ROUNDING_FLOOR * mean.square().amax(0))
    # A component that is 0 for all samples has no scale; any positive variance makes all its distances 0.
    floor = torch.where(floor > 0, floor, torch.ones_like(floor))
    return torch.maximum(var, floor)


def _kernel(moments: ClassMoments, metric: str | PairMetric) -> Kernel:
    """The metric of class pairs, with moments of at least two classes."""
    if moments.n_classes < 2:
        raise InputError(f"separability: expected moments of at least two classes, got {moments.n_classes}.")
    check_metric(metric)
    mean = moments.mean
    mean, var = (x.transpose(0, 1).contiguous() for x in (mean, _floored(mean, moments.var)))
    if metric in _OF_AFFINITY:
        return affinity_kernel(mean, var, _OF_AFFINITY[metric])
    return elementwise_kernel(metric if callable(metric) else _wasserstein, mean, var, _check_values)


def _check_values(values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise InputError(
            f"metric: expected a result of the inputs' shape {tuple(shape)}, got {tuple(values.shape)}; "
            "the metric must work elementwise."
        )
    if not torch.isfinite(values).all():
        raise InputError("metric: got NaN or infinite separabilities; a metric must be finite for positive variances.")


def profiles(moments: ClassMoments, metric: str | PairMetric = "jm") -> Tensor:
    """Separability profile of every component: the distance between the two classes of each pair, in each cell.

    With the Bhattacharyya distance between two Gaussians,

        B = ¼ (μ_a − μ_b)² / (σ_a² + σ_b²) + ½ ln( (σ_a² + σ_b²) / (2 σ_a σ_b) ),

    the metrics are

        "jm"            2 (1 − e^−B) ∈ [0, 2]                    Jeffries-Matusita
        "hellinger"     √(1 − e^−B) ∈ [0, 1]
        "wasserstein"   √((μ_a − μ_b)² + (σ_a − σ_b)²) ≥ 0       2-Wasserstein, in units of the activation

    JM and Hellinger are invariant under affine maps of the activation, Wasserstein is not.

    Source: CoSeP (arXiv 2505.13225), section 3; the ⅛ in its first version's B is a misprint for ¼. Departure: a class
    variance is at least 1e-6 of the component's total variance (mean within-class variance plus the variance of the
    class means), and at least that of rounding to float32. So a class in which the component is constant separates
    almost perfectly, and a component that is constant everywhere has a profile of zeros.

    Args:
        moments: Moments of at least two classes.
        metric: One of :data:`METRICS`, or a :data:`PairMetric`.

    Returns:
        ``[components, pairs × cells]`` float64. For many classes use :func:`profile_gram`, which never holds this
        matrix.

    Raises:
        InputError: If there are fewer than two classes, or the metric is unknown or not finite.

    Example:
        >>> x = torch.tensor([-1.0, 1.0, 1.0, 3.0]).view(4, 1, 1)  # means 0 and 2, variances 1: B = ¼ · 4 / 2
        >>> profiles(ClassMoments.from_batch(x, torch.tensor([0, 0, 1, 1])))
        tensor([[0.7869]], dtype=torch.float64)
    """
    return next(all_pairs(_kernel(moments, metric), None))


def profile_gram(
    moments: ClassMoments, metric: str | PairMetric = "jm", *, max_pairs: int | None = None, seed: int = 0
) -> Tensor:
    """Inner products of profiles, divided by their length.

        G = X Xᵀ / d,   X ``[components, d]`` of :func:`profiles`,

    accumulated over chunks of class pairs, so that memory does not grow with their number.

    Args:
        moments: Moments of at least two classes.
        metric: One of :data:`METRICS`, or a :data:`PairMetric`.
        max_pairs: Number of class pairs from which on a sample of about this size represents all of them, see
            :func:`tp_cosep.functional.class_pairs.sampled_pairs`; by default all pairs are used.
        seed: Seed of that sample.

    Returns:
        G, ``[components, components]`` float64, symmetric.

    Raises:
        InputError: If there are fewer than two classes, or the metric is unknown or not finite.
    """
    return pooled_gram([moments], [None], metric, max_pairs=max_pairs, seed=seed)[0]


def pooled_gram(
    moments: Sequence[ClassMoments],
    pools: Sequence[Tensor | None],
    metric: str | PairMetric = "jm",
    *,
    max_pairs: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Inner products of weighted sums of profiles, over several layers at once.

        G = Y Yᵀ / d,   Y = (P_1 X_1; …; P_L X_L),

    with X_l ``[components, d]`` the profiles of layer l and P_l its pool. With rows of P_l that average over the
    dimensions of a head, Y holds the profile of every head.

    Args:
        moments: Moments of each layer, all of the same classes and number of cells.
        pools: P_l ``[rows, components]`` of each layer; ``None`` for the identity.
        metric: One of :data:`METRICS`, or a :data:`PairMetric`.
        max_pairs: Number of class pairs from which on a sample of about this size represents all of them; by default
            all pairs are used.
        seed: Seed of that sample.

    Returns:
        G ``[rows, rows]`` float64 over the rows of all layers, symmetric; and the relative standard error
        √(Σ SE² / Σ D⁴) of the squared distances D² in it, over all pairs of rows. For a sample of m out of M cycles
        (:func:`tp_cosep.functional.class_pairs.sampled_pairs`), SE² = (1 − m/M) s² / m, with s² the variance between
        cycles. The error is 0 if all class pairs are used, and NaN for a single cycle.

    Raises:
        InputError: If the layers' classes or numbers of cells differ, there are fewer than two classes, or the metric
            is unknown or not finite.
    """
    first = moments[0]
    for other in moments:
        if not torch.equal(other.classes, first.classes) or other.n_cells != first.n_cells:
            raise InputError(
                "separability: expected layers measured on the same classes in as many cells, got "
                f"{first!r} and {other!r}; to compare heads of layers of different resolution use spatial=1."
            )
    kernels = [_kernel(m, metric) for m in moments]
    n_pairs = first.n_classes * (first.n_classes - 1) // 2
    is_sampled = max_pairs is not None and max_pairs < n_pairs - first.n_classes
    if is_sampled:
        assert max_pairs is not None
        pieces = [sampled_pairs(kernel, max_pairs, seed) for kernel in kernels]
    else:
        n_columns = max(1, _CHUNK_BYTES // (8 * sum(m.n_components for m in moments)))
        pieces = [all_pairs(kernel, n_columns) for kernel in kernels]
    gram, n_values, n_pieces, spread = None, 0, 0, 0.0
    for chunks in zip(*pieces, strict=True):
        parts = [c if p is None else p.to(c) @ c for c, p in zip(chunks, pools, strict=True)]
        product = self_product(parts[0] if len(parts) == 1 else torch.cat(parts))
        if is_sampled:
            spread += float(_squared_distances(product / parts[0].shape[1]).square().sum())
        gram = product if gram is None else gram.add_(product)
        n_values += parts[0].shape[1]
        n_pieces += 1
    assert gram is not None
    gram /= n_values
    if not is_sampled:
        return gram, 0.0
    whole = float(_squared_distances(gram).square().sum())
    return gram, _relative_error(spread, whole, n_pieces, (first.n_classes - 1) // 2)


def _relative_error(spread: float, whole: float, m: int, n_cycles: int) -> float:
    """√(Σ SE² / Σ D⁴).

    Args:
        spread: Σ D⁴ over all pairs of rows and all sampled cycles.
        whole: Σ D⁴ over all pairs of rows, of the mean over the sampled cycles.
        m: Number of sampled cycles.
        n_cycles: Number of all cycles, M.

    Returns:
        The error, at least 0; NaN if m < 2.
    """
    if m < 2:
        return float("nan")
    variance = max(spread - m * whole, 0.0) / (m - 1)
    return sqrt((1 - m / n_cycles) * variance / m / whole) if whole > 0 else 0.0


def _squared_distances(gram: Tensor) -> Tensor:
    squares = gram.diagonal()
    return squares[:, None] + squares[None, :] - 2 * gram


def distances_from_gram(gram: Tensor) -> Tensor:
    """Euclidean distances from inner products: D²_ij = G_ii + G_jj − 2 G_ij.

    Args:
        gram: G, ``[n, n]``, symmetric.

    Returns:
        D, ``[n, n]`` float64, exactly symmetric with a zero diagonal. Squares below 1e-13 of G_ii + G_jj are rounding
        errors and become 0: equal components are at distance 0.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> distances_from_gram(x @ x.T)
        tensor([[0., 5.],
                [5., 0.]], dtype=torch.float64)
    """
    gram = gram.double()
    squares = gram.diagonal()
    total = squares[:, None] + squares[None, :]
    squared = total - (gram + gram.T)
    squared.masked_fill_(squared <= total.mul_(1e-13), 0)
    return squared.fill_diagonal_(0).sqrt_()
