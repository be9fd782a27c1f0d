"""A Lightning callback that prunes during training, and updates the parameters of the optimizer."""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import DemoNet, accuracy, load_digits


class Prune(lightning.Callback):
    """Prune the module's ``net`` when an epoch starts. For a single device: DDP would keep the old parameters."""

    def __init__(self, epoch: int, example_inputs: Tensor, **options: Any) -> None:
        self.epoch, self.example_inputs, self.options = epoch, example_inputs, options

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Prune; optimizer and schedule continue with the new parameters."""
        if trainer.current_epoch != self.epoch:
            return
        names, optimizer = {p: name for name, p in module.named_parameters()}, trainer.optimizers[0]
        options = {"loader": trainer.train_dataloader, "compensate": True, "recalibrate": True, **self.options}
        CoSePPruner(module.net, self.example_inputs, ReconstructionSelector(), **options).step()
        new = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [new[names[p]] for p in group["params"]]
        group["params"] += [new[name] for name in new.keys() - names.values()]  # biases that compensation added
        # A pruned parameter is a new object and starts without state: the old one's momentum is of other channels. An
        # unchanged parameter is the same object and keeps its state.
        for removed in optimizer.state.keys() - new.values():
            del optimizer.state[removed]
        print(f"epoch {self.epoch}: {sum(p.numel() for p in new.values()):,} parameters left")


class Classifier(lightning.LightningModule):
    """The demo's network, trained as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DemoNet()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy of a batch."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


def main(epochs: int = 6) -> tuple[lightning.Trainer, float]:
    """Train, prune halfway and continue; returns the trainer and accuracy."""
    lightning.seed_everything(0, verbose=False)
    images, module = load_digits(0, Path()), Classifier()
    loader = DataLoader(TensorDataset(images.train_images, images.train_labels), 64, shuffle=True)
    prune = Prune(epochs // 2, images.train_images[:1], target={"macs": 0.4})
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[prune], accelerator="cpu", **quiet)
    trainer.fit(module, loader)
    share = accuracy(module.eval().net, images)
    print(f"accuracy {share:.1%}")
    return trainer, share


if __name__ == "__main__":
    main()
