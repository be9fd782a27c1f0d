"""Prune an encoder-decoder that segments digits; a ``target_fn`` derives class labels from masks."""

from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d, relu

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import load_digits


class UNet(nn.Module):
    """Two scales: coarse features are upsampled and concatenated with fine ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.decoder, self.head = nn.Conv2d(96, 64, 3, padding=1), nn.Conv2d(64, 11, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, 11, height, width]`` of images ``[n, 1, height, width]``."""
        fine = relu(self.fine(x))
        coarse = interpolate(relu(self.coarse(max_pool2d(fine, 2))), scale_factor=2)
        return self.head(relu(self.decoder(torch.cat([fine, coarse], 1))))


def image_and_class(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A ``target_fn``: the foreground of a mask ``[height, width]`` is of one class, that of its image."""
    return batch[0], batch[1].flatten(1).amax(1) - 1


def main(epochs: int = 10) -> dict[str, tuple[float, float]]:
    """Train, prune and fine-tune; returns MACs and pixel accuracy on the foreground by stage."""
    torch.manual_seed(0)
    data, model, results = load_digits(0, Path()), UNet(), {}
    # 0 is background, 1 + digit the foreground.
    masks = torch.where(data.train_images[:, 0] > 0, 1 + data.train_labels[:, None, None], 0)
    test_masks = torch.where(data.test_images[:, 0] > 0, 1 + data.test_labels[:, None, None], 0)
    loader = list(zip(data.train_images.split(50), masks.split(50), strict=True))

    def train_and_report(stage: str, n_epochs: int, rate: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), rate)
        for images, target in loader * n_epochs:
            optimizer.zero_grad()
            cross_entropy(model(images), target).backward()
            optimizer.step()
        is_right = (model(data.test_images).argmax(1) == test_masks)[test_masks > 0]
        results[stage] = tp.utils.count_ops_and_params(model, data.test_images[:1])[0], float(is_right.float().mean())
        print("{:16} {:10,.0f} MACs, pixel accuracy {:.1%}".format(stage, *results[stage]))

    train_and_report("trained", epochs, 3e-3)
    # Statistics and compensation both read the loader with target_fn.
    options = {"loader": loader, "compensate": True, "fit_options": {"target_fn": image_and_class}}
    CoSePPruner(model, data.train_images[:1], ReconstructionSelector(), target={"macs": 0.3}, **options).step()
    train_and_report("pruned, compensated", 0, 1e-3)
    train_and_report("fine-tuned", 2, 1e-3)
    return results


if __name__ == "__main__":
    main()
