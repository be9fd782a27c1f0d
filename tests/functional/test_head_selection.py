"""Which heads a table of distances keeps, where these come from, and what a stock pruner makes of the scores."""

import copy
import itertools
import math

import pytest
import torch
import torch_pruning as tp
from attention_models import Transformer
from fitted import group_with
from models import assert_same_state, initialise, seeded, vectors
from torch import nn

from tp_cosep import CoSePPruner, InputError, NotFittedError, ReconstructionSelector
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.head_selection import heads_of_layer, heads_of_model
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.separability import pooled_gram, profile_gram, profiles
from tp_cosep.graph.heads import attention_groups, attention_heads
from tp_cosep.graph.tracing import ROOT_TYPES, trace


def points(n, seed=0, dims=3):
    x = torch.randn(n, dims, generator=seeded(seed), dtype=torch.float64)
    return (x[:, None] - x).square().sum(-1).sqrt()


def deviation(distances, kept):
    return distances[:, list(kept)].amin(1).sum().item()


def best(distances, k):
    """The k-medoids solution by exhaustive search."""
    return min(itertools.combinations(range(len(distances)), k), key=lambda kept: deviation(distances, kept))


def is_consistent(selection, n):
    assert selection.n_channels == len(selection.labels) == len(selection.scores) == n
    assert sorted(selection.keep_idxs + selection.prune_idxs) == list(range(n))
    assert len(selection.keep_idxs) == len(selection.medoids) == selection.k
    assert set(selection.labels) <= set(range(selection.k))
    assert [selection.labels[m] for m in selection.medoids] == list(range(selection.k))


@pytest.mark.parametrize("n", [4, 6, 7])
def test_heads_of_one_layer_are_the_medoids(n):
    distances = points(n)
    for k in range(1, n + 1):
        selection = heads_of_layer(distances, n_keep=k)
        assert selection == select_channels(distances, n_keep=k)
        assert deviation(distances, selection.keep_idxs) == pytest.approx(deviation(distances, best(distances, k)))


