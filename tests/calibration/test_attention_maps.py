"""Attention maps: as the model itself computes them, and how far apart two heads are by them."""

import copy
import math

import numpy as np
import pytest
import torch
from models import assert_untouched, fingerprint, initialise, seeded, vectors
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.nn import functional as F

from tp_cosep import AttentionMapSelector, CoSePPruner, InputError
from tp_cosep.calibration.attention_maps import collect_attention
from tp_cosep.functional.attention_distances import jensen_shannon_distances
from tp_cosep.graph.heads import attention_heads
from tp_cosep.utils.data import CalibrationData

LENGTH = 6


class Layer(nn.Module):
    """Attention whose softmax is a function of queries, keys and values, or of logits."""

    def __init__(self, how, num_heads=4, head_dim=3, kv_heads=None):
        super().__init__()
        self.how, self.num_heads, self.head_dim = how, num_heads, head_dim
        self.num_kv_heads = kv_heads or num_heads
        self.q_proj = nn.Linear(12, num_heads * head_dim)
        self.k_proj = nn.Linear(12, self.num_kv_heads * head_dim)
        self.v_proj = nn.Linear(12, self.num_kv_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, 12)

    def parts(self, x):
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return (m(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for m in layers)

    def forward(self, x):
        return self.proj(self.how(*self.parts(x)).transpose(1, 2).flatten(2))


def explicit(softmax):
    def attend(q, k, v):
        return softmax(q @ k.transpose(-2, -1) / 3) @ v

    return attend


def fused(**options):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    return attend


def explicit_grouped(q, k, v):
    n, n_shared, length, dim = k.shape
    shape = (n, n_shared, q.shape[1] // n_shared, length, dim)
    if shape[2] > 1:
        k, v = (t[:, :, None].expand(shape).reshape(n, -1, length, dim) for t in (k, v))
    return explicit(nn.Softmax(-1))(q, k, v)


class Model(nn.Module):
    def __init__(self, *hows, **options):
        super().__init__()
        self.embed = nn.Linear(20, 12)
        self.layers = nn.ModuleList(Layer(how, **options) for how in hows)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        # A softmax of no attention, over as many dimensions as that has.
        return self.head(x.mean(1))[:, None, None].softmax(-1)[:, 0, 0]


def built(*hows, **options):
    model = initialise(Model(*hows, **options))
    return model, vectors(24, shape=(LENGTH, 20))


def collected(model, batches, target_fn=None, **options):
    return collect_attention(
        model, CalibrationData(batches, progress=False, target_fn=target_fn), attention_heads(model), **options
    )


def block_means(maps, size):
    """Means over the windows of adaptive pooling, one by one."""
    bounds = [(i * LENGTH // size, -(-(i + 1) * LENGTH // size)) for i in range(size)]
    cells = [torch.stack([maps[..., a:b, c:d].mean((-1, -2)) for c, d in bounds], -1) for a, b in bounds]
    pooled = torch.stack(cells, -2)
    return pooled / pooled.sum(-1, keepdim=True)


def by_hand(layer, x, *, scale, bias=0.0):
    """Maps of a layer for its inputs, averaged over samples, in float64."""
    q, k, _ = layer.parts(x)
    k = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k).double() * scale + bias
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)).mean(0)


def random_maps(n, size, seed=0):
    maps = torch.rand(n, size, size, generator=seeded(seed), dtype=torch.float64) ** 4
    maps[0, :, 1:] = 0  # certain of one key
    return maps / maps.sum(-1, keepdim=True)


@pytest.mark.parametrize(("n", "size"), [(1, 3), (5, 1), (7, 4), (12, 8)])
def test_distances_are_those_of_scipy(n, size):
    maps = random_maps(n, size)
    distances = jensen_shannon_distances(maps)
    expected = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            rows = [jensenshannon(maps[i, r], maps[j, r], base=2) for r in range(size)]
            expected[i, j] = math.sqrt(np.mean(np.square(np.nan_to_num(rows))))
    # The root of what rounding leaves of a zero is 1e-8.
    assert distances.numpy() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(distances, distances.T)
    assert distances.diagonal().tolist() == [0.0] * n
    assert distances.min() >= 0
    assert distances.max() <= 1


def test_distances_of_opposite_maps_are_one_and_of_equal_ones_zero():
    one, other = torch.eye(4), torch.eye(4).flip(0)
    assert jensen_shannon_distances(torch.stack([one, other, one])).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_rows_are_scaled_and_a_row_of_zeros_is_uniform():
    maps = random_maps(3, 4)
    assert jensen_shannon_distances(maps * 7).numpy() == pytest.approx(jensen_shannon_distances(maps).numpy(), abs=1e-7)
    zeros = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4)])
    distances = jensen_shannon_distances(zeros)
    assert distances[0, 1] == 0
    assert distances[0, 2] == distances[1, 2] > 0


