"""Least squares for consumers that lost inputs.

A consumer computes ``y = W x + c``. If its features x are replaced by others, x′, its best weights follow from a
prediction of x: ``x ≈ A x′ + b`` by least squares gives ``W′ = W A`` and ``c′ = c + W b``, which minimises
``E ‖W x + c − W′ x′ − c′‖²`` for every W at once. If x′ is a part of x, the rows of A for x′ are the identity, and y is
unchanged if the pruned features are linear functions of the kept ones.

Weights enter as Wᵀ, ``[features, outputs, positions]``: at every kernel position the same features have other weights.
Moments are Σ z zᵀ over rows z = (x, 1), in two folds, see :class:`tp_cosep.functional.second_moments.SecondMoments`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RIDGES", "LinearFit", "fit_linear", "refit_to_kept", "refit_to_others"]

#: Candidate ridge strengths, in units of the variance of an input: three per decade from 1e-10 to 10.
RIDGES: tuple[float, ...] = tuple(10.0 ** (i / 3) for i in range(-30, 4))
_RIDGE_WITHOUT_TRIAL = 1e-3
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class LinearFit:
    """``t ≈ coefficients @ x + constant``.

    Attributes:
        coefficients: ``[targets, inputs]`` float64.
        constant: ``[targets]`` float64; zeros if none was fitted.
        ridge: The ridge strength λ, in units of the variance of an input.
        lost: The error ``Σ (t − t̂)ᵀ M (t − t̂)`` by two-fold cross-validation, M the metric of :func:`fit_linear`.
        energy: ``Σ tᵀ M t``, the error of predicting nothing.
    """

    coefficients: Tensor
    constant: Tensor
    ridge: float
    lost: float
    energy: float


def refit_to_kept(
    weights: Tensor, folds: Tensor, pruned: Tensor, *, constant: bool = True, ridge: float | None = None
) -> tuple[Tensor, Tensor, LinearFit]:
    """Refit weights to compensate for pruned features.

    W′_kept = W_kept + W_pruned R and c′ = c + W_pruned b, where x_pruned ≈ R x_kept + b.

    Args:
        weights: W, ``[features, outputs, positions]`` float64.
        folds: ``[2, features + 1, features + 1]`` float64, moments of the features.
        pruned: ``[n]`` int64, indices of the pruned features, ascending.
        constant: Whether a constant may be added to the outputs.
        ridge: The ridge strength, in units of the variance of an input; chosen by cross-validation if not given.

    Returns:
        W′ ``[features, outputs, positions]``, zero for pruned features; c′ − c ``[outputs]``; the fit.

    Example:
        >>> x = torch.arange(6, dtype=torch.float64).view(3, 2) ** 2
        >>> z = torch.cat([x, x[:, :1], torch.ones(3, 1)], 1)  # the third feature is a copy of the first
        >>> folds = (z.T @ z).repeat(2, 1, 1)
        >>> weights, added, _ = refit_to_kept(torch.ones(3, 1, 1).double(), folds, torch.tensor([2]))
        >>> weights.flatten().round(decimals=4)
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    is_kept = torch.ones(len(weights) + 1, dtype=torch.bool, device=weights.device)
    is_kept[pruned] = False
    kept = is_kept.nonzero()[:, 0]
    lost = weights[pruned]
    fit = fit_linear(
        folds[:, kept[:, None], kept],
        folds[:, pruned[:, None], kept],
        folds[:, pruned[:, None], pruned],
        lost.flatten(1),
        own=weights[kept[:-1]].flatten(1),
        constant=constant,
        ridge=ridge,
    )
    new = weights.clone()
    new[pruned] = 0
    new[kept[:-1]] += torch.einsum("gk,gop->kop", fit.coefficients, lost)
    return new, torch.einsum("g,gop->o", fit.constant, lost), fit


def refit_to_others(
    weights: Tensor, folds: Tensor, *, constant: bool = True, ridge: float | None = None
) -> tuple[Tensor, Tensor, LinearFit]:
    """Refit weights to other features that replace the original ones.

    W′ = W A and c′ = c + W b, where x ≈ A x′ + b.

    Args:
        weights: W, ``[n, outputs, positions]`` float64, of the n original features x.
        folds: ``[2, n + m + 1, n + m + 1]`` float64, moments of rows (x, x′) with m other features x′.
        constant: Whether a constant may be added to the outputs.
        ridge: The ridge strength, in units of the variance of an input; chosen by cross-validation if not given.

    Returns:
        W′ ``[m, outputs, positions]``; c′ − c ``[outputs]``; the fit.
    """
    n = len(weights)
    fit = fit_linear(
        folds[:, n:, n:], folds[:, :n, n:], folds[:, :n, :n], weights.flatten(1), constant=constant, ridge=ridge
    )
    new = torch.einsum("ng,nop->gop", fit.coefficients, weights)
    return new, torch.einsum("n,nop->o", fit.constant, weights), fit


