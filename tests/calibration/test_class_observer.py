from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import Lambda, assert_untouched, build, fingerprint, initialise, seeded, vectors
from torch import nn
from two_pass import assert_two_pass, collect_moments

from tp_cosep.errors import InputError
from tp_cosep.utils.data import run_model


def collect(model, loader, **options):
    return collect_moments(model, loader, **{"progress": False, **options})


def captured(model, batches):
    """Outputs of all conv and linear layers over all batches, copied the moment they are made: [samples, C, ...]."""
    outputs = {}

    def save(name, is_linear):
        def hook(module, args, output):
            x = output.detach().double().numpy().copy()
            outputs.setdefault(name, []).append(np.moveaxis(x, -1, 1) if is_linear else x)

        return hook

    handles = [
        m.register_forward_hook(save(name, isinstance(m, nn.Linear)))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__.startswith("Conv")
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(x) for name, x in outputs.items()}


def assert_all_two_pass(model, batches, spatial, **tolerance):
    moments = collect(model, batches, spatial=spatial)
    expected = captured(model, batches)
    y = torch.cat([y for _, y in batches])
    assert list(moments) == list(expected)
    for name, x in expected.items():
        assert_two_pass(moments[name], x, y, spatial, **tolerance)
    return moments


def conv_net(dim, transposed=False):
    conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dim}d")
    layers = [conv(2, 5, 3), nn.ReLU(), conv(5, 6, 3, padding=1), nn.Flatten(), nn.LazyLinear(4)]
    model = nn.Sequential(*layers)
    model(torch.zeros(1, 2, *[7] * dim))
    return initialise(model.double())


@pytest.mark.parametrize("spatial", [1, 3, 4, 100, None])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_moments_of_convolutions(dim, transposed, spatial):
    model = conv_net(dim, transposed)
    x, y = vectors(24, n_classes=3, shape=(2, *range(7, 7 + dim)))
    x = torch.nn.functional.pad(x, [p for d in reversed(range(dim)) for p in (0, -d)]).double()
    assert_all_two_pass(model, [(x[:10], y[:10]), (x[10:], y[10:])], spatial)


@pytest.mark.parametrize("spatial", [1, 4, None])
@pytest.mark.parametrize("shape", [(6,), (9, 6), (5, 3, 6)], ids=str)
def test_moments_of_linear_layers_on_tokens(shape, spatial):
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7), nn.Flatten(), nn.LazyLinear(3)).double()
    model(torch.zeros(1, *shape).double())
    x, y = vectors(20, n_classes=3, shape=shape)
    moments = assert_all_two_pass(initialise(model), [(x.double(), y)], spatial)
    assert [m.n_components for m in moments.values()] == [10, 7, 3]


@pytest.mark.parametrize("spatial", [4, None])
@pytest.mark.parametrize("kind", ["vgg", "resnet", "mlp"])
def test_what_runs_after_a_layer_does_not_change_its_moments(kind, spatial):
    # vgg has in-place activations behind a convolution and a linear layer.
    model, x, y = build(kind, 10)
    assert_all_two_pass(model.double(), [(x.double(), y)], spatial)


