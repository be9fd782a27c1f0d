"""Training, pruning and comparing on CIFAR-10 and Fashion-MNIST: ``python -m benchmarks.compare --help``."""

from tp_cosep.cli.torchvision_shim import import_torchvision

import_torchvision()  # before torch_pruning, which imports it once
