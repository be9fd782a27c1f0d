"""A Torch-Pruning user's script: prune a little, fine-tune, repeat. Only the importance is replaced."""

import copy
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

from tp_cosep import ReconstructionSelector, Selector
from tp_cosep.cli.demo import accuracy, train, train_net


def main(epochs: int | None = None, steps: int = 3) -> dict[str, list[tuple[float, float]]]:
    """Prune in steps with either importance; returns MACs and accuracy after each step."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    example_inputs = images.train_images[:1]
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    full_macs, _ = tp.utils.count_ops_and_params(net, example_inputs)
    print(f"unpruned   {full_macs:10,.0f} MACs, accuracy {accuracy(net, images):.1%}")

    def l2(model: nn.Module) -> Any:
        return tp.importance.GroupMagnitudeImportance(p=2)

    def cosep(model: nn.Module) -> Any:
        return ReconstructionSelector().fit(model, calibration)

    def prune_in_steps(make_importance: Callable[[nn.Module], Any]) -> list[tuple[float, float]]:
        model = copy.deepcopy(net)
        importance = make_importance(model)
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs,
            importance=importance,
            pruning_ratio=0.6,
            iterative_steps=steps,
            ignored_layers=[model.head],
            round_to=4,
        )
        after = []
        for step in range(steps):
            if step and isinstance(importance, Selector):
                importance.fit(model, calibration)  # its statistics are of the layers before the last step
            pruner.step()
            train(model, images, epochs=1, rate=0.03, seed=step)
            n_macs, _ = tp.utils.count_ops_and_params(model, example_inputs)
            after.append((n_macs, accuracy(model, images)))
            print(f"{make_importance.__name__:6} {step + 1}/{steps} {n_macs:10,.0f} MACs, accuracy {after[-1][1]:.1%}")
        return after

    return {make.__name__: prune_in_steps(make) for make in (l2, cosep)}


if __name__ == "__main__":
    main()