@pytest.mark.parametrize(("n", "n_sharing"), [(6, 2), (6, 3), (8, 4), (12, 3)])
def test_as_many_heads_of_every_block_that_shares_keys_are_kept(n, n_sharing):
    distances = points(n, seed=n)
    n_blocks = n // n_sharing
    for k in range(1, n + 1):
        selection = heads_of_layer(distances, n_sharing=n_sharing, n_keep=k)
        is_consistent(selection, n)
        each = max(1, k // n_blocks)
        assert selection.k == each * n_blocks
        for b in range(n_blocks):
            block = range(b * n_sharing, (b + 1) * n_sharing)
            inside = distances[block.start : block.stop, block.start : block.stop]
            kept = [h - block.start for h in selection.keep_idxs if h in block]
            assert len(kept) == each
            assert deviation(inside, kept) == pytest.approx(deviation(inside, best(inside, each)))
            # Nobody is put into a cluster of other keys.
            assert {selection.medoids[selection.labels[h]] // n_sharing for h in block} == {b}


def test_the_knee_of_a_layer_is_shared_out():
    # Four blocks of three heads each, of which one differs: eight clusters in the layer, two of every block.
    x = torch.tensor([[10.0 * b, 3.0 * (i == 2) + 1e-3 * i] for b in range(4) for i in range(3)], dtype=torch.float64)
    distances = (x[:, None] - x).square().sum(-1).sqrt()
    selection = heads_of_layer(distances, n_sharing=3, knee="strongest")
    each = max(1, selection.knee_k // 4)
    assert selection.k == 4 * each
    assert [sum(h // 3 == b for h in selection.keep_idxs) for b in range(4)] == [each] * 4


@pytest.mark.parametrize("n_sharing", [1, 4])
def test_blocks_of_one_or_of_all_heads_are_no_blocks(n_sharing):
    distances = points(4)
    assert heads_of_layer(distances, n_sharing=n_sharing, n_keep=3) == select_channels(distances, n_keep=3)


def test_a_preference_decides_inside_every_block():
    distances, preference = points(6), torch.tensor([0, 1, 0.5, 3, 1, 2])
    selection = heads_of_layer(distances, n_sharing=3, n_keep=2, preference=preference)
    assert selection.keep_idxs == (1, 3)
    assert heads_of_layer(distances, n_keep=1, preference=preference).keep_idxs == (3,)


def heads_by_brute_force(scores, sizes, k):
    """Take the best head of all layers; take the best of the rest; unless a layer would end up with none."""
    ends = list(itertools.accumulate(sizes))
    layer_of = [next(i for i, end in enumerate(ends) if h < end) for h in range(ends[-1])]
    allowed = [
        kept
        for kept in itertools.combinations(range(ends[-1]), max(k, len(sizes)))
        if {layer_of[h] for h in kept} == set(range(len(sizes)))
    ]
    return max(allowed, key=lambda kept: sum(scores[h].item() for h in kept))


@pytest.mark.parametrize("sizes", [[4], [3, 3], [1, 4, 2], [2, 2, 2, 2], [5, 1]])
def test_heads_of_all_layers_go_by_score_but_one_of_every_layer_stays(sizes):
    n = sum(sizes)
    distances = points(n, seed=n)
    starts = [0, *itertools.accumulate(sizes)]
    for k in range(1, n + 1):
        parts = heads_of_model(distances, sizes, n_keep=k)
        whole = select_channels(distances, n_keep=k)
        kept = [start + h for start, part in zip(starts, parts, strict=False) for h in part.keep_idxs]
        assert kept == list(heads_by_brute_force(whole.scores, sizes, k))
        assert len(kept) == max(k, len(sizes))
        for start, size, part in zip(starts, sizes, parts, strict=False):
            is_consistent(part, size)
            assert part.k >= 1
            assert torch.equal(part.scores, whole.scores[start : start + size])
            assert (part.ks, part.mss, part.knee_k) == (whole.ks, whole.mss, whole.knee_k)
            for i, label in enumerate(part.labels):  # the nearest of those kept
                row = distances[start + i, start : start + size]
                assert row[part.medoids[label]] == row[list(part.medoids)].min()


def test_a_layer_like_another_keeps_its_best_head_only():
    near, far = torch.zeros(3, 2), torch.tensor([[10.0, 0], [0, 10.0], [10.0, 10.0]])
    x = torch.cat([near + 1e-3 * torch.arange(3)[:, None], far]).double()
    parts = heads_of_model((x[:, None] - x).square().sum(-1).sqrt(), [3, 3], n_keep=4)
    assert [len(part.keep_idxs) for part in parts] == [1, 3]


def test_the_knee_of_all_layers_together():
    x = torch.tensor([[10.0 * (h % 3), 1e-3 * h] for h in range(12)], dtype=torch.float64)
    parts = heads_of_model((x[:, None] - x).square().sum(-1).sqrt(), [6, 6], knee="strongest")
    assert sum(part.k for part in parts) == parts[0].knee_k == 3


def test_heads_all_alike_keep_one_of_every_layer():
    parts = heads_of_model(torch.zeros(6, 6), [2, 4])
    assert [part.k for part in parts] == [1, 1]


def test_sizes_that_do_not_add_up():
    with pytest.raises(InputError, match=r"expected the sizes of the layers to add up to 6, got \[2, 3\]"):
        heads_of_model(points(6), [2, 3])


@pytest.mark.parametrize("n_keep", [0, 7])
def test_a_count_out_of_range(n_keep):
    for choose in (heads_of_layer, lambda d, **options: heads_of_model(d, [3, 3], **options)):
        with pytest.raises(InputError, match=f"expected n_keep in 1 … 6 .*, got {n_keep}"):
            choose(points(6), n_keep=n_keep)


def moments(n_components, n_cells=1, n_classes=4, seed=0, labels=None):
    x = torch.randn(30, n_components, n_cells, generator=seeded(seed)) * 2 + torch.arange(n_components)[:, None]
    y = torch.arange(30) % n_classes if labels is None else labels
    return ClassMoments.from_batch(x + 0.3 * y[:, None, None] * torch.randn(n_components, 1, generator=seeded(9)), y)


def averaging(n_rows, n_components):
    """Consecutive components, a row being the mean of its share."""
    return torch.eye(n_rows).repeat_interleave(n_components // n_rows, 1).double() * (n_rows / n_components)


@pytest.mark.parametrize("metric", ["jm", "hellinger", "wasserstein"])
@pytest.mark.parametrize(("n_classes", "n_cells"), [(2, 1), (3, 5), (7, 4)])
@pytest.mark.parametrize("chunk_bytes", [1, 2000, None])
def test_pooled_gram_against_explicit_profiles(metric, n_classes, n_cells, chunk_bytes, monkeypatch):
    if chunk_bytes is not None:
        monkeypatch.setattr("tp_cosep.functional.separability._CHUNK_BYTES", chunk_bytes)
    sizes = [9, 5, 15]
    layers = [moments(n, n_cells, n_classes, seed=n) for n in sizes]
    pools = [averaging(3, 9), None, torch.randn(4, 15, generator=seeded(1), dtype=torch.float64)]
    gram, _ = pooled_gram(layers, pools, metric)
    rows = []
    for layer, pool in zip(layers, pools, strict=True):
        x = profiles(layer, metric)
        rows += [x[i] for i in range(len(x))] if pool is None else [(w[:, None] * x).sum(0) for w in pool]
    n_pairs = math.comb(n_classes, 2)
    expected = [[(a * b).sum().item() / (n_pairs * n_cells) for b in rows] for a in rows]
    assert gram.shape == (12, 12)
    assert gram.dtype == torch.float64
    assert gram.numpy() == pytest.approx(torch.tensor(expected).double().numpy(), rel=1e-5)
    assert torch.equal(gram, gram.T) or gram.numpy() == pytest.approx(gram.T.numpy(), rel=1e-12)


def test_the_gram_of_one_layer_as_it_is():
    layer = moments(7, 3)
    assert torch.equal(pooled_gram([layer], [None])[0], profile_gram(layer))
    assert torch.equal(pooled_gram([layer], [torch.eye(7)])[0], profile_gram(layer))


@pytest.mark.parametrize(
    "other",
    [
        moments(5, 2, n_classes=3),
        moments(5, 3, n_classes=4),
        moments(5, 2, labels=torch.arange(30) % 4 + 1),
    ],
    ids=["fewer classes", "more cells", "other classes"],
)
def test_layers_measured_on_other_classes_or_cells(other):
    with pytest.raises(InputError, match=r"measured on the same classes in as many cells, .* use spatial=1"):
        pooled_gram([moments(5, 2), other], [None, None])


def test_a_single_class_tells_nothing_apart():
    with pytest.raises(InputError, match="at least two classes, got 1"):
        pooled_gram([moments(5, labels=torch.zeros(30, dtype=torch.int64))], [None])


def measured(scope="layer", **options):
    model, (x, y) = initialise(Transformer(**{"fused": True, **options})), vectors(shape=(5, 20))
    num_heads = attention_heads(model)
    selector = ReconstructionSelector(spatial=2, scope=scope).fit(model, [(x, y)], num_heads=num_heads, progress=False)
    return model, x, selector, num_heads


def stock(model, x, selector, num_heads, **options):
    """Torch-Pruning's pruner, with dictionaries of its own: its defaults are shared by all pruners."""
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "ignored_layers": [model.head, model.embed]}
    return tp.pruner.BasePruner(model, x[:1], selector, num_heads=num_heads, prune_num_heads=True, **fresh, **options)


def scores_of(model, x, selector, num_heads):
    """By layer the scores of heads and of dimensions, each from its own selection."""
    groups = attention_groups(trace(model, x[:1]), num_heads, ROOT_TYPES)
    heads = [s.scores.view(4, 6)[:, 0] for s in selector.select_heads(groups, dict(num_heads))]
    return heads, [selector.select(group).scores[:6] for group in groups]


def expected_weights(layer, heads, dims):
    rows = [part * 24 + h * 6 + d for part in range(3) for h in heads for d in dims]
    return layer.qkv.weight[rows]


@pytest.mark.parametrize("with_dims", [False, True])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.slow
def test_the_stock_pruner_drops_the_heads_and_dimensions_that_rank_lowest(with_dims, scope, ratio):
    model, x, selector, num_heads = measured(scope)
    before = copy.deepcopy(model)
    heads, dims = scores_of(model, x, selector, num_heads)
    options = {"pruning_ratio": 1 / 3, "head_pruning_ratio": ratio, "prune_head_dims": with_dims}
    stock(model, x, selector, num_heads, **options).step()
    for i, layer in enumerate(model.layers):
        n_left = 4 - int(4 * ratio)
        kept_heads = sorted(heads[i].argsort()[4 - n_left :].tolist())
        kept_dims = sorted(dims[i].argsort()[2:].tolist()) if with_dims else range(6)
        assert torch.equal(layer.qkv.weight, expected_weights(before.layers[i], kept_heads, kept_dims))
        assert num_heads[layer.qkv] == n_left


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.slow
def test_the_stock_pruner_ranks_heads_over_all_layers(scope, ratio):
    model, x, selector, num_heads = measured(scope, n_layers=3)
    before = copy.deepcopy(model)
    heads, dims = scores_of(model, x, selector, num_heads)
    if scope == "layer":
        # The mean over a head's channels; the dimensions' mean shifts a layer as a whole.
        heads = [h - h.mean() + d.mean() for h, d in zip(heads, dims, strict=True)]
    order = torch.cat(heads).argsort()[int(12 * ratio) :].tolist()
    options = {"pruning_ratio": 0.2, "head_pruning_ratio": ratio, "prune_head_dims": False, "global_pruning": True}
    pruner = stock(model, x, selector, num_heads, **options)
    pruner.step()
    for i, layer in enumerate(model.layers):
        kept = sorted(h - 4 * i for h in order if h // 4 == i)
        assert torch.equal(layer.qkv.weight, expected_weights(before.layers[i], kept, range(6)))


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("with_dims", [False, True])
@pytest.mark.slow
def test_global_pruning_with_heads_is_that_of_the_stock_pruner(scope, with_dims):
    model, x, selector, _ = measured(scope, n_layers=3)
    options = {"pruning_ratio": 0.2, "head_pruning_ratio": 0.25, "prune_head_dims": with_dims, "global_pruning": True}
    copied, again = copy.deepcopy(model), copy.deepcopy(model)
    ignored = {"ignored_layers": [model.head, model.embed], "prune_num_heads": True}
    pruner = CoSePPruner(model, x[:1], selector, **ignored, **options)
    pruner.step()
    copied_heads = attention_heads(copied)
    of_original = ReconstructionSelector(spatial=2, scope=scope)
    of_original.fit(copied, [vectors(shape=(5, 20))], num_heads=copied_heads, progress=False)
    stock(copied, x, of_original, copied_heads, **options).step()
    assert_same_state(model.state_dict(), copied.state_dict())
    for layer in model.layers:
        assert layer.num_heads * layer.head_dim == layer.proj.in_features
        assert layer.num_heads == pruner.num_heads[layer.qkv]
    assert sum(layer.num_heads for layer in model.layers) == 9
    model(x).sum().backward()
    model.zero_grad()
    pruner.plan.apply(again, x[:1])
    assert_same_state(again.state_dict(), model.state_dict())


def test_scores_of_groups_without_heads_are_those_of_their_selection():
    model, x, selector, _ = measured()
    plain = group_with(model, x, "embed")
    assert torch.equal(selector(plain), selector.select(plain).scores)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_scores_of_attention_rank_heads_by_their_means_and_dimensions_by_theirs(scope):
    model, x, selector, num_heads = measured(scope)
    heads, dims = scores_of(model, x, selector, num_heads)
    for i, group in enumerate(attention_groups(trace(model, x[:1]), num_heads, ROOT_TYPES)):
        scores = selector(group).view(4, 6)
        assert scores.mean(1).argsort().tolist() == heads[i].argsort().tolist()
        assert scores.mean(0).argsort().tolist() == dims[i].argsort().tolist()
        exact = scores.mean(1) if scope == "model" else scores.mean(0)
        assert exact.numpy() == pytest.approx((heads if scope == "model" else dims)[i].numpy())


def test_heads_of_a_layer_that_was_not_measured():
    model, x, selector, num_heads = measured()
    fresh = ReconstructionSelector()
    groups = attention_groups(trace(model, x[:1]), num_heads, ROOT_TYPES)
    assert isinstance(groups[0][0].dep.target.module, nn.Linear)
    with pytest.raises(NotFittedError, match=r"call fit\(model, loader\) first"):
        fresh.select_heads(groups, num_heads)
    del selector.statistics.moments["layers.1.qkv"]
    with pytest.raises(InputError, match=r"layer 'layers\.1\.qkv': expected class moments, got none"):
        selector.select_heads(groups, num_heads)
