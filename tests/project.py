"""What a user of the command may have in a project: a network, and loaders of scikit-learn's digits."""

import torch
from attention_models import Transformer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_net(width=24):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def make_loaders(batch_size=100, n=1797):
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x[:n], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(y[:n])
    n_train = n * 2 // 3
    train, test = TensorDataset(x[:n_train], y[:n_train]), TensorDataset(x[n_train:], y[n_train:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


class Broken:
    """A loader that fails at its second batch."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield next(iter(self.loader))
        raise RuntimeError("of the\nloader")


def make_broken_loaders(n=300):
    train, test = make_loaders(n=n)
    return Broken(train), Broken(test)


def fails(**options):
    raise ZeroDivisionError("of the project")


def no_model():
    return 3


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))


def make_normed_mlp():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.BatchNorm1d(32, momentum=0.9), nn.ReLU(), nn.Linear(32, 24), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(24, 10))


def make_transformer():
    torch.manual_seed(0)
    transformer = Transformer(fused=True)
    transformer.embed, transformer.head = nn.Linear(8, 20), nn.Linear(20, 10)
    return nn.Sequential(nn.Flatten(1, 2), transformer)  # every row of an image is a token


def make_photo_net(num_classes=4, n_channels=3):
    torch.manual_seed(0)
    layers = [nn.Conv2d(n_channels, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, num_classes))


def one_loader():
    return make_loaders()[0]


def generators():
    return tuple(iter(loader) for loader in make_loaders())
