"""Attention heads in models: where they are found, that the right ones go, and what the model is told."""

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from attention_models import Transformer, transformer
from models import assert_same_state, assert_untouched, fingerprint, images, initialise, seeded, vectors
from torch import nn
from torch.nn import functional as F

from tp_cosep import (
    AttentionMapSelector,
    CoSePPruner,
    CoSePSelector,
    InputError,
    PruningError,
    PruningPlan,
    ReconstructionSelector,
)
from tp_cosep.functional.separability import profiles
from tp_cosep.graph.groups import read_group
from tp_cosep.graph.heads import attention_groups, attention_heads, head_parameters, heads_of, update_owners
from tp_cosep.graph.tracing import ROOT_TYPES, trace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unwrapped parameters detected"),
    # Embeddings of positions and the like have no batch.
    pytest.mark.filterwarnings("ignore:fit. cannot measure"),
]

WORDS = 30


def words(n=32):
    y = torch.arange(n) % 4
    x = torch.randint(1, WORDS, (n, 7), generator=seeded())
    x[:, ::2] = 1 + (x[:, ::2] + 7 * y[:, None]) % 8  # the class shows
    return x, y


def timm_vit():
    vit = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    return vit(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=4, mlp_ratio=1), *images()


def timm_swin(num_heads=(4, 4)):
    swin = pytest.importorskip("timm").models.swin_transformer.SwinTransformer
    options = {"depths": (2, 1), "num_heads": num_heads, "window_size": 4, "num_classes": 4, "mlp_ratio": 1.0}
    return swin(img_size=16, patch_size=2, embed_dim=16, **options), *images(24, size=16)


def timm_swin_v2():
    swin = pytest.importorskip("timm").models.swin_transformer_v2.SwinTransformerV2
    options = {"depths": (1,), "num_heads": (4,), "window_size": 4, "num_classes": 4, "mlp_ratio": 1.0}
    return swin(img_size=8, patch_size=2, embed_dim=16, **options), *images(24)


def timm_beit(**more):
    beit = pytest.importorskip("timm").models.beit.Beit
    options = {"depth": 2, "num_heads": 4, "num_classes": 4, "init_values": 0.1, "mlp_ratio": 1, **more}
    return beit(img_size=8, patch_size=4, embed_dim=24, use_rel_pos_bias=True, **options), *images()


def hf(name, data, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(num_labels=4, **options)
    kind = "ImageClassification" if name == "ViT" else "SequenceClassification"
    return getattr(transformers, f"{name}For{kind}")(config), *data


def hf_vit():
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    return hf("ViT", images(), image_size=8, patch_size=4, **options)


def hf_bert():
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    return hf("Bert", words(), vocab_size=WORDS, max_position_embeddings=8, **options)


def hf_distilbert():
    options = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 16, "max_position_embeddings": 8}
    return hf("DistilBert", words(), vocab_size=WORDS, **options)


def hf_llama(kv_heads=4):
    # With two key-value heads, building the queries' group in Torch-Pruning does not come to an end.
    options = {
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
    }
    options |= {"pad_token_id": 0, "use_cache": False, "attn_implementation": "eager"}
    return hf("Llama", words(), vocab_size=WORDS, hidden_size=24, **options)


BUILDERS = {
    "fused": lambda: (Transformer(fused=True), *vectors(shape=(5, 20))),
    "separate": lambda: (Transformer(), *vectors(shape=(5, 20))),
    "per head": lambda: (Transformer(fused=True, per_head=True), *vectors(shape=(5, 20))),
    "grouped-query": lambda: (Transformer(kv_heads=2), *vectors(shape=(5, 20))),
    "shrinking": lambda: (Transformer(fused=True, shrinking=True), *vectors(shape=(5, 20))),
    "timm vit": timm_vit,
    "timm swin": timm_swin,
    "hf vit": hf_vit,
    "hf bert": hf_bert,
    "hf distilbert": hf_distilbert,
    "hf llama": hf_llama,
    "hf llama, keys shared": lambda: hf_llama(1),
}
COMPARABLE = [name for name in BUILDERS if name not in ("grouped-query", "shrinking", "hf llama, keys shared")]
IGNORED = {"timm swin": ["patch_embed.proj", "layers.1.downsample.reduction"]}


def made(name):
    """A model with random weights, data for it, and a selector that measured it."""
    model, x, y = BUILDERS[name]()
    initialise_parameters(model)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    return model, x, y, selector


