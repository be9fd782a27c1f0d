"""Pruned models in folders."""

from fitted import fitted
from models import build

import tp_cosep
from tp_cosep import CoSePPruner


def pruned_by(model, x, y, **options):
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), **{"pruning_ratio": 0.5, **options})
    pruner.step()
    return pruner.plan


def saved(kind, folder, **options):
    """A factory of an unpruned model with other weights, a pruned and saved one, its plan, and inputs."""
    model, x, y = build(kind, 12)
    if options:
        options["loader"] = [(x, y)]
    plan = pruned_by(model, x, y, **options)
    tp_cosep.save(model, plan, folder)
    return (lambda: build(kind, 12, seed=7)[0]), model, plan, x
