"""Combine selectors with other importances: CoSeP's clusters with Taylor scores, and blended scores."""

import copy
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tp_cosep import CoSePPruner, CoSePSelector, ReconstructionSelector
from tp_cosep.cli.demo import accuracy, train, train_net


class Blend(tp.importance.Importance):
    """The sum of the ranks by several importances, whose scores are not comparable."""

    def __init__(self, *parts: Callable[[Any], Tensor | None]) -> None:
        self.parts = parts

    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a group's channels; ``None`` if an importance has none."""
        scores = [part(group) for part in self.parts]
        if any(s is None for s in scores):
            return None
        return sum(s.argsort().argsort().double() for s in scores)


def main(epochs: int | None = None) -> dict[str, tuple[int, float]]:
    """Prune and fine-tune; returns number of parameters and accuracy by combination."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    example_inputs = images.train_images[:1]
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))

    def taylor_picks(model: nn.Module) -> tp.pruner.BasePruner:
        # Taylor scores require gradients, here of one batch. They choose the kept member of every CoSeP cluster.
        cross_entropy(model(calibration[0][0]), calibration[0][1]).backward()
        selector = CoSePSelector(representative=tp.importance.TaylorImportance()).fit(model, calibration)
        return CoSePPruner(model, example_inputs, selector, pruning_ratio=0.5)

    def blended(model: nn.Module) -> tp.pruner.BasePruner:
        blend = Blend(ReconstructionSelector().fit(model, calibration), tp.importance.MagnitudeImportance(p=1))
        return tp.pruner.MetaPruner(model, example_inputs, blend, pruning_ratio=0.5, ignored_layers=[model.head])

    results = {}
    for make_pruner in (taylor_picks, blended):
        model = copy.deepcopy(net)
        make_pruner(model).step()
        model.zero_grad()
        train(model, images, epochs=1, rate=0.03, seed=1)
        n_parameters = sum(p.numel() for p in model.parameters())
        results[make_pruner.__name__] = n_parameters, accuracy(model, images)
        print(f"{make_pruner.__name__:14} {n_parameters:8,} parameters, accuracy {accuracy(model, images):.1%}")
    return results


if __name__ == "__main__":
    main()
