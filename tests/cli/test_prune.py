"""Runs of ``tp-cosep prune``: from the command line to a folder, and on after an interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import project
import pytest
import torch
from command import MLP, SMALL, run
from models import assert_same_state
from pictures import write_pictures
from safetensors.torch import load_file
from torch import nn

import tp_cosep
from tp_cosep import PruningPlan
from tp_cosep.cli import finetune, prune
from tp_cosep.cli import main as cli
from tp_cosep.cli.data import Data
from tp_cosep.cli.processes import processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RESULT = ["manifest.json", "plan.json", "summary.json", "weights.safetensors"]
NET = ["--model", "project:make_net", "--model-args", "width=12", "--data", "project:make_loaders", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The network, trained on the digits for a few seconds."""
    net, (train, _) = project.make_net(12), project.make_loaders(50)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()
    for _ in range(3):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save(net.state_dict(), path)
    return path


def start(*words, launcher=()):
    """Start the command in another process."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", *launcher, "-m", "tp_cosep", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # What a shell starts in the background ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def summary(folder):
    return json.loads((folder / prune.SUMMARY).read_text())


def right(net, batches):
    with torch.no_grad():
        found = [(net(x).argmax(1) == y) for x, y in batches]
    return float(torch.cat(found).double().mean())


def test_digits_from_end_to_end(weights, tmp_path, capsys):
    """Half of the multiplications are pruned, and accuracy stays high; random weights would get a tenth."""
    words = ["prune", *NET, "--weights", weights, "--target", "macs=0.5", "--epochs", 2, "--output", tmp_path / "out"]
    assert run(*words, "--calibration", 500, "--learning-rate", 0.03) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".html") == RESULT
    found = tp_cosep.load(tmp_path / "out", lambda: project.make_net(12))
    found_accuracies = summary(tmp_path / "out")["accuracies"]
    assert list(found_accuracies) == ["unpruned", "pruned", "compensated", "fine-tuned"]
    test = project.make_loaders()[1]
    assert found_accuracies["fine-tuned"] == pytest.approx(right(found, test))
    assert found_accuracies["fine-tuned"] > 0.85
    assert found_accuracies["compensated"] > found_accuracies["pruned"]
    net = project.make_net(12)
    net.load_state_dict(torch.load(weights, weights_only=True))
    assert found_accuracies["unpruned"] == pytest.approx(right(net.eval(), test))
    plan = PruningPlan.load(tmp_path / "out" / "plan.json")
    bare = plan.apply(net, next(iter(test))[0][:1])
    assert found_accuracies["pruned"] == pytest.approx(right(bare.eval(), test))
    models = {m["name"]: m for m in summary(tmp_path / "out")["models"]}
    assert 0.4 < models["fine-tuned"]["macs_ratio"] < 0.56
    assert models["fine-tuned"]["stats"]["n_parameters"] == sum(p.numel() for p in found.parameters())
    assert "accuracy, fine-tuned: " in capsys.readouterr().out


def test_without_compensation_and_fine_tuning(tmp_path):
    out = tmp_path / "out"
    assert (
        run("prune", *NET, *SMALL, "--compensate", "off", "--no-recalibrate", "--pruning-ratio", 0.5, "--output", out)
        == 0
    )
    expected = PruningPlan.load(out / "plan.json").apply(project.make_net(12), torch.zeros(1, 1, 8, 8))
    assert expected[0].out_channels == 6
    assert_same_state(tp_cosep.load(out, lambda: project.make_net(12)).state_dict(), expected.state_dict())
    assert list(summary(out)["accuracies"]) == ["unpruned", "pruned"]


def test_layer_by_layer(tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "prune",
        *MLP,
        "--layerwise",
        "--selector",
        "published",
        "--compensate",
        "off",
        "--epochs",
        1,
        "--output",
        out,
    ]
    assert run(*words) == 0
    text = capsys.readouterr().out
    plan = PruningPlan.load(out / "plan.json")
    n_groups = sum(bool(g.selection and g.selection.prune_idxs) for g in plan)
    assert text.count(": fine-tuning\n") == n_groups >= 1
    assert plan.options["layerwise"]
    tp_cosep.load(out, project.make_mlp)


@pytest.mark.parametrize(
    ("words", "kept"), [("--pruning-ratio 0.5", [2, 2]), ("--pruning-ratio 0", [4, 4]), ("--scope model", None)]
)
def test_heads_by_their_attention_maps(words, kept, tmp_path):
    words = [*MLP, "--model", "project:make_transformer", "--selector", "attention", *words.split(), "--epochs", 1]
    assert run("prune", *words, "--output", tmp_path / "out") == 0
    net = tp_cosep.load(tmp_path / "out", project.make_transformer)[1]
    heads = [layer.num_heads for layer in net.layers]
    assert heads == kept or (kept is None and sum(heads) < 8)
    assert net.embed.out_features == 20


def test_the_attention_selector_needs_heads(tmp_path, capsys):
    assert run("prune", *MLP, "--selector", "attention", "--output", tmp_path / "out") == 1
    assert "attention" in capsys.readouterr().err


def test_images_and_mixed_precision(tmp_path):
    write_pictures(tmp_path / "photos")
    words = ["--data", f"imagefolder:{tmp_path / 'photos'}", "--input-size", 24, "--batch-size", 8, "--device", "cpu"]
    words += ["--model", "project:make_photo_net", "--epochs", 1, "--mixed-precision", "bf16", "--optimizer", "adamw"]
    assert run("prune", *words, "--output", tmp_path / "out", "--pruning-ratio", 0.5) == 0
    found = tp_cosep.load(tmp_path / "out", project.make_photo_net)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert found[0].out_channels == 6


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_leaves_nothing_on_the_model(precision):
    """Accelerate wraps the model that it trains; pruning continues with the model itself."""
    net, options = project.make_mlp(), SimpleNamespace(device="cpu", mixed_precision=precision)
    before = set(vars(net))
    seen = []
    net[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    data = Data("", lambda epoch: [(x, y)], [], [], (x, y))
    training = finetune.Training(epochs=1, optimizer="sgd", learning_rate=0.1, weight_decay=0.0, seed=0)
    with processes(options) as together:
        finetune.fine_tune(net, data, training, together)
    assert set(vars(net)) == before
    assert net(x).dtype == torch.float32
    assert seen == [{"no": torch.float32, "bf16": torch.bfloat16}[precision], torch.float32]


def test_dry_run(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", *MLP, "--target", "macs=0.5", "--epochs", 3, "--output", out, "--dry-run"]
    assert run(*words) == 0
    assert not out.exists()
    text = capsys.readouterr().out
    for part in (
        "project:make_mlp: 3,122 parameters",
        "prune to a target of macs=0.5",
        "compensate by refitting (one-shot) and BatchNorm re-estimation",
        "fine-tune for 3 epochs (sgd, learning rate 0.01, mixed precision: no, 1 processes on cpu)",
        f"write plan.json, weights.safetensors, manifest.json, summary.json and report.html to {out}",
    ):
        assert part in text


def test_a_finished_run_is_not_overwritten(tmp_path, capsys):
    words = ["prune", *MLP, "--output", tmp_path / "out"]
    assert run(*words, "--pruning-ratio", 0.5) == 0
    before = (tmp_path / "out" / "plan.json").read_bytes()
    assert run(*words, "--pruning-ratio", 0.25) == 1
    assert "has plan.json, weights.safetensors, manifest.json, summary.json, report.html already; choose" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "out" / "plan.json").read_bytes() == before
    assert run(*words, "--pruning-ratio", 0.25, "--restart") == 0
    assert tp_cosep.load(tmp_path / "out", project.make_mlp)[1].out_features == 24


@pytest.mark.parametrize("name", ["plan.json", "summary.json", "report.html"])
def test_files_of_somebody_else_are_not_overwritten(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    words = ["prune", *MLP, "--pruning-ratio", 0.5, "--output", tmp_path]
    assert run(*words) == 1
    assert f"has {name} already; choose another folder, or add --restart to replace" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    assert run(*words, "--restart") == 0


def test_a_file_where_the_folder_would_be(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        for more in ([], ["--restart"], ["--dry-run"]):
            assert run("prune", *MLP, "--output", out, *more) == 1
            assert f"expected a folder or a new name, but {str(tmp_path / 'out')!r} is a file" in (
                capsys.readouterr().err
            )
    assert (tmp_path / "out").read_text() == "mine"


def interrupted(monkeypatch, where, at):
    """Raise KeyboardInterrupt in the at-th call of a function."""
    module, name = where
    function, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("where", "at"),
    [
        ((prune, "CoSePPruner"), 1),
        ((finetune, "_epoch"), 1),
        ((finetune, "_epoch"), 3),
        ((finetune, "_keep"), 2),
        ((prune, "measure_models"), 1),
    ],
    ids=["pruning", "first epoch", "third epoch", "checkpoint", "end"],
)
def test_a_run_goes_on_and_ends_as_it_would_have(where, at, optimizer, tmp_path, monkeypatch, capsys):
    words = ["prune", *MLP, "--pruning-ratio", 0.5, "--epochs", 3, "--optimizer", optimizer, "--output"]
    assert run(*words, tmp_path / "whole") == 0
    with monkeypatch.context() as context:
        interrupted(context, where, at)
        assert run(*words, tmp_path / "parts") == 130
    err = capsys.readouterr().err
    hint = f"tp-cosep: finished parts are in {tmp_path / 'parts'}; the same command continues"
    assert err == f"\ntp-cosep: interrupted\n{hint}\n"
    assert not (tmp_path / "parts" / "manifest.json").exists()
    assert run(*words, tmp_path / "parts") == 0
    out = capsys.readouterr().out
    assert f"continuing the run in {tmp_path / 'parts'}" in out
    # Finished parts are not repeated.
    assert ("pruning\n" in out) == (where == (prune, "CoSePPruner"))
    assert out.count("  epoch ") == {"CoSePPruner": 3, "_epoch": 4 - at, "_keep": 2, "measure_models": 0}[where[1]]
    files = [p.name for p in (tmp_path / "parts").iterdir()]
    assert "unfinished" not in files
    a, b = (load_file(tmp_path / part / "weights.safetensors") for part in ("whole", "parts"))
    assert_same_state(a, b)
    assert summary(tmp_path / "whole")["accuracies"] == summary(tmp_path / "parts")["accuracies"]


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """The words of a run that was interrupted in its second epoch."""
    words = ["prune", *MLP, "--pruning-ratio", 0.5, "--epochs", 2, "--output", tmp_path / "out"]
    with monkeypatch.context() as context:
        interrupted(context, (finetune, "_epoch"), 2)
        assert run(*words) == 130
    return words


def test_other_options_are_refused(unfinished, tmp_path, capsys):
    for changed, message in [
        (["--epochs", "4"], "--epochs was 2, is 4"),
        (["--seed", "1"], "--seed was 0, is 1"),
        (["--round-to", "8"], "--round-to was None, is 8"),
    ]:
        assert run(*unfinished, *changed) == 1
        assert message in capsys.readouterr().err
    assert run(*unfinished, "--dry-run") == 0
    assert "continue the unfinished run" in capsys.readouterr().out
    assert run(*unfinished, "--workers", 0, "--debug") == 0


def test_other_weights_are_refused(unfinished, tmp_path, monkeypatch, capsys):
    make = project.make_mlp

    def other():
        net = make()
        net[1].weight.data.add_(1)
        return net

    monkeypatch.setattr(project, "make_mlp", other)
    assert run(*unfinished) == 1
    assert "has an unfinished run of a model with other weights" in capsys.readouterr().err
    assert run(*unfinished, "--restart") == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 2, "options": {}, "model": "", "accuracies": {}}'])
def test_a_damaged_state_is_refused(content, unfinished, tmp_path, capsys):
    (tmp_path / "out" / "unfinished" / "run.json").write_text(content)
    assert run(*unfinished) == 1
    assert re.search(r"run '.*run\.json': (damaged|expected version 1, got 2)", capsys.readouterr().err)


def test_damaged_training_is_refused(unfinished, tmp_path, capsys):
    path = tmp_path / "out" / "unfinished" / "fine-tuning.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert run(*unfinished) == 1
    assert "fine-tuning.safetensors': damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "project:fails"], "'project:fails' failed: ZeroDivisionError: of the project"),
        (["--data", "project:fails"], "'project:fails' failed: ZeroDivisionError"),
        (["--model", "project:make_photo_net"], "does not run on the data's inputs, (1, 1, 8, 8) (RuntimeError"),
        (["--target", "macs=0.0001"], "target: expected one that can be reached"),
        (["--ignored-layers", "nine"], "ignored_layers: expected modules of the model"),
        (["--data", "project:make_broken_loaders"], "RuntimeError: of the loader (add --debug to see where)"),
        (["--epochs", "1", "--learning-rate", "1e30"], "the loss is nan in epoch 1; lower --learning-rate"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, capsys):
    assert run("prune", *MLP, *words, "--output", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("tp-cosep: ")
    assert err.count("\n") == 1


def test_unknown_layers_are_found_before_anything_is_measured(tmp_path, capsys):
    assert run("prune", *MLP, "--ignored-layers", "nine", "--output", tmp_path / "out") == 1
    assert "accuracy" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(RuntimeError, match="of the\nloader"):
        run("prune", *MLP, "--data", "project:make_broken_loaders", "--output", tmp_path / "out", "--debug")


def test_a_model_with_too_few_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(project, "make_net", lambda: project.make_photo_net(4, 1))
    assert run("prune", *NET[:2], *NET[4:], "--output", tmp_path / "out") == 1
    assert "it has scores for 4 classes, the data has a label 9" in capsys.readouterr().err


def test_warnings_are_one_line():
    for debug, expected in ((False, "tp-cosep: warning: a b\n"), (True, "file.py:3: UserWarning: a\nb\n  line\n")):
        with cli._short_warnings(is_on=not debug):
            assert warnings.formatwarning("a\nb", UserWarning, "file.py", 3, "line") == expected


def test_ctrl_c_in_another_process(tmp_path):
    words = ["prune", *MLP, "--pruning-ratio", 0.5, "--output", tmp_path / "out"]
    process = start(*words, "--epochs", 1000)
    for line in process.stdout:
        if line.startswith("  epoch 2 of"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command continues" in err
    again = start(*words, "--epochs", 1000)
    for line in again.stdout:
        if line.startswith("  epoch "):
            assert int(line.split()[1]) > 2
            again.send_signal(signal.SIGINT)
            break
    again.communicate(timeout=120)
    assert again.returncode == 130


def test_two_processes_make_the_plan_of_one(tmp_path):
    words = [
        "prune",
        *MLP,
        "--model",
        "project:make_normed_mlp",
        "--learning-rate",
        0.3,
        "--data-args",
        "n=300",
        "batch_size=20",
        "--target",
        "macs=0.5",
        "--epochs",
        1,
        "--output",
    ]
    assert run(*words, tmp_path / "one") == 0
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = start(*words, tmp_path / "two", launcher=launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("accuracy, unpruned") == 1
    one, two = (PruningPlan.load(tmp_path / name / "plan.json") for name in ("one", "two"))
    assert [(g.name, g.selection and g.selection.keep_idxs) for g in one] == [
        (g.name, g.selection and g.selection.keep_idxs) for g in two
    ]
    found = {name: summary(tmp_path / name)["accuracies"] for name in ("one", "two")}
    assert found["one"]["unpruned"] == found["two"]["unpruned"]
    assert found["one"]["pruned"] == found["two"]["pruned"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.suffix != ".html") == RESULT
    net = tp_cosep.load(tmp_path / "two", project.make_normed_mlp)
    assert found["two"]["fine-tuned"] == pytest.approx(right(net, project.make_loaders(n=300)[1]))
