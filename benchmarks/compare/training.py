"""Training and fine-tuning: the same code for both, one recipe for all networks."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.compare.data import Images, augmented, cut_out
from benchmarks.compare.networks import build

__all__ = ["Recipe", "accuracy", "checkpoint", "train", "trained"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, one cycle of the learning rate.

    Products are of bf16 where the processor has instructions for them, else of float32.

    Attributes:
        epochs: Passes over the training images.
        rate: The highest learning rate.
        warm_up: Share of the steps until the highest learning rate.
        batch: Images per step.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters.
        label_smoothing: Share of the target that is uniform over classes, in [0, 1).
        cutout: Side of the masked square of every image, in pixels; 0 for none.
    """

    epochs: float
    rate: float
    warm_up: float = 0.25
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    cutout: int = 0


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    seed: int,
    *,
    state_path: Path | None = None,
    save_every: int = 100,
    log: bool = False,
) -> None:
    """Train in place.

    Args:
        model: The network; left in eval mode.
        images: The data set, of which the training part is used.
        recipe: Epochs, learning rate and regularisation.
        seed: Seed of the order of the images and of their augmentation.
        state_path: File for the state of the training; an interrupted run continues from it.
        save_every: Steps between two states.
        log: Print a line after every epoch.
    """
    n = len(images.train)
    n_steps = round(recipe.epochs * n / recipe.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=n_steps + 1, pct_start=recipe.warm_up, cycle_momentum=False
    )
    step, generator, total = 0, torch.Generator(), 0.0
    if state_path is not None and state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        step, total = state["step"], state["total"]
    model.train()
    device = next(model.parameters()).device
    # Emulated, bf16 takes ten times as long as float32.
    in_bf16 = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    per_epoch, start = -(-n // recipe.batch), time.perf_counter()
    while step < n_steps:
        # The order depends on seed and epoch alone; with the generator's state that was kept, a resumed run is the same
        # as an uninterrupted one.
        epoch, done = divmod(step, per_epoch)
        shuffling = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(n, generator=shuffling)
        if not done:
            generator.set_state(shuffling.get_state())
            total = 0.0
        for idxs in order.split(recipe.batch)[done : done + n_steps - step]:
            x = images.standardised(augmented(images.train[idxs], generator))
            if recipe.cutout:
                x = cut_out(x, recipe.cutout, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                outputs = model(x.to(device)).float()
            loss = cross_entropy(outputs, images.train_labels[idxs].to(device), label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            step += 1
            if state_path is not None and (step % save_every == 0 or step == n_steps):
                state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                state |= {"generator": generator.get_state(), "step": step, "total": total}
                torch.save({"model": model.state_dict(), **state}, state_path.with_suffix(".new"))
                os.replace(state_path.with_suffix(".new"), state_path)
        if log:
            print(
                f"step {step}/{n_steps}  loss {total / per_epoch:.3f}  {time.perf_counter() - start:.0f} s", flush=True
            )
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, part: str = "test", batch: int = 500) -> float:
    """Top-1 accuracy.

    Args:
        model: The network, in eval mode.
        images: The data set.
        part: ``"test"``, or ``"validation"``, the last tenth of the training images.
        batch: Images per forward pass.

    Returns:
        The share, in [0, 1].
    """
    x, y = images.test, images.test_labels
    if part == "validation":
        held_out = len(images.train) // 10
        x, y = images.train[-held_out:], images.train_labels[-held_out:]
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        right += int((model(images.standardised(a).to(device)).argmax(1).cpu() == b).sum())
    return right / len(y)


def checkpoint(network: str, data: str, seed: int) -> Path:
    """Path of the weights of a trained network."""
    return Path(__file__).parent / "checkpoints" / f"{network}-{data}-{seed}.safetensors"


def trained(network: str, images: Images, seed: int) -> nn.Module:
    """A trained network from its checkpoint."""
    path = checkpoint(network, images.name, seed)
    model = build(network, int(images.train_labels.max()) + 1, images.train.shape[1])
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()


def train_checkpoint(network: str, images: Images, seed: int, recipe: Recipe, scratch: Path, **facts: Any) -> float:
    """Train a network from random weights, and save a checkpoint with recipe and accuracy.

    Kernels and matrices are saved in half precision, vectors (of BatchNorm) in full; the accuracy is that of the saved
    weights.

    Returns:
        The accuracy on the test images.
    """
    torch.manual_seed(seed)
    model = build(network, int(images.train_labels.max()) + 1, images.train.shape[1])
    path = checkpoint(network, images.name, seed)
    state_path = scratch / f"{path.stem}.pt"
    train(model, images, recipe, seed, state_path=state_path, log=True)
    kept = {
        k: (v.half() if v.is_floating_point() and v.dim() > 1 else v).contiguous()
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(kept)
    top1 = accuracy(model, images)
    path.parent.mkdir(exist_ok=True)
    record = {"recipe": json.dumps(asdict(recipe)), "test_accuracy": f"{top1:.4f}", "seed": str(seed), **facts}
    save_file(kept, path, record)
    state_path.unlink()
    return top1
