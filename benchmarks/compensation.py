"""Cost of compensation: the pass that collects second moments, as a multiple of a plain forward pass, and the refits.

python -m benchmarks.compensation
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.compare.networks import NETWORKS, build
from tp_cosep import Compensator
from tp_cosep.cli.torchvision_shim import import_torchvision

torchvision = import_torchvision()

import torch_pruning as tp  # noqa: E402 -- after torchvision

N_ROUNDS = 3


def seconds(run: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = {name: (build(name), 32, 250, 4) for name in NETWORKS if name not in ("vgg16", "densenet40", "resnet56")}
    for name in ("resnet18", "resnet50", "mobilenet_v2"):
        cases[f"torchvision {name}"] = (torchvision.models.get_model(name), 224, 16, 8)
    print("| network | images | forward, s | collecting / forward | refits, s | second moments, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (model, size, batch, n_batches) in cases.items():
        model.eval()
        batches = [torch.randn(batch, 3, size, size) for _ in range(n_batches)]

        @torch.no_grad()
        def forward(model: torch.nn.Module = model, batches: list[torch.Tensor] = batches) -> None:
            for x in batches:
                model(x)

        compensator = Compensator(model, batches[0][:1])
        forward()
        # In turns, so that other load falls on both; each ratio is of two neighbouring runs.
        rounds = [
            (seconds(forward), seconds(lambda c=compensator, b=batches: c.fit(b, progress=False)))
            for _ in range(N_ROUNDS)
        ]
        extra = statistics.median(fit / plain - 1 for plain, fit in rounds)
        size_of = sum(r.moments.folds.nbytes for r in compensator._consumers.values()) / 2**20
        pruner = tp.pruner.BasePruner(
            model, batches[0][:1], tp.importance.RandomImportance(), pruning_ratio=0.5,
            ignored_layers=[m for m in model.modules() if isinstance(m, torch.nn.Linear)],
        )  # fmt: skip
        refits = 0.0
        for group in pruner.step(interactive=True):
            refits += seconds(lambda c=compensator, g=group: c(g))
            group.prune()
        plain = statistics.median(p for p, _ in rounds)
        print(
            f"| {name} | {batch * n_batches} at {size}² | {plain:.2f} | {extra:.2f} | {refits:.1f} | {size_of:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
