"""Prune half of the attention heads of a small vision transformer, selected in three ways."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tp_cosep import AttentionMapSelector, CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import accuracy, load_digits, train


class Attention(nn.Module):
    """Attention under the names of timm, by which tp_cosep finds the heads and updates their number."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over tokens ``[n, tokens, width]``."""
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionTransformer(nn.Module):
    """One token per patch of an 8 × 8 image, three layers of eight heads."""

    def __init__(self, width: int = 64, n_layers: int = 3, n_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.attention = nn.ModuleList(Attention(width, 8) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_layers))
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[n, 1, 8, 8]``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for attention, norm in zip(self.attention, self.norms, strict=True):
            x = x + attention(norm(x))
        return self.head(x.mean(1))


def main(epochs: int = 12) -> dict[str, tuple[list[int], float]]:
    """Train, prune and fine-tune; returns kept heads of every layer and accuracy by selection."""
    images = load_digits(0, Path())
    torch.manual_seed(0)
    net = VisionTransformer()
    train(net, images, epochs=epochs, rate=0.05, seed=0)
    print(f"trained: accuracy {accuracy(net, images):.1%}")
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    selectors = {
        "per layer": ReconstructionSelector(),
        "over the model": ReconstructionSelector(scope="model"),
        "by attention maps": AttentionMapSelector(),
    }
    results = {}
    for way, selector in selectors.items():
        model = copy.deepcopy(net)
        selector.fit(model, calibration)
        options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
        CoSePPruner(
            model,
            images.train_images[:1],
            selector,
            ignored_layers=["patches"],  # keeps the residual stream
            unwrapped_parameters=[(model.position, 2)],
            **options,
        ).step()
        train(model, images, epochs=max(1, epochs // 6), rate=0.02, seed=1)
        heads = [layer.num_heads for layer in model.attention]
        results[way] = heads, accuracy(model, images)
        print(f"{way:18} heads {heads}, accuracy {results[way][1]:.1%}")
    return results


if __name__ == "__main__":
    main()
