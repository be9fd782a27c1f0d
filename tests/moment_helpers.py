"""Selectors with statistics of every kind, and their comparison."""

import torch

OPTIONS = [
    {"kind": "cosep"},
    {"kind": "reconstruction"},
    {"kind": "cosep", "representative": "reconstruction"},
    {"kind": "reconstruction without classes"},
]


def batches(x, y):
    return [(x[i : i + 5], y[i : i + 5]) for i in range(0, len(x), 5)]


def assert_same(a, b):
    assert list(a.statistics.moments) == list(b.statistics.moments)
    assert list(a.statistics.inputs) == list(b.statistics.inputs)
    for name, m in a.statistics.moments.items():
        for field in ("classes", "count", "mean", "m2"):
            assert torch.equal(getattr(m, field), getattr(b.statistics.moments[name], field))
    for name, m in a.statistics.inputs.items():
        torch.testing.assert_close(m.covariance, b.statistics.inputs[name].covariance, rtol=1e-12, atol=1e-12)
        assert torch.equal(m.between_classes, b.statistics.inputs[name].between_classes)