def test_an_in_place_operation_behind_a_linear_layer_does_not_change_its_moments():
    model = initialise(nn.Sequential(nn.Linear(20, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double())
    x, y = vectors()
    assert_all_two_pass(model, [(x.double(), y)], 4)


def test_a_layer_that_runs_twice_is_measured_on_all_its_outputs():
    layer = nn.Linear(5, 5).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x, y = vectors(30, n_classes=3, shape=(5,))
    x = x.double()
    with torch.no_grad():
        both = torch.cat([layer(x), model(x)]).numpy()
    assert_two_pass(collect(model, [(x, y)])["0"], both, y.repeat(2), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_take_float32_inputs(dtype):
    model, x, y = build("vgg", 10)
    model = model.to(dtype)
    before = fingerprint(model)
    moments = collect(model, [(x, y)])
    for name, expected in captured(model, [(x.to(dtype), y)]).items():
        assert_two_pass(moments[name], expected, y, 4, rtol=1e-5)
    assert_untouched(model, before)


@pytest.mark.parametrize("sizes", [1, 7, [1, 38, 1]], ids=str)
@pytest.mark.parametrize("kind", ["vgg", "mlp"])
def test_neither_the_split_nor_the_order_of_batches_matters(kind, sizes):
    model, x, y = build(kind, 12)
    model, x = model.double(), x.double()
    whole = collect(model, [(x, y)])
    order = torch.randperm(len(x), generator=seeded())
    split = collect(model, list(zip(x[order].split(sizes), y[order].split(sizes), strict=True)))
    for name, moments in whole.items():
        assert split[name].classes.tolist() == moments.classes.tolist()
        torch.testing.assert_close(split[name].mean, moments.mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(split[name].m2, moments.m2, rtol=1e-9, atol=1e-9)


def test_an_empty_batch_changes_nothing():
    model, x, y = build("mlp", 10)
    expected = collect(model, [(x, y)])
    for loader in ([(x[:0], y[:0]), (x, y)], [(x, y), (x[:0], y[:0])]):
        for spatial in (4, "auto"):
            moments = collect(model, loader, spatial=spatial)
            assert torch.equal(moments["fc2"].mean, expected["fc2"].mean)


def test_a_generator_is_read_once_also_with_auto():
    model, x, y = build("vgg", 10)
    expected = collect(model, [(x, y)], spatial=4)
    for spatial in (4, "auto"):
        batches = ((x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8))
        moments = collect(model, batches, spatial=spatial)
        assert moments["conv1"].count.tolist() == [10] * 4
        torch.testing.assert_close(moments["conv1"].mean, expected["conv1"].mean)
        assert list(batches) == []


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(20, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x, scale, shift=None):
        x = self.fc(x) * scale
        return self.head(x if shift is None else x + shift["by"])


@pytest.mark.parametrize("container", [tuple, list])
def test_inputs_as_arguments_and_as_keywords(container):
    model, (x, y) = TwoInputs(), vectors()
    scale, shift = torch.rand(len(x), 1, generator=seeded(1)), {"by": torch.ones(len(x), 1)}
    given = [container([x, scale, shift]), {"x": x, "scale": scale, "shift": shift}, UserDict(x=x, scale=scale)]
    by_position, by_name, without_shift = (collect(model, [(inputs, y)]) for inputs in given)
    with torch.no_grad():
        expected = model(x, scale, shift).numpy()
    for moments in (by_position, by_name):
        assert_two_pass(moments["head"], expected, y, 4, rtol=1e-5)
    assert not torch.allclose(without_shift["head"].mean, by_name["head"].mean)
    assert torch.equal(run_model(model, given[1]), model(x, scale, shift))


def test_integer_inputs_stay_integers_and_other_arguments_pass_through():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 5)
            self.fc = nn.Linear(5, 3)

        def forward(self, ids, flag):
            assert flag == "mean"
            return self.fc(self.embedding(ids).mean(1))

    ids = torch.randint(9, (20, 6), generator=seeded())
    moments = collect(Text().to(torch.bfloat16), [((ids, "mean"), torch.arange(20) % 2)])
    assert moments["fc"].count.tolist() == [10, 10]


@pytest.mark.parametrize("form", ["uint8", "int8", "int16", "int32", "int64", "column", "list", "numpy"])
def test_labels_of_any_integer_type(form):
    model, x, y = build("mlp", 10)
    forms = {"column": y[:, None], "list": y.tolist(), "numpy": y.numpy().astype("int16")}
    labels = forms[form] if form in forms else y.to(getattr(torch, form))
    moments, expected = collect(model, [(x, labels)]), collect(model, [(x, y)])
    assert moments["fc1"].classes.tolist() == [0, 1, 2, 3]
    assert torch.equal(moments["fc1"].mean, expected["fc1"].mean)


def test_labels_need_not_be_contiguous():
    model, x, y = build("mlp", 10)
    assert collect(model, [(x, y * 1000 + 7)])["fc1"].classes.tolist() == [7, 1007, 2007, 3007]


def test_target_fn_reads_any_other_batch():
    model, x, y = build("mlp", 10)
    one_hot = torch.nn.functional.one_hot(y)
    loader = [{"image": x, "meta": one_hot}]
    moments = collect(model, loader, target_fn=lambda batch: (batch["image"], batch["meta"].argmax(1)))
    assert torch.equal(moments["fc1"].mean, collect(model, [(x, y)])["fc1"].mean)


def wrap_output(form):
    return Lambda(
        {
            "tensor": lambda z: z,
            "tuple": lambda z: (z, z.mean()),
            "dict": lambda z: {"logits": z, "loss": z.mean()},
            "object": lambda z: SimpleNamespace(logits=z),
        }[form]
    )


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "object"])
def test_predicted_labels_are_the_arg_max_of_the_output(form):
    model, x, y = build("mlp", 10, seed=4)
    with torch.no_grad():
        predicted = model(x).argmax(1)
    assert predicted.unique().tolist() == [0, 2, 3]
    expected = collect(model, [(x, predicted)], rare_classes="error")
    wrapped = nn.Sequential(model, wrap_output(form))
    for batch in ((x, y), x, [x, None]):
        moments = collect(wrapped, [batch], labels="predicted")
        assert torch.equal(moments["0.fc2"].mean, expected["fc2"].mean)
        assert moments["0.fc2"].count.tolist() == expected["fc2"].count.tolist()


def test_rare_classes_can_be_left_out():
    model, x, y = build("mlp", 10)
    model, x, y = model.double(), x.double(), y.clone()
    y[3], y[17] = 50, 60
    others = torch.tensor([i for i in range(40) if i not in (3, 17)])
    with pytest.warns(UserWarning, match="left out class 50, 60, seen only once"):
        moments = collect(model, [(x, y)], rare_classes="drop")
    expected = collect(model, [(x[others], y[others])])
    for name, m in expected.items():
        assert moments[name].classes.tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(moments[name].mean, m.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments[name].m2, m.m2, rtol=1e-9, atol=1e-9)


def cells_of(shape, spatial):
    return int(np.prod([min(spatial, n) for n in shape], dtype=int))


@pytest.mark.parametrize("n_classes", [None, 9])
@pytest.mark.parametrize("largest", range(1, 9))
def test_auto_takes_the_largest_map_that_fits(largest, n_classes):
    model, x, y = build("vgg", 10)
    # [components, map] of each layer at 8 × 8 inputs, by hand.
    layers = [(10, (8, 8)), (10, (8, 8)), (10, (4, 4)), (10, ()), (4, ())]
    budgets = [16 * (n_classes or 4) * sum(c * cells_of(shape, s) for c, shape in layers) for s in range(1, 10)]
    for budget in (budgets[largest - 1], budgets[largest] - 1 if largest < 8 else 10**9):
        moments = collect(model, [(x, y)], spatial="auto", memory_budget=budget, n_classes=n_classes)
        assert moments["conv1"].n_cells == min(largest, 4) ** 2
        assert moments["conv3"].n_cells == min(largest, 4) ** 2
        if n_classes is None:
            assert sum(m.mean.nbytes + m.m2.nbytes for m in moments.values()) <= budget


def test_auto_counts_labels_beyond_the_width_of_the_output():
    model, x, y = build("mlp", 10)
    with pytest.raises(InputError, match=r"moments of 4 classes need 2,240 bytes .*; the memory_budget is 2,239"):
        collect(model, [(x, y)], spatial="auto", memory_budget=16 * 4 * (10 + 11 + 10 + 4) - 1)
    with pytest.raises(InputError, match="moments of 101 classes"):
        collect(model, [(x, y.clamp(min=2) * 50 - 50)], spatial="auto", memory_budget=10)
