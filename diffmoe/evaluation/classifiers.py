"""The small classifiers whose features measure images, and the files of weights that this package brings for them.

    digits64    8x8 digits; train_digits64.py makes its weights on one CPU core
    cifar64     32x32 photographs of CIFAR-10's ten classes; train_cifar64.py makes its weights, on a GPU

A file's metadata (`made`) holds the accuracy on images that the training never saw, and digests of data and tensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.config import ConfigError
from diffmoe.data.images import seeded_generator

DIGITS = "digits64"
CIFAR = "cifar64"
SPLIT_SEED = 0


class Classifier(nn.Module):
    """What both share: `forward` returns features (N, 64) and logits (N, 10) of images with values from 0 to 255."""

    name: ClassVar[str]
    """The extractor, its file of weights, and the script train_<name>.py that makes the file."""
    channels: ClassVar[tuple[int, ...]]
    side: ClassVar[int]
    """Height and width of an image in pixels."""

    @classmethod
    def check(cls, shape: tuple[int, ...]) -> None:
        """Raise ConfigError for images of another shape (C, H, W)."""
        if shape[0] not in cls.channels or tuple(shape[1:]) != (cls.side, cls.side):
            raise ConfigError(f"extractor={cls.name}: images of {tuple(shape)}; it takes {cls.side}x{cls.side} images "
                              f"of {' or '.join(map(str, cls.channels))} channels: use an efficientnet-lite0 extractor")


class DigitClassifier(Classifier):
    """A small convolutional classifier of 8x8 grey digits: 64 features, 10 logits, 38 k parameters."""

    name, channels, side = DIGITS, (1, 3), 8

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),  # (N, 32, 4, 4)
        )
        self.features = nn.Linear(32 * 4 * 4, 64)
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, 10) of images (N, 1 or 3, 8, 8)."""
        self.check(images.shape[1:])
        grey = images.float().mean(1, keepdim=True)
        features = F.silu(self.features(self.convolutions(grey / 127.5 - 1).flatten(1)))
        return features, self.logits(features)


class CifarClassifier(Classifier):
    """A residual network of three stages, 32, 64 and 64 wide: 64 pooled features, 10 logits, 321 k parameters.

    He et al. 2016 (arXiv 1512.03385), section 4.2, with fewer and wider blocks: a small step waits for its kernels.
    """

    name, channels, side = CIFAR, (3,), 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stages = nn.Sequential(
            ResidualBlock(32, 32, stride=1), ResidualBlock(32, 32, stride=1),  # (N, 32, 32, 32)
            ResidualBlock(32, 64, stride=2), ResidualBlock(64, 64, stride=1),  # (N, 64, 16, 16)
            ResidualBlock(64, 64, stride=2), ResidualBlock(64, 64, stride=1),  # (N, 64, 8, 8)
        )
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64), none below 0, and logits (N, 10) of images (N, 3, 32, 32)."""
        self.check(images.shape[1:])
        features = self.stages(self.stem(images.float() / 127.5 - 1)).mean((2, 3))
        return features, self.logits(features)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which projects where the shape changes."""

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity() if stride == 1 and inputs == width else nn.Sequential(
            nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, H / stride, W / stride) of (N, inputs, H, W)."""
        return F.relu(self.convolutions(x) + self.shortcut(x))


CLASSIFIERS: dict[str, type[Classifier]] = {DIGITS: DigitClassifier, CIFAR: CifarClassifier}


def classifier_file(name: str) -> Path:
    """Return where the weights of classifier `name` lie in this package."""
    return Path(__file__).with_name(f"{name}.safetensors")


@functools.cache
def load_classifier(name: str) -> Classifier:
    """Return classifier `name` with this package's weights in float32, in eval mode on the CPU.

    Raises:
        ConfigError: when the package lacks the file.
    """
    return read_classifier(name, classifier_file(name))


def read_classifier(name: str, path: Path) -> Classifier:
    """Return classifier `name` with the weights of a file that `write_classifier` wrote, as `load_classifier`.

    Raises:
        ConfigError: when there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"extractor={name}: its weights are missing; python -m diffmoe.evaluation.train_{name} makes "
                          f"{path.name}")
    model = CLASSIFIERS[name]()
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classify(images: Tensor) -> Tensor:
    """Return the digit, int64 (N,), that the shipped classifier sees in each of uint8 images (N, 1 or 3, 8, 8)."""
    model = load_classifier(DIGITS)
    return torch.cat([model(part)[1].argmax(1) for part in images.cpu().split(1024)])


def split(name: str, num_images: int, *, parts: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the images that classifier `name` trains on, and those of one part in `parts`, held out."""
    order = torch.randperm(num_images, generator=seeded_generator(f"{name} split", SPLIT_SEED))
    return order.tensor_split([num_images * (parts - 1) // parts])


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return 12 hex digits that name the tensors' names and values."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].numpy().tobytes())
    return content.hexdigest()[:12]


def write_classifier(model: Classifier, out: Path, *, accuracy: float, required: float, data_digest: str,
                     dtype: torch.dtype = torch.float32, **made: object) -> None:
    """Print the held-out accuracy and write the weights, floating ones as `dtype`, if it is good enough.

    Raises:
        SystemExit: for less than `required`; what was at `out` stays.
    """
    print(f"held-out accuracy {accuracy:.4f}")
    if accuracy < required:
        raise SystemExit(f"{out} is left as it was: {required} is required")
    tensors = {name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
               for name, tensor in model.state_dict().items()}
    made = {"accuracy": round(accuracy, 4), "split_seed": SPLIT_SEED, "data_digest": data_digest,
            "digest": tensors_digest(tensors), **made}
    safetensors.torch.save_file(tensors, out, {"made": json.dumps(made)})  # one key: safetensors shuffles several
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB, tensors {made['digest']}")
