import numpy as np
import pytest
import torch

from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments, to_cells


def make_batch(n=60, components=7, cells=5, labels=(0, 1, 2), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, components, cells, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.1, 3, components, dtype=torch.float64)[:, None]
    y = torch.tensor(labels)[torch.randint(len(labels), (n,), generator=generator)]
    return (x + y.view(-1, 1, 1) % 5).to(dtype), y


def accumulate(x, y, sizes=None):
    moments = ClassMoments()
    for batch in zip(x.split(sizes or len(x)), y.split(sizes or len(y)), strict=True):
        moments.update(*batch)
    return moments


def two_pass(x, y):
    """Numpy's mean and variance class by class, in float64."""
    x, y = x.numpy().astype(np.float64), y.numpy().astype(np.int64)
    classes, count = np.unique(y, return_counts=True)
    mean = np.stack([x[y == c].mean(0) for c in classes])
    var = np.stack([x[y == c].var(0) for c in classes])
    return classes, count, mean, var


def assert_matches_two_pass(moments, x, y, rtol=1e-10, atol=1e-12):
    classes, count, mean, var = two_pass(x, y)
    assert moments.classes.tolist() == classes.tolist()
    assert moments.count.tolist() == count.tolist()
    assert moments.mean.dtype == moments.m2.dtype == moments.var.dtype == torch.float64
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(moments.var.numpy(), var, rtol=rtol, atol=atol)
    np.testing.assert_allclose(moments.m2.numpy(), var * count[:, None, None], rtol=rtol, atol=atol)


