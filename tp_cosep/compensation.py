"""Least squares for a layer that lost inputs: what it can still compute from those that are left.

A layer computes ``y = W x + c``. When inputs x_g go and x_k stay, the best it can do without them is to predict them:
``x_g ≈ A x_k + b`` by least squares gives ``W'_k = W_k + W_g A`` and ``c' = c + W_g b``, which minimises
``E‖W x + c − W'_k x_k − c'‖²`` for every W at once. If x_g is a linear function of x_k, nothing changes.
Here is the general form, with any targets t in place of x_g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RIDGES", "LinearFit", "fit_linear", "without"]

#: Ridge strengths that are tried, as shares of the variance of an input.
RIDGES: tuple[float, ...] = tuple(10.0 ** (i / 3) for i in range(-30, 4))
_RIDGE_WITHOUT_TRIAL = 1e-3


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

    @property
    def error(self) -> float:
        """The share of the energy that is lost, 0 where there was none."""
        return min(max(self.lost / self.energy, 0.0), 1.0) if self.energy > 0 else 0.0


@dataclass(frozen=True)
class _Centred:
    """Moments of inputs and targets around some means."""

    mean_x: Tensor
    mean_t: Tensor
    xx: Tensor
    tx: Tensor


def fit_linear(
    xx: Tensor, tx: Tensor, tt: Tensor, metric: Tensor, *, constant: bool = True, ridge: float | None = None
) -> LinearFit:
    """Ridge regression from second moments, its strength chosen by two-fold cross-validation.

    With inputs scaled to unit variance, ``A(λ) = C_tx (C_xx + λ I)⁻¹``; λ is the one of :data:`RIDGES` whose error
    on the other fold, in the metric M, is least. Inputs without variance get no coefficients.

    Args:
        xx: ``[2, p + 1, p + 1]``, Σ z zᵀ of both folds, z = (x, 1), see :class:`tp_cosep.second_moments.SecondMoments`.
        tx: ``[2, m, p + 1]``, Σ t zᵀ.
        tt: ``[2, m, m]``, Σ t tᵀ.
        metric: ``[m, m]``, M: what an error of the targets costs, symmetric and positive semidefinite.
        constant: Whether to fit a constant; without it moments are taken around zero.
        ridge: λ, if it is given.

    Returns:
        The fit to both folds together. Where a fold has no rows λ is 1e-3 and the error that of the fit itself.

    Example:
        >>> from tp_cosep.second_moments import SecondMoments
        >>> x = torch.randn(100, 2, dtype=torch.float64)
        >>> moments = SecondMoments(3)
        >>> moments.update(torch.cat([x, x[:, :1] - 2 * x[:, 1:] + 3], 1))
        >>> s = moments.folds
        >>> kept = torch.tensor([0, 1, 3])
        >>> fit = fit_linear(s[:, kept[:, None], kept], s[:, 2:3, kept], s[:, 2:3, 2:3], torch.ones(1, 1))
        >>> fit.coefficients.round(decimals=4), fit.constant.round(decimals=4)
        (tensor([[ 1., -2.]], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    metric = metric.to(xx)
    both = xx.sum(0), tx.sum(0)
    n = xx[:, -1, -1]
    energy = float((metric * tt.sum(0)).sum())
    can_try = bool((n > 0).all()) and xx.shape[1] > 1
    if can_try:
        spectra = [_Spectrum(_centred(xx[i], tx[i], constant=constant)) for i in range(2)]
        tried = RIDGES if ridge is None else (ridge,)
        errors = sum(
            spectra[i].errors(xx[1 - i], tx[1 - i], tt[1 - i], metric, tried) * n[1 - i] for i in range(2)
        )
        assert isinstance(errors, Tensor)
        best = int(errors.argmin())
        chosen, lost = tried[best], float(errors[best])
    else:
        chosen = _RIDGE_WITHOUT_TRIAL if ridge is None else ridge
    centred = _centred(*both, constant=constant)
    spectrum = _Spectrum(centred)
    a = spectrum.coefficients(chosen)
    if not can_try:
        lost = float(spectrum.errors(*both, tt.sum(0), metric, (chosen,))[0] * n.sum())
    return LinearFit(a, centred.mean_t - a @ centred.mean_x, chosen, lost, energy)


def without(
    maps: Tensor, folds: Tensor, gone: Tensor, *, constant: bool = True, ridge: float | None = None
) -> tuple[Tensor, Tensor, LinearFit]:
    """Weights that do without some of the inputs.

    Args:
        maps: ``[features, outputs, positions]`` float64, see :mod:`tp_cosep.reading`.
        folds: ``[2, features + 1, features + 1]``, moments of the inputs.
        gone: The features that go.
        constant: Whether the outputs may take a constant.
        ridge: The strength, if it is given.

    Returns:
        The new maps, zero where features go; ``[outputs]``, what is to be added to the outputs; the fit.
    """
    n = len(maps)
    is_kept = torch.ones(n + 1, dtype=torch.bool, device=folds.device)
    is_kept[gone] = False
    kept = is_kept.nonzero()[:, 0]
    w = maps[gone].flatten(1)
    fit = fit_linear(
        folds[:, kept[:, None], kept],
        folds[:, gone[:, None], kept],
        folds[:, gone[:, None], gone],
        w @ w.T,
        constant=constant,
        ridge=ridge,
    )
    new = maps.clone()
    new[gone] = 0
    new[kept[:-1]] += torch.einsum("gk,gop->kop", fit.coefficients, maps[gone])
    return new, torch.einsum("g,gop->o", fit.constant, maps[gone]), fit


def _centred(xx: Tensor, tx: Tensor, *, constant: bool) -> _Centred:
    n = xx[-1, -1].clamp(min=torch.finfo(xx.dtype).tiny)
    mean_x, mean_t = xx[:-1, -1] / n, tx[:, -1] / n
    if not constant:
        mean_x, mean_t = torch.zeros_like(mean_x), torch.zeros_like(mean_t)
    return _Centred(mean_x, mean_t, *_around(xx, tx, mean_x, mean_t))


def _around(xx: Tensor, tx: Tensor, mean_x: Tensor, mean_t: Tensor) -> tuple[Tensor, Tensor]:
    """E (x − m)(x − m)ᵀ and E (t − m_t)(x − m)ᵀ."""
    n = xx[-1, -1].clamp(min=torch.finfo(xx.dtype).tiny)
    sum_x, sum_t = xx[:-1, -1] / n, tx[:, -1] / n
    c = xx[:-1, :-1] / n - torch.outer(sum_x, mean_x) - torch.outer(mean_x, sum_x) + torch.outer(mean_x, mean_x)
    d = tx[:, :-1] / n - torch.outer(sum_t, mean_x) - torch.outer(mean_t, sum_x) + torch.outer(mean_t, mean_x)
    return c, d


class _Spectrum:
    """The eigenvectors of the scaled inputs' covariance, in which every ridge strength is a division."""

    def __init__(self, centred: _Centred) -> None:
        self._centred = centred
        variance = centred.xx.diagonal()
        # Rounding leaves a constant input about eps times its square: no variance to predict from.
        floor = 1e-12 * (variance + centred.mean_x**2).clamp(min=torch.finfo(variance.dtype).tiny)
        self._scale = torch.where(variance > floor, variance.clamp(min=floor).rsqrt(), 0.0)
        scaled = centred.xx * self._scale[:, None] * self._scale
        self._values, self._vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
        self._values = self._values.clamp(min=0)
        self._basis = self._scale[:, None] * self._vectors
        self._targets = centred.tx @ self._basis

    def coefficients(self, ridge: float) -> Tensor:
        return (self._targets / (self._values + ridge)) @ self._basis.T

    def errors(self, xx: Tensor, tx: Tensor, tt: Tensor, metric: Tensor, ridges: tuple[float, ...]) -> Tensor:
        """Mean squared error on other moments, for every ridge strength."""
        mean_x, mean_t = self._centred.mean_x, self._centred.mean_t
        c, d = _around(xx, tx, mean_x, mean_t)
        n = xx[-1, -1].clamp(min=torch.finfo(xx.dtype).tiny)
        sum_t = tx[:, -1] / n
        cross = torch.outer(sum_t, mean_t)
        own = (metric * (tt / n - cross - cross.T + torch.outer(mean_t, mean_t))).sum()
        weighted = metric @ self._targets
        linear = (weighted * (d @ self._basis)).sum(0)
        quadratic = (weighted.T @ self._targets) * (self._basis.T @ c @ self._basis)
        gains = 1 / (self._values + torch.tensor(ridges, dtype=xx.dtype, device=xx.device)[:, None])
        errors: Tensor = own - 2 * gains @ linear + (gains @ quadratic * gains).sum(1)
        return errors