def initialise_parameters(model):
    """Random weights; buffers, such as indices of positions, stay."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    initialise(model)
    for n, b in model.named_buffers():
        b.copy_(buffers[n])


def head_pruner(model, x, selector, name="", **options):
    defaults = {"pruning_ratio": 0.0, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    defaults |= {"compensate": False, "recalibrate": False}
    return CoSePPruner(model, x[:2], selector, **{**defaults, "ignored_layers": IGNORED.get(name), **options})


def outputs(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def kept_heads(group_plan):
    """Heads that an entry keeps; none of them in part."""
    n_heads = max(before for before, _ in group_plan.heads.values())
    size = group_plan.selection.n_channels // n_heads
    kept = sorted({i // size for i in group_plan.selection.keep_idxs})
    assert group_plan.selection.keep_idxs == tuple(h * size + i for h in kept for i in range(size))
    return kept, n_heads, size


def head_entries(plan):
    return [e for e in plan if e.unit == "head" and e.selection is not None]


def assert_only_these_heads_remain(model, before, group_plan):
    """Exactly the weights of the kept heads, in every projection and in the layer behind, and the owner's numbers."""
    kept, _, size = kept_heads(group_plan)
    channels = list(group_plan.selection.keep_idxs)
    for name, (was, now) in group_plan.heads.items():
        weight = before.get_submodule(name).weight
        parts = weight.shape[0] // (was * size)
        rows = range(weight.shape[0]) if was == now else [p * was * size + c for p in range(parts) for c in channels]
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, weight[list(rows)]), name
        assert layer.out_features == len(rows)
        owner = model.get_submodule(name.rpartition(".")[0])
        numbers = [getattr(owner, a) for a in ("num_heads", "num_attention_heads", "n_heads") if hasattr(owner, a)]
        sizes = [getattr(owner, a) for a in ("head_dim", "attention_head_size") if hasattr(owner, a)]
        assert set(numbers) <= {len(kept)}  # Llama keeps the size alone
        assert set(sizes) <= {size}
    assert torch.equal(
        model.get_submodule(group_plan.name).weight, before.get_submodule(group_plan.name).weight[:, channels]
    )


