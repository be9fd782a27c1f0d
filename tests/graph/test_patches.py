import pytest
import torch
from models import seeded
from torch import nn

from tp_cosep.graph.patches import n_outputs, patches_of
from tp_cosep.utils.sampling import PositionSampler

CONVS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided, dilated": lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, stride=2),
    "grouped, padding by name": lambda: nn.Conv2d(6, 8, (3, 1), padding="same", groups=2),
    "reflected": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", groups=2),
    "even kernel by name": lambda: nn.Conv2d(6, 5, 4, padding="same"),
    "1-d": lambda: nn.Conv1d(6, 8, 5, stride=3),
    "3-d": lambda: nn.Conv3d(6, 4, 3, padding=1),
    "1 × 1": lambda: nn.Conv2d(6, 7, 1, stride=2),
}


def input_of(conv):
    return torch.randn(2, 6, *[7] * len(conv.kernel_size), dtype=torch.float64, generator=seeded())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize("kind", CONVS)
def test_rows_times_maps_are_what_the_layer_computes(kind, per_position):
    conv = CONVS[kind]().double()
    x = input_of(conv)
    expected = conv(x) - conv.bias.view(-1, *[1] * len(conv.kernel_size))
    patches = patches_of(conv, per_position=per_position)
    maps = patches.weight_matrix(conv.weight)
    groups, _, _, n_positions = maps.shape
    rows = patches.sampler(x.shape, 10**9, PositionSampler(x, 0).for_layer("layer"))(
        x
    )  # all there are: [sample, output position, tap]
    rows = rows.reshape(2, -1, n_positions, groups, maps.shape[1])
    outputs = torch.einsum("notgf,gfct->ngco", rows, maps)
    torch.testing.assert_close(outputs.flatten(1), expected.flatten(1))
    assert patches.n_features == groups * maps.shape[1]
    assert patches.n_products(x.shape) == expected[0, 0].numel() * conv.weight.numel()


@pytest.mark.parametrize("repeat", [1, 4])
def test_rows_of_a_linear_layer(repeat):
    linear = nn.Linear(24, 5).double()
    x = torch.randn(3, 2, 24, dtype=torch.float64, generator=seeded())
    patches = patches_of(linear, repeat=repeat)
    rows = patches.sampler(x.shape, 10**9, PositionSampler(x, 0).for_layer("layer"))(x).reshape(3, 2, repeat, -1)
    outputs = torch.einsum("ntpf,fop->nto", rows, patches.weight_matrix(linear.weight)[0])
    torch.testing.assert_close(outputs, linear(x) - linear.bias)
    assert patches.n_products(x.shape) == 2 * 24 * 5


@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize("kind", [*CONVS, "linear", "transposed"])
def test_maps_and_back(kind, per_position):
    layer = {"linear": lambda: nn.Linear(24, 5), "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2)}.get(
        kind, CONVS.get(kind)
    )()
    patches = patches_of(layer, per_position=per_position)
    for weight in (layer.weight, layer.weight.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(patches.weight_from_matrix(patches.weight_matrix(weight), weight), weight)
    assert n_outputs(layer) == {"linear": 5, "transposed": 4}.get(kind, layer.weight.shape[0])


def test_positions_of_a_transposed_convolution_are_those_of_its_input():
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    x = torch.randn(2, 3, 5, 5, generator=seeded())
    rows = patches_of(layer).sampler(x.shape, 10**9, PositionSampler(x, 0).for_layer("layer"))(x)
    assert torch.equal(rows, x.flatten(2).transpose(1, 2).flatten(0, 1))


def test_a_draw_takes_as_many_rows_of_every_sample_and_reads_padding_as_often_as_the_kernel_does():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.ones(50, 1, 3, 3) * torch.arange(1, 51)[:, None, None, None]
    rows = patches_of(conv).sampler(x.shape, 40, PositionSampler(x, 0).for_layer("layer"))(x).reshape(50, 40)
    assert all(set(row.tolist()) <= {0.0, i + 1.0} for i, row in enumerate(rows))
    # A 3 × 3 kernel on a 3 × 3 map reads (2 + 3 + 2)² = 49 of its 81 values inside.
    assert abs(float((rows > 0).float().mean()) - 49 / 81) < 0.03


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(6), nn.LSTM(3, 4)])
def test_layers_that_are_not_refitted(layer):
    assert patches_of(layer) is None
