"""The papers' schedule: collect statistics, prune one group, fine-tune, and continue with the next."""

from torch import nn

from tp_cosep import CoSePPruner, PruningPlan, ReconstructionSelector
from tp_cosep.cli.demo import accuracy, train, train_net


def main(epochs: int | None = None) -> PruningPlan:
    """Prune group by group, and print the accuracy after each; returns the plan."""
    net, images = train_net("digits", seed=0, epochs=epochs)
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    print(f"trained: accuracy {accuracy(net, images):.1%}")

    def fine_tune(model: nn.Module) -> None:
        train(model, images, epochs=1, rate=0.03, seed=1)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters: accuracy {accuracy(model, images):.1%}")

    pruner = CoSePPruner(
        net,
        images.train_images[:1],
        importance=ReconstructionSelector(),
        loader=calibration,
        layerwise=True,
        fine_tune=fine_tune,
    )
    pruner.step()
    print(pruner.plan)
    return pruner.plan


if __name__ == "__main__":
    main()
