import copy

import pytest
import torch
from fitted import group_with, make_selector
from models import assert_untouched, build, fingerprint
from moment_helpers import OPTIONS, assert_same, batches
from safetensors.torch import save_file

from tp_cosep import InputError, ReconstructionSelector
from tp_cosep.utils.files import read_safetensors, write_safetensors


class Interrupted:
    """A loader that breaks down behind some batches."""

    def __init__(self, given, n):
        self.given, self.n = given, n

    def __iter__(self):
        yield from self.given[: self.n]
        raise KeyboardInterrupt


def test_slow_batches_are_kept_by_the_clock(tmp_path, monkeypatch):
    model, x, y = build("mlp", 12)
    given, path = batches(x, y), tmp_path / "moments.safetensors"
    for seconds, is_kept in ((30, False), (0, True)):
        monkeypatch.setattr("tp_cosep.calibration.io._SECONDS", seconds)
        with pytest.raises(KeyboardInterrupt):
            ReconstructionSelector().fit(model, Interrupted(given, 3), checkpoint=path, progress=False)
        assert path.is_file() == is_kept
    again, whole = (
        ReconstructionSelector().fit(model, given, progress=False, **keep) for keep in ({"checkpoint": path}, {})
    )
    assert_same(again, whole)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [0, 3, 7])
@pytest.mark.slow
def test_a_pass_goes_on_where_it_was_interrupted(tmp_path, options, n):
    model, x, y = build("resnet", 12)
    given, path = batches(x, y), tmp_path / "moments.safetensors"
    whole = make_selector(**options).fit(model, given, progress=False)
    keep = {"checkpoint": path, "checkpoint_every": 2, "progress": False}
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        make_selector(**options).fit(model, Interrupted(given, n), **keep)
    assert path.is_file() == (n >= 2)
    n_run = 0

    def count(_, args, __):
        nonlocal n_run
        n_run += len(args[0]) > 3  # runs on a few samples are for the trace, the layouts and the sizes

    handle = model.conv1.register_forward_hook(count)
    again = make_selector(**options).fit(model, given, **keep)
    assert n_run == sum(len(y) > 3 for _, y in given[n // 2 * 2 :])
    assert_same(again, whole)
    n_run = 0
    finished = make_selector(**options).fit(model, given, **keep)
    handle.remove()
    assert n_run == 0
    assert_same(finished, whole)
    group = group_with(model, x, "conv1")
    assert finished.select(group) == whole.select(group)
    assert_untouched(model, before)
    assert [p.name for p in tmp_path.iterdir()] == ["moments.safetensors"]


@pytest.fixture
def kept(tmp_path):
    model, x, y = build("vgg", 12)
    path = tmp_path / "kept"
    ReconstructionSelector(spatial=2).fit(model, batches(x, y), checkpoint=path, progress=False)
    return model, x, y, path


def other_weights(model, path):
    with torch.no_grad():
        model.head.bias[0] += 1
    return {}, "the model has other weights"


def other_model(model, path):
    model.extra = torch.nn.Linear(2, 2)
    return {}, "the model has other weights"


def other_options(model, path):
    return {"spatial": 4}, "measured was .*, is .*; delete it to collect again"


def torn(model, path):
    path.write_bytes(path.read_bytes()[:-100])
    return {}, "damaged, or no file of statistics"


def foreign(model, path):
    save_file({"x": torch.zeros(2)}, path)
    return {}, "expected a file of statistics, got another one"


def newer(model, path):
    tensors, header = read_safetensors(path)
    write_safetensors(path, tensors, {**header, "version": 2})
    return {}, "expected version 1, got 2"


def without_a_tensor(model, path):
    tensors, header = read_safetensors(path)
    write_safetensors(path, {key: x for key, x in tensors.items() if "conv2" not in key}, header)
    return {}, "damaged, KeyError"


@pytest.mark.parametrize("spoil", [other_weights, other_model, other_options, torn, foreign, newer, without_a_tensor])
def test_files_that_do_not_fit_are_refused(kept, spoil):
    model, x, y, path = kept
    options, message = spoil(model, path)
    before, bytes_before = fingerprint(model), path.read_bytes()
    with pytest.raises(InputError, match=f"statistics '.*kept': .*{message}"):
        make_selector(**{"spatial": 2, **options}).fit(model, batches(x, y), checkpoint=path, progress=False)
    assert path.read_bytes() == bytes_before
    assert_untouched(model, before)


def test_a_write_that_fails_leaves_the_old_file(kept, monkeypatch, tmp_path):
    model, x, y, path = kept
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("tp_cosep.calibration.io.os.replace", full)
    more = batches(torch.cat([x, x]), torch.cat([y, y]))
    with pytest.raises(OSError, match="no space"):
        ReconstructionSelector(spatial=2).fit(model, more, checkpoint=path, checkpoint_every=1, progress=False)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(InputError, match="expected an existing folder"):
        ReconstructionSelector().fit(copy.deepcopy(model), more, checkpoint=tmp_path / "no" / "where", progress=False)
