"""``tp-cosep preview``, ``report``, ``apply`` and ``export``."""

import re

import project
import pytest
import torch
from command import MLP, run
from models import assert_same_state
from torch import nn

import tp_cosep
from tp_cosep import CoSePPruner, PruningPlan, ReconstructionSelector
from tp_cosep.cli import export, prune

pytestmark = pytest.mark.slow


def pruned(make, folder, x, **options):
    """A pruned and saved model that answers quite unlike an unpruned one."""
    torch.manual_seed(1)
    model, x = make().eval(), torch.cat([x, torch.randn(39, *x.shape[1:])])
    selector = ReconstructionSelector(keep=6).fit(model, [(x, torch.arange(40) % 4)], progress=False)
    pruner = CoSePPruner(model, x[:1], selector, **options)
    pruner.step()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    tp_cosep.save(model, pruner.plan, folder)
    return model, pruner.plan


@pytest.fixture
def folder(tmp_path):
    pruned(project.make_net, tmp_path / "pruned", torch.zeros(1, 1, 8, 8))
    return tmp_path / "pruned"


def test_preview_shows_what_prune_would_keep(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    targets = ["macs=0.75", "params=0.5", "none", "macs=0.0001"]
    assert run("preview", *MLP, "--targets", *targets) == 0
    text = capsys.readouterr().out
    assert "macs=0.0001: target: expected one that can be reached" in text
    shown = {words[0]: words for words in map(str.split, text.splitlines()) if words}
    assert shown["unpruned"][2:] == ["100%", "3,122", "100%"]
    assert 0.45 < int(shown["params=0.5"][3].replace(",", "")) / 3122 <= 0.5
    layers = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words and words[0] in ("1", "3")}
    for i, target in enumerate(targets[:3]):
        out = tmp_path / str(i)
        assert run("prune", *MLP, "--target", target, "--output", out) == 0
        for group in PruningPlan.load(out / "plan.json"):
            if group.selection:
                assert layers[group.name][0] == str(group.selection.n_channels)
                assert layers[group.name][i + 1] == str(len(group.selection.keep_idxs))
    capsys.readouterr()


def test_report_shows_a_plan(folder, capsys):
    plan = PruningPlan.load(folder / "plan.json")
    for path in (folder, folder / "plan.json"):
        assert run("report", path) == 0
        text = capsys.readouterr().out
        assert len(re.findall(r"6 / (24|48)", text)) == 3
        assert f"fingerprint of the model: {plan.fingerprint}" in text
        assert f"torch {torch.__version__}" in text


