import pytest
import torch
from models import seeded

from tp_cosep.errors import InputError
from tp_cosep.functional.least_squares import RIDGES, fit_linear, refit_to_kept, refit_to_others
from tp_cosep.functional.second_moments import SecondMoments


def rows(n, p, seed=0):
    generator = seeded(seed)
    mixing = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return torch.randn(n, p, generator=generator, dtype=torch.float64) @ mixing + 3


def moments_of(*parts):
    """Both folds as given."""
    folds = []
    for x in parts:
        z = torch.cat([x, x.new_ones(len(x), 1)], 1)
        folds.append(z.T @ z)
    return torch.stack(folds)


def ridge_by_rows(x, t, ridge, constant):
    """Ridge regression as stacked least squares on the rows themselves."""
    mean_x, mean_t = (x.mean(0), t.mean(0)) if constant else (0 * x[0], 0 * t[0])
    a = x - mean_x
    scale = (a**2).mean(0).sqrt()
    a = torch.cat([a / scale, (len(x) * ridge) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    b = torch.cat([t - mean_t, t.new_zeros(x.shape[1], t.shape[1])])
    coefficients = (torch.linalg.lstsq(a, b).solution / scale[:, None]).T
    return coefficients, mean_t - coefficients @ mean_x


def split(folds, p):
    x, t = [*range(p), folds.shape[1] - 1], range(p, folds.shape[1] - 1)
    x, t = torch.tensor(x), torch.tensor(t)
    return folds[:, x[:, None], x], folds[:, t[:, None], x], folds[:, t[:, None], t]


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 0.03, 2.0])
def test_ridge_regression(ridge, constant):
    data = rows(60, 9)
    fit = fit_linear(*split(moments_of(data[:25], data[25:]), 6), torch.eye(3), constant=constant, ridge=ridge)
    coefficients, offset = ridge_by_rows(data[:, :6], data[:, 6:], ridge, constant)
    torch.testing.assert_close(fit.coefficients, coefficients, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fit.constant, offset, rtol=1e-6, atol=1e-7)
    assert fit.ridge == ridge


@pytest.mark.parametrize("constant", [True, False])
def test_the_strength_is_the_one_that_predicts_best_what_it_was_not_fitted_to(constant):
    generator = seeded(1)
    data = rows(40, 12)
    data[:, 8:] += 6 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    metric = weights @ weights.T
    halves = data[:17], data[17:]
    fit = fit_linear(*split(moments_of(*halves), 8), weights, constant=constant)
    errors = []
    for ridge in RIDGES:
        lost = 0.0
        for seen, other in (halves, halves[::-1]):
            a, b = ridge_by_rows(seen[:, :8], seen[:, 8:], ridge, constant)
            left = other[:, 8:] - other[:, :8] @ a.T - b
            lost += float(((left @ metric) * left).sum())
        errors.append(lost)
    assert RIDGES[0] < fit.ridge < RIDGES[-1]  # or nothing was chosen
    assert fit.ridge == RIDGES[errors.index(min(errors))]
    assert fit.lost == pytest.approx(min(errors), rel=1e-6)
    targets = data[:, 8:]
    assert fit.energy == pytest.approx(float(((targets @ metric) * targets).sum()))


@pytest.mark.parametrize("with_own", [True, False])
def test_a_layer_does_not_become_much_more_sensitive(with_own):
    """Two nearly equal inputs predict a pruned one by their difference, which any later change swamps."""
    generator, n = seeded(4), 400
    x = rows(n, 5)
    x[:, 1] = x[:, 0] + 1e-4 * torch.randn(n, generator=generator, dtype=torch.float64)
    t = torch.stack(
        [1e4 * (x[:, 1] - x[:, 0]), x[:, 2] - x[:, 3] + 0.1 * torch.randn(n, generator=generator).double()], 1
    )
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(5, 3, generator=generator, dtype=torch.float64) if with_own else None
    data, halves = torch.cat([x, t], 1), (slice(0, 150), slice(150, n))
    fit = fit_linear(*split(moments_of(*(data[h] for h in halves)), 5), weights, own=own)

    had = torch.cat([t] if own is None else [x, t], 1).var(0, correction=0)
    before = float((had[:, None] * torch.cat([weights] if own is None else [own, weights]) ** 2).sum())
    candidates = []
    for ridge in RIDGES:
        lost = 0.0
        for seen, other in (halves, halves[::-1]):
            a, b = ridge_by_rows(data[seen, :5], data[seen, 5:], ridge, True)
            lost += float((((data[other, 5:] - data[other, :5] @ a.T - b) @ weights) ** 2).sum())
        a, _ = ridge_by_rows(x, t, ridge, True)
        now = a.T @ weights + (0 if own is None else own)
        sensitivity = float((x.var(0, correction=0)[:, None] * now**2).sum())
        candidates.append((sensitivity > 2 * before, lost, ridge))
    assert fit.ridge == min(candidates)[2]
    assert min(candidates, key=lambda w: w[1])[0]  # what predicts best was refused
    assert float(fit.coefficients.abs().max()) < 10


