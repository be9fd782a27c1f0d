"""The examples run, on a net that was trained too little, and do what they say."""

import importlib.util
from pathlib import Path

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
    assert [entry.name for entry in plan if entry.selection] == ["conv1", "conv2", "conv3", "conv4"]
    assert capsys.readouterr().out.count("after ") == 4


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


def test_repair(capsys):
    results = load("repair").main(epochs=2)
    assert list(results) == ["L2", "CoSeP", "joint"]
    for pruned, repaired, _ in results.values():
        assert repaired > pruned
    assert capsys.readouterr().out.count("repaired") == 3


def test_report(capsys, tmp_path):
    page = load("report").main(epochs=1, path=tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A small VGG for handwritten digits" in page
    assert all(f">{name}<" in page for name in ("conv1", "conv2", "conv3", "conv4"))
    assert '"3":"three"' in page
    assert "pruned, repaired" in page
    assert capsys.readouterr().out.endswith("channels went\n")