def test_distances_obey_the_triangle_inequality():
    d = jensen_shannon_distances(random_maps(15, 5))
    assert (d[:, :, None] <= d[:, None, :] + d.T[None, :, :] + 1e-12).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "softmax",
    [lambda x: x.softmax(-1), lambda x: torch.softmax(x, dim=-1), lambda x: F.softmax(x, dim=-1), nn.Softmax(-1)],
    ids=["method", "torch", "functional", "module"],
)
@torch.no_grad()
def test_maps_are_those_of_the_models_softmax(softmax, size):
    model, (x, _) = built(explicit(softmax), explicit(softmax))
    maps = collected(model, [x], size=size)
    z = model.embed(x)
    for i, layer in enumerate(model.layers):
        expected = block_means(by_hand(layer, z, scale=1 / 3), size)
        z = z + layer(z)
        for name in ("q_proj", "k_proj", "v_proj"):
            assert maps[f"layers.{i}.{name}"].numpy() == pytest.approx(expected.numpy(), abs=1e-6)
            assert maps[f"layers.{i}.{name}"].dtype == torch.float64
    assert len(maps) == 6


BOOLEAN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(-1)
FLOAT = torch.linspace(-2, 3, LENGTH * LENGTH).view(LENGTH, LENGTH)
INFINITE = torch.zeros(LENGTH, LENGTH).masked_fill(~BOOLEAN, -torch.inf)
PER_HEAD = torch.randn(1, 4, LENGTH, LENGTH, generator=seeded())


@pytest.mark.parametrize(
    ("options", "bias", "scale"),
    [
        ({}, torch.zeros(()), None),
        ({"scale": 0.2}, torch.zeros(()), 0.2),
        ({"attn_mask": BOOLEAN}, INFINITE, None),
        ({"attn_mask": FLOAT}, FLOAT, None),
        ({"attn_mask": PER_HEAD, "scale": 2.0}, PER_HEAD, 2.0),
        ({"is_causal": True}, torch.full((LENGTH, LENGTH), -torch.inf).triu(1), None),
    ],
    ids=["plain", "scale", "boolean mask", "float mask", "mask per head", "causal"],
)
@torch.no_grad()
def test_maps_are_those_inside_scaled_dot_product_attention(options, bias, scale):
    model, (x, _) = built(fused(**options))
    expected = by_hand(model.layers[0], model.embed(x), scale=3**-0.5 if scale is None else scale, bias=bias)
    maps = collected(model, [x], size=LENGTH)
    assert maps["layers.0.q_proj"].numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    # What is read off is what the function uses: with one-hot values its output is the map.
    q, k, _ = model.layers[0].parts(model.embed(x))
    output = F.scaled_dot_product_attention(q, k, torch.eye(LENGTH).expand(*q.shape[:2], -1, -1), **options)
    assert output.mean(0).numpy() == pytest.approx(expected.numpy(), abs=1e-5)


