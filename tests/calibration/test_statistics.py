import copy

import pytest
import torch
from fitted import group_with, make_selector
from models import build
from moment_helpers import OPTIONS, assert_same, batches
from processes import data
from torch import nn

from tp_cosep import (
    AttentionMapSelector,
    CoSePPruner,
    CoSePSelector,
    InputError,
    NotFittedError,
    ReconstructionSelector,
)
from tp_cosep.calibration.io import fingerprint
from tp_cosep.calibration.statistics import Statistics
from tp_cosep.utils.files import write_safetensors


def fitted(model, x, y, **options):
    return make_selector(**options).fit(model, batches(x, y), progress=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_moments_come_back(tmp_path, options):
    model, x, y = build("resnet", 12)
    before, path = fitted(model, x, y, **options), tmp_path / "moments.safetensors"
    before.save_statistics(path)
    after = make_selector(**options).load_statistics(path, copy.deepcopy(model), n_classes=before_classes(before))
    assert_same(after, before)
    assert before.layers == after.layers
    CoSePPruner(model, x[:1], importance=after).step()  # layers are those of the model that was given
    selected = [s.select(group_with(build("resnet", 12)[0], x, "conv1")) for s in (before, after)]
    assert selected[0] == selected[1]


def before_classes(selector):
    tables = [*selector.statistics.moments.values(), *(m.classes for m in selector.statistics.inputs.values())]
    return max(m.n_classes for m in tables)


def test_saved_attention_maps_come_back(tmp_path):
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    selector = AttentionMapSelector()
    selector._hold(Statistics(attention={"q": torch.rand(2, 2)}, fingerprint=fingerprint(model)))
    selector.save_statistics(tmp_path / "maps")
    again = AttentionMapSelector().load_statistics(tmp_path / "maps", model)
    assert torch.equal(again.statistics.attention["q"], selector.statistics.attention["q"])


def test_moments_of_something_else_are_refused(tmp_path):
    model, x, y = build("vgg", 10)
    path = tmp_path / "moments"
    fitted(model, x, y).save_statistics(path)
    whole = path.read_bytes()
    fresh = ReconstructionSelector()
    for other, options, expected in (
        (build("vgg", 10, seed=1)[0], {}, "the model has other weights"),
        (build("vgg", 12)[0], {}, "the model has other weights"),
        (model, {"n_classes": 7}, "expected 7 classes, got 4"),
    ):
        with pytest.raises(InputError, match=expected):
            fresh.load_statistics(path, other, **options)
    for options in ({"kind": "cosep"}, {"spatial": 2}, {"kind": "reconstruction without classes"}):
        with pytest.raises(InputError, match="measured was"):
            make_selector(**options).load_statistics(path, model)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (whole[:-7], whole[:middle], flipped, b"", b"{}" * 40):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged, or no file of statistics"):
            fresh.load_statistics(path, model)
    with pytest.raises(InputError, match="found none"):
        fresh.load_statistics(tmp_path / "nothing", model)
    assert not fresh.is_fitted


def test_a_checkpoint_is_not_taken_for_moments(tmp_path):
    model, x, y = build("vgg", 10)
    path = tmp_path / "checkpoint"
    ReconstructionSelector().fit(model, batches(x, y), checkpoint=path, progress=False)
    with pytest.raises(InputError, match=r"statistics .*checkpoint"):
        ReconstructionSelector().load_statistics(path, model)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, x, y = build("vgg", 10)
    path = tmp_path / "moments"
    selector = fitted(model, x, y)
    selector.save_statistics(path)
    whole = path.read_bytes()

    def torn(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("tp_cosep.utils.files.save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        selector.save_statistics(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_header_is_all_that_is_trusted(tmp_path):
    model, x, y = build("vgg", 10)
    path = tmp_path / "moments"
    fitted(model, x, y).save_statistics(path)
    document = {"format": "tp_cosep.statistics", "version": 99}
    write_safetensors(path, {"x": torch.zeros(1)}, document)
    with pytest.raises(InputError, match="expected version 1, got 99"):
        ReconstructionSelector().load_statistics(path, model)


def test_an_estimate_is_of_the_model_that_it_is_given():
    """Not of the one that was measured, whose attention layers are no part of another one."""
    torch.manual_seed(0)
    (model, x, y), (other, *_) = data("vit"), data("vit")
    selector = fitted(model, x, y)
    expected = ReconstructionSelector().memory_estimate(other, x[:2], 4)
    assert selector.memory_estimate(other, x[:2], 4) == expected
    CoSePPruner(model, x[:1], selector, pruning_ratio=0.5).step()
    assert selector.memory_estimate(model, x[:2], 4).class_moments < expected.class_moments


def test_nothing_to_save_before_fit(tmp_path):
    with pytest.raises(NotFittedError):
        ReconstructionSelector().save_statistics(tmp_path / "moments")


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"kind": "cosep", "observe": "inputs"}, {"kind": "cosep", "spatial": None}], ids=str
)
@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_estimated_moments_take_what_was_said(options, name):
    model, x, y = build(name, 12)
    needed = make_selector(**options).memory_estimate(model, x[:2], int(y.max()) + 1)
    selector = fitted(model, x, y, **options)
    tables = [*selector.statistics.moments.values(), *(m.classes for m in selector.statistics.inputs.values())]
    assert needed.class_moments == sum(m.mean.nbytes + m.m2.nbytes for m in tables)
    assert needed.second_moments == sum(2 * m.second.folds.nbytes for m in selector.statistics.inputs.values())
    assert needed.total == needed.class_moments + needed.second_moments + needed.selection
    assert f"{needed.total / 2**20:,.0f} MiB" in str(needed)


def test_what_does_not_fit_is_refused_before_it_is_measured():
    model, x, y = build("vgg", 10)
    y = y * 100
    needed = CoSePSelector(spatial=4).memory_estimate(model, x, 301)
    fewer = CoSePSelector(spatial=3).memory_estimate(model, x, 301)
    n_large = 0

    def count(_, args, __):
        nonlocal n_large
        n_large += len(args[0]) > 3

    model.conv1.register_forward_hook(count)
    message = r"moments of 301 classes, 0 for .*; set spatial=3, which fits.* or use CoSePSelector\(weights=None\)"
    with pytest.raises(InputError, match=message):
        CoSePSelector(spatial=4, memory_budget=fewer.measuring).fit(model, [(x, y)], progress=False)
    assert n_large == 0
    CoSePSelector(spatial=3, memory_budget=fewer.measuring).fit(model, [(x, y)], progress=False)
    CoSePSelector(spatial=4, memory_budget=needed.measuring).fit(model, [(x, y)], progress=False)
    automatic = CoSePSelector(memory_budget=fewer.measuring).fit(model, [(x, y)], progress=False)
    assert automatic.statistics.moments["conv1"].n_cells == 9
    assert CoSePSelector().fit(model, [(x, y)], progress=False).statistics.moments["conv1"].n_cells == 16
    with pytest.raises(InputError, match="next to no memory"):
        AttentionMapSelector().memory_estimate(model, x, 4)
