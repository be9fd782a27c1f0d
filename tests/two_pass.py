"""The two-pass reference of class moments."""

import numpy as np

from tp_cosep.calibration.class_observer import measured_layers
from tp_cosep.calibration.collect import collect
from tp_cosep.calibration.statistics import StatisticsSpec
from tp_cosep.utils.data import CalibrationData


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


def collect_moments(model, loader, *, layers=None, **options):
    """Class moments of all layers of a model, or of some; options of the spec and of the data."""
    fields = {
        name: options.pop(name) for name in ("spatial", "observe", "channel_dims", "memory_budget") if name in options
    }
    spec = StatisticsSpec(class_moments=True, **{"channel_dims": {}, **fields})
    layers = measured_layers(model, spec.channel_dims) if layers is None else layers
    return collect(model, CalibrationData(loader, **options), spec, layers=layers).moments
