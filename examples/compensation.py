"""Prune half of every layer without fine-tuning: the effects of selection, compensation and BatchNorm re-estimation."""

import copy
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

from tp_cosep import Compensator, CoSePSelector, ReconstructionSelector, recalibrate
from tp_cosep.cli.demo import accuracy, train_net


def main(epochs: int | None = None) -> dict[str, list[float]]:
    """Prune; returns accuracies as pruned, compensated, and with re-estimated BatchNorm statistics, by selection."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    example_inputs = images.train_images[:1]
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    print(f"unpruned {accuracy(net, images):.1%}")

    importances: dict[str, Callable[[nn.Module], Any]] = {
        "L2": lambda model: tp.importance.GroupMagnitudeImportance(p=2),
        "CoSeP": lambda model: CoSePSelector().fit(model, calibration),
        "reconstruction": lambda model: ReconstructionSelector().fit(model, calibration),
    }
    results: dict[str, list[float]] = {}
    for name, make_importance in importances.items():
        results[name] = []
        for compensate in (False, True):
            model = copy.deepcopy(net)
            pruner = tp.pruner.MetaPruner(
                model, example_inputs, make_importance(model), pruning_ratio=0.5, ignored_layers=[model.head]
            )
            compensator = Compensator(model, example_inputs).fit(calibration) if compensate else None
            for group in pruner.step(interactive=True):
                if compensator is not None:
                    compensator(group)
                group.prune()
            results[name].append(accuracy(model, images))
        recalibrate(model, calibration)
        results[name].append(accuracy(model, images))
        pruned, compensated, both = results[name]
        print(f"{name:14} pruned {pruned:.1%}, compensated {compensated:.1%}, with BatchNorm re-estimation {both:.1%}")
    return results


if __name__ == "__main__":
    main()
