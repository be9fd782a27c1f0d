"""The examples run, on briefly trained networks, and print the expected results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_ways(capsys):
    results = load("three_ways").main(epochs=1)
    assert list(results) == ["stock_at_a_ratio", "stock_with_own_counts", "cosep"]
    by_dict, own = results["stock_with_own_counts"], results["cosep"]
    assert by_dict[0] == own[0]
    assert all(accuracy > 0.2 for _, accuracy in results.values())
    assert capsys.readouterr().out.count("parameters, accuracy") == 3


def test_layerwise(capsys):
    plan = load("layerwise").main(epochs=1)
    assert [group_plan.name for group_plan in plan if group_plan.selection] == ["conv1", "conv2", "conv3", "conv4"]
    assert capsys.readouterr().out.count("parameters: ") == 4


def test_combining(capsys):
    results = load("combining").main(epochs=1)
    assert list(results) == ["taylor_picks", "blended"]
    assert results["taylor_picks"][0] == results["blended"][0]
    assert all(accuracy > 0.2 for _, accuracy in results.values())
    assert capsys.readouterr().out.count("parameters, accuracy") == 2


def test_attention_heads(capsys):
    results = load("attention_heads").main(epochs=2)
    assert results["per layer"][0] == results["by attention maps"][0] == [4, 4, 4]
    assert sum(results["over the model"][0]) == 12
    assert min(results["over the model"][0]) >= 1
    assert all(accuracy > 0.2 for _, accuracy in results.values())
    assert capsys.readouterr().out.count("heads [") == 3


def test_compensation(capsys):
    results = load("compensation").main(epochs=2)
    assert list(results) == ["L2", "CoSeP", "reconstruction"]
    for pruned, compensated, _ in results.values():
        assert compensated > pruned
    assert capsys.readouterr().out.count("compensated") == 3


def test_report(capsys, tmp_path):
    page = load("report").main(epochs=1, path=tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A small VGG for handwritten digits" in page
    assert all(f">{name}<" in page for name in ("conv1", "conv2", "conv3", "conv4"))
    assert '"3":"three"' in page
    assert "pruned, compensated" in page
    assert capsys.readouterr().out.endswith("channels pruned\n")


def test_timm_model(capsys):
    pytest.importorskip("timm")
    results = load("timm_model").main(epochs=2)
    macs = {stage: n for stage, (n, _) in results.items()}
    assert (
        macs["pruned, compensated"] == macs["fine-tuned"] < 0.53 * macs["trained"] == 0.53 * macs["unpruned, as long"]
    )
    assert all(accuracy > 0.8 for _, accuracy in results.values())
    assert capsys.readouterr().out.count("MACs") == 4


def test_hf_vit(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate")
    results = load("hf_vit").main(epochs=4)
    assert {stage: heads for stage, (heads, _) in results.items()} == {"trained": [8, 8, 8], "fine-tuned": [4, 4, 4]}
    assert all(accuracy > 0.5 for _, accuracy in results.values())
    assert capsys.readouterr().out.count("parameters, accuracy") == 2


# Lightning asks torch for something that torch 2.13 has deprecated, and advises workers where there are many cores.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_callback(capsys):
    pytest.importorskip("lightning")
    trainer, accuracy = load("lightning_callback").main(epochs=2)
    assert accuracy > 0.8
    parameters = dict(trainer.lightning_module.named_parameters())
    assert len(parameters["net.conv2.weight"]) < 32
    (optimizer,) = trainer.optimizers
    (group,) = optimizer.param_groups
    assert sorted(map(id, group["params"])) == sorted(map(id, parameters.values()))
    assert {*map(id, optimizer.state)} == {*map(id, parameters.values())}
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    n_batches = trainer.num_training_batches
    for name, p in parameters.items():  # only the bias of the head has neither lost channels nor inputs
        assert optimizer.state[p]["step"] == n_batches * (2 if name == "net.head.bias" else 1), name
    assert "parameters left" in capsys.readouterr().out


def test_torch_pruning_script(capsys):
    results = load("torch_pruning_script").main(epochs=2)
    l2, cosep = results["l2"], results["cosep"]
    assert [n for n, _ in l2] == [n for n, _ in cosep]
    assert cosep[2][0] < cosep[1][0] < cosep[0][0]
    assert cosep[2][0] < 1e6
    assert cosep[2][1] > 0.8
    assert capsys.readouterr().out.count("MACs, accuracy") == 7


def test_segmentation(capsys):
    results = load("segmentation").main(epochs=4)
    trained, compensated, tuned = results.values()
    assert compensated[0] == tuned[0] < 0.32 * trained[0]
    assert compensated[1] > trained[1] - 0.1
    assert tuned[1] > 0.7
    assert capsys.readouterr().out.count("pixel accuracy") == 3


def test_quantise(capsys):
    pytest.importorskip("torchao")
    results = load("quantise").main(epochs=4)
    n_bytes = {stage: n for stage, (n, _) in results.items()}
    assert n_bytes["pruned"] < 0.25 * n_bytes["trained"]
    assert n_bytes["pruned and quantised"] < 0.35 * n_bytes["pruned"]
    assert results["pruned and quantised"][1] > results["pruned"][1] - 0.02 > 0.8
    assert capsys.readouterr().out.count("bytes, accuracy") == 4


def test_the_notebook_runs(monkeypatch):
    pytest.importorskip("ipykernel")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    for there, shorter in {
        'train_net("digits", seed=0)': 'train_net("digits", seed=0, epochs=2)',
        "0.7, 0.5, 0.35, 0.25, ": "",
    }.items():
        (cell,) = [cell for cell in notebook.cells if there in cell.source]
        cell.source = cell.source.replace(there, shorter)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()  # raises what a cell raises
    printed = "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.output_type == "stream")
    shares = [float(share) for share in re.findall(r"accuracy ([\d.]+)%", printed)]
    assert len(shares) == 11
    trained, pruned, compensated, *_ = shares
    assert min(trained, compensated) > max(80, pruned)
    assert sum("image/png" in o.get("data", ()) for c in notebook.cells for o in c.get("outputs", ())) == 4


def test_the_notebook_is_kept_with_its_output():
    path = EXAMPLES / "notebook.ipynb"
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell["outputs"] for cell in cells[1:])  # the first has imports alone
    assert not any(
        output["output_type"] == "error" or output.get("name") == "stderr"
        for cell in cells
        for output in cell["outputs"]
    )
    assert path.stat().st_size < 300_000
