"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("i", range(1, len(BLOCKS)))
def test_snippets_prune_the_model(i, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(48, 3, 8, 8)
    names = {
        "model": Classifier(),
        "example_inputs": x[:1],
        "train_loader": [(x[:24], torch.arange(24) % 4), (x[24:], torch.arange(24) % 4)],
        "train": lambda model, loader, epochs: trained.append(epochs),
    }
    trained = []
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    exec(compile(BLOCKS[i], "README.md", "exec"), names)
    model = names["model"]
    assert model.features[0].out_channels + model.features[3].out_channels < 22
    assert model(x).shape == (48, 4)
    assert bool(trained) == ("fine_tune" in BLOCKS[i])
    assert bool(capsys.readouterr().out) == ("print" in BLOCKS[i])


def test_the_readme_has_the_snippets_and_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(BLOCKS) == 12
    assert "<!-- ci: install and demo -->\n```sh\npip install" in text
    assert "<!-- ci: install and test -->\n```sh\npip install" in text


def test_files_that_the_readme_names_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
