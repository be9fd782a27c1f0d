"""The method stands alone: no other part of the package, no Torch-Pruning, and every public function at one place."""

import subprocess
import sys

import pytest

from tp_cosep import functional


@pytest.mark.slow
def test_functional_imports_nothing_of_the_package_but_errors():
    code = """
import sys, tp_cosep.functional
allowed = {"tp_cosep", "tp_cosep.errors", "tp_cosep._version"}
ours = {name for name in sys.modules if name.startswith("tp_cosep")} - allowed
assert all(name.startswith("tp_cosep.functional") for name in ours), ours
assert not {"torch_pruning", "kneed", "matplotlib"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", functional.__all__)
def test_public_functions_are_documented(name):
    public = getattr(functional, name)
    assert name == "PairMetric" or public.__doc__.strip()
    assert sorted(functional.__all__) == functional.__all__
