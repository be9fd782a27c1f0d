import importlib.util
import os
from pathlib import Path

# The models here are tiny, and pytest-xdist keeps every core busy: more threads would only wait for each other. The
# variable is for the processes that tests start; it has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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

torch.set_num_threads(1)
