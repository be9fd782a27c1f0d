"""An encoder and decoder names the digit of every pixel; a ``target_fn`` makes classes of masks for CoSeP."""

from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d, relu

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import load_digits


class UNet(nn.Module):
    """Two scales, the coarse one enlarged and read together with the fine one."""

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
    """For ``target_fn=``: a mask ``[height, width]`` has one kind of foreground, and that is its image's class."""
    return batch[0], batch[1].flatten(1).amax(1) - 1


def main(epochs: int = 10) -> dict[str, tuple[float, float]]:
    """Train, prune, fine-tune and print; MACs and the share of foreground that is named rightly by stage."""
    torch.manual_seed(0)
    data, model, results = load_digits(0, Path()), UNet(), {}
    # Background is 0, the ink of a digit 1 + the digit.
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
        print("{:16} {:10,.0f} MACs, {:.1%} of the ink named rightly".format(stage, *results[stage]))

    train_and_report("trained", epochs, 3e-3)
    # Measuring and repair both read the loader's batches.
    options = {"loader": loader, "compensate": True, "fit_options": {"target_fn": image_and_class}}
    CoSePPruner(model, data.train_images[:1], ReconstructionSelector(), target={"macs": 0.3}, **options).step()
    train_and_report("pruned, repaired", 0, 1e-3)
    train_and_report("fine-tuned", 2, 1e-3)
    return results


if __name__ == "__main__":
    main()