@torch.no_grad()
def test_maps_of_query_heads_that_share_keys():
    model, (x, _) = built(fused(enable_gqa=True), kv_heads=2)
    expected = block_means(by_hand(model.layers[0], model.embed(x), scale=3**-0.5), 3)
    maps = collected(model, [x], size=3)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert maps[f"layers.0.{name}"].numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_query_that_may_see_nothing_adds_nothing():
    mask = BOOLEAN.clone()
    mask[2] = False
    model, (x, _) = built(fused(attn_mask=mask))
    maps = collected(model, [x], size=3)
    assert all(torch.isfinite(m).all() for m in maps.values())
    assert maps["layers.0.q_proj"].sum(-1).numpy() == pytest.approx(1)


@pytest.mark.parametrize("attend", [explicit(nn.Softmax(-1)), fused()], ids=["explicit", "fused"])
@pytest.mark.parametrize("sizes", [[24], [1, 23], [7, 8, 9], [6] * 4])
def test_the_split_into_batches_does_not_matter(attend, sizes):
    model, (x, y) = built(attend, attend)
    whole = collected(model, [(x, y)])
    parts = collected(model, list(zip(x.split(sizes), y.split(sizes), strict=True)))
    turned = collected(model, [x.flip(0)])
    for name, maps in whole.items():
        assert maps.shape == (4, 8, 8)
        assert maps.sum(-1).numpy() == pytest.approx(1)
        assert parts[name].numpy() == pytest.approx(maps.numpy(), abs=1e-6)
        assert turned[name].numpy() == pytest.approx(maps.numpy(), abs=1e-6)


def test_a_map_belongs_to_the_layers_before_it():
    model, (x, _) = built(fused(), explicit(nn.Softmax(-1)))
    maps = collected(model, [x])
    assert list(maps) == [f"layers.{i}.{n}_proj" for i in range(2) for n in "qkv"]
    assert not torch.allclose(maps["layers.0.q_proj"], maps["layers.1.q_proj"], atol=1e-3)


def test_the_model_is_as_before_and_ran_in_eval_mode():
    model, (x, _) = built(fused())
    model.layers[0].proj = nn.Sequential(model.layers[0].proj, nn.Dropout(0.5))
    model.train()
    before = fingerprint(model)
    first, second = collected(model, [x]), collected(model, [x])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_untouched(model, before)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        collected(model, [x[..., 1:]])
    assert_untouched(model, before)


def test_other_batches_are_read_by_target_fn():
    model, (x, _) = built(fused())
    plain = collected(model, [x])
    read = collected(model, [{"pixels": x}], target_fn=lambda batch: (batch["pixels"], None))
    assert torch.equal(read["layers.0.q_proj"], plain["layers.0.q_proj"])


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: (q @ k.transpose(-2, -1)).relu() @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).flatten(0, 1).softmax(-1).unflatten(0, q.shape[:2]) @ v,
    ],
    ids=["no softmax", "heads and samples in one dimension"],
)
def test_attention_that_cannot_be_seen(attend):
    model, (x, _) = built(fused(), attend)
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"saw none after layers\.1\.k_proj, layers\.1\.q_proj, layers\.1\.v_proj: no"):
        collected(model, [x])
    assert_untouched(model, before)


def test_a_loader_without_batches():
    model, _ = built(fused())
    with pytest.raises(InputError, match="or the loader gave no batches"):
        collected(model, [])


def test_a_model_without_heads():
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    x, _ = vectors()
    with pytest.raises(InputError, match="attention maps are those of heads, found none by name; pass num_heads="):
        AttentionMapSelector().fit(model, [x], progress=False)