def test_report_as_a_page(folder, tmp_path, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr(PruningPlan, "report", lambda plan, path: pages.append((plan, path)), raising=False)
    assert run("report", folder, "--html", tmp_path / "page.html") == 0
    assert pages == [(PruningPlan.load(folder / "plan.json"), tmp_path / "page.html")]
    assert str(tmp_path / "page.html") in "".join(capsys.readouterr().out.split("\n"))


def test_prune_writes_a_page(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(PruningPlan, "report", lambda plan, path, **more: pages.append((path, more)), raising=False)
    assert run("prune", *MLP, "--pruning-ratio", 0.5, "--output", tmp_path / "a") == 0
    ((path, more),) = pages
    assert path == tmp_path / "a" / "report.html"
    assert list(more["stats"]) == ["unpruned", "compensated"]
    assert more["class_names"] is None

    monkeypatch.undo()
    assert run("prune", *MLP, "--pruning-ratio", 0.5, "--output", tmp_path / "b") == 0
    assert "compensated" in (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "b" / prune.SUMMARY).is_file()
    assert not (tmp_path / "b" / "unfinished").exists()


def test_report_of_an_empty_plan_says_so(tmp_path, capsys):
    PruningPlan().save(tmp_path / "plan.json")
    assert run("report", tmp_path, "--html", tmp_path / "page.html") == 0
    assert "the plan is empty: nothing was pruned" in capsys.readouterr().out
    assert "The plan is empty." in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("command", ["report", "apply"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("", "expected JSON"), ("{}", "expected a file written by PruningPlan")],
)
def test_plans_that_cannot_be_read(command, content, message, tmp_path, capsys):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    more = [] if command == "report" else ["--model", "project:make_net", "--output", tmp_path / "out"]
    assert run(command, path, *more) == 1
    assert message in capsys.readouterr().err


def test_apply(folder, tmp_path, capsys):
    net = project.make_net()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    words = ["--model", "project:make_net", "--weights", tmp_path / "net.pt", "--output", tmp_path / "applied"]
    assert run("apply", folder, *words) == 0
    found = tp_cosep.load(tmp_path / "applied", project.make_net)
    plan = PruningPlan.load(folder / "plan.json")
    assert_same_state(found.state_dict(), plan.apply(net, torch.zeros(1, 1, 8, 8)).state_dict())
    after = sum(p.numel() for p in found.parameters())
    assert f"16,450 parameters before, {after:,} after" in capsys.readouterr().out
    assert (
        run("apply", folder, "--model", "project:make_net", "--model-args", "width=12", "--output", tmp_path / "x") == 1
    )
    assert "here it is float32 [12, 1, 3, 3]" in capsys.readouterr().err


def test_apply_does_not_write_over_a_model(folder, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    words = ["apply", folder / "plan.json", "--model", "project:make_net", "--output", folder]
    assert run(*words) == 1
    err = capsys.readouterr().err
    assert "has plan.json, weights.safetensors, manifest.json already; choose another folder, or add --overwrite" in err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert run(*words, "--overwrite") == 0
    assert (folder / "weights.safetensors").read_bytes() != before["weights.safetensors"]


def exported(path, batch):
    """The answer of an exported model, by its own runtime."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"inputs": batch.numpy()})[0])
    return torch.export.load(path).module()(batch)


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_export(kind, folder, tmp_path, capsys):
    path = tmp_path / ("net.onnx" if kind == "onnx" else "net.pt2")
    assert run("export", folder, "--model", "project:make_net", "--format", kind, "--output", path) == 0
    model = tp_cosep.load(folder, project.make_net)
    for n in (1, 7):
        x = torch.randn(n, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(exported(path, x), model(x), rtol=1e-4, atol=1e-5)
    found = re.search(
        r"outputs differ by at most (\S+) of the largest, with batches of 1, 2, 5", capsys.readouterr().out
    )
    assert float(found[1]) < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["pruned", path.name])


def test_the_opset_is_the_one_that_was_asked_for(folder, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    words = ["export", folder, "--model", "project:make_net", "--output", tmp_path / "net.onnx", "--opset"]
    assert run(*words, 20) == 0
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 20
    capsys.readouterr()
    before = (tmp_path / "net.onnx").read_bytes()
    assert run(*words, 5) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"tp-cosep: --opset 5: ONNX cannot convert the model from opset \d+; nothing .*\n", err)
    assert (tmp_path / "net.onnx").read_bytes() == before


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_an_export_that_answers_otherwise_is_not_written(kind, folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "net"
    words = ["export", folder, "--model", "project:make_net", "--format", kind, "--output", path]
    whole = export._exported
    monkeypatch.setattr(export, "_exported", lambda model, x: whole(nn.Sequential(model, nn.Hardtanh(-9, 0.05)), x))
    assert run(*words) == 1
    assert re.search(
        r"outputs differ by 0\.\d+ of the largest output, more than the --tolerance", capsys.readouterr().err
    )
    assert not path.exists()
    assert run(*words, "--tolerance", 10) == 0
    monkeypatch.setattr(export, "_exported", lambda model, x: whole(nn.Sequential(model, nn.Unflatten(1, (5, 2))), x))
    assert run(*words) == 1
    assert "expected outputs of shape (" in capsys.readouterr().err


def test_what_cannot_be_exported(tmp_path, capsys, monkeypatch):
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))

        def forward(self, x):
            return self.net(x) if float(x.sum()) > -1e9 else x

    class Two(Untraceable):
        def forward(self, x, y=None):
            return self.net(x)

    monkeypatch.setattr(project, "make_net", Untraceable)
    pruned(Untraceable, tmp_path / "a", torch.zeros(1, 20))
    words = ["--model", "project:make_net", "--output", tmp_path / "net"]
    assert run("export", tmp_path / "a", *words) == 1
    assert "export: torch.export cannot export the model (" in capsys.readouterr().err
    torch.manual_seed(0)
    model, x = Two(), torch.randn(40, 20)
    selector = ReconstructionSelector(keep=6).fit(model, [((x, x), torch.arange(40) % 4)], progress=False)
    pruner = CoSePPruner(model, (x[:1], x[:1]), selector)
    pruner.step()
    tp_cosep.save(model, pruner.plan, tmp_path / "b")
    monkeypatch.setattr(project, "make_net", Two)
    assert run("export", tmp_path / "b", *words) == 1
    assert "expected a model with one tensor as input" in capsys.readouterr().err
    assert run("export", tmp_path, *words) == 1
    assert "expected a folder written by tp_cosep.save" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_hugging_face_models_are_exported_too(tmp_path, capsys):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")

    def make():
        return ViTForImageClassification.from_pretrained(tmp_path / "vit")

    model, _ = pruned(make, tmp_path / "out", torch.zeros(1, 3, 16, 16))
    path = tmp_path / "net.onnx"
    assert run("export", tmp_path / "out", "--model", f"hf:{tmp_path / 'vit'}", "--output", path) == 0
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(exported(path, x), model(x).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