def zeroed_outputs(model, x, group_plans):
    """What the unpruned model says when the outputs of the dropped heads are zero."""
    handles = []
    for group_plan in group_plans:
        mask = torch.zeros(group_plan.selection.n_channels)
        mask[list(group_plan.selection.keep_idxs)] = 1
        handles.append(
            model.get_submodule(group_plan.name).register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
        )
    try:
        return outputs(model, x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", BUILDERS)
def test_whole_heads_go_and_the_rest_of_the_model_is_as_before(name, tmp_path):
    model, x, _, selector = made(name)
    before, again = copy.deepcopy(model), copy.deepcopy(model)
    pruner = head_pruner(model, x, selector, name)
    pruner.step()
    group_plans = head_entries(pruner.plan)
    n_layers = sum("qkv" in n or n.endswith(("query", "q_proj", "q_lin")) for n, _ in before.named_modules())
    assert len(group_plans) == n_layers > 1
    for group_plan in group_plans:
        assert len(kept_heads(group_plan)[0]) == 2
        assert_only_these_heads_remain(model, before, group_plan)
    with torch.no_grad():
        assert outputs(model, x) == pytest.approx(zeroed_outputs(before, x, group_plans), abs=1e-5)
    outputs(model, x).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    model.zero_grad()
    pruner.plan.save(tmp_path / "plan.json")
    PruningPlan.load(tmp_path / "plan.json").apply(again, x[:2])
    assert_same_state(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(outputs(again, x), outputs(model, x))


@pytest.mark.parametrize(
    ("name", "parameter", "dim"),
    [
        ("per head", "layers.{}.logit_scale", 0),
        ("timm swin", "layers.0.blocks.{}.attn.relative_position_bias_table", 1),
    ],
)
def test_parameters_with_an_entry_per_head_follow_their_heads(name, parameter, dim):
    model, x, _, selector = made(name)
    before = copy.deepcopy(model)
    model.get_parameter(parameter.format(1)).grad = model.get_parameter(parameter.format(1)).detach() * 2
    model.get_parameter(parameter.format(0)).requires_grad_(False)
    pruner = head_pruner(model, x, selector, name)
    pruner.step()
    for i in range(2):
        group_plan = next(
            e for e in head_entries(pruner.plan) if e.name == f"{parameter.format(i).rpartition('.')[0]}.proj"
        )
        expected = before.get_parameter(parameter.format(i)).index_select(dim, torch.tensor(kept_heads(group_plan)[0]))
        assert torch.equal(model.get_parameter(parameter.format(i)), expected)
    assert torch.equal(model.get_parameter(parameter.format(1)).grad, 2 * expected)
    assert not model.get_parameter(parameter.format(0)).requires_grad
    named = {n for n, _ in before.named_parameters() if n.endswith(parameter.rpartition(".")[2])}
    assert set(pruner.plan.ignored_params) == named


@pytest.mark.parametrize(("make", "ignored"), [(timm_swin_v2, ["patch_embed.proj"]), (timm_beit, [])])
def test_attention_whose_projection_is_not_called_is_left_alone_and_listed(make, ignored):
    # timm adds the bias of these by hand, through F.linear and the weights.
    model, x, y = make()
    initialise_parameters(model)
    before = {n: p.shape for n, p in model.named_parameters()}
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    pruner = head_pruner(model, x, selector, ignored_layers=ignored)
    pruner.step()
    assert {n: p.shape for n, p in model.named_parameters()} == before
    reasons = {e.name: e.reason for e in pruner.plan if e.name.endswith(".qkv")}
    assert len(reasons) == len(attention_heads(model))
    assert all("trace did not reach it" in reason for reason in reasons.values())


def test_attention_that_writes_its_width_down_is_refused_and_stays_whole():
    # timm's BEiT reshapes to the width of the model, so a head less does not fit.
    model, x, y = timm_beit(qkv_bias=False)
    initialise_parameters(model)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    before = fingerprint(model)
    with pytest.raises(PruningError, match="no longer runs on example_inputs"):
        head_pruner(model, x, selector).step()
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["fused", "separate", "timm vit", "timm swin", "hf vit", "hf bert"])
@pytest.mark.parametrize("heads_too", [False, True])
def test_the_same_dimensions_of_every_head_go(name, heads_too):
    model, x, _, selector = made(name)
    before, again = copy.deepcopy(model), copy.deepcopy(model)
    ratios = dict.fromkeys(attention_heads(model), 0.5)
    options = {"pruning_ratio_dict": ratios, "prune_num_heads": heads_too, "prune_head_dims": True}
    pruner = head_pruner(model, x, selector, name, **options)
    pruner.step()
    group_plans = [e for e in pruner.plan if e.heads and e.unit == "channel"]
    assert len(group_plans) > 1
    assert len(head_entries(pruner.plan)) == (len(group_plans) if heads_too else 0)
    for group_plan in group_plans:
        (n_heads,) = {after for _, after in group_plan.heads.values()}
        size = group_plan.selection.n_channels // n_heads
        dims = [i for i in group_plan.selection.keep_idxs if i < size]
        assert group_plan.selection.keep_idxs == tuple(h * size + i for h in range(n_heads) for i in dims)
        assert len(dims) == size // 2
        heads = range(4)
        if heads_too:
            heads, _, _ = kept_heads(next(e for e in head_entries(pruner.plan) if e.name == group_plan.name))
        assert len(heads) == n_heads
        channels = [h * size + i for h in heads for i in dims]
        for layer in group_plan.heads:
            weight = before.get_submodule(layer).weight
            rows = [part * 4 * size + c for part in range(len(weight) // (4 * size)) for c in channels]
            assert torch.equal(model.get_submodule(layer).weight, weight[rows])
        assert torch.equal(
            model.get_submodule(group_plan.name).weight, before.get_submodule(group_plan.name).weight[:, channels]
        )
        module = model.get_submodule(next(iter(group_plan.heads)).rpartition(".")[0])
        assert {getattr(module, a) for a in ("head_dim", "attention_head_size") if hasattr(module, a)} <= {size // 2}
    outputs(model, x).sum().backward()
    pruner.plan.apply(again, x[:2])
    assert_same_state(again.state_dict(), model.state_dict())


def test_heads_and_dimensions_are_left_alone_if_neither_is_asked_for():
    model, x, _, selector = made("fused")
    before = fingerprint(model)
    pruner = head_pruner(model, x, selector, prune_num_heads=False)
    pruner.step()
    assert_untouched(model, before)
    assert [e.reason for e in pruner.plan if e.heads] == ["prune_num_heads and prune_head_dims are off"] * 2


def test_torchs_own_attention_loses_the_same_dimensions_of_every_head(tmp_path):
    torchvision = pytest.importorskip("torchvision")

    def adapt(model):
        model.hidden_dim = model.conv_proj.out_channels

    options = {"num_layers": 2, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 16, "num_classes": 4}
    model = torchvision.models.VisionTransformer(image_size=8, patch_size=4, **options)
    initialise(model)
    (x, y), before, again = images(), copy.deepcopy(model), copy.deepcopy(model)
    selector = CoSePSelector(spatial=2).fit(model, [(x, y)], progress=False)
    pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5, adapt=adapt)
    pruner.step()
    group_plan = next(
        e for e in pruner.plan if e.selection and e.selection.n_channels == 24 and "conv_proj" in e.layers
    )
    kept = list(group_plan.selection.keep_idxs)
    assert [sum(h * 6 <= i < h * 6 + 6 for i in kept) for h in range(4)] == [3] * 4
    for was, now in zip(before.encoder.layers, model.encoder.layers, strict=True):
        attention = now.self_attention
        assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (12, 4, 3)
        rows = [24 * part + i for part in range(3) for i in kept]
        assert torch.equal(attention.in_proj_weight, was.self_attention.in_proj_weight[rows][:, kept])
        assert torch.equal(attention.out_proj.weight, was.self_attention.out_proj.weight[kept][:, kept])
    model(x).sum().backward()
    pruner.plan.save(tmp_path / "plan.json")
    PruningPlan.load(tmp_path / "plan.json").apply(again, x[:2], adapt=adapt)
    assert_same_state(again.state_dict(), model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_ratio_of_heads_by_layer():
    model, x, _, selector = made("fused")
    ratios = {model.layers[0].qkv: 0.25, model.layers[1].qkv: 0.75}
    pruner = head_pruner(model, x, selector, head_pruning_ratio=0.0, head_pruning_ratio_dict=ratios)
    pruner.step()
    assert [layer.num_heads for layer in model.layers] == [3, 1]
    assert {e.reason for e in head_entries(pruner.plan)} == {"head_pruning_ratio"}


@pytest.mark.parametrize(("ratio", "left"), [(0.01, 3), (0.3, 2), (0.5, 2), (0.99, 1), (1.0, 1)])
def test_a_ratio_of_heads_is_rounded_up_and_leaves_one(ratio, left):
    model, x, _, selector = made("separate")
    head_pruner(model, x, selector, head_pruning_ratio=ratio).step()
    assert {layer.num_heads for layer in model.layers} == {left}
    assert model(x).shape == (len(x), 4)


def test_the_knee_decides_how_many_heads_stay():
    model, x, y = transformer(n_layers=1, num_heads=9, head_dim=3, fused=True)
    plant_copies(model.layers[0], [h % 3 for h in range(9)])
    selector = ReconstructionSelector(spatial=2, knee="strongest").fit(model, [(x, y)], progress=False)
    pruner = head_pruner(model, x, selector, pruning_ratio=None, head_pruning_ratio=0.0)
    pruner.step()
    (group_plan,) = head_entries(pruner.plan)
    assert group_plan.reason == "heads, knee at 3"
    assert {h % 3 for h in kept_heads(group_plan)[0]} == {0, 1, 2}
    assert model.layers[0].num_heads == 3


@pytest.mark.parametrize("name", ["fused", "separate"])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_iterative_steps_reach_the_heads_asked_for(name, ratio):
    model, x, y, _ = made(name)
    before = copy.deepcopy(model)
    options = {"loader": [(x, y)], "iterative_steps": 2, "fit_options": {"progress": False}}
    pruner = head_pruner(model, x, ReconstructionSelector(spatial=2), head_pruning_ratio=ratio, **options)
    left = []
    for _ in range(2):
        pruner.step()
        left.append({layer.num_heads for layer in model.layers})
    assert left == {0.5: [{3}, {2}], 0.75: [{2}, {1}]}[ratio]
    assert_same_state(pruner.plan.apply(before, x[:2]).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", COMPARABLE)
def test_heads_of_the_whole_model_in_one_space(name):
    model, x, _, selector = made(name)
    selector.scope = "model"
    before = copy.deepcopy(model)
    pruner = head_pruner(model, x, selector, name, head_pruning_ratio=0.5)
    pruner.step()
    left = [max(n for _, n in e.heads.values()) for e in head_entries(pruner.plan)]
    assert sum(left) == 2 * len(left)
    assert min(left) >= 1
    for group_plan in head_entries(pruner.plan):
        assert_only_these_heads_remain(model, before, group_plan)
    with torch.no_grad():
        expected = zeroed_outputs(before, x, head_entries(pruner.plan))
        assert outputs(model, x) == pytest.approx(expected, abs=1e-5)


def test_layers_of_different_resolution_compare_in_a_single_cell():
    model, x, y, _ = made("shrinking")
    selector = ReconstructionSelector(spatial=1, scope="model").fit(model, [(x, y)], progress=False)
    head_pruner(model, x, selector).step()
    assert sum(layer.num_heads for layer in model.layers) == 4


def test_one_space_with_nothing_to_spare_keeps_a_head_in_every_layer():
    model, x, _, selector = made("fused")
    selector.scope = "model"
    head_pruner(model, x, selector, head_pruning_ratio=1.0).step()
    assert [layer.num_heads for layer in model.layers] == [1, 1]


@pytest.mark.parametrize(("scope", "ratio"), [("layer", 0.75), ("model", 0.75), ("model", None)])
def test_no_layer_loses_more_heads_than_it_may(scope, ratio):
    model, x, _, selector = made("fused")
    selector.scope = scope
    options = {"pruning_ratio": None, "head_pruning_ratio": 0.0} if ratio is None else {"head_pruning_ratio": ratio}
    free = copy.deepcopy((model, selector))
    head_pruner(free[0], x, free[1], **options).step()
    assert min(layer.num_heads for layer in free[0].layers) < 3
    head_pruner(model, x, selector, max_pruning_ratio=0.25, **options).step()
    assert min(layer.num_heads for layer in model.layers) == 3


def test_all_heads_stay_without_a_ratio_of_their_own():
    model, x, _, selector = made("fused")
    pruner = head_pruner(model, x, selector, pruning_ratio=0.5, head_pruning_ratio=0.0)
    pruner.step()
    assert [layer.num_heads for layer in model.layers] == [4, 4]
    assert {e.reason for e in head_entries(pruner.plan)} == {"no head_pruning_ratio, so all heads are kept"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grouped-query", "expected as many key-value heads as query heads, got fewer; use scope='layer'"),
        ("shrinking", "measured on the same classes in as many cells, .* of different resolution use spatial=1"),
    ],
)
def test_layers_that_have_no_space_in_common(name, message):
    model, x, y, selector = made(name)
    selector = ReconstructionSelector(spatial=4, scope="model").fit(model, [(x, y)], progress=False)
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        head_pruner(model, x, selector, name).step()
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: {model.layers[0].qkv: 5},
            r"layer 'layers\.0\.qkv': expected num_heads to divide its 72 channels, got 5",
        ),
        (lambda model: {model.layers[0].qkv: 0}, r"layer 'layers\.0\.qkv': expected num_heads to divide .*, got 0"),
        (lambda model: {nn.Linear(4, 4): 2}, "num_heads: expected modules of the model, got a Linear that is not"),
        (lambda model: {copy.deepcopy(model).layers[0].qkv: 4}, "num_heads: expected modules of the model"),
    ],
)
def test_num_heads_that_cannot_be(change, message):
    model, x, _, selector = made("fused")
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        head_pruner(model, x, selector, num_heads=change(model))
    assert_untouched(model, before)


def test_moments_of_heads_that_are_gone():
    model, x, _, selector = made("fused")
    selector = copy.copy(selector)  # a copy keeps no data
    head_pruner(model, x, selector).step()
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"layer 'layers\.\d\.\w+': .*; call fit\(\) again after pruning"):
        head_pruner(model, x, selector).step()
    assert_untouched(model, before)


