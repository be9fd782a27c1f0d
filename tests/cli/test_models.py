"""Models by name, and their weights."""

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import project
import pytest
import torch
from models import assert_same_state
from safetensors.torch import save_file
from torch import nn

from tp_cosep import InputError, MissingDependencyError
from tp_cosep.cli import main as cli
from tp_cosep.cli.models import image_spec, make_model, read_weights
from tp_cosep.utils.data import logits_of


def options(model, **changed):
    given = {"model_args": [], "weights": None, "allow_pickle": None, "pretrained": False, **changed}
    return SimpleNamespace(model=model, **given)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def other_net():
    net = project.make_net()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3).add_(1)
    return net


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module."])
def test_weights_of_torch_save(wrap, tmp_path):
    net, path = other_net(), tmp_path / "net.pt"
    state = net.state_dict()
    if wrap == "module.":
        state = OrderedDict((f"module.{k}", x) for k, x in state.items())
    torch.save(state if wrap in ("plain", "module.") else {wrap: state, "epoch": 3}, path)
    found = make_model(options("project:make_net", weights=path))
    assert not found.training
    assert_same_state(found.state_dict(), net.state_dict())


def test_weights_of_safetensors(tmp_path):
    net, path = other_net(), tmp_path / "net.safetensors"
    save_file(net.state_dict(), path)
    assert_same_state(make_model(options("project:make_net", weights=path)).state_dict(), net.state_dict())


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused(how, tmp_path):
    path, made = tmp_path / "net.pt", tmp_path / "made"
    content = {"weight": torch.ones(1), "more": Malicious(made)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"net\.pt': more than tensors, or damaged\. .* add --allow-pickle .*net\.pt"):
        read_weights(project.make_net(), path)
    assert not made.exists()
    other = tmp_path / "other.pt"
    with pytest.raises(InputError, match="--allow-pickle: expected the file of --weights"):
        read_weights(project.make_net(), path, other)
    assert not made.exists()


def test_a_pickle_that_is_allowed_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = other_net()
    torch.save({"model": net, "epoch": 3}, "net.pt")
    with pytest.raises(InputError, match="more than tensors"):
        make_model(options("project:make_net", weights=tmp_path / "net.pt"))
    allowed = options("project:make_net", weights=tmp_path / "net.pt", allow_pickle=Path("net.pt"))
    assert_same_state(make_model(allowed).state_dict(), net.state_dict())
    with pytest.raises(InputError, match="--allow-pickle: expected --weights with the same file"):
        make_model(options("project:make_net", allow_pickle=Path("net.pt")))


def test_the_command_refuses_a_pickle_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"more": Malicious(tmp_path / "made")}, "net.pt")
    words = "prune --model project:make_net --weights net.pt --data project:make_loaders --output out"
    assert cli.main(words.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tp-cosep: weights 'net.pt': more than tensors")
    assert err.count("\n") == 1
    assert not (tmp_path / "made").exists()
    with pytest.raises(InputError, match="more than tensors"):
        cli.main([*words.split(), "--debug"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"nothing", "expected a safetensors file"),
        ("a.pt", b"", r"a\.pt': "),
        ("a.pt", b"nothing", r"a\.pt': "),
        ("a.pt", b"PK\x03\x04 and no more", r"a\.pt': expected a file of torch.save"),
    ],
)
def test_damaged_weights(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(project.make_net(), tmp_path / name)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(project.make_net(12).state_dict(), path)
    with pytest.raises(InputError, match=r"(?s)do not fit the model .*size mismatch for 0\.weight.*--model-args"):
        read_weights(project.make_net(), path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="expected a state_dict, got a list"):
        read_weights(project.make_net(), path)
    with pytest.raises(InputError, match=r"nowhere\.pt': no such file"):
        read_weights(project.make_net(), tmp_path / "nowhere.pt")


def test_functions_of_a_project(tmp_path, monkeypatch):
    net = make_model(options("project:make_net", model_args=[("width", 6)]))
    assert net[0].out_channels == 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_a_test.py").write_text("from torch import nn\ndef make(n): return nn.Linear(n, 2)\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert make_model(options("nets_of_a_test:make", model_args=[("n", 3)])).in_features == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make_net", "expected a name that --help lists, or MODULE:FUNCTION"),
        ("os.system('x'):y", "expected a name that --help lists"),
        ("nowhere_at_all:make", "no module 'nowhere_at_all' in the working directory"),
        ("project.more:make", "no module 'project.more' in the working directory"),
        ("project:make", "the module has no function 'make'"),
        ("project:fails", "'project:fails' failed: ZeroDivisionError: of the project"),
        ("project:no_model", "expected an nn.Module, got a int"),
        ("torchvision:resnet17", "no such model; similar names: .*resnet1"),
        ("timm:resnet17", "no such model; similar names: .*resnet"),
        ("hf:nowhere", "expected a folder with config.json"),
    ],
)
def test_models_that_are_not_there(name, message):
    with pytest.raises(InputError, match=message):
        make_model(options(name))


