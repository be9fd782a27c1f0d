"""The two-pass reference of class moments."""

import numpy as np


def pooled(x, spatial):
    """Average every dimension behind the channels over at most ``spatial`` windows, as adaptive pooling does."""
    for axis in range(2, x.ndim):
        length = x.shape[axis]
        cells = length if spatial is None else min(spatial, length)
        windows = [range(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]
        x = np.stack([x.take(w, axis).mean(axis) for w in windows], axis)
    return x.reshape(*x.shape[:2], -1)


def assert_two_pass(moments, x, y, spatial, rtol=1e-9):
    cells, y = pooled(x, spatial), np.asarray(y)
    classes = np.unique(y)
    assert moments.classes.tolist() == classes.tolist()
    assert moments.count.tolist() == [int((y == c).sum()) for c in classes]
    mean = np.stack([cells[y == c].mean(0) for c in classes])
    var = np.stack([cells[y == c].var(0) for c in classes])
    scale = np.abs(mean).max()
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(moments.var.numpy(), var, rtol=rtol, atol=rtol * scale**2)