def attention_group(model, x, i=0):
    numbers = attention_heads(model)
    ignored = [model.get_parameter(n) for n in head_parameters(model, numbers)]
    return attention_groups(trace(model, x[:2], ignored_params=ignored), numbers, ROOT_TYPES)[i], numbers


def head_distances(model, x, y):
    group, numbers = attention_group(model, x)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    return selector.criterion.head_distances([read_group(group, n_heads=heads_of(group, numbers)[0])])


def plant_copies(attention, of):
    """Give head i of a fused attention the weights of head ``of[i]``, but the values' sign, and so its profile."""
    shape = (3, attention.num_heads, attention.head_dim)
    for p in (attention.qkv.weight, attention.qkv.bias):
        p.data.copy_(p.detach().unflatten(0, shape)[:, of].flatten(0, 2))


def test_the_profile_of_a_head_is_the_mean_of_its_dimensions_in_every_projection():
    model, x, y = transformer(n_layers=1, fused=True)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    of_dims = profiles(selector.statistics.moments["layers.0.qkv"]).unflatten(0, (3, 4, 6))
    means = sum(of_dims[:, :, d] for d in range(6)) / 6
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            expected[i, j] = sum((m[i] - m[j]).square().mean() for m in means).sqrt()
    assert head_distances(model, x, y).numpy() == pytest.approx(expected.numpy(), abs=1e-9)


