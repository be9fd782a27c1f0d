"""Selectors with statistics of every kind, and their comparison."""

import torch

OPTIONS = [
    {"space": "separability"},
    {"space": "joint"},
    {"representative": "reconstruction"},
    {"space": "reconstruction"},
]


def batches(x, y):
    return [(x[i : i + 5], y[i : i + 5]) for i in range(0, len(x), 5)]


def assert_same(a, b):
    assert list(a.moments) == list(b.moments)
    assert list(a.consumers) == list(b.consumers)
    for name, m in a.moments.items():
        for field in ("classes", "count", "mean", "m2"):
            assert torch.equal(getattr(m, field), getattr(b.moments[name], field))
    for name, m in a.consumers.items():
        torch.testing.assert_close(m.covariance, b.consumers[name].covariance, rtol=1e-12, atol=1e-12)
        assert torch.equal(m.between_classes, b.consumers[name].between_classes)
