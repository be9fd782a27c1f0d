"""Prune one trained network in three ways, each fine-tuned for as long."""

import copy

import torch_pruning as tp

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import accuracy, train, train_net


def main(epochs: int | None = None) -> dict[str, tuple[int, float]]:
    """Prune and fine-tune; returns number of parameters and accuracy by pruner."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    example_inputs = images.train_images[:1]
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    selector = ReconstructionSelector().fit(net, calibration)

    def stock_at_a_ratio(model):
        return tp.pruner.MetaPruner(
            model, example_inputs, importance=selector, pruning_ratio=0.5, ignored_layers=[model.head]
        )

    def stock_with_own_counts(model):
        ratios = selector.pruning_ratio_dict(model, example_inputs, ignored_layers=[model.head])
        return tp.pruner.MetaPruner(
            model,
            example_inputs,
            importance=selector,
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            ignored_layers=[model.head],
        )

    def cosep(model):
        return CoSePPruner(model, example_inputs, importance=selector)

    results = {}
    for make_pruner in (stock_at_a_ratio, stock_with_own_counts, cosep):
        model = copy.deepcopy(net)
        make_pruner(model).step()
        train(model, images, epochs=1, rate=0.03, seed=1)
        n_parameters = sum(p.numel() for p in model.parameters())
        results[make_pruner.__name__] = n_parameters, accuracy(model, images)
        print(f"{make_pruner.__name__:22} {n_parameters:8,} parameters, accuracy {accuracy(model, images):.1%}")
    return results


if __name__ == "__main__":
    main()
