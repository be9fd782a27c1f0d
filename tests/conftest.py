import importlib.util
from pathlib import Path


def import_torchvision_first():
    """Load the shim by its path: the package would import torch_pruning before it."""
    path = Path(__file__).resolve().parents[1] / "tp_cosep" / "cli" / "torchvision_shim.py"
    spec = importlib.util.spec_from_file_location("_torchvision_shim", path)
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    shim.import_torchvision()


if importlib.util.find_spec("torchvision") is not None:
    import_torchvision_first()

import torch  # noqa: E402 -- after the shim

# The models here are tiny: more threads only make the tests slow where other work keeps the cores busy.
torch.set_num_threads(1)
