"""Half of every layer goes without fine-tuning: what selection, repair and BatchNorm statistics are worth."""

import copy
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

from tp_cosep import Compensator, CoSePSelector, ReconstructionSelector, recalibrate
from tp_cosep.cli.demo import accuracy, train_net


def main(epochs: int | None = None) -> dict[str, list[float]]:
    """Prune and print; accuracies as pruned, repaired, and repaired with new statistics, by selection."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    example_inputs = images.train_images[:1]
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    print(f"unpruned {accuracy(net, images):.1%}")

    selections: dict[str, Callable[[nn.Module], Any]] = {
        "L2": lambda model: tp.importance.GroupMagnitudeImportance(p=2),
        "CoSeP": lambda model: CoSePSelector().fit(model, calibration),
        "joint": lambda model: ReconstructionSelector().fit(model, calibration),
    }
    results: dict[str, list[float]] = {}
    for name, select in selections.items():
        results[name] = []
        for repair in (False, True):
            model = copy.deepcopy(net)
            pruner = tp.pruner.MetaPruner(
                model, example_inputs, select(model), pruning_ratio=0.5, ignored_layers=[model.head]
            )
            compensator = Compensator(model, example_inputs).fit(calibration) if repair else None
            for group in pruner.step(interactive=True):
                if compensator is not None:
                    compensator(group)
                group.prune()
            results[name].append(accuracy(model, images))
        recalibrate(model, calibration)
        results[name].append(accuracy(model, images))
        pruned, repaired, both = results[name]
        print(f"{name:6} pruned {pruned:.1%}, repaired {repaired:.1%}, with new BatchNorm statistics {both:.1%}")
    return results


if __name__ == "__main__":
    main()
