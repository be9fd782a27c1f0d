"""The comparison of benchmarks/compare: that every selection runs, resumes, and that the page shows its records."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from models import images, initialise, seeded
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.compare import cells
from benchmarks.compare.cells import COMPENSATIONS, Cell, Records, measure
from benchmarks.compare.data import Images, augmented
from benchmarks.compare.methods import METHODS, VARIANTS, DiagonalHessian, Fpgm
from benchmarks.compare.networks import NETWORKS, build, vgg
from benchmarks.compare.tables import results_page
from benchmarks.compare.training import Recipe, train

ROOT = Path(__file__).parents[1]
CELL = Cell("vgg", "tiny", 0, "half", "joint", "none", recalibrated=True, n_calibration=40)


def tiny_data(n=120):
    x, y = images(n, size=16)
    x = ((x - x.min()) / (x.max() - x.min()) * 255).to(torch.uint8)
    return Images("tiny", x, y, x[:40], y[:40])


def tiny_network(*_):
    model, data = initialise(vgg((8, 10), 4, 3)), tiny_data()
    with torch.no_grad():  # so that it does not predict one class for all
        model[-1].bias -= model(data.standardised(data.train)).mean(0)
    return model


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS])
def test_every_selection_prunes_half_and_is_measured_once(method, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "trained", tiny_network)
    records = Records(tmp_path / "tiny.jsonl")
    for compensation in COMPENSATIONS[: 3 if method == "joint" else 1]:
        measure(replace(CELL, method=method, compensation=compensation), tiny_data(), records)
    found = dict(Records(tmp_path / "tiny.jsonl"))
    assert len(found) == 2 * (3 if method == "joint" else 1)
    for cell, record in found.items():
        assert cell.method == method
        assert 0 <= record["accuracy"] <= 1
        assert record["macs"] > 2
    monkeypatch.setattr(cells, "trained", None)  # measuring again would fail
    measure(replace(CELL, method=method), tiny_data(), Records(tmp_path / "tiny.jsonl"))


def test_fine_tuning_and_a_given_speed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "trained", tiny_network)
    records = Records(tmp_path / "tiny.jsonl")
    for method in ("l2", "unpruned"):
        measure(replace(CELL, method=method, amount="2x", epochs=1), tiny_data(), records)
    found = {cell.method: record for cell, record in records}
    assert 1.9 < found["l2"]["macs"] < 3
    assert found["unpruned"]["macs"] == 1
    assert found["l2"]["recipe"] == found["unpruned"]["recipe"]


def test_training_goes_on_where_it_stopped(tmp_path):
    data, recipe = tiny_data(), Recipe(3, 0.05, batch=32, cutout=3)
    whole, parts = tiny_network(), tiny_network()
    train(whole, data, recipe, seed=1)

    class Stopped(Exception):
        pass

    steps = []

    def stop(*_):
        steps.append(1)
        if len(steps) == 7:  # within the second epoch of four steps, after the state of step 5
            raise Stopped

    handle = parts.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        train(parts, data, recipe, seed=1, state_path=tmp_path / "state.pt", save_every=5)
    handle.remove()
    parts = tiny_network()
    train(parts, data, recipe, seed=1, state_path=tmp_path / "state.pt")
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_augmentation_only_shifts_and_flips():
    x = torch.randint(1, 256, (20, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    y = augmented(x, seeded())
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    for a, b in zip(padded, y, strict=True):
        # A flip of the image may come before the shift.
        views = [v[:, i : i + 8, j : j + 8] for v in (a, a.flip(2)) for i in range(9) for j in range(9)]
        assert any(torch.equal(b, view) for view in views)
    assert not torch.equal(x, y)


def test_calibration_images_are_of_all_classes_in_turn():
    batches = tiny_data().calibration(40, seed=3, batch=16)
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == [*range(4)] * 10
    assert [len(y) for _, y in batches] == [16, 16, 8]
    other = tiny_data().calibration(40, seed=4, batch=16)
    assert not torch.equal(batches[0][0], other[0][0])


def test_baselines_against_their_definitions():
    conv = nn.Conv2d(3, 5, 3)
    filters = conv.weight.detach().flatten(1)
    expected = torch.stack([sum((f - g).norm() for g in filters) for f in filters])
    torch.testing.assert_close(Fpgm().score(conv).detach(), expected)
    model, (x, y) = tiny_network(), images(12, size=16)
    hessian = DiagonalHessian(model, [(x[:5], y[:5]), (x[5:], y[5:])], n_samples=9)
    squares = torch.zeros_like(model[0].weight)
    for i in range(9):
        (grad,) = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model[0].weight)
        squares += grad**2 / 9
    expected = (model[0].weight.detach() ** 2 * squares).flatten(1).sum(1) / 2
    torch.testing.assert_close(hessian.score(model[0]).detach(), expected)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "vgg16"])
def test_networks_run(name):
    assert build(name)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_page_is_that_of_the_records():
    folder = ROOT / "benchmarks" / "compare"
    introduction = (folder / "introduction.md").read_text()
    assert (ROOT / "docs" / "results.md").read_text() == results_page(folder / "records", introduction)


def test_the_unpruned_network_fine_tuned_as_long_counts_every_seed_once(tmp_path):
    rows = [
        ("unpruned", 0, "none", 0.81),
        ("unpruned", 0, "one-shot", 0.81),
        ("unpruned", 1, "one-shot", 0.83),
        ("l2", 0, "none", 0.7),
        ("l2", 0, "one-shot", 0.75),
    ]
    with (tmp_path / "vgg-cifar10.jsonl").open("w") as file:
        for method, seed, refit, accuracy in rows:
            cell = Cell("vgg", "cifar10", seed, "2x", method, refit, recalibrated=True, epochs=1.0, base=0)
            file.write(json.dumps({"cell": asdict(cell), "accuracy": accuracy, "macs": 2.0, "params": 2.0}) + "\n")
    page = results_page(tmp_path, "")
    assert "| unpruned | 82.0 ± 1.4 | 82.0 ± 1.4 |" in page
    assert "| l2 | 70.0 | 75.0 |" in page


def test_every_record_is_of_a_checkpoint_that_is_kept():
    for path in (ROOT / "benchmarks" / "compare" / "records").glob("*-*.jsonl"):
        for line in path.read_text().splitlines():
            cell = Cell(**json.loads(line)["cell"])
            assert cells.checkpoint(cell.network, cell.data, cell.base).is_file()
