"""How often a fit runs the model."""

import pytest
from models import build

from tp_cosep import CoSePSelector, ReconstructionSelector


@pytest.mark.parametrize(
    "make", [CoSePSelector, ReconstructionSelector, lambda: CoSePSelector(spatial="auto")], ids=["cosep", "rec", "auto"]
)
def test_a_fit_runs_the_model_twice_before_its_pass(make):
    """On three and on two samples, for batch dimensions, shapes and memory together; Torch-Pruning's trace apart."""
    model, x, y = build("resnet", 10)
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    make().fit(model, [(x[:16], y[:16]), (x[16:], y[16:])], progress=False)
    handle.remove()
    assert sizes[-4:] == [3, 2, 16, len(x) - 16]
    # What comes before is the trace, on two samples.
    assert set(sizes[:-4]) == {2}
    assert len(sizes) == 5
