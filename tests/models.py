"""Small models with their channel wiring written down by hand, data for them, and an exact comparison of two states."""

from typing import ClassVar, NamedTuple

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

N_CLASSES = 4


class Wires(NamedTuple):
    """Which channels a layer's tensors carry: its own, its input's, and features per input channel."""

    out: str | None
    into: str | None = None
    repeat: int = 1


class VggLike(nn.Module):
    """conv-bn-relu, conv-relu (in place), pool, conv-bn-relu, pool, flatten, linear-relu (in place), head."""

    wiring: ClassVar = {
        "conv1": Wires("a"),
        "bn1": Wires("a"),
        "conv2": Wires("b", "a"),
        "conv3": Wires("c", "b"),
        "bn3": Wires("c"),
        "fc": Wires("d", "c", 4),
        "head": Wires(None, "d"),
    }

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x), inplace=True), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = F.relu(self.fc(torch.flatten(x, 1)), inplace=True)
        return self.head(x)


class ResNetLike(nn.Module):
    """A stem, a block with an identity shortcut, a block with stride 2 and a 1 × 1 shortcut."""

    wiring: ClassVar = {
        "stem": Wires("a"),
        "bn0": Wires("a"),
        "conv1": Wires("b", "a"),
        "bn1": Wires("b"),
        "conv2": Wires("a", "b"),
        "bn2": Wires("a"),
        "conv3": Wires("c", "a"),
        "bn3": Wires("c"),
        "conv4": Wires("d", "c"),
        "bn4": Wires("d"),
        "shortcut": Wires("d", "a"),
        "bn5": Wires("d"),
        "head": Wires(None, "d"),
    }

    def __init__(self, width):
        super().__init__()
        wide = width + 2
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 3, padding=1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.conv4 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(wide)
        self.shortcut = nn.Conv2d(width, wide, 1, stride=2, bias=False)
        self.bn5 = nn.BatchNorm2d(wide)
        self.head = nn.Linear(wide, N_CLASSES)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        x = F.relu(y + self.bn5(self.shortcut(x)))
        return self.head(x.mean((2, 3)))


class Mlp(nn.Module):
    """Three hidden layers."""

    wiring: ClassVar = {"fc1": Wires("a"), "fc2": Wires("b", "a"), "fc3": Wires("c", "b"), "head": Wires(None, "c")}

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(20, width)
        self.fc2 = nn.Linear(width, width + 1)
        self.fc3 = nn.Linear(width + 1, width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x):
        return self.head(F.relu(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


KINDS = {"vgg": VggLike, "resnet": ResNetLike, "mlp": Mlp}
#: Layers that create each set of channels, in the order in which they run.
PRODUCERS = {
    "vgg": {"a": ["conv1"], "b": ["conv2"], "c": ["conv3"], "d": ["fc"]},
    "resnet": {"a": ["stem", "conv2"], "b": ["conv1"], "c": ["conv3"], "d": ["conv4", "shortcut"]},
    "mlp": {"a": ["fc1"], "b": ["fc2"], "c": ["fc3"]},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=40, channels=3, size=8, n_classes=N_CLASSES, seed=0):
    """Images whose class shows, and their labels in turn."""
    generator = seeded(seed)
    y = torch.arange(n) % n_classes
    patterns = torch.randn(n_classes, channels, size, size, generator=generator)
    return torch.randn(n, channels, size, size, generator=generator) + patterns[y], y


def vectors(n=40, n_classes=N_CLASSES, seed=0, shape=(20,)):
    generator = seeded(seed)
    y = torch.arange(n) % n_classes
    return torch.randn(n, *shape, generator=generator) + torch.randn(n_classes, *shape, generator=generator)[y], y


def build(kind, width, seed=0):
    """A model in eval mode, with all its parameters and BatchNorm statistics random; and data for it."""
    model = initialise(KINDS[kind](width), seed)
    return model, *(vectors() if kind == "mlp" else images())


def initialise(model, seed=0):
    """Random weights of about the usual size, and BatchNorm statistics that are not the default."""
    generator = seeded(seed)
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() < 2 else (2 / p[0].numel()) ** 0.5
        offset = 1.0 if p.dim() < 2 and name.endswith("weight") else 0.0
        p.data.copy_(offset + scale * torch.randn(p.shape, generator=generator))
    for name, b in model.named_buffers():
        if b.is_floating_point():
            b.copy_(torch.rand(b.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))
    return model.eval()


def pruned_state(model, state, kept):
    """What ``state`` becomes when each set of channels keeps those listed in ``kept``, from the wiring alone."""
    pruned = {}
    for key, value in state.items():
        wires = model.wiring[key.rpartition(".")[0]]
        if value.dim() >= 1 and wires.out is not None:
            value = value[list(kept[wires.out])]
        if value.dim() >= 2 and wires.into is not None:
            features = [i * wires.repeat + j for i in kept[wires.into] for j in range(wires.repeat)]
            value = value[:, features]
        pruned[key] = value
    return pruned


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].shape == value.shape, name
        assert torch.equal(state[name], value), name


def fingerprint(model):
    """Everything of a model that must survive a failure: objects, values, gradients, flags, attributes, hooks."""
    tensors = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        grad = t.grad
        copies = (t.detach().clone(), None if grad is None else grad.clone())
        tensors[name] = (t, grad, *copies, t.requires_grad)
    return tensors, {name: _attributes(m) for name, m in model.named_modules()}


def assert_untouched(model, before):
    tensors, attributes = fingerprint(model)
    tensors_before, attributes_before = before
    assert attributes == attributes_before
    assert list(tensors) == list(tensors_before)
    for name, (t, grad, value, grad_value, requires_grad) in tensors_before.items():
        now = tensors[name]
        assert now[0] is t, f"{name}: another object"
        assert now[1] is grad, f"{name}: another gradient"
        assert _same(now[2], value), name
        assert grad is None or _same(now[3], grad_value), f"{name}: gradient"
        assert now[4] == requires_grad, f"{name}: requires_grad"


def _same(a, b):
    """Equal in type, shape and value, NaN being equal to itself."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=0.123), b.nan_to_num(nan=0.123))


def _attributes(module):
    """Plain attributes by value, hooks and submodules by identity."""
    plain = {}
    for key, value in vars(module).items():
        if key.endswith("_hooks"):
            plain[key] = list(value.values())
        elif key == "_modules":
            plain[key] = [(name, id(child)) for name, child in value.items()]
        elif isinstance(value, (bool, int, float, str, tuple, list)) or value is None:
            plain[key] = list(value) if isinstance(value, list) else value
    return plain


class RmsNorm(nn.Module):
    """A layer that Torch-Pruning does not know."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class RmsNormPruner(tp.pruner.BasePruningFunc):
    """Prunes it as Torch-Pruning prunes its own layers, or as ``keep(layer, kept indices)`` does."""

    def __init__(self, keep=None):
        super().__init__()
        self.keep = keep or self._keep

    def _keep(self, layer, kept):
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)

    def prune_out_channels(self, layer, idxs):
        self.keep(layer, [i for i in range(len(layer.weight)) if i not in set(idxs)])
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return len(layer.weight)

    get_in_channels = get_out_channels