def assert_same(a, b, rtol=1e-10):
    assert a.classes.tolist() == b.classes.tolist()
    assert a.count.tolist() == b.count.tolist()
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(a.m2, b.m2, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("labels", [(0, 1, 2), (3,), (7, 2, 40, 1000)], ids=["dense", "one class", "gaps"])
@pytest.mark.parametrize("components", [1, 10, 16, 96])
def test_one_batch_has_the_two_pass_moments(labels, components):
    x, y = make_batch(components=components, labels=labels)
    moments = ClassMoments.from_batch(x, y)
    assert (moments.n_classes, moments.n_components, moments.n_cells) == (len(labels), components, 5)
    assert_matches_two_pass(moments, x, y)


@pytest.mark.parametrize("sizes", [1, 7, 32, [1, 0, 50, 9], [59, 1]], ids=str)
def test_neither_the_split_nor_the_order_of_batches_matters(sizes):
    x, y = make_batch(labels=(0, 4, 9))
    moments = accumulate(x, y, sizes)
    assert_matches_two_pass(moments, x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert_same(accumulate(x[order], y[order], sizes), moments)


@pytest.mark.parametrize(
    ("offset", "dtype", "tolerance"),
    # At 1e8 the last digit of a float64 is 1.5e-8, so of var = 1e-2 … 9 seven digits are left; the
    # float32 activations are rounded already and their moments, taken in float64, are exact.
    [(1e8, torch.float64, 1e-6), (-1e8, torch.float64, 1e-6), (1e4, torch.float32, 1e-10)],
)
@pytest.mark.parametrize("sizes", [60, 7])
def test_large_offset_costs_no_accuracy(offset, dtype, tolerance, sizes):
    x, y = make_batch()
    shifted = (x + offset).to(dtype)
    moments = accumulate(shifted, y, sizes)
    assert_matches_two_pass(moments, shifted, y, rtol=tolerance)
    if dtype == torch.float64:
        torch.testing.assert_close(moments.var, accumulate(x, y).var, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_activations_are_accumulated_in_float64(dtype):
    x, y = make_batch(dtype=dtype)
    assert_matches_two_pass(accumulate(x, y, 7), x.double(), y)


def test_merge_is_associative_and_commutative():
    batches = [make_batch(seed=s, labels=labels) for s, labels in enumerate([(0, 2), (2, 5), (0, 1, 9)])]

    def part(i):
        return ClassMoments.from_batch(*batches[i])

    left = part(0).merge(part(1)).merge(part(2))
    right = part(0).merge(part(1).merge(part(2)))
    reversed_ = part(2).merge(part(1)).merge(part(0))
    assert_same(left, right)
    assert_same(left, reversed_)
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert_matches_two_pass(left, x, y)


def test_merge_returns_self_and_leaves_the_other_alone():
    a, b = ClassMoments.from_batch(*make_batch()), ClassMoments.from_batch(*make_batch(seed=1))
    before = b.mean.clone(), b.m2.clone(), b.count.clone(), b.classes.clone()
    assert a.merge(b) is a
    a.update(*make_batch(seed=2))
    for old, new in zip(before, (b.mean, b.m2, b.count, b.classes), strict=True):
        assert torch.equal(old, new)


def test_merging_into_empty_moments_copies():
    x, y = make_batch()
    source = ClassMoments.from_batch(x, y)
    before = source.mean.clone(), source.m2.clone(), source.count.clone()
    target = ClassMoments().merge(source)
    assert_same(target, source)
    target.update(*make_batch(seed=1))
    for old, new in zip(before, (source.mean, source.m2, source.count), strict=True):
        assert torch.equal(old, new)


def test_merging_with_empty_moments_changes_nothing():
    x, y = make_batch()
    moments = ClassMoments.from_batch(x, y)
    assert_same(moments.merge(ClassMoments()), ClassMoments.from_batch(x, y), rtol=0)
    # What is empty has no layout to disagree about.
    moments.merge(moments.without(moments.classes))
    assert_matches_two_pass(moments, x, y)
    empty = ClassMoments().merge(ClassMoments())
    assert (empty.n_classes, empty.n_components, empty.n_cells) == (0, 0, 0)


def test_emptied_moments_take_the_layout_of_the_next_batch():
    moments = ClassMoments.from_batch(*make_batch(components=3))
    moments = moments.without(moments.classes)
    x, y = make_batch(components=10)
    moments.update(x, y)
    assert_matches_two_pass(moments, x, y)


def test_classes_may_appear_late_and_disappear():
    x, y = make_batch(n=90, labels=(5, 6, 7, 8))
    order = torch.argsort(y, descending=True, stable=True)
    x, y = x[order], y[order]
    moments = ClassMoments()
    # Descending labels: each new class has to be put in front of the ones already there.
    for batch in zip(x.split(10), y.split(10), strict=True):
        moments.update(*batch)
        assert moments.classes.tolist() == sorted(moments.classes.tolist())
    assert_matches_two_pass(moments, x, y)


def test_class_with_one_sample_has_variance_zero():
    x, _ = make_batch(n=4)
    moments = ClassMoments.from_batch(x, torch.tensor([1, 0, 0, 0]))
    assert torch.equal(moments.mean[1], x[0])
    assert torch.equal(moments.var[1], torch.zeros_like(x[0]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type(dtype):
    x, y = make_batch(labels=(3, 0, 100))
    moments = accumulate(x, y.to(dtype), 7)
    assert_matches_two_pass(moments, x, y)
    assert moments.classes.dtype == moments.count.dtype == torch.int64
    # A loader may change the type of its labels between two passes.
    moments.update(x + 1, y + 200)
    moments.update(x, y.to(dtype))
    assert_matches_two_pass(moments, torch.cat([x, x + 1, x]), torch.cat([y, y + 200, y]))


def test_results_are_bitwise_deterministic():
    x, y = make_batch(n=200)
    first, second = accumulate(x, y, 33), accumulate(x, y, 33)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.m2, second.m2)


def test_update_leaves_its_arguments_alone():
    x, y = make_batch()
    x_before, y_before = x.clone(), y.clone()
    accumulate(x, y, 7)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)


def test_without_drops_classes_and_keeps_the_original():
    x, y = make_batch(labels=(1, 4, 6, 255))
    moments = ClassMoments.from_batch(x, y)
    kept = moments.without(torch.tensor([4, 255, 17]))
    rows = (y == 1) | (y == 6)
    assert_matches_two_pass(kept, x[rows], y[rows])
    assert_matches_two_pass(moments, x, y)


def test_repr_names_the_layout_and_the_samples():
    text = repr(ClassMoments.from_batch(*make_batch(n=60)))
    assert text == "ClassMoments(n_classes=3, n_components=7, n_cells=5, n_samples=60)"


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((4, 3), (4,)), ((4, 3, 2, 2), (4,)), ((4, 3, 2), (5,)), ((4, 3, 2), (4, 1)), ((4, 3, 2), (0,))],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(x_shape, y_shape):
    with pytest.raises(InputError, match=r"one label per sample, got activations \(4.*and labels"):
        ClassMoments().update(torch.zeros(x_shape), torch.zeros(y_shape, dtype=torch.int64))


@pytest.mark.parametrize(("components", "cells"), [(8, 5), (7, 4)])
def test_different_layouts_do_not_merge(components, cells):
    moments = ClassMoments.from_batch(*make_batch())
    with pytest.raises(InputError, match=f"n_cells=5 and .*={components}, n_cells={cells}; .*spatial="):
        moments.update(*make_batch(components=components, cells=cells))
    assert_matches_two_pass(moments, *make_batch())


def naive_cells(x, spatial):
    """Means over equal slices, one cell at a time; lengths divide evenly or stay."""
    steps = [max(1, length // spatial) for length in x.shape[2:]]
    counts = [length // step for length, step in zip(x.shape[2:], steps, strict=True)]
    cells = []
    for corner in np.ndindex(*counts):
        window = tuple(slice(i * s, (i + 1) * s) for i, s in zip(corner, steps, strict=True))
        cells.append(x[(slice(None), slice(None), *window)].flatten(2).mean(2))
    return torch.stack(cells, dim=-1)


@pytest.mark.parametrize("spatial", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8,), (12,), (8, 8), (12, 4), (2, 8), (8, 1), (4, 8, 4), (1, 2, 12)], ids=str)
def test_cells_are_means_of_slices(shape, spatial):
    x = torch.randn(5, 7, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cells = to_cells(x, spatial=spatial)
    torch.testing.assert_close(cells, naive_cells(x, spatial))


@pytest.mark.parametrize("shape", [(), (6,), (3, 5), (2, 3, 4), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("spatial", [None, 16])
def test_every_position_is_kept_without_pooling_or_on_smaller_maps(shape, spatial):
    x = torch.randn(5, 7, *shape)
    assert torch.equal(to_cells(x, spatial=spatial), x.reshape(5, 7, -1))


def test_map_that_does_not_divide_is_pooled_to_the_asked_size():
    # Adaptive pooling: cells 0-2, 2-4 of five positions overlap in the middle.
    cells = to_cells(torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]]), spatial=2)
    assert cells.tolist() == [[[1.0, 3.0]]]


def test_more_than_three_spatial_dimensions_are_pooled_as_one():
    x = torch.randn(3, 10, 2, 2, 3, 4)
    torch.testing.assert_close(to_cells(x, spatial=4), x.reshape(3, 10, 4, 12).mean(-1))


@pytest.mark.parametrize("spatial", [None, 2])
def test_last_dimension_may_hold_the_components(spatial):
    tokens = torch.randn(5, 8, 10)
    expected = to_cells(tokens.transpose(1, 2), spatial=spatial)
    assert torch.equal(to_cells(tokens, channel_dim=-1, spatial=spatial), expected)
    assert torch.equal(to_cells(tokens[:, 0], channel_dim=-1, spatial=spatial), tokens[:, 0, :, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "spatial"), [((2, 3), None), ((2, 3, 8), None), ((2, 3, 8, 8), 2)])
def test_half_precision_is_pooled_in_float32(dtype, shape, spatial):
    x = (torch.randn(shape) + 100).to(dtype)
    cells = to_cells(x, spatial=spatial)
    assert cells.dtype == torch.float32
    assert torch.equal(cells, to_cells(x.float(), spatial=spatial))


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_activation_without_components_is_refused(shape):
    with pytest.raises(InputError, match=r"activation: expected \[samples, components, ...\], got shape"):
        to_cells(torch.zeros(shape), spatial=2)


@pytest.mark.parametrize("piece", [1, 8, 10**6])
@pytest.mark.parametrize("sizes", [5, 60])
def test_the_pieces_of_an_update_do_not_matter(piece, sizes, monkeypatch):
    monkeypatch.setattr("tp_cosep.functional.class_moments._PIECE", piece)
    x, y = make_batch(labels=(5, 1, 30, 2))
    assert_matches_two_pass(accumulate(x, y, sizes), x, y)


def test_a_hundred_classes_that_come_in_any_order():
    x, _ = make_batch(n=400)
    y = torch.randperm(400, generator=torch.Generator().manual_seed(2)) % 101 * 3
    moments = ClassMoments()
    for i, batch in enumerate(zip(x.split(13), y.split(13), strict=True)):
        moments.update(*batch)
        if i == 4:  # to look on the way does not matter
            assert_matches_two_pass(moments, x[: 13 * 5], y[: 13 * 5])
    assert_matches_two_pass(moments, x, y)
    other = accumulate(x[200:], y[200:], 7)
    assert_matches_two_pass(accumulate(x[:200], y[:200], 11).merge(other), x, y)