def fit_linear(
    xx: Tensor,
    tx: Tensor,
    tt: Tensor,
    weights: Tensor,
    *,
    own: Tensor | None = None,
    constant: bool = True,
    ridge: float | None = None,
) -> LinearFit:
    """Ridge regression from second moments, its strength chosen by two-fold cross-validation.

    With inputs scaled to unit variance, ``A(λ) = C_tx (C_xx + λ I)⁻¹``; λ is the one of :data:`RIDGES` with the least
    error on the other fold, in the metric ``M = W Wᵀ``, W ``[m, outputs]``. Inputs without variance get no
    coefficients.

    The inputs after pruning differ from those in calibration: other groups are pruned too, and normalisation may
    average over fewer channels. So a λ is admissible only if the consumer does not become much more sensitive to noise
    in its inputs. Its sensitivity is ``‖diag(σ) W‖²`` over all inputs, σ their standard deviations: the effect on the
    outputs of independent noise that is the same share of every input. It may grow by a factor of n_before / n_after,
    at least 2: as much as inputs need that represent copies of themselves.

    Args:
        xx: ``[2, p + 1, p + 1]`` float64, Σ z zᵀ of both folds, z = (x, 1).
        tx: ``[2, m, p + 1]`` float64, Σ t zᵀ of both folds.
        tt: ``[2, m, m]`` float64, Σ t tᵀ of both folds.
        weights: W, ``[m, outputs]``, the consumer's weights of the targets.
        own: ``[p, outputs]``, the consumer's weights of the inputs before the fit; zero if not given.
        constant: Whether to fit a constant; without it moments are taken around zero.
        ridge: λ; chosen by cross-validation if not given.

    Returns:
        The fit to both folds together. If a fold has no rows, λ is 1e-3 and ``lost`` is the training error.

    Example:
        >>> from tp_cosep.functional.second_moments import SecondMoments
        >>> x = torch.randn(100, 2, dtype=torch.float64)
        >>> moments = SecondMoments(3)
        >>> moments.update(torch.cat([x, x[:, :1] - 2 * x[:, 1:] + 3], 1))
        >>> s, kept = moments.folds, torch.tensor([0, 1, 3])
        >>> fit = fit_linear(s[:, kept[:, None], kept], s[:, 2:3, kept], s[:, 2:3, 2:3], torch.ones(1, 1))
        >>> fit.coefficients.round(decimals=4), fit.constant.round(decimals=4)
        (tensor([[ 1., -2.]], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    weights = weights.to(xx)
    metric = weights @ weights.T
    n, whole = xx[:, -1, -1], (xx.sum(0), tx.sum(0), tt.sum(0))
    tried = RIDGES if ridge is None else (ridge,)
    spectrum = _Spectrum(*whole[:2], constant=constant)
    if bool((n > 0).all()):
        errors = torch.zeros(len(tried), dtype=torch.float64, device=xx.device)
        for fit, test in ((0, 1), (1, 0)):
            half = _Spectrum(xx[fit], tx[fit], constant=constant)
            errors += n[test] * half.errors(xx[test], tx[test], tt[test], metric, tried)
        is_admissible = spectrum.sensitivities(weights, own, tried) <= _most_sensitive(
            *whole, weights, own, constant=constant
        )
        admissible = torch.where(is_admissible, errors, torch.inf)
        best = int(admissible.argmin()) if bool(is_admissible.any()) else len(tried) - 1
        chosen, lost = tried[best], float(errors[best])
    else:
        chosen = _RIDGE_WITHOUT_TRIAL if ridge is None else ridge
        lost = float(n.sum() * spectrum.errors(*whole, metric, (chosen,))[0])
    coefficients = spectrum.coefficients(chosen)
    return LinearFit(
        coefficients,
        spectrum.mean_t - coefficients @ spectrum.mean_x,
        chosen,
        max(lost, 0.0),
        float((metric * whole[2]).sum()),
    )


def _most_sensitive(
    xx: Tensor, tx: Tensor, tt: Tensor, weights: Tensor, own: Tensor | None, *, constant: bool
) -> Tensor:
    """The largest admissible sensitivity: max(2, n_before / n_after) times that before the fit.

    After the fit each input represents n_before / n_after inputs on average. If these are copies of it, their weights
    add up, and the square of a sum of r weights is at most r times the sum of their squares (Cauchy-Schwarz).

    Returns:
        A scalar.
    """
    n = xx[-1, -1].clamp(min=1)
    square = (weights**2).sum(1) @ _variances(tt, tx[:, -1], n, constant=constant)
    n_after, n_before = max(len(xx) - 1, 1), len(tt)
    if own is not None:
        square += (own.to(xx) ** 2).sum(1) @ _variances(xx[:-1, :-1], xx[:-1, -1], n, constant=constant)
        n_before += n_after
    limit: Tensor = max(2.0, n_before / n_after) * (1 + 1e-9) * square
    return limit


def _variances(squares: Tensor, sums: Tensor, n: Tensor, *, constant: bool) -> Tensor:
    """Variances from Σ x xᵀ and Σ x over n rows; mean squares without a constant."""
    return (squares.diagonal() / n - (sums / n) ** 2 * constant).clamp(min=0)


class _Spectrum:
    """The eigenvectors of the scaled inputs' covariance, in which a ridge regression is a division.

    Attributes:
        mean_x: ``[p]``, means of the inputs; zeros without a constant.
        mean_t: ``[m]``, means of the targets; zeros without a constant.
    """

    def __init__(self, xx: Tensor, tx: Tensor, *, constant: bool) -> None:
        n = xx[-1, -1].clamp(min=1)
        self.mean_x, self.mean_t = (xx[:-1, -1] / n, tx[:, -1] / n) if constant else (0 * xx[:-1, -1], 0 * tx[:, -1])
        covariance, cross = self._around(xx, tx)
        variance = covariance.diagonal()
        # The variance of a constant input is about eps times its square, by rounding.
        floor = 1e-12 * (xx.diagonal()[:-1] / n).clamp(min=_TINY)
        scale = torch.where(variance > floor, variance.clamp(min=_TINY).rsqrt(), 0.0)
        scaled = covariance * scale[:, None] * scale
        values, vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
        self._values = values.clamp(min=0)
        self._vectors, self._deviations = vectors, variance.clamp(min=0).sqrt()
        self._basis = scale[:, None] * vectors
        self._targets = cross @ self._basis

    def _around(self, xx: Tensor, tx: Tensor) -> tuple[Tensor, Tensor]:
        """E (x − m)(x − m)ᵀ and E (t − m_t)(x − m)ᵀ, with the means m, m_t of this spectrum."""
        n = xx[-1, -1].clamp(min=1)
        x, t, m = xx[:-1, -1] / n, tx[:, -1] / n, self.mean_x
        covariance = xx[:-1, :-1] / n - torch.outer(x, m) - torch.outer(m, x) + torch.outer(m, m)
        cross = tx[:, :-1] / n - torch.outer(t, m) - torch.outer(self.mean_t, x) + torch.outer(self.mean_t, m)
        return covariance, cross

    def coefficients(self, ridge: float) -> Tensor:
        """A(λ), ``[m, p]``."""
        a: Tensor = (self._targets / (self._values + ridge)) @ self._basis.T
        return a

    def sensitivities(self, weights: Tensor, own: Tensor | None, ridges: tuple[float, ...]) -> Tensor:
        """``‖diag(σ) (W_x + A(λ)ᵀ W)‖²`` for every ridge strength, W_x the consumer's own weights of the inputs."""
        through = self._targets.T @ weights
        before = (
            torch.zeros_like(through)
            if own is None
            else self._vectors.T @ (self._deviations[:, None] * own.to(weights))
        )
        squares, products = (before**2).sum(), (before * through).sum(1)
        gains = self._gains(ridges)
        found: Tensor = squares + 2 * gains @ products + gains**2 @ (through**2).sum(1)
        return found

    def _gains(self, ridges: tuple[float, ...]) -> Tensor:
        gains: Tensor = 1 / (
            self._values + torch.tensor(ridges, dtype=torch.float64, device=self._values.device)[:, None]
        )
        return gains

    def errors(self, xx: Tensor, tx: Tensor, tt: Tensor, metric: Tensor, ridges: tuple[float, ...]) -> Tensor:
        """E (t − t̂)ᵀ M (t − t̂) under the given moments, for every ridge strength."""
        covariance, cross = self._around(xx, tx)
        n = xx[-1, -1].clamp(min=1)
        own = torch.outer(tx[:, -1] / n, self.mean_t)
        own = (metric * (tt / n - own - own.T + torch.outer(self.mean_t, self.mean_t))).sum()
        weighted = metric @ self._targets
        linear = (weighted * (cross @ self._basis)).sum(0)
        quadratic = (weighted.T @ self._targets) * (self._basis.T @ covariance @ self._basis)
        gains = self._gains(ridges)
        errors: Tensor = own - 2 * gains @ linear + (gains @ quadratic * gains).sum(1)
        return errors
