"""What the package offers by name."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tp_cosep

ROOT = Path(tp_cosep.__file__).parent


def test_every_name_is_found_where_it_is_defined():
    assert list(tp_cosep._MODULE_OF) == tp_cosep.__all__
    for name, module in tp_cosep._MODULE_OF.items():
        found = getattr(tp_cosep, name)
        assert found is getattr(import_module(f"tp_cosep.{module}"), name)
        assert name in dir(tp_cosep)
    with pytest.raises(AttributeError, match="module 'tp_cosep' has no attribute 'nothing'"):
        tp_cosep.nothing  # noqa: B018 -- looking it up is the test


@pytest.mark.slow
def test_the_package_alone_is_light():
    code = "import sys, tp_cosep; assert 'torch' not in sys.modules; from tp_cosep import *; assert CoSePPruner"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_that_are_no_code_are_there():
    assert (ROOT / "py.typed").is_file()
    assert (ROOT / "pruning" / "plan.schema.json").is_file()


def test_the_citation_is_of_this_version():
    text = (ROOT.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {tp_cosep.__version__}\n" in text
    assert "arXiv:2505.13225" in text
