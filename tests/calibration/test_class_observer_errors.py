import pytest
import torch
from models import Lambda, assert_untouched, build, fingerprint, images
from torch import nn
from two_pass import collect_moments

from tp_cosep.errors import InputError


def collect(model, loader, **options):
    return collect_moments(model, loader, **{"progress": False, **options})


def assert_refused(message, model, loader, **options):
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        collect(model, loader, **options)
    assert_untouched(model, before)


class Mixed(nn.Module):
    """Submodules in different modes, dropout and BatchNorm whose buffers move in train mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)
        self.train()
        self.bn.eval()
        self.fc.eval()

    def forward(self, x):
        if x.shape[-1] == 5:
            raise RuntimeError("too small")
        return self.fc(self.drop(self.bn(self.conv(x)).mean((2, 3))))


@pytest.fixture
def mixed():
    model = Mixed()
    x, y = images(20)
    model(x).sum().backward()
    model.conv.register_forward_hook(lambda module, args, output: output + 1)
    return model, x, y, fingerprint(model)


def failing(*batches):
    yield from batches
    raise OSError("disk")


def test_the_model_is_left_as_it_was(mixed):
    model, x, y, before = mixed
    with torch.enable_grad():
        moments = collect(model, [(x, y)], spatial="auto")
        assert torch.is_grad_enabled()
    assert_untouched(model, before)
    # In eval mode: twice the same, whatever dropout and batch statistics would do.
    again = collect(model, [(x[:7], y[:7]), (x[7:], y[7:])], spatial="auto")
    torch.testing.assert_close(again["fc"].mean, moments["fc"].mean, rtol=1e-5, atol=1e-5)
    assert_untouched(model, before)


@pytest.mark.parametrize("spatial", [4, "auto"])
@pytest.mark.parametrize(
    ("cause", "error"),
    [("model", RuntimeError), ("loader", OSError), ("target_fn", KeyError), ("stop", KeyboardInterrupt)],
)
def test_the_model_is_left_as_it_was_after_an_exception(mixed, cause, error, spatial):
    model, x, y, before = mixed
    loader, target_fn = {
        "model": ([(x, y), (x[..., :5], y)], None),
        "loader": (failing((x, y)), None),
        "target_fn": ([(x, y)], lambda batch: {}["nothing"]),
        "stop": ([(x, y)], lambda batch: (_ for _ in ()).throw(KeyboardInterrupt)),
    }[cause]
    with pytest.raises(error):
        collect(model, loader, target_fn=target_fn, spatial=spatial)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_must_be_finite(value):
    model, x, y = build("vgg", 10)
    model.conv2.bias.data[1] = value
    assert_refused("layer 'conv2': got NaN or infinite activations", model, [(x, y)])
    x[3, 0, 0, 0] = value
    assert_refused("layer 'conv1': got NaN or infinite activations", model, [(x, y)])


BAD_LABELS = [
    (lambda y: y.float(), "batch 1: expected integer labels, got torch.float32"),
    (lambda y: y > 1, "batch 1: expected integer labels, got torch.bool"),
    (lambda y: y.to(torch.complex64), "batch 1: expected integer labels, got torch.complex64"),
    (lambda y: y - 1, "batch 1: expected labels ≥ 0, got -1"),
    (lambda y: y[:, None].repeat(1, 2), r"batch 1: expected one label per sample, .* got shape \(40, 2\)"),
    (lambda y: y[0], r"batch 1: expected one label per sample, .* got shape \(\)"),
    (lambda y: y[:-1], "batch 1: expected one label per sample, got 39 labels where the layers' outputs have 40"),
    (
        lambda y: torch.cat([y, y]),
        "batch 1: expected one label per sample, got 80 labels where the layers' outputs have 40",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_LABELS)
def test_bad_labels(spoil, message):
    model, x, y = build("mlp", 10)
    assert_refused(message, model, [(x, y), (x, spoil(y))])


@pytest.mark.parametrize("spatial", [4, "auto"])
@pytest.mark.parametrize("loader", [[], (), iter([])], ids=["list", "tuple", "generator"])
def test_an_empty_loader(loader, spatial):
    model = build("mlp", 10)[0]
    assert_refused("fit: expected at least one batch, the loader gave none", model, loader, spatial=spatial)


def test_a_used_up_generator():
    model, x, y = build("mlp", 10)
    loader = iter([(x, y)])
    collect(model, loader)
    assert_refused("a generator can be read only once", model, loader)


@pytest.mark.parametrize(
    ("as_batch", "came"),
    [
        (lambda x, y: x, "a Tensor"),
        (lambda x, y: (x, y, y), "a tuple of 3"),
        (lambda x, y: [x], "a list of 1"),
        (lambda x, y: {"x": x, "y": y}, "a dict"),
        (lambda x, y: None, "None"),
    ],
)
def test_a_batch_that_is_no_pair(as_batch, came):
    model, x, y = build("mlp", 10)
    message = rf"batch 1: expected a pair \(inputs, labels\), got {came}; pass target_fn="
    assert_refused(message, model, [(x, y), as_batch(x, y)])
    batches = [(x, y), as_batch(x, y)]
    assert_refused(message, model, [0, 1], target_fn=lambda i: batches[i])


def test_target_fn_must_return_a_pair_also_when_labels_are_predicted():
    model, x, y = build("mlp", 10)
    for labels in ("given", "predicted"):
        message = r"batch 0: expected a pair \(inputs, labels\), got a Tensor"
        assert_refused(message, model, [(x, y)], target_fn=lambda batch: batch[0], labels=labels)


def test_fewer_than_two_classes():
    model, x, y = build("mlp", 10)
    assert_refused(
        r"samples of at least two classes, got 1 \(class 3\), 0 of them", model, [(x, torch.full_like(y, 3))]
    )
    with_rare = torch.full_like(y, 3)
    with_rare[5] = 8
    message = r"samples of at least two classes, got 2 \(class 3, 8\), 1 of them with a single sample"
    assert_refused(message, model, [(x, with_rare)], rare_classes="drop")


def test_a_class_with_one_sample_is_named():
    model, x, y = build("mlp", 10)
    y = y.clone()
    y[5] = 77
    assert_refused("at least two samples of every class, got one of class 77; .*rare_classes='drop'", model, [(x, y)])
    y[:15] = torch.arange(100, 115)
    assert_refused("got one of class 100, 101, .*, 109 and 5 more;", model, [(x, y)])


def test_one_sample_in_each_of_two_batches_is_enough():
    model, x, y = build("mlp", 10)
    y = y.clone()
    y[5] = y[25] = 77
    assert 77 in collect(model, [(x[:20], y[:20]), (x[20:], y[20:])])["fc1"].classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial": 0}, "expected spatial to be an integer ≥ 1, None or 'auto', got 0"),
        ({"spatial": True}, "expected spatial .* got True"),
        ({"spatial": 2.0}, r"expected spatial .* got 2\.0"),
        ({"spatial": "all"}, "expected spatial .* got 'all'"),
        ({"labels": "guessed"}, r"expected labels of \['given', 'predicted'\], got 'guessed'"),
        ({"rare_classes": "keep"}, r"expected rare_classes of \['error', 'drop'\], got 'keep'"),
    ],
)
def test_unknown_options(options, message):
    model, x, y = build("mlp", 10)
    assert_refused(f"fit: {message}", model, [(x, y)], **options)


def test_a_model_without_layers_to_measure():
    assert_refused("found nothing to measure", nn.BatchNorm1d(20), [(torch.zeros(4, 20), [0, 0, 1, 1])])


def test_inputs_of_different_sizes_need_pooling():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    (small, y), (large, _) = images(size=6), images(size=9)
    message = "layer '0': .* different layouts: n_classes=4, n_components=5, n_cells=16 and .*n_cells=49;.*set spatial="
    assert_refused(message, model, [(small, y), (large, y)], spatial=None)
    assert collect(model, [(small, y), (large, y)], spatial=4)["0"].count.tolist() == [20] * 4


def test_a_layer_whose_outputs_cannot_be_told_apart_by_sample():
    shuffled = Lambda(lambda x: x.flatten(0, 1)[(torch.arange(3 * len(x)) * 2 + 1) % (3 * len(x))])
    model = nn.Sequential(nn.Linear(6, 5), shuffled, nn.Linear(5, 4)).eval()
    x, y = torch.randn(10, 3, 6), torch.arange(10) % 2
    with pytest.warns(UserWarning, match="cannot measure 2: what in the outputs of these layers belongs to which"):
        moments = collect_moments(model, [(x, y), (x + 1, y)], progress=False)
    assert moments["2"].is_empty
    assert torch.equal(moments["0"].count, torch.tensor([10, 10]))


@pytest.mark.parametrize("output", [lambda z: z[0], lambda z: z[:, None], lambda z: {"loss": z}, lambda z: "text"])
def test_labels_can_be_predicted_only_from_logits(output):
    model, x, _ = build("mlp", 10)
    wrapped = nn.Sequential(model, Lambda(output))
    message = r"batch 0: labels='predicted': model: expected scores of shape \[samples, classes\], got"
    assert_refused(message, wrapped, [x], labels="predicted")