def test_a_module_that_needs_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(InputError, match="its module needs 'not_there_at_all', which is not installed"):
        make_model(options("needs_more:make"))


def test_torchvision():
    net = make_model(options("torchvision:squeezenet1_1", model_args=[("num_classes", 4)]))
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    found = image_spec(options("torchvision:squeezenet1_1"), net)
    assert (found.size, found.n_channels) == (224, 3)
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))


def test_timm():
    net = make_model(options("timm:test_resnet", model_args=[("num_classes", 4), ("in_chans", 1)]))
    found = image_spec(options("timm:test_resnet"), net)
    assert (found.size, found.n_channels) == (160, 1)
    assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 4)


@pytest.mark.slow
def test_hugging_face(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16, image_size=16, patch_size=8
    )
    net = ViTForImageClassification(config).eval()
    net.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}'
    )
    name = f"hf:{tmp_path}"
    again = make_model(options(name))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(logits_of(again(x)), net(x).logits)
    found = image_spec(options(name), again)
    assert (found.size, found.mean, found.std) == (16, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    (tmp_path / "preprocessor_config.json").unlink()
    found = image_spec(options(name), again)
    assert (found.size, found.mean, found.std) == (16, None, None)
    again.config.image_size = (24, 24)
    assert image_spec(options(name), again).size == 24
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"failed: .*safetensors"):
        make_model(options(name))


def test_only_two_publish_weights():
    with pytest.raises(
        InputError, match="--pretrained: expected a model of torchvision or timm, got 'project:make_net'"
    ):
        make_model(options("project:make_net", pretrained=True))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet"])
def test_nothing_is_downloaded_unless_asked_for(name, monkeypatch):
    asked = []
    monkeypatch.setattr("timm.create_model", lambda *args, pretrained, **kw: asked.append(pretrained) or nn.Identity())
    monkeypatch.setattr(
        "torchvision.models.get_model", lambda *args, weights, **kw: asked.append(weights) or nn.Identity()
    )
    make_model(options(name))
    assert asked in ([False], [None])
    make_model(options(name, pretrained=True), with_weights=False)
    assert asked[1:] in ([False], [None])
    make_model(options(name, pretrained=True))
    assert asked[2:] in ([True], ["DEFAULT"])


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"timm is not installed; pip install 'tp_cosep\[hub\]'"):
        make_model(options("timm:resnet18"))


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(1, 2, 3), "text", []])
def test_outputs_without_scores(bad):
    with pytest.raises(InputError, match=r"expected scores of shape \[samples, classes\], got"):
        logits_of(bad)


def test_outputs_with_scores():
    x = torch.randn(3, 4)
    for outputs in (x, (x, 1), {"logits": x}, SimpleNamespace(logits=x)):
        assert logits_of(outputs) is x
