"""A selector in the hands of Torch-Pruning's own pruners, step after step, with nothing but the importance swapped."""

import copy
import gc

import pytest
import torch_pruning as tp
from fitted import widths
from models import assert_same_state, build

from tp_cosep import CoSePPruner, CoSePSelector, InputError, ReconstructionSelector

OPTIONS = [
    {},
    {"global_pruning": True},
    {"global_pruning": True, "isomorphic": True},
    {"round_to": 2},
    {"max_pruning_ratio": 0.4},
]


@pytest.mark.parametrize("make", [CoSePSelector, ReconstructionSelector, CoSePSelector.published])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_steps_of_a_stock_pruner(options, make):
    model, x, y = build("resnet", 12)
    selector = make().fit(model, [(x, y)], progress=False)
    options = {"pruning_ratio": 0.5, "iterative_steps": 3, "ignored_layers": [model.head], **options}
    pruner = tp.pruner.MetaPruner(model, x[:1], importance=selector, **options)
    before = []
    for _ in range(3):
        before.append(sum(widths(model).values()))
        pruner.step()
    assert before[0] > before[1] > before[2] > sum(widths(model).values()) or "round_to" in options
    assert model(x).shape == (len(x), 4)


def test_a_step_is_that_of_a_selector_fitted_to_the_model_as_it_is():
    model, x, y = build("vgg", 12)
    options = {"pruning_ratio": 0.5, "iterative_steps": 2, "ignored_layers": [model.head]}
    pruner = tp.pruner.MetaPruner(
        model, x[:1], importance=CoSePSelector().fit(model, [(x, y)], progress=False), **options
    )
    pruner.step()
    twin = copy.deepcopy(model)
    pruner.step()
    again = CoSePSelector().fit(twin, [(x, y)], progress=False)
    ratios = {
        twin.get_submodule(name): 1 - (width + 0.5) / widths(twin)[name]
        for name, width in widths(model).items()
        if name != "head"
    }
    options = {"pruning_ratio": 0.0, "pruning_ratio_dict": ratios, "ignored_layers": [twin.head]}
    tp.pruner.MetaPruner(twin, x[:1], importance=again, **options).step()
    assert_same_state(model.state_dict(), twin.state_dict())


def test_statistics_are_taken_once_a_step_and_only_if_the_model_was_pruned():
    model, x, y = build("vgg", 12)
    n_passes = 0

    class Counting(list):
        def __iter__(self):
            nonlocal n_passes
            n_passes += 1
            return super().__iter__()

    loader = Counting([(x, y)])
    selector = CoSePSelector().fit(model, loader, progress=False)
    at_first = n_passes
    options = {"pruning_ratio": 0.5, "iterative_steps": 3, "ignored_layers": [model.head]}
    pruner = tp.pruner.MetaPruner(model, x[:1], importance=selector, **options)
    passes = []
    for _ in range(3):
        pruner.step()
        passes.append(n_passes)
    assert passes == [at_first, 2 * at_first, 3 * at_first]
    assert selector.refresh(model.conv1)  # the last step has pruned it
    assert n_passes == 4 * at_first
    assert not selector.refresh(model.conv1)
    assert n_passes == 4 * at_first


@pytest.mark.parametrize("how", ["refit=False", "iterator", "copy"])
def test_without_the_data_the_error_is_that_of_outdated_statistics(how):
    model, x, y = build("vgg", 12)
    loader = iter([(x, y)]) if how == "iterator" else [(x, y)]
    selector = CoSePSelector().fit(model, loader, progress=False, refit=how != "refit=False")
    if how == "copy":
        selector = copy.deepcopy(selector)
    options = {"pruning_ratio": 0.5, "iterative_steps": 2, "ignored_layers": [model.head]}
    pruner = tp.pruner.MetaPruner(model, x[:1], importance=selector, **options)
    pruner.step()
    with pytest.raises(InputError, match=r"call fit\(\) again after pruning"):
        pruner.step()


def test_the_selector_does_not_keep_the_model_alive():
    model, x, y = build("mlp", 10)
    selector = CoSePSelector().fit(model, [(x, y)], progress=False)
    layer = model.fc1
    assert not selector.refresh(layer)
    del model
    gc.collect()
    assert selector._source.model() is None
    assert not selector.refresh(layer)


def test_iterative_steps_of_our_pruner_without_a_loader():
    model, x, y = build("vgg", 12)
    selector = CoSePSelector().fit(model, [(x, y)], progress=False)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5, iterative_steps=2)
    pruner.step()
    first = sum(widths(model).values())
    pruner.step()
    assert sum(widths(model).values()) < first


def test_options_of_fit_hold_when_statistics_are_taken_again():
    model, x, y = build("vgg", 12)
    fit_options = {"target_fn": lambda batch: (batch["image"], batch["label"]), "layers": ["conv1", "conv3"]}
    selector = CoSePSelector().fit(model, [{"image": x, "label": y}], progress=False, **fit_options)
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0, 3]).prune()
    assert selector.refresh(model.conv1)
    assert list(selector.statistics.moments) == ["conv1", "conv3"]
    assert selector.statistics.moments["conv1"].n_components == 10


def test_a_copy_of_the_unpruned_model_is_not_mistaken_for_the_pruned_one():
    model, x, y = build("vgg", 12)
    selector, twin = CoSePSelector().fit(model, [(x, y)], progress=False), copy.deepcopy(model)
    options = {"pruning_ratio": 0.5}
    tp.pruner.MetaPruner(model, x[:1], importance=selector, ignored_layers=[model.head], **options).step()
    tp.pruner.MetaPruner(twin, x[:1], importance=selector, ignored_layers=[twin.head], **options).step()
    assert_same_state(model.state_dict(), twin.state_dict())
