"""Selectors fitted to the models of ``models.py``, and what they choose; the costly part is made once per process."""

import copy
from functools import cache, partial

from models import PRODUCERS, build
from torch import nn

from tp_cosep import CoSePSelector, ReconstructionSelector
from tp_cosep.graph.tracing import trace

WIDTHS = [10, 12, 64, 96]


#: Selectors by name.
KINDS = {
    "cosep": CoSePSelector,
    "reconstruction": ReconstructionSelector,
    "reconstruction without classes": partial(ReconstructionSelector, class_weight=0),
}


def make_selector(kind="reconstruction", **options):
    """A selector of some kind."""
    return KINDS[kind](**options)


def fitted(model, x, y, kind="cosep", **options):
    """A selector that prunes enough of these untrained models to be worth a test."""
    options = {"spatial": 2, "knee": "strongest", **options}
    return make_selector(kind, **options).fit(model, [(x, y)], progress=False)


def group_with(model, x, name):
    """The whole group in which a layer loses output channels, traced anew."""
    graph = trace(model, x[:1])
    layer = model.get_submodule(name)
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    return graph.get_pruning_group(layer, prune, list(range(graph.get_out_channels(layer))))


def groups_of(kind, model, x):
    """The group behind every set of channels of the wiring."""
    return {channels: group_with(model, x, names[0]) for channels, names in PRODUCERS[kind].items()}


@cache
def _prepared(kind, width):
    model, x, y = build(kind, width)
    selector = fitted(model, x, y)
    return model, x, y, selector, {c: selector.select(g) for c, g in groups_of(kind, model, x).items()}


def prepared(kind, width):
    """A fresh model, data, a selector fitted to it, and its choice of every set of channels."""
    model, x, y, selector, chosen = _prepared(kind, width)
    assert any(selection.prune_idxs for selection in chosen.values())
    return copy.deepcopy(model), x, y, copy.copy(selector), chosen


def kept_of(chosen):
    return {channels: selection.keep_idxs for channels, selection in chosen.items()}


def widths(model):
    """Output channels of every convolutional and linear layer, after a look at what each layer says of itself."""
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            shape = (m.out_channels, m.in_channels // m.groups)
        elif isinstance(m, nn.Linear):
            shape = (m.out_features, m.in_features)
        elif isinstance(m, nn.BatchNorm2d):
            shape = (m.num_features,)
        else:
            continue
        assert m.weight.shape[:2] == shape, f"{name}: weights {tuple(m.weight.shape)}, attributes say {shape}"
    return {name: m.weight.shape[0] for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