@torch.no_grad()
def test_the_order_of_dimensions_inside_a_head_does_not_matter():
    model, x, y = transformer(n_layers=1, fused=True)
    distances, said = head_distances(model, x, y), model(x)
    attention, generator = model.layers[0], seeded(3)
    # Queries and keys of a head in one order, its values and the columns behind in another.
    orders = torch.stack([torch.argsort(torch.rand(4, 6, generator=generator), 1) for _ in range(2)])[[0, 0, 1]]
    rows = (orders + torch.arange(4)[:, None] * 6 + torch.arange(3)[:, None, None] * 24).flatten()
    for p in (attention.qkv.weight, attention.qkv.bias):
        p.data.copy_(p.data[rows])
    attention.proj.weight.data.copy_(attention.proj.weight.data[:, rows[48:] - 48])
    assert model(x) == pytest.approx(said, abs=1e-5)  # the model computes the same
    assert head_distances(model, x, y) == pytest.approx(distances, abs=1e-6)
    assert distances.max() > 0.01


@torch.no_grad()
def test_fused_and_separate_projections_give_the_same_distances():
    fused, x, y = transformer(n_layers=1, fused=True)
    separate, x, y = transformer(n_layers=1)
    parts = fused.layers[0].qkv.weight.chunk(3), fused.layers[0].qkv.bias.chunk(3)
    for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), *parts, strict=True):
        layer = separate.layers[0].get_submodule(name)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
    separate.layers[0].proj.load_state_dict(fused.layers[0].proj.state_dict())
    separate.head.load_state_dict(fused.head.state_dict())
    separate.embed.load_state_dict(fused.embed.state_dict())
    assert separate(x) == pytest.approx(fused(x), abs=1e-5)
    assert head_distances(separate, x, y) == pytest.approx(head_distances(fused, x, y), abs=1e-6)