@pytest.mark.parametrize("n_copies", [1, 2, 4])
def test_copies_are_compensated_exactly_even_if_their_weights_add_up(n_copies):
    x = rows(90, 6)
    data = torch.cat([x] * (1 + n_copies), 1)
    weights = torch.ones(data.shape[1], 2, 1, dtype=torch.float64)
    new, constant, _ = refit_to_kept(weights, moments_of(data[:40], data[40:]), torch.arange(6, data.shape[1]))
    torch.testing.assert_close(new[:6], (1 + n_copies) * weights[:6], rtol=1e-6, atol=0)
    torch.testing.assert_close(constant, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_singular_inputs():
    x = rows(50, 3)
    x = torch.cat(
        [x, x[:, :1], torch.full((50, 1), 7.0, dtype=torch.float64), x[:, :2] @ torch.tensor([[1.0], [2.0]]).double()],
        1,
    )
    fit = fit_linear(*split(moments_of(x[:20], x[20:]), 5), torch.eye(1))
    assert torch.isfinite(fit.coefficients).all()
    assert fit.lost < 1e-8 * fit.energy
    assert not fit.coefficients[0, 4]  # a constant predicts nothing
    torch.testing.assert_close(x[:, :5] @ fit.coefficients.T + fit.constant, x[:, 5:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_rows_than_inputs(n):
    x = rows(n, 20)
    moments = SecondMoments(20)
    moments.update(x)
    weights = torch.randn(20, 4, 2, generator=seeded(), dtype=torch.float64)
    new, constant, fit = refit_to_kept(weights, moments.folds, torch.arange(12, 20))
    assert torch.isfinite(new).all()
    assert torch.isfinite(constant).all()
    assert not new[12:].any()
    assert fit.lost >= 0


def test_refit_to_kept_is_the_best_that_any_weights_can_do():
    x, generator = rows(200, 7), seeded(2)
    weights = torch.randn(7, 3, 1, generator=generator, dtype=torch.float64)
    pruned = torch.tensor([1, 4])
    new, constant, _ = refit_to_kept(weights, moments_of(x[:100], x[100:]), pruned, ridge=1e-12)
    kept = [0, 2, 3, 5, 6]
    y = x @ weights[..., 0]
    best = torch.linalg.lstsq(torch.cat([x[:, kept], x.new_ones(200, 1)], 1), y).solution
    torch.testing.assert_close(new[kept, :, 0], best[:-1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(constant, best[-1], rtol=1e-5, atol=1e-6)


def test_refit_to_others_is_the_best_that_any_weights_can_do():
    x, generator = rows(200, 9), seeded(3)
    weights = torch.randn(5, 3, 1, generator=generator, dtype=torch.float64)
    new, constant, _ = refit_to_others(weights, moments_of(x[:90], x[90:]), ridge=1e-12)
    best = torch.linalg.lstsq(torch.cat([x[:, 5:], x.new_ones(200, 1)], 1), x[:, :5] @ weights[..., 0]).solution
    torch.testing.assert_close(new[..., 0], best[:-1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(constant, best[-1], rtol=1e-5, atol=1e-6)


def test_moments_do_not_depend_on_how_rows_are_split():
    x = rows(31, 5).float()
    whole, parts = SecondMoments(5), SecondMoments(5)
    whole.update(x)
    for part in x.split(4):
        parts.update(part)
    torch.testing.assert_close(whole.folds.sum(0), parts.folds.sum(0))
    assert whole.n_rows == parts.n_rows == 31
    assert abs(float(parts.folds[0, -1, -1] - parts.folds[1, -1, -1])) <= 1
    z = torch.cat([x.double(), torch.ones(31, 1).double()], 1)
    torch.testing.assert_close(whole.folds.sum(0), z.T @ z)
    idxs = [3, 0, 5]
    torch.testing.assert_close(whole.of(torch.tensor([3, 0])).folds, whole.folds[:, idxs][:, :, idxs])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(bad):
    moments, x = SecondMoments(2), rows(4, 2)
    moments.update(x)
    before = moments.folds.clone()
    x[3, 1] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        moments.update(x)
    assert torch.equal(moments.folds, before)
