"""How well each component tells every pair of classes apart, and how alike two components are.

Layout: statistics enter as ``[components, classes]`` (one cell) or as :class:`ClassMoments`
(``[classes, components, cells]``). Class pairs are in the order of ``torch.triu_indices(C, C, 1)``,
that is (0, 1), (0, 2), …, (C−2, C−1). A *profile* is ``[components, pairs × cells]``.

Letters: μ, σ² are the mean and variance of a component's activation in a class; subscripts a, b are
the two classes of a pair.
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
    "bhattacharyya",
    "distances_from_gram",
    "hellinger_distance",
    "jm_distance",
    "pooled_gram",
    "profile_gram",
    "profiles",
    "resolve_metric",
    "wasserstein_distance",
]

#: ``metric(mean_a, var_a, mean_b, var_b) -> separability``: elementwise on tensors of one shape,
#: variances positive; the result is finite and 0 where both classes have the same distribution.
PairMetric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# A class whose variance is below this share of the component's whole variance counts as that share.
_REL_FLOOR = 1e-6
# Variance that rounding to float32 alone puts on a value x: (2^-23 x)² / 12.
_ROUNDING_FLOOR = 2.0**-46 / 12
_CHUNK_BYTES = 64 * 2**20


def bhattacharyya(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """Bhattacharyya distance between two univariate Gaussians.

    B = ¼ (μ_a − μ_b)² / (σ_a² + σ_b²) + ½ ln((σ_a² + σ_b²) / (2 σ_a σ_b))

    The logarithm is taken as log1p((σ_a − σ_b)² / (2 σ_a σ_b)), which keeps its digits when the two
    variances are close. Source: CoSeP (arXiv 2505.13225), eq. for JM; the ⅛ printed in its first
    version is a misprint for ¼.

    Args:
        mean_a: Means of the first class, any shape.
        var_a: Variances of the first class, positive, same shape.
        mean_b: Means of the second class.
        var_b: Variances of the second class.

    Returns:
        B ≥ 0, elementwise.
    """
    std_a, std_b = var_a.sqrt(), var_b.sqrt()
    # Divided before they are squared, so that extreme scales neither overflow nor vanish.
    of_means = (mean_a - mean_b).div_(2 * torch.hypot(std_a, std_b)).square_()
    of_spreads = ((std_a - std_b) / std_a).mul_((std_a - std_b) / std_b).mul_(0.5).log1p_().mul_(0.5)
    return of_means.add_(of_spreads)


def _jm(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    return bhattacharyya(mean_a, var_a, mean_b, var_b).neg_().expm1_().mul_(-2)


def _hellinger(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    return bhattacharyya(mean_a, var_a, mean_b, var_b).neg_().expm1_().neg_().sqrt_()


def _wasserstein(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    return torch.hypot(mean_a - mean_b, var_a.sqrt() - var_b.sqrt())


# What these two make of e^−B, in place; rounding may put it above 1.
_OF_AFFINITY: dict[PairMetric, Callable[[Tensor], object]] = {
    _jm: lambda x: x.mul_(-2).add_(2).clamp_(min=0),
    _hellinger: lambda x: x.neg_().add_(1).clamp_(min=0).sqrt_(),
}

#: The metrics that can be chosen by name.
METRICS: dict[str, PairMetric] = {"jm": _jm, "hellinger": _hellinger, "wasserstein": _wasserstein}


def resolve_metric(metric: str | PairMetric) -> PairMetric:
    """The function behind a metric's name; a callable is taken as it is.

    Returns:
        The metric.

    Raises:
        InputError: If the name is unknown.
    """
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise InputError(
            f"metric: expected one of {sorted(METRICS)} or a callable "
            f"(mean_a, var_a, mean_b, var_b) -> tensor, got {metric!r}."
        )
    return METRICS[metric]


def jm_distance(mean: Tensor, var: Tensor) -> Tensor:
    """Jeffries-Matusita distance of every class pair, for every component.

    JM = 2 (1 − e^−B) ∈ [0, 2], with B of :func:`bhattacharyya`. Invariant under any affine map of the
    activation. Variances are floored (see :func:`profiles`): a constant component gets zeros.

    Args:
        mean: ``[components, classes]``.
        var: ``[components, classes]``, at least 0.

    Returns:
        ``[components, pairs]`` in float64.

    Example:
        >>> jm_distance(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]]))  # B = ¼·4/2
        tensor([[0.7869]], dtype=torch.float64)
    """
    return _all_pairs(_jm, mean, var)


def hellinger_distance(mean: Tensor, var: Tensor) -> Tensor:
    """Hellinger distance √(1 − e^−B) ∈ [0, 1] of every class pair; arguments as :func:`jm_distance`."""
    return _all_pairs(_hellinger, mean, var)


def wasserstein_distance(mean: Tensor, var: Tensor) -> Tensor:
    """2-Wasserstein distance √((μ_a − μ_b)² + (σ_a − σ_b)²); arguments as :func:`jm_distance`.

    In units of the activation, and so, unlike the other two, not invariant to a channel's scale.

    Returns:
        ``[components, pairs]`` in float64.
    """
    return _all_pairs(_wasserstein, mean, var)


def _all_pairs(metric: PairMetric, mean: Tensor, var: Tensor) -> Tensor:
    if mean.dim() != 2 or mean.shape != var.shape:
        raise InputError(
            "separability: expected mean and var of one shape [components, classes], "
            f"got {tuple(mean.shape)} and {tuple(var.shape)}."
        )
    return next(all_pairs(_kernel(mean.T.double()[..., None], var.T.double()[..., None], metric), None))


def _floored(mean: Tensor, var: Tensor) -> Tensor:
    """Variances with their floor, ``[classes, components, cells]``."""
    whole = var.mean(0) + mean.var(0, unbiased=False)
    floor = torch.maximum(_REL_FLOOR * whole, _ROUNDING_FLOOR * mean.square().amax(0))
    # A component that is 0 for every sample of every class has no scale of its own; any positive
    # variance makes all its distances 0.
    floor = torch.where(floor > 0, floor, torch.ones_like(floor))
    return torch.maximum(var, floor)


def _kernel(mean: Tensor, var: Tensor, metric: PairMetric) -> Kernel:
    """What computes the values of class pairs from means and variances ``[classes, components, cells]``."""
    mean, var = (x.transpose(0, 1).contiguous() for x in (mean, _floored(mean, var)))
    if metric in _OF_AFFINITY:
        return affinity_kernel(mean, var, _OF_AFFINITY[metric])
    return elementwise_kernel(metric, mean, var, _check_values)


def _check_values(values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise InputError(
            f"metric: expected a result of the inputs' shape {tuple(shape)}, got {tuple(values.shape)}; "
            "the metric must work elementwise."
        )
    if not torch.isfinite(values).all():
        raise InputError("metric: got NaN or infinite separabilities; a metric must be finite for positive variances.")


def _checked(moments: ClassMoments) -> ClassMoments:
    if moments.n_classes < 2:
        raise InputError(f"separability: expected moments of at least two classes, got {moments.n_classes}.")
    return moments


def profiles(moments: ClassMoments, metric: str | PairMetric = "jm") -> Tensor:
    """Separability profile of every component: its distance for each class pair in each cell.

    A class variance is floored at 1e-6 of the component's whole variance (mean within-class variance
    plus the variance of the class means), and at the variance that rounding to float32 gives. So a
    class in which the component is constant separates almost perfectly instead of dividing by zero,
    and a component that is constant everywhere is a point at the origin.

    Args:
        moments: Of at least two classes.
        metric: ``"jm"``, ``"hellinger"``, ``"wasserstein"`` or a :data:`PairMetric`.

    Returns:
        ``[components, pairs × cells]``, float64. For many classes use :func:`profile_gram`, which
        never builds this matrix.

    Raises:
        InputError: If there are fewer than two classes, or the metric is unknown or not finite.
    """
    return next(all_pairs(_kernel(_checked(moments).mean, moments.var, resolve_metric(metric)), None))


def profile_gram(
    moments: ClassMoments, metric: str | PairMetric = "jm", *, max_pairs: int | None = None, seed: int = 0
) -> Tensor:
    """Inner products of the profiles, divided by their length.

    G = X Xᵀ / d with X of :func:`profiles`, accumulated over chunks of class pairs, so that memory
    does not grow with their number.

    Args:
        moments: Of at least two classes.
        metric: As in :func:`profiles`.
        max_pairs: Where there are more class pairs, a sample of about so many stands for all, see
            :func:`tp_cosep.functional.class_pairs.sampled_pairs`.
        seed: Of that sample.

    Returns:
        ``[components, components]``, float64, symmetric.
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

    G = Y Yᵀ / d, where Y stacks the P_l X_l of all layers: X_l the profiles of layer l, P_l its pool. With the rows of
    P_l averaging over the dimensions of a head, Y has the profile of every head.

    Args:
        moments: Of each layer, over the same classes and as many cells.
        pools: ``[rows, components]`` of each layer; ``None`` for its profiles as they are.
        metric: As in :func:`profiles`.
        max_pairs: As in :func:`profile_gram`.
        seed: As in :func:`profile_gram`.

    Returns:
        ``[rows, rows]`` over the rows of all layers, float64, symmetric; and the relative standard error of the squared
        distances in it, √(Σ SE² / Σ D⁴) over all pairs of rows: 0 for all class pairs, and NaN for a sample of a single
        cycle. A sample is of m out of M cycles of class pairs (:func:`tp_cosep.functional.class_pairs.sampled_pairs`), SE² is
        (1 − m/M) s² / m with s² the variance between cycles.

    Raises:
        InputError: If the layers' classes or numbers of cells differ.
    """
    metric = resolve_metric(metric)
    first = _checked(moments[0])
    for other in moments:
        if not torch.equal(other.classes, first.classes) or other.n_cells != first.n_cells:
            raise InputError(
                "separability: expected layers measured on the same classes in as many cells, got "
                f"{first!r} and {other!r}; to compare heads of layers of different resolution use spatial=1."
            )
    kernels = [_kernel(m.mean, m.var, metric) for m in moments]
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
    """√(Σ SE² / Σ D⁴), from the sums over all pairs of rows of the cycles' D⁴ and of the mean's."""
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
        gram: ``[n, n]``, symmetric.

    Returns:
        ``[n, n]``, float64, exactly symmetric with a zero diagonal. Squares below 1e-13 of
        G_ii + G_jj are rounding and become 0: twins are at distance 0.

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