@pytest.mark.parametrize("of", [[0, 1, 0, 1], [0, 0, 2, 2], [0, 1, 1, 0]])
def test_one_of_every_pair_of_like_heads_stays(of):
    model, x, y = transformer(n_layers=1, fused=True)
    plant_copies(model.layers[0], of)
    distances = head_distances(model, x, y)
    alike = torch.tensor(of)[:, None] == torch.tensor(of)
    assert torch.equal(distances < 1e-6, alike)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    pruner = head_pruner(model, x, selector)
    pruner.step()
    assert {of[h] for h in kept_heads(head_entries(pruner.plan)[0])[0]} == set(of)


def test_query_heads_that_share_keys_and_values_go_in_equal_numbers():
    model, x, _, selector = made("grouped-query")
    before = copy.deepcopy(model)
    pruner = head_pruner(model, x, selector)
    pruner.step()
    for group_plan in head_entries(pruner.plan):
        assert sorted(h // 2 for h in kept_heads(group_plan)[0]) == [0, 1]
    for layer, was in zip(model.layers, before.layers, strict=True):
        assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (2, 2, 6)
        assert torch.equal(layer.k_proj.weight, was.k_proj.weight)
        assert torch.equal(layer.v_proj.weight, was.v_proj.weight)


@pytest.mark.parametrize("heads_too", [False, True])
def test_dimensions_of_heads_that_share_keys_and_values_go_with_theirs(heads_too):
    model, x, _, selector = made("grouped-query")
    before = copy.deepcopy(model)
    ratios = dict.fromkeys(attention_heads(model), 0.5)
    options = {"pruning_ratio_dict": ratios, "prune_num_heads": heads_too, "prune_head_dims": True}
    pruner = head_pruner(model, x, selector, **options)
    pruner.step()
    heads = {e.name: kept_heads(e)[0] for e in head_entries(pruner.plan)}
    for i, (layer, was) in enumerate(zip(model.layers, before.layers, strict=True)):
        (group_plan,) = [e for e in pruner.plan if e.name == f"layers.{i}.proj" and e.unit == "channel" and e.heads]
        dims = [c for c in group_plan.selection.keep_idxs if c < 6]
        kept = heads.get(group_plan.name, range(4))
        assert len(dims) == 3
        assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (len(kept), 2, 3)
        assert torch.equal(layer.q_proj.weight, was.q_proj.weight[[6 * h + d for h in kept for d in dims]])
        shared = [6 * h + d for h in range(2) for d in dims]
        assert torch.equal(layer.k_proj.weight, was.k_proj.weight[shared])
        assert torch.equal(layer.v_proj.weight, was.v_proj.weight[shared])
    model(x).sum().backward()
    assert_same_state(pruner.plan.apply(before, x[:2]).state_dict(), {**model.state_dict()})


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.5, 0.75])
def test_a_ratio_of_heads_that_share_keys_means_what_it_means_to_the_stock_pruner(ratio):
    model, x, y = transformer(n_layers=1, num_heads=8, kv_heads=2, head_dim=3)
    twin = copy.deepcopy(model)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    head_pruner(model, x, selector, head_pruning_ratio=ratio).step()
    numbers = attention_heads(twin)
    options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio, "num_heads": numbers}
    options |= {"in_channel_groups": {}, "out_channel_groups": {}, "pruning_ratio": 0.1}
    tp.pruner.BasePruner(
        twin, x[:1], tp.importance.MagnitudeImportance(), ignored_layers=[twin.embed, twin.head], **options
    ).step()
    assert model.layers[0].num_heads == numbers[twin.layers[0].q_proj]


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("with_dims", [False, True])
def test_layer_after_layer(scope, with_dims):
    model, x, y, _ = made("separate")
    before = copy.deepcopy(model)
    options = {"loader": [(x, y)], "layerwise": True, "fit_options": {"progress": False}, "prune_head_dims": with_dims}
    ratios = dict.fromkeys(attention_heads(model), 0.5)
    selector = ReconstructionSelector(spatial=2, scope=scope)
    pruner = head_pruner(model, x, selector, pruning_ratio_dict=ratios, **options)
    pruner.step()
    assert [layer.num_heads for layer in model.layers] == [2, 2]
    assert [layer.head_dim for layer in model.layers] == [3 if with_dims else 6] * 2
    assert model(x).shape == (len(x), 4)
    assert_same_state(pruner.plan.apply(before, x[:2]).state_dict(), model.state_dict())


