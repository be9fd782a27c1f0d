"""Repair on architectures of timm and of torch: outputs come nearer to the original's, and nothing breaks."""

import copy

import pytest
import timm
import torch
from torch import nn

from tp_cosep import CoSePPruner, ReconstructionSelector

pytestmark = pytest.mark.slow


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


def image_model(name, **options):
    return timm.create_model(name, num_classes=4, **options), torch.randn(32, 3, 32, 32)


MODELS = {
    "torch encoder": lambda: (Encoder(), torch.randn(64, 7, 12)),
    "ViT": lambda: image_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "ConvNeXt": lambda: image_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)),
    "DenseNet": lambda: image_model("densenet121", growth_rate=4, block_config=(2, 2, 2)),
    "MobileNetV3": lambda: image_model("mobilenetv3_small_050"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected", "ignore:Compensator. few samples")
@pytest.mark.parametrize("name", MODELS)
def test_repaired_outputs_are_nearer(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    y = torch.arange(len(x)) % 4
    expected = model(x).detach()
    errors = {}
    for mode in (False, "sequential"):
        pruned = copy.deepcopy(model)
        selector = ReconstructionSelector().fit(pruned, [(x, y)], progress=False)
        pruner = CoSePPruner(
            pruned,
            x[:2],
            selector,
            pruning_ratio=0.3,
            loader=[(x, y)],
            compensate=mode,
            fit_options={"progress": False},
        )
        pruner.step()
        errors[mode] = float((pruned(x) - expected).detach().square().mean())
        assert all(bool(torch.isfinite(p).all()) for p in pruned.parameters())
        assert any(group_plan.selection and group_plan.selection.prune_idxs for group_plan in pruner.plan)
    assert errors["sequential"] < 0.8 * errors[False]
    assert any(refit.error is not None for refit in pruner.compensator.refits)