def alike(model, of):
    """Give head i of every layer the queries and keys of head ``of[i]``, and so its maps; not its values."""
    rows = [3 * h + d for h in of for d in range(3)]
    for layer in model.layers:
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.data.copy_(projection.weight.data[rows])
            projection.bias.data.copy_(projection.bias.data[rows])
    return model


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_heads_of_equal_maps_are_pruned_without_labels(scope):
    model, (x, _) = built(explicit(nn.Softmax(-1)), explicit(nn.Softmax(-1)))
    of = [0, 1, 0, 1]
    alike(model, of)
    before = copy.deepcopy(model)
    options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    # Batches of inputs alone.
    pruner = CoSePPruner(model, x[:2], AttentionMapSelector(scope=scope), loader=[x], **options)
    pruner.step()
    group_plans = [e for e in pruner.plan if e.unit == "head"]
    assert len(group_plans) == 2
    for group_plan, layer in zip(sorted(group_plans, key=lambda e: e.name), model.layers, strict=True):
        assert {of[i // 3] for i in group_plan.selection.keep_idxs} == {0, 1}
        assert layer.num_heads == len(group_plan.selection.keep_idxs) // 3 == 2
        assert layer.q_proj.out_features == layer.proj.in_features == 6
    others = [e for e in pruner.plan if e.unit == "channel"]
    assert others
    assert all(e.selection is None for e in others)
    (residual,) = [e for e in others if "embed" in e.layers]
    assert residual.reason == "none of its layers could be measured"
    assert torch.equal(model.embed.weight, before.embed.weight)
    model(x).sum().backward()


def test_the_knee_of_equal_maps():
    model, (x, _) = built(explicit(nn.Softmax(-1)), num_heads=9)
    alike(model, [h % 3 for h in range(9)])
    selector = AttentionMapSelector(knee="strongest").fit(model, [x], progress=False)
    CoSePPruner(model, x[:2], selector, prune_num_heads=True, prune_head_dims=False).step()
    assert model.layers[0].num_heads == 3


@pytest.mark.parametrize("given", [False, True])
def test_maps_are_measured_anew_in_every_step(given):
    model, (x, _) = built(fused(), fused())
    heads = attention_heads(model) if given else None
    options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5, "iterative_steps": 2}
    pruner = CoSePPruner(model, x[:2], AttentionMapSelector(), loader=[x], num_heads=heads, **options)
    for n in (3, 2):
        pruner.step()
        assert [layer.num_heads for layer in model.layers] == [n, n]


def test_maps_of_heads_that_share_keys_and_values():
    model, (x, _) = built(explicit_grouped, kv_heads=2)
    options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    pruner = CoSePPruner(model, x[:2], AttentionMapSelector(), loader=[x], **options)
    pruner.step()
    (group_plan,) = [e for e in pruner.plan if e.unit == "head"]
    assert sorted(i // 6 for i in group_plan.selection.keep_idxs[::3]) == [0, 1]
    assert (model.layers[0].num_heads, model.layers[0].num_kv_heads) == (2, 2)
    assert model(x).shape == (len(x), 4)


@pytest.mark.parametrize("metric_scope", ["layer", "model"])
def test_maps_of_heads_that_are_gone(metric_scope):
    model, (x, _) = built(fused(), fused())
    selector = AttentionMapSelector(scope=metric_scope).fit(model, [x], progress=False)
    options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    CoSePPruner(model, x[:2], selector, **options).step()
    before = fingerprint(model)
    stale = CoSePPruner(model, x[:2], selector, **options)
    with pytest.raises(InputError, match=r"attention maps cover \d heads, the layer has \d; call fit\(\) again after"):
        stale.step()
    assert_untouched(model, before)
    assert selector.fit(model, [x], progress=False).statistics.attention["layers.0.q_proj"].shape[1:] == (8, 8)
    stale.step()


def test_what_was_measured_is_listed():
    model, (x, _) = built(fused())
    selector = AttentionMapSelector()
    assert not selector.is_fitted
    selector.fit(model, [x], progress=False)
    assert selector.is_fitted
    assert selector.layers == [f"layers.0.{n}_proj" for n in "qkv"]
    assert selector.statistics.moments == {}