def test_heads_and_dimensions_of_several_steps():
    model, x, y, _ = made("fused")
    before = copy.deepcopy(model)
    options = {"loader": [(x, y)], "iterative_steps": 3, "fit_options": {"progress": False}, "prune_head_dims": True}
    ratios = dict.fromkeys(attention_heads(model), 0.5)
    pruner = head_pruner(model, x, ReconstructionSelector(spatial=2), pruning_ratio_dict=ratios, **options)
    for n_heads, head_dim in ((3, 5), (2, 4), (2, 3)):
        pruner.step()
        assert {(layer.num_heads, layer.head_dim) for layer in model.layers} == {(n_heads, head_dim)}
        assert model(x).shape == (len(x), 4)
    assert_same_state(pruner.plan.apply(before, x[:2]).state_dict(), model.state_dict())


def test_heads_that_a_caller_does_not_prune_stay():
    model, x, _, selector = made("fused")
    pruner = head_pruner(model, x, selector)
    for group in pruner.step(interactive=True):
        if group[0].dep.target.module is model.layers[0].proj:
            group.prune()
    assert [layer.num_heads for layer in model.layers] == [2, 4]
    assert [pruner.num_heads[layer.qkv] for layer in model.layers] == [2, 4]
    assert {e.name: e.reason for e in pruner.plan if e.heads}["layers.1.proj"] == "the caller did not prune it"
    assert model(x).shape == (len(x), 4)


def test_heads_come_back_if_something_fails_later():
    model, x, _, selector = made("per head")
    before = fingerprint(model)

    def fail(_):
        raise RuntimeError("out of time")

    pruner = head_pruner(model, x, selector, fine_tune=fail)
    numbers = dict(pruner.num_heads)
    with pytest.raises(RuntimeError, match="out of time"):
        pruner.step()
    assert_untouched(model, before)
    assert pruner.num_heads == numbers


def test_selecting_heads_changes_nothing():
    model, x, _, selector = made("fused")
    group, numbers = attention_group(model, x)
    before = fingerprint(model)
    first, second = (selector.select_heads([group], numbers, n_keep=3)[0] for _ in range(2))
    assert first == second
    assert (first.n_channels, len(first.keep_idxs), first.k) == (24, 18, 3)
    assert_untouched(model, before)


class Owner(nn.Module):
    pass


def owner(layers, **attributes):
    module = Owner()
    for name, value in attributes.items():
        setattr(module, name, value)
    for name, width in layers.items():
        module.add_module(name, width if isinstance(width, nn.Module) else nn.Linear(5, width))
    return module


@pytest.mark.parametrize(
    ("layers", "attributes", "expected"),
    [
        ({"qkv": 36, "proj": 12}, {"num_heads": 3}, {"qkv": 3}),
        ({"qkv": nn.Conv2d(5, 36, 1)}, {"num_heads": 3}, {"qkv": 3}),
        ({"query": 12, "key": 12, "value": 12}, {"num_attention_heads": 3}, {"query": 3, "key": 3, "value": 3}),
        ({"q_lin": 12, "k_lin": 12, "v_lin": 12}, {"n_heads": 4}, {"q_lin": 4, "k_lin": 4, "v_lin": 4}),
        ({"to_q": 12, "to_kv": 24}, {"heads": 4}, {"to_q": 4, "to_kv": 4}),
        ({"q_proj": 24, "k_proj": 12, "v_proj": 12}, {"head_dim": 6}, {"q_proj": 4, "k_proj": 2, "v_proj": 2}),
        (
            {"q_proj": 24, "k_proj": 12, "v_proj": 12},
            {"num_heads": 4, "head_dim": 6},
            {"q_proj": 4, "k_proj": 2, "v_proj": 2},
        ),
        (
            {"q_proj": 24, "k_proj": 12, "v_proj": 12},
            {"num_heads": 4, "num_key_value_heads": 2},
            {"q_proj": 4, "k_proj": 2, "v_proj": 2},
        ),
        # What is none: no number, a number that does not divide, one that is a truth value, other names.
        ({"qkv": 36}, {}, {}),
        ({"qkv": 36}, {"num_heads": 5}, {}),
        ({"qkv": 36}, {"num_heads": True}, {}),
        ({"fc1": 12, "fc2": 12, "norm": nn.LayerNorm(12)}, {"num_heads": 3}, {}),
        ({"query": nn.Identity(), "key": nn.ReLU()}, {"num_heads": 3}, {}),
    ],
)
def test_attention_heads_are_found_by_name(layers, attributes, expected):
    model = nn.Sequential(nn.Linear(5, 5), owner(layers, **attributes))
    names = {m: name.partition(".")[2] for name, m in model.named_modules()}
    assert {names[m]: n for m, n in attention_heads(model).items()} == expected


