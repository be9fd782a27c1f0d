"""What the README shows is run as it stands."""

import re

import pytest
from snippets import ROOT, python_blocks, run_blocks

BLOCKS = python_blocks(ROOT / "README.md")


def test_the_first_snippet_stands_alone():
    names = run_blocks(BLOCKS[0])
    assert names["model"].n_channels < 22
    assert names["pruner"].compensator.refits


@pytest.mark.parametrize("i", range(2, len(BLOCKS)))
def test_snippets_prune_the_model(i, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(BLOCKS[1], BLOCKS[i])
    assert names["model"].n_channels < 22
    assert bool(names["trained"]) == ("fine_tune" in BLOCKS[i])
    assert bool(capsys.readouterr().out) == ("print" in BLOCKS[i])


def test_the_readme_has_the_snippets_and_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(BLOCKS) == 13
    assert "<!-- ci: install and demo -->\n```sh\npip install" in text
    assert "<!-- ci: install and test -->\n```sh\npip install" in text


def test_files_that_the_readme_names_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
