"""Least squares for a layer that lost inputs: what it can still compute from those that are left.

A layer computes ``y = W x + c``. Where its inputs x become other ones, x′, the best that it can do is to predict x
from them: ``x ≈ A x′ + b`` by least squares gives ``W′ = W A`` and ``c′ = c + W b``, which minimises
``E ‖W x + c − W′ x′ − c′‖²``, for every W at once. When inputs only go, x′ being the part of x that stays, the rows
of A that belong to x′ are the identity, and nothing changes at all if what goes is a linear function of what stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RIDGES", "LinearFit", "fit_linear", "from_others", "without"]

#: Ridge strengths that are tried, in units of the variance of an input: three per decade from 1e-10 to 10.
RIDGES: tuple[float, ...] = tuple(10.0 ** (i / 3) for i in range(-30, 4))
_RIDGE_WITHOUT_TRIAL = 1e-3
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class LinearFit:
    """``t ≈ coefficients @ x + constant``.

    Attributes:
        coefficients: ``[targets, inputs]`` float64.
        constant: ``[targets]`` float64; zeros if none was fitted.
        ridge: The strength that was chosen.
        lost: What is left of the targets, ``Σ (t − t̂)ᵀ M (t − t̂)``, estimated on rows that were not fitted to:
            each fold with the coefficients of the other.
        energy: What there was, ``Σ tᵀ M t``.
    """

    coefficients: Tensor
    constant: Tensor
    ridge: float
    lost: float
    energy: float


def without(
    maps: Tensor, folds: Tensor, gone: Tensor, *, constant: bool = True, ridge: float | None = None
) -> tuple[Tensor, Tensor, LinearFit]:
    """Weights that do without some of the inputs.

    Args:
        maps: ``[features, outputs, positions]`` float64, see :mod:`tp_cosep.graph.patches`.
        folds: ``[2, features + 1, features + 1]``, moments of the inputs, see
            :class:`tp_cosep.functional.second_moments.SecondMoments`.
        gone: ``[n]`` int64, the features that go, ascending.
        constant: Whether the outputs may take a constant.
        ridge: The strength, if it is given.

    Returns:
        The new maps, zero where features go; ``[outputs]``, what is to be added to the outputs; the fit.
    """
    is_kept = torch.ones(len(maps) + 1, dtype=torch.bool, device=maps.device)
    is_kept[gone] = False
    kept = is_kept.nonzero()[:, 0]
    lost = maps[gone]
    fit = fit_linear(
        folds[:, kept[:, None], kept],
        folds[:, gone[:, None], kept],
        folds[:, gone[:, None], gone],
        lost.flatten(1),
        own=maps[kept[:-1]].flatten(1),
        constant=constant,
        ridge=ridge,
    )
    new = maps.clone()
    new[gone] = 0
    new[kept[:-1]] += torch.einsum("gk,gop->kop", fit.coefficients, lost)
    return new, torch.einsum("g,gop->o", fit.constant, lost), fit


def from_others(
    maps: Tensor, folds: Tensor, *, constant: bool = True, ridge: float | None = None
) -> tuple[Tensor, Tensor, LinearFit]:
    """Weights that compute from other inputs what was computed from the original ones.

    Args:
        maps: ``[n, outputs, positions]`` float64, of the n original features.
        folds: ``[2, n + m + 1, n + m + 1]``, moments of rows (original features, other features).
        constant: Whether the outputs may take a constant.
        ridge: The strength, if it is given.

    Returns:
        Maps ``[m, outputs, positions]`` of the other features; ``[outputs]``, what is to be added; the fit.
    """
    n = len(maps)
    fit = fit_linear(
        folds[:, n:, n:], folds[:, :n, n:], folds[:, :n, :n], maps.flatten(1), constant=constant, ridge=ridge
    )
    new = torch.einsum("ng,nop->gop", fit.coefficients, maps)
    return new, torch.einsum("n,nop->o", fit.constant, maps), fit


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

    With inputs scaled to unit variance, ``A(λ) = C_tx (C_xx + λ I)⁻¹``; λ is the one of :data:`RIDGES` whose error
    on the other fold, in the metric M = W Wᵀ, is least. Inputs without variance get no coefficients.

    What is fitted to is not quite what the layer will see: other groups are pruned too, and normalisation may average
    over fewer channels. So a λ is only taken if the layer is not much more sensitive to noise in its inputs than it
    was. The sensitivity is ``‖W diag(σ)‖²`` with the inputs' standard deviations σ, what noise that is independent and
    the same share of every input does to the outputs. It may grow to n_before / n_after times what it was, at least
    to twice: what inputs need that stand for copies of them.

    Args:
        xx: ``[2, p + 1, p + 1]``, Σ z zᵀ of both folds, z = (x, 1).
        tx: ``[2, m, p + 1]``, Σ t zᵀ.
        tt: ``[2, m, m]``, Σ t tᵀ.
        weights: ``[m, outputs]``, W: what the layer makes of the targets.
        own: ``[p, outputs]``, what it makes of the inputs anyway; nothing if not given.
        constant: Whether to fit a constant; without it moments are taken around zero.
        ridge: λ, if it is given.

    Returns:
        The fit to both folds together. Where a fold has no rows, λ is 1e-3 and ``lost`` is that of the fit itself.

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
        is_calm = spectrum.sensitivities(weights, own, tried) <= _most_sensitive(
            *whole, weights, own, constant=constant
        )
        best = int(torch.where(is_calm, errors, torch.inf).argmin()) if bool(is_calm.any()) else len(tried) - 1
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
    """How sensitive a layer may be after the fit: as it was before, times what copies that are summed up need.

    Each input that stays stands for so many as there were for each that is left. Where these are copies of it their
    weights add up, to at most so many times the sum of their squares (Cauchy-Schwarz).

    Returns:
        A number.
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
    return (squares.diagonal() / n - (sums / n) ** 2 * constant).clamp(min=0)


class _Spectrum:
    """The eigenvectors of the scaled inputs' covariance, in which any ridge strength is a division.

    Attributes:
        mean_x: ``[p]``, what moments are taken around: the means, or zero.
        mean_t: ``[m]``, likewise.
    """

    def __init__(self, xx: Tensor, tx: Tensor, *, constant: bool) -> None:
        n = xx[-1, -1].clamp(min=1)
        self.mean_x, self.mean_t = (xx[:-1, -1] / n, tx[:, -1] / n) if constant else (0 * xx[:-1, -1], 0 * tx[:, -1])
        covariance, cross = self._around(xx, tx)
        variance = covariance.diagonal()
        # Rounding leaves a constant input about eps times its square: no variance to predict from.
        floor = 1e-12 * (xx.diagonal()[:-1] / n).clamp(min=_TINY)
        scale = torch.where(variance > floor, variance.clamp(min=_TINY).rsqrt(), 0.0)
        scaled = covariance * scale[:, None] * scale
        values, vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
        self._values = values.clamp(min=0)
        self._vectors, self._deviations = vectors, variance.clamp(min=0).sqrt()
        self._basis = scale[:, None] * vectors
        self._targets = cross @ self._basis

    def _around(self, xx: Tensor, tx: Tensor) -> tuple[Tensor, Tensor]:
        """E (x − m)(x − m)ᵀ and E (t − m_t)(x − m)ᵀ for the means m of this spectrum."""
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
        """``‖(W_x + W A(λ)) diag(σ)‖²`` for every ridge strength."""
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
        """E (t − t̂)ᵀ M (t − t̂) under other moments, for every ridge strength."""
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
