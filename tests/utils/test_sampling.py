import pytest
import torch
from models import build, seeded
from scipy.stats import chisquare

from tp_cosep import Compensator, ReconstructionSelector
from tp_cosep.utils.sampling import PositionSampler, _mixed

_MASK = 2**64 - 1


def splitmix(z):
    """SplitMix64's finaliser on Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_bits_are_mixed_as_splitmix_does():
    values = [0, 1, -1, 2**62, -(2**63), 123456789]
    assert [x & _MASK for x in _mixed(torch.tensor(values)).tolist()] == [splitmix(x & _MASK) for x in values]


@pytest.mark.parametrize("n_positions", [17, 1000])
def test_positions_are_uniform(n_positions):
    x = torch.randn(2000, 3, 5, 5, generator=seeded())
    positions = PositionSampler(x, 0).for_layer("layer")(2000, 16, n_positions)
    assert positions.shape == (2000, 16)
    assert chisquare(torch.bincount(positions.flatten(), minlength=n_positions).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(positions[:, 0], minlength=n_positions).numpy()).pvalue > 1e-3
    # Neighbours are independent.
    pairs = torch.bincount((positions[:, 0] * n_positions + positions[:, 1]) % 101, minlength=101)
    assert chisquare(pairs.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_positions_depend_on_the_sample_alone(dtype):
    x = (torch.randn(12, 4, 1500, generator=seeded()) * 50).abs().to(dtype)
    whole = PositionSampler(x, 3).for_layer("a")(12, 5, 997)
    order = torch.randperm(12, generator=seeded())
    assert torch.equal(PositionSampler((x[order], x), 3).for_layer("a")(12, 5, 997), whole[order])
    assert torch.equal(PositionSampler({"x": x[4:7]}, 3).for_layer("a")(3, 5, 997), whole[4:7])
    others = PositionSampler(x, 3).for_layer("b")(12, 5, 997), PositionSampler(x, 4).for_layer("a")(12, 5, 997)
    assert all(float((other == whole).float().mean()) < 0.1 for other in others)
    if dtype != torch.bool:
        assert float((whole[0] == whole[1]).float().mean()) < 0.5


def test_parts_of_samples_have_positions_of_their_own():
    x = torch.randn(3, 8, generator=seeded())
    parts = PositionSampler(x, 0).for_layer("a")(12, 4, 10**6)
    assert len(parts.flatten().unique()) == 48
    assert torch.equal(PositionSampler(x[1:2], 0).for_layer("a")(4, 4, 10**6), parts[4:8])


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_second_moments_do_not_depend_on_batches(kind):
    model, x, y = build(kind, 12)
    order = torch.randperm(len(x), generator=seeded())
    whole = ReconstructionSelector().fit(model, [(x, y)], progress=False)
    split = ReconstructionSelector().fit(
        model, list(zip(x[order].split(7), y[order].split(7), strict=True)), progress=False
    )
    assert list(whole.statistics.inputs) == list(split.statistics.inputs)
    for name, m in whole.statistics.inputs.items():
        torch.testing.assert_close(split.statistics.inputs[name].second.folds, m.second.folds, rtol=1e-6, atol=1e-6)
    sums = [
        [r.moments.folds.sum(0) for r in Compensator(model, x[:1]).fit(batches, progress=False)._consumers.values()]
        for batches in ([x], x[order].split(7))
    ]
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