def test_torchs_own_attention_is_not_looked_for():
    assert attention_heads(nn.TransformerEncoderLayer(12, 3, 8)) == {}
    # Nor what bears the name of a projection inside of it.
    assert attention_heads(nn.MultiheadAttention(12, 3, kdim=7, vdim=5)) == {}


@pytest.mark.parametrize(
    ("name", "suffixes", "n_layers"),
    [
        ("timm vit", ["attn.qkv"], 2),
        ("timm swin", ["attn.qkv"], 3),
        ("hf bert", ["query", "key", "value"], 2),
        ("hf distilbert", ["q_lin", "k_lin", "v_lin"], 2),
    ],
)
def test_attention_heads_of_known_models(name, suffixes, n_layers):
    model = BUILDERS[name]()[0]
    names = {m: n for n, m in model.named_modules()}
    found = {names[m]: n for m, n in attention_heads(model).items()}
    assert len(found) == n_layers * len(suffixes)
    assert all(n.endswith(tuple(suffixes)) for n in found)
    assert set(found.values()) == {4}


def test_attention_heads_of_llama():
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": WORDS}
    model = transformers.LlamaModel(transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **options))
    names = {m: n.rpartition(".")[2] for n, m in model.named_modules()}
    assert {names[m]: n for m, n in attention_heads(model).items()} == {"q_proj": 4, "k_proj": 2, "v_proj": 2}


def test_parameters_with_an_entry_per_head_are_told_from_others():
    model = nn.Sequential(nn.Linear(4, 4), owner({"qkv": 36}, num_heads=4))
    attention = model[1]
    attention.scale = nn.Parameter(torch.ones(4, 1, 1))
    attention.table = nn.Parameter(torch.ones(9, 4))
    attention.wide = nn.Parameter(torch.ones(4, 9))  # its last dimension counts
    attention.single = nn.Parameter(torch.ones(1))
    attention.norm = nn.LayerNorm(4)  # Torch-Pruning knows it
    attention.inner = owner({}, number=1)
    attention.inner.bias = nn.Parameter(torch.ones(1, 4))
    found = head_parameters(model, {attention.qkv: 4})
    assert found == {"1.scale": 0, "1.table": 1, "1.inner.bias": 1}
    assert head_parameters(model, {attention.qkv: 1}) == {}


def test_only_attributes_that_said_the_old_number_are_changed():
    attributes = {"num_heads": 4, "head_dim": 6, "inner_dim": 24, "heads": 7, "n_rep": 2, "num_kv_heads": 2}
    model = nn.Sequential(owner({"q_proj": 24, "k_proj": 12, "v_proj": 12}, **attributes))
    before = {"0.q_proj": (4, 6), "0.k_proj": (2, 6), "0.v_proj": (2, 6)}
    update_owners(model, before, before | {"0.q_proj": (2, 6)})
    now = {name: getattr(model[0], name) for name in attributes}
    assert now == attributes | {"num_heads": 2, "inner_dim": 12, "n_rep": 1}


@torch.no_grad()
def test_the_attention_written_here_is_attention():
    # The reference of this module against Torch's own.
    model, x, _ = transformer(n_layers=1, fused=True)
    attention = model.layers[0]
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
    assert attention(x) == pytest.approx(attention.proj(expected), abs=1e-5)


def test_attention_groups_are_pruned_before_the_next_is_asked_for():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 4}
    model, (x, y) = timm.create_model("vit_tiny_patch16_224", **options).eval(), images(12, size=32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = CoSePPruner(
            model,
            x[:1],
            ReconstructionSelector(spatial=1).fit(model, [(x, y)], progress=False),
            pruning_ratio=0.5,
            prune_num_heads=True,
            head_pruning_ratio=0.5,
        )
        groups = list(pruner.step(interactive=True))
    weight = model.blocks[0].attn.qkv.weight
    late = next(g for g in groups if g[0].dep.target.module is model.blocks[0].attn.proj)
    with pytest.raises(PruningError, match="was to be pruned before the next one was asked for"):
        late.prune()
    assert model.blocks[0].attn.qkv.weight is weight


def test_what_cannot_be_ranked_or_taken_apart_is_refused():
    model, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(4, 5, 16)
    with pytest.raises(InputError, match="got a MultiheadAttention"):
        CoSePPruner(model, x, ReconstructionSelector(), num_heads={model.self_attn: 4})
    with pytest.raises(InputError, match="compare heads only"):
        CoSePPruner(model, x, AttentionMapSelector(), pruning_ratio=0.5, global_pruning=True)
