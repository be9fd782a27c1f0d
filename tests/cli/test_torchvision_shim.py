"""A test that needs a torch to which torchvision's operators are unknown runs in a process of its own."""

import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from tp_cosep.cli import torchvision_shim as _torchvision
from tp_cosep.errors import MissingDependencyError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None

# What torchvision does where its compiled operators do not load.
BROKEN = """
import torch
import torchvision.extension

def fake(*args):
    raise AssertionError

for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(fake)
loaded = True
"""


def run(code: str, fakes: Path | None = None) -> str:
    """Run code in a fresh interpreter in which fakes, a folder, hides the installed packages."""
    paths = [str(path) for path in (fakes, ROOT) if path is not None]
    program = f"import sys\nsys.path[:0] = {paths!r}\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fake_torchvision(tmp_path):
    def write(source, extension="counter = []\n"):
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        (package / "extension.py").write_text(extension)
        return tmp_path

    return write


@pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not installed")
@pytest.mark.parametrize("first", ["tests.conftest", "torch_pruning", "tp_cosep"])
def test_installed_torchvision_works(first):
    out = run(
        f"""
        import {first}
        import torch
        from tp_cosep.cli.torchvision_shim import import_torchvision
        torchvision = import_torchvision()
        assert import_torchvision() is torchvision is sys.modules["torchvision"]
        from torchvision import datasets, transforms
        image = transforms.Resize(32)(torch.zeros(1, 3, 48, 48))
        print(tuple(torchvision.models.resnet18(num_classes=7).eval()(image).shape))
        """
    )
    assert out.strip() == "(1, 7)"


@pytest.mark.skipif(
    not (HAS_TORCHVISION and importlib.util.find_spec("timm")), reason="torchvision or timm is not installed"
)
def test_conftest_comes_before_torch_pruning():
    from torch_pruning.utils import op_counter

    assert op_counter.has_timm


def test_missing_operators_are_declared(fake_torchvision):
    out = run(
        """
        import torch
        from tp_cosep.cli.torchvision_shim import import_torchvision
        try:
            import torchvision
        except RuntimeError as error:
            print(error)
        half_loaded = sys.modules["torchvision.extension"]
        torchvision = import_torchvision()
        assert torchvision.loaded
        assert torchvision.extension is not half_loaded
        print(torch.ops.torchvision.nms.default._schema)
        print(torch.ops.torchvision.qnms.default._schema)
        """,
        fake_torchvision(BROKEN),
    )
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert out.splitlines() == [
        "operator torchvision::nms does not exist",
        f"torchvision::nms{schema}",
        f"torchvision::qnms{schema}",
    ]


def test_healthy_torchvision_is_not_touched(fake_torchvision):
    run(
        """
        import torch
        import torchvision
        import torchvision.extension
        before = {name: module for name, module in sys.modules.items() if name.startswith("torchvision")}
        from tp_cosep.cli.torchvision_shim import import_torchvision
        assert import_torchvision() is torchvision
        after = {name: module for name, module in sys.modules.items() if name.startswith("torchvision")}
        assert before == after
        assert not hasattr(torch.ops.torchvision, "nms")
        """,
        fake_torchvision("healthy = True\n"),
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::roi_align does not exist"),
        RuntimeError("Detected that PyTorch and torchvision were compiled with different CUDA versions"),
        ImportError("libjpeg.so: cannot open shared object file"),
        ModuleNotFoundError("No module named 'PIL'", name="PIL"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}",
)
def test_other_failures_are_raised_as_they_are(monkeypatch, error):
    imported = []

    def import_module(name):
        imported.append(name)
        raise error

    monkeypatch.setattr(_torchvision, "importlib", SimpleNamespace(import_module=import_module))
    modules_before = dict(sys.modules)
    with pytest.raises(type(error), match=re.escape(str(error))) as caught:
        _torchvision.import_torchvision()
    assert caught.value is error
    assert imported == ["torchvision"]
    assert sys.modules == modules_before


def test_missing_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # makes its import fail as if it were not installed
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'tp_cosep[demo]'")):
        _torchvision.import_torchvision()
