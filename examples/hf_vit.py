"""Prune half of the heads of a Transformers ViT, and its MLPs; the Trainer trains and fine-tunes it."""

from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import load_digits


def inputs_and_labels(batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A ``target_fn``: keyword arguments of the model and labels, from a batch that is a dictionary."""
    return {"pixel_values": batch["pixel_values"]}, batch["labels"]


def main(epochs: int = 12) -> dict[str, tuple[list[int], float]]:
    """Train, prune and fine-tune; returns heads of every layer and accuracy by stage."""
    images = load_digits(0, Path())
    train = [{"pixel_values": x, "labels": y} for x, y in zip(images.train_images, images.train_labels, strict=True)]
    test = [{"pixel_values": x, "labels": y} for x, y in zip(images.test_images, images.test_labels, strict=True)]
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 128}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    results = {}

    def fit_and_report(stage: str, n_epochs: int, rate: float) -> None:
        # A new Trainer each time: the optimizer of the last one holds the parameters from before pruning.
        options = {"num_train_epochs": n_epochs, "learning_rate": rate, "warmup_steps": 20, "use_cpu": True, **quiet}
        arguments = TrainingArguments(gettempdir(), per_device_train_batch_size=32, **options)
        trainer = Trainer(model, arguments, train_dataset=train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        heads = [layer.attention.num_attention_heads for layer in model.vit.layers]
        predicted = torch.from_numpy(trainer.predict(test).predictions.argmax(1))
        results[stage] = heads, float((predicted == images.test_labels).float().mean())
        print(f"{stage:10} heads {heads}, {model.num_parameters():,} parameters, accuracy {results[stage][1]:.1%}")

    fit_and_report("trained", epochs, 3e-3)
    selector = ReconstructionSelector().fit(model, DataLoader(train, 200), target_fn=inputs_and_labels)
    embeddings = model.vit.embeddings
    CoSePPruner(
        model,
        {"pixel_values": images.train_images[:1]},
        selector,
        ignored_layers=[embeddings.patch_embeddings],  # keeps the residual stream
        unwrapped_parameters=[(embeddings.cls_token, 2), (embeddings.position_embeddings, 2)],
        **{"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5},
    ).step()
    fit_and_report("fine-tuned", max(1, epochs // 4), 1e-3)
    return results


if __name__ == "__main__":
    main()
