"""Prune a network with compensation, and write an HTML page about kept channels, accuracy and speed."""

import copy
from pathlib import Path

from tp_cosep import CoSePPruner, CoSePSelector
from tp_cosep.cli.demo import accuracy, train_net
from tp_cosep.report import measure_models

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main(epochs: int | None = None, path: str | Path = "report.html") -> Path:
    """Prune to 40 % of the multiply-accumulates; returns the path of the page."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    example_inputs = images.train_images[:1]

    pruned = copy.deepcopy(net)
    pruner = CoSePPruner(
        pruned,
        example_inputs,
        importance=CoSePSelector(),  # the page shows which classes its clusters separate
        target={"macs": 0.4},
        loader=calibration,
        compensate=True,
        recalibrate=True,
    )
    pruner.step()

    models = {"trained": net, "pruned, compensated": pruned}
    stats = measure_models(models, images.test_images[:64], lambda model: accuracy(model, images))
    pruner.plan.report(path, stats=stats, class_names=DIGITS, title="A small VGG for handwritten digits")
    print(f"{path}: {sum(len(g.selection.prune_idxs) for g in pruner.plan if g.selection)} channels pruned")
    return Path(path)


if __name__ == "__main__":
    main()
